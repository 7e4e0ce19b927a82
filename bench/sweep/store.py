"""The results folder. A cell's folder is written whole and marked last; what has no marker is not a result.

::

    <results>/cells/<dataset>/<backbone>/<method>/<guidance>/seed0-<hash>/{record.json, samples.parquet, DONE}
    <results>/trainings/<hash>/{checkpoints/, best/, trained.json}
    <results>/failures/<same path as the cell>.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.data.atomic import fsync_folder, write_bytes_atomic, write_json_atomic
from bench.evaluation.rows import Rows, read_rows, write_rows
from bench.matrix import Cell, Training
from bench.sweep.record import Record
from bench.training.checkpoint import hash_file

DONE = "DONE"
RECORD = "record.json"
ROWS = "samples.parquet"


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

    def write_rows(self, cell: Cell, rows: Rows) -> tuple[Path, str]:
        """Put a cell's rows into a temporary folder beside its final place; returns the folder and the file's sha256."""
        final = self.cell_folder(cell)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        write_rows(temporary / ROWS, rows)
        return temporary, hash_file(temporary / ROWS)

    def finish(self, cell: Cell, temporary: Path, record: Record) -> Path:
        """Complete the folder begun by `write_rows`: record, rename, marker last; forget an earlier failure."""
        final = self.cell_folder(cell)
        write_bytes_atomic(temporary / RECORD, (record.model_dump_json(indent=2) + "\n").encode())
        temporary.chmod(0o755)
        if final.exists():  # an unfinished one: a finished one is never written again
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(final.parent)
        write_bytes_atomic(final / DONE, f"{hash_file(final / RECORD)}\n".encode())
        self.failure_file(cell).unlink(missing_ok=True)
        return final

    def fail(self, cell: Cell, failure: dict[str, Any]) -> None:
        """Record why a cell failed; the next run tries it again."""
        path = self.failure_file(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"cell": cell.label, "key": cell.key, **failure})

    def sweep_leftovers(self) -> None:
        """Remove folders that an interrupted write left behind."""
        for leftover in (self.root / "cells").glob("*/*/*/*/.seed*"):
            shutil.rmtree(leftover)


def read_records(root: Path) -> Iterator[tuple[Path, Record]]:
    """All finished records below a folder, in a stable order, with their folders.

    Raises:
        ValueError: a record that does not validate, naming the file.
    """
    for marker in sorted(root.rglob(DONE)):
        path = marker.parent / RECORD
        try:
            yield marker.parent, Record.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable record: {error}") from error


def read_cell_rows(folder: Path) -> Rows:
    """The per-sample rows of a finished cell."""
    return read_rows(folder / ROWS)
