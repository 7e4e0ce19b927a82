"""One path from a picture file to the stored picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from bench.data.index import Index
from bench.dataset import BadPictureError
from bench.prepare.preparation import Preparation, preparation_of, read_face, read_preparation, store_face


def picture(*, orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def index(entry, *, options=None, provenance=None):
    return Index(
        name="faces",
        entry=entry,
        packer="bench.data.pack 3",
        options=options or {},
        classes=("anger",),
        image_size=48,
        license="",
        provenance=provenance or {},
        bad_pictures=(),
        splits={},
    )


def test_landmarks_of_stored_pixels_turn_with_the_picture():
    face = read_face(picture(orientation=6), np.tile([10.0, 5.0], (68, 1)), frame="stored")
    assert face.image.shape == (40, 30, 3)
    assert face.landmarks[0].tolist() == [24.0, 10.0]


def test_landmarks_of_the_upright_picture_stay():
    face = read_face(picture(orientation=6), np.tile([10.0, 35.0], (68, 1)), frame="upright")
    assert face.landmarks[0].tolist() == [10.0, 35.0]


def test_landmarks_beside_the_picture_make_it_a_bad_one():
    with pytest.raises(BadPictureError, match="all landmarks lie outside the 40 x 30 picture"):
        read_face(picture(), np.full((68, 2), 99.0), frame="stored")


def test_a_stored_face_is_a_square_jpeg_of_the_size():
    stored = store_face(read_face(picture(), None, frame="stored"), size=48, quality=60)
    opened = Image.open(io.BytesIO(stored.jpg))
    assert (opened.format, opened.size) == ("JPEG", (48, 48))


def test_an_index_tells_size_quality_and_frame():
    preparation = preparation_of(index("folder", options={"size": 48, "quality": 60, "landmark_frame": "upright"}))
    assert preparation == Preparation(entry="folder", size=48, quality=60, landmarks="none", landmark_frame="upright")


@pytest.mark.parametrize(
    ("entry", "options", "provenance", "needs"),
    [
        ("rafdb", {}, {"alignment": "a template"}, "five points"),
        ("rafdb", {"source": "aligned"}, {"alignment": None}, ""),
        ("affectnet", {}, {"distribution": "csv"}, "face box"),
        ("affectnet", {}, {"distribution": "npy"}, ""),
        ("gone", {}, {}, "not installed"),
        ("folder", {"renamed": 1}, {}, "options have changed"),
    ],
)
def test_what_a_file_alone_does_not_bring_is_named(entry, options, provenance, needs):
    preparation = preparation_of(index(entry, options=options, provenance=provenance))
    assert needs in preparation.needs
    assert bool(preparation.needs) == bool(needs)


def test_a_preparation_comes_back_from_its_json():
    preparation = Preparation(entry="folder", size=48, quality=60)
    assert read_preparation({"preparation": preparation.model_dump(mode="json")}, path=Path("trained.json")) == preparation


def test_a_damaged_preparation_is_named_with_its_file_and_key():
    with pytest.raises(ValueError, match=r"trained\.json is damaged: preparation\.size"):
        read_preparation({"preparation": {"entry": "folder", "size": "large", "quality": 95}}, path=Path("trained.json"))
