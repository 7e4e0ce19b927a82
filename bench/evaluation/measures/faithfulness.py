"""Measures without annotation: how the network's confidence changes when pixels are removed by the order of the map.

They use the class that the network predicts and its map, on all samples. p is the softmax probability of that class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.au.codebook import REFERENCE_FRAME
from bench.evaluation.measures.base import Column, Explained, confidence, measure, probability
from bench.evaluation.measures.ranks import relevance_ranks

STEPS = 20
"""Equal shares of the pixels in which they are deleted or inserted."""
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0
"""Side and standard deviation of the Gaussian from which insertion starts, in pixels of a picture of side `REFERENCE_FRAME`."""


@measure(Column("deletion", "Deletion", "lower"), passes=STEPS + 1)
def deletion(explained: Explained) -> dict[str, Tensor]:
    """Area under p over the share of pixels set to the mean colour, most relevant first (Petsiuk et al., BMVC 2018, RISE)."""
    return {"deletion": _area_under(explained, before=explained.images, after=torch.zeros_like(explained.images))}


@measure(Column("insertion", "Insertion", "higher"), passes=STEPS + 1)
def insertion(explained: Explained) -> dict[str, Tensor]:
    """Area under p over the share of pixels restored in the blurred picture, most relevant first (Petsiuk et al., BMVC 2018, RISE)."""
    return {"insertion": _area_under(explained, before=blurred(explained.images), after=explained.images)}


def blurred(images: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) under RISE's Gaussian, in proportion to their size, mirrored at the border."""
    from torchvision.transforms.v2.functional import gaussian_blur  # takes seconds to import, and tables need no pictures

    scale = images.shape[-1] / REFERENCE_FRAME
    reach = max(1, round((BLUR_KERNEL // 2) * scale))
    blurry: Tensor = gaussian_blur(images, kernel_size=[2 * reach + 1] * 2, sigma=[BLUR_SIGMA * scale] * 2)
    return blurry


def _area_under(explained: Explained, *, before: Tensor, after: Tensor) -> Tensor:
    """Area under p (B,) while the pixels of ``before`` are replaced by those of ``after``, most relevant first."""
    ranks = relevance_ranks(explained.map_predicted)[:, None]
    pixels = ranks[0].numel()
    counts = [step * pixels // STEPS for step in range(STEPS + 1)]
    pictures = (torch.where(ranks < count, after, before) for count in counts)
    curve = torch.stack([confidence(explained.classifier, picture, explained.predicted) for picture in pictures], dim=1)
    return torch.trapezoid(curve, torch.tensor(counts, device=curve.device) / pixels, dim=1)


@measure(Column("drop", "Average drop", "lower"), Column("increase", "Increase in confidence", "higher"), passes=1)
def drop(explained: Explained) -> dict[str, Tensor]:
    """``drop``: max(0, Y - O) / Y; ``increase``: 1 if O > Y (Chattopadhay et al., WACV 2018, Grad-CAM++).

    Y is p of the picture, O is p of the picture times the map.
    """
    whole = probability(explained.logits, explained.predicted)
    masked = confidence(explained.classifier, explained.images * explained.map_predicted[:, None], explained.predicted)
    return {"drop": (whole - masked).clamp(min=0) / whole, "increase": (masked > whole).float()}
