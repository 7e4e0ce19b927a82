"""``bench data landmarks``: how far two sources of landmarks agree on the pictures of a prepared dataset.

The measure is the normalised mean error of 300-W (Sagonas et al., "300 Faces in-the-Wild Challenge", ICCV workshops 2013): the mean
distance of corresponding points over the distance of the outer corners of the eyes, those of the first source.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from bench.data.index import Index, Member, Shard, load_index
from bench.prepare.landmarks import WEIGHTS, Landmarker, describe_source, open_landmarker
from bench.registry import did_you_mean
from bench.reporting.pictures.sheet import StoredSample, read_sample

Points = npt.NDArray[np.float64]

STORED = "stored"
"""The source that is the shards themselves."""
ALL_SPLITS = "all"
PARTS: Mapping[str, range] = {
    "jaw": range(17),
    "brows": range(17, 27),
    "nose": range(27, 36),
    "eyes": range(36, 48),
    "mouth": range(48, 68),
}
"""Parts of a face -> their points in iBUG's order of 68."""
OUTER_EYE_CORNERS = (36, 45)

_GROUP = 32
_COLUMNS = 6
_CAPTION = 34
_HEADING = 24
_GAP = 4
_COLORS = ((60, 255, 60), (255, 70, 40))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One face as two sources see it."""

    split: str
    source: str
    """The picture's name in the raw folder."""
    shard: Shard
    member: Member
    first: Points | None
    """(68, 2) in pixels of the stored picture; None where the source found no face."""
    second: Points | None
    errors: npt.NDArray[np.float64] | None
    """(68,) normalised distances; None where a source is missing, or the eyes of the first have no distance."""

    @property
    def error(self) -> float | None:
        """The normalised mean error of this face."""
        return None if self.errors is None else float(self.errors.mean())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What two sources say about a sample of a dataset."""

    sources: tuple[str, str]
    faces: tuple[Compared, ...]
    """The worst first; then those without an error, by name."""

    @property
    def errors(self) -> npt.NDArray[np.float64]:
        """(n, 68) of the n faces that can be compared, the worst face first."""
        return np.array([face.errors for face in self.faces if face.errors is not None], np.float64).reshape(-1, 68)

    @property
    def missing(self) -> tuple[int, int]:
        """In how many faces each source found none."""
        return sum(face.first is None for face in self.faces), sum(face.second is None for face in self.faces)

    @property
    def incomparable(self) -> int:
        """Faces that both sources found, but where the first puts both eyes into one place."""
        return sum(face.first is not None and face.second is not None and face.errors is None for face in self.faces)

    def summary(self) -> dict[str, float]:
        """Mean, median and 90th percentile over faces, then the mean of each face part; empty where no face can be compared."""
        errors = self.errors
        if not len(errors):
            return {}
        per_face = errors.mean(axis=1)
        whole = {"mean": per_face.mean(), "median": np.median(per_face), "90th percentile": np.percentile(per_face, 90)}
        parts = {part: errors[:, list(points)].mean() for part, points in PARTS.items()}
        return {name: float(value) for name, value in {**whole, **parts}.items()}


def normalised_errors(first: Points, second: Points) -> npt.NDArray[np.float64] | None:
    """Distance of each point of a face, over the distance of the outer eye corners of the first source.

    Args:
        first: (68, 2), pixels.
        second: (68, 2), pixels of the same picture.

    Returns:
        (68,), or None where both corners are the same place.
    """
    left, right = first[list(OUTER_EYE_CORNERS)]
    scale = float(np.linalg.norm(left - right))
    return np.linalg.norm(first - second, axis=1) / scale if scale > 0 else None


def draw_sample(index: Index, *, split: str, count: int) -> list[tuple[str, Shard, Member]]:
    """Choose samples by hash of split and key: the same ones every time, and those of a smaller sample are among those of a larger one.

    Args:
        index: of the prepared dataset.
        split: one of its splits, or `ALL_SPLITS`.
        count: how many; all, if there are fewer.

    Raises:
        ValueError: no such split.
    """
    if split not in (*index.splits, ALL_SPLITS):
        known = (*index.splits, ALL_SPLITS)
        raise ValueError(f"--split {split}: choose one of: {', '.join(known)}.{did_you_mean(split, known)}")
    located = [
        (name, shard, member)
        for name in (index.splits if split == ALL_SPLITS else [split])
        for shard in index.splits[name].shards
        for member in shard.members
    ]
    return sorted(located, key=lambda entry: hashlib.sha256(f"{entry[0]}/{entry[2].key}".encode()).digest())[:count]


def check_landmarks(
    folder: Path,
    *,
    first: str,
    second: str,
    weights: Path | None = None,
    split: str = "test",
    samples: int = 200,
    on_progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Compare two sources of landmarks on the stored pictures. A network searches the face itself; it is told no box.

    Args:
        folder: a prepared dataset.
        first: ``stored`` or a key of `WEIGHTS`; its eyes give the unit.
        second: the other one.
        weights: see `describe_source`.
        split: a split, or `ALL_SPLITS`.
        samples: how many pictures, at most.
        on_progress: called with (done, total).

    Raises:
        FileNotFoundError: no prepared dataset.
        ValueError: unknown source or split, twice the same source, a source that cannot be used here, or a damaged sample.
    """
    known = (STORED, *WEIGHTS)
    for source in (first, second):
        if source not in known:
            raise ValueError(f"unknown source of landmarks {source!r}: choose one of: {', '.join(known)}.{did_you_mean(source, known)}")
    if first == second:
        raise ValueError(f"both sources are {first!r}: nothing to compare. Choose two of {', '.join(known)}")
    index = load_index(folder)
    chosen = draw_sample(index, split=split, count=samples)
    for source in (first, second):
        if source != STORED:
            describe_source(source, weights=weights)
    landmarkers = [None if source == STORED else open_landmarker(source, weights=weights) for source in (first, second)]
    faces: list[Compared] = []
    for start in range(0, len(chosen), _GROUP):
        group = chosen[start : start + _GROUP]
        read = [read_sample(folder, shard, member) for _, shard, member in group]
        points = [_points(landmarker, read) for landmarker in landmarkers]
        faces += [
            _compare(name, shard, member, sample.source, first_points, second_points)
            for (name, shard, member), sample, first_points, second_points in zip(group, read, *points, strict=True)
        ]
        if on_progress:
            on_progress(len(faces), len(chosen))
    return Agreement(sources=(first, second), faces=tuple(worst_first(faces)))


def worst_first(faces: Iterable[Compared]) -> list[Compared]:
    """By falling error; those without one last; by name among equals."""
    return sorted(faces, key=lambda face: (-face.error if face.error is not None else 1.0, face.split, face.source))


def _points(landmarker: Landmarker | None, samples: Sequence[StoredSample]) -> list[Points | None]:
    if landmarker is None:
        return [sample.landmarks for sample in samples]
    return landmarker.find([np.asarray(sample.image) for sample in samples], [None] * len(samples))


def _compare(split: str, shard: Shard, member: Member, source: str, first: Points | None, second: Points | None) -> Compared:
    errors = None if first is None or second is None else normalised_errors(first, second)
    return Compared(split=split, source=source, shard=shard, member=member, first=first, second=second, errors=errors)


def draw_agreement(folder: Path, agreement: Agreement, *, faces: int = 24, cell: int = 224) -> Image.Image:
    """Draw the faces that agree worst, with both sets of points: green the first source, red the second.

    Faces that only one source found come last and take a quarter of the places, or what the others leave.

    Args:
        folder: the prepared dataset.
        agreement: what `check_landmarks` found there.
        faces: how many pictures, at most.
        cell: side of a drawn picture in pixels.

    Returns:
        An RGB picture.
    """
    compared = [face for face in agreement.faces if face.errors is not None]
    alone = [face for face in agreement.faces if (face.first is None) != (face.second is None)]
    places = max(faces - len(compared), min(len(alone), faces // 4))
    shown = compared[: faces - min(places, len(alone))] + alone[:places]
    rows = max(1, -(-len(shown) // _COLUMNS))
    font = ImageFont.load_default(13)
    pitch = cell + _GAP
    sheet = Image.new("RGB", (_COLUMNS * pitch + _GAP, _HEADING + rows * (pitch + _CAPTION)), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    names = [f"{source} ({color})" for source, color in zip(agreement.sources, ("green", "red"), strict=True)]
    draw.text(
        (6, 4), f"{folder.resolve().name}: {' and '.join(names)}, the worst {len(shown)} of {len(agreement.faces)} faces", 0, font=font
    )
    for number, face in enumerate(shown):
        left, top = _GAP + number % _COLUMNS * pitch, _HEADING + number // _COLUMNS * (pitch + _CAPTION)
        image = read_sample(folder, face.shard, face.member).image
        sheet.paste(_marked(image, (face.first, face.second), cell=cell), (left, top))
        words = f"{100 * face.error:.1f} %" if face.error is not None else f"none by {agreement.sources[face.first is not None]}"
        caption = f"{words}\n{_shortened(f'{face.split}: {Path(face.source).name}', font, cell)}"
        draw.multiline_text((left, top + cell + 1), caption, 0, font=font, spacing=1)
    return sheet


def _marked(image: Image.Image, points: Iterable[Points | None], *, cell: int) -> Image.Image:
    picture = image.resize((cell, cell), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for places, color in zip(points, _COLORS, strict=True):
        if places is not None:
            for x, y in (places + 0.5) * (cell / image.width) - 0.5:
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=color)
    return picture


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    short = text
    while font.getlength(short) > width and len(text) > 1:
        text = text[:-1]
        short = f"{text}..."
    return short
