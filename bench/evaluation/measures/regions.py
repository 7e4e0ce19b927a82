"""Measures against the AU map: they use the map of the true class, on samples that have an AU map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.au.codebook import ACTION_UNITS, EXPRESSION_UNITS, REFERENCE_FRAME
from bench.au.maps import unit_maps
from bench.dataset import EXPRESSIONS
from bench.evaluation.maps import where_valid
from bench.evaluation.measures.base import Column, Explained, measure
from bench.evaluation.measures.ranks import EQUAL, in_steps, last_of_equals

REGION = 0.5
"""The AU region is where the AU map is at least this: the map is 1 inside an ellipse, 0 outside, and half at the smoothed border."""
TOLERANCE = 15
"""Pixels of a face of side `REFERENCE_FRAME` by which `pointing_near` may miss."""

LISTED_UNITS = tuple(unit for unit in ACTION_UNITS if any(unit.id in listed for listed in EXPRESSION_UNITS.values()))
"""Action units that the codebook lists for any expression."""


@measure(
    Column("au", "Cosine with single AUs", "higher"),
    *(Column(f"au_{unit.facs}", f"Cosine with AU {unit.facs}, {unit.name}", "higher", part_of="au") for unit in LISTED_UNITS),
    needs_au_map=True,
)
def au(explained: Explained) -> dict[str, Tensor]:
    """Cosine of the map with the map of a single AU; ``au``: mean over the AUs that the codebook lists for the expression.

    Belharbi et al., FG 2024, with one action unit in place of the expression's whole list.
    """
    maps = explained.map_true.flatten(1)
    columns: dict[str, Tensor] = {}
    for unit in LISTED_UNITS:
        listed = torch.tensor([unit.id in EXPRESSION_UNITS[name] for name in EXPRESSIONS], device=maps.device)
        rows = listed[explained.expressions].nonzero()[:, 0]
        column = columns[f"au_{unit.facs}"] = maps.new_full((len(maps),), float("nan"))
        if len(rows):
            drawn, valid = unit_maps(
                explained.landmarks[rows],
                torch.full_like(rows, unit.id),
                frame=REFERENCE_FRAME,
                size=explained.au_maps.shape[-1],
                variant=explained.au_variant,
            )
            column[rows] = where_valid(valid, F.cosine_similarity(maps[rows], drawn.flatten(1), dim=1, eps=1e-8))
    return {"au": torch.stack(list(columns.values())).nanmean(dim=0), **columns}


def _region(explained: Explained) -> tuple[Tensor, Tensor]:
    """The AU region (B, S, S) bool, and which samples have one (B,). A map that vanished at its low resolution has no region."""
    region = explained.au_maps >= REGION - EQUAL
    return region, region.flatten(1).any(dim=1)


def _share(parts: Tensor, weights: Tensor) -> Tensor:
    """Share of the weights (B, S, S) that lies in the parts (B, S, S) bool: (B,); 0 where all weights are 0."""
    whole = weights.sum(dim=(1, 2))
    return (weights * parts).sum(dim=(1, 2)) / whole.masked_fill(whole == 0, 1)


@measure(Column("energy", "Energy in the AU region", "higher"), needs_au_map=True)
def energy(explained: Explained) -> dict[str, Tensor]:
    """Sum of the map in the AU region / sum of the map.

    Wang et al., CVPR Workshops 2020 (Score-CAM), energy-based pointing game.
    """
    region, exists = _region(explained)
    return {"energy": where_valid(exists, _share(region, explained.map_true))}


@measure(
    Column("pointing", "Pointing game", "higher"),
    Column("pointing_near", f"Pointing game, {TOLERANCE} px tolerance", "higher"),
    needs_au_map=True,
)
def pointing(explained: Explained) -> dict[str, Tensor]:
    """1 if the map's maximum lies in the AU region, or near it; of several equal maxima the share that does.

    Zhang et al., IJCV 2018, Top-Down Neural Attention by Excitation Backprop.
    """
    region, exists = _region(explained)
    highest = (explained.map_true >= explained.map_true.amax(dim=(1, 2), keepdim=True) - EQUAL).float()
    near = _grown(region, radius=TOLERANCE * region.shape[-1] / REFERENCE_FRAME)
    return {"pointing": where_valid(exists, _share(region, highest)), "pointing_near": where_valid(exists, _share(near, highest))}


def _grown(region: Tensor, *, radius: float) -> Tensor:
    """All pixels within a distance of the region (B, S, S)."""
    reach = int(radius)
    steps = torch.arange(-reach, reach + 1, device=region.device)
    disc = (steps.square() + steps.square()[:, None] <= radius**2).float()
    return F.conv2d(region.float()[:, None], disc[None, None], padding=reach)[:, 0] > 0.5


@measure(Column("ap", "Average precision", "higher"), needs_au_map=True)
def ap(explained: Explained) -> dict[str, Tensor]:
    """Sum over thresholds n of (recall_n - recall_(n-1)) precision_n; the pixels of the AU region are the positives.

    Pixel-wise, as in Choe et al., CVPR 2020 (PxAP), but for each picture by itself.
    """
    region, exists = _region(explained)
    ordered, order = in_steps(explained.map_true).flatten(1).sort(dim=1, descending=True)
    hits = region.flatten(1).take_along_dim(order, dim=1)
    # A threshold retrieves all pixels of one value together, so each counts with the precision behind the last of them.
    last = last_of_equals(ordered)
    precision = hits.cumsum(dim=1).take_along_dim(last, dim=1) / (last + 1)
    return {"ap": where_valid(exists, (precision * hits).sum(dim=1) / hits.sum(dim=1).clamp(min=1))}
