"""From raw maps and layers to cosines with the AU map: the published pipeline, batched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.method import Classifier, Method, Output


def read_maps(method: Method, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
    """`Method.maps` with its input and output checked: (B, h, w), float32, without graph.

    Raises:
        ValueError: a class id the classifier does not have (negative ones would quietly count from the end), or maps of
            another form than the contract's.
    """
    count = output.logits.shape[1]
    bad = classes[(classes < 0) | (classes >= count)]
    if len(bad):
        raise ValueError(f"class id {int(bad[0])} is out of range: the classifier has {count} classes, 0 to {count - 1}")
    maps = method.maps(classifier, output, classes)
    if not isinstance(maps, Tensor) or maps.is_complex():
        kind = f"a tensor of {maps.dtype}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
        raise ValueError(f"{type(method).__name__}.maps returned {kind}, wanted a tensor of real numbers, ({len(classes)}, h, w)")
    maps = maps.detach()
    if maps.ndim != 3 or len(maps) != len(classes):
        raise ValueError(f"{type(method).__name__}.maps returned the shape {tuple(maps.shape)}, wanted ({len(classes)}, h, w)")
    return maps.float()


def check_finite(logits: Tensor, *, label: str) -> None:
    """Refuse logits that are NaN or infinite: their largest one would be counted like any other.

    Raises:
        ValueError: naming the training.
    """
    if not logits.isfinite().all():
        raise ValueError(f"{label}: the network gives NaN or infinite logits; its weights are damaged, or its training diverged")


def min_max(maps: Tensor) -> Tensor:
    """(m - min) / (max - min) of each map (..., h, w); a constant map becomes zeros. Free of scale: no epsilon.

    Values that are not finite (a map of a network with NaN weights) become zeros, as the published evaluation has them: whoever takes a
    figure from the result looks at `map_ranges` too.
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


def map_cosines(maps: Tensor, au_maps: Tensor) -> Tensor:
    """Cosine of each raw map (B, h, w) with its AU map (B, S, S): min-max at low resolution, upsampled, compared. (B,)."""
    return _cosine(upsample(min_max(maps.float()), size=au_maps.shape[-1]), au_maps)


def attention_cosines(attention: Tensor, au_maps: Tensor) -> Tensor:
    """Cosine of each layer attention (B, h, w) with its AU map (B, S, S). (B,).

    Upsampled bilinearly with aligned corners and antialiasing, clipped to its own low-resolution range, and shifted up by
    the minimum of that range where it is negative: the shift is the evaluation's alone, the training loss has none.
    """
    attention = attention.float()
    size = au_maps.shape[-2:]
    low, high = attention.amin(dim=(1, 2), keepdim=True), attention.amax(dim=(1, 2), keepdim=True)
    grown = F.interpolate(attention[:, None], size=size, mode="bilinear", align_corners=True, antialias=True)[:, 0].clamp(min=low, max=high)
    return _cosine(grown - low.clamp(max=0), au_maps)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1).to(a.dtype), dim=1, eps=1e-8)
