"""Pictures of the site: curves of a training as SVG, strips of maps and faces. The same data give the same bytes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from bench.evaluation.class_maps import Bytes

CURVES = (442, 278)
"""Width and height of a picture of curves, in CSS pixels."""
SCALE = 2
"""CSS pixels a pixel of a map."""
_GAP = 1  # white, on each side of a tile, in pixels of a map
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and dashes say the same.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture as a page shows it."""

    file: str
    """Relative to the root of the site."""
    alt: str
    width: int
    """In CSS pixels."""
    height: int


def draw_curves(epochs: Sequence[Mapping[str, Any]], *, names: Sequence[str], label: str) -> tuple[bytes, str]:
    """Lines over the epochs, as SVG, and what they show in words; at most two.

    Args:
        epochs: a record's `epochs`; those without a value are left out of its line.
        names: keys of them.
        label: of the vertical axis.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(CURVES[0] / 96, CURVES[1] / 96))
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.78))  # a layout engine would double the time
        words = []
        for name, line in zip(names, _LINES, strict=False):
            points = [(entry["epoch"], entry[name]) for entry in epochs if isinstance(entry.get(name), int | float)]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, markersize=3.5, **line)
            words.append(f"{name} from {points[0][1]:.3g} in epoch {points[0][0]} to {points[-1][1]:.3g} in epoch {points[-1][0]}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(words) > 1:
            axes.legend(frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue(), f"Curve of {label}: {'; '.join(words)}."


def draw_strip(maps: Bytes, *, shown: Sequence[bool] | None = None) -> bytes:
    """(M, h, w) maps side by side as PNG in viridis, which is monotonous in lightness and safe for colour-blind eyes.

    Args:
        maps: 0 to 255.
        shown: which of them; the others stay white.
    """
    count, height, width = maps.shape
    strip = np.zeros((height + 2 * _GAP, count * (width + 2 * _GAP)), dtype=np.uint8)
    for number, tile in enumerate(maps):
        if shown is None or shown[number]:
            left = number * (width + 2 * _GAP) + _GAP
            strip[_GAP:-_GAP, left : left + width] = np.maximum(tile, 1)  # 0 is the white between the tiles
    colours = (mpl.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    colours[0] = 255
    picture = Image.fromarray(strip)
    picture.putpalette(colours.tobytes())
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()


def draw_faces(faces: Sequence[npt.NDArray[np.uint8]], *, side: int) -> bytes:
    """(S, S, 3) pictures side by side as JPEG, each ``side`` pixels wide, spaced like the maps of a strip of that size."""
    gap = _GAP * SCALE
    strip = Image.new("RGB", (len(faces) * (side + 2 * gap), side + 2 * gap), "white")
    for number, face in enumerate(faces):
        strip.paste(Image.fromarray(face).resize((side, side), Image.Resampling.LANCZOS), (number * (side + 2 * gap) + gap, gap))
    out = io.BytesIO()
    strip.save(out, format="JPEG", quality=88)
    return out.getvalue()


def tile_size(side: int) -> int:
    """Width and height of one tile of a strip with its white border, in CSS pixels."""
    return (side + 2 * _GAP) * SCALE
