"""``bench verify --rerun``: load the weights behind records, evaluate them again, and compare with the rows.

The only check that a consistent forgery (rows, figures, hashes, siblings) cannot pass: it needs weights that do what is claimed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.audit.verify_record import Problem, read_checked, shown
from bench.data.index import Index
from bench.data.readers import open_reader
from bench.evaluation.class_maps import AverageMaps, read_average_maps
from bench.evaluation.differences import Difference, compare_rows
from bench.evaluation.evaluator import Evaluated, Unusable, evaluate
from bench.evaluation.measures import choice_of
from bench.runtime.engine import Engine
from bench.runtime.observer import Observer
from bench.sweep.record import Record
from bench.sweep.restore import Restored, restore
from bench.sweep.store import MAPS, RECORD, ROWS, read_cell_rows
from bench.training.build import build_reader
from bench.training.checkpoint import hash_weights

TOLERANCE = 1e-4
"""Between a recorded value and the one found again, where machine, library versions or batch differ: of logits in units of the largest, of
cosines as they are. On the machine that wrote the rows it is 0."""
EXCEPTIONS, SHIFT = 0.01, 1e-3
"""Where a figure is of a map, rounding may decide a tie: which of two nearly equal values a read-out follows, which of two pixels is the
higher. Such a column may have this share of samples that differ by more, if the mean over classes, which tables show, moves by no more
than this."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """What came of one record."""

    folder: Path
    largest: float
    """Largest difference found, whatever the column, but for ``ties``; infinite if it could not be evaluated again."""
    problems: tuple[Problem, ...]
    ties: int = 0
    """Figures of samples that differ by more, and are let pass: see `EXCEPTIONS`."""
    shift: float = 0.0
    """Most that they move a mean."""


def rerun(
    folders: Sequence[Path],
    *,
    trainings: Path | None,
    data: Mapping[str, tuple[Path, Index]],
    engine: Engine,
    observer: Observer,
    tolerance: float = TOLERANCE,
) -> Iterator[Rerun]:
    """Evaluate the weights of records again; records of one training in one pass.

    Args:
        folders: of records that can be read.
        trainings: folder of the trainings; None = ``trainings`` of the results folder each record lies in.
        data: fingerprint -> folder and index, of the prepared datasets at hand.
        engine: processes and device.
        observer: told of progress.
        tolerance: largest difference that is not reported, but for `EXCEPTIONS`; 0 = every bit, without exceptions.
    """
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for folder in folders:
        record = read_checked(folder)
        place = _trainings(folder) if trainings is None else trainings
        alike = [str(place), record.training_key, record.attention_layer, record.evaluation, record.config.get("evaluation")]
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append((folder, record))
    for members in groups.values():
        first_folder, first = members[0]
        place = (trainings or _trainings(first_folder)) / first.training_key[:16]
        try:
            if first.data.fingerprint not in data:
                raise FileNotFoundError(f"its data {first.data.fingerprint[:16]} is not among the prepared datasets at hand; see --data")
            restored = restore(place)
            results = _evaluate_again([record for _, record in members], restored, *data[first.data.fingerprint], engine, observer)
        except Exception as error:  # noqa: BLE001 - whatever comes of damaged weights, or of a method's own code
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            for folder, _ in members:
                problem = Problem(
                    folder / RECORD, "--rerun", "a training", f"it cannot be evaluated again: {reason}", "nothing was compared"
                )
                yield Rerun(folder=folder, largest=float("inf"), problems=(problem,))
            continue
        weights = hash_weights(restored.classifier)
        for folder, record in members:
            problems = _identity_problems(folder, record, place, key=restored.training.key, weights=weights)
            result = results[record.key]
            if isinstance(result, Unusable):
                problem = Problem(folder / ROWS, "maps", "maps of finite values", result.reason, "these weights did not give the rows")
                yield Rerun(folder=folder, largest=float("inf"), problems=(*problems, problem))
                continue
            yield _compared(folder, record, result, problems, tolerance=tolerance)


def _trainings(folder: Path) -> Path:
    """Of the results folder that a cell's folder lies in; beside the cell if it lies in none."""
    place = folder.resolve()
    cells = next((parent for parent in place.parents if parent.name == "cells"), place)
    return cells.parent / "trainings"


def _evaluate_again(
    records: Sequence[Record], restored: Restored, folder: Path, index: Index, engine: Engine, observer: Observer
) -> Mapping[str, Evaluated | Unusable]:
    """Results by key of the cell, of records of one training and the same evaluation settings."""
    first = records[0]
    return evaluate(
        restored.classifier.to(engine.device),
        {record.key: build_reader(record.as_cell) for record in records},
        open_reader(folder, first.data.split),
        size=first.settings["images"]["size"],
        batch_size=first.config["evaluation"]["batch_size"],
        au_variant=first.evaluation["au_maps"],
        attention_layer=first.attention_layer,
        measures=choice_of(first.as_cell),
        keys_sha256=index.splits[first.data.split].keys_sha256,
        engine=engine,
        observer=observer,
        label=first.training.label,
    )


def _identity_problems(folder: Path, record: Record, place: Path, *, key: str, weights: str) -> list[Problem]:
    meaning = "the weights are not those of the record"
    return [
        Problem(folder / RECORD, what, shown(recorded), f"{place} has {actual}", meaning)
        for what, recorded, actual in (("training_key", record.training_key, key), ("weights_sha256", record.weights_sha256, weights))
        if recorded != actual
    ]


def _compared(folder: Path, record: Record, result: Evaluated, problems: list[Problem], *, tolerance: float) -> Rerun:
    rows = read_cell_rows(folder)
    if list(rows.keys) != list(result.rows.keys):
        problems.append(
            Problem(folder / ROWS, "column key", f"{len(rows.keys)} samples", "the data has others", "other samples were evaluated")
        )
        return Rerun(folder=folder, largest=float("inf"), problems=tuple(problems))
    differences, let_pass = list[Difference](), list[Difference]()
    for difference in compare_rows(rows, result.rows):
        (let_pass if difference.largest > tolerance and _by_ties(difference, tolerance=tolerance) else differences).append(difference)
    problems += [
        Problem(
            folder / ROWS,
            f"sample {shown(difference.key)}, column {difference.column}",
            difference.recorded,
            f"its weights give {difference.actual} (difference {difference.largest:.2g}, allowed {tolerance:g})",
            f"these weights did not give the rows, which say to be of {shown(record.hardware.get('name'))}",
        )
        for difference in differences
        if not difference.largest <= tolerance
    ]
    if record.maps_sha256 is not None:
        problems += _map_problems(folder / MAPS, result.maps, tolerance=tolerance)
    return Rerun(
        folder=folder,
        largest=max(difference.largest for difference in differences),
        problems=tuple(problems),
        ties=sum(difference.beyond(tolerance) for difference in let_pass),
        shift=max((difference.shift for difference in let_pass), default=0.0),
    )


def _by_ties(difference: Difference, *, tolerance: float) -> bool:
    """Whether so few samples differ, and so little in the mean, that rounding explains it; never if every bit is asked for."""
    few = difference.beyond(tolerance) <= EXCEPTIONS * len(difference.gaps) and difference.shift <= SHIFT
    return tolerance > 0 and difference.of_map and math.isfinite(difference.largest) and few


def _map_problems(path: Path, maps: AverageMaps, *, tolerance: float) -> Iterator[Problem]:
    """Stored maps are rounded to steps of 1/255, so that the least difference may move one by a step."""
    allowed = max(1, round(255 * tolerance))
    try:
        stored = read_average_maps(path)
    except (ValueError, OSError) as error:
        yield Problem(path, "maps", "average maps", f"they are not readable: {error}", "nothing was compared")
        return
    for field in dataclasses.fields(AverageMaps):
        recorded, actual = getattr(stored, field.name), getattr(maps, field.name)
        if recorded.shape != actual.shape:
            yield Problem(path, field.name, f"shape {recorded.shape}", f"its weights give {actual.shape}", "not the maps of these weights")
            continue
        gaps = np.abs(recorded.astype(np.int64) - actual).reshape(len(recorded), -1).max(axis=1, initial=0)
        if field.name == "example_map" and tolerance > 0 and (gaps > allowed).sum() == 1:
            continue  # a tie, see `EXCEPTIONS`
        if (steps := int(gaps.max(initial=0))) > (allowed if recorded.dtype == np.uint8 else 0):
            gap = f"its weights give values up to {steps} steps of 1/255 away, {allowed} allowed"
            yield Problem(path, field.name, "average maps", gap, "not the maps of these weights")
