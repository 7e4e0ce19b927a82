"""Synthetic faces, the embedded default: seven expressions whose evidence lies exactly where their action units are.

Every picture shows a *random subset* of the action units that the codebook lists for its expression, at random intensity, on a
random person in a random pose, light and place; `bench.prepare.synthetic_face` draws it. What names the expression is therefore on
the parts of the face that the AU map marks, and nowhere else, unless ``shortcut`` plants a mark that gives the class away.

Difficult on purpose: weak intensities, resting shapes that resemble expressions (low brows, hanging mouth corners), folds of age, glasses,
beards, fringes, things before the face, and subsets that two expressions share. Nobody should report a number from
here as a result about people; it is for testing, teaching, profiling and sanity checks of methods.

A sample is a pure function of (seed, split, index) and of the options that say how pictures look; the number of samples does not matter.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageDraw
from pydantic import Field

from bench.dataset import DATASETS, EXPRESSIONS, SPLITS, Dataset, Face, Item
from bench.prepare.synthetic_face import FACS, Colour, Identity, View, draw

# What each expression may show: action unit id -> how often, given that nothing excludes it. Each is a subset of the codebook's.
REPERTOIRE: Mapping[str, Mapping[int, float]] = {
    "neutral": {},
    "happiness": {4: 0.65, 8: 0.95, 15: 0.55},
    "surprise": {0: 0.75, 1: 0.8, 3: 0.65, 16: 0.55, 18: 0.5},
    "fear": {0: 0.8, 1: 0.45, 2: 0.65, 3: 0.75, 12: 0.75, 15: 0.5, 16: 0.3, 18: 0.05},
    "anger": {2: 0.9, 3: 0.35, 5: 0.6, 7: 0.35, 11: 0.3, 13: 0.45, 14: 0.4, 15: 0.3, 16: 0.15},
    "disgust": {6: 0.95, 3: 0.05, 19: 0.5, 11: 0.4, 15: 0.45, 16: 0.15},
    "sadness": {0: 0.85, 2: 0.2, 4: 0.25, 10: 0.85, 11: 0.5},
}

# Without one of these an expression would be nobody's guess.
_CORE: Mapping[str, tuple[int, ...]] = {
    "happiness": (8,),
    "surprise": (16, 18),
    "fear": (0, 12),
    "anger": (2,),
    "disgust": (6,),
    "sadness": (0, 10),
}

# Movements of the same muscles in opposite directions, or of which one hides the other.
_EXCLUSIVE = ({16, 18}, {13, 15}, {13, 16}, {14, 15}, {14, 16}, {11, 19}, {11, 16}, {11, 15}, {7, 13}, {7, 14}, {3, 5})

_SKIN: tuple[Colour, ...] = ((250, 221, 196), (238, 195, 158), (222, 172, 125), (188, 132, 88), (142, 92, 58), (96, 62, 42))
_HAIR: tuple[Colour, ...] = ((24, 20, 20), (52, 34, 24), (88, 58, 36), (190, 150, 84), (146, 72, 36), (160, 156, 150))
_IRIS: tuple[Colour, ...] = ((70, 42, 22), (96, 64, 34), (78, 104, 60), (74, 112, 150), (100, 112, 118))
_MARK: tuple[Colour, ...] = ((235, 235, 235), (240, 200, 20), (240, 110, 20), (150, 50, 200), (220, 30, 40), (30, 160, 60), (30, 80, 220))

# One stream of random numbers for each thing that must not change when another one does.
_PLAN, _PERSON, _ACTION, _VIEW, _PIXELS, _SHORTCUT = range(6)

_T = TypeVar("_T")


@DATASETS.register(
    "synthetic",
    title="Synthetic faces",
    paper="drawn by this project; action units after Ekman & Friesen, Facial Action Coding System, 1978",
    year=2025,
    license="Made by this program; no person is shown. Use it as you like.",
    embedded=True,
)
class SyntheticFaces(Dataset):
    """Parametric faces with exact landmarks and known action units."""

    class Options(Dataset.Options):
        """Accepted keys of ``[datasets.synthetic]``."""

        size: int = Field(default=96, ge=16, le=1024)
        """Side, in pixels, of the square pictures; the scenes are the same at every size."""
        seed: int = Field(default=0, ge=0)
        """Another seed is another dataset: other people, other pictures."""
        train: int = Field(default=4096, ge=1)
        """Pictures of the training split."""
        val: int = Field(default=512, ge=1)
        """Pictures of the validation split."""
        test: int = Field(default=1024, ge=1)
        """Pictures of the test split."""
        train_identities: int = Field(default=256, ge=1)
        """People in the training split; no person is in two splits."""
        val_identities: int = Field(default=64, ge=1)
        """People in the validation split."""
        test_identities: int = Field(default=128, ge=1)
        """People in the test split."""
        shortcut: float = Field(default=0.0, ge=0.0, le=1.0)
        """Probability that a picture carries a coloured mark in a corner. In train and val, which are drawn from one distribution,
        its colour names the class; in test it is drawn without regard to the class. The faces are the same for every value."""
        weakest: float = Field(default=0.22, gt=0.0, le=1.0)
        """Least overall intensity of an expression; the greatest is 1."""
        pose: float = Field(default=1.0, ge=0.0, le=2.0)
        """How far heads turn, nod and tilt: at 1 up to 20, 12 and 14 degrees."""
        occlusion: float = Field(default=0.22, ge=0.0, le=1.0)
        """Probability that a bar, a hand or a lock of hair is before the face."""
        noise: float = Field(default=1.0, ge=0.0, le=4.0)
        """How much sensor noise and blur there is, relative to the usual amount."""

    options: Options

    @property
    def classes(self) -> tuple[str, ...]:
        """The seven expressions."""
        return EXPRESSIONS

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """Every split in order; any seven pictures that start at a multiple of seven show all classes once."""
        counts = {"train": self.options.train, "val": self.options.val, "test": self.options.test}
        return {split: [self.item(split, index) for index in range(count)] for split, count in counts.items()}

    def item(self, split: str, index: int) -> Item:
        """The item at a position of a split; it does not depend on how many there are."""
        people = {"train": self.options.train_identities, "val": self.options.val_identities, "test": self.options.test_identities}[split]
        label = _place(self.options.seed, split, "label", index, len(EXPRESSIONS))
        person = _place(self.options.seed, split, "person", index, people)
        return Item(source=f"synthetic/{split}/{index:06d}", label=label, identity=f"synthetic-{split}-{person:04d}")

    def read(self, item: Item) -> Face:
        """Draw the picture of an item of `splits`, at ``options.size``.

        ``extra`` holds ``action_units`` (id as text to intensity 0..1), ``facs`` (their names), ``view``, ``identity`` and ``mark``
        (class whose mark the picture carries, or None).

        Raises:
            ValueError: the item is not one that these options make.
        """
        split, index = _parse(item.source)
        if self.item(split, index) != item:
            raise ValueError(f"{item} is not an item of the synthetic dataset with these options; take items from splits()")
        assert item.identity is not None
        seed, options = self.options.seed, self.options
        identity = sample_identity(_stream(seed, _PERSON, item.identity))
        units = sample_units(_stream(seed, _ACTION, item.source), expression=EXPRESSIONS[item.label], weakest=options.weakest)
        view = sample_view(_stream(seed, _VIEW, item.source), pose=options.pose, occlusion=options.occlusion, noise=options.noise)
        image, landmarks = draw(identity, units, view, size=options.size, rng=_stream(seed, _PIXELS, item.source))
        dice = _stream(seed, _SHORTCUT, item.source)
        mark: str | None = None
        if dice.random() < options.shortcut:
            drawn = int(dice.random() * len(EXPRESSIONS))
            marked = drawn if split == "test" else item.label
            mark = EXPRESSIONS[marked]
            image = _draw_mark(image, _MARK[marked], corner=int(dice.random() * 4))
        extra = {
            "action_units": {str(unit): intensity for unit, intensity in units.items()},
            "facs": [FACS[unit] for unit in units],
            "view": dataclasses.asdict(view),
            "identity": dataclasses.asdict(identity),
            "mark": mark,
        }
        return Face(image=image, landmarks=landmarks, extra=extra)

    def provenance(self) -> Mapping[str, Any]:
        """What the pictures are made of, and with which Pillow: another version may draw an edge differently."""
        return {
            "repertoire": {name: {str(unit): share for unit, share in units.items()} for name, units in REPERTOIRE.items()},
            "drawn_with": {"pillow": PIL.__version__, "numpy": np.__version__},
        }


def sample_units(rng: np.random.Generator, *, expression: str, weakest: float) -> dict[int, float]:
    """A random, anatomically possible subset of the action units of an expression: id to intensity 0..1, ids ascending."""
    repertoire = REPERTOIRE[expression]
    if not repertoire:
        return {}
    chosen: set[int] = set()

    def admit(unit: int) -> None:
        if not any(unit in pair and (pair - {unit}) <= chosen for pair in _EXCLUSIVE):
            chosen.add(unit)

    admit(_pick(rng, _CORE[expression]))
    order = sorted(repertoire, key=lambda _: rng.random())
    for unit in order:
        if unit not in chosen and rng.random() < repertoire[unit]:
            admit(unit)
    for unit in order:  # one unit alone would be another game: an expression is a pattern
        if len(chosen) < 2:
            admit(unit)
    overall = _between(rng, weakest, 1.0)
    return {unit: round(min(1.0, overall * _between(rng, 0.7, 1.2)), 4) for unit in sorted(chosen)}


def sample_identity(rng: np.random.Generator) -> Identity:
    """A random person."""
    tone = rng.random() * (len(_SKIN) - 1)
    low, share = int(tone), tone - int(tone)
    skin = _colour(rng, [a + (b - a) * share for a, b in zip(_SKIN[low], _SKIN[low + 1], strict=True)], spread=9)
    lip = [c * (0.80 if i == 0 else 0.60) + (30 if i == 0 else 18) for i, c in enumerate(skin)]
    style = _pick(rng, ("bald", "short", "short", "side", "side", "long", "long", "bob"))
    bearded = style in ("bald", "short", "side") and rng.random() < 0.4
    return Identity(
        skin=skin,
        hair=_colour(rng, _pick(rng, _HAIR if tone < 2.5 else _HAIR[:3]), spread=10),
        iris=_colour(rng, _pick(rng, _IRIS if tone < 2.5 else _IRIS[:2]), spread=10),
        lip=_colour(rng, lip, spread=12),
        clothes=_colour(rng, (120, 120, 120), spread=100),
        width=_bell(rng, 0.98, 0.10),
        jaw=_bell(rng, 0.97, 0.12),
        chin=_bell(rng, 1.0, 0.10),
        eye_gap=_bell(rng, 0.0, 0.04),
        eye_size=_bell(rng, 1.0, 0.16),
        eye_tilt=_bell(rng, 0.04, 0.14),
        brow_height=_bell(rng, 0.0, 0.075),
        brow_tilt=_bell(rng, 0.0, 0.13),
        brow_arch=_bell(rng, 0.01, 0.05),
        brow_thickness=_bell(rng, 0.085, 0.05),
        nose_width=_bell(rng, 1.0, 0.22),
        nose_length=_bell(rng, 1.0, 0.10),
        mouth_width=_bell(rng, 1.0, 0.16),
        mouth_corner=_bell(rng, 0.0, 0.055),
        lip_fullness=_bell(rng, 1.0, 0.45),
        age=max(0.0, _bell(rng, 0.25, 0.75)),
        style=style,
        fringe=max(0.0, _bell(rng, 0.25, 0.75)),
        glasses=_between(rng, 0.018, 0.045) if rng.random() < 0.25 else 0.0,
        tinted=rng.random() < 0.2,
        beard=_between(rng, 0.1, 1.0) if bearded else 0.0,
        moustache=_between(rng, 0.2, 1.0) if bearded and rng.random() < 0.7 else 0.0,
    )


def sample_view(rng: np.random.Generator, *, pose: float, occlusion: float, noise: float) -> View:
    """A random way to take a picture."""
    occluder, at = "", (0.0, 0.0, 0.0)
    if rng.random() < occlusion:
        occluder = _pick(rng, ("bar", "hand", "lock"))
        side = _pick(rng, (-1.0, 1.0))
        if occluder == "bar":
            at = (0.0, _between(rng, -0.5, 1.1), _between(rng, -50.0, 50.0))
        elif occluder == "hand":  # from below, towards a cheek
            at = (side * _between(rng, 0.5, 0.9), _between(rng, 0.8, 1.2), 270.0 - side * _between(rng, 5.0, 45.0))
        else:
            at = (side * _between(rng, 0.4, 0.7), _between(rng, -0.5, 0.1), 0.0)
    return View(
        shift_x=_bell(rng, 0.0, 0.05),
        shift_y=_bell(rng, -0.01, 0.05),
        scale=_bell(rng, 0.355, 0.045),
        roll=_bell(rng, 0.0, 14.0 * pose),
        yaw=_bell(rng, 0.0, 20.0 * pose),
        pitch=_bell(rng, 0.0, 12.0 * pose),
        light_x=_bell(rng, 0.0, 0.9),
        light_y=_bell(rng, -0.15, 0.5),
        exposure=_bell(rng, 0.98, 0.3),
        warmth=_bell(rng, 0.0, 0.12),
        blur=0.012 * noise * rng.random() ** 2,
        noise=noise * _between(rng, 3.0, 22.0),
        gaze_x=_bell(rng, 0.0, 0.06),
        gaze_y=_bell(rng, 0.0, 0.03),
        droop=_bell(rng, 0.0, 0.04),
        brow_drift=_bell(rng, 0.0, 0.04),
        gap=max(0.0, _bell(rng, -0.01, 0.06)),
        skew=_bell(rng, 0.0, 0.5),
        occluder=occluder,
        occluder_at=at,
    )


def _parse(source: str) -> tuple[str, int]:
    match source.split("/"):
        case ["synthetic", split, digits] if split in SPLITS and digits.isdecimal():
            return split, int(digits)
    raise ValueError(f"{source!r} does not name a synthetic picture; they look like 'synthetic/train/000012'")


def _stream(seed: int, purpose: int, name: str) -> np.random.Generator:
    """Random numbers for one purpose of one named thing, the same in every process."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, zlib.crc32(name.encode())))))


def _place(seed: int, split: str, what: str, index: int, choices: int) -> int:
    """Choice at a position when every run of ``choices`` positions is a random permutation of them: balanced, yet extendable."""
    block, place = divmod(index, choices)
    return _permutation(seed, split, what, block, choices)[place]


@lru_cache(maxsize=256)
def _permutation(seed: int, split: str, what: str, block: int, choices: int) -> tuple[int, ...]:
    draws = _stream(seed, _PLAN, f"{split}/{what}/{block}").random(choices)
    return tuple(np.argsort(draws, kind="stable").tolist())


def _draw_mark(image: npt.NDArray[np.uint8], ink: Colour, *, corner: int) -> npt.NDArray[np.uint8]:
    """The picture with a disc in one of its corners, where the face does not reach; 1/9 of the side across, white-edged."""
    size = len(image)
    fine = Image.new("RGBA", (size * 4, size * 4))
    reach, margin = size * 4 / 18, size * 4 * 0.08
    x = margin if corner % 2 == 0 else size * 4 - margin
    y = margin if corner < 2 else size * 4 - margin
    ImageDraw.Draw(fine).ellipse(
        [x - reach, y - reach, x + reach, y + reach], fill=(*ink, 255), outline=(250, 250, 250, 255), width=max(1, size // 16)
    )
    picture = Image.fromarray(image).convert("RGBA")
    picture.alpha_composite(fine.resize((size, size), Image.Resampling.BOX))
    return np.asarray(picture.convert("RGB"))


def _pick(rng: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _bell(rng: np.random.Generator, mean: float, spread: float) -> float:
    """Bell-shaped, within ``spread`` of the mean; standard deviation a third of the spread (sum of three uniforms)."""
    return mean + spread * (rng.random() + rng.random() + rng.random() - 1.5) / 1.5


def _colour(rng: np.random.Generator, base: Sequence[float], *, spread: float) -> Colour:
    red, green, blue = (max(0, min(255, int(c + _between(rng, -spread, spread)))) for c in base)
    return red, green, blue
