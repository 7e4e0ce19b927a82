from __future__ import annotations

import contextlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image, features

from bench.dataset import BadPictureError
from bench.prepare import pictures
from bench.prepare.pictures import decode_picture, encode_jpeg, letterbox, orient_landmarks


def noise(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 0 * x + 128], axis=2).astype(np.uint8)


def saved(picture, fmt="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def test_rgb_comes_back_as_it_was():
    image = noise()
    assert np.array_equal(decode_picture(saved(Image.fromarray(image))).image, image)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr"])
def test_every_common_mode_becomes_rgb(mode):
    fmt = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = decode_picture(saved(Image.fromarray(gradient(16, 24)).convert(mode), fmt)).image
    assert image.shape == (16, 24, 3)
    assert image.dtype == np.uint8
    assert image[:, -3:].mean() > image[:, :3].mean() + 20  # the gradient is still there, and not inverted


def test_sixteen_bit_grey_keeps_its_upper_bits():
    values = (np.arange(12, dtype=np.uint16).reshape(3, 4) * 0x0F0F).astype(np.uint16)
    image = decode_picture(saved(Image.fromarray(values))).image
    assert np.array_equal(image[..., 0], values >> 8)


def test_transparent_pixels_are_black():
    layer = np.full((4, 4, 4), 200, np.uint8)
    layer[0, 0, 3] = 0
    layer[1, 1, 3] = 255
    image = decode_picture(saved(Image.fromarray(layer, "RGBA"))).image
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[1, 1].tolist() == [200, 200, 200]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_landmarks_follow_the_exif_orientation(orientation):
    stored = np.zeros((6, 10, 3), np.uint8)
    stored[1, 7] = 255  # x = 7, y = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_picture(saved(Image.fromarray(stored), exif=exif))
    assert decoded.orientation == orientation
    height, width = decoded.image.shape[:2]
    moved = orient_landmarks(np.array([[7.0, 1.0]]), orientation=orientation, width=width, height=height)
    bright = np.argwhere(decoded.image[..., 0] == 255)[0][::-1]
    assert moved[0].tolist() == bright.tolist()


def test_an_invalid_orientation_is_taken_as_upright():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert decode_picture(saved(Image.fromarray(noise()), exif=exif)).orientation == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a picture"),
        (saved(Image.fromarray(noise(64, 64)), "JPEG")[:900], "damaged.*truncated"),
        (saved(Image.fromarray(noise(64, 64)))[:900], "damaged"),
        (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "html", "cut jpeg", "cut png", "float"],
)
def test_what_cannot_be_used_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadPictureError, match=reason):
        decode_picture(data)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 599)
    with pytest.raises(BadPictureError, match="30 x 20 pixels"):
        decode_picture(saved(Image.fromarray(noise())))


def test_a_picture_beyond_pillows_own_limit_is_refused():
    png = bytearray(saved(Image.new("L", (1, 1))))
    png[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of the header
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(BadPictureError, match="pixels"):
        decode_picture(bytes(png))


HAS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow before 11.3 reads no AVIF")


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", pytest.param("AVIF", marks=HAS_AVIF)])
def test_damaged_bytes_raise_nothing_but_bad_picture(fmt):
    whole = saved(Image.fromarray(noise(16, 16)), fmt)
    rng = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), 3):
            data[place] = rng.integers(0, 256)
        with contextlib.suppress(BadPictureError):
            assert decode_picture(bytes(data)).image.shape[2] == 3


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (33, 47), (64, 64), (1, 300)])
def test_letterbox_keeps_landmarks_on_the_same_spot(height, width):
    image = gradient(height, width)
    corners = np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]])
    square, moved = letterbox(image, corners, size=64)
    assert square.shape == (64, 64, 3)
    assert moved is not None
    (left, top), (right, bottom) = np.round(moved + 0.5).astype(int)
    assert np.allclose(moved + 0.5, np.round(moved + 0.5))  # picture edges lie on pixel edges
    assert max(right - left, bottom - top) == 64
    assert square[top:bottom, left:right, 2].min() > 0
    outside = square.copy()
    outside[top:bottom, left:right] = 0
    assert outside.max() == 0


def test_letterbox_moves_a_landmark_with_its_bright_spot():
    image = np.zeros((120, 200, 3), np.uint8)
    y, x = np.mgrid[0:120, 0:200]
    image[..., :] = (255 * np.exp(-((x - 130) ** 2 + (y - 40) ** 2) / 50))[..., None].astype(np.uint8)
    square, moved = letterbox(image, np.array([[130.0, 40.0]]), size=80)
    weights = square[..., 0].astype(float)
    rows, columns = np.mgrid[0:80, 0:80]
    centre = [(columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()]
    assert moved is not None
    assert np.allclose(moved[0], centre, atol=0.05)


def test_letterbox_leaves_a_fitting_picture_alone():
    image, points = noise(32, 32), np.array([[3.0, 4.0]])
    square, moved = letterbox(image, points, size=32)
    assert square is image
    assert moved is points


def test_letterbox_antialiases():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    square, _ = letterbox(stripes, None, size=32)
    assert abs(float(square[4:-4, 4:-4].mean()) - 127.5) < 3
    assert square[4:-4, 4:-4].std() < 5


def test_jpeg_is_the_same_every_time_and_not_subsampled():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = (255, 0, 0)
    data = encode_jpeg(image, quality=95)
    assert data == encode_jpeg(image, quality=95)
    back = decode_picture(data).image.astype(int)
    assert abs(back[:, 7, 0]).max() < 30  # with 4:2:0 red would bleed over the edge


def test_data_of_12_bits_in_16_is_refused_and_not_blackened():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(BadPictureError, match="values up to 3000 only, as data of 12 bits or fewer have: it would be almost black"):
        decode_picture(buffer.getvalue())


def test_a_heic_picture_is_told_as_such():
    with pytest.raises(BadPictureError, match=r"a HEIC picture.*convert it to JPEG or PNG"):
        decode_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
