"""One record by itself: are its files the ones it was written with, do its rows give its figures, do its settings give its keys?

Only reads, and trusts nothing that it reads: no path and no name in a record is followed or imported, links are refused, a file is measured
before it is read and its columns are looked at before they are unpacked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.au.maps import expression_ids
from bench.audit.stamp import STAMP, read_stamp
from bench.backbone import BACKBONES
from bench.data.index import hash_keys
from bench.evaluation.class_maps import EXAMPLES, AverageMaps, read_average_maps
from bench.evaluation.invariance import TOLERANCE as INVARIANCE_TOLERANCE
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows, read_rows
from bench.io import file_sha256
from bench.matrix import digest
from bench.method import METHODS
from bench.sweep.record import Record, parse_record
from bench.sweep.store import DONE, MAPS, RECORD, ROWS, read_marker

FILES = (RECORD, ROWS, MAPS, DONE)
"""What a cell's folder may hold, a stamp aside."""

TOLERANCE = 1e-12
"""Between a recorded figure and the one its rows give: sums in another order, no more."""
COSINE_SLACK = 1e-5
"""A cosine computed in float32 may end so far outside [-1, 1]."""

_MOST_BYTES = {RECORD: 64 << 20, ROWS: 1 << 30, MAPS: 256 << 20, DONE: 4096}
_MOST_UNPACKED = 4 << 30
_MOST_ROWS = 20_000_000
_LONGEST_KEY = 4096
_SHOWN = 100
"""Characters of a value that a message repeats."""
_COLUMNS = re.compile(
    r"key|label|person|predicted|logits|au_valid|map_(cosine|range)_(true|predicted)|attention_cosine_\d+|measure_[a-z0-9_]+"
)
_REQUIRED = ("key", "label", "predicted", "logits", "au_valid", "map_cosine_true", "map_cosine_predicted")


class Problem(NamedTuple):
    """A value of a record that is wrong."""

    file: Path
    what: str
    """The part of the file: ``metrics.cl.accuracy``, ``sample s0012``."""
    recorded: str
    """The value in the record or the file."""
    actual: str
    """What the check gives instead."""
    meaning: str
    """What it means, for a reader who does not know this program."""

    def __str__(self) -> str:
        line = f"{self.file}: {self.what}: recorded {self.recorded}, {self.actual}: {self.meaning}"
        return printable(line)


def printable(text: str) -> str:
    """A line without what a terminal would obey: names of folders may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A value from a record, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prints:
    """Hashes of the columns of the rows: what tells records apart without keeping the rows of thousands."""

    keys: str
    labels: str
    people: str | None
    """None where no person is known."""
    au_valid: str
    logits: str
    attention: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is kept of a record that could be read, to compare it with others."""

    folder: Path
    key: str
    training_key: str
    label: str
    method: str
    seed: int
    siblings: str
    """Hash of everything that decided the weights but the seed."""
    weights_sha256: str
    fingerprint: str
    split: str
    classes: tuple[str, ...]
    au_maps: str
    """Hash of what decides whether a face has an AU map, the data apart: their geometry, and the size of pictures."""
    course: str
    """Hash of the training's course and selection."""
    trained_in: Any
    """Equal for records of one training that was carried out once: the seconds it took."""
    one_pass: Any
    """Equal for records of one training that were evaluated in one pass: the seconds it took."""
    samples: int
    prints: Prints | None
    """None if the rows cannot be read."""


def check_record(folder: Path) -> tuple[list[Problem], Facts | None]:
    """Look at one cell's folder; all problems, and what is to be compared with other records (None if the record cannot be read)."""
    problems = list(_file_problems(folder))
    refused = {problem.file.name for problem in problems}
    if RECORD in refused:
        return problems, None
    path = folder / RECORD
    content = path.read_bytes()
    if DONE not in refused:
        problems += _marker_problems(folder, content)
    try:
        record = parse_record(content)
    except (ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problems.append(Problem(path, "schema", "a record", f"it is not readable: {reason}", "damaged, or edited beyond recognition"))
        return problems, None
    constants: list[str] = []
    json.loads(content, parse_constant=constants.append)
    if constants:
        problems.append(Problem(path, "numbers", constants[0], "JSON has no such number", "no figure of bench is written like this"))
    problems += _identity_problems(folder, record)
    problems += _settings_problems(path, record)
    rows = None
    if ROWS not in refused:
        problems += _hash_problems(folder / ROWS, "rows_sha256", record.rows_sha256)
        row_problems, rows = _read(folder / ROWS, record)
        problems += row_problems
    if rows is not None:
        problems += _row_problems(folder / ROWS, record, rows)
        problems += _metric_problems(path, record, rows)
    if MAPS not in refused:
        problems += _maps_problems(folder / MAPS, record, rows)
    problems += _stamp_problems(folder, record, content)
    return problems, _facts(folder, record, rows)


def read_checked(folder: Path) -> Record:
    """The record of a folder that `check_record` could read."""
    return parse_record((folder / RECORD).read_bytes())


def _facts(folder: Path, record: Record, rows: Rows | None) -> Facts:
    return Facts(
        folder=folder,
        key=record.key,
        training_key=record.training_key,
        label=record.as_cell.label,
        method=record.cell.method,
        seed=record.cell.seed,
        siblings=digest(record.training.identity | {"seed": None}),
        weights_sha256=record.weights_sha256,
        fingerprint=record.data.fingerprint,
        split=record.data.split,
        classes=record.data.classes,
        au_maps=digest([record.evaluation.get("au_maps"), record.settings.get("images")]),
        course=digest([record.epochs, record.selection]),
        trained_in=record.cost.get("training_seconds"),
        one_pass=record.cost.get("evaluation_seconds"),
        samples=record.data.samples,
        prints=None if rows is None else _prints(rows),
    )


def _prints(rows: Rows) -> Prints:
    attention = [values for _, values in sorted(rows.attention_cosines.items())]
    return Prints(
        keys=hash_order(rows.keys),
        labels=hash_arrays(rows.labels),
        people=hash_arrays(rows.people) if (rows.people >= 0).any() else None,
        au_valid=hash_arrays(rows.au_valid),
        logits=hash_arrays(rows.logits),
        attention=hash_arrays(*attention),
    )


def hash_order(keys: Sequence[str]) -> str:
    """sha256 of keys as they follow each other."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def hash_arrays(*arrays: npt.NDArray[Any]) -> str:
    """sha256 of the values of some columns."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# --- files


def _file_problems(folder: Path) -> Iterator[Problem]:
    """Files that are not read further: links, what is no file, what is larger than any of its kind; and missing ones."""
    for name in FILES:
        path = folder / name
        if path.is_symlink():
            yield Problem(path, "file", "a file", "it is a symbolic link", "links are not followed; the record must lie where it is shown")
        elif path.is_file():
            size = path.stat().st_size
            if size > _MOST_BYTES[name]:
                yield Problem(
                    path, "size", f"at most {_MOST_BYTES[name]} bytes", f"it has {size}", "not read: no such file of bench is so large"
                )
        elif path.exists():
            yield Problem(path, "file", "a file", "it is none", "not read")
        elif name == DONE:
            yield Problem(path, "marker", "a finished result", "there is no marker", "the tables leave it out, or the marker was removed")
        elif name != MAPS:
            yield Problem(path, "file", "a file", "it is missing", "the result is not whole: copy the whole folder again")


def _marker_problems(folder: Path, content: bytes) -> Iterator[Problem]:
    marker, actual = read_marker(folder), hashlib.sha256(content).hexdigest()
    recorded = marker.record_sha256 if marker else "no marker"
    if recorded != actual:
        yield Problem(
            folder / DONE,
            f"sha256 of {RECORD}",
            shown(recorded),
            f"it has {actual}",
            "the record was changed after it was finished",
        )


def _hash_problems(path: Path, field: str, recorded: str) -> Iterator[Problem]:
    actual = file_sha256(path)
    if actual != recorded:
        yield Problem(path, field, shown(recorded), f"the file has {actual}", "this is not the file that the record was written with")


def _maps_problems(path: Path, record: Record, rows: Rows | None) -> Iterator[Problem]:
    if record.maps_sha256 is None:
        if path.exists():
            yield Problem(path, "maps_sha256", "no maps", "there is a file of maps", "it does not belong to the record")
        return
    if not path.exists():
        yield Problem(path, "maps_sha256", shown(record.maps_sha256), "the file is missing", "copy the whole folder again")
        return
    yield from _hash_problems(path, "maps_sha256", record.maps_sha256)
    try:
        maps = read_average_maps(path)
    except (ValueError, OSError) as error:
        yield Problem(path, "maps", "average maps", f"they are not readable: {shown(str(error))}", "damaged: copy it again")
        return
    if rows is not None and not _no_label(record, rows).any():
        yield from _content_problems(path, maps, rows.labels, classes=len(record.data.classes))


def _content_problems(path: Path, maps: AverageMaps, labels: npt.NDArray[np.int64], *, classes: int) -> Iterator[Problem]:
    """Average maps that are not of these samples."""
    first = np.concatenate([np.flatnonzero(labels == label)[:EXAMPLES] for label in range(classes)])
    misfits = list(maps.misfits(classes=classes, examples=len(first)))
    for name, form, right in misfits:
        yield Problem(path, name, form, f"the classes and samples make it {right}", "these maps are of other data")
    if misfits:
        return
    for name, wanted in (("count", np.bincount(labels, minlength=classes)), ("example_position", first)):
        if getattr(maps, name).tolist() != wanted.tolist():
            actual = f"the rows give {shown(wanted.tolist())}"
            yield Problem(path, name, shown(getattr(maps, name).tolist()), actual, "these maps are of other samples")


def _stamp_problems(folder: Path, record: Record, content: bytes) -> Iterator[Problem]:
    path = folder / STAMP
    if not path.is_symlink() and not path.exists():
        return
    stamp = read_stamp(folder)
    if stamp is None:
        yield Problem(
            path, "stamp", "a stamp", "it is not readable as one", "it does not count: remove it, or bench verify --rerun --stamp"
        )
        return
    for field, actual in (("record_sha256", hashlib.sha256(content).hexdigest()), ("weights_sha256", record.weights_sha256)):
        if stamp.get(field) != actual:
            yield Problem(path, field, shown(stamp.get(field)), f"the record here has {actual}", "the stamp is of another record")


# --- identity and settings


def _identity_problems(folder: Path, record: Record) -> Iterator[Problem]:
    path, training, cell = folder / RECORD, record.training, record.as_cell
    changed = "a setting was edited, or the key"
    if training.key != record.training_key:
        yield Problem(path, "training_key", shown(record.training_key), f"its settings give {training.key}", changed)
    if cell.key != record.key:
        yield Problem(path, "key", shown(record.key), f"its settings give {cell.key}", changed)
    parts = cell.path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        yield Problem(path, "cell", shown(cell.path), "a name in it is no name of a folder", "it would lead out of the results folder")
    place = folder.resolve().parts
    in_results = len(place) > len(parts) and place[-len(parts) - 1] == "cells"
    if in_results and list(place[-len(parts) :]) != parts:
        yield Problem(
            folder, "folder", cell.path, "it lies elsewhere", "a record moved, or copied and edited: the folder is named by its key"
        )
    elif re.fullmatch(r"seed\d+-[0-9a-f]{10}", folder.resolve().name) and not folder.resolve().name.endswith(f"-{record.key[:10]}"):
        yield Problem(folder, "folder", f"key {record.key[:10]}", f"the folder is {folder.name}", "a record moved, or copied and edited")
    seeds = training.seeds
    for role in sorted(seeds.keys() | record.seeds.keys()):
        if seeds.get(role) != record.seeds.get(role):
            actual = f"seed {training.seed} gives {seeds.get(role)}"
            yield Problem(
                path, f"seeds.{role}", shown(record.seeds.get(role)), actual, "the seed was edited, or other random numbers were used"
            )
    if not re.fullmatch(r"[0-9a-f]{64}", record.weights_sha256):
        yield Problem(path, "weights_sha256", shown(record.weights_sha256), "it is no sha256", "it names no weights")
    if record.cell.method in METHODS:
        trains_as = METHODS.get(record.cell.method).info.trains_as or record.cell.method
        if trains_as != record.trains_as:
            actual = f"{record.cell.method} trains as {trains_as}"
            yield Problem(path, "trains_as", shown(record.trains_as), actual, "the weights are not of the method that the row names")


def _settings_problems(path: Path, record: Record) -> Iterator[Problem]:
    """Where the decisive settings and the configuration they came from contradict each other, or the figures picked by them."""
    run = _table(record.config, "run")
    edited = "one of the two was edited"
    for name, value, (where, expected) in (
        ("settings.protocol", record.settings.get("protocol"), ("protocol is", record.protocol)),
        ("protocol", record.protocol, ("config.run.protocol is", run.get("protocol"))),
        ("variant", record.variant, ("config.run.variant is", run.get("variant"))),
    ):
        if value != expected:
            yield Problem(path, name, shown(value), f"{where} {shown(expected)}", edited)
    for name, value, listed in (
        ("cell.seed", record.cell.seed, run.get("seeds")),
        ("cell.guidance", record.cell.guidance, run.get("guidance")),
    ):
        if not isinstance(listed, list) or value not in listed:
            yield Problem(path, name, shown(value), f"the run was of {shown(listed)}", edited)
    if ("guidance" in record.settings) != (record.cell.guidance == "au"):
        yield Problem(path, "settings.guidance", shown(record.settings.get("guidance")), f"the cell is {record.cell.guidance}", edited)
    for section, values in record.settings.items():
        if section == "protocol":
            continue
        configured = _table(record.config, section)
        for key, value in (values if isinstance(values, Mapping) else {}).items():
            dotted = f"{section}.{key}"
            chosen_by_backbone = dotted == "guidance.layers" and configured.get(key) == []
            if dotted not in record.brought and not chosen_by_backbone and configured.get(key) != value:
                actual = f"config.{dotted} is {shown(configured.get(key))} and nothing was brought along"
                yield Problem(path, f"settings.{dotted}", shown(value), actual, edited)
    configured = _table(record.config, "evaluation")
    for key, value in record.evaluation.items():
        if configured.get(key) != value:
            yield Problem(path, f"evaluation.{key}", shown(value), f"config.evaluation.{key} is {shown(configured.get(key))}", edited)
    if record.data.split != "test":
        yield Problem(path, "data.split", shown(record.data.split), "results are of the split test", "figures of another split")
    layers = _guided_layers(record)
    if layers and record.attention_layer != layers[0]:
        actual = f"the settings guide layer {layers[0]}"
        yield Problem(path, "attention_layer", shown(record.attention_layer), actual, "ATT-COS would be that of another layer")
    yield from _selection_problems(path, record)
    yield from _invariance_problems(path, record)


def _invariance_problems(path: Path, record: Record) -> Iterator[Problem]:
    """The verdict against its own figures; that it may say no is the table's affair."""
    if record.invariance is None:
        return
    worst = [value for part in ("logits", "maps") for value in _table(record.invariance, part).values()]
    tolerance, holds = record.invariance.get("tolerance"), record.invariance.get("holds")
    if tolerance != INVARIANCE_TOLERANCE:
        actual = f"bench allows {INVARIANCE_TOLERANCE:g}"
        yield Problem(path, "invariance.tolerance", shown(tolerance), actual, "another bar for depending on the batch")
    if not worst or not all(type(value) is float for value in worst) or holds is not (max(worst) <= INVARIANCE_TOLERANCE):
        actual = f"its worst differences are {shown(worst)}"
        yield Problem(path, "invariance.holds", shown(holds), actual, "whether the figures depend on the batch was edited")


def _guided_layers(record: Record) -> Sequence[Any]:
    """The guided layers, as the settings say; empty if a backbone decides that is not installed here.

    Without guidance what is configured may be meant for another backbone of the run: of layers that this one has not.
    """
    layers_with_figures = _table(record.metrics, "att_cos")
    guided = _table(record.settings, "guidance").get("layers")
    configured = _table(record.config, "guidance").get("layers")
    layers = guided or [layer for layer in configured or () if str(layer) in layers_with_figures]
    if layers:
        return list(layers)
    return BACKBONES.get(record.cell.backbone).info.guided_layers if record.cell.backbone in BACKBONES else ()


def _selection_problems(path: Path, record: Record) -> Iterator[Problem]:
    measured = [(epoch["accuracy"], epoch.get("epoch")) for epoch in record.epochs if isinstance(epoch.get("accuracy"), float)]
    if not measured:
        yield Problem(
            path, "epochs", "a course of the training", "no epoch has an accuracy", "nothing says how the checkpoint was selected"
        )
        return
    best = max(accuracy for accuracy, _ in measured)
    epoch = next(epoch for accuracy, epoch in measured if accuracy == best)
    recorded = (record.selection.get("accuracy"), record.selection.get("epoch"))
    if recorded != (best, epoch):
        actual = f"the course of the training gives {best} in epoch {epoch}"
        yield Problem(
            path, "selection", f"{shown(recorded[0])} in epoch {shown(recorded[1])}", actual, "another checkpoint than the best one"
        )


def _table(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, Mapping) else {}


# --- rows


def _read(path: Path, record: Record) -> tuple[list[Problem], Rows | None]:
    """The rows, if their file is of the form of `write_rows`."""
    try:
        with path.open("rb") as file:  # given a path, pyarrow takes one with a colon for an address
            problems = list(_form_problems(path, file, classes=len(record.data.classes)))
            if problems:
                return problems, None
            table = pq.read_table(file, use_threads=False)
        for name in table.column_names:
            column = table[name].combine_chunks()
            if column.null_count or (name == "logits" and column.flatten().null_count):
                problems.append(Problem(path, f"column {name}", "a value a sample", "some are missing", "the rows were edited"))
        if problems or not len(table):
            return problems or [Problem(path, "rows", shown(record.data.samples), "it has none", "there is nothing to compute from")], None
        rows = read_rows(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return [Problem(path, "rows", "a file of rows", f"it is not readable: {shown(reason)}", "damaged: copy it again")], None
    predicted = table["predicted"].to_numpy()
    wrong = predicted != rows.predicted
    if wrong.any():
        first = int(wrong.argmax())
        problems.append(
            Problem(
                path,
                f"sample {shown(rows.keys[first])}, column predicted",
                str(predicted[first]),
                f"its logits give {rows.predicted[first]} ({_others(wrong)})",
                "logits or predictions were edited",
            )
        )
    return problems, rows


def _form_problems(path: Path, file: BinaryIO, *, classes: int) -> Iterator[Problem]:
    """What is wrong with the columns, from the file's own description of itself; nothing is unpacked yet but the keys."""
    parquet = pq.ParquetFile(file)
    schema, meta = parquet.schema_arrow, parquet.metadata
    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if meta.num_rows > _MOST_ROWS or unpacked > _MOST_UNPACKED:
        actual = f"it has {meta.num_rows} rows, {unpacked} bytes unpacked"
        yield Problem(path, "rows", f"at most {_MOST_ROWS} rows, {_MOST_UNPACKED} bytes", actual, "not read: larger than any test split")
        return
    fitting = True
    for name in schema.names:
        if not _COLUMNS.fullmatch(name) or schema.names.count(name) > 1:
            yield Problem(path, f"column {shown(name)}", "no such column", "it is there", "rows have no such column, or it is there twice")
            return
    for name in _REQUIRED:
        if name not in schema.names:
            fitting = False
            yield Problem(path, f"column {name}", "a column", "it is missing", "not a file of rows")
    for field in schema:
        wanted = _type(field.name, classes)
        if field.type != wanted:
            fitting = False
            yield Problem(path, f"column {field.name}", str(wanted), f"it is {shown(str(field.type))}", "not a file of rows")
    if fitting:
        keys = pq.read_table(file, columns=["key"], read_dictionary=["key"], use_threads=False)["key"]
        longest = max((pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in keys.chunks), default=0)
        if longest > _LONGEST_KEY:
            yield Problem(path, "column key", f"at most {_LONGEST_KEY} bytes", f"one has {longest}", "not read: no key is so long")


def _type(column: str, classes: int) -> pa.DataType:
    if column == "logits":
        return pa.list_(pa.float32(), classes)
    types = {"key": pa.string(), "au_valid": pa.bool_(), "label": pa.int64(), "person": pa.int64(), "predicted": pa.int64()}
    return types.get(column, pa.float32())


def _row_problems(path: Path, record: Record, rows: Rows) -> Iterator[Problem]:
    keys = rows.keys
    if len(keys) != record.data.samples:
        actual = f"the rows are {len(keys)}"
        yield Problem(path, "data.samples", str(record.data.samples), actual, "samples were lost or added: every figure is of another set")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        actual = f"it is there several times, as are {len(twice) - 1} others" if len(twice) > 1 else "it is there several times"
        yield Problem(path, f"sample {shown(twice[0])}", "once", actual, "a sample counts more than once")
    elif list(keys) != sorted(keys):
        first = next(b for a, b in itertools.pairwise(keys) if b < a)
        yield Problem(path, f"sample {shown(first)}", "keys in ascending order", "it comes too late", "the rows were reordered")
    if hash_keys(keys) != record.data.keys_sha256:
        yield Problem(
            path,
            "data.keys_sha256",
            shown(record.data.keys_sha256),
            f"the keys of the rows have {hash_keys(keys)}",
            "not the samples that were evaluated: a sample is missing, added, doubled or renamed, or it is another test split",
        )
    if record.attention_layer not in rows.attention_cosines:
        layers = ", ".join(map(str, sorted(rows.attention_cosines))) or "no layer"
        yield Problem(path, "attention_layer", shown(record.attention_layer), f"the rows have {layers}", "nothing gives its ATT-COS")
    yield from _outside(path, rows, "label", rows.labels, _no_label(record, rows), f"0 to {len(record.data.classes) - 1}")
    yield from _outside(path, rows, "person", rows.people, rows.people < -1, "-1 (unknown) or a number")
    infinite = np.asarray(~np.isfinite(rows.logits).all(axis=1))
    yield from _outside(path, rows, "logits", rows.logits, infinite, "finite numbers")
    for name, values in _cosines(rows):
        yield from _outside(path, rows, name, values, np.isnan(values) & rows.au_valid, "a cosine, as the face has an AU map")
        yield from _outside(path, rows, name, values, ~np.isnan(values) & ~rows.au_valid, "NaN, as the face has no AU map")
        yield from _outside(path, rows, name, values, np.abs(values) > 1 + COSINE_SLACK, "a number within -1 and 1")
    yield from _measure_problems(path, record, rows)


def _measure_problems(path: Path, record: Record, rows: Rows) -> Iterator[Problem]:
    chosen = record.evaluation.get("measures", ())
    if not chosen and not rows.measures:
        return
    from bench.evaluation.measures import MEASURES  # with torchvision: seconds, which most records need not wait for

    names = [name for name in chosen if name in MEASURES]
    wanted = {column.name: MEASURES[name] for name in names for column in MEASURES[name].columns}
    if wanted.keys() != rows.measures.keys():
        actual = f"the measures {shown(names)} give {shown(sorted(wanted))}"
        yield Problem(path, "columns measure_", shown(sorted(rows.measures)), actual, "measures were added or removed")
    for name, values in rows.measures.items():
        yield from _outside(path, rows, f"measure_{name}", values, np.isinf(values), "a finite number, or NaN")
        if name in wanted and wanted[name].needs_au_map:
            unmapped = ~np.isnan(values) & ~rows.au_valid
            yield from _outside(path, rows, f"measure_{name}", values, unmapped, "NaN, as the face has no AU map")


def _no_label(record: Record, rows: Rows) -> npt.NDArray[np.bool_]:
    return np.logical_or(rows.labels < 0, rows.labels >= len(record.data.classes))


def _cosines(rows: Rows) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    yield "map_cosine_true", rows.map_cosines_true
    yield "map_cosine_predicted", rows.map_cosines_predicted
    for layer, values in rows.attention_cosines.items():
        yield f"attention_cosine_{layer}", values


def _outside(path: Path, rows: Rows, column: str, values: npt.NDArray[Any], wrong: npt.NDArray[np.bool_], wanted: str) -> Iterator[Problem]:
    if wrong.any():
        first = int(wrong.argmax())
        actual = f"{wanted} is wanted ({_others(wrong)})"
        yield Problem(
            path, f"sample {shown(rows.keys[first])}, column {column}", shown(values[first].tolist()), actual, "the rows were edited"
        )


def _others(wrong: npt.NDArray[np.bool_]) -> str:
    count = int(wrong.sum())
    return "this sample alone" if count == 1 else f"{count} such samples"


# --- metrics


def _metric_problems(path: Path, record: Record, rows: Rows) -> list[Problem]:
    """The first figure that the rows do not give. Rows without a class of theirs give no figures; they have been reported."""
    if _no_label(record, rows).any():
        return []
    classes = record.data.classes
    computed = compute_metrics(rows, classes=classes, expressive=(expression_ids(classes) > 0).tolist())
    wrong = list(_differences(record.metrics, computed, ""))
    if not wrong:
        return []
    name, recorded, actual = wrong[0]
    more = f" ({len(wrong) - 1} more figures differ)" if len(wrong) > 1 else ""
    return [Problem(path, f"metrics.{name}", shown(recorded), f"rows give {shown(actual)}{more}", "the figure is not that of the samples")]


def _differences(recorded: Any, computed: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, recorded, computed) of every leaf that differs. What older records did not have yet may be empty now."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        for key in [*recorded, *(key for key in computed if key not in recorded)]:
            if key in recorded or computed[key]:
                yield from _differences(recorded.get(key), computed.get(key), f"{name}.{key}" if name else str(key))
    elif type(recorded) is float and type(computed) is float:
        if not math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield name, recorded, computed
    elif type(recorded) is not type(computed) or recorded != computed:
        yield name, recorded, computed
