"""The samples behind the rows of a table: how certain a figure is, and which rows differ significantly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
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
    """What one cell gave on each of the N samples of its test split, in the order of the split."""

    labels: npt.NDArray[np.int64]
    people: npt.NDArray[np.int64]
    """-1 = unknown."""
    counted: npt.NDArray[np.bool_]
    """(N,): whether the sample counts in the cosines. Its class is an expression, and its face has an AU map."""
    values: Mapping[Metric, npt.NDArray[np.float32]]
    """Metric -> (N,): 1 or 0 for CL, else cosines, with NaN where they do not count."""

    def bootstrap(self) -> Bootstrap:
        """Replicates of the split; people are drawn whole where they are known."""
        return Bootstrap([None if person < 0 else str(person) for person in self.people.tolist()])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A record, with its samples where they have been read."""

    record: Record
    samples: Samples | None = None
    verified: bool = False
    """Whether the record has a stamp: its weights were evaluated again, with the same result."""
    folder: Path | None = None
    """Of the cell."""


_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items by key; keys and items keep their order."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def stacked(runs: Sequence[Run], metric: Metric) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """One metric of M runs on the same N samples.

    Returns:
        values (M, N); labels (N,), all zero for CL, whose mean is not one over classes; which samples count (N,): for the cosines those
        that count in every run, as AU maps of another geometry may be missing for other faces.
    """
    samples = [run.samples for run in runs if run.samples is not None]
    values = np.stack([entry.values[metric] for entry in samples])
    labels = samples[0].labels
    if metric == "cl":
        return values, np.zeros_like(labels), np.ones(len(labels), bool)
    return values, labels, np.logical_and.reduce([entry.counted for entry in samples])


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
        raise ValueError(
            f"{path} has {len(labels)} rows, its record {record.data.samples} samples: a file was changed. Run bench verify {path.parent}"
        )
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
    """What the samples say about one figure of a table."""

    intervals: tuple[Interval, ...]
    """One a seed, over other test samples: Wilson for CL, bootstrap for cosines."""
    standing: Standing
    """``tied``: the difference to the best is not significant; ``alone``: the only figure of its column."""
    p_best: float
    """p value of no difference to the best, corrected for all comparisons of the table; 1 for the best itself."""


Column = tuple[Metric, str]
"""(metric, guidance)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the samples say about a table."""

    cells: Mapping[tuple[int, Column], Judged]
    """(row, column) -> judgement."""
    wilson_half_width: float
    """Half the width of the Wilson interval of the best CL of the table."""
    discordant: float | None
    """Share of the samples that exactly one of two rows classifies correctly, median over pairs of rows; None for a single row."""
    clusters: int
    """Independent units of the test split: people where they are known, else pictures."""
    comparisons: int


def judge(columns: Mapping[Column, Mapping[int, Sequence[Run]]]) -> Judgement:
    """Compare all rows of every column with each other.

    Two rows differ in a column if the difference is significant for *sampling* (exact McNemar for CL with one seed, else a bootstrap of
    the mean over seeds; both over people, where they are known) and, with two or more seeds in common, for *training* (`table_seeds_p`).
    The larger p counts. Holm's correction is over all comparisons of the table.

    Args:
        columns: column -> row -> its runs, one a seed. Every run has its samples, and all are of one test split.
    """
    first = next(run for rows in columns.values() for runs in rows.values() for run in runs)
    assert first.samples is not None
    boot, total = first.samples.bootstrap(), len(first.samples.labels)
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
    low, high = wilson_interval(round(accuracy * total), total)
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

    There may be thousands of pairs. So what they need is computed once for each row, and combined as matrices.
    """

    def __init__(self, metric: Metric, rows: Mapping[int, Sequence[Run]], boot: Bootstrap) -> None:
        runs = [(row, run) for row, group in rows.items() for run in group]
        values, labels, counted = stacked([run for _, run in runs], metric)
        self._replicates = boot.macro_means(values, labels, counted=counted).astype(np.float32)
        self._clusters = boot.clusters
        self._observed = macro(values, labels, counted=counted)
        self._of: dict[int, dict[int, int]] = {row: {} for row in rows}
        for number, (row, run) in sorted(enumerate(runs), key=lambda item: item[1][1].record.cell.seed):
            self._of[row][run.record.cell.seed] = number  # in the order of the seeds
        self.means = {row: float(np.mean([self._observed[i] for i in seeds.values()])) for row, seeds in self._of.items()}
        self.intervals = {
            row: tuple(
                wilson_interval(int(values[i].sum()), len(labels)) if metric == "cl" else percentile_interval(self._replicates[i])
                for i in seeds.values()
            )
            for row, seeds in self._of.items()
        }
        self.p_values: dict[tuple[int, int], float] = {}
        self.discordant: list[float] = []
        # Pairs that share the same seeds are judged together.
        by_seeds: dict[tuple[int, ...], list[_Pair]] = {}
        for rows_of_pair in itertools.combinations(sorted(rows), 2):
            seeds, pair = self._pair(*rows_of_pair)
            by_seeds.setdefault(seeds, []).append(pair)
        for seeds, pairs in by_seeds.items():
            chosen, first, second = _places([pair.first for pair in pairs], [pair.second for pair in pairs])
            p_values = self._sampling(chosen, first, second)
            if metric == "cl":
                only_first, only_second = _discordant(values, pairs)
                self.discordant += ((only_first + only_second) / len(labels)).tolist()
                if len(seeds) == 1 and boot.clusters == len(labels):
                    p_values = mcnemar(only_first, only_second)
                elif len(seeds) == 1:
                    hits = boot.sums(values)  # (M, clusters)
                    p_values = np.array([clustered_mcnemar(hits[pair.first[0]] - hits[pair.second[0]]) for pair in pairs])
            if len(seeds) > 1:
                p_values = np.maximum(p_values, table_seeds_p(self._observed[np.array(chosen)], first, second))
            self.p_values |= {pair.rows: float(p) for pair, p in zip(pairs, p_values, strict=True)}

    def _pair(self, first_row: int, second_row: int) -> tuple[tuple[int, ...], _Pair]:
        """The seeds that two rows share, and the runs to compare."""
        first, second = self._of[first_row], self._of[second_row]
        shared = tuple(seed for seed in first if seed in second)
        runs = (tuple(row[seed] for seed in shared or row) for row in (first, second))
        return shared, _Pair((first_row, second_row), *runs)

    def _sampling(
        self, chosen: Sequence[tuple[int, ...]], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """(P,) p values from the bootstrap, of the differences between the means over the runs ``chosen[first]`` and ``chosen[second]``."""
        means = np.array([self._observed[list(runs)].mean() for runs in chosen])
        replicates = np.stack([self._replicates[list(runs)].mean(axis=0, dtype=np.float64) for runs in chosen])
        # A replicate without any sample that counts is NaN in all rows alike. The variance of a difference is that of its parts.
        covariance = np.atleast_2d(np.cov(replicates[:, np.isfinite(replicates[0])]))
        variances = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
        return bootstrap_p(means[first] - means[second], np.sqrt(np.maximum(variances, 0)), clusters=self._clusters)


class _Pair(NamedTuple):
    """Two rows to compare, and the numbers of their runs: those of the seeds that both have, or all if they share none."""

    rows: tuple[int, int]
    first: tuple[int, ...]
    second: tuple[int, ...]


def _places(first: Sequence[_Key], second: Sequence[_Key]) -> tuple[list[_Key], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct keys of both sequences, and the position of each element of ``first`` and of ``second`` among them."""
    place = {key: i for i, key in enumerate(dict.fromkeys((*first, *second)))}
    return list(place), np.array([place[key] for key in first]), np.array([place[key] for key in second])


def _discordant(hits: npt.NDArray[np.float32], pairs: Sequence[_Pair]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(P,) samples that only the first, and that only the second row of each pair classifies correctly, in their first common seed."""
    runs, first, second = _places([pair.first[0] for pair in pairs], [pair.second[0] for pair in pairs])
    both = (hits[runs] @ hits[runs].T).round().astype(np.int64)
    correct = both.diagonal()
    return correct[first] - both[first, second], correct[second] - both[first, second]
