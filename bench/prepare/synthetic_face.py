"""The drawing half of the synthetic dataset: a parametric face with 68 exact landmarks, moved by facial action units.

The face is a blend-shape model in *face units*: the origin between the eyes and the nose, x to the viewer's right, y down, the
jaw one unit to either side. ``shape`` gives the 68 landmarks (iBUG order) of an identity under a set of action units: rest shape plus the
sum over units of intensity times displacement, as in FACS-based blend-shape rigs (Ekman & Friesen, Facial Action Coding System,
1978). ``draw`` hangs everything visible (lids, brows, lips, teeth, folds, wrinkles) on those landmarks and sends landmarks and
drawing through one and the same projection, so the landmarks are exact by construction.

Action units are named by their position in the list of the published code (ids 0..19), not by their FACS number; `FACS` translates.

Equal on every machine: randomness comes from ``Generator.random`` alone, coordinates are rounded to a 1/1024 of a pixel before
they are drawn (which swallows differences in the last bit of sine and cosine), and pixels see only + - * / and Pillow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Points = npt.NDArray[np.float64]
Colour = tuple[int, int, int]

FACS: Mapping[int, str] = {
    0: "AU1 inner brow raiser",
    1: "AU2 outer brow raiser",
    2: "AU4 brow lowerer",
    3: "AU5 upper lid raiser",
    4: "AU6 cheek raiser",
    5: "AU7 lid tightener",
    6: "AU9 nose wrinkler",
    7: "AU10 upper lip raiser",
    8: "AU12 lip corner puller",
    10: "AU15 lip corner depressor",
    11: "AU17 chin raiser",
    12: "AU20 lip stretcher",
    13: "AU23 lip tightener",
    14: "AU24 lip pressor",
    15: "AU25 lips part",
    16: "AU26 jaw drop",
    18: "AU27 mouth stretch",
    19: "AU16 lower lip depressor",
}
"""The action units that can be drawn: every id that some expression of the codebook lists."""

# ------------------------------------------------------------------------------------------------ geometry

_MIRROR = np.concatenate(
    [
        [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)],
        [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40],
        [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65],
    ]
)
"""Landmark of the other half of the face, by landmark."""

_HALF: Mapping[int, tuple[float, float]] = (
    dict(enumerate([(-1.0, -0.22), (-0.985, 0.04), (-0.95, 0.30), (-0.88, 0.55), (-0.75, 0.79), (-0.57, 0.98), (-0.38, 1.12)]))
    | {7: (-0.19, 1.21), 8: (0.0, 1.24)}
    | {17: (-0.80, -0.475), 18: (-0.67, -0.58), 19: (-0.50, -0.615), 20: (-0.33, -0.59), 21: (-0.17, -0.535)}
    | {27: (0.0, -0.28), 28: (0.0, -0.10), 29: (0.0, 0.07), 30: (0.0, 0.24), 31: (-0.19, 0.345), 32: (-0.10, 0.38), 33: (0.0, 0.40)}
    | {36: (-0.63, -0.245), 37: (-0.53, -0.325), 38: (-0.38, -0.33), 39: (-0.27, -0.225), 40: (-0.38, -0.175), 41: (-0.53, -0.175)}
    | {48: (-0.37, 0.715), 49: (-0.24, 0.645), 50: (-0.09, 0.605), 51: (0.0, 0.625)}
    | {57: (0.0, 0.845), 58: (-0.11, 0.835), 59: (-0.25, 0.79)}
    | {60: (-0.33, 0.715), 61: (-0.15, 0.71), 62: (0.0, 0.715), 66: (0.0, 0.715), 67: (-0.15, 0.71)}
)

_MOVES: Mapping[int, Mapping[int, tuple[float, float]]] = {
    # id: {landmark of the left half or the middle: displacement (x, y) at full intensity}
    0: {21: (0.02, -0.21), 20: (0.01, -0.17), 19: (0.0, -0.06), 38: (0.0, -0.015)},
    1: {17: (-0.01, -0.17), 18: (0.0, -0.21), 19: (0.0, -0.17), 20: (0.0, -0.06), 37: (0.0, -0.015)},
    2: {21: (0.085, 0.17), 20: (0.07, 0.15), 19: (0.05, 0.11), 18: (0.03, 0.04), 37: (0.0, 0.012), 38: (0.0, 0.02)},
    3: {37: (0.0, -0.085), 38: (0.0, -0.085)},
    4: {40: (0.0, -0.045), 41: (0.0, -0.055), 37: (0.0, 0.015), 36: (0.0, 0.01)},
    5: {40: (0.0, -0.065), 41: (0.0, -0.065), 37: (0.0, 0.035), 38: (0.0, 0.03)},
    6: (
        {31: (-0.055, -0.085), 32: (-0.025, -0.06), 33: (0.0, -0.035), 30: (0.0, -0.035)}
        | {50: (0.0, -0.03), 51: (0.0, -0.03)}  # the brows stay: the codebook marks the nose alone
    ),
    7: (
        {49: (-0.01, -0.06), 50: (-0.01, -0.085), 51: (0.0, -0.065), 61: (-0.02, -0.08), 62: (0.0, -0.07)}
        | {31: (-0.03, -0.03), 48: (0.0, -0.01), 60: (0.0, -0.01)}
    ),
    8: (
        {48: (-0.15, -0.15), 60: (-0.145, -0.14), 49: (-0.07, -0.05), 59: (-0.09, -0.055), 50: (-0.02, 0.012), 51: (0.0, 0.02)}
        | {58: (-0.03, 0.0), 57: (0.0, 0.015), 61: (-0.05, -0.005), 67: (-0.05, 0.012), 62: (0.0, 0.01), 66: (0.0, 0.02)}
        | {31: (-0.03, -0.01)}
    ),
    10: {48: (-0.02, 0.15), 60: (-0.02, 0.13), 49: (-0.01, 0.055), 59: (-0.02, 0.09), 61: (0.0, 0.01), 67: (0.0, 0.01)},
    11: (
        {57: (0.0, -0.07), 58: (0.0, -0.065), 59: (0.0, -0.03), 66: (0.0, -0.035), 67: (0.0, -0.03), 62: (0.0, -0.035)}
        | {61: (0.0, -0.03), 50: (0.0, -0.03), 51: (0.0, -0.035), 48: (0.0, 0.035), 60: (0.0, 0.03), 8: (0.0, -0.035), 7: (0.0, -0.03)}
    ),
    12: (
        {48: (-0.20, 0.045), 60: (-0.19, 0.04), 49: (-0.10, 0.025), 59: (-0.12, -0.0), 50: (-0.03, 0.02), 51: (0.0, 0.02)}
        | {57: (0.0, -0.02), 58: (-0.05, -0.02), 61: (-0.06, 0.0), 67: (-0.06, 0.0)}
    ),
    13: (
        {48: (0.08, 0.0), 60: (0.075, 0.0), 49: (0.045, 0.025), 59: (0.045, -0.025), 50: (0.02, 0.05), 51: (0.0, 0.045)}
        | {57: (0.0, -0.06), 58: (0.02, -0.06), 61: (0.02, 0.0), 67: (0.02, 0.0)}
    ),
    14: {49: (0.0, 0.035), 59: (0.0, -0.04), 50: (0.0, 0.06), 51: (0.0, 0.055), 57: (0.0, -0.085), 58: (0.0, -0.08)},
    15: (
        {50: (0.0, -0.02), 51: (0.0, -0.02), 61: (-0.03, -0.025), 62: (0.0, -0.025), 48: (0.0, 0.01), 60: (-0.01, 0.01)}
        | {57: (0.0, 0.075), 58: (0.0, 0.075), 59: (0.0, 0.045), 66: (0.0, 0.09), 67: (-0.03, 0.085)}
    ),
    16: (
        {57: (0.0, 0.20), 58: (0.0, 0.19), 59: (0.02, 0.13), 66: (0.0, 0.22), 67: (-0.02, 0.205), 48: (0.04, 0.07), 60: (0.02, 0.07)}
        | {49: (0.02, 0.0), 8: (0.0, 0.15), 7: (0.0, 0.145), 6: (0.01, 0.12), 5: (0.01, 0.08), 4: (0.01, 0.035)}
    ),
    18: (
        {57: (0.0, 0.34), 58: (0.0, 0.32), 59: (0.05, 0.23), 66: (0.0, 0.36), 67: (-0.01, 0.335), 48: (0.10, 0.13), 60: (0.075, 0.13)}
        | {49: (0.05, 0.0), 50: (0.0, -0.03), 51: (0.0, -0.03), 61: (-0.01, -0.025), 62: (0.0, -0.03)}
        | {8: (0.0, 0.24), 7: (0.0, 0.235), 6: (0.02, 0.20), 5: (0.02, 0.13), 4: (0.02, 0.055)}
    ),
    19: {57: (0.0, 0.09), 58: (-0.03, 0.10), 59: (-0.045, 0.09), 66: (0.0, 0.085), 67: (-0.05, 0.10), 48: (0.0, 0.025), 60: (-0.01, 0.02)},
}


def _both_halves(half: Mapping[int, tuple[float, float]]) -> Points:
    points = np.zeros((68, 2))
    for i, (x, y) in half.items():
        points[i] = x, y
        points[_MIRROR[i]] = -x, y
    return points


_TEMPLATE = _both_halves(_HALF)
_DISPLACEMENT: Mapping[int, Points] = {unit: _both_halves(half) for unit, half in _MOVES.items()}

_BROWS, _NOSE, _MOUTH = slice(17, 27), slice(27, 36), slice(48, 68)
_UPPER_INNER, _LOWER_INNER = [61, 62, 63], [67, 66, 65]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A person: everything that stays the same from picture to picture. Lengths in face units, colours RGB 0..255."""

    skin: Colour
    hair: Colour
    iris: Colour
    lip: Colour
    clothes: Colour
    width: float
    """Breadth of the whole face relative to the mean."""
    jaw: float
    chin: float
    eye_gap: float
    eye_size: float
    eye_tilt: float
    brow_height: float
    brow_tilt: float
    """Positive: inner ends lower than the mean, an angry look at rest; negative: a sad one."""
    brow_arch: float
    brow_thickness: float
    nose_width: float
    nose_length: float
    mouth_width: float
    mouth_corner: float
    """Positive: corners hang at rest; negative: a slight smile at rest."""
    lip_fullness: float
    age: float
    """0 smooth .. 1 folds and forehead lines at rest."""
    style: str
    """Hair: bald, short, side, long, bob."""
    fringe: float
    """How far the fringe reaches down the forehead, 0 none .. 1 over the brows."""
    glasses: float
    """0 none, else thickness of the frame."""
    tinted: bool
    beard: float
    moustache: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How one picture was taken, and the small movements of a face that mean nothing. Angles in degrees."""

    shift_x: float = 0.0
    """Share of the picture's side."""
    shift_y: float = 0.0
    scale: float = 0.36
    """One face unit as a share of the picture's side."""
    roll: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    light_x: float = 0.0
    """Brightness gradient from left to right, -1..1."""
    light_y: float = -0.2
    exposure: float = 1.0
    warmth: float = 0.0
    blur: float = 0.0
    """Standard deviation as a share of the picture's side."""
    noise: float = 0.0
    """Amount of sensor noise in grey levels; its standard deviation is half of this, mostly shared by the three colours."""
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    droop: float = 0.0
    """Upper lids lowered (positive) for a reason other than an action unit, in face units."""
    brow_drift: float = 0.0
    gap: float = 0.0
    """Lips parted at rest, in face units."""
    skew: float = 0.0
    """How much stronger one side of the face moves than the other, -1..1."""
    occluder: str = ""
    """What stands before the face: nothing, bar, hand or lock (of hair)."""
    occluder_at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Place (x, y) in face units and angle in degrees."""


def shape(identity: Identity, units: Mapping[int, float], view: View | None = None) -> Points:
    """Landmarks (68, 2) in face units, before the projection, of this person moving these action units.

    Args:
        identity: the person.
        units: action unit id (see `FACS`) to intensity 0..1.
        view: its droop, gap, brow drift and skew are part of the shape; None: all zero.

    Raises:
        ValueError: an id that cannot be drawn.
    """
    unknown = sorted(set(units) - set(FACS))
    if unknown:
        raise ValueError(f"action units {unknown} cannot be drawn; there are {sorted(FACS)}")
    view = view or View()
    p = _TEMPLATE.copy()
    side = np.sign(p[:, 0])

    jaw_weight = np.clip((p[:17, 1] + 0.22) / 1.0, 0.0, 1.0)
    p[:17, 0] *= 1.0 + (identity.jaw - 1.0) * jaw_weight
    p[:17, 1] += (identity.chin - 1.0) * jaw_weight**2

    for lids in (slice(36, 42), slice(42, 48)):
        centre = p[lids].mean(axis=0)
        outward = np.sign(centre[0])
        p[lids] = centre + (p[lids] - centre) * identity.eye_size
        p[lids, 1] -= identity.eye_tilt * (p[lids, 0] - centre[0]) * outward
        p[lids, 0] += outward * identity.eye_gap
    brow = p[_BROWS]
    inner = 1.0 - np.abs(np.abs(brow[:, 0]) - 0.17) / 0.63  # 1 at the inner end, 0 at the outer
    brow[:, 1] += identity.brow_height + view.brow_drift + identity.brow_tilt * (inner - 0.5) - identity.brow_arch * 4 * inner * (1 - inner)
    p[_NOSE, 0] *= identity.nose_width
    p[_NOSE, 1] = -0.28 + (p[_NOSE, 1] + 0.28) * identity.nose_length
    mouth = p[_MOUTH]
    middle = 0.715
    mouth[:12, 1] = middle + (mouth[:12, 1] - middle) * identity.lip_fullness
    mouth[:, 0] *= identity.mouth_width
    mouth[:, 1] += identity.mouth_corner * (mouth[:, 0] / 0.37) ** 2
    p[_LOWER_INNER, 1] += view.gap
    p[[56, 57, 58], 1] += view.gap

    strength = 1.0 + np.clip(view.skew * side, -0.9, 0.0)
    lid_opening = {eye: _lid_opening(p, eye) for eye in (36, 42)}
    for unit, intensity in units.items():
        p += _DISPLACEMENT[unit] * (intensity * strength)[:, None]
    p[[37, 38, 43, 44], 1] += view.droop

    # Flesh does not pass through flesh: lids keep a slit, lips keep a thickness and never cross.
    for eye in (36, 42):
        lack = 0.22 * lid_opening[eye] - _lid_opening(p, eye)
        if lack > 0:
            p[[eye + 1, eye + 2], 1] -= lack / 2
            p[[eye + 4, eye + 5], 1] += lack / 2
    overlap = np.maximum(p[_UPPER_INNER, 1] - p[_LOWER_INNER, 1], 0.0)
    p[_UPPER_INNER, 1] -= overlap / 2
    p[_LOWER_INNER, 1] += overlap / 2
    p[[50, 51, 52], 1] = np.minimum(p[[50, 51, 52], 1], p[_UPPER_INNER, 1] - 0.03)
    p[[58, 57, 56], 1] = np.maximum(p[[58, 57, 56], 1], p[_LOWER_INNER, 1] + 0.035)
    p[:, 0] *= identity.width
    return p


def _lid_opening(p: Points, eye: int) -> float:
    return float(p[[eye + 4, eye + 5], 1].mean() - p[[eye + 1, eye + 2], 1].mean())


def project(points: Points, view: View) -> Points:
    """Face units (N, 2) to shares of the picture's side (N, 2): head turn and nod on a curved face, then a similarity."""
    x, y = points[:, 0], points[:, 1]
    z = 0.85 * np.maximum(0.0, 1.0 - (x / 1.1) ** 2 - (y / 1.5) ** 2) - 0.45
    z = z + 0.30 * np.exp(-((x / 0.17) ** 2) - ((y - 0.26) / 0.27) ** 2)  # the nose
    yaw, pitch, roll = (math.radians(a) for a in (view.yaw, view.pitch, view.roll))
    turned = x * math.cos(yaw) + z * math.sin(yaw)
    depth = z * math.cos(yaw) - x * math.sin(yaw)
    nodded = (y - 0.1) * math.cos(pitch) - depth * math.sin(pitch)
    near = 1.0 + 0.06 * (depth * math.cos(pitch) + (y - 0.1) * math.sin(pitch))
    turned, nodded = turned * near, nodded * near
    u = turned * math.cos(roll) - nodded * math.sin(roll)
    v = turned * math.sin(roll) + nodded * math.cos(roll)
    return np.stack([0.5 + view.shift_x + view.scale * u, 0.5 + view.shift_y + view.scale * v], axis=1)


# ------------------------------------------------------------------------------------------------ curves


@functools.lru_cache(maxsize=64)
def _basis(count: int, closed: bool, steps: int) -> Points:
    """Catmull-Rom basis: (samples, count) matrix that takes control points to points on the curve through them."""
    spans = count if closed else count - 1
    t = np.arange(steps) / steps
    weights = 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3], axis=1)
    rows = np.zeros((spans * steps + (not closed), count))
    for span in range(spans):
        for k in range(4):
            i = span + k - 1
            rows[span * steps : (span + 1) * steps, i % count if closed else min(max(i, 0), count - 1)] += weights[:, k]
    if not closed:
        rows[-1, -1] = 1.0
    rows.setflags(write=False)
    return rows


def _curve(points: Points | Sequence[tuple[float, float]], *, steps: int = 5) -> Points:
    array = np.asarray(points, dtype=np.float64)
    return _basis(len(array), False, steps) @ array


def _loop(points: Points | Sequence[tuple[float, float]], *, steps: int = 5) -> Points:
    array = np.asarray(points, dtype=np.float64)
    return _basis(len(array), True, steps) @ array


@functools.lru_cache(maxsize=8)
def _circle(steps: int = 20) -> Points:
    angles = np.arange(steps) * (2 * math.pi / steps)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    return _circle() * (rx, ry) + (x, y)


def _mix(a: Sequence[float], b: Sequence[float], share: float) -> Colour:
    red, green, blue = (max(0, min(255, round(p + (q - p) * share))) for p, q in zip(a, b, strict=True))
    return red, green, blue


class _Sheet:
    """Filled outlines and strokes in face units, projected together (one call is much faster than one each)."""

    def __init__(self) -> None:
        self._points: list[Points] = []
        self._ink: list[tuple[tuple[int, ...] | int, float]] = []

    def fill(self, points: Points, ink: tuple[int, ...] | int) -> None:
        self._points.append(points)
        self._ink.append((ink, 0.0))

    def stroke(self, points: Points, ink: tuple[int, ...] | int, width: float) -> None:
        self._points.append(points)
        self._ink.append((ink, width))

    def onto(self, image: Image.Image, view: View) -> None:
        side = image.width
        pixels = np.round(project(np.concatenate(self._points), view) * (side * 1024)) / 1024
        pen = ImageDraw.Draw(image)
        start = 0
        for points, (ink, width) in zip(self._points, self._ink, strict=True):
            flat = pixels[start : start + len(points)].ravel().tolist()
            start += len(points)
            if width:
                pen.line(flat, fill=ink, width=max(1, round(width * view.scale * side)))
            else:
                pen.polygon(flat, fill=ink)


# ------------------------------------------------------------------------------------------------ drawing

_REFERENCE = 96
"""Side of the grid on which soft things (shading, background) are drawn, whatever the size of the picture."""
_FINE = 280
"""Least side of the canvas on which outlines are drawn before it is reduced to the size of the picture."""


def draw(
    identity: Identity, units: Mapping[int, float], view: View, *, size: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], Points]:
    """Picture (size, size, 3) RGB uint8 and its landmarks (68, 2) in pixels, x and y, of the face as moved.

    Args:
        identity: the person.
        units: action unit id to intensity 0..1.
        view: how the picture is taken.
        size: side in pixels; the scene does not depend on it.
        rng: draws background, skin grain and sensor noise.
    """
    p = shape(identity, units, view)
    factor = max(2, -(-_FINE // size))
    fine = (size * factor, size * factor)

    scene = _background(rng).resize(fine, Image.Resampling.BILINEAR)
    outline = _face_outline(identity, p)
    _base(identity, p, outline).onto(scene, view)
    picture: npt.NDArray[np.float32] = np.asarray(scene.reduce(factor), dtype=np.float32)

    dark, light = Image.new("L", (_REFERENCE, _REFERENCE)), Image.new("L", (_REFERENCE, _REFERENCE))
    face = Image.new("L", (_REFERENCE, _REFERENCE))
    sheet = _Sheet()
    sheet.fill(outline, 255)
    sheet.onto(face, view)
    shadows, lights = _soft(identity, p, units, view)
    shadows.onto(dark, view)
    lights.onto(light, view)
    rim = _array(face.filter(ImageFilter.GaussianBlur(7)))
    skin = _array(face)
    grain = (
        _array(Image.fromarray((rng.random((13, 13)) * 256).astype(np.uint8)).resize((_REFERENCE, _REFERENCE), Image.Resampling.BICUBIC))
        - 0.5
    )
    soft = _array(dark.filter(ImageFilter.GaussianBlur(1.7))) * np.float32(0.55)
    tone = np.float32(1.0) - skin * (np.float32(0.34) * (np.float32(1.0) - rim) + soft + np.float32(0.10) * grain)
    glow = _array(light.filter(ImageFilter.GaussianBlur(2.0))) * skin * np.float32(0.45)
    picture = picture * _grow(tone, size)[:, :, None]
    # A sheen takes most of its colour from the skin: white alone would look like paint on dark skin.
    picture = picture + (np.float32(0.75) * picture + np.float32(25.0)) * _grow(glow, size)[:, :, None]

    parts = Image.new("RGBA", fine)
    _features(identity, p, units, view).onto(parts, view)
    small = np.asarray(parts.convert("RGBa").reduce(factor), dtype=np.float32)  # premultiplied, or the edges would be dark
    picture = picture * (np.float32(1.0) - small[:, :, 3:] / np.float32(255.0)) + small[:, :, :3]

    ramp = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0 / size) - np.float32(1.0)
    light_field = np.float32(1.0) + np.float32(0.5 * view.light_x) * ramp[None, :] + np.float32(0.4 * view.light_y) * ramp[:, None]
    tint = np.asarray([1.0 + view.warmth, 1.0, 1.0 - view.warmth], dtype=np.float32) * np.float32(view.exposure)
    picture = picture * light_field[:, :, None] * tint
    if view.blur > 0:
        flat = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        picture = np.asarray(flat.filter(ImageFilter.GaussianBlur(round(view.blur * size, 3))), dtype=np.float32)
    if view.noise > 0:
        draws: npt.NDArray[np.float32] = rng.random((size, size, 5), dtype=np.float32)
        sensor: npt.NDArray[np.float32] = draws[:, :, :3] + draws[:, :, 3:4] - draws[:, :, 4:] - np.float32(0.5)
        picture = picture + sensor * np.float32(view.noise)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), project(p, view) * size


def _array(image: Image.Image) -> npt.NDArray[np.float32]:
    return np.asarray(image, dtype=np.float32) / np.float32(255.0)


def _grow(field: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    return field if size == len(field) else np.asarray(Image.fromarray(field).resize((size, size), Image.Resampling.BILINEAR))


def _background(rng: np.random.Generator) -> Image.Image:
    """A cluttered room, out of focus to a varying degree."""
    side = _REFERENCE
    corners = (rng.random((2, 2, 3)) * 200 + 30).astype(np.uint8)
    image = Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for kind, *numbers in (rng.random((3 + int(rng.random() * 8), 8)) * 1024).astype(int).tolist():
        x, y, a, b = numbers[0] * side // 1024, numbers[1] * side // 1024, 3 + numbers[2] * 36 // 1024, 3 + numbers[3] * 36 // 1024
        ink = (numbers[4] // 4, numbers[5] // 4, numbers[6] // 4)
        if kind < 400:
            pen.rectangle([x - a, y - b, x + a, y + b], fill=ink)
        elif kind < 700:
            pen.ellipse([x - a, y - b, x + a, y + b], fill=ink)
        else:
            pen.line([x - a, y - b * 2, x + b, y + a * 2], fill=ink, width=2 + a // 6)
    return image.filter(ImageFilter.GaussianBlur(round(rng.random() * 2.5, 3)))


def _face_outline(identity: Identity, p: Points) -> Points:
    w = identity.width
    forehead = [
        (0.97 * w, -0.50),
        (0.86 * w, -0.86),
        (0.58 * w, -1.13),
        (0.0, -1.25),
        (-0.58 * w, -1.13),
        (-0.86 * w, -0.86),
        (-0.97 * w, -0.50),
    ]
    return _loop(np.concatenate([p[:17], np.asarray(forehead)]), steps=3)


def _base(identity: Identity, p: Points, outline: Points) -> _Sheet:
    """Everything behind the features: clothes, hair behind the head, neck, ears, the bare face, beard."""
    sheet, w = _Sheet(), identity.width
    sheet.fill(_loop([(-1.9, 2.4), (-1.6, 1.75), (-0.6, 1.42), (0.6, 1.42), (1.6, 1.75), (1.9, 2.4)], steps=4), identity.clothes)
    if identity.style in ("long", "bob"):
        low = 1.7 if identity.style == "long" else 0.75
        half = [(0.0, -1.62), (0.75 * w, -1.45), (1.17 * w, -0.9), (1.27 * w, 0.0), (1.25 * w, low * 0.7), (0.95 * w, low)]
        sheet.fill(_loop([*half, *[(-x, y) for x, y in reversed(half[1:])]], steps=4), identity.hair)
    elif identity.style != "bald":
        half = [(0.0, -1.55), (0.7 * w, -1.42), (1.06 * w, -0.95), (1.08 * w, -0.4), (1.0 * w, -0.2)]
        sheet.fill(_loop([*half, *[(-x, y) for x, y in reversed(half[1:])]], steps=4), identity.hair)
    neck = _mix(identity.skin, (0, 0, 0), 0.25)
    sheet.fill(np.asarray([(-0.55 * w, 0.7), (0.55 * w, 0.7), (0.62 * w, 1.6), (0.0, 1.8), (-0.62 * w, 1.6)]), neck)
    for s in (-1, 1):
        sheet.fill(_ellipse(s * 1.02 * w, -0.08, 0.12, 0.27), _mix(identity.skin, (60, 20, 10), 0.12))
    sheet.fill(outline, identity.skin)
    if identity.beard > 0:
        stubble = _mix(identity.skin, identity.hair, 0.15 + 0.6 * identity.beard)
        top = _curve(
            np.asarray([p[14], (0.62 * w, 0.52), (0.36 * w, 0.56), (0.0, 0.52), (-0.36 * w, 0.56), (-0.62 * w, 0.52), p[2]]), steps=3
        )
        sheet.fill(np.concatenate([_curve(p[2:15], steps=3), top]), stubble)
    return sheet


def _soft(identity: Identity, p: Points, units: Mapping[int, float], view: View) -> tuple[_Sheet, _Sheet]:
    """Shadows and lights on the skin, grey 0..255; drawn with hard edges, blurred by the caller."""
    dark, light = _Sheet(), _Sheet()
    get = _strengths(units, view)
    light.fill(_ellipse(0.0, -0.85, 0.45, 0.16), 90)
    nose = -1 if view.light_x > 0 else 1
    dark.fill(np.asarray([(0.04 * nose, -0.3), (0.13 * nose, 0.1), tuple(p[35 if nose > 0 else 31]), (0.05 * nose, 0.2)]), 120)
    light.fill(np.asarray([(-0.03, -0.25), (0.03, -0.25), (0.05, 0.2), (0.0, p[30, 1] + 0.03), (-0.05, 0.2)]), 130)
    dark.fill(_ellipse(0.0, p[33, 1] + 0.02, p[35, 0] * 0.9, 0.035), 150)
    dark.fill(_ellipse(0.0, p[57, 1] + 0.05, 0.2, 0.04), 105)
    light.fill(_ellipse(0.0, p[8, 1] - 0.2, 0.14, 0.1), 60)
    for s, eye, inner, corner, ala in ((-1, 36, 21, 48, 31), (1, 42, 22, 54, 35)):
        cx, cy = p[eye : eye + 6].mean(axis=0)
        dark.fill(_ellipse(cx, cy - 0.05, 0.25, 0.15), 75)
        cheek = get(4, s)
        lift = max(cheek, 0.4 * get(8, s))
        light.fill(_ellipse(cx, cy + 0.42 - 0.06 * lift, 0.17 + 0.03 * lift, 0.11 + 0.04 * lift), int(55 + 190 * lift))
        if cheek > 0:
            under = [(cx - 0.24, cy + 0.12), (cx, cy + 0.20), (cx + 0.24, cy + 0.13), (cx, cy + 0.25)]
            dark.fill(_loop(under), int(190 * cheek))
        if lift > 0:
            crescent = [(cx - s * 0.16, cy + 0.47), (cx + s * 0.0, cy + 0.59), (cx + s * 0.22, cy + 0.50), (cx + s * 0.02, cy + 0.66)]
            dark.fill(_loop(crescent), int(170 * lift))
        frown = get(2, s)
        if frown > 0:
            x, y = p[inner]
            dark.fill(np.asarray([(0.0, y - 0.12), (x, y - 0.06), (x, y + 0.10), (0.0, y + 0.13)]), int(190 * frown))
        wrinkle = get(6, s)
        if wrinkle > 0:
            dark.fill(_ellipse(s * 0.14, 0.02, 0.07, 0.17), int(225 * wrinkle))
            light.fill(_ellipse(s * 0.25, 0.16, 0.08, 0.10), int(150 * wrinkle))
        fold = max(0.55 * identity.age, get(8, s), 0.8 * get(7, s), 0.4 * get(6, s))
        ax, ay = p[ala]
        mx, my = p[corner]
        line = _curve([(ax + s * 0.04, ay - 0.08), (ax + s * 0.16, ay + 0.06), (mx + s * 0.11, my - 0.10), (mx + s * 0.10, my + 0.05)])
        dark.stroke(line, int(60 + 160 * fold), 0.07)
        sag = get(10, s)
        if sag > 0:
            dark.fill(_ellipse(mx + s * 0.03, my + 0.08, 0.06, 0.08), int(150 * sag))
        stretch = get(12, s)
        if stretch > 0:
            dark.fill(_ellipse(mx + s * 0.07, my + 0.03, 0.05, 0.16), int(180 * stretch))
    press = max(get(13), get(14))
    if press > 0:
        light.fill(_ellipse(0.0, p[51, 1] - 0.07, 0.22, 0.05), int(150 * press))
        light.fill(_ellipse(0.0, p[57, 1] + 0.07, 0.22, 0.05), int(170 * press))
    boss = get(11)
    if boss > 0:
        y = (p[57, 1] + p[8, 1]) / 2
        dark.stroke(_curve([(-0.26, y + 0.02), (-0.12, y - 0.10), (0.12, y - 0.10), (0.26, y + 0.02)]), int(210 * boss), 0.07)
        light.fill(_ellipse(0.0, y + 0.04, 0.13, 0.08), int(170 * boss))
    return dark, light


class _strengths:  # noqa: N801 - used like a function
    """Intensity of an action unit on one side (-1 left of the picture, 1 right, 0 the middle) under the view's skew."""

    def __init__(self, units: Mapping[int, float], view: View) -> None:
        self._units = units
        self._skew = view.skew

    def __call__(self, unit: int, side: int = 0) -> float:
        return self._units.get(unit, 0.0) * (1.0 + min(0.0, max(-0.9, self._skew * side)))


def _features(identity: Identity, p: Points, units: Mapping[int, float], view: View) -> _Sheet:
    """Outlined parts, back to front, in RGBA."""
    sheet = _Sheet()
    line = _mix(identity.skin, (45, 15, 10), 0.55)
    _wrinkles(sheet, identity, p, _strengths(units, view), line)
    _nose(sheet, p, line)
    _mouth(sheet, identity, p)
    for s, eye in ((-1, 36), (1, 42)):
        _eye(sheet, identity, p[eye : eye + 6], s, view, line)
    for brow in (p[17:22], p[26:21:-1]):
        taper = np.asarray([0.25, 0.8, 1.0, 1.05, 0.8]) * identity.brow_thickness
        upper, lower = brow.copy(), brow.copy()
        upper[:, 1] -= taper * 0.5
        lower[:, 1] += taper * 0.5
        ink = _mix(_mix(identity.hair, (20, 12, 8), 0.45), identity.skin, 0.08)
        sheet.fill(np.concatenate([_curve(upper, steps=4), _curve(lower, steps=4)[::-1]]), (*ink, 240))
    _hair_and_glasses(sheet, identity, p)
    _occluder(sheet, identity, view)
    return sheet


def _wrinkles(sheet: _Sheet, identity: Identity, p: Points, get: _strengths, line: Colour) -> None:
    def crease(points: Sequence[tuple[float, float]], strength: float, width: float = 0.02) -> None:
        if strength > 0.08:
            sheet.stroke(_curve(points, steps=4), (*line, min(255, int(235 * strength))), width * (0.6 + 0.5 * strength))

    for s, eye, outer, inner, corner, ala in ((-1, 36, 17, 21, 48, 31), (1, 45, 26, 22, 54, 35)):
        step = 1 if s < 0 else -1
        arch = [tuple(q) for q in p[[outer, outer + step, outer + 2 * step, outer + 3 * step, inner]]]
        for k in range(3):
            up = 0.13 + 0.085 * k
            crease([(0.0, arch[4][1] - up), *[(x, y - up) for x, y in (arch[4], arch[3])]], max(get(0, s), 0.35 * identity.age), 0.022)
            crease([(x, y - up) for x, y in arch[:4]], max(get(1, s), 0.35 * identity.age), 0.022)
        frown = get(2, s)
        ix, iy = p[inner]
        crease([(ix * 0.52, iy - 0.12), (ix * 0.42, iy), (ix * 0.55, iy + 0.10)], frown, 0.032)
        ex, ey = p[eye]
        for k in (-1, 0, 1):
            crease([(ex + s * 0.05, ey + 0.02 * k), (ex + s * 0.17, ey + 0.08 * k - 0.01)], get(4, s), 0.018)
        tight = max(get(5, s), 0.7 * get(4, s))
        low = p[[41, 40]].mean(axis=0) if s < 0 else p[[46, 47]].mean(axis=0)
        crease(
            [(low[0] - 0.17, low[1] + 0.045), (low[0], low[1] + 0.085), (low[0] + 0.17, low[1] + 0.045)],
            max(tight, 0.3 * identity.age),
            0.02,
        )
        for k in range(3):
            y = -0.17 + 0.085 * k
            crease([(s * 0.02, y - 0.02), (s * 0.10, y + 0.02), (s * 0.17, y + 0.075)], get(6, s), 0.028)
        ax, ay = p[ala]
        mx, my = p[corner]
        fold = max(get(8, s), 0.85 * get(7, s), 0.6 * get(6, s), 0.45 * identity.age)
        end = 1.0 if get(8, s) > 0.1 else 0.55
        way = [(ax + s * 0.04, ay - 0.09), (ax + s * 0.15, ay + 0.04), (mx + s * 0.12, my - 0.11), (mx + s * 0.13, my + 0.04)]
        crease(way if end == 1.0 else way[:3], fold, 0.022)
        crease([(mx + s * 0.03, my - 0.05), (mx + s * 0.055, my), (mx + s * 0.03, my + 0.05)], max(get(8, s), get(12, s)), 0.022)
        crease(
            [(mx + s * 0.01, my + 0.03), (mx + s * 0.06, my + 0.10), (mx + s * 0.06, my + 0.2)], max(get(10, s), 0.25 * identity.age), 0.024
        )
        crease([(mx + s * 0.0, my + 0.08), (mx - s * 0.06, my + 0.19), (mx - s * 0.16, my + 0.24)], get(19, s), 0.024)
        for k in range(2):
            x = s * (0.06 + 0.09 * k)
            crease([(x, p[51, 1] - 0.03), (x * 1.08, p[51, 1] - 0.11)], max(get(13), get(14)) * 0.8, 0.014)
    boss = get(11)
    y = (p[57, 1] + p[8, 1]) / 2
    crease([(-0.18, y - 0.02), (-0.08, y - 0.10), (0.08, y - 0.10), (0.18, y - 0.02)], boss, 0.024)
    for x, dy in ((-0.09, 0.03), (0.03, 0.0), (0.10, 0.05), (-0.02, 0.08)):
        crease([(x, y + dy), (x + 0.02, y + dy + 0.02)], boss, 0.03)


def _nose(sheet: _Sheet, p: Points, line: Colour) -> None:
    for s, ala, nostril in ((-1, 31, 32), (1, 35, 34)):
        ax, ay = p[ala]
        sheet.stroke(
            _curve([(ax - s * 0.0, ay - 0.10), (ax + s * 0.035, ay - 0.03), (ax + s * 0.01, ay + 0.025), (ax - s * 0.05, ay + 0.02)]),
            (*line, 200),
            0.022,
        )
        nx, ny = p[nostril]
        sheet.fill(_ellipse(nx, ny - 0.015, 0.05, 0.024), (*_mix(line, (0, 0, 0), 0.45), 230))
    sheet.stroke(_curve([(p[32, 0] * 0.6, p[33, 1] - 0.005), tuple(p[33]), (p[34, 0] * 0.6, p[33, 1] - 0.005)]), (*line, 170), 0.018)


def _mouth(sheet: _Sheet, identity: Identity, p: Points) -> None:
    upper_out, lower_out = _curve(p[48:55], steps=4), _curve(p[[48, 59, 58, 57, 56, 55, 54]], steps=4)
    upper_in, lower_in = _curve(p[60:65], steps=6), _curve(p[[60, 67, 66, 65, 64]], steps=6)
    lower_in[:, 1] = np.maximum(lower_in[:, 1], upper_in[:, 1])
    if identity.moustache > 0:
        nose = p[33, 1]
        half = [(0.0, nose + 0.08), (0.22, nose + 0.11), (p[54, 0] + 0.05, p[54, 1] - 0.03), (0.2, p[52, 1] + 0.01), (0.0, p[51, 1] + 0.01)]
        hair = _loop([*half, *[(-x, y) for x, y in reversed(half[1:4])]], steps=4)
        sheet.fill(hair, (*_mix(identity.skin, identity.hair, 0.3 + 0.65 * identity.moustache), 255))
    inside = (48, 14, 16, 255)
    opening = float((lower_in[:, 1] - upper_in[:, 1]).max())
    sheet.fill(np.concatenate([upper_in, lower_in[::-1]]), inside)
    if opening > 0.16:
        wide = float(p[64, 0] - p[60, 0])
        tongue = _ellipse((p[60, 0] + p[64, 0]) / 2, p[66, 1] - 0.02, 0.24 * wide, 0.38 * opening)
        sheet.fill(_between(tongue, upper_in, lower_in), (150, 62, 66, 255))
    if opening > 0.012:
        teeth = upper_in.copy()
        # The jaw drops away from the upper teeth, which then stand back behind the lip.
        teeth[:, 1] = np.minimum(upper_in[:, 1] + 0.085 - 0.12 * min(opening, 0.35), lower_in[:, 1])
        cut = 2 if opening < 0.16 else 4
        sheet.fill(np.concatenate([upper_in[cut:-cut], teeth[cut:-cut][::-1]]), (236, 230, 218, 255))
        bottom = lower_in.copy()
        bottom[:, 1] = np.maximum(lower_in[:, 1] - min(0.06, max(0.0, opening - 0.12)), upper_in[:, 1])
        sheet.fill(np.concatenate([lower_in[5:-5], bottom[5:-5][::-1]]), (214, 206, 192, 255))
    sheet.fill(np.concatenate([upper_out, upper_in[::-1]]), (*_mix(identity.lip, (0, 0, 0), 0.12), 255))
    sheet.fill(np.concatenate([lower_in, lower_out[::-1]]), (*identity.lip, 255))
    glint = _ellipse((p[57, 0] + p[66, 0]) / 2, (p[57, 1] + p[66, 1]) / 2, 0.09, 0.014)
    sheet.fill(glint, (*_mix(identity.lip, (255, 255, 255), 0.25), 255))
    seam = (*_mix(identity.lip, (20, 5, 5), 0.75), 255)
    sheet.stroke(np.concatenate([p[48:49], upper_in, p[54:55]]), seam, 0.022)
    if opening > 0.012:
        sheet.stroke(lower_in, seam, 0.014)


def _between(points: Points, upper: Points, lower: Points) -> Points:
    """The outline cut off above one curve and below the other (both with x ascending)."""
    x = points[:, 0]
    return np.stack([x, np.clip(points[:, 1], np.interp(x, upper[:, 0], upper[:, 1]), np.interp(x, lower[:, 0], lower[:, 1]))], axis=1)


def _eye(sheet: _Sheet, identity: Identity, eye: Points, side: int, view: View, line: Colour) -> None:
    """One eye from its six landmarks, which run from the left corner over the upper lid to the right one and back."""
    upper, lower = _curve(eye[:4], steps=6), _curve(eye[[0, 5, 4, 3]], steps=6)
    lower[:, 1] = np.maximum(lower[:, 1], upper[:, 1])
    fold = upper.copy()
    fold[:, 1] -= 0.055
    sheet.stroke(fold[2:-2], (*line, 150), 0.018)
    sheet.fill(np.concatenate([upper, lower[::-1]]), (238, 234, 228, 255))
    cx, cy = eye[[0, 3]].mean(axis=0)
    # The eyeball does not move with the lids, so raised lids show white above the iris and tightened ones cover it.
    x, y, radius = cx + view.gaze_x, cy - 0.03 + view.gaze_y, 0.098 * identity.eye_size
    ball = _between(_ellipse(x, y, radius, radius), upper, lower)
    sheet.fill(ball, (*_mix(identity.iris, (0, 0, 0), 0.35), 255))
    sheet.fill(_between(_ellipse(x, y, radius * 0.82, radius * 0.82), upper, lower), (*identity.iris, 255))
    sheet.fill(_between(_ellipse(x, y, radius * 0.45, radius * 0.45), upper, lower), (12, 8, 8, 255))
    sheet.fill(_between(_ellipse(x - 0.03, y - 0.03, 0.02, 0.02), upper, lower), (250, 250, 250, 255))
    sheet.stroke(upper, (*_mix(line, (10, 5, 5), 0.75), 255), 0.036)
    sheet.stroke(lower, (*_mix(line, (30, 10, 10), 0.2), 220), 0.016)
    sheet.fill(
        _ellipse(eye[3 if side < 0 else 0, 0] - side * 0.01, eye[3 if side < 0 else 0, 1], 0.018, 0.014),
        (*_mix(identity.skin, (200, 80, 80), 0.4), 255),
    )


def _hair_and_glasses(sheet: _Sheet, identity: Identity, p: Points) -> None:
    w = identity.width
    ink = (*identity.hair, 255)
    if identity.style != "bald":
        low = -0.98 + 0.42 * identity.fringe
        part = 0.45 if identity.style == "side" else 0.0
        top = [
            (-1.05 * w, -0.45),
            (-1.04 * w, -0.95),
            (-0.65 * w, -1.45),
            (0.0, -1.6),
            (0.65 * w, -1.45),
            (1.04 * w, -0.95),
            (1.05 * w, -0.45),
        ]
        inner = [
            (0.94 * w, -0.55),
            (0.80 * w, low + 0.12),
            (0.45 * w, low - part * 0.55),
            (0.0, low - part * 0.1),
            (-0.45 * w, low + part * 0.1),
        ]
        sheet.fill(np.concatenate([_curve(top, steps=4), _curve([*inner, (-0.80 * w, low + 0.14), (-0.94 * w, -0.55)], steps=4)]), ink)
        strand = (*_mix(identity.hair, (255, 255, 255), 0.14), 255)
        for x in (-0.62, -0.2, 0.22, 0.6):
            sheet.stroke(_curve([(x * 0.8 * w, -1.4), (x * 1.05 * w, -1.15), (x * 1.1 * w, min(low - 0.03, -0.9))], steps=4), strand, 0.02)
    if identity.glasses > 0:
        rim = (*_mix(identity.clothes, (15, 15, 18), 0.75), 255)
        loops = []
        for eye in (p[36:42], p[42:48]):
            cx, cy = float(eye[[0, 3], 0].mean()), -0.2
            loops.append((cx, cy))
            ring = _loop(
                [
                    (cx - 0.29, cy - 0.12),
                    (cx, cy - 0.2),
                    (cx + 0.29, cy - 0.12),
                    (cx + 0.26, cy + 0.15),
                    (cx, cy + 0.22),
                    (cx - 0.26, cy + 0.15),
                ],
                steps=4,
            )
            if identity.tinted:
                for k in np.linspace(-0.26, 0.26, 12):  # thin slats: the canvas replaces, so a see-through lens is drawn as a screen
                    reach = 0.19 - 1.0 * k * k
                    sheet.stroke(np.asarray([(cx + k, cy - reach * 0.9), (cx + k, cy + reach)]), (30, 30, 36, 120), 0.018)
            sheet.stroke(np.concatenate([ring, ring[:2]]), rim, identity.glasses)
        sheet.stroke(_curve([(loops[0][0] + 0.28, -0.24), (0.0, -0.29), (loops[1][0] - 0.28, -0.24)]), rim, identity.glasses)
        for s in (-1, 1):
            sheet.stroke(np.asarray([(loops[(s + 1) // 2][0] + s * 0.29, -0.28), (s * 1.0 * w, -0.25)]), rim, identity.glasses)


def _occluder(sheet: _Sheet, identity: Identity, view: View) -> None:
    x, y, angle = view.occluder_at
    turn = math.radians(angle)
    along, across = np.asarray([math.cos(turn), math.sin(turn)]), np.asarray([-math.sin(turn), math.cos(turn)])
    at = np.asarray([x, y])
    if view.occluder == "bar":
        sheet.stroke(np.stack([at - 2.6 * along, at + 2.6 * along]), (*_mix(identity.clothes, (20, 20, 20), 0.8), 255), 0.24)
    elif view.occluder == "hand":
        edge = (*_mix(identity.skin, (50, 20, 10), 0.5), 255)
        for k in range(4):
            start = at + across * (0.17 * k)
            tip = start + along * (0.75 - 0.09 * (k - 1.4) ** 2)
            for ink, width in ((edge, 0.185), ((*_mix(identity.skin, (255, 200, 170), 0.1), 255), 0.15)):
                sheet.stroke(np.stack([start - 2.0 * along, tip]), ink, width)
                sheet.fill(_circle() * (width / 2) + tip, ink)
    elif view.occluder == "lock":
        for k in range(3):
            shift = np.asarray([0.06 * k, 0.02 * k])
            way = _curve(np.stack([(x * 0.5, -1.4), (x * 1.1, -0.9), (x * 1.25 + 0.05, -0.5), (x * 1.2, y + 0.1)]) + shift, steps=5)
            sheet.stroke(way, (*_mix(identity.hair, (255, 255, 255), 0.05 * k), 255), 0.11 - 0.02 * k)
