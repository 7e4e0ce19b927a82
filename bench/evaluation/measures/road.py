"""ROAD: pixels are not deleted but imputed from their neighbours, so that the holes themselves say little."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evaluation.measures.base import Column, Explained, Measure, confidence
from bench.evaluation.measures.ranks import relevance_ranks

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the pixels that are imputed."""
NOISE = 0.01
"""Standard deviation added to imputed pixels, in units of normalised pictures."""
ITERATIONS = 12
"""Of the solver: it then errs by less than `NOISE` / 10 in the worst pixel."""

_COARSEST = 4
_DAMPING = 0.8


def _road(seen: Explained) -> dict[str, Tensor]:
    ranks = relevance_ranks(seen.map_predicted)
    pixels = ranks[0].numel()
    # One field of noise for all pictures: a sample's figure must not depend on what else is in its batch.
    noise = NOISE * torch.randn(seen.images.shape[1:], generator=torch.Generator().manual_seed(0)).to(seen.images.device)
    curves: dict[str, list[Tensor]] = {"road_most": [], "road_least": []}
    for share in SHARES:
        count = round(share * pixels)
        for name, missing in (("road_most", ranks < count), ("road_least", ranks >= pixels - count)):
            left = impute(seen.images, missing) + noise * missing[:, None]
            curves[name].append(confidence(seen.classifier, left, seen.predicted))
    found = {name: torch.stack(curve).mean(dim=0) for name, curve in curves.items()}
    return {"road": (found["road_least"] - found["road_most"]) / 2, **found}


def impute(images: Tensor, missing: Tensor) -> Tensor:
    """Give each missing pixel the weighted mean of its neighbours, missing ones included: Rong et al., eq. 5, without the noise.

    The weights are 1/6 for the four nearest and 1/12 for the four diagonal neighbours, over the sum of those inside of the picture. That
    is a sparse, symmetric, positive definite system for each picture. All are solved together by conjugate gradients, preconditioned by
    one multigrid V-cycle, in a fixed number of iterations: a picture's result does not depend on the others.

    Args:
        images: (B, C, S, S).
        missing: (B, S, S) bool; at least one pixel of each picture is known.

    Returns:
        (B, C, S, S), the known pixels as they are.
    """
    grids = _grids(missing[:, None].to(images.dtype))
    finest = grids[0]
    solution = images * (1 - finest.missing)
    residual = -_apply(finest, solution)
    direction = preconditioned = _cycle(grids, residual)
    size = _dot(residual, preconditioned)
    for _ in range(ITERATIONS):
        applied = _apply(finest, direction)
        step = _ratio(size, _dot(direction, applied))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, applied, value=-1)
        preconditioned = _cycle(grids, residual)
        before, size = size, _dot(residual, preconditioned)
        direction = preconditioned + _ratio(size, before) * direction
    return solution


class _Grid(NamedTuple):
    """A resolution of the system."""

    missing: Tensor
    """(B, 1, h, w), 1 = missing."""
    weight: Tensor
    """(1, 1, h, w), sum of the weights of the neighbours inside of the picture."""


def _grids(missing: Tensor) -> list[_Grid]:
    """From fine to coarse. A coarse pixel is missing if all four it stands for are: what lies between is left to the finer grids."""
    grids = [_Grid(missing, _neighbours(torch.ones_like(missing[:1])))]
    while missing.shape[-1] > _COARSEST:
        odd = missing.shape[-1] % 2
        missing = (F.avg_pool2d(F.pad(missing, (0, odd, 0, odd), value=1.0), 2) == 1).to(missing.dtype)
        grids.append(_Grid(missing, _neighbours(torch.ones_like(missing[:1]))))
    return grids


def _neighbours(x: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours: (1, 2, 1) along both axes over 12, without the pixel itself."""
    padded = F.pad(x, (1, 1, 1, 1))
    # In place where it can be: this is nearly all of the solver's work, and bound by memory.
    rows = torch.add(padded[..., :-2, :], padded[..., 1:-1, :], alpha=2).add_(padded[..., 2:, :])
    return torch.add(rows[..., :-2], rows[..., 1:-1], alpha=2).add_(rows[..., 2:]).sub_(x, alpha=4).div_(12)


def _apply(grid: _Grid, x: Tensor) -> Tensor:
    return grid.missing * (grid.weight * x - _neighbours(x))


def _cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """A symmetric V-cycle: damped Jacobi, the correction of the coarser grid, damped Jacobi."""
    grid, *coarser = grids
    smoothing = _DAMPING * grid.missing / grid.weight
    found = smoothing * residual
    if coarser:
        side = residual.shape[-1]
        odd = side % 2
        left = 4 * F.avg_pool2d(F.pad(residual - _apply(grid, found), (0, odd, 0, odd)), 2)
        correction = _cycle(coarser, coarser[0].missing * left)
        found = found + grid.missing * correction.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)[..., :side, :side]
    return found + smoothing * (residual - _apply(grid, found))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(2, 3), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Quotient of two numbers a system, and 0 where the second is: that system is solved."""
    return a / b.masked_fill(b == 0, float("inf"))


ROAD = Measure(
    name="road",
    columns=(
        Column(name="road", title="ROAD", better="higher"),
        Column(name="road_most", title="ROAD, most relevant imputed", better="lower"),
        Column(name="road_least", title="ROAD, least relevant imputed", better="higher"),
    ),
    needs_au_map=False,
    passes=2 * len(SHARES),
    source="Rong et al., ICML 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods",
    formula="p(predicted class), mean over the shares imputed; road: (least relevant imputed - most relevant imputed) / 2",
    compute=_road,
)
