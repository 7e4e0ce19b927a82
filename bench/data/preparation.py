"""From a picture as it is read to the square that is stored: one path for all who need it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from bench.data.index import Index
from bench.data.pictures import encode_jpeg, letterbox
from bench.dataset import DatasetOptions

_DEFAULTS = DatasetOptions()


class Preparation(BaseModel):
    """How the pictures of a prepared dataset became what is stored. A training keeps it: other pictures can be brought there too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int = _DEFAULTS.size
    """Side of the stored square, in pixels."""
    quality: int = _DEFAULTS.quality
    """JPEG quality of the stored picture."""
    alignment: str | None = None
    """Template that faces were turned and scaled to by five annotated points; None: the whole picture is kept."""
    landmark_frame: Literal["stored", "upright"] = "stored"
    """What coordinates in a user's landmarks.csv count: pixels as stored in the file, or after its EXIF orientation."""

    @classmethod
    def of(cls, index: Index) -> Preparation:
        """What the index of a prepared dataset says."""
        facts: dict[str, Any] = {"size": index.image_size, "alignment": index.provenance.get("alignment")}
        facts |= {name: index.options[name] for name in ("quality", "landmark_frame") if name in index.options}
        return cls(**facts)


class Stored(NamedTuple):
    """A picture in the form of a shard."""

    jpg: bytes
    landmarks: npt.NDArray[np.float64] | None
    """(68, 2) in pixels of the square, to a thousandth: far below what anybody can place, and short."""


def store_picture(image: npt.NDArray[np.uint8], landmarks: npt.NDArray[np.float64] | None, *, size: int, quality: int) -> Stored:
    """Scale a picture into a square with black borders and encode it.

    Args:
        image: (height, width, 3), RGB, upright.
        landmarks: (68, 2) in pixels of ``image``, or None.
        size: side of the square.
        quality: of the JPEG.
    """
    square, points = letterbox(image, landmarks, size=size)
    return Stored(encode_jpeg(square, quality=quality), None if points is None else np.round(points, 3))
