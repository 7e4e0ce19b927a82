"""Measures against the AU map: of the map of the true class, on samples that have an AU map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.au.codebook import ACTION_UNITS, EXPRESSION_UNITS, REFERENCE_FRAME
from bench.au.maps import unit_maps
from bench.dataset import EXPRESSIONS
from bench.evaluation.measures.base import Column, Explained, Measure
from bench.evaluation.measures.ranks import EQUAL, in_steps, last_of_equals

REGION = 0.5
"""The AU region is where the AU map is at least this: the map is 1 inside an ellipse, 0 outside, and half at the smoothed border."""
TOLERANCE = 15
"""Pixels of a face of side `REFERENCE_FRAME` by which `pointing_near` may miss."""

LISTED_UNITS = tuple(unit for unit in ACTION_UNITS if any(unit.id in listed for listed in EXPRESSION_UNITS.values()))
"""Action units that the codebook lists for any expression."""


def _unit_cosines(seen: Explained) -> dict[str, Tensor]:
    maps = seen.map_true.flatten(1)
    found: dict[str, Tensor] = {}
    for unit in LISTED_UNITS:
        listed = torch.tensor([unit.id in EXPRESSION_UNITS[name] for name in EXPRESSIONS], device=maps.device)
        rows = listed[seen.expressions].nonzero()[:, 0]
        column = maps.new_full((len(maps),), float("nan"))
        if len(rows):
            drawn, valid = unit_maps(
                seen.landmarks[rows],
                torch.full_like(rows, unit.id),
                frame=REFERENCE_FRAME,
                size=seen.au_maps.shape[-1],
                variant=seen.au_variant,
            )
            column[rows] = F.cosine_similarity(maps[rows], drawn.flatten(1), dim=1, eps=1e-8).masked_fill(~valid, float("nan"))
        found[f"au_{unit.facs}"] = column
    return {"au": torch.stack(list(found.values())).nanmean(dim=0), **found}


def _region(seen: Explained) -> tuple[Tensor, Tensor]:
    """The AU region (B, S, S) bool, and which samples have one (B,): of a map that vanished at its low resolution nothing is left."""
    region = seen.au_maps >= REGION - EQUAL
    return region, region.flatten(1).any(dim=1)


def _share(parts: Tensor, weights: Tensor) -> Tensor:
    """Share of the weights (B, S, S) that lies in the parts (B, S, S) bool: (B,); 0 where there is no weight at all."""
    whole = weights.sum(dim=(1, 2))
    return (weights * parts).sum(dim=(1, 2)) / whole.masked_fill(whole == 0, 1)


def _energy(seen: Explained) -> dict[str, Tensor]:
    region, there = _region(seen)
    return {"energy": _where(there, _share(region, seen.map_true))}


def _pointing(seen: Explained) -> dict[str, Tensor]:
    region, there = _region(seen)
    highest = (seen.map_true >= seen.map_true.amax(dim=(1, 2), keepdim=True) - EQUAL).float()
    near = _grown(region, radius=TOLERANCE * region.shape[-1] / REFERENCE_FRAME)
    return {"pointing": _where(there, _share(region, highest)), "pointing_near": _where(there, _share(near, highest))}


def _grown(region: Tensor, *, radius: float) -> Tensor:
    """All pixels within a distance of the region (B, S, S)."""
    reach = int(radius)
    steps = torch.arange(-reach, reach + 1, device=region.device)
    disc = (steps.square() + steps.square()[:, None] <= radius**2).float()
    return F.conv2d(region.float()[:, None], disc[None, None], padding=reach)[:, 0] > 0.5


def _average_precision(seen: Explained) -> dict[str, Tensor]:
    region, there = _region(seen)
    ordered, order = in_steps(seen.map_true).flatten(1).sort(dim=1, descending=True)
    hits = region.flatten(1).take_along_dim(order, dim=1)
    # Pixels of one value are found together: each counts with the precision once all of them are.
    last = last_of_equals(ordered)
    precision = hits.cumsum(dim=1).take_along_dim(last, dim=1) / (last + 1)
    return {"ap": _where(there, (precision * hits).sum(dim=1) / hits.sum(dim=1).clamp(min=1))}


def _where(counted: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~counted, float("nan"))


AU = Measure(
    name="au",
    columns=(
        Column(name="au", title="Cosine with single AUs", better="higher"),
        *(
            Column(name=f"au_{unit.facs}", title=f"Cosine with AU {unit.facs}, {unit.name}", better="higher", part_of="au")
            for unit in LISTED_UNITS
        ),
    ),
    needs_au_map=True,
    passes=0,
    source="Belharbi et al., FG 2024, with one action unit in place of the expression's whole list",
    formula="cos(map, map of one AU); au: mean over the AUs that the codebook lists for the expression",
    compute=_unit_cosines,
)
ENERGY = Measure(
    name="energy",
    columns=(Column(name="energy", title="Energy in the AU region", better="higher"),),
    needs_au_map=True,
    passes=0,
    source="Wang et al., CVPR Workshops 2020 (Score-CAM), energy-based pointing game",
    formula="sum of the map in the AU region / sum of the map",
    compute=_energy,
)
POINTING = Measure(
    name="pointing",
    columns=(
        Column(name="pointing", title="Pointing game", better="higher"),
        Column(name="pointing_near", title=f"Pointing game, {TOLERANCE} px tolerance", better="higher"),
    ),
    needs_au_map=True,
    passes=0,
    source="Zhang et al., IJCV 2018, Top-Down Neural Attention by Excitation Backprop",
    formula="1 if the map's maximum lies in the AU region, or near it; of several equal maxima the share that does",
    compute=_pointing,
)
AVERAGE_PRECISION = Measure(
    name="ap",
    columns=(Column(name="ap", title="Average precision", better="higher"),),
    needs_au_map=True,
    passes=0,
    source="pixel-wise, as in Choe et al., CVPR 2020 (PxAP), but of each picture by itself",
    formula="sum over thresholds of (recall_n - recall_(n-1)) precision_n, the pixels of the AU region being those to find",
    compute=_average_precision,
)
