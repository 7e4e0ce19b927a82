"""The results folder. A cell's folder is written whole and marked last; what has no marker is not a result.

::

    <results>/cells/<dataset>/<backbone>/<method>/<guidance>/seed0-<hash>/{record.json, samples.parquet, maps.safetensors, DONE}
                                                                and VERIFIED.json, see `bench.sweep.stamp`
    <results>/trainings/<hash>/{checkpoints/, best/, trained.json}
    <results>/failures/<same path as the cell>.json
    <results>/leases/<hash>.1.json                              who works on what right now, see `bench.sweep.lease`
    <results>/events.jsonl                                      what was begun, ended, failed, interrupted: when, by whom
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.data.atomic import PARTIAL_SUFFIX, fsync_folder, write_bytes_atomic, write_json_atomic
from bench.evaluation.averages import AverageMaps, write_average_maps
from bench.evaluation.rows import Rows, read_rows, write_rows
from bench.matrix import Cell, Planned, Training
from bench.sweep.record import Record, parse_record
from bench.training.checkpoint import hash_file

DONE = "DONE"
RECORD = "record.json"
ROWS = "samples.parquet"
MAPS = "maps.safetensors"


class Hashes(NamedTuple):
    """sha256 of the files beside a record."""

    rows: str
    maps: str


class Store:
    """Reads and writes one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def cell_folder(self, cell: Cell) -> Path:
        """Where a cell's record lives."""
        return self.root / "cells" / cell.path

    def training_folder(self, training: Training) -> Path:
        """Where a training's weights live."""
        return self.root / "trainings" / training.key[:16]

    def failure_file(self, cell: Cell) -> Path:
        """Where a cell's last error is told."""
        return self.root / "failures" / f"{cell.path}.json"

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has a finished record of exactly this identity."""
        folder = self.cell_folder(cell)
        return (folder / DONE).is_file() and json.loads((folder / RECORD).read_text(encoding="utf-8"))["key"] == cell.key

    def is_trained(self, training: Training) -> bool:
        """Whether the training has come to its end."""
        path = self.training_folder(training) / "trained.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["training"] == training.key

    def write(self, cell: Cell, rows: Rows, maps: AverageMaps, make_record: Callable[[Hashes], Record]) -> Path:
        """Write a finished cell: rows, maps and record beside its final place, rename, marker last; forget an earlier failure.

        After an error, a full disk for one, nothing of it is left.

        Args:
            cell: whose result it is; not finished yet.
            rows: its per-sample rows.
            maps: its average maps.
            make_record: gives the record, from the hashes of the files beside it.
        """
        final = self.cell_folder(cell)
        assert not (final / DONE).exists(), f"{final} is finished: it is never written again"
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            write_rows(temporary / ROWS, rows)
            write_average_maps(temporary / MAPS, maps)
            record = make_record(Hashes(rows=hash_file(temporary / ROWS), maps=hash_file(temporary / MAPS)))
            write_bytes_atomic(temporary / RECORD, (record.model_dump_json(indent=2) + "\n").encode())
            temporary.chmod(0o755)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_folder(final.parent)
            write_bytes_atomic(final / DONE, f"{hash_file(final / RECORD)}\n".encode())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if not (final / DONE).exists():
                shutil.rmtree(final, ignore_errors=True)
            raise
        self.failure_file(cell).unlink(missing_ok=True)
        return final

    def fail(self, cell: Cell, failure: dict[str, Any]) -> None:
        """Record why a cell failed; the next run tries it again."""
        path = self.failure_file(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"cell": cell.label, "key": cell.key, **failure})

    def read_failure(self, cell: Cell) -> dict[str, Any] | None:
        """What `fail` wrote last about exactly this cell; None if it did not fail, or has been finished since."""
        try:
            content: dict[str, Any] = json.loads(self.failure_file(cell).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if content.get("key") == cell.key else None

    def newest_checkpoint(self, training: Training) -> Path | None:
        """The folder of the last checkpoint of an unfinished training; its name is the number of steps done."""
        folder = self.training_folder(training) / "checkpoints"
        return max((path for path in folder.glob("[0-9]*") if path.is_dir()), default=None)

    def tidy(self, planned: Planned) -> None:
        """Remove what interrupted writes left behind. Only for who holds the lease of the training: another may be writing."""
        folder = self.training_folder(planned.training)
        leftovers = [*folder.glob(f"*{PARTIAL_SUFFIX}"), *folder.glob("checkpoints/.*"), *folder.glob("best/.*")]
        if self.is_trained(planned.training):
            leftovers += folder.glob("checkpoints")
        for cell in planned.cells:
            final, failure = self.cell_folder(cell), self.failure_file(cell)
            leftovers += final.parent.glob(f".{final.name}-*")
            leftovers += failure.parent.glob(f"{failure.name}.*{PARTIAL_SUFFIX}")
        for leftover in leftovers:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def read_records(root: Path) -> Iterator[tuple[Path, Record]]:
    """All finished records below a folder, in a stable order, with their folders.

    Raises:
        ValueError: a record that does not validate, naming the file.
    """
    for marker in sorted(root.rglob(DONE)):
        path = marker.parent / RECORD
        try:
            yield marker.parent, parse_record(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable record: {error}") from error


def read_cell_rows(folder: Path) -> Rows:
    """The per-sample rows of a finished cell."""
    return read_rows(folder / ROWS)
