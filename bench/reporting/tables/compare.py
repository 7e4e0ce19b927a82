"""Two cells, sets of cells or results folders against each other: paired differences on the same samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.evaluation.metrics import macro
from bench.evaluation.statistics import (
    LEVEL,
    Bootstrap,
    Interval,
    bootstrap_p,
    clustered_mcnemar,
    holm,
    seeds_p,
    smallest_gap,
    t_reach,
)
from bench.matrix import digest
from bench.registry import did_you_mean
from bench.reporting.tables.evidence import METRICS, Metric, Run, load_samples
from bench.reporting.tables.leaderboard import comparable, essential, fullest, is_finite, same_seed
from bench.sweep.record import Record
from bench.sweep.store import RECORD, ROWS, read_records

COORDINATES = ("method", "guidance", "backbone", "dataset", "seed", "variant", "protocol")
"""What a selector may ask for, in the order in which a bare word is tried."""
MOST_LISTED = 8
"""Settings that are listed one by one where two sides differ."""

Stored = tuple[Path, Record]
"""A finished cell: its folder and record."""


# Which cells are meant.


def find_side(text: str, *, results: Path) -> list[Stored]:
    """The cells that one of the two arguments means.

    Args:
        text: the path of a cell's folder, of its ``record.json``, or of a folder of results; or a selector of cells below ``results``:
            ``method=cam,guidance=au``, or values alone, ``cam/au``, each of which is that of the first coordinate that has it.
        results: where selectors look.

    Raises:
        ValueError: there is no such cell; the message says what there is.
    """
    path = Path(text)
    if path.exists():
        folder = path.parent if path.name == RECORD else path
        found = _stored(folder) if folder.is_dir() else []
        if not found:
            raise ValueError(f"{path} is no finished cell, no {RECORD} of one, and no folder of results")
        return found
    if not results.is_dir():
        raise ValueError(f"{text!r} is no path, and there is no results folder {results} to select from: give --results DIR")
    stored = _stored(results)
    wanted = _parse(text, stored)
    found = [(folder, record) for folder, record in stored if all(_coordinates(record)[key] == value for key, value in wanted.items())]
    if not found:
        raise ValueError(f"no finished cell in {results} has {', '.join(f'{key}={value}' for key, value in wanted.items())} all at once")
    return found


def _stored(folder: Path) -> list[Stored]:
    return fullest(read_records(folder), lambda stored: stored[1])


def _coordinates(record: Record) -> dict[str, str]:
    cell = {key: str(value) for key, value in record.cell.model_dump().items()}
    return cell | {"variant": record.variant, "protocol": record.protocol}


def _parse(text: str, stored: Sequence[Stored]) -> dict[str, str]:
    """Selector -> coordinate -> value."""
    there: dict[str, set[str]] = {key: set() for key in COORDINATES}
    for _, record in stored:
        for key, value in _coordinates(record).items():
            there[key].add(value)
    wanted: dict[str, str] = {}
    for word in filter(None, text.replace("/", ",").split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            key, value = next((k for k in COORDINATES if k not in wanted and key in there[k]), ""), key
            if not key:
                known = {v for k in COORDINATES if k not in wanted for v in there[k]}
                raise ValueError(f"{text!r}: no such path, and no cell has {value!r}.{did_you_mean(value, known)}")
        elif key not in COORDINATES:
            raise ValueError(f"{text!r}: {key!r} is no coordinate of a cell.{did_you_mean(key, COORDINATES)}")
        elif value not in there[key]:
            raise ValueError(f"{text!r}: no cell has {key}={value}.{did_you_mean(value, there[key])}")
        if key in wanted:
            raise ValueError(f"{text!r} asks for two values of {key}")
        wanted[key] = value
    return wanted


# Which cell goes with which.


class Matched(NamedTuple):
    """The runs of two sides that are to be compared: one configuration each, one run a seed."""

    one: tuple[Stored, ...]
    other: tuple[Stored, ...]


def match(one: Sequence[Stored], other: Sequence[Stored]) -> tuple[list[Matched], int]:
    """Put the cells of two sides together, and count those without a counterpart.

    Coordinates of which each side has a single value may differ: that is what is compared. All others must be the same in both.

    Raises:
        ValueError: no cell has a counterpart, a cell is on both sides, a side has several configurations where one is needed, or two
            counterparts were not tested on the same data.
    """
    mine, theirs = ([_place(record) for _, record in side] for side in (one, other))
    keys = [key for key in mine[0] if not all(len({place[key] for place in side}) == 1 for side in (mine, theirs))]
    groups: tuple[dict[tuple[str, ...], list[Stored]], ...] = ({}, {})
    for group, side, places in zip(groups, (one, other), (mine, theirs), strict=True):
        for stored, place in zip(side, places, strict=True):
            group.setdefault(tuple(place[key] for key in keys), []).append(stored)
    found = [pair for place in groups[0] if place in groups[1] for pair in _configurations(groups[0][place], groups[1][place])]
    if not found:
        raise ValueError(f"no cell of the one side has a counterpart on the other: {_unlike(mine, theirs, keys)}")
    for matched in found:
        _check(matched)
    return found, len(one) + len(other) - sum(len(side) for matched in found for side in matched)


def _place(record: Record) -> dict[str, str]:
    """The coordinates in which counterparts may have to be alike: all but the seed."""
    return {key: value for key, value in _coordinates(record).items() if key != "seed"}


def _configurations(one: Sequence[Stored], other: Sequence[Stored]) -> list[Matched]:
    """Cells of equal coordinates, side by side: those of equal settings where a side has cells of several."""
    sides: list[dict[str, list[Stored]]] = []
    for side in (one, other):
        by_settings: dict[str, list[Stored]] = {}
        for stored in side:
            record = stored[1]
            options = [record.method_options, record.training_options, record.backbone_options]
            identity = [record.data.fingerprint, comparable(record)[-1], options, record.settings.get("guidance")]
            by_settings.setdefault(digest(identity), []).append(stored)
        sides.append(by_settings)
    first, second = sides
    if len(first) == len(second) == 1:
        return [Matched(tuple(one), tuple(other))]
    return [Matched(tuple(first[key]), tuple(second[key])) for key in first if key in second]


def _unlike(mine: list[dict[str, str]], theirs: list[dict[str, str]], keys: list[str]) -> str:
    """The coordinates in which two sides have nothing in common."""
    words = []
    for key in keys:
        here, there = ({place[key] for place in side} for side in (mine, theirs))
        if not here & there:
            words.append(f"{key} is {', '.join(sorted(here))} here, {', '.join(sorted(there))} there")
    alike = ", ".join([*keys, "settings"])
    return "; ".join(words or [f"none are alike in {alike}"]) + ". Select fewer cells on each side, or give the paths of two"


def _check(matched: Matched) -> None:
    twice = {folder.resolve() for folder, _ in matched.one} & {folder.resolve() for folder, _ in matched.other}
    if twice:
        raise ValueError(f"{min(twice)} would be compared with itself: select other cells on one side")
    for side in matched:
        twins = same_seed(side)
        if twins:
            name = "/".join(_coordinates(side[0][1])[key] for key in ("method", "guidance", "backbone", "dataset"))
            raise ValueError(
                f"several runs of {name} with the same seed, {twins[0]} and {twins[1]}: select one of them by more coordinates"
            )
    records = [record for side in matched for _, record in side]
    for what in ("keys_sha256", "fingerprint", "classes"):
        if len({str(getattr(record.data, what)) for record in records}) > 1:
            one, other = matched.one[0], matched.other[0]
            raise ValueError(
                f"not tested on the same data: {one[0]} on {_data(one[1])}, {other[0]} on {_data(other[1])}. "
                "Only differences on the same samples can be tested"
            )


def _data(record: Record) -> str:
    return f"{record.cell.dataset} {record.data.fingerprint[:8]} ({record.data.samples} samples, keys {record.data.keys_sha256[:8]})"


# What the difference is.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric of the one side minus the other's, on the same samples."""

    one: float
    other: float
    difference: float
    interval: Interval | None
    """For other samples and, with several seeds in common, other trainings; None where too few independent units are left."""
    p: float
    """Of there being no difference, for this comparison alone."""
    p_holm: float
    """Corrected for all comparisons of its kind that were asked for."""
    test: str
    samples: int
    units: int
    """Independent ones among the samples: people where known, else pictures."""
    smallest: float | None
    """The smallest difference that could have been told from none, uncorrected; None where none could."""

    @property
    def told_apart(self) -> bool:
        """Whether it is more than chance."""
        return self.p_holm < 1 - LEVEL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two configurations on the same test split."""

    one: tuple[Record, ...]
    other: tuple[Record, ...]
    seeds: tuple[int, ...]
    """In common, which pair the trainings; empty if there are none: then all are used, and trainings are not paired."""
    differences: Mapping[Metric, Difference]
    per_class: Mapping[Metric, Mapping[str, Difference]]
    people_known: bool
    differing: tuple[str, ...]
    """What else than the coordinates differs, in words: settings, options, code."""


def compare(matched: Sequence[Matched]) -> tuple[Comparison, ...]:
    """Test all differences, and correct the p values: the headline figures together, and those of the classes together.

    Raises:
        ValueError: rows cannot be read, or are not of the same samples.
    """
    drafts = [_draft(pair) for pair in matched]
    headlines = _corrected([found for draft in drafts for found in draft.differences.values()])
    classes = _corrected([found for draft in drafts for there in draft.per_class.values() for found in there.values()])
    return tuple(
        dataclasses.replace(
            draft,
            differences={metric: next(headlines) for metric in draft.differences},
            per_class={metric: {name: next(classes) for name in there} for metric, there in draft.per_class.items()},
        )
        for draft in drafts
    )


def _corrected(found: Sequence[Difference]) -> Iterator[Difference]:
    return (dataclasses.replace(one, p_holm=adjusted) for one, adjusted in zip(found, holm([one.p for one in found]), strict=True))


def _draft(matched: Matched) -> Comparison:
    common = sorted({r.cell.seed for _, r in matched.one} & {r.cell.seed for _, r in matched.other})
    one, other = (
        [
            Run(record=record, samples=load_samples(folder / ROWS, record))
            for folder, record in sorted(side, key=lambda stored: stored[1].cell.seed)
            if not common or record.cell.seed in common
        ]
        for side in matched
    )
    first = one[0].samples
    assert first is not None
    for run in (*one, *other):
        assert run.samples is not None
        if not np.array_equal(run.samples.labels, first.labels) or not np.array_equal(run.samples.people, first.people):
            raise ValueError(f"the rows of {run.record.cell} are of other samples than those it is compared with: one of them was changed")
    boot = Bootstrap([None if person < 0 else str(person) for person in first.people.tolist()])
    differences: dict[Metric, Difference] = {}
    per_class: dict[Metric, dict[str, Difference]] = {}
    for metric in METRICS:
        if not all(is_finite(run.record, metric) for run in (*one, *other)):
            continue
        paired = _Paired(metric, one, other, boot, pairs=len(common))
        differences[metric] = paired.difference(np.ones(len(first.labels), bool))
        classes = enumerate(one[0].record.data.classes)
        mine = {name: first.labels == label for label, name in classes}
        per_class[metric] = {name: paired.difference(chosen) for name, chosen in mine.items() if paired.counts(chosen)}
    return Comparison(
        one=tuple(run.record for run in one),
        other=tuple(run.record for run in other),
        seeds=tuple(common),
        differences=differences,
        per_class=per_class,
        people_known=bool((first.people >= 0).any()),
        differing=_differing(one[0].record, other[0].record),
    )


class _Paired:
    """One metric of two sides on the same samples."""

    def __init__(self, metric: Metric, one: Sequence[Run], other: Sequence[Run], boot: Bootstrap, *, pairs: int) -> None:
        samples = [run.samples for run in (*one, *other) if run.samples is not None]
        self._plain = metric == "cl"
        labels = samples[0].labels
        self._labels = np.zeros_like(labels) if self._plain else labels
        # AU maps of another geometry may be missing for other faces.
        self._counted = np.ones(len(labels), bool) if self._plain else np.logical_and.reduce([s.counted for s in samples])
        self._values = np.stack([s.values[metric] for s in samples])
        self._sides = (slice(0, len(one)), slice(len(one), None))
        self._boot, self._pairs = boot, pairs

    def counts(self, chosen: npt.NDArray[np.bool_]) -> bool:
        """Whether any of some samples counts in this metric."""
        return bool((self._counted & chosen).any())

    def difference(self, chosen: npt.NDArray[np.bool_]) -> Difference:
        """On some of the samples; `p_holm` is still to be found."""
        counted = self._counted & chosen
        units = self._boot.units(counted)
        means = macro(self._values, self._labels, counted=counted)
        one, other = (means[side] for side in self._sides)
        found = float(one.mean() - other.mean())
        replicates = self._boot.macro_means(self._values, self._labels, counted=counted)
        first, second = (replicates[side].mean(axis=0) for side in self._sides)
        error = float(np.nanstd(first - second, ddof=1))
        reach, p, test = t_reach(error, degrees=units - 1), float(bootstrap_p([found], [error], clusters=units)[0]), "bootstrap"
        smallest = reach
        if self._plain and self._pairs == 1:
            mine, theirs = self._values[:, counted].astype(bool)
            only_one, only_other = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
            total = int(counted.sum())
            hits, others = self._boot.sums(self._values * counted)
            p, test = clustered_mcnemar(hits - others), "exact McNemar" + (" over people" if units < total else "")
            smallest = smallest_gap(total, (only_one + only_other) / total)
        elif self._pairs > 1:
            differences = one - other
            over_seeds = t_reach(float(differences.std(ddof=1)) / math.sqrt(self._pairs), degrees=self._pairs - 1)
            p, test = max(p, float(seeds_p(differences[None])[0])), "bootstrap and paired t over seeds"
            reach = smallest = max(reach, over_seeds)
        p = max(p, 2.0 ** (1 - units))  # were there no difference, so many units would all be on one side that often
        return Difference(
            one=float(one.mean()),
            other=float(other.mean()),
            difference=found,
            interval=Interval(found - reach, found + reach) if math.isfinite(reach) else None,
            p=p,
            p_holm=p,
            test=test,
            samples=int(counted.sum()),
            units=units,
            smallest=smallest if smallest < 1 else None,
        )


def _differing(one: Record, other: Record) -> tuple[str, ...]:
    """Settings in which two records differ, apart from what their names say."""
    sides = [
        _flat(
            {
                "settings": {k: v for k, v in record.settings.items() if k != "protocol"},
                "evaluation": essential(record.evaluation),
                "method options": record.method_options if one.cell.method == other.cell.method else {},
                "backbone options": record.backbone_options if one.cell.backbone == other.cell.backbone else {},
                "attention layer": record.attention_layer,
                "bench": record.code.version,
                "commit": (record.code.commit or "unknown")[:8],
            }
        )
        for record in (one, other)
    ]
    if one.cell.guidance != other.cell.guidance:
        sides = [{key: value for key, value in side.items() if not key.startswith("settings.guidance.")} for side in sides]
    keys = [key for key in sides[0] | sides[1] if sides[0].get(key) != sides[1].get(key)]
    words = [f"{key.removeprefix('settings.')} {sides[0].get(key, '-')} / {sides[1].get(key, '-')}" for key in keys]
    return (*words[:MOST_LISTED], *([f"and {len(words) - MOST_LISTED} more"] if len(words) > MOST_LISTED else []))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
