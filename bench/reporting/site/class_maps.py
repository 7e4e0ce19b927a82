"""The average maps beside a record, checked against it."""

from __future__ import annotations

from pathlib import Path

from bench.evaluation.class_maps import AverageMaps, read_average_maps
from bench.io import file_sha256
from bench.sweep.record import Record
from bench.sweep.store import MAPS


def maps_of(folder: Path, record: Record) -> AverageMaps | None:
    """The average maps of a finished cell; None if its record is older than average maps.

    Raises:
        ValueError: the file is missing, is not the one the record was written with, or is not of the record's classes and samples.
    """
    if record.maps_sha256 is None:
        return None
    path = folder / MAPS
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the record beside it has its hash: restore the file, or run the cell again")
    if file_sha256(path) != record.maps_sha256:
        raise ValueError(f"{path} does not match the hash in its record: one of the two was changed. Run bench verify {folder}")
    maps = read_average_maps(path)
    for name, form, wanted in maps.misfits(classes=len(record.data.classes), examples=len(maps.example_position)):
        raise ValueError(f"{path}: {name!r} is {form}, it should be {wanted}; see bench verify {folder}")
    if not all(0 <= position < record.data.samples for position in maps.example_position.tolist()):
        raise ValueError(f"{path}: its examples are not of {record.data.samples} samples; see bench verify {folder}")
    return maps
