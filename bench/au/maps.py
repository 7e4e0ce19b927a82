"""Action unit maps from landmarks, for a whole batch at once, on any device.

The published procedure ("Guided Interpretable Facial Expression Recognition via Spatial Action Unit Cues", FG 2024) per
action unit: filled ellipses on a canvas of the picture's size -> resized to 28 x 28 -> 3 x 3 mean -> resized back; then the
maximum over the expression's action units and min-max scaling. Resizing to 28 x 28 by the bilinear rule of two
neighbours per axis reads at most 56 x 56 pixels of the canvas. Only those are computed, from the ellipses' formula: for
every row that is read, how far the ellipse reaches to both sides of its centre.

Working tensors carry the batch in the *last* axis, so that every operation runs over long contiguous rows however small
the grid. All operations are elementwise: the map of a sample is bit for bit the same in any batch, and neither TF32 nor
autocast can touch it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.au.codebook import EXPRESSION_UNITS, OFFICIAL, REFERENCE_FACE, REFERENCE_FRAME, SYMMETRIC, VARIANTS, Axis, Ellipse, Length
from bench.dataset import EXPRESSION_NAMES, EXPRESSIONS

GRID = 28
"""Side of the grid on which the published code smooths the drawings: the resolution of every AU map."""

_LANDMARKS = 68

_Lists = Literal["expressions", "all", "units"]
"""What an id stands for: the action units of an expression, all of them whatever the id, or the one of this id."""


def expression_ids(classes: Sequence[str]) -> Tensor:
    """Expression id of every class name: its position in `bench.dataset.EXPRESSIONS`, or -1 for none of them.

    Names are compared without regard to case and to spaces around them; the adjectives ("happy", "angry", "surprised",
    "fearful", "disgusted", "sad") and a few common synonyms count. A class such as contempt has no entry in the
    codebook: it is -1, and `bench.au.action_unit_maps` makes no map for it.

    Returns:
        (len(classes),) int64.
    """
    return torch.tensor([EXPRESSION_NAMES.get(name.strip().lower(), -1) for name in classes], dtype=torch.int64)


class AUMaps(NamedTuple):
    """``maps`` (B, size, size) float32 in [0, 1]; ``valid`` (B,) bool. The map of an invalid sample is zero."""

    maps: Tensor
    valid: Tensor


@torch.no_grad()
def action_unit_maps(
    landmarks: Tensor,
    expressions: Tensor,
    *,
    frame: int,
    size: int,
    variant: Literal["official", "symmetric"] = "official",
    generic: bool = False,
) -> AUMaps:
    """Draw where the action units of each sample's expression lie in its face.

    A sample is invalid if its expression has no action units (neutral, or none of the codebook's expressions), if a
    landmark is not finite, or if none of its ellipses touches the picture. Guidance and metrics leave such samples out
    and count them. A drawing that vanishes when it is reduced to 28 x 28 gives a valid map of zeros, as published.

    Args:
        landmarks: (B, 68, 2) floating, x and y in pixels of the picture (centre of the first pixel = 0), iBUG order;
            NaN or inf where the face was not found.
        expressions: (B,) int64, position in `bench.dataset.EXPRESSIONS`; -1 = none of them.
        frame: Side in pixels of the square picture that the landmarks refer to.
        size: Side of the maps: ``frame`` for the published full-size map; 28 for the grid on which it is smoothed, which
            saves the way back and is what training needs; any other side is bilinearly resampled from the 28 x 28 map.
        variant: ``official`` reproduces the published drawings: coordinates truncated towards zero, pixel radii whatever
            the face's size, left-right slips. ``symmetric`` mends the slips (see `codebook.SYMMETRIC`), scales all radii
            with the face and truncates nothing: mirroring or scaling a face does the same to its map.
        generic: Use all 20 action units for every sample whatever its expression (the published class-agnostic map).

    Raises:
        ValueError: a shape, a side or the variant is not of the above.
    """
    return _draw(landmarks, expressions, frame=frame, size=size, variant=variant, lists="all" if generic else "expressions")


@torch.no_grad()
def unit_maps(landmarks: Tensor, units: Tensor, *, frame: int, size: int, variant: Literal["official", "symmetric"]) -> AUMaps:
    """The map of a single action unit in each face: drawn, smoothed and scaled as `action_unit_maps` does with a whole list.

    Args:
        landmarks: as in `action_unit_maps`.
        units: (B,) int64, `bench.au.codebook.ActionUnit.id`.
        frame: as in `action_unit_maps`, like ``size`` and ``variant``.
        size: side of the maps.
        variant: geometry.

    Raises:
        ValueError: as `action_unit_maps`.
    """
    return _draw(landmarks, units, frame=frame, size=size, variant=variant, lists="units")


def _draw(landmarks: Tensor, ids: Tensor, *, frame: int, size: int, variant: str, lists: _Lists) -> AUMaps:
    if landmarks.ndim != 3 or landmarks.shape[1:] != (_LANDMARKS, 2):
        raise ValueError(f"landmarks must be (B, {_LANDMARKS}, 2), got {tuple(landmarks.shape)}: use the 68 points of iBUG 300-W")
    if ids.shape != landmarks.shape[:1]:
        raise ValueError(f"{lists} must be ({len(landmarks)},), one id per face, got {tuple(ids.shape)}")
    if variant not in VARIANTS:
        raise ValueError(f"unknown AU map variant {variant!r}: use one of {', '.join(VARIANTS)}")
    if frame < 2 or size < 1:
        raise ValueError(f"frame={frame} and size={size}: the picture needs at least 2 pixels a side, the map 1")
    side = frame if size == frame else GRID
    maps = landmarks.new_empty((len(landmarks), side, side), dtype=torch.float32)
    valid = landmarks.new_empty(len(landmarks), dtype=torch.bool)
    start = 0
    for part in _chunks(landmarks, ids, _CHUNK_FULL_SIZE if side > GRID else _CHUNK_NATIVE):
        layers, drawn = _layers(*part, frame=frame, variant=variant, lists=lists)
        stop = start + len(drawn)
        top = layers.amax(2).permute(2, 0, 1) if side == GRID else _enlarged_maximum(layers, frame)
        _min_max(top, drawn, out=maps[start:stop])
        valid[start:stop] = drawn
        start = stop
    if size not in (frame, GRID):
        maps = F.interpolate(maps[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0].clamp_(0, 1)
    return AUMaps(maps, valid)


# Faces handled at once on a CPU, so that the intermediate tensors stay in its cache. Elsewhere the chunks only bound the memory.
_CHUNK_NATIVE = {"cpu": 64}
_CHUNK_FULL_SIZE = {"cpu": 8}
_CHUNK_ELSEWHERE = 256


def _chunks(landmarks: Tensor, ids: Tensor, sizes: Mapping[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
    count = sizes.get(landmarks.device.type, _CHUNK_ELSEWHERE)
    ids = ids.to(landmarks.device)
    for start in range(0, len(landmarks), count):
        yield landmarks[start : start + count], ids[start : start + count]


def _enlarged_maximum(layers: Tensor, frame: int) -> Tensor:
    """Maximum over the layers (GRID, GRID, K, B) after bilinear enlargement to (B, frame, frame).

    The maximum comes last: interpolation and maximum do not commute.
    """
    if frame % GRID:
        return F.interpolate(layers.permute(3, 2, 0, 1), size=(frame, frame), mode="bilinear", align_corners=False).amax(1)
    # Whole steps between cells, the usual case: the same interpolation as broadcasts, about three times as fast.
    step = frame // GRID
    shares = (torch.arange(step, device=layers.device) + (0.5 if step % 2 == 0 else 0.0)) / step
    skip = (step + 1) // 2
    wide = torch.cat([layers[:, :1], layers, layers[:, -1:]], 1)
    wide = torch.lerp(wide[:, :-1, None], wide[:, 1:, None], shares[:, None, None]).flatten(1, 2)[:, skip : skip + frame]
    wide = wide.permute(2, 3, 0, 1)
    wide = torch.cat([wide[:, :, :1], wide, wide[:, :, -1:]], 2)  # (K, B, GRID + 2, frame)
    shares = shares[:, None]
    top = torch.lerp(wide[0, :, :-1, None], wide[0, :, 1:, None], shares)
    layer = torch.empty_like(top)
    for source in wide[1:]:
        torch.lerp(source[:, :-1, None], source[:, 1:, None], shares, out=layer)
        torch.maximum(top, layer, out=top)
    return top.flatten(1, 2)[:, skip : skip + frame]


def _min_max(maps: Tensor, valid: Tensor, *, out: Tensor) -> None:
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    torch.sub(maps, low, out=out)
    out *= torch.where((span > 0) & valid[:, None, None], 1 / span, 0)


def _layers(landmarks: Tensor, ids: Tensor, *, frame: int, variant: str, lists: _Lists) -> tuple[Tensor, Tensor]:
    """The smoothed drawings: (GRID, GRID, K, B), K drawings per sample, and the validity of each sample (B,)."""
    device = landmarks.device
    complete = landmarks.isfinite().flatten(1).all(1)
    points = torch.where(complete[:, None, None], landmarks, 0).permute(2, 1, 0).float()  # (x or y, 68, B)
    if variant == "official":
        points = points.trunc()
    table = _table(variant, frame, lists, device)
    if lists == "all":
        ids = torch.zeros_like(ids)
    known = (ids >= 0) & (ids < len(table.drawings))
    drawings = table.drawings[ids.where(known, 0)].T  # (K, B)
    valid = complete & known & table.has_units[ids.where(known, 0)]

    centre, radius = _ellipses(points, table, frame=frame, variant=variant)  # (x or y, ellipse of a drawing, drawing, B)
    pick = drawings.expand(2, 2, -1, -1)
    centre, radius = centre.gather(2, pick), radius.gather(2, pick)  # (2, 2, K, B)

    # A drawing that no pixel of the picture sees is left out; the pixel to ask is the one nearest to the centre.
    reach = ((centre.clamp(0, frame - 1) - centre) / radius).square().sum(0)
    valid = valid & (reach <= 1).any(0).any(0)

    (cx, cy), (rx, ry) = centre, radius  # (2, K, B)
    taps = table.taps[:, None, None, None]
    height = 1 - ((taps - cy) / ry).square()
    width = rx * height.clamp(min=0).sqrt()
    width = torch.where(height >= 0, width, -1)  # (2 * GRID, 2, K, B): a negative width is reached nowhere
    distance = (taps - cx).abs()
    drawn = distance[None, :, 0] <= width[:, None, 0]  # (2 * GRID rows, 2 * GRID columns, K, B)
    drawn |= distance[None, :, 1] <= width[:, None, 1]
    if table.halves:  # counting in bytes is several times as fast as averaging
        counts = drawn.view(torch.uint8)
        rows = counts[:GRID] + counts[GRID:]
        cells = (rows[:, :GRID] + rows[:, GRID:]).float() / 4
    else:
        share = table.shares[:, None, None, None]
        mixed = torch.lerp(drawn[:GRID].float(), drawn[GRID:].float(), share)
        cells = torch.lerp(mixed[:, :GRID], mixed[:, GRID:], share[:, 0])
    return _blur(_blur(cells, 0), 1), valid


def _blur(cells: Tensor, axis: int) -> Tensor:
    """Mean of three neighbours along an axis; past the border the picture is mirrored in its outermost cell."""
    last = cells.shape[axis] - 1
    total = cells / 3
    third = total.clone()
    total.narrow(axis, 1, last).add_(third.narrow(axis, 0, last))
    total.narrow(axis, 0, last).add_(third.narrow(axis, 1, last))
    total.narrow(axis, 0, 1).add_(third.narrow(axis, 1, 1))
    total.narrow(axis, last, 1).add_(third.narrow(axis, last - 1, 1))
    return total


class _Table(NamedTuple):
    """A variant of the codebook as tensors. D distinct drawings of two ellipses each; a single ellipse is entered twice.

    Leading axes of the ellipse columns: (x or y, first or second ellipse, D).
    """

    drawings: Tensor
    """(ids, K) positions of the drawings that an id stands for, repeated up to K: a repeat cannot change a maximum."""
    has_units: Tensor
    """(ids,) bool."""
    ends: Tensor
    """(4, 2, 2, D) landmark numbers: the two of the low end, the two of the high end."""
    shift: Tensor
    fixed: Tensor
    """Radius, or NaN where the ends decide it."""
    grow: Tensor
    floor: Tensor
    taps: Tensor
    """(2 * GRID,) coordinates at which the canvas is read: the near taps of all cells, then the far ones."""
    shares: Tensor
    """(GRID,) share of the far tap."""
    halves: bool
    """Whether all shares are one half."""


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is kept must be usable outside of the evaluator's inference mode
def _table(variant: str, frame: int, lists: _Lists, device: torch.device) -> _Table:
    units = OFFICIAL if variant == "official" else SYMMETRIC
    choices: Mapping[_Lists, list[tuple[int, ...]]] = {
        "expressions": [EXPRESSION_UNITS[name] for name in EXPRESSIONS],
        "all": [tuple(range(len(units)))],
        "units": [(unit,) for unit in range(len(units))],
    }
    listed = choices[lists]
    # Several action units are drawn alike (all those of the whole mouth): once is enough for a maximum.
    drawings = list(dict.fromkeys(units[unit] for expression in listed for unit in expression))
    positions = [list(dict.fromkeys(drawings.index(units[unit]) for unit in expression)) for expression in listed]
    slots = max(map(len, positions))
    padded = [row + (row or [0])[:1] * (slots - len(row)) for row in positions]

    def pixels(length: Length) -> float:
        if not isinstance(length, Fraction):
            return length
        return round(length * frame) if variant == "official" else float(length * REFERENCE_FRAME)

    axes = [[[getattr(_ellipse(d, i), axis) for d in drawings] for i in (0, 1)] for axis in ("x", "y")]

    def column(value: Callable[[Axis], float]) -> Tensor:
        return torch.tensor([[[value(axis) for axis in row] for row in rows] for rows in axes], dtype=torch.float32, device=device)

    def radius(axis: Axis) -> float:
        return float("nan") if axis.radius is None else pixels(axis.radius)

    taps, shares = _reading_points(frame, variant)
    return _Table(
        drawings=torch.tensor(padded, device=device),
        has_units=torch.tensor([bool(row) for row in positions], device=device),
        ends=torch.tensor(
            [[[[(*axis.low, *axis.high)[i] for axis in row] for row in rows] for rows in axes] for i in range(4)], device=device
        ),
        shift=column(lambda axis: pixels(axis.shift)),
        fixed=column(radius),
        grow=column(lambda axis: axis.grow),
        floor=column(lambda axis: axis.floor),
        taps=taps.to(device),
        shares=shares.to(device),
        halves=bool((shares == 0.5).all()),
    )


def _ellipse(drawing: Sequence[Ellipse], index: int) -> Ellipse:
    return drawing[min(index, len(drawing) - 1)]


def _reading_points(frame: int, variant: str) -> tuple[Tensor, Tensor]:
    """Where, along an axis, the canvas is read to make the 28 cells, and the share of the second of each cell's two points."""
    cells = torch.arange(GRID, dtype=torch.float64)
    if variant == "symmetric":  # a quarter of a cell from its borders, whatever the pixels: the same points at every scale
        near, far = ((cells + quarter) / GRID * frame - 0.5 for quarter in (0.25, 0.75))
        return torch.cat([near, far]).float(), torch.full((GRID,), 0.5)
    # Half-pixel centres and two neighbours per axis, without antialiasing: bilinear resizing as the published code does it.
    position = ((cells + 0.5) * frame / GRID - 0.5).clamp(0, frame - 1)
    near = position.floor().clamp(max=frame - 2)
    return torch.cat([near, near + 1]).float(), (position - near).float()


def _ellipses(points: Tensor, table: _Table, *, frame: int, variant: str) -> tuple[Tensor, Tensor]:
    """Centres and radii of all ellipses, each (x or y, first or second ellipse, D, B), from points (x or y, 68, B)."""
    low_a, low_b, high_a, high_b = (
        torch.stack([points[axis][index[axis]] for axis in (0, 1)]) for index in table.ends
    )  # each (2, 2, D, B)
    low, high = (low_a + low_b) / 2, (high_a + high_b) / 2
    shift, fixed, grow, floor = (column[..., None] for column in (table.shift, table.fixed, table.grow, table.floor))
    if variant == "official":
        centre = ((low + high) / 2).trunc() + shift
        # Only the dimpler is moved sideways: to the picture's border at most.
        centre[0] = torch.where(shift[0] < 0, centre[0].clamp(min=0), torch.where(shift[0] > 0, centre[0].clamp(max=frame), centre[0]))
        span = ((high - low + grow) / 2).trunc()
        radius = torch.where(fixed.isnan(), torch.where(span > 0, span, floor), fixed)
        return centre, radius + 0.5  # a pixel that the outline passes through is drawn
    unit = (points - points.mean(1, keepdim=True)).square().sum(0).mean(0).sqrt() / REFERENCE_FACE  # (B,)
    centre = (low + high) / 2 + shift * unit
    span = torch.maximum(((high - low).abs() + grow * unit) / 2, floor * unit)
    return centre, torch.where(fixed.isnan(), span, fixed * unit) + 0.5 * unit
