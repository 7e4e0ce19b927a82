"""ROAD: pixels are not deleted but imputed from their neighbours, so that the shape of the removed area tells the network little."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evaluation.measures.base import Column, Explained, confidence, measure
from bench.evaluation.measures.ranks import relevance_ranks

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the pixels that are imputed."""
NOISE = 0.01
"""Standard deviation added to imputed pixels, in units of normalised pictures."""
ITERATIONS = 12
"""Iterations of the solver. The error of the worst pixel is then below `NOISE` / 10."""

_COARSEST = 4
_DAMPING = 0.8


@measure(
    Column("road", "ROAD", "higher"),
    Column("road_most", "ROAD, most relevant imputed", "lower"),
    Column("road_least", "ROAD, least relevant imputed", "higher"),
    passes=2 * len(SHARES),
)
def road(explained: Explained) -> dict[str, Tensor]:
    """Confidence in the predicted class, mean over the shares imputed; ``road``: (least relevant - most relevant imputed) / 2.

    Rong et al., ICML 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods.
    """
    images, ranks = explained.images, relevance_ranks(explained.map_predicted)
    pixels = ranks[0].numel()
    # One field of noise for all pictures: a sample's figure must not depend on the rest of its batch.
    noise = NOISE * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images.device)
    curves: dict[str, list[Tensor]] = {"road_most": [], "road_least": []}
    for share in SHARES:
        count = round(share * pixels)
        for name, missing in (("road_most", ranks < count), ("road_least", ranks >= pixels - count)):
            imputed = impute(images, missing) + noise * missing[:, None]
            curves[name].append(confidence(explained.classifier, imputed, explained.predicted))
    means = {name: torch.stack(curve).mean(dim=0) for name, curve in curves.items()}
    return {"road": (means["road_least"] - means["road_most"]) / 2, **means}


def impute(images: Tensor, missing: Tensor) -> Tensor:
    """Give each missing pixel the weighted mean of its neighbours, missing ones included: Rong et al., eq. 5, without the noise.

    The weights are 1/6 for the four nearest and 1/12 for the four diagonal neighbours, over the sum of those inside of the picture. That
    is a sparse, symmetric, positive definite system for each picture. All systems are solved together by conjugate gradients,
    preconditioned by one multigrid V-cycle. The number of iterations is fixed, so that no picture's result depends on its batch.

    Args:
        images: (B, C, S, S).
        missing: (B, S, S) bool; at least one pixel of each picture is known.

    Returns:
        (B, C, S, S), the known pixels as they are.
    """
    levels = _make_levels(missing[:, None].to(images.dtype))
    finest = levels[0]
    solution = images * (1 - finest.missing)
    residual = -_apply(finest, solution)
    direction = preconditioned = _cycle(levels, residual)
    size = _dot(residual, preconditioned)
    for _ in range(ITERATIONS):
        applied = _apply(finest, direction)
        step = _ratio(size, _dot(direction, applied))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, applied, value=-1)
        preconditioned = _cycle(levels, residual)
        before, size = size, _dot(residual, preconditioned)
        direction = preconditioned + _ratio(size, before) * direction
    return solution


class _Level(NamedTuple):
    """A resolution of the system, as in multigrid."""

    missing: Tensor
    """(B, 1, h, w), 1 = missing."""
    weight: Tensor
    """(1, 1, h, w), sum of the weights of the neighbours inside of the picture."""


def _make_levels(missing: Tensor) -> list[_Level]:
    """From fine to coarse. A coarse pixel is missing if all of its four fine pixels are; the finer levels solve the rest."""
    levels = [_Level(missing, _neighbours(torch.ones_like(missing[:1])))]
    while missing.shape[-1] > _COARSEST:
        odd = missing.shape[-1] % 2
        missing = (F.avg_pool2d(F.pad(missing, (0, odd, 0, odd), value=1.0), 2) == 1).to(missing.dtype)
        levels.append(_Level(missing, _neighbours(torch.ones_like(missing[:1]))))
    return levels


def _neighbours(x: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours: (1, 2, 1) along both axes over 12, without the pixel itself."""
    padded = F.pad(x, (1, 1, 1, 1))
    # In place where possible: this is nearly all of the solver's work, and bound by memory.
    rows = torch.add(padded[..., :-2, :], padded[..., 1:-1, :], alpha=2).add_(padded[..., 2:, :])
    return torch.add(rows[..., :-2], rows[..., 1:-1], alpha=2).add_(rows[..., 2:]).sub_(x, alpha=4).div_(12)


def _apply(level: _Level, x: Tensor) -> Tensor:
    return level.missing * (level.weight * x - _neighbours(x))


def _cycle(levels: list[_Level], residual: Tensor) -> Tensor:
    """A symmetric V-cycle: damped Jacobi, the correction of the coarser level, damped Jacobi."""
    level, *coarser = levels
    smoothing = _DAMPING * level.missing / level.weight
    smoothed = smoothing * residual
    if coarser:
        side = residual.shape[-1]
        odd = side % 2
        coarse = 4 * F.avg_pool2d(F.pad(residual - _apply(level, smoothed), (0, odd, 0, odd)), 2)
        correction = _cycle(coarser, coarser[0].missing * coarse)
        smoothed = smoothed + level.missing * correction.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)[..., :side, :side]
    return smoothed + smoothing * (residual - _apply(level, smoothed))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(2, 3), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """A / b of each system; 0 where b is 0, because that system is solved."""
    return a / b.masked_fill(b == 0, float("inf"))
