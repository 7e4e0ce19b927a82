"""Downloads of AffectNet, generated: both layouts to the name, filled with drawn faces.

As a program, ``python tests/datasets/affectnet_tree.py OUT --layout npy --train 20000 --test 350`` writes a large one from a few faces.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bench.dataset import EXPRESSIONS

if __package__:
    from .drawn import Drawn, draw_face
else:  # run as a program: its folder is on the path, and no package
    from drawn import Drawn, draw_face  # type: ignore[import-not-found, no-redef]

ORIGINAL = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt", "none", "uncertain", "no-face")
PUBLISHED = (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750, 33088, 11645, 82415)
HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
SMALL = {"train": dict.fromkeys(range(8), 4), "test": dict.fromkeys(range(8), 2)}
SMALL_CSV = {"train": {**SMALL["train"], 8: 2, 9: 1, 10: 3}, "test": {**SMALL["test"], 8: 1, 9: 1, 10: 1}}


class Truth(NamedTuple):
    """What was written about a picture."""

    split: str
    original: int
    landmarks: npt.NDArray[np.float64]
    """(68, 2), in pixels of the face crop."""
    valence: float
    arousal: float
    box: tuple[int, int, int, int]
    """x, y, width, height in the picture file."""


def make_affectnet(
    root: Path,
    layout: str = "npy",
    counts: Mapping[str, Mapping[int, int]] | None = None,
    seed: int = 0,
    *,
    size: int = 64,
    pool: int = 200,
) -> dict[str, Truth]:
    """Write a download; source -> what is true of it. Every picture is another one: beyond ``pool`` faces, a mark differs.

    Args:
        root: folder to write.
        layout: ``npy`` or ``csv``.
        counts: split -> original label -> number of pictures.
        seed: another seed is other people.
        size: side of a face in pixels; 224 in the real release.
        pool: different faces drawn.
    """
    truths: dict[str, Truth] = {}
    for split, wanted in (counts or (SMALL if layout == "npy" else SMALL_CSV)).items():
        labels = [label for label, count in wanted.items() for _ in range(count)]
        rng = np.random.default_rng([seed, len(split)])
        rng.shuffle(labels)
        write = _Npy(root, split) if layout == "npy" else _Csv(root, split)
        for number, label in enumerate(labels):
            face = _face(label, number, split, seed, size, pool)
            valence, arousal = (round(float(v), 6) for v in rng.uniform(-1, 1, 2))
            source, box = write.add(number, face, label, valence, arousal)
            truths[source] = Truth(split, label, face.landmarks, valence, arousal, box)
        write.close()
    return truths


def _face(label: int, number: int, split: str, seed: int, size: int, pool: int) -> Drawn:
    expression = ORIGINAL[label] if ORIGINAL[label] in EXPRESSIONS else "neutral"
    key = (expression, number % pool + 1000 * (split == "test") + 10_000 * seed, size)
    if key not in _DRAWN:
        _DRAWN[key] = draw_face(key[0], key[1], size=size)
    image = _DRAWN[key].image.copy()
    # Colours that a JPEG keeps apart: three digits of the number in base 16.
    image[:8, :8] = [number // 16**place % 16 * 16 for place in range(3)]
    image[:8, -8:] = [label * 20, number // 16**3 % 16 * 16, 255 * (split == "test")]
    return Drawn(image, _DRAWN[key].landmarks)


_DRAWN: dict[tuple[str, int, int], Drawn] = {}


class _Npy:
    def __init__(self, root: Path, split: str) -> None:
        self.folder = root / ("train_set" if split == "train" else "val_set")
        for part in ("images", "annotations"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def add(self, number: int, face: Drawn, label: int, valence: float, arousal: float) -> tuple[str, tuple[int, int, int, int]]:
        path = self.folder / "images" / f"{number}.jpg"
        path.write_bytes(_jpeg(face.image))
        # As released: single values as text without dimension, landmarks as 136 numbers.
        values = {"exp": np.array(str(label)), "val": np.array(str(valence)), "aro": np.array(str(arousal))}
        for kind, value in {**values, "lnd": face.landmarks.reshape(-1)}.items():
            np.save(self.folder / "annotations" / f"{number}_{kind}.npy", value)
        height, width = face.image.shape[:2]
        return f"{self.folder.name}/images/{path.name}", (0, 0, width, height)

    def close(self) -> None:
        pass


class _Csv:
    def __init__(self, root: Path, split: str) -> None:
        self.images = root / "Manually_Annotated_Images"
        self.images.mkdir(parents=True, exist_ok=True)
        self.split = split
        self.file = (root / ("training.csv" if split == "train" else "validation.csv")).open("w", encoding="utf-8", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(HEADER.split(","))

    def add(self, number: int, face: Drawn, label: int, valence: float, arousal: float) -> tuple[str, tuple[int, int, int, int]]:
        height, width = face.image.shape[:2]
        x, y = 5 + number % 17, 3 + number % 11
        scene = np.full((y + height + 9, x + width + 6, 3), 90 + number % 60, np.uint8)
        scene[y : y + height, x : x + width] = face.image
        name = f"{number % 1300 + 1}/{hashlib.sha256(f'{self.split}{number}'.encode()).hexdigest()[:56]}.jpg"
        (self.images / name).parent.mkdir(exist_ok=True)
        (self.images / name).write_bytes(_jpeg(scene))
        points = face.landmarks + np.array([x, y])
        cells = [name, x, y, width, height, ";".join(f"{v:.4f}" for v in points.reshape(-1)), label, valence, arousal]
        if label > 7:  # nothing is known about these
            cells[7:] = [-2, -2]
        self.writer.writerow(cells)
        return f"{self.images.name}/{name}", (x, y, width, height)

    def close(self) -> None:
        self.file.close()


def _jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def spread(total: int, layout: str, *, even: bool) -> dict[int, int]:
    """Labels of ``total`` pictures: as in the published training split, or as many of each."""
    shares = [1 if even else count for count in PUBLISHED[: 8 if layout == "npy" else 11]]
    counts = {label: max(1, total * share // sum(shares)) for label, share in enumerate(shares)}
    counts[1] += max(0, total - sum(counts.values()))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=("npy", "csv"), default="npy")
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=80)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pool", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    numbers = {"train": spread(given.train, given.layout, even=False), "test": spread(given.test, given.layout, even=True)}
    make_affectnet(given.out, given.layout, numbers, given.seed, size=given.size, pool=max(1, given.pool // 7))
