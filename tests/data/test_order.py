"""The epoch plans: pure functions, checked for any split, batch size and world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.data import order as plan

WORLDS = st.integers(1, 8)
SEEDS = st.integers(0, 3)


@given(seed=SEEDS, epoch=SEEDS, samples=st.integers(0, 500))
def test_order_of_an_epoch_is_a_permutation(seed, epoch, samples):
    order = plan.epoch_order(seed=seed, epoch=epoch, samples=samples)
    assert sorted(order.tolist()) == list(range(samples))


def test_order_is_pinned_across_versions():
    assert plan.epoch_order(seed=0, epoch=0, samples=8).tolist() == [3, 5, 6, 1, 0, 4, 7, 2]


def test_order_differs_between_epochs_and_between_seeds():
    orders = {tuple(plan.epoch_order(seed=seed, epoch=epoch, samples=50).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(world=WORLDS, local=st.integers(1, 12), samples=st.integers(1, 300), seed=SEEDS)
def test_ranks_take_equal_steps_and_together_the_global_batches(world, local, samples, seed):
    batch = world * local
    assume(samples >= batch)
    order = plan.epoch_order(seed=seed, epoch=1, samples=samples)
    ranks = [
        plan.train_positions(seed=seed, epoch=1, rank=rank, world_size=world, samples=samples, batch_size=batch) for rank in range(world)
    ]
    assert {rank.shape for rank in ranks} == {(samples // batch, local)}
    together = np.concatenate(ranks, axis=1).reshape(-1)
    assert together.tolist() == order[: len(together)].tolist()
    assert samples - len(together) < batch


@given(worlds=st.tuples(WORLDS, WORLDS), factor=st.integers(1, 3), samples=st.integers(1, 600))
def test_global_batches_do_not_depend_on_the_world_size(worlds, factor, samples):
    batch = worlds[0] * worlds[1] * factor
    assume(samples >= batch)
    first, second = (
        np.concatenate(
            [plan.train_positions(seed=0, epoch=0, rank=r, world_size=w, samples=samples, batch_size=batch) for r in range(w)], axis=1
        )
        for w in worlds
    )
    assert np.array_equal(first, second)


@given(start=st.integers(0, 7))
def test_continuing_an_epoch_is_its_tail(start):
    def rows(start_step):
        return plan.train_positions(seed=0, epoch=0, rank=1, world_size=2, samples=30, batch_size=4, start_step=start_step)

    assert np.array_equal(rows(start), rows(0)[start:])


def test_continuing_after_the_end_of_an_epoch_is_refused():
    with pytest.raises(ValueError, match=r"cannot continue at step 8.*steps 0 to 7"):
        plan.train_positions(seed=0, epoch=0, rank=0, world_size=1, samples=30, batch_size=4, start_step=8)


@pytest.mark.parametrize(("batch", "world", "hint"), [(10, 4, "8 or 12"), (3, 8, "to 8$")])
def test_batch_that_cannot_be_shared_names_the_nearest_that_can(batch, world, hint):
    with pytest.raises(ValueError, match=hint):
        plan.local_batch_size(batch_size=batch, world_size=world)


def test_split_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="larger than the split, which has 5 samples"):
        plan.steps_of(samples=5, batch_size=6)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match="ranks are 0 to 1"):
        plan.eval_range(rank=rank, world_size=2, samples=5)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=SEEDS, epoch=SEEDS)
def test_balanced_order_keeps_the_length_and_gives_classes_equal_shares(counts, seed, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = plan.epoch_order(seed=seed, epoch=epoch, samples=len(labels), balance="class", labels=labels)
    shares = np.bincount(labels[order], minlength=len(counts))
    assert len(order) == len(labels)
    assert shares.max() - shares.min() <= 1


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), seed=SEEDS)
def test_balanced_order_repeats_samples_of_a_class_equally_often(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = plan.epoch_order(seed=seed, epoch=0, samples=len(labels), balance="class", labels=labels)
    uses = np.bincount(order, minlength=len(labels))
    for label in range(len(counts)):
        assert np.ptp(uses[labels == label]) <= 1


def test_balanced_order_needs_labels():
    with pytest.raises(ValueError, match="one label per sample"):
        plan.epoch_order(seed=0, epoch=0, samples=3, balance="class")


@given(world=WORLDS, samples=st.integers(0, 100))
def test_evaluation_ranges_are_a_partition(world, samples):
    ranges = [plan.eval_range(rank=rank, world_size=world, samples=samples) for rank in range(world)]
    assert [position for own in ranges for position in own] == list(range(samples))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_derived_seeds_do_not_overlap_between_seed_rank_and_purpose():
    seeds = {plan.derive_seed(seed, purpose, rank) for seed in range(5) for purpose in ("order", "buffer") for rank in range(5)}
    assert len(seeds) == 50
