"""Orders of the pixels of maps, for whole batches. Equal pixels share a rank, or come in a fixed order without a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

EQUAL = 1e-5
"""Values of maps in [0, 1] that are closer than this count as equal. An enlarged map has plateaus up to the last digits, and the border of
an AU region has pixels of exactly one half. Without this, rounding would decide their order, and rounding differs between machines."""


def in_steps(maps: Tensor) -> Tensor:
    """Values of maps in [0, 1] as whole numbers of `EQUAL`."""
    return (maps / EQUAL).round()


def relevance_ranks(maps: Tensor) -> Tensor:
    """Place of every pixel from the most relevant, 0, to the least, of maps in [0, 1]: (B, S, S) -> (B, S, S) int64.

    Equal pixels, such as those that a ReLU sets to zero, come in a scattered order, which is the same for all maps of this size. The
    order of memory would put the forehead before the chin, which the map does not say. A constant map gives a random order.
    """
    flat = in_steps(maps).flatten(1)
    scatter = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(maps.device)
    order = scatter[flat[:, scatter].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(maps.shape)


def last_of_equals(ordered: Tensor) -> Tensor:
    """For each value of sorted rows (B, N) the place of the last equal value, (B, N) int64."""
    count = ordered.shape[1]
    places = torch.arange(count, device=ordered.device).expand_as(ordered)
    ends = torch.ones_like(places, dtype=torch.bool)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    return places.where(ends, count).flip(1).cummin(dim=1).values.flip(1)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation (B,) of pairs of maps (B, h, w). Equal values share their mean rank; NaN where a map is constant."""
    ranks = [_mean_ranks(maps.flatten(1)) for maps in (first, second)]
    centred = [rank - rank.mean(dim=1, keepdim=True) for rank in ranks]
    spread = (centred[0].square().sum(dim=1) * centred[1].square().sum(dim=1)).sqrt()
    return (centred[0] * centred[1]).sum(dim=1) / spread.masked_fill(spread == 0, float("nan"))


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks of rows (B, N) as shares of N, so that their squares stay small."""
    ordered, order = values.sort(dim=1)
    last = last_of_equals(ordered)
    first = values.shape[1] - 1 - last_of_equals(ordered.flip(1)).flip(1)
    ranks = (first + last).to(values.dtype) / (2 * values.shape[1])
    return torch.empty_like(ranks).scatter_(1, order, ranks)
