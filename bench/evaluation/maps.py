"""From raw maps and layers to cosines with the AU map: the published pipeline, batched."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import AUMaps, action_unit_maps
from bench.data.transforms import eval_landmarks


def reference_landmarks(landmarks: Tensor, *, stored: int) -> Tensor:
    """Landmarks (B, 68, 2) of stored pictures of side ``stored``, in the frame of AU maps."""
    # The published pixel radii are meant for this frame, whatever the size of the network's input.
    return eval_landmarks(landmarks, stored=stored, size=REFERENCE_FRAME)


def stored_au_maps(landmarks: Tensor, expressions: Tensor, *, stored: int, size: int, variant: Literal["official", "symmetric"]) -> AUMaps:
    """AU maps of stored faces.

    Args:
        landmarks: (B, 68, 2), in pixels of the stored pictures.
        expressions: (B,), see `bench.au.maps.expression_ids`.
        stored: side of the stored pictures.
        size: side of the maps.
        variant: geometry, see `bench.au.maps.action_unit_maps`.
    """
    return action_unit_maps(reference_landmarks(landmarks, stored=stored), expressions, frame=REFERENCE_FRAME, size=size, variant=variant)


def min_max(maps: Tensor) -> Tensor:
    """(m - min) / (max - min) of each map (..., h, w); a constant map becomes zeros. Free of scale: no epsilon.

    Values that are not finite become zeros, as in the published evaluation; `map_ranges` tells such maps from constant ones.
    """
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    scaled = (maps - low) / span.masked_fill(span == 0, 1)
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)


def map_ranges(maps: Tensor) -> Tensor:
    """Largest minus smallest value of each raw map (B, h, w), float32: 0 for a constant map, NaN where a value is not finite. (B,)."""
    spans = (maps.double().amax(dim=(1, 2)) - maps.double().amin(dim=(1, 2))).clamp(max=torch.finfo(torch.float32).max)
    return spans.masked_fill(~maps.isfinite().flatten(1).all(dim=1), float("nan")).float()


def upsample(maps: Tensor, *, size: int) -> Tensor:
    """(B, h, w) maps in [0, 1] -> (B, size, size): bilinear, half-pixel centres, not rescaled afterwards."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)


def enlarged(maps: Tensor, *, size: int) -> Tensor:
    """Raw maps (B, h, w) as every figure and picture shows them: min-max scaled at their own resolution, then upsampled."""
    return upsample(min_max(maps), size=size)


def map_cosines(maps: Tensor, au_maps: Tensor) -> Tensor:
    """Cosine of each raw map (B, h, w) with its AU map (B, S, S): min-max at low resolution, upsampled, compared. (B,)."""
    return cosines(enlarged(maps.float(), size=au_maps.shape[-1]), au_maps)


def attention_cosines(attention: Tensor, au_maps: Tensor) -> Tensor:
    """Cosine of each layer attention (B, h, w) with its AU map (B, S, S). (B,).

    Upsampled bilinearly with aligned corners and antialiasing, clipped to its own low-resolution range, and shifted up by
    the minimum of that range where it is negative. Only the evaluation shifts; the training loss does not.
    """
    attention = attention.float()
    size = au_maps.shape[-2:]
    low, high = attention.amin(dim=(1, 2), keepdim=True), attention.amax(dim=(1, 2), keepdim=True)
    grown = F.interpolate(attention[:, None], size=size, mode="bilinear", align_corners=True, antialias=True)[:, 0].clamp(min=low, max=high)
    return cosines(grown - low.clamp(max=0), au_maps)


def cosines(maps: Tensor, au_maps: Tensor) -> Tensor:
    """Cosine of each map with its AU map, both (B, S, S) at the same resolution. (B,)."""
    return F.cosine_similarity(maps.flatten(1), au_maps.flatten(1).to(maps.dtype), dim=1, eps=1e-8)


def where_valid(valid: Tensor, values: Tensor) -> Tensor:
    """Values (B,) of the samples that count, and NaN for those that are not ``valid`` (B,)."""
    return values.masked_fill(~valid, float("nan"))
