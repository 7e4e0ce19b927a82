"""Pictures in, square pictures out: decode whatever a camera or a download script left, letterbox, encode.

Coordinates everywhere: integers lie at pixel centres (the convention of dlib, iBUG and OpenCV landmarks), so a picture of width w spans
x from -0.5 to w - 0.5.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from bench.dataset import BadPictureError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before their pixels are unpacked: a few kilobytes can ask for gigabytes."""


_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


class Decoded(NamedTuple):
    """A picture the right way up."""

    image: npt.NDArray[np.uint8]
    """(height, width, 3), RGB."""
    orientation: int
    """The EXIF orientation, 1 to 8, of the file; already applied to ``image``."""


def decode_picture(data: bytes) -> Decoded:
    """Decode the bytes of a picture file into upright 8-bit RGB.

    EXIF orientation is applied. Grey, palette, CMYK and YCbCr become RGB; 16-bit grey keeps its upper 8 bits, and is refused where it looks
    like 12-bit data, of which nearly nothing would be left; transparent pixels are laid
    on black; of an animation the first frame is taken. Colour profiles are not applied.

    Raises:
        BadPictureError: the bytes are empty, no picture, cut short, damaged, larger than `MAX_PIXELS`, or of floating-point pixels.
    """
    if not data:
        raise BadPictureError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's size and metadata warnings; the size is judged below
            with Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise BadPictureError(f"{picture.width} x {picture.height} pixels; at most {MAX_PIXELS} are unpacked")
                picture.load()
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
                # Both turning and converting copy, also where there is nothing to do.
                upright = picture if orientation not in range(2, 9) else ImageOps.exif_transpose(picture)
                image = np.asarray(upright if upright.mode == "RGB" and not upright.has_transparency_data else _to_rgb(upright))
    except (BadPictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
            raise BadPictureError("a HEIC picture, as telephones make them, which Pillow cannot read: convert it to JPEG or PNG") from None
        raise BadPictureError("not a picture in any format Pillow knows") from None
    except Image.DecompressionBombError:
        raise BadPictureError(f"more than the {MAX_PIXELS} pixels that are unpacked") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything, RuntimeError included
        raise BadPictureError(f"damaged: {error or type(error).__name__}") from error
    return Decoded(image, orientation if orientation in range(2, 9) else 1)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadPictureError("floating-point pixels, whose range is unknown; convert the file to 8 bits")
    if picture.mode.startswith("I"):  # 16-bit grey: "I;16" and kin, or "I" from some formats
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadPictureError("grey values beyond 16 bits; convert the file to 8 bits")
        if 0 < values.max() < 1 << 12:
            raise BadPictureError(
                f"a 16-bit file with values up to {values.max()} only, as data of 12 bits or fewer have: it would be almost black; "
                f"convert it to 8 bits"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return picture.convert("RGB")


def orient_landmarks(landmarks: npt.NDArray[np.float64], *, orientation: int, width: int, height: int) -> npt.NDArray[np.float64]:
    """Carry (N, 2) points of the stored pixels over to the upright picture.

    Args:
        landmarks: x and y in the file's stored pixel grid, before the EXIF orientation.
        orientation: EXIF orientation, 1 to 8 (CIPA DC-008, tag 0x0112).
        width: of the *upright* picture.
        height: of the *upright* picture.
    """
    x, y = landmarks[:, 0], landmarks[:, 1]
    right, bottom = width - 1, height - 1
    turned = {
        1: (x, y),
        2: (right - x, y),
        3: (right - x, bottom - y),
        4: (x, bottom - y),
        5: (y, x),
        6: (right - y, x),
        7: (right - y, bottom - x),
        8: (y, bottom - x),
    }
    return np.stack(turned[orientation], axis=1)


def landmarks_touch(landmarks: npt.NDArray[np.float64], *, width: int, height: int) -> bool:
    """Whether any of (N, 2) landmarks lies inside a picture of this size in pixels."""
    x, y = landmarks[:, 0], landmarks[:, 1]
    return bool(((x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)).any())


def letterbox(
    image: npt.NDArray[np.uint8], landmarks: npt.NDArray[np.float64] | None, *, size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64] | None]:
    """Scale the longer side to ``size`` with an antialiasing filter and pad to a square with black, centred.

    Args:
        image: (height, width, 3), RGB.
        landmarks: (N, 2) in pixels of ``image``, or None.
        size: side of the result in pixels.

    Returns:
        The picture, (size, size, 3), and the landmarks in its pixels. A picture that is size x size already comes back unchanged.
    """
    height, width = image.shape[:2]
    scale = size / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (size - new_width) // 2, (size - new_height) // 2
    if (width, height) == (size, size):
        return image, landmarks
    square = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS))
    if (new_width, new_height) != (size, size):
        scaled, square = square, np.zeros((size, size, 3), np.uint8)
        square[top : top + new_height, left : left + new_width] = scaled
    if landmarks is not None:
        # The scale of each axis is that of the rounded side, so that the edges -0.5 and w - 0.5 map exactly.
        ratio = np.array([new_width / width, new_height / height])
        landmarks = (landmarks + 0.5) * ratio - 0.5 + np.array([left, top])
    return square, landmarks


def encode_jpeg(image: npt.NDArray[np.uint8], *, quality: int) -> bytes:
    """Encode (height, width, 3) RGB as a baseline JPEG without chroma subsampling (4:4:4): colour edges stay where they are."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
