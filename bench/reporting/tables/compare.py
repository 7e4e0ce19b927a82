"""Paired differences between two cells, sets of cells or results folders, A and B, on the same test samples."""

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
from bench.reporting.tables.evidence import METRICS, Metric, Run, grouped, load_samples, stacked
from bench.reporting.tables.leaderboard import comparable, essential, figure, fullest, same_seed
from bench.sweep.record import Record
from bench.sweep.store import RECORD, ROWS, read_records

COORDINATES = ("method", "guidance", "backbone", "dataset", "seed", "variant", "protocol")
"""Keys of a selector, in the order in which a bare value is tried."""
MOST_LISTED = 8
"""How many differing settings are listed by name."""


# Which cells a side consists of.


def find_side(text: str, *, results: Path) -> list[Run]:
    """The finished cells that one argument of ``bench compare`` selects, without their samples.

    Args:
        text: the path of a cell's folder, of its ``record.json``, or of a results folder; or a selector of cells in ``results``:
            ``method=cam,guidance=au``, or values alone, ``cam/au``. A bare value belongs to the first coordinate that has it.
        results: results folder for selectors.

    Raises:
        ValueError: no cell matches; the message proposes values that exist.
    """
    path = Path(text)
    if path.exists():
        folder = path.parent if path.name == RECORD else path
        runs = _read(folder) if folder.is_dir() else []
        if not runs:
            raise ValueError(f"{path} is not a finished cell, the {RECORD} of one, or a results folder with finished cells")
        return runs
    if not results.is_dir():
        raise ValueError(f"{text!r} is not a path, and the results folder {results} to select from does not exist: give --results DIR")
    runs = _read(results)
    wanted = _parse(text, runs)
    selected = [run for run in runs if wanted.items() <= _coordinates(run).items()]
    if not selected:
        raise ValueError(f"no finished cell in {results} has {' and '.join(f'{key}={value}' for key, value in wanted.items())}")
    return selected


def _read(folder: Path) -> list[Run]:
    return fullest(Run(record=record, folder=cell) for cell, record in read_records(folder))


def _coordinates(run: Run) -> dict[str, str]:
    record = run.record
    cell = {key: str(value) for key, value in record.cell.model_dump().items()}
    return cell | {"variant": record.variant, "protocol": record.protocol}


def _parse(text: str, runs: Sequence[Run]) -> dict[str, str]:
    """Coordinate -> value, as a selector asks for them."""
    values = {key: {_coordinates(run)[key] for run in runs} for key in COORDINATES}
    wanted: dict[str, str] = {}
    for word in filter(None, text.replace("/", ",").split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            key, value = next((k for k in COORDINATES if k not in wanted and key in values[k]), ""), key
            if not key:
                known = {v for k in COORDINATES if k not in wanted for v in values[k]}
                raise ValueError(f"{text!r} is not a path, and no cell has the value {value!r}.{did_you_mean(value, known)}")
        elif key not in COORDINATES:
            raise ValueError(f"{text!r}: unknown coordinate {key!r}.{did_you_mean(key, COORDINATES)}")
        elif value not in values[key]:
            raise ValueError(f"{text!r}: no cell has {key}={value}.{did_you_mean(value, values[key])}")
        if key in wanted:
            raise ValueError(f"{text!r} gives two values of {key}: leave one of them out")
        wanted[key] = value
    return wanted


# Which cells are compared with each other.


class Matched(NamedTuple):
    """The runs to compare: one configuration on each side, one run for each seed."""

    a: list[Run]
    b: list[Run]


def match(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[Matched], int]:
    """Pair the cells of two sides, and count the cells without a counterpart.

    A coordinate with a single value on each side may differ: that is the comparison. All other coordinates must be equal.

    Raises:
        ValueError: no cell has a counterpart, a cell is on both sides, several runs of a configuration have the same seed, or two
            counterparts were not tested on the same data.
    """
    places = [[_coordinates(run) for run in side] for side in (a, b)]
    keys = [key for key in COORDINATES if key != "seed" and any(len({place[key] for place in side}) > 1 for side in places)]
    groups_a, groups_b = (grouped(side, lambda run: tuple(_coordinates(run)[key] for key in keys)) for side in (a, b))
    pairs = [pair for place in groups_a if place in groups_b for pair in _configurations(groups_a[place], groups_b[place])]
    if not pairs:
        raise ValueError(f"no cell of A has a counterpart in B: {_no_match(places, keys)}")
    for pair in pairs:
        _check(pair)
    return pairs, len(a) + len(b) - sum(len(side) for pair in pairs for side in pair)


def _configurations(a: list[Run], b: list[Run]) -> list[Matched]:
    """Pairs of runs with equal coordinates. If a side has several settings, only runs with equal settings are paired."""

    def identity(run: Run) -> str:
        record = run.record
        options = [record.method_options, record.training_options, record.backbone_options]
        return digest([record.data.fingerprint, comparable(record)[-1], options, record.settings.get("guidance")])

    settings_a, settings_b = grouped(a, identity), grouped(b, identity)
    if len(settings_a) == len(settings_b) == 1:
        return [Matched(a, b)]
    return [Matched(settings_a[key], settings_b[key]) for key in settings_a if key in settings_b]


def _no_match(places: list[list[dict[str, str]]], keys: list[str]) -> str:
    """The coordinates in which two sides have no value in common, and what to do."""
    words = []
    for key in keys:
        in_a, in_b = ({place[key] for place in side} for side in places)
        if not in_a & in_b:
            words.append(f"{key} is {', '.join(sorted(in_a))} in A, {', '.join(sorted(in_b))} in B")
    problem = "; ".join(words) or f"no two agree in {', '.join([*keys, 'settings'])}"
    return f"{problem}. Select fewer cells on each side, or give the paths of two cells"


def _check(pair: Matched) -> None:
    folders_a, folders_b = ({run.folder.resolve() for run in side if run.folder is not None} for side in pair)
    if folders_a & folders_b:
        raise ValueError(f"{min(folders_a & folders_b)} is on both sides of the comparison: select other cells for A or B")
    for side in pair:
        twins = same_seed(side)
        if twins:
            name = "/".join(_coordinates(side[0])[key] for key in ("method", "guidance", "backbone", "dataset"))
            folders = f"{twins[0].folder} and {twins[1].folder}"
            raise ValueError(f"two runs of {name} have the same seed: {folders}. Add coordinates that select one of them")
    runs = [*pair.a, *pair.b]
    if len({(run.record.data.keys_sha256, run.record.data.fingerprint, run.record.data.classes) for run in runs}) > 1:
        side_a, side_b = (f"{side[0].folder} on {_data(side[0].record)}" for side in pair)
        raise ValueError(f"not tested on the same data: {side_a}, {side_b}. Compare cells that were tested on the same samples")


def _data(record: Record) -> str:
    return f"{record.cell.dataset} {record.data.fingerprint[:8]} ({record.data.samples} samples, keys {record.data.keys_sha256[:8]})"


# The differences.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric of A minus the same metric of B, on the same samples."""

    a: float
    b: float
    difference: float
    interval: Interval | None
    """Over test samples and, with several common seeds, trainings; None if there are too few independent units."""
    p: float
    """p value of no difference, for this comparison alone."""
    p_holm: float
    """p value corrected for all comparisons of its kind that were asked for."""
    test: str
    samples: int
    units: int
    """Independent units among the samples: people where they are known, else pictures."""
    smallest: float | None
    """Smallest difference that could be significant, uncorrected; None if none could."""

    @property
    def significant(self) -> bool:
        """Whether the corrected p value is below the level of the tests."""
        return self.p_holm < 1 - LEVEL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two configurations on the same test split."""

    a: tuple[Record, ...]
    b: tuple[Record, ...]
    seeds: tuple[int, ...]
    """Common seeds, by which the trainings are paired. Empty if there are none: then all runs are used, unpaired."""
    differences: Mapping[Metric, Difference]
    per_class: Mapping[Metric, Mapping[str, Difference]]
    people_known: bool
    differing: tuple[str, ...]
    """Differing settings, options and code, in words; coordinates are not repeated."""


def compare(matched: Sequence[Matched]) -> tuple[Comparison, ...]:
    """Test all differences. The headline figures are corrected together, and so are the figures of the classes.

    Raises:
        ValueError: rows cannot be read, or are not of the same samples.
    """
    drafts = [_draft(pair) for pair in matched]
    headlines = _corrected([difference for draft in drafts for difference in draft.differences.values()])
    classes = _corrected([difference for draft in drafts for by_class in draft.per_class.values() for difference in by_class.values()])
    return tuple(
        dataclasses.replace(
            draft,
            differences={metric: next(headlines) for metric in draft.differences},
            per_class={metric: {name: next(classes) for name in by_class} for metric, by_class in draft.per_class.items()},
        )
        for draft in drafts
    )


def _corrected(differences: Sequence[Difference]) -> Iterator[Difference]:
    adjusted = holm([difference.p for difference in differences])
    return (dataclasses.replace(difference, p_holm=p) for difference, p in zip(differences, adjusted, strict=True))


def _draft(pair: Matched) -> Comparison:
    seeds_a, seeds_b = ({run.record.cell.seed for run in side} for side in pair)
    common = sorted(seeds_a & seeds_b)
    a, b = (
        [_with_samples(run) for run in sorted(side, key=lambda run: run.record.cell.seed) if not common or run.record.cell.seed in common]
        for side in pair
    )
    first = a[0].samples
    assert first is not None
    for run in (*a, *b):
        assert run.samples is not None
        if not np.array_equal(run.samples.labels, first.labels) or not np.array_equal(run.samples.people, first.people):
            raise ValueError(
                f"the rows of {run.folder} and {a[0].folder} are of different samples: a file was changed. Run bench verify on both folders"
            )
    boot = first.bootstrap()
    differences: dict[Metric, Difference] = {}
    per_class: dict[Metric, dict[str, Difference]] = {}
    for metric in METRICS:
        if any(figure(run.record, metric) is None for run in (*a, *b)):
            continue
        paired = _Paired(metric, a, b, boot, seeds=len(common))
        differences[metric] = paired.difference(np.ones(len(first.labels), bool))
        of_class = {name: first.labels == label for label, name in enumerate(a[0].record.data.classes)}
        per_class[metric] = {name: paired.difference(chosen) for name, chosen in of_class.items() if paired.counts(chosen)}
    return Comparison(
        a=tuple(run.record for run in a),
        b=tuple(run.record for run in b),
        seeds=tuple(common),
        differences=differences,
        per_class=per_class,
        people_known=bool((first.people >= 0).any()),
        differing=_differing(a[0].record, b[0].record),
    )


def _with_samples(run: Run) -> Run:
    assert run.folder is not None
    return dataclasses.replace(run, samples=load_samples(run.folder / ROWS, run.record))


class _Paired:
    """One metric of two sides on the same samples."""

    def __init__(self, metric: Metric, a: Sequence[Run], b: Sequence[Run], boot: Bootstrap, *, seeds: int) -> None:
        self._values, self._labels, self._counted = stacked([*a, *b], metric)
        self._accuracy = metric == "cl"
        self._sides = (slice(0, len(a)), slice(len(a), None))
        self._boot, self._seeds = boot, seeds

    def counts(self, chosen: npt.NDArray[np.bool_]) -> bool:
        """Whether any of the chosen samples counts in this metric."""
        return bool((self._counted & chosen).any())

    def difference(self, chosen: npt.NDArray[np.bool_]) -> Difference:
        """The difference on the chosen samples (N,). `p_holm` is not corrected yet."""
        counted = self._counted & chosen
        units = self._boot.units(counted)
        means = macro(self._values, self._labels, counted=counted)
        a, b = (means[side] for side in self._sides)
        difference = float(a.mean() - b.mean())
        replicates = self._boot.macro_means(self._values, self._labels, counted=counted)
        replicates_a, replicates_b = (replicates[side].mean(axis=0) for side in self._sides)
        error = float(np.nanstd(replicates_a - replicates_b, ddof=1))
        smallest = reach = t_reach(error, degrees=units - 1)
        p, test = float(bootstrap_p([difference], [error], clusters=units)[0]), "bootstrap"
        if self._accuracy and self._seeds == 1:
            total = int(counted.sum())
            discordant = int((self._values[0, counted] != self._values[1, counted]).sum())
            hits_a, hits_b = self._boot.sums(self._values * counted)
            p, test = clustered_mcnemar(hits_a - hits_b), "exact McNemar" + (" over people" if units < total else "")
            smallest = smallest_gap(total, discordant / total)
        elif self._seeds > 1:
            by_seed = a - b
            over_seeds = t_reach(float(by_seed.std(ddof=1)) / math.sqrt(self._seeds), degrees=self._seeds - 1)
            p, test = max(p, float(seeds_p(by_seed[None])[0])), "bootstrap and paired t over seeds"
            smallest = reach = max(reach, over_seeds)
        p = max(p, 2.0 ** (1 - units))  # without a difference, all units are still on one side with this probability
        return Difference(
            a=float(a.mean()),
            b=float(b.mean()),
            difference=difference,
            interval=Interval(difference - reach, difference + reach) if math.isfinite(reach) else None,
            p=p,
            p_holm=p,
            test=test,
            samples=int(counted.sum()),
            units=units,
            smallest=smallest if smallest < 1 else None,
        )


def _differing(a: Record, b: Record) -> tuple[str, ...]:
    """Settings in which two records differ, apart from their coordinates."""
    in_a, in_b = (
        _flat(
            {
                "settings": {k: v for k, v in record.settings.items() if k != "protocol"},
                "evaluation": essential(record.evaluation),
                "method options": record.method_options if a.cell.method == b.cell.method else {},
                "backbone options": record.backbone_options if a.cell.backbone == b.cell.backbone else {},
                "attention layer": record.attention_layer,
                "bench": record.code.version,
                "commit": (record.code.commit or "unknown")[:8],
            }
        )
        for record in (a, b)
    )
    words = [
        f"{key.removeprefix('settings.')} {in_a.get(key, '-')} / {in_b.get(key, '-')}"
        for key in in_a | in_b
        if in_a.get(key) != in_b.get(key) and (a.cell.guidance == b.cell.guidance or not key.startswith("settings.guidance."))
    ]
    return (*words[:MOST_LISTED], *([f"and {len(words) - MOST_LISTED} more"] if len(words) > MOST_LISTED else []))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys -> one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
