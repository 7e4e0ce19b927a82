"""The results folder. A cell's folder is written whole and marked last; what has no marker is not a result.

::

    <results>/cells/<dataset>/<backbone>/<method>/<guidance>/seed0-<hash>/{record.json, samples.parquet, maps.safetensors, DONE}
                                                                and VERIFIED.json, see `bench.audit.stamp`
    <results>/trainings/<hash>/{checkpoints/, best/, trained.json}
    <results>/failures/<same path as the cell>.json
    <results>/damaged/...                                       what could not be read and was done again, under its old path
    <results>/leases/<hash>.1.json                              who works on what right now, see `bench.sweep.lease`
    <results>/events.jsonl                                      what was begun, ended, failed, interrupted: when, by whom
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
    """What ``DONE`` says, a line each."""

    record_sha256: str
    key: str | None
    """Of the cell; None in markers of older versions, which end after the first line."""
    record_bytes: int | None
    """Size of ``record.json``; None likewise."""


def read_marker(folder: Path) -> Marker | None:
    """The marker of a cell's folder; None if there is none, or what is there is not one."""
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
        """Of which damage there has been a warning already."""

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
        """Whether the cell has a finished record of exactly this identity.

        A look at the marker and at the size of the record; only where the marker is of an older version the record is read. A cell whose
        record is damaged is not done, and a warning names the file.
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
        """Whether the training has come to its end. Not so where ``trained.json`` is damaged; a warning names it."""
        folder = self.training_folder(training)
        try:
            return bool(read_trained(folder)["training"] == training.key)
        except FileNotFoundError:
            return False
        except ValueError as error:
            return self._named(str(error))

    def _has_weights(self, training: Training) -> bool:
        """Whether the selected weights of a finished training are whole: a look at all their bytes. If not so, a warning names the file."""
        try:
            check_checkpoint(selected_weights(self.training_folder(training)))
        except DamagedCheckpointError as error:
            return self._named(f"{error}; bench run trains it again")
        return True

    def _named(self, damage: str) -> Literal[False]:
        """Warn of a damaged file once, and count it as not there."""
        if damage not in self._warned:
            self._warned.add(damage)
            _log.warning("%s", damage)
        return False

    def _set_aside(self, path: Path) -> None:
        """Move what cannot be used out of the way. Nothing is thrown away: somebody may be able to read it."""
        place = self.root / "damaged" / path.relative_to(self.root)
        while place.exists():
            place = place.with_name(f"{place.name}-again")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)  # a part of the results folder may be a link to another disk
        _log.warning("%s cannot be used and is kept as %s", path, place)

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
        """What `fail` wrote last about exactly this cell; None if it did not fail, or has been finished since."""
        try:
            content: dict[str, Any] = json.loads(self.failure_file(cell).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if content.get("key") == cell.key else None

    def newest_checkpoint(self, training: Training) -> Path | None:
        """The folder of the last checkpoint of an unfinished training; its name is the number of steps done."""
        return newest_checkpoint(self.training_folder(training) / "checkpoints")

    def tidy(self, planned: Planned) -> None:
        """Remove what interrupted writes left behind, and set a training aside that says it is finished and is damaged.

        Only for who holds the lease of the training: another may be writing.

        Raises:
            PermissionError: the weights are there and cannot be read, which is no damage.
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
    """A folder and all below it, each with the names of the folders and files in it, in order; names of folders taken out are not entered.

    Links to folders are followed, as a run follows them: a part of the results may lie on another disk. What several links lead to comes
    once.
    """
    seen = set()
    for name, below, files in os.walk(root, followlinks=True):
        place = os.path.realpath(name)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        folder = Path(name)
        below.sort(key=lambda child: ((folder / child).is_symlink(), child))  # a folder counts by its own name, if it has one here
        yield folder, below, files


def list_cells(root: Path) -> list[Path]:
    """The folders of all finished cells below a folder, in a stable order, but for those that were set aside as damaged."""
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
        root: a results folder, or any other above some cells.
        strict: raise at a damaged record; else it is left out and a warning names it.

    Raises:
        ValueError: a damaged record, naming the file, where ``strict``.
    """
    for folder in list_cells(root):
        marker, path = folder / DONE, folder / RECORD
        try:
            record = parse_record(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = f"{path} is not a readable record: {str(error).splitlines()[0]}"
            if strict:
                raise ValueError(f"{reason}. Remove {marker}, and bench run makes the record again") from error
            _log.warning("%s. It is left out. Remove %s, and bench run makes the record again", reason, marker)
            continue
        yield folder, record


def read_cell_rows(folder: Path) -> Rows:
    """The per-sample rows of a finished cell."""
    return read_rows(folder / ROWS)
