"""Turning and scaling a face so that its eyes, nose and mouth lie where they lie in every other picture.

Coordinates as everywhere: integers lie at pixel centres (`bench.prepare.pictures`). Scaling a picture by s therefore maps a coordinate p
to (p + 0.5) * s - 0.5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

TEMPLATE_NAME = "face.evoLVe, 5 points, 112 x 112"
TEMPLATE_SIDE = 112
TEMPLATE: npt.NDArray[np.float64] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where the five points lie in a picture of 112 x 112: left eye, right eye, tip of the nose, left and right corner of the mouth, as seen
in the picture. The reference of face.evoLVe and ArcFace (Deng et al., CVPR 2019)."""
TEMPLATE.flags.writeable = False

_LANCZOS_REACH = 3  # pixels of the result
_BICUBIC_REACH = 2


class Aligned(NamedTuple):
    """A face brought onto the template."""

    image: npt.NDArray[np.uint8]
    """(size, size, 3), RGB; black where the original ends."""
    matrix: npt.NDArray[np.float64]
    """(2, 3): maps points of the original to points of ``image``; see `carry_over`."""


def similarity_from_points(source: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rotation, scale and shift that bring points closest to others, in the least squares sense; never a mirror image.

    The minimum of Umeyama, IEEE TPAMI 1991, equation 1. In the plane it needs no singular values: with points as complex numbers
    about their means, rotation and scale are the one factor sum(conj(source) * target) / sum(|source|^2).

    Args:
        source: (N, 2), x and y, N at least 2.
        target: (N, 2), where they should go.

    Returns:
        (2, 3): ``target`` is about ``source @ matrix[:, :2].T + matrix[:, 2]``.

    Raises:
        ValueError: other shapes, a coordinate that is not finite, or points that fix no rotation, because they all coincide or
            because every rotation fits equally badly.
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise ValueError(f"two lists of N x 2 coordinates are needed, N at least 2, not {source.shape} and {target.shape}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("a coordinate is not finite")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    away, wanted = source - source_mean, target - target_mean
    spread = float((away**2).sum())
    along = float((away * wanted).sum())
    across = float((away[:, 0] * wanted[:, 1] - away[:, 1] * wanted[:, 0]).sum())
    # Relative to the size of the coordinates: means of equal numbers differ from them by rounding.
    if spread <= (1e-9 * float(np.abs(source).max())) ** 2 or math.hypot(along, across) <= 1e-9 * spread**0.5 * np.linalg.norm(wanted):
        raise ValueError("the points fix no rotation and scale: they coincide, or are a mirror image")
    linear = np.array([[along, -across], [across, along]]) / spread
    return np.column_stack([linear, target_mean - linear @ source_mean])


def carry_over(points: npt.NDArray[np.float64], matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where (N, 2) points of the original lie after a (2, 3) transform."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def template_points(size: int, template: npt.NDArray[np.float64] = TEMPLATE) -> npt.NDArray[np.float64]:
    """Points of a 112 x 112 picture in the pixels of one of size x size."""
    return (template + 0.5) * (size / TEMPLATE_SIDE) - 0.5


def align_face(
    image: npt.NDArray[np.uint8], points: npt.NDArray[np.float64], *, size: int, template: npt.NDArray[np.float64] = TEMPLATE
) -> Aligned:
    """Turn, scale and cut a picture so that its points come closest to those of the template.

    Anti-aliased: a picture that shrinks is first brought to its final scale with Lanczos, then turned with bicubic interpolation; one
    that grows is turned and scaled in one bicubic step. Only the part of the picture that will be seen is touched.

    Args:
        image: (height, width, 3), RGB.
        points: (N, 2) in pixels of ``image``.
        size: side of the result in pixels.
        template: (N, 2), where the points belong in a picture of 112 x 112.

    Raises:
        ValueError: the points fix no similarity; see `similarity_from_points`.
    """
    matrix = similarity_from_points(points, template_points(size, template))
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    black = np.zeros((size, size, 3), np.uint8)

    edges = np.array([[-0.5, -0.5], [size - 0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5]])
    seen = carry_over(edges, _inverse(matrix))
    margin = (_BICUBIC_REACH + _LANCZOS_REACH) / min(scale, 1.0)
    height, width = image.shape[:2]
    left, top = (max(0, math.floor(value - margin)) for value in seen.min(axis=0))
    right, bottom = (min(limit, math.ceil(value + margin) + 1) for limit, value in zip((width, height), seen.max(axis=0), strict=True))
    if left >= right or top >= bottom:
        return Aligned(black, matrix)
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))

    # The part's pixels in the original: x = (x' + 0.5) * step - 0.5 + corner.
    if scale < 1:
        part = part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))), Image.Resampling.LANCZOS)
    step = np.array([(right - left) / part.width, (bottom - top) / part.height])
    corner = np.array([left, top])
    to_result = np.column_stack([matrix[:, :2] * step, carry_over((0.5 * step - 0.5 + corner)[None], matrix)[0]])

    # Pillow counts from pixel corners, where ours are at -0.5, and wants the way back.
    back = _inverse(to_result)
    shift = back[:, 2] + 0.5 - back[:, :2] @ np.array([0.5, 0.5])
    data = (*back[0, :2], shift[0], *back[1, :2], shift[1])
    turned = part.transform((size, size), Image.Transform.AFFINE, tuple(map(float, data)), Image.Resampling.BICUBIC)
    return Aligned(np.asarray(turned), matrix)


def _inverse(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])
