"""Average maps of each class, and a few examples: small enough to be kept with every record, for figures without the data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from bench.io import write_bytes_atomic

if TYPE_CHECKING:  # those who only read records need no Accelerate
    from bench.runtime.engine import Engine

SIDE = 32
"""Of the stored maps, in cells."""
EXAMPLES = 2
"""Samples of each class whose own maps are kept: the first of the split."""

_STEPS = 2**16
"""A value in [0, 1] is summed as a whole number of this many steps: sums of whole numbers depend neither on their order, nor on how the
samples were spread over batches and processes. (Another batch size may change a map in its last digits before; that moves a mean by a
step of 65,536, and so a stored byte, one of 255, now and then by one.)"""

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AverageMaps:
    """The content of ``maps.safetensors``. K classes, E examples; bytes are round(255 * value), values in [0, 1]."""

    map: Bytes
    """(K, SIDE, SIDE): mean over the samples of a class of the map of that class, min-max scaled and enlarged as for CAM-COS."""
    attention: Bytes
    """(K, SIDE, SIDE): the same of the attention of the layer that the record names, each sample's min-max scaled."""
    au_map: Bytes
    """(K, SIDE, SIDE): mean AU map of those samples of the class that have one."""
    count: Ints
    """(K,): samples behind ``map`` and ``attention``; of a class that is absent the maps are zero."""
    example_position: Ints
    """(E,): position in the split of the first `EXAMPLES` samples of each class, class by class."""
    example_map: Bytes
    """(E, SIDE, SIDE)."""
    example_attention: Bytes
    """(E, SIDE, SIDE)."""

    def misfits(self, *, classes: int, examples: int) -> Iterator[tuple[str, str, str]]:
        """What is not of ``classes`` classes and ``examples`` examples: field, form it has, form it should have."""
        of_class, of_example = ("map", "attention", "au_map"), ("example_map", "example_attention")
        wanted: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
            **dict.fromkeys(of_class, (np.uint8, (classes, SIDE, SIDE))),
            **dict.fromkeys(of_example, (np.uint8, (examples, SIDE, SIDE))),
            "count": (np.int64, (classes,)),
            "example_position": (np.int64, (examples,)),
        }
        for name, (kind, shape) in wanted.items():
            array = getattr(self, name)
            if array.dtype != kind or array.shape != shape:
                yield name, f"{array.dtype} {array.shape}", f"{np.dtype(kind)} {shape}"


class ClassSums:
    """Maps of one kind, summed per class while they are computed; on the device, without waiting for it."""

    def __init__(self, labels: Tensor, *, num_classes: int, device: torch.device) -> None:
        """Sums of nothing yet.

        Args:
            labels: (N,) int64, those of the whole split, by position.
            num_classes: K.
            device: where the maps will be.
        """
        self._positions = torch.cat([(labels == label).nonzero().flatten()[:EXAMPLES] for label in range(num_classes)])
        self._slots = torch.full((len(labels),), len(self._positions))  # what is no example goes to the last slot, and is dropped
        self._slots[self._positions] = torch.arange(len(self._positions))
        self._slots = self._slots.to(device)
        self._sums = torch.zeros(num_classes, SIDE, SIDE, dtype=torch.int64, device=device)
        self._count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._examples = torch.zeros(len(self._positions) + 1, SIDE, SIDE, dtype=torch.int64, device=device)

    def add(self, maps: Tensor, *, positions: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add maps (B, S, S) in [0, 1] of the samples at ``positions`` (B,); each sample once. Those not ``valid`` (B,) do not count."""
        if valid is None:
            valid = torch.ones_like(labels, dtype=torch.bool)
        steps = (F.adaptive_avg_pool2d(maps.detach()[:, None].float(), SIDE)[:, 0] * _STEPS).round().long()
        steps = steps.masked_fill(~valid[:, None, None], 0)
        self._sums.index_add_(0, labels, steps)
        self._count.index_add_(0, labels, valid.long())
        self._examples.index_add_(0, self._slots[positions], steps)

    def total(self, engine: Engine) -> ClassMeans:
        """Means over the samples of all processes, which all of them must ask for."""
        sums, count, examples = (engine.sum(part).cpu().numpy() for part in (self._sums, self._count, self._examples[:-1]))
        return ClassMeans(
            means=_bytes(sums / np.maximum(count, 1)[:, None, None]),
            count=count,
            examples=_bytes(examples),
            positions=self._positions.numpy(),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassMeans:
    """What `ClassSums` come to."""

    means: Bytes
    """(K, SIDE, SIDE)."""
    count: Ints
    """(K,)."""
    examples: Bytes
    """(E, SIDE, SIDE)."""
    positions: Ints
    """(E,)."""


def _bytes(steps: npt.NDArray[np.float64] | Ints) -> Bytes:
    return np.rint(steps * (255 / _STEPS)).astype(np.uint8)


def average_maps(maps: ClassMeans, *, attention: ClassMeans, au_map: ClassMeans) -> AverageMaps:
    """Put together what belongs to one cell."""
    return AverageMaps(
        map=maps.means,
        attention=attention.means,
        au_map=au_map.means,
        count=maps.count,
        example_position=maps.positions,
        example_map=maps.examples,
        example_attention=attention.examples,
    )


def write_average_maps(path: Path, maps: AverageMaps) -> None:
    """Write one safetensors file, atomically; the same maps give the same bytes."""
    write_bytes_atomic(path, save({field.name: np.ascontiguousarray(getattr(maps, field.name)) for field in dataclasses.fields(maps)}))


def read_average_maps(path: Path) -> AverageMaps:
    """Read what `write_average_maps` wrote.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        found: Mapping[str, npt.NDArray[np.generic]] = load(path.read_bytes())
        return AverageMaps(**found)  # type: ignore[arg-type]
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a file of average maps: {error}") from error
