"""Rankings across datasets: the average rank of each row over tables with the same settings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bench.evaluation.statistics import Ranking, rank_methods
from bench.reporting.tables.evidence import Column, grouped
from bench.reporting.tables.leaderboard import FIGURES, Row, Table

Name = tuple[str, str, str]
"""(method, backbone, title) of a row. Rows of two tables with the same name are ranked as one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankedRow:
    """Average ranks of one method on one backbone."""

    method: str
    backbone: str
    title: str
    ranks: Mapping[Column, float]
    """1 = best. Only columns in which the row has a figure on every dataset."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankTable:
    """Average ranks over datasets. Their tables share protocol, variant and recipe, and are all whole or all partial."""

    datasets: tuple[str, ...]
    protocol: str
    variant: str
    recipe: str
    partial: bool
    rows: tuple[RankedRow, ...]
    columns: Mapping[Column, Ranking]
    notes: tuple[str, ...]
    """Rows and datasets that were left out, and why."""

    @property
    def title(self) -> str:
        """Heading of the table."""
        data = " and ".join((", ".join(self.datasets[:-1]), self.datasets[-1]))
        return f"Average rank over {data}{' (partial data)' if self.partial else ''}, protocol {self.protocol}, variant {self.variant}"

    def standing(self, row: RankedRow, column: Column) -> Literal["best", "tied", "behind"]:
        """``tied``: closer to the best average rank than the critical difference."""
        best = min(ranked.ranks[column] for ranked in self.rows if column in ranked.ranks)
        if row.ranks[column] == best:
            return "best"
        return "tied" if row.ranks[column] - best < self.columns[column].critical_difference else "behind"


def rank(tables: Sequence[Table]) -> tuple[RankTable, ...]:
    """Rank the rows that tables of different datasets share. Only tables of one protocol, variant and recipe are combined.

    Whole and partial data are not combined, and batch-dependent rows are left out. A ranking needs two datasets that share two rows.
    """
    groups = grouped(tables, lambda table: (table.protocol, table.variant, table.recipe, table.partial))
    return tuple(ranking for group in groups.values() if (ranking := _rank(group)) is not None)


def _rank(tables: list[Table]) -> RankTable | None:
    notes: list[str] = []
    times = Counter(table.dataset for table in tables)
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        notes.append(f"left out, because several versions of their data are in use: {', '.join(twice)}")
    rows_of = {table.dataset: _rankable(table, notes) for table in tables if table.dataset not in twice}
    while len(rows_of) > 1 and len(_shared(list(rows_of.values()))) < 2:
        fewest = min(rows_of, key=lambda name: len(rows_of[name]))
        del rows_of[fewest]
        notes.append(f"{fewest} left out: it shares fewer than two rows with the rest")
    if len(rows_of) < 2:
        return None
    names = _shared(list(rows_of.values()))
    missing = dict.fromkeys(name for rows in rows_of.values() for name in rows if name not in names)
    if missing:
        notes.append(f"left out, because they are not in every table: {', '.join(_words(name) for name in missing)}")
    columns: dict[Column, Ranking] = {}
    ranks: dict[Name, dict[Column, float]] = {name: {} for name in names}
    for column in FIGURES:
        entrants = [name for name in names if all(column in rows[name].stats for rows in rows_of.values())]
        if len(entrants) < 2:
            continue
        columns[column] = rank_methods(np.array([[rows[name].stats[column].mean for name in entrants] for rows in rows_of.values()]))
        for name, value in zip(entrants, columns[column].ranks, strict=True):
            ranks[name][column] = value
    if not columns:
        return None
    first = tables[0]
    return RankTable(
        datasets=tuple(rows_of),
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
