"""Which action units make which expression, and where in a face each of them is drawn: the codebook as data.

The coding is that of "Guided Interpretable Facial Expression Recognition via Spatial Action Unit Cues" (FG 2024,
arXiv 2402.00281), which takes it from B. Martinez, M. Valstar, B. Jiang, M. Pantic, "Automatic Analysis of Facial
Actions: A Survey" (IEEE Transactions on Affective Computing, 2017, table 1). FACS numbers and names: P. Ekman,
W. Friesen, J. Hager, "Facial Action Coding System" (2002).

Landmarks are the 68 points of iBUG 300-W, counted from 0. "Left" is the left side of the picture. The 0-based
``id`` of an action unit is the published code's own count and not its FACS number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

Variant = Literal["official", "symmetric"]
VARIANTS: tuple[Variant, ...] = ("official", "symmetric")

REFERENCE_FRAME = 224
"""Side in pixels of the aligned faces for which the published pixel radii were chosen."""

REFERENCE_FACE = 72.8
"""Size of such a face: root mean square distance, in pixels, of its 68 landmarks from their centroid.

Mean over the eight real, aligned 224-pixel faces among the reference figures of the published code."""


class ActionUnit(NamedTuple):
    """One action unit: the published code's number, the FACS number, and the FACS name."""

    id: int
    facs: int
    name: str


ACTION_UNITS = tuple(
    ActionUnit(id, facs, name)
    for id, (facs, name) in enumerate(  # noqa: A001 - the field's own name
        (
            (1, "inner brow raiser"),
            (2, "outer brow raiser"),
            (4, "brow lowerer"),
            (5, "upper lid raiser"),
            (6, "cheek raiser"),
            (7, "lid tightener"),
            (9, "nose wrinkler"),
            (10, "upper lip raiser"),
            (12, "lip corner puller"),
            (14, "dimpler"),
            (15, "lip corner depressor"),
            (17, "chin raiser"),
            (20, "lip stretcher"),
            (23, "lip tightener"),
            (24, "lip pressor"),
            (25, "lips part"),
            (26, "jaw drop"),
            (43, "eyes closed"),
            (27, "mouth stretch"),
            (16, "lower lip depressor"),
        )
    )
)

EXPRESSION_UNITS: Mapping[str, tuple[int, ...]] = {
    "neutral": (),
    "happiness": (4, 8, 15),
    "surprise": (0, 1, 3, 16, 18),
    "fear": (0, 1, 2, 3, 12, 15, 16, 18),
    "anger": (2, 3, 5, 7, 11, 13, 14, 15, 16),
    "disgust": (3, 6, 11, 15, 16, 19),
    "sadness": (0, 2, 4, 10, 11),
}
"""Expression to `ActionUnit.id`. Neutral has none, hence no map."""

Length = float | Fraction
"""A float is a length in pixels of a `REFERENCE_FRAME` face, a `Fraction` a share of the picture's side."""


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """Centre and radius of an ellipse along one axis, from landmark coordinates on that axis.

    The two ends are means of two landmarks each; the centre lies halfway between the ends, moved by ``shift``. The
    radius is ``radius`` if given, else half the distance of the ends widened by ``grow``, at least ``floor``.
    """

    low: tuple[int, int]
    high: tuple[int, int]
    shift: Length = 0.0
    radius: Length | None = None
    grow: float = 0.0
    floor: float = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ellipse:
    """A filled, axis-parallel ellipse."""

    x: Axis
    y: Axis


def _between(low: int, high: int, **options: Length) -> Axis:
    """An axis with one landmark at either end."""
    return Axis((low, low), (high, high), **options)  # type: ignore[arg-type]


def _at(x: int, y: int, *, rx: Length = 20.0, ry: Length = 20.0, dx: Length = 0.0, dy: Length = 0.0) -> Ellipse:
    """An ellipse of given radii around the x of one landmark and the y of another."""
    return Ellipse(_between(x, x, radius=rx, shift=dx), _between(y, y, radius=ry, shift=dy))


def _halfway(first: int, second: int) -> Ellipse:
    """A circle of 20 px halfway between two landmarks."""
    return Ellipse(_between(first, second, radius=20.0), _between(first, second, radius=20.0))


def _pair(first: int, second: int, *, rx: Length = 20.0, ry: Length = 20.0, dy: Length = 0.0) -> tuple[Ellipse, ...]:
    """The same ellipse around two landmarks."""
    return tuple(_at(i, i, rx=rx, ry=ry, dy=dy) for i in (first, second))


def _eyes(*, grow: float = 0.0, floor: float = 5.0) -> tuple[Ellipse, ...]:
    """The eyes as published: the right one is not the mirror image of the left one, see `SYMMETRIC`."""
    return (
        Ellipse(_between(36, 39, floor=floor), _between(38, 41, grow=grow, floor=floor)),
        Ellipse(_between(42, 45, floor=floor), _between(44, 47, grow=grow, floor=floor)),
    )


def _mirrored_eyes(*, grow: float = 0.0, floor: float = 5.0) -> tuple[Ellipse, ...]:
    return (
        Ellipse(_between(36, 39, floor=floor), Axis((37, 38), (40, 41), grow=grow, floor=floor)),
        Ellipse(_between(42, 45, floor=floor), Axis((43, 44), (46, 47), grow=grow, floor=floor)),
    )


_BROW = {"rx": Fraction(1, 8), "ry": Fraction(1, 10)}
_MOUTH = (Ellipse(_between(48, 54), _between(51, 57)),)

OFFICIAL: tuple[tuple[Ellipse, ...], ...] = (
    _pair(20, 23, **_BROW),
    _pair(18, 25, **_BROW),
    (Ellipse(_between(19, 24, floor=10.0), _between(19, 24, floor=10.0)),),
    _eyes(),
    _pair(41, 46, rx=Fraction(1, 10), ry=Fraction(1, 10), dy=Fraction(1, 6)),
    _eyes(grow=20.0),
    (_at(31, 29), _at(35, 29)),
    (_at(48, 50), _at(52, 54)),
    _pair(48, 54),
    (_at(48, 48, dx=-20.0), _at(54, 54, dx=20.0)),
    _pair(48, 54),
    (Ellipse(_between(59, 8), _between(59, 8)),),
    (_halfway(48, 6), _halfway(50, 10)),
    _MOUTH,
    _MOUTH,
    _pair(51, 57, rx=25.0, ry=10.0),
    _MOUTH,
    _eyes(grow=20.0, floor=0.0),
    _MOUTH,
    _pair(59, 55),
)
"""Ellipses of every action unit as the published code draws them, slips included."""

SYMMETRIC: tuple[tuple[Ellipse, ...], ...] = (
    *OFFICIAL[:3],
    _mirrored_eyes(),
    OFFICIAL[4],
    _mirrored_eyes(grow=20.0),
    OFFICIAL[6],
    (_halfway(48, 50), _halfway(52, 54)),
    *OFFICIAL[8:11],
    (Ellipse(_between(59, 55), Axis((59, 55), (8, 8))),),
    (_halfway(48, 6), _halfway(54, 10)),
    *OFFICIAL[13:17],
    _mirrored_eyes(grow=20.0, floor=0.0),
    *OFFICIAL[18:],
)
"""The same with the left-right slips mended, so that a mirrored face has the mirrored map:

* upper lip raiser (id 7): published at (x of 48, y of 50) and (x of 52, y of 54), which puts the left circle above the
  lip corner and the right one level with it. Here halfway between corner and cupid's bow on both sides.
* chin raiser (id 11): published between landmarks 59 and 8, the left half of the chin only. Here from 59 to 55.
* lip stretcher (id 12): published with 50, a point of the upper lip, where the mirror of 48 is 54.
* upper lid raiser, lid tightener, eyes closed (ids 3, 5, 17): published with landmarks 38 and 41 on the left but 44 and
  47 on the right, whose mirrors are 37 and 40. Here both points of the upper and of the lower lid.
* brow lowerer (id 2): the height follows the *signed* difference of the brows' heights, so it depends on the side to
  which a head leans. Here the difference counts without its sign; this is done where radii are computed.

`Axis.floor` is the least radius here; the published code uses it only where the ends leave no radius at all, so that a
nearly closed eye is drawn thinner than a closed one. All lengths, shares of the picture included,
are multiplied by the size of the face over `REFERENCE_FACE`.
"""
