from __future__ import annotations

import itertools

import pytest

from tests.pairwise import pairwise, slow_beyond_pairs


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4, 3), (3, 3, 3, 3), (14, 2, 2), (2, 2, 2, 2, 2, 2)])
def test_every_pair_of_values_of_a_product_occurs(sizes):
    product = list(itertools.product(*map(range, sizes)))
    assert pairs(pairwise(product)) == pairs(product)


def test_a_product_of_many_columns_becomes_few_rows():
    assert len(pairwise(list(itertools.product(range(3), repeat=4)))) <= 15


def test_only_rows_that_are_possible_are_chosen_and_in_their_order():
    rows = [("a", 1, "x"), ("b", 2, "x"), ("a", 2, "y"), ("a", 1, "y"), ("b", 2, "y")]
    chosen = pairwise(rows)
    assert pairs(chosen) == pairs(rows)
    assert chosen == [row for row in rows if row in chosen]


def test_what_is_left_out_is_marked_slow():
    rows = list(itertools.product("ab", "cd", "ef"))
    params = slow_beyond_pairs(rows)
    assert [param.values for param in params] == rows
    assert [param.values for param in params if not param.marks] == pairwise(rows)
    assert {mark.name for param in params for mark in param.marks} == {"slow"}
