"""Average maps of each class and a few examples, kept with every record: pages are drawn from them without the data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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

if TYPE_CHECKING:  # reading records must not import Accelerate
    from bench.runtime.engine import Engine

SIDE = 32
"""Side of the stored maps, in cells."""
EXAMPLES = 2
"""Number of samples of each class whose own maps are kept: the first of the split."""

_STEPS = 2**16
"""Values in [0, 1] are summed as whole numbers of this many steps. Such sums do not depend on the order of the samples, nor on how batches
and processes share them. Another batch size can still change the last digits of a map before it is summed, and so now and then a
stored byte by one."""

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AverageMaps:
    """The content of ``maps.safetensors``. K classes, E examples; bytes are round(255 * value), values in [0, 1]."""

    map: Bytes
    """(K, SIDE, SIDE): mean over the samples of a class of the map of that class, min-max scaled and enlarged as for CAM-COS."""
    attention: Bytes
    """(K, SIDE, SIDE): the same mean of the attention of the layer that the record names, min-max scaled for each sample."""
    au_map: Bytes
    """(K, SIDE, SIDE): mean AU map of those samples of the class that have one."""
    count: Ints
    """(K,): number of samples behind ``map`` and ``attention``. The maps of a class without samples are zero."""
    example_position: Ints
    """(E,): position in the split of the first `EXAMPLES` samples of each class, class by class."""
    example_map: Bytes
    """(E, SIDE, SIDE)."""
    example_attention: Bytes
    """(E, SIDE, SIDE)."""

    def misfits(self, *, classes: int, examples: int) -> Iterator[tuple[str, str, str]]:
        """The fields that do not fit ``classes`` classes and ``examples`` examples: name, type and shape, expected type and shape."""
        of_class, of_example = ("map", "attention", "au_map"), ("example_map", "example_attention")
        expected: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
            **dict.fromkeys(of_class, (np.uint8, (classes, SIDE, SIDE))),
            **dict.fromkeys(of_example, (np.uint8, (examples, SIDE, SIDE))),
            "count": (np.int64, (classes,)),
            "example_position": (np.int64, (examples,)),
        }
        for name, (kind, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != kind or array.shape != shape:
                yield name, f"{array.dtype} {array.shape}", f"{np.dtype(kind)} {shape}"


class ClassSums:
    """Sums of the maps of each class. They are kept on the device, and adding does not wait for it."""

    def __init__(self, labels: Tensor, *, num_classes: int, device: torch.device) -> None:
        """Start with sums of zero.

        Args:
            labels: (N,) int64, of the whole split, by position.
            num_classes: K.
            device: of the maps.
        """
        self._positions = torch.cat([(labels == label).nonzero().flatten()[:EXAMPLES] for label in range(num_classes)])
        self._slots = torch.full((len(labels),), len(self._positions))  # samples that are no examples share the last slot, which is dropped
        self._slots[self._positions] = torch.arange(len(self._positions))
        self._slots = self._slots.to(device)
        self._sums = torch.zeros(num_classes, SIDE, SIDE, dtype=torch.int64, device=device)
        self._count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._examples = torch.zeros(len(self._positions) + 1, SIDE, SIDE, dtype=torch.int64, device=device)

    def add(self, maps: Tensor, *, positions: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add maps (B, S, S) in [0, 1] of samples at ``positions`` (B,), each sample once. Samples that are not ``valid`` do not count."""
        if valid is None:
            valid = torch.ones_like(labels, dtype=torch.bool)
        steps = (F.adaptive_avg_pool2d(maps.detach()[:, None].float(), SIDE)[:, 0] * _STEPS).round().long()
        steps = steps.masked_fill(~valid[:, None, None], 0)
        self._sums.index_add_(0, labels, steps)
        self._count.index_add_(0, labels, valid.long())
        self._examples.index_add_(0, self._slots[positions], steps)

    def total(self, engine: Engine) -> ClassMeans:
        """Means over the samples of all processes; all processes call this together."""
        sums, count, examples = (engine.sum(part).cpu().numpy() for part in (self._sums, self._count, self._examples[:-1]))
        return ClassMeans(
            means=_bytes(sums / np.maximum(count, 1)[:, None, None]),
            count=count,
            examples=_bytes(examples),
            positions=self._positions.numpy(),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassMeans:
    """The means of `ClassSums`: ``means`` (K, SIDE, SIDE), ``count`` (K,), ``examples`` (E, SIDE, SIDE), ``positions`` (E,)."""

    means: Bytes
    count: Ints
    examples: Bytes
    positions: Ints


def _bytes(steps: npt.NDArray[np.float64] | Ints) -> Bytes:
    return np.rint(steps * (255 / _STEPS)).astype(np.uint8)


def average_maps(maps: ClassMeans, *, attention: ClassMeans, au_map: ClassMeans) -> AverageMaps:
    """The average maps of one cell."""
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
        ValueError: the file is damaged, or is no file of average maps.
    """
    try:
        return AverageMaps(**load(path.read_bytes()))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is not a file of average maps: {error}") from error
