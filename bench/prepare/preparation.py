"""How a picture file becomes the stored square picture: the one path of ``bench data prepare`` and of every later look at a file.

A training keeps its `Preparation`, so that a picture of its own can be brought to the same pixels without the prepared data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from bench.data.index import Index
from bench.dataset import DATASETS, BadPictureError, DatasetOptions, Face, Frame, Reading
from bench.prepare.pictures import decode_picture, encode_jpeg, landmarks_touch, letterbox, orient_landmarks

Points = npt.NDArray[np.float64]


class Stored(NamedTuple):
    """A picture as a shard keeps it."""

    jpg: bytes
    landmarks: Points | None
    """(68, 2) in pixels of the stored picture, rounded as in the shard."""


class Preparation(BaseModel):
    """How the pictures of a prepared dataset came about, as far as it decides on their pixels. JSON-able."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    entry: str
    """The registered dataset that read them."""
    size: int
    """Side, in pixels, of the stored pictures."""
    quality: int
    """JPEG quality of the stored pictures."""
    landmarks: str = "none"
    """Where their 68 landmarks came from."""
    landmark_frame: Frame = "stored"
    """Pixels that the landmarks of a file count; see `Reading.landmark_frame`."""
    aligned: bool = False
    """See `Reading.aligned`."""
    needs: str = ""
    """See `Reading.needs`."""


DEFAULT = Preparation(entry="", size=DatasetOptions().size, quality=DatasetOptions().quality)
"""What is assumed where nothing is known: the default options of a dataset, and the whole picture."""


def preparation_of(index: Index) -> Preparation:
    """How the pictures of a prepared dataset were prepared, from its index."""
    reading = _reading(index)
    return Preparation(
        entry=index.entry,
        size=index.image_size,
        quality=index.options.get("quality", DEFAULT.quality),
        landmarks=index.options.get("landmarks", DEFAULT.landmarks),
        landmark_frame=reading.landmark_frame,
        aligned=reading.aligned,
        needs=reading.needs,
    )


def _reading(index: Index) -> Reading:
    if index.entry not in DATASETS:
        return Reading(needs=f"the code of the dataset {index.entry!r}, which is not installed")
    target = DATASETS.get(index.entry).target
    try:
        options = target.Options.model_validate(index.options)
    except ValidationError:
        return Reading(needs=f"the code of the dataset {index.entry!r} of {index.packer}: its options have changed since")
    return target.reading(options, index.provenance)


def read_preparation(facts: Mapping[str, Any], *, path: Path) -> Preparation | None:
    """What ``trained.json`` says under ``preparation``; None where it was written before trainings kept it.

    Raises:
        ValueError: the entry is damaged; the message names ``path`` and the key.
    """
    if "preparation" not in facts:
        return None
    try:
        return Preparation.model_validate(facts["preparation"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("preparation", *first["loc"])))
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}; remove that entry, and give bench explain --data FOLDER") from error


def read_face(data: bytes, landmarks: Points | None, *, frame: Frame) -> Face:
    """Decode a picture file, and turn its landmarks along with it.

    Args:
        data: bytes of the file.
        landmarks: (68, 2) in pixels, or None.
        frame: what these pixels are; see `Reading.landmark_frame`.

    Raises:
        BadPictureError: no picture, damaged, or all landmarks lie beside it.
    """
    image, orientation = decode_picture(data)
    height, width = image.shape[:2]
    if landmarks is not None:
        if frame == "stored":
            landmarks = orient_landmarks(landmarks, orientation=orientation, width=width, height=height)
        if not landmarks_touch(landmarks, width=width, height=height):
            raise BadPictureError(f"all landmarks lie outside the {width} x {height} picture; are they in pixels of this very file?")
    return Face(image=image, landmarks=landmarks)


def store_face(face: Face, *, size: int, quality: int) -> Stored:
    """Scale and pad a face to a square, and encode it.

    Args:
        face: picture and landmarks as read.
        size: side of the square in pixels.
        quality: of the JPEG encoding, 1 to 100.
    """
    image, landmarks = letterbox(face.image, face.landmarks, size=size)
    # A thousandth of a pixel: far below what anybody can place, and short.
    return Stored(encode_jpeg(image, quality=quality), None if landmarks is None else np.round(landmarks, 3))
