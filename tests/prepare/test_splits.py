from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.dataset import Item
from bench.prepare.splits import hash_sources, stratified_cut


def make(*counts):
    return [Item(source=f"train/{label}/{i:03d}.jpg", label=label) for label, n in enumerate(counts) for i in range(n)]


def test_each_class_gives_its_rounded_share_and_at_least_one():
    _, val = stratified_cut(make(100, 15, 4, 2, 1), fraction=0.1, salt="s")
    assert Counter(item.label for item in val) == {0: 10, 1: 2, 2: 1, 3: 1}


def test_the_cut_is_the_published_one():
    items = make(20)
    _, val = stratified_cut(items, fraction=0.25, salt="pepper")
    by_hash = sorted((i.source for i in items), key=lambda s: hashlib.sha256(f"pepper\n{s}".encode()).hexdigest())
    assert sorted(i.source for i in val) == sorted(by_hash[:5])


def test_the_order_of_the_items_does_not_matter_but_is_kept():
    items = make(30, 30)
    train, val = stratified_cut(items, fraction=0.2, salt="s")
    train_r, val_r = stratified_cut(items[::-1], fraction=0.2, salt="s")
    assert (train, val) == (train_r[::-1], val_r[::-1])


def test_another_salt_is_another_cut():
    items = make(50)
    assert hash_sources(stratified_cut(items, fraction=0.2, salt="a")[1]) != hash_sources(stratified_cut(items, fraction=0.2, salt="b")[1])


def test_pictures_of_another_class_change_nothing():
    few = stratified_cut(make(40, 10), fraction=0.2, salt="s")[1]
    many = stratified_cut(make(40, 30), fraction=0.2, salt="s")[1]
    assert [i for i in few if i.label == 0] == [i for i in many if i.label == 0]


def test_a_person_called_like_a_file_is_not_that_file():
    items = [Item(source="a", label=0), Item(source="b", label=0, identity="a"), *make(8)]
    train, val = stratified_cut(items, fraction=0.5, salt="s")
    assert sorted(i.source for i in train + val) == sorted(i.source for i in items)


def test_a_class_of_big_groups_still_gets_a_val_person():
    items = [Item(source=f"{p}/{i}", label=0, identity=f"p{p}") for p in range(4) for i in range(5 + (p != 2))]
    _, val = stratified_cut(items, fraction=0.1, salt="s")
    assert {i.identity for i in val} == {"p2"}  # the smallest overshoot of the quota of 2


def test_one_person_per_class_cannot_be_cut():
    with pytest.raises(ValueError, match="Provide a val folder"):
        stratified_cut([Item(source=str(i), label=0, identity="only") for i in range(9)], fraction=0.1, salt="s")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_cut(make(9), fraction=fraction, salt="s")


@given(
    people=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=12, max_size=80),
    fraction=st.floats(0.05, 0.9),
)
def test_no_person_is_on_both_sides_and_no_picture_is_lost(people, fraction):
    items = [Item(source=f"{i}", label=c, identity=f"p{p}" if p else None) for i, (p, c) in enumerate(people)]
    try:
        train, val = stratified_cut(items, fraction=fraction, salt="s")
    except ValueError:
        return
    assert sorted(i.source for i in train + val) == sorted(i.source for i in items)
    assert not {i.identity for i in train if i.identity} & {i.identity for i in val if i.identity}
    assert {i.label for i in train} == {i.label for i in items}
