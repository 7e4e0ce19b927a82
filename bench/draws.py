"""Random numbers inside of a network, as functions of (seed, epoch, step, sample).

A layer that draws from here draws the same numbers however the batch of a step is spread over processes and micro-batches. Torch's own
generator cannot do that: each process has one, and what it gives depends on all that was drawn before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.keyed import derive_seed, keyed_seeds, keyed_uniform, keyed_words


class _Step:
    """The step at work. One object that is changed, not exchanged: a compiled network looks at it by name."""

    def __init__(self) -> None:
        self.seed: Tensor | None = None
        """(1,) int64, on the CPU."""
        self.samples: Tensor | None = None
        """(B,) int64, on the device: a seed for each sample of the micro-batch."""
        self.calls: dict[int, int] = {}
        """Draws made in this forward pass, by site: a layer that is used twice draws two sets of numbers."""

    def stream(self, site: int) -> int:
        """A number for the next draw at a site."""
        calls = self.calls.get(site, 0)
        self.calls[site] = calls + 1
        return site + calls


_STEP = _Step()


@contextlib.contextmanager
def drawing(*, seed: int, step: int, samples: Tensor) -> Iterator[None]:
    """Let the layers of a network draw for this step, until the end of the ``with`` block.

    Args:
        seed: of the training.
        step: number of the step since the first.
        samples: (B,) int64, `bench.method.Batch.seeds` of the micro-batch: functions of (seed, epoch, sample).
    """
    before = _STEP.seed, _STEP.samples, _STEP.calls
    _STEP.seed = torch.tensor([derive_seed(seed, step)])
    # With the step: where classes are balanced a sample may come twice in an epoch.
    _STEP.samples = keyed_seeds(samples, seed, step)
    _STEP.calls = {}
    try:
        yield
    finally:
        _STEP.seed, _STEP.samples, _STEP.calls = before


def site_of(*name: str | int) -> int:
    """A number for a place in a network that draws, from its name."""
    return derive_seed("site", *name) >> 8  # room for the calls to be added


def step_uniform(site: int) -> Tensor:
    """A number for all samples of a step, uniform on [0, 1); () on the CPU.

    Outside of `drawing` it comes from torch's own generator.
    """
    if _STEP.seed is None:
        return torch.rand(())
    return keyed_uniform(_STEP.seed, stream=_STEP.stream(site), count=1)[0, 0]


def sample_kept(site: int, *, rows: int, count: int, rate: float) -> Tensor | None:
    """What dropout keeps: each place with probability 1 - ``rate``, by numbers of the sample that it belongs to.

    Args:
        site: of `site_of`.
        rows: of the layer's input. A multiple k of the number of samples means k neighbouring rows a sample, as of windows or patches.
        count: places of a row.
        rate: probability of dropping.

    Returns:
        (rows, count) bool on the device; None outside of `drawing`, or where the rows cannot be told apart by sample.
    """
    samples = _STEP.samples
    if samples is None or rows % len(samples):
        return None
    words = keyed_words(samples, stream=_STEP.stream(site), count=rows // len(samples) * count)
    return (words >= round(rate * 2.0**53)).reshape(rows, count)
