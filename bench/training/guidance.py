"""AU guidance: pull the attention of a layer towards the map of the facial action units."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_attention(features: Tensor) -> Tensor:
    """Channel mean of a layer: (B, C, h, w) -> (B, h, w), in float32 (float64 stays)."""
    return (features.float() if features.dtype.itemsize < 4 else features).mean(dim=1)


def fit_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample AU maps (B, H, W) to the grid of an attention, (B, h, w), as the published code does.

    Bilinear with antialiasing and aligned corners, then clipped to each map's own range.
    """
    if maps.shape[-2:] == size:
        return maps
    fitted = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True, antialias=True)[:, 0]
    return fitted.clamp(min=maps.amin(dim=(1, 2), keepdim=True), max=maps.amax(dim=(1, 2), keepdim=True))


def misalignment(attention: Tensor, maps: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine between each attention and its AU map; 0, without gradient, where there is no map.

    Args:
        attention: (B, h, w), used raw: it may be negative.
        maps: (B, H, W) AU maps, any resolution; the values of invalid samples do not matter, not even inf.
        valid: (B,) bool.

    Returns:
        (B,) values in [0, 2]. Source: Belharbi et al., FG 2024, eq. 3; epsilon 1e-8 as published.
    """
    maps = maps.masked_fill(~valid[:, None, None], 0.0).to(attention.dtype)
    fitted = fit_maps(maps, (attention.shape[-2], attention.shape[-1]))
    cosine = F.cosine_similarity(attention.flatten(1), fitted.flatten(1), dim=1, eps=1e-8)
    return (1.0 - cosine).masked_fill(~valid, 0.0)
