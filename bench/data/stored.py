"""Single samples of a prepared dataset, read without torch: for sheets, pages and checks of landmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bench.data.index import Member, Shard


class StoredSample(NamedTuple):
    """A sample of a shard, unpacked."""

    key: str
    image: Image.Image
    landmarks: npt.NDArray[np.float64] | None
    source: str


def read_sample(folder: Path, shard: Shard, member: Member) -> StoredSample:
    """Read a sample of a prepared dataset.

    Raises:
        ValueError: the sample cannot be read; the message says how to check the dataset.
    """
    where = f"{folder / shard.name}, sample {member.key}"
    with (folder / shard.name).open("rb") as file:
        file.seek(member.jpg_offset)
        jpg = file.read(member.jpg_bytes)
        file.seek(member.json_offset)
        note = file.read(member.json_bytes)
    try:
        with Image.open(io.BytesIO(jpg), formats=["JPEG"]) as picture:
            image = picture.convert("RGB")
        annotation = json.loads(note)
        points = annotation["landmarks"]
        return StoredSample(
            member.key, image, None if points is None else np.asarray(points, np.float64).reshape(68, 2), annotation["source"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} cannot be read: {error}. Check the whole: bench data verify {folder}") from error
