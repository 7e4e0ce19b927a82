"""The results folder. The folder of a cell is written whole, and its marker last; a folder without a marker is not a result.

::

    <results>/cells/<dataset>/<backbone>/<method>/<guidance>/seed0-<hash>/{record.json, samples.parquet, maps.safetensors, DONE}
                                                                and VERIFIED.json, see `bench.audit.stamp`
    <results>/trainings/<hash>/{checkpoints/, best/, trained.json}
    <results>/failures/<same path as the cell>.json
    <results>/damaged/...                                       folders that could not be read and were done again, under their old paths
    <results>/leases/<hash>.1.json                              which run works on a training now, see `bench.sweep.lease`
    <results>/events.jsonl                                      what began, ended, failed, was interrupted, see `bench.sweep.events`
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.evaluation.class_maps import AverageMaps, write_average_maps
from bench.evaluation.rows import Rows, read_rows, write_rows
from bench.io import PARTIAL_SUFFIX, file_sha256, fsync_folder, temporary_folder, write_bytes_atomic, write_json_atomic
from bench.matrix import Cell, Planned, Training
from bench.sweep.record import Record, parse_record
from bench.training.checkpoint import DamagedCheckpointError, check_checkpoint, newest_checkpoint
from bench.training.trainer import TRAINED, read_trained, selected_weights

_log = logging.getLogger(__name__)

DONE = "DONE"
RECORD = "record.json"
ROWS = "samples.parquet"
MAPS = "maps.safetensors"


class Hashes(NamedTuple):
    """sha256 of the files beside a record."""

    rows: str
    maps: str


class Marker(NamedTuple):
    """The content of ``DONE``, a line a field."""

    record_sha256: str
    key: str | None
    """Key of the cell. None in markers of older versions, which end after the first line."""
    record_bytes: int | None
    """Size of ``record.json``. None in markers of older versions."""


def read_marker(folder: Path) -> Marker | None:
    """The marker of a cell's folder. None without a marker, or where the file is no marker."""
    try:
        sha256, *more = (folder / DONE).read_text(encoding="utf-8").split()
        return Marker(sha256, more[0], int(more[1])) if more else Marker(sha256, None, None)
    except (OSError, ValueError, IndexError):
        return None


class Store:
    """Reads and writes one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warned: set[str] = set()
        """Damage that has been warned of already."""

    def cell_folder(self, cell: Cell) -> Path:
        """The folder of a cell's record."""
        return self.root / "cells" / cell.path

    def training_folder(self, training: Training) -> Path:
        """The folder of a training's weights."""
        return self.root / "trainings" / training.key[:16]

    def failure_file(self, cell: Cell) -> Path:
        """The file with a cell's last error."""
        return self.root / "failures" / f"{cell.path}.json"

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has a finished record of exactly this identity.

        This reads the marker and the size of the record; the record itself only where the marker is of an older version. A cell with a
        damaged record is not done, and a warning names the file.
        """
        folder = self.cell_folder(cell)
        if not (folder / DONE).is_file():
            return False
        marker, path = read_marker(folder), folder / RECORD
        if marker is None:
            return self._named(f"{folder / DONE} is damaged; bench run does this cell again")
        try:
            size = path.stat().st_size
            key = json.loads(path.read_bytes())["key"] if marker.key is None else marker.key
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self._named(f"{path} is damaged: {type(error).__name__}: {error}; bench run does this cell again")
        if marker.record_bytes not in (None, size):
            sizes = f"it has {size} bytes, its marker says {marker.record_bytes}"
            return self._named(f"{path} is damaged: {sizes}; bench run does this cell again")
        return bool(key == cell.key)

    def is_trained(self, training: Training) -> bool:
        """Whether the training is finished. A damaged ``trained.json`` counts as unfinished, and a warning names it."""
        folder = self.training_folder(training)
        try:
            return bool(read_trained(folder)["training"] == training.key)
        except FileNotFoundError:
            return False
        except ValueError as error:
            return self._named(str(error))

    def _has_weights(self, training: Training) -> bool:
        """Whether the selected weights of a finished training are whole. This reads all their bytes; a warning names a damaged file."""
        try:
            check_checkpoint(selected_weights(self.training_folder(training)))
        except DamagedCheckpointError as error:
            return self._named(f"{error}; bench run trains it again")
        return True

    def _named(self, damage: str) -> Literal[False]:
        """Warn of a damaged file once. The result says that it counts as missing."""
        if damage not in self._warned:
            self._warned.add(damage)
            _log.warning("%s", damage)
        return False

    def _set_aside(self, path: Path) -> None:
        """Move a folder that cannot be used to ``damaged``. Nothing is deleted: somebody may be able to read it."""
        place = self.root / "damaged" / path.relative_to(self.root)
        while place.exists():
            place = place.with_name(f"{place.name}-again")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)  # a part of the results folder may be a link to another disk
        _log.warning("%s cannot be used and is kept as %s", path, place)

    def write(self, cell: Cell, rows: Rows, maps: AverageMaps, make_record: Callable[[Hashes], Record]) -> Path:
        """Write a finished cell: rows, maps and record in a folder beside the final one, then rename, then the marker.

        An earlier failure of the cell is removed. After an error (a full disk), nothing of the cell is left.

        Args:
            cell: the cell; not finished yet.
            rows: its per-sample rows.
            maps: its average maps.
            make_record: makes the record from the hashes of the files beside it.
        """
        final = self.cell_folder(cell)
        assert not self.is_done(cell), f"{final} is finished: it is never written again"
        if (final / DONE).exists():
            self._set_aside(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder(final)
        try:
            write_rows(temporary / ROWS, rows)
            write_average_maps(temporary / MAPS, maps)
            record = make_record(Hashes(rows=file_sha256(temporary / ROWS), maps=file_sha256(temporary / MAPS)))
            write_bytes_atomic(temporary / RECORD, (record.model_dump_json(indent=2) + "\n").encode())
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_folder(final.parent)
            marker = (file_sha256(final / RECORD), cell.key, str((final / RECORD).stat().st_size))
            write_bytes_atomic(final / DONE, ("\n".join(marker) + "\n").encode())
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
        """The last failure of exactly this cell. None if it did not fail, or has been finished since."""
        try:
            content: dict[str, Any] = json.loads(self.failure_file(cell).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if content.get("key") == cell.key else None

    def newest_checkpoint(self, training: Training) -> Path | None:
        """The folder of the last checkpoint of an unfinished training. Its name is the number of finished steps."""
        return newest_checkpoint(self.training_folder(training) / "checkpoints")

    def tidy(self, planned: Planned) -> None:
        """Remove what interrupted writes left behind, and set a finished training aside that is damaged.

        Call it only with the lease of the training: without it, another process may be writing.

        Raises:
            PermissionError: the weights cannot be read, which is no damage.
        """
        folder = self.training_folder(planned.training)
        if (folder / TRAINED).exists() and not (self.is_trained(planned.training) and self._has_weights(planned.training)):
            self._set_aside(folder)
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


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield a folder and all folders below it, with the names of the folders and files in each, in order.

    A folder whose name the caller removes is not entered. Links to folders are followed, as a run follows them: a part of the results may
    lie on another disk. A folder that several links lead to comes once.
    """
    seen = set()
    for name, below, files in os.walk(root, followlinks=True):
        place = os.path.realpath(name)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        folder = Path(name)
        below.sort(key=lambda child: ((folder / child).is_symlink(), child))  # prefer a folder's own name to a link
        yield folder, below, files


def list_cells(root: Path) -> list[Path]:
    """The folders of all finished cells below a folder, in a stable order, without those that were set aside as damaged."""
    cells = []
    for folder, below, files in walk(root):
        if "damaged" in below:
            below.remove("damaged")
        if DONE in files:
            cells.append(folder)
    return sorted(cells)


def read_records(root: Path, *, strict: bool = False) -> Iterator[tuple[Path, Record]]:
    """All finished records below a folder, in a stable order, with their folders.

    Args:
        root: a results folder, or any folder above cells.
        strict: whether a damaged record is an error. Otherwise it is left out, and a warning names it.

    Raises:
        ValueError: ``strict``, and a damaged record; the message names the file.
    """
    for folder in list_cells(root):
        marker, path = folder / DONE, folder / RECORD
        try:
            record = parse_record(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = f"{path} is not a readable record: {str(error).splitlines()[0]}"
            if strict:
                raise ValueError(f"{reason}. Remove {marker}; then bench run makes the record again") from error
            _log.warning("%s. It is left out. Remove %s; then bench run makes the record again", reason, marker)
            continue
        yield folder, record


def read_cell_rows(folder: Path) -> Rows:
    """The per-sample rows of a finished cell."""
    return read_rows(folder / ROWS)
