"""The batch that readers hand to the trainer and the evaluator."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RawBatch:
    """Samples as stored, before any warp: everything the device needs to go on alone.

    Shapes: ``positions`` (B,) int64, index of the sample in its split; ``hashes`` (B,) int64, `key_hash` of its key;
    ``images`` (B, 3, S, S) uint8; ``labels`` (B,) int64; ``landmarks`` (B, 68, 2) float32, x and y in pixels of the
    stored picture, NaN throughout where the face has none.
    """

    positions: Tensor
    hashes: Tensor
    images: Tensor
    labels: Tensor
    landmarks: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> RawBatch:
        """The same batch on another device (asynchronous where memory is pinned)."""
        return RawBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)})

    def chunks(self, count: int) -> list[RawBatch]:
        """Cut into ``count`` equal batches in order (gradient accumulation)."""
        assert len(self) % count == 0, (len(self), count)
        parts = {f.name: getattr(self, f.name).chunk(count) for f in dataclasses.fields(self)}
        return [RawBatch(**{name: values[i] for name, values in parts.items()}) for i in range(count)]


class Reader(Protocol):
    """One split of a prepared dataset."""

    classes: tuple[str, ...]
    keys: Sequence[str]
    """Key of every sample, by position."""
    labels: Tensor
    """(N,) int64, by position."""
    people: Tensor
    """(N,) int64, by position: number of the person shown, -1 = unknown."""

    def train_steps(self, *, seed: int, epoch: int, rank: int, world_size: int, batch_size: int, start_step: int = 0) -> Iterator[RawBatch]:
        """This rank's share, ``batch_size // world_size`` samples, of every global batch from ``start_step`` on.

        Every rank yields exactly ``len(self.keys) // batch_size`` batches minus ``start_step``.
        """
        ...

    def eval_batches(self, *, rank: int, world_size: int, batch_size: int) -> Iterator[RawBatch]:
        """This rank's share of the split, each sample on exactly one rank, in batches of at most ``batch_size``."""
        ...


def key_hash(key: str) -> int:
    """A signed 64-bit number that stands for a sample in keyed randomness: blake2b of its key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
