"""``bench verify``: are records what their hashes, their rows, their settings, each other and the data say?

What is checked of one record by itself is in `bench.audit.verify_record`; here are folders, many records together, and the prepared data.
Who forges a record, its rows, its hashes and its siblings consistently is found only by evaluating the weights again: `bench.audit.rerun`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.audit.verify_record import Facts, Problem, check_record, hash_arrays, hash_order, shown
from bench.data.index import INDEX_NAME, Index, load_index
from bench.evaluation.differences import compare_rows
from bench.evaluation.rows import Rows
from bench.sweep.store import DONE, RECORD, ROWS, read_cell_rows, walk

OTHER_PASS = 1e-4
"""Between the logits (in units of the largest) and the attention cosines of records of the same weights that were evaluated in separate
passes, maybe on other devices. Of one pass they are the same bits."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a look at records gave."""

    folders: tuple[Path, ...]
    """Of all records, sound or not."""
    facts: tuple[Facts, ...]
    """Of those that could be read."""
    problems: tuple[Problem, ...]
    """By file."""
    unknown_data: Mapping[str, int]
    """Fingerprint -> number of records, of data that no prepared dataset at hand is; empty if none was to be looked at."""
    notes: tuple[str, ...]
    """What is no problem, and worth knowing."""

    @property
    def unsound(self) -> frozenset[Path]:
        """Folders of the records with a problem."""
        return frozenset(_folder(problem) for problem in self.problems)


def _folder(problem: Problem) -> Path:
    return problem.file if problem.file.is_dir() else problem.file.parent


def verify(
    paths: Sequence[Path], *, data: Path | None = None, strict: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look at records, each by itself and all together.

    Args:
        paths: a ``record.json``, a cell's folder, or any folder above some.
        data: a folder of prepared datasets (or one of them) to compare keys and labels with.
        strict: data that is not at hand is a problem.
        on_progress: called with (records done, records in all).

    Raises:
        FileNotFoundError: nothing there, or no record in it.
    """
    folders, problems = find_cells(paths)
    facts: list[Facts] = []
    for number, folder in enumerate(folders, start=1):
        record_problems, fact = check_record(folder)
        problems += record_problems
        if fact is not None:
            facts.append(fact)
        if on_progress:
            on_progress(number, len(folders))
    problems += _repeated(facts)
    problems += _copied_seeds(facts)
    problems += _split_problems(facts)
    problems += _training_problems(facts)
    unknown: Counter[str] = Counter()
    if data is not None:
        indexes = find_indexes(data)
        for fact in facts:
            if fact.fingerprint in indexes:
                problems += _data_problems(fact, *indexes[fact.fingerprint])
                continue
            unknown[fact.fingerprint] += 1
            if strict:
                what, meaning = f"no prepared dataset in {data} has it", "the result is of data that is not at hand"
                problems.append(Problem(fact.folder / RECORD, "data.fingerprint", shown(fact.fingerprint), what, meaning))
    return Report(
        folders=tuple(folders),
        facts=tuple(facts),
        problems=tuple(sorted(problems, key=lambda problem: problem.file)),
        unknown_data=dict(unknown),
        notes=tuple(_repeated_trainings(facts)),
    )


def find_cells(paths: Sequence[Path]) -> tuple[list[Path], list[Problem]]:
    """The folders of all records, each once, and the links met below ``cells`` on the way, which are not followed: records that others made
    may hold any. Links above are followed, and so is ``cells`` itself.

    Raises:
        FileNotFoundError: nothing there, or no record in it.
    """
    folders: dict[Path, None] = {}
    problems: list[Problem] = []
    for path in paths:
        if path.name == RECORD and (path.is_file() or path.is_symlink()):
            folders[path.parent] = None
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: there is nothing; give a {RECORD}, the folder of a cell, or a results folder")
        before = len(folders)
        for folder, below, files in walk(path):
            # What has a marker counts in tables, wherever it lies; what has none may be half written, under a hidden name.
            if DONE in files or (RECORD in files and not folder.name.startswith(".")):
                folders[folder] = None
            for link in [name for name in below if "cells" in folder.parts and (folder / name).is_symlink()]:
                below.remove(link)
                meaning = f"links are not followed: nothing in it was looked at; if it is yours: bench verify {folder / link}"
                problems.append(Problem(folder / link, "folder", "a folder", "it is a symbolic link", meaning))
        if len(folders) == before and not problems:
            raise FileNotFoundError(f"{path}: no {RECORD} in it or below. A results folder is made by: bench run --results {path}")
    return list(folders), problems


def find_indexes(data: Path) -> dict[str, tuple[Path, Index]]:
    """Fingerprint -> folder and index, of a prepared dataset or a folder of them.

    Raises:
        FileNotFoundError: no prepared dataset there.
    """
    paths = [data / INDEX_NAME] if (data / INDEX_NAME).is_file() else sorted(data.glob(f"*/{INDEX_NAME}"))
    if not paths:
        raise FileNotFoundError(f"--data {data}: no prepared dataset there. Make one with: bench data prepare NAME --raw DIR")
    indexes = {}
    for path in paths:
        try:
            index = load_index(path.parent)
        except ValueError as error:
            _log.warning("left out: %s", error)
            continue
        indexes[index.fingerprint] = (path.parent, index)
    return indexes


# --- many records together


def _repeated(facts: Sequence[Facts]) -> Iterator[Problem]:
    """Two records of one cell and seed, whatever their keys say."""
    for group in _groups(facts, lambda fact: fact.key):
        for fact in group[1:]:
            actual = f"{group[0].folder} is of it too"
            yield Problem(fact.folder / RECORD, "key", shown(fact.key), actual, f"two records of one cell and seed, {fact.label}")


def _copied_seeds(facts: Sequence[Facts]) -> Iterator[Problem]:
    """Trainings that differ in nothing but the seed, and ended with the same weights or logits."""
    meaning = "the record of one seed was copied to another: seeds are to be independent runs"
    for group in _groups(facts, lambda fact: fact.siblings):
        for what, value in (("weights_sha256", _weights), ("logits", _logits)):
            first: dict[str, Facts] = {}
            for fact in sorted(group, key=lambda fact: fact.seed):
                content = value(fact)
                if content is None:
                    continue
                sibling = first.setdefault(content, fact)
                if sibling.seed != fact.seed:
                    file = fact.folder / (RECORD if what == "weights_sha256" else ROWS)
                    yield Problem(
                        file, what, f"those of seed {fact.seed}", f"equal to those of seed {sibling.seed} in {sibling.folder}", meaning
                    )


def _split_problems(facts: Sequence[Facts]) -> Iterator[Problem]:
    """Records of the same data that do not agree on its classes, samples, labels, people or AU maps."""
    for group in _groups(facts, lambda fact: (fact.fingerprint, fact.split)):
        for fact, sibling in _odd(group, lambda fact: fact.classes):
            actual = f"{sibling.folder} has {shown(list(sibling.classes))}"
            yield Problem(fact.folder / RECORD, "data.classes", shown(list(fact.classes)), actual, "of one dataset one of the two is wrong")
        same = [fact for fact in group if fact.prints is not None]
        for fact, sibling in list(_odd(same, _keys)):
            same.remove(fact)
            yield _key_problem(fact, sibling)
        yield from _column_problems(same, "label", _labels, lambda rows: rows.labels)
        yield from _column_problems([fact for fact in same if _people(fact)], "person", _people, lambda rows: rows.people)
        for members in _groups(same, lambda fact: fact.au_maps):
            yield from _column_problems(members, "au_valid", _au_valid, lambda rows: rows.au_valid)


def _key_problem(fact: Facts, sibling: Facts) -> Problem:
    keys, sibling_keys = read_cell_rows(fact.folder).keys, read_cell_rows(sibling.folder).keys
    lost, added = sorted(set(sibling_keys) - set(keys)), sorted(set(keys) - set(sibling_keys))
    where, actual = "column key", f"{sibling.folder} has the same samples in another number or order"
    if lost:
        where, actual = f"sample {shown(lost[0])}", f"{sibling.folder} has it, this one not"
    elif added:
        where, actual = f"sample {shown(added[0])}", f"this one has it, {sibling.folder} not"
    count = f"{len(keys)} samples, {len(lost)} missing and {len(added)} added"
    return Problem(fact.folder / ROWS, where, count, actual, "records of the same data are of other samples")


def _column_problems(
    facts: Sequence[Facts], name: str, value: Callable[[Facts], str | None], column: Callable[[Rows], npt.NDArray[Any]]
) -> Iterator[Problem]:
    """A column that all records of the same samples must have in common."""
    for fact, sibling in _odd(facts, value):
        rows = read_cell_rows(fact.folder)
        values, sibling_values = column(rows), column(read_cell_rows(sibling.folder))
        wrong = values != sibling_values
        first = int(wrong.argmax())
        actual = f"{sibling.folder} has {sibling_values[first]} ({int(wrong.sum())} of {len(wrong)} samples differ)"
        where = f"sample {shown(rows.keys[first])}, column {name}"
        yield Problem(fact.folder / ROWS, where, str(values[first]), actual, "a row was edited or swapped")


def _training_problems(facts: Sequence[Facts]) -> Iterator[Problem]:
    """Cells that read out the same training, and do not agree on its weights, its course, or what the network said."""
    same_training = "both read out the same training"
    for group in _groups(facts, lambda fact: (fact.training_key, shown(fact.trained_in))):
        for fact, sibling in _odd(group, _weights):
            actual = f"{sibling.folder} has {sibling.weights_sha256}"
            yield Problem(fact.folder / RECORD, "weights_sha256", shown(fact.weights_sha256), actual, f"{same_training}: one is forged")
        for fact, sibling in _odd(group, lambda fact: fact.course):
            actual = f"{sibling.folder} tells another"
            yield Problem(fact.folder / RECORD, "epochs and selection", "a course", actual, f"{same_training}: one is forged")
    for group in _groups(facts, lambda fact: (fact.training_key, fact.weights_sha256)):
        comparable = [fact for fact in group if fact.prints is not None]
        for fact, sibling in _odd(comparable, lambda fact: fact.prints and (fact.prints.logits, fact.prints.attention)):
            assert fact.prints is not None
            assert sibling.prints is not None
            if fact.prints.keys != sibling.prints.keys:
                continue  # other samples: said where the data is looked at
            tolerance = 0.0 if fact.one_pass == sibling.one_pass else OTHER_PASS
            rows, sibling_rows = read_cell_rows(fact.folder), read_cell_rows(sibling.folder)
            for difference in compare_rows(rows, sibling_rows, shared_only=True):
                if difference.largest > tolerance:
                    actual = f"{sibling.folder} has {difference.actual} (difference {difference.largest:.2g}, allowed {tolerance:g})"
                    yield Problem(
                        fact.folder / ROWS,
                        f"sample {shown(difference.key)}, column {difference.column}",
                        difference.recorded,
                        actual,
                        f"{same_training}, and every method reads off the same network output: one was edited",
                    )


def _weights(fact: Facts) -> str | None:
    return fact.weights_sha256


def _keys(fact: Facts) -> str | None:
    return None if fact.prints is None else fact.prints.keys


def _labels(fact: Facts) -> str | None:
    return None if fact.prints is None else fact.prints.labels


def _people(fact: Facts) -> str | None:
    return None if fact.prints is None else fact.prints.people


def _au_valid(fact: Facts) -> str | None:
    return None if fact.prints is None else fact.prints.au_valid


def _logits(fact: Facts) -> str | None:
    return None if fact.prints is None else fact.prints.logits


def _repeated_trainings(facts: Sequence[Facts]) -> Iterator[str]:
    """Trainings that were carried out more than once, with different weights: on two machines, that is no fault."""
    for group in _groups(facts, lambda fact: fact.training_key):
        if len({fact.trained_in for fact in group}) > 1 and len({fact.weights_sha256 for fact in group}) > 1:
            first = group[0]
            sibling = next(fact for fact in group if fact.weights_sha256 != first.weights_sha256)
            yield (
                f"{first.folder} and {sibling.folder} say to be of one training, carried out twice with different weights: "
                "on two machines this can be, and then their figures do not share the network's output; --rerun tells"
            )


def _groups(facts: Iterable[Facts], value: Callable[[Facts], Hashable]) -> list[list[Facts]]:
    """Those with a value in common, where there are several."""
    groups: dict[Hashable, list[Facts]] = defaultdict(list)
    for fact in facts:
        groups[value(fact)].append(fact)
    return [group for group in groups.values() if len(group) > 1]


def _odd(facts: Sequence[Facts], value: Callable[[Facts], Hashable]) -> Iterator[tuple[Facts, Facts]]:
    """Those whose value is not the one that most have (of equally many, the first), each with the first of the most."""
    if not facts:
        return
    common, _ = Counter(map(value, facts)).most_common(1)[0]
    reference = next(fact for fact in facts if value(fact) == common)
    for fact in facts:
        if value(fact) != common:
            yield fact, reference


# --- the data


def _data_problems(fact: Facts, folder: Path, index: Index) -> Iterator[Problem]:
    """Classes, keys and labels of a record against the index of the same data."""
    if fact.classes != index.classes:
        actual = f"{folder} has {shown(list(index.classes))}"
        yield Problem(fact.folder / RECORD, "data.classes", shown(list(fact.classes)), actual, "labels mean something else")
    split = index.splits.get(fact.split)
    if split is None or fact.prints is None:
        return
    keys = [member.key for member in split.members]
    labels = np.array([member.label for member in split.members], dtype=np.int64)
    if (fact.prints.keys, fact.prints.labels) == (hash_order(keys), hash_arrays(labels)):
        return
    rows = read_cell_rows(fact.folder)
    recorded = dict(zip(rows.keys, rows.labels.tolist(), strict=True))
    indexed = dict(zip(keys, labels.tolist(), strict=True))
    for key, words in (
        (next((key for key in indexed if key not in recorded), None), "the data has it, the rows do not"),
        (next((key for key in recorded if key not in indexed), None), "the rows have it, the data does not"),
    ):
        if key is not None:
            count = f"{len(rows.keys)} samples, {len(keys)} in the data"
            yield Problem(fact.folder / ROWS, f"sample {shown(key)}", count, f"{words} ({folder})", "not the samples of this test split")
    edited = [key for key, label in recorded.items() if indexed.get(key, label) != label]
    if edited:
        actual = f"{folder} has {indexed[edited[0]]} ({len(edited)} samples differ)"
        where = f"sample {shown(edited[0])}, column label"
        yield Problem(
            fact.folder / ROWS,
            where,
            str(recorded[edited[0]]),
            actual,
            "a label was edited, rows were swapped, or they are of other pictures",
        )
