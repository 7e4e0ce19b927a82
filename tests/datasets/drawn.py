"""Drawn faces to fill generated downloads with: the picture and landmarks of the synthetic dataset, by expression."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.datasets.synthetic import SyntheticFaces


class Drawn(NamedTuple):
    image: npt.NDArray[np.uint8]
    """(size, size, 3)."""
    landmarks: npt.NDArray[np.float64]
    """(68, 2) in its pixels."""


@lru_cache(maxsize=4)
def _source(size: int) -> SyntheticFaces:
    return SyntheticFaces(SyntheticFaces.Options(size=size, train_identities=64), raw=None)


def draw_face(expression: str, number: int, *, size: int = 64) -> Drawn:
    """The ``number``-th face of an expression; any number, always the same face."""
    source = _source(size)
    # Any seven items that start at a multiple of seven show every expression once.
    seven = (source.item("train", 7 * number + i) for i in range(7))
    face = source.read(next(item for item in seven if source.classes[item.label] == expression))
    assert face.landmarks is not None
    return Drawn(face.image, face.landmarks)
