"""The samples behind the rows of a table: how certain a figure is, and which rows cannot be told apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from bench.audit.stamp import is_verified
from bench.evaluation.metrics import macro
from bench.evaluation.rows import read_columns
from bench.evaluation.statistics import (
    LEVEL,
    Bootstrap,
    Interval,
    bootstrap_p,
    clustered_mcnemar,
    holm,
    mcnemar,
    percentile_interval,
    table_seeds_p,
    wilson_interval,
)
from bench.sweep.record import Record
from bench.sweep.store import ROWS, read_records

Metric = Literal["cl", "cam_cos", "att_cos"]
Standing = Literal["best", "tied", "behind", "alone"]
METRICS: tuple[Metric, ...] = ("cl", "cam_cos", "att_cos")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What one cell gave on every sample of its test split, N of them, in the split's order."""

    labels: npt.NDArray[np.int64]
    people: npt.NDArray[np.int64]
    """-1 = unknown."""
    counted: npt.NDArray[np.bool_]
    """Whether the sample counts in the cosines: it is an expression, and its face gave an AU map."""
    values: Mapping[Metric, npt.NDArray[np.float32]]
    """Metric -> (N,): 1 or 0 for CL, cosines else, NaN where they do not count."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A record, and its samples where they are to be looked at."""

    record: Record
    samples: Samples | None = None
    verified: bool = False
    """Whether the record carries the stamp of who evaluated its weights again."""
    folder: Path | None = None
    """Where it lies."""


def load_runs(root: Path) -> Iterator[Run]:
    """All finished records below a folder with their samples.

    Raises:
        ValueError: a record or its rows cannot be read; the message names the file.
    """
    for folder, record in read_records(root):
        yield Run(record=record, samples=load_samples(folder / ROWS, record), verified=is_verified(folder), folder=folder)


def load_samples(path: Path, record: Record) -> Samples:
    """The per-sample figures of a record.

    Raises:
        ValueError: the file is damaged, or not that of this record.
    """
    attention = f"attention_cosine_{record.attention_layer}"
    table = read_columns(path, ("label", "predicted", "person", "au_valid", "map_cosine_true", attention))
    labels = table["label"]
    if len(labels) != record.data.samples:
        raise ValueError(f"{path} has {len(labels)} rows, its record {record.data.samples} samples: one of them was changed")
    expressions = record.metrics["cam_cos"]["true"]["per_class"]
    expressive = np.array([name in expressions for name in record.data.classes])
    return Samples(
        labels=labels,
        people=table["person"],
        counted=table["au_valid"] & expressive[labels],
        values={"cl": (table["predicted"] == labels).astype(np.float32), "cam_cos": table["map_cosine_true"], "att_cos": table[attention]},
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One column's judgement of one row."""

    intervals: tuple[Interval, ...]
    """Of each seed, for other samples: Wilson for CL, bootstrap for cosines."""
    standing: Standing
    """``tied``: cannot be told apart from the best; ``alone``: there is nothing to compare with."""
    p_best: float
    """Of being equal to the best, corrected for all comparisons of the table; 1 for the best itself."""


Column = tuple[Metric, str]
"""(metric, guidance)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the samples say about a table."""

    cells: Mapping[tuple[int, Column], Judged]
    """(row, column) -> judgement."""
    wilson_half_width: float
    """Of the best CL of the table."""
    discordant: float | None
    """Median share of samples on which two rows differ in being right; None for a single row."""
    clusters: int
    """Independent units of the test split: people where known, else pictures."""
    comparisons: int


def judge(columns: Mapping[Column, Mapping[int, Sequence[Run]]]) -> Judgement:
    """Compare all rows of every column with each other.

    Two rows differ in a column if their difference stands against *sampling* (exact McNemar for CL with one seed, else a bootstrap of the
    mean over seeds; both over people, where they are known) and, with two seeds or more in common, against *training* (`table_seeds_p`):
    the larger p counts. Holm's correction is over all comparisons of the table.

    Args:
        columns: column -> row -> its runs, one a seed. Every run has samples, all of one test split.
    """
    first = next(run for rows in columns.values() for runs in rows.values() for run in runs)
    assert first.samples is not None
    people = first.samples.people
    boot = Bootstrap([None if person < 0 else str(person) for person in people.tolist()])
    drafts = {column: _Column(column[0], rows, boot) for column, rows in columns.items()}
    pairs = [(column, pair, p) for column, draft in drafts.items() for pair, p in draft.p_values.items()]
    adjusted = {(column, pair): p for (column, pair, _), p in zip(pairs, holm([p for _, _, p in pairs]), strict=True)}
    cells: dict[tuple[int, Column], Judged] = {}
    for column, draft in drafts.items():
        best = max(draft.means, key=lambda row: draft.means[row])
        for row in draft.means:
            p = 1.0 if row == best else adjusted[column, (min(row, best), max(row, best))]
            standing: Standing = "best" if row == best else "behind" if p < 1 - LEVEL else "tied"
            standing = standing if len(draft.means) > 1 else "alone"
            cells[row, column] = Judged(intervals=draft.intervals[row], standing=standing, p_best=p)
    accuracy = max((mean for (metric, _), draft in drafts.items() if metric == "cl" for mean in draft.means.values()), default=0.0)
    low, high = wilson_interval(round(accuracy * len(people)), len(people))
    shares = [share for draft in drafts.values() for share in draft.discordant]
    return Judgement(
        cells=cells,
        wilson_half_width=(high - low) / 2,
        discordant=float(np.median(shares)) if shares else None,
        clusters=boot.clusters,
        comparisons=len(pairs),
    )


class _Column:
    """One metric of all rows: means, intervals, and p values of all pairs.

    There may be thousands of pairs: what they need is computed once for each row, and combined as matrices.
    """

    def __init__(self, metric: Metric, rows: Mapping[int, Sequence[Run]], boot: Bootstrap) -> None:
        runs = [(row, run) for row, group in rows.items() for run in group]
        first = runs[0][1].samples
        assert first is not None
        plain = metric == "cl"
        labels = np.zeros_like(first.labels) if plain else first.labels
        counted = np.ones(len(labels), dtype=bool) if plain else first.counted
        values = np.stack([_values(run, metric) for _, run in runs])
        self._replicates = boot.macro_means(values, labels, counted=counted).astype(np.float32)
        self._clusters = boot.clusters
        self._observed = macro(values, labels, counted=counted)
        self._of: dict[int, dict[int, int]] = {row: {} for row in rows}
        for number, (row, run) in sorted(enumerate(runs), key=lambda item: item[1][1].record.cell.seed):
            self._of[row][run.record.cell.seed] = number  # in the order of the seeds
        self.means = {row: float(np.mean([self._observed[i] for i in seeds.values()])) for row, seeds in self._of.items()}
        self.intervals = {
            row: tuple(
                wilson_interval(int(values[i].sum()), len(labels)) if plain else percentile_interval(self._replicates[i])
                for i in seeds.values()
            )
            for row, seeds in self._of.items()
        }
        self.p_values: dict[tuple[int, int], float] = {}
        self.discordant: list[float] = []
        # Pairs that share the same seeds are judged together.
        by_seeds: dict[tuple[int, ...], list[_Pair]] = {}
        for pair in itertools.combinations(sorted(rows), 2):
            common, mine, theirs = self._common(*pair)
            by_seeds.setdefault(common, []).append(_Pair(rows=pair, mine=mine, theirs=theirs))
        for seeds, group in by_seeds.items():
            chosen, ones, others = _places([pair.mine for pair in group], [pair.theirs for pair in group])
            p_values = self._sampling(chosen, ones, others)
            if plain:
                only_one, only_other = _discordant(values, group)
                self.discordant += ((only_one + only_other) / len(labels)).tolist()
                if len(seeds) == 1:
                    alone = boot.clusters == len(labels)
                    p_values = mcnemar(only_one, only_other) if alone else _over_people(boot.sums(values), group)
            if len(seeds) > 1:
                p_values = np.maximum(p_values, table_seeds_p(self._observed[np.array(chosen)], ones, others))
            self.p_values |= {pair.rows: float(p) for pair, p in zip(group, p_values, strict=True)}

    def _common(self, one: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The seeds that two rows share, and the numbers of their runs."""
        mine, theirs = self._of[one], self._of[other]
        if mine.keys() != theirs.keys():
            common = sorted(mine.keys() & theirs.keys())
            if not common:
                return (), tuple(mine.values()), tuple(theirs.values())
            mine, theirs = ({seed: seeds[seed] for seed in common} for seeds in (mine, theirs))
        return tuple(mine), tuple(mine.values()), tuple(theirs.values())

    def _sampling(
        self, chosen: Sequence[tuple[int, ...]], ones: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """(P,) p values of the differences between the means over runs of ``chosen[ones]`` and ``chosen[others]``, from the bootstrap."""
        means = np.array([self._observed[list(runs)].mean() for runs in chosen])
        replicates = np.stack([self._replicates[list(runs)].mean(axis=0, dtype=np.float64) for runs in chosen])
        # A replicate without any sample that counts is NaN in all rows alike. The variance of a difference is that of its parts.
        covariance = np.atleast_2d(np.cov(replicates[:, np.isfinite(replicates[0])]))
        variances = covariance[ones, ones] + covariance[others, others] - 2 * covariance[ones, others]
        return bootstrap_p(means[ones] - means[others], np.sqrt(np.maximum(variances, 0)), clusters=self._clusters)


class _Pair(NamedTuple):
    """Two rows to be told apart, and the numbers of their runs: those of the seeds they share, all if they share none."""

    rows: tuple[int, int]
    mine: tuple[int, ...]
    theirs: tuple[int, ...]


_K = TypeVar("_K")


def _places(ones: Sequence[_K], others: Sequence[_K]) -> tuple[list[_K], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What occurs, each once, and where in it each of ``ones`` and of ``others`` stands."""
    place = {key: i for i, key in enumerate(dict.fromkeys((*ones, *others)))}
    return list(place), np.array([place[key] for key in ones]), np.array([place[key] for key in others])


def _discordant(hits: npt.NDArray[np.float32], group: Sequence[_Pair]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(P,) samples on which only the first, only the second row of each pair is right, in the first seed they share."""
    runs, ones, others = _places([pair.mine[0] for pair in group], [pair.theirs[0] for pair in group])
    both = (hits[runs] @ hits[runs].T).round().astype(np.int64)
    right = both.diagonal()
    return right[ones] - both[ones, others], right[others] - both[ones, others]


def _over_people(hits: npt.NDArray[np.float64], group: Sequence[_Pair]) -> npt.NDArray[np.float64]:
    """(P,) p values of pairs of rows with one seed, from the hits (M, clusters) of each run and person."""
    return np.array([clustered_mcnemar(hits[pair.mine[0]] - hits[pair.theirs[0]]) for pair in group])


def _values(run: Run, metric: Metric) -> npt.NDArray[np.float32]:
    assert run.samples is not None
    return run.samples.values[metric]
