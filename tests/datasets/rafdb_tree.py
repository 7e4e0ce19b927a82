"""A download in the exact layout of RAF-DB's basic set, filled with drawn faces.

python tests/datasets/rafdb_tree.py OUT --per-class 20
python tests/datasets/rafdb_tree.py OUT --full --folds FOLDS     # 15,339 pictures, as many of each class as published; minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bench.prepare.alignment import align_face, carry_over

if __package__:
    from .drawn import draw_face
else:  # run as a script
    from drawn import draw_face

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")  # RAF-DB's 1 to 7
FULL = {"train": (1290, 281, 717, 4772, 1982, 705, 2524), "test": (329, 74, 160, 1185, 478, 162, 680)}
SMALL = {"train": (4, 3, 3, 5, 3, 3, 4), "test": (1, 1, 1, 2, 1, 1, 1)}
DIGITS = {"train": 5, "test": 4}
ALIGNED_SIDE = 224  # of the published folds' pictures

# The class ids of the published folds, in their spelling.
CLASS_IDS = {"Neutral": 0, "Happiness": 1, "Surprise": 2, "Fear": 3, "Anger": 4, "Disgust": 5, "Sadness": 6}


class Original(NamedTuple):
    label: int
    """RAF-DB's, 1 to 7."""
    landmarks: npt.NDArray[np.float64]
    """(68, 2) in the original's pixels."""
    attributes: tuple[int, int, int]
    """Gender, race, age."""

    @property
    def points(self) -> npt.NDArray[np.float64]:
        return five_of(self.landmarks)


def five_of(landmarks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Left eye, right eye, tip of the nose, corners of the mouth, as seen in the picture."""
    return np.stack([landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0), *landmarks[[30, 48, 54]]])


def make_rafdb(root: Path, *, counts: Mapping[str, Sequence[int]] = SMALL, seed: int = 0, aligned: bool = True) -> dict[str, Original]:
    """Write ``root/basic``; the same bytes for the same arguments.

    Args:
        counts: split -> number of pictures per label, in RAF-DB's order.
        aligned: write ``Image/aligned`` too.

    Returns:
        Name in the list -> what was drawn.
    """
    base = root / "basic"
    folders = ["EmoLabel", "Image/original", "Annotation/manual", "Annotation/auto", "Annotation/boundingbox"]
    for folder in folders + ["Image/aligned"] * aligned:
        (base / folder).mkdir(parents=True, exist_ok=True)
    tree: dict[str, Original] = {}
    for at, (split, numbers) in enumerate(counts.items()):
        labels = np.repeat(np.arange(1, 8), numbers)
        np.random.default_rng([seed, at]).shuffle(labels)
        for number, label in enumerate(labels.tolist(), start=1):
            name = f"{split}_{number:0{DIGITS[split]}d}.jpg"
            tree[name] = _write(base, name, label, np.random.default_rng([seed, at, number]), aligned=aligned)
    lines = [f"{name} {original.label}\n" for name, original in tree.items()]
    (base / "EmoLabel/list_patition_label.txt").write_text("".join(lines))
    return tree


def _write(base: Path, name: str, label: int, rng: np.random.Generator, *, aligned: bool) -> Original:
    image, landmarks = _draw(EXPRESSIONS[label - 1], rng)
    original = Original(label, landmarks, (int(rng.integers(3)), int(rng.integers(3)), int(rng.integers(5))))
    stem = name.removesuffix(".jpg")
    Image.fromarray(image).save(base / "Image/original" / name, quality=92)
    if aligned:
        small = align_face(image, original.points, size=100).image
        Image.fromarray(small).save(base / "Image/aligned" / f"{stem}_aligned.jpg", quality=92)
    manual = [f"{x:.6f}\t{y:.6f}" for x, y in original.points] + [str(value) for value in original.attributes]
    (base / "Annotation/manual" / f"{stem}_manu_attri.txt").write_text("\n".join(manual) + "\n")
    auto = [f"{x:.6f}\t{y:.6f}" for x, y in landmarks[np.linspace(0, 67, 37).round().astype(int)]]
    (base / "Annotation/auto" / f"{stem}_auto_attri.txt").write_text("\n".join(auto) + "\n")
    box = [*landmarks.min(axis=0), *landmarks.max(axis=0)]
    (base / "Annotation/boundingbox" / f"{stem}_boundingbox.txt").write_text(" ".join(f"{value:.6f}" for value in box) + " \n")
    return original


def _draw(expression: str, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """A drawn face, turned and scaled, somewhere in a larger picture."""
    face = draw_face(expression, int(rng.integers(1 << 30)), size=96)
    width, height = (int(side) for side in rng.integers(150, 221, 2))
    angle, scale = np.deg2rad(rng.uniform(-25, 25)), rng.uniform(0.9, 1.3)
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    place = np.array([width, height]) / 2 + rng.uniform(-10, 10, 2)
    matrix = np.column_stack([linear, place - linear @ np.array([47.5, 47.5])])
    # Pillow wants the way back, and counts from pixel corners.
    back = np.linalg.inv(linear)
    shift = 0.5 - back @ (matrix[:, 2] + 0.5)
    data = (*back[0], shift[0], *back[1], shift[1])
    square = Image.fromarray(face.image).convert("RGBA")
    turned = square.transform((width, height), Image.Transform.AFFINE, tuple(map(float, data)), Image.Resampling.BICUBIC)
    scene = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    scene.paste(turned, mask=turned.getchannel("A"))
    return np.asarray(scene), carry_over(face.landmarks, matrix)


def write_folds(
    folder: Path,
    raw: Path,
    tree: Mapping[str, Original],
    *,
    val: Collection[str] | None = None,
    not_found: Collection[str] = (),
    pictures: bool = True,
) -> dict[str, npt.NDArray[np.float64]]:
    """Write folds as published, with ``basic/Image/our_aligned`` below ``raw``.

    Args:
        val: names of train that are val; None: val is the test split, as released.
        not_found: names whose landmarks are inf.
        pictures: write the pictures that the folds name.

    Returns:
        Name in the list -> (68, 2) landmarks in the pixels of the picture that the folds name.
    """
    landmarks: dict[str, npt.NDArray[np.float64]] = {}
    rows: dict[str, str] = {}
    target = raw / "basic/Image/our_aligned"
    if pictures:
        target.mkdir(parents=True, exist_ok=True)
    for name, original in tree.items():
        image = np.asarray(Image.open(raw / "basic/Image/original" / name).convert("RGB"))
        face = align_face(image, original.points, size=ALIGNED_SIDE)
        landmarks[name] = carry_over(original.landmarks, face.matrix)
        if pictures:
            Image.fromarray(face.image).save(target / name, quality=92)
        cells = ["inf"] * 136 if name in not_found else [f"{value:.4f}" for value in landmarks[name].T.ravel()]
        rows[name] = ",".join([fold_id(name), *cells])
    test = [name for name in tree if name.startswith("test")]
    held_out = test if val is None else list(val)
    train = [name for name in tree if name.startswith("train") and name not in set(held_out)]
    for split, names in {"train": train, "valid": held_out, "test": test}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        labels = {name: CLASS_IDS[EXPRESSIONS[tree[name].label - 1].capitalize()] for name in names}
        (folder / split / "image_ids.txt").write_text("".join(f"{fold_id(name)}\n" for name in names))
        (folder / split / "class_labels.txt").write_text("".join(f"{fold_id(name)},{label}\n" for name, label in labels.items()))
        (folder / split / "landmarks.txt").write_text("".join(f"{rows[name]}\n" for name in names))
    (folder / "class_id.yaml").write_text("".join(f"{name}: {number}\n" for name, number in sorted(CLASS_IDS.items())))
    return landmarks


def fold_id(name: str) -> str:
    return f"basic/Image/our_aligned/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="as many pictures of each class as published")
    size.add_argument("--per-class", type=int, default=10, help="pictures for training; a quarter of it for testing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=Path, help="write folds with landmarks too")
    arguments = parser.parse_args()
    few = {"train": (arguments.per_class,) * 7, "test": (max(1, arguments.per_class // 4),) * 7}
    tree = make_rafdb(arguments.out, counts=FULL if arguments.full else few, seed=arguments.seed)
    if arguments.folds:
        write_folds(arguments.folds, arguments.out, tree)


if __name__ == "__main__":
    main()
