"""Rankings across datasets: the average rank of each row over tables that were made the same way."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bench.evaluation.statistics import Ranking, rank_methods
from bench.reporting.tables.evidence import METRICS, Column
from bench.reporting.tables.leaderboard import GUIDANCE, Row, Table

Name = tuple[str, str, str]
"""(method, backbone, title) of a row: what makes rows of two tables the same."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankedRow:
    """One method on one backbone: its average ranks."""

    method: str
    backbone: str
    title: str
    ranks: Mapping[Column, float]
    """1 = best; only columns in which the row has a figure on every dataset."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankTable:
    """Average ranks over datasets: tables of one protocol, variant and recipe, all whole or all partial."""

    datasets: tuple[str, ...]
    protocol: str
    variant: str
    recipe: str
    partial: bool
    rows: tuple[RankedRow, ...]
    columns: Mapping[Column, Ranking]
    notes: tuple[str, ...]
    """Which rows and datasets were left out, and why."""

    @property
    def title(self) -> str:
        """Heading of the table."""
        data = " and ".join((", ".join(self.datasets[:-1]), self.datasets[-1]))
        return f"Average rank over {data}{' (partial data)' if self.partial else ''}, protocol {self.protocol}, variant {self.variant}"

    def standing(self, row: RankedRow, column: Column) -> Literal["best", "tied", "behind"]:
        """``tied``: nearer to the best average rank than the critical difference."""
        best = min(other.ranks[column] for other in self.rows if column in other.ranks)
        if row.ranks[column] == best:
            return "best"
        return "tied" if row.ranks[column] - best < self.columns[column].critical_difference else "behind"


def rank(tables: Sequence[Table]) -> tuple[RankTable, ...]:
    """Rank the rows that tables of different datasets share; only tables of one protocol, variant and recipe are put together.

    Whole and partial data are kept apart, rows that depend on the batch left out. There is no ranking where no two datasets share two rows.
    """
    groups: dict[tuple[str, str, str, bool], list[Table]] = {}
    for table in tables:
        groups.setdefault((table.protocol, table.variant, table.recipe, table.partial), []).append(table)
    return tuple(ranked for group in groups.values() if (ranked := _rank(group)) is not None)


def _rank(tables: list[Table]) -> RankTable | None:
    notes: list[str] = []
    times = Counter(table.dataset for table in tables)
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        notes.append(f"left out, as there are several versions of their data: {', '.join(twice)}")
    there = {table.dataset: _rankable(table, notes) for table in tables if table.dataset not in twice}
    while len(there) > 1 and len(_shared(list(there.values()))) < 2:
        fewest = min(there, key=lambda name: len(there[name]))
        del there[fewest]
        notes.append(f"{fewest} left out: it shares too few rows with the others")
    if len(there) < 2:
        return None
    names = _shared(list(there.values()))
    missing = dict.fromkeys(name for rows in there.values() for name in rows if name not in names)
    if missing:
        notes.append(f"left out, as they are not in every table: {', '.join(_words(name) for name in missing)}")
    columns: dict[Column, Ranking] = {}
    ranks: dict[Name, dict[Column, float]] = {name: {} for name in names}
    for column in ((metric, guidance) for metric in METRICS for guidance in GUIDANCE):
        entrants = [name for name in names if all(column in rows[name].stats for rows in there.values())]
        if len(entrants) < 2:
            continue
        columns[column] = rank_methods(np.array([[rows[name].stats[column].mean for name in entrants] for rows in there.values()]))
        for name, value in zip(entrants, columns[column].ranks, strict=True):
            ranks[name][column] = value
    if not columns:
        return None
    first = tables[0]
    return RankTable(
        datasets=tuple(there),
        protocol=first.protocol,
        variant=first.variant,
        recipe=first.recipe,
        partial=first.partial,
        rows=tuple(RankedRow(method=name[0], backbone=name[1], title=name[2], ranks=ranks[name]) for name in names if ranks[name]),
        columns=columns,
        notes=tuple(dict.fromkeys(notes)),
    )


def _rankable(table: Table, notes: list[str]) -> dict[Name, Row]:
    """The rows that may be ranked, by name."""
    rows: dict[Name, Row] = {}
    times = Counter((row.method, row.backbone, row.title) for row in table.rows)
    for row in table.rows:
        name = (row.method, row.backbone, row.title)
        if row.batch_dependent:
            notes.append(f"{_words(name)} left out: batch-dependent on {table.dataset}")
        elif times[name] > 1:
            notes.append(f"{_words(name)} left out: {times[name]} rows of this name on {table.dataset}")
        else:
            rows[name] = row
    return rows


def _shared(tables: Sequence[Mapping[Name, Row]]) -> list[Name]:
    return [name for name in tables[0] if all(name in rows for rows in tables[1:])]


def _words(name: Name) -> str:
    return f"{name[2]} ({name[1]})"
