"""A sample of a product of parameters in which every two values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import pytest


def pairwise(rows: Sequence[tuple[Hashable, ...]]) -> list[tuple[Hashable, ...]]:
    """Few of the rows, in their order, that hold every pair of values that stands in one of the rows.

    The rows are given, not the values of the columns, since not all of a product has to be possible.
    """
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(pairs, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [row for row in pairs if row in chosen]


def slow_beyond_pairs(rows: Sequence[tuple[Hashable, ...]]) -> list[Any]:
    """All rows as parameters of a test; those that :func:`pairwise` leaves out are marked slow."""
    chosen = set(pairwise(rows))
    return [pytest.param(*row, marks=[] if row in chosen else [pytest.mark.slow]) for row in rows]
