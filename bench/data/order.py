"""Who reads which sample when: pure functions of (seed, epoch, world size, workers), without any I/O.

The order of an epoch is one permutation of the split, so every world size sees the same global batches. Every sample
occurs at most once per epoch (exactly once but for the last, incomplete batch) and every rank takes the same number of
steps.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
Balance = Literal["none", "class"]


def derive_seed(seed: int, purpose: str, *parts: int) -> int:
    """128 bits that depend on every argument, so that neither seeds, epochs nor purposes overlap.

    A hash and not ``seed + rank``: with sums, (seed 0, rank 1) is (seed 1, rank 0).
    """
    return int.from_bytes(hashlib.blake2b(repr((seed, purpose, *parts)).encode(), digest_size=16).digest(), "little")


def epoch_order(
    *, seed: int, epoch: int, samples: int, balance: Balance = "none", labels: npt.NDArray[np.int64] | None = None
) -> Positions:
    """The order of an epoch.

    Args:
        seed: seed of the training.
        epoch: number of the epoch, from 0.
        samples: size of the split, N.
        balance: ``none``: a permutation. ``class``: also N positions, but each class present takes an equal share of
            them (to within one); a class with fewer samples than its share repeats, each round in a new order, and one
            with more is cut short, so this is not a permutation.
        labels: (N,) class ids; needed for ``class``.

    Returns:
        (N,) int64 positions, a pure function of the arguments.

    Raises:
        ValueError: ``class`` without labels, or with another number of them.
    """
    if balance == "none":
        return _shuffled(np.arange(samples, dtype=np.int64), derive_seed(seed, "order", epoch))
    if labels is None or len(labels) != samples:
        raise ValueError(f"balance='class' needs one label per sample: {samples} samples, {0 if labels is None else len(labels)} labels")
    classes = np.unique(labels)
    # Which classes get the odd slots changes from epoch to epoch.
    slots = np.resize(_shuffled(classes, derive_seed(seed, "slots", epoch)), samples)
    order = np.empty(samples, dtype=np.int64)
    for label in classes.tolist():
        members = np.flatnonzero(labels == label)
        wanted = int(np.count_nonzero(slots == label))
        rounds = -(-wanted // len(members))
        drawn = [_shuffled(members, derive_seed(seed, "class", epoch, label, turn)) for turn in range(rounds)]
        order[slots == label] = np.concatenate([*drawn, members[:0]])[:wanted]
    return _shuffled(order, derive_seed(seed, "order", epoch))


def steps_of(*, samples: int, batch_size: int) -> int:
    """Steps of an epoch: whole global batches, N // B.

    Raises:
        ValueError: the split is smaller than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    if samples < batch_size:
        raise ValueError(
            f"batch size {batch_size} is larger than the split, which has {samples} samples: no step could be made. "
            f"Set batch_size to {samples} or less"
        )
    return samples // batch_size


def local_batch_size(*, batch_size: int, world_size: int) -> int:
    """This rank's part of a global batch, B / world size.

    Raises:
        ValueError: the world size does not divide the batch size; the message names the nearest sizes that it divides.
    """
    if world_size < 1:
        raise ValueError(f"world size {world_size}: must be at least 1")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    if batch_size % world_size:
        below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"batch size {batch_size} cannot be shared equally by {world_size} processes. Set batch_size to {nearest}")
    return batch_size // world_size


def train_positions(
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    samples: int,
    batch_size: int,
    start_step: int = 0,
    balance: Balance = "none",
    labels: npt.NDArray[np.int64] | None = None,
) -> Positions:
    """This rank's positions at every step of an epoch.

    Global batch t is ``order[t * B : (t + 1) * B]`` and rank r takes its r-th equal slice, so that the global batches do
    not depend on the world size, and an epoch continues anywhere without its past.

    Returns:
        (steps - start_step, B / world size) int64.

    Raises:
        ValueError: as `steps_of` and `local_batch_size`; also a rank or a ``start_step`` out of range.
    """
    local = local_batch_size(batch_size=batch_size, world_size=world_size)
    _check_rank(rank=rank, world_size=world_size)
    steps = check_start(start_step, samples=samples, batch_size=batch_size)
    order = epoch_order(seed=seed, epoch=epoch, samples=samples, balance=balance, labels=labels)
    return order[: steps * batch_size].reshape(steps, world_size, local)[start_step:, rank]


def check_start(start_step: int, *, samples: int, batch_size: int) -> int:
    """Steps of the epoch, given that it can be continued at ``start_step``.

    Raises:
        ValueError: as `steps_of`, or the epoch has no such step (its number of steps itself is allowed: nothing is left).
    """
    steps = steps_of(samples=samples, batch_size=batch_size)
    if not 0 <= start_step <= steps:
        raise ValueError(
            f"cannot continue at step {start_step}: an epoch of {samples} samples in batches of {batch_size} has steps 0 to {steps}"
        )
    return steps


def eval_range(*, rank: int, world_size: int, samples: int) -> range:
    """This rank's contiguous share of a split for evaluation: sizes differ by at most one and may be 0.

    Raises:
        ValueError: no such rank.
    """
    _check_rank(rank=rank, world_size=world_size)
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


def _shuffled(values: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.int64]:
    # Sorting raw words: numpy promises that bit generators never change, but not that Generator.permutation stays as it is.
    words = np.random.Philox(key=key).random_raw(len(values))
    return values[np.argsort(words, kind="stable")]


def _check_rank(*, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among {world_size} processes: ranks are 0 to {world_size - 1}")
