"""A face made of 68 landmarks, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

MIRROR = torch.tensor(
    [
        *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
        *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65,
    ]
)  # fmt: skip
"""The landmark that each landmark becomes in a mirror."""


def faces(count: int, *, seed: int = 0, frame: int = 224, noise: float = 2.0) -> Tensor:
    """(count, 68, 2) float64: upright, jittered faces that fill most of the frame."""
    generator = torch.Generator().manual_seed(seed)

    def ring(x: float, y: float, rx: float, ry: float, points: int) -> Tensor:
        angle = torch.pi + 2 * torch.pi * torch.arange(points) / points
        return torch.stack([x + rx * angle.cos(), y + ry * angle.sin()], 1)

    turn, line = torch.linspace(torch.pi, 0, 17), torch.linspace(0, 1, 5)
    jaw = torch.stack([112 + 95 * turn.cos(), 90 + 115 * turn.sin()], 1)
    brows = torch.stack([torch.cat([30 + 65 * line, 129 + 65 * line]), torch.full((10,), 55.0)], 1)
    bridge = torch.stack([torch.full((4,), 112.0), torch.linspace(75, 120, 4)], 1)
    nostrils = torch.stack([94 + 36 * line, torch.full((5,), 130.0)], 1)
    eyes = (ring(65, 80, 18, 7, 6), ring(159, 80, 18, 7, 6))
    mean = torch.cat([jaw, brows, bridge, nostrils, *eyes, ring(112, 165, 36, 15, 12), ring(112, 165, 25, 6, 8)]).double()
    assert mean.shape == (68, 2)
    moved = mean + noise * torch.randn(count, 68, 2, generator=generator, dtype=torch.float64)
    moved = moved + 6 * torch.randn(count, 1, 2, generator=generator, dtype=torch.float64)
    return (moved + 0.5) * frame / 224 - 0.5


def mirrored(landmarks: Tensor, *, frame: int) -> Tensor:
    """The landmarks of the mirrored picture."""
    return torch.stack([frame - 1 - landmarks[..., 0], landmarks[..., 1]], -1)[:, MIRROR]
