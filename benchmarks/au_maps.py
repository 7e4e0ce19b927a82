"""AU maps per second on one thread: `bench.au.action_unit_maps` beside the published procedure done with OpenCV.

    OMP_NUM_THREADS=1 python benchmarks/au_maps.py [--seconds 2] [--batch 256]

OpenCV is not a dependency of the project: `pip install opencv-python-headless` for this benchmark. The OpenCV side
draws face by face, as the published code does; where its ellipses lie is computed beforehand and not timed, so the
comparison favours it. Large canvases make it depend on how fast the system hands out fresh memory: with
MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000 in the environment (glibc) both sides reuse theirs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from bench.au import GRID, action_unit_maps
from bench.au.codebook import EXPRESSION_UNITS, OFFICIAL, Axis, Ellipse
from bench.dataset import EXPRESSIONS

try:
    import cv2
except ImportError:
    raise SystemExit("this benchmark compares with OpenCV, which is not installed: pip install opencv-python-headless") from None

FRAME = 224


def faces(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upright faces of changing size and place around a mean shape, and the six expressions in turn."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linspace(torch.pi, 0, 17)
    jaw = torch.stack([112 + 95 * turn.cos(), 90 + 115 * turn.sin()], 1)
    line = torch.linspace(0, 1, 5)
    brows = torch.stack([torch.cat([30 + 65 * line, 129 + 65 * line]), torch.full((10,), 55.0)], 1)
    bridge = torch.stack([torch.full((4,), 112.0), torch.linspace(75, 120, 4)], 1)
    nostrils = torch.stack([94 + 36 * line, torch.full((5,), 130.0)], 1)

    def ring(x: float, y: float, rx: float, ry: float, count: int) -> torch.Tensor:
        angle = torch.pi + 2 * torch.pi * torch.arange(count) / count
        return torch.stack([x + rx * angle.cos(), y + ry * angle.sin()], 1)

    mean = torch.cat(
        [
            jaw,
            brows,
            bridge,
            nostrils,
            ring(65, 80, 18, 7, 6),
            ring(159, 80, 18, 7, 6),
            ring(112, 165, 36, 15, 12),
            ring(112, 165, 25, 6, 8),
        ]
    )
    assert mean.shape == (68, 2)
    landmarks = mean + 2 * torch.randn(count, 68, 2, generator=generator) + 6 * torch.randn(count, 1, 2, generator=generator)
    return landmarks, torch.arange(count) % 6 + 1


def drawn(ellipse: Ellipse, face: list[list[float]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Centre and radii of one published ellipse in whole pixels."""

    def pixels(length: float | Fraction) -> int:
        return round(length * FRAME) if isinstance(length, Fraction) else int(length)

    def along(axis: Axis, coordinate: int) -> tuple[int, int]:
        low, high = (int(face[ends[0]][coordinate]) for ends in (axis.low, axis.high))
        radius = max(int((high - low + axis.grow) / 2), 0) or int(axis.floor)
        return int((low + high) / 2) + pixels(axis.shift), radius if axis.radius is None else pixels(axis.radius)

    (x, rx), (y, ry) = along(ellipse.x, 0), along(ellipse.y, 1)
    return (x, y), (rx, ry)


def opencv_map(drawings: list[list[tuple[tuple[int, int], tuple[int, int]]]]) -> np.ndarray:
    """The published steps for one face, one canvas per action unit."""
    layers = []
    for drawing in drawings:
        canvas = np.full((FRAME, FRAME), 1e-4)
        empty = canvas.copy()
        for centre, radii in drawing:
            cv2.ellipse(canvas, centre, radii, 0, 0, 360, (255, 255, 255), cv2.FILLED)
        if (canvas - empty).sum() > 0:
            layers.append(cv2.resize(cv2.blur(cv2.resize(canvas, (GRID, GRID)), (3, 3)), (FRAME, FRAME)))
    top = np.max(layers, axis=0).astype(np.float32)
    return (top - top.min()) / (top.max() - top.min())


def rate(run: Callable[[], int], seconds: float) -> float:
    """Maps per second: median over five rounds."""
    run()
    rounds = []
    for _ in range(5):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5:
            done += run()
        rounds.append(done / (time.perf_counter() - start))
    return sorted(rounds)[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement")
    parser.add_argument("--batch", type=int, default=256, help="faces per call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    landmarks, expressions = faces(options.batch)

    jobs = [
        [[drawn(ellipse, face) for ellipse in OFFICIAL[unit]] for unit in EXPRESSION_UNITS[EXPRESSIONS[expression]]]
        for face, expression in zip(landmarks.tolist(), expressions.tolist(), strict=True)
    ]
    own = action_unit_maps(landmarks, expressions, frame=FRAME, size=FRAME).maps.flatten(1)
    other = torch.from_numpy(np.stack([opencv_map(job) for job in jobs])).flatten(1)
    print(f"agreement: mean cosine {torch.cosine_similarity(own, other).mean():.5f}")

    def opencv() -> int:
        for job in jobs[:64]:
            opencv_map(job)
        return 64

    def bench(size: int, variant: str) -> Callable[[], int]:
        def run() -> int:
            action_unit_maps(landmarks, expressions, frame=FRAME, size=size, variant=variant)
            return len(landmarks)

        return run

    base = rate(opencv, options.seconds)
    print(f"opencv {cv2.__version__:<12} {FRAME:>4} px {base:>9.0f} maps/s")
    for variant in ("official", "symmetric"):
        for size in (FRAME, GRID):
            found = rate(bench(size, variant), options.seconds)
            print(f"bench.au {variant:<10} {size:>4} px {found:>9.0f} maps/s  {found / base:5.1f} x")


if __name__ == "__main__":
    main()
