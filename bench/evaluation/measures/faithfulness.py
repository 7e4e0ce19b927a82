"""Measures without any annotation: what becomes of the network's confidence when pixels go that the map calls relevant, or others.

They look at the class that the network predicts and at its map, on all samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.au.codebook import REFERENCE_FRAME
from bench.evaluation.measures.base import Column, Explained, Measure, confidence, of_class
from bench.evaluation.measures.ranks import relevance_ranks

STEPS = 20
"""Equal shares of the pixels in which they are deleted or inserted."""
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0
"""Side and standard deviation of the Gaussian from which insertion starts, in pixels of a picture of side `REFERENCE_FRAME`."""


def _deletion(seen: Explained) -> dict[str, Tensor]:
    return {"deletion": _area_under(seen, before=seen.images, after=torch.zeros_like(seen.images))}


def _insertion(seen: Explained) -> dict[str, Tensor]:
    return {"insertion": _area_under(seen, before=blurred(seen.images), after=seen.images)}


def blurred(images: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) without detail: RISE's Gaussian, in proportion to their size, mirrored at the border."""
    from torchvision.transforms.v2.functional import gaussian_blur  # takes seconds to import, and tables need no pictures

    scale = images.shape[-1] / REFERENCE_FRAME
    reach = max(1, round((BLUR_KERNEL // 2) * scale))
    blurry: Tensor = gaussian_blur(images, kernel_size=[2 * reach + 1] * 2, sigma=[BLUR_SIGMA * scale] * 2)
    return blurry


def _area_under(seen: Explained, *, before: Tensor, after: Tensor) -> Tensor:
    """Area under the confidence in the predicted class while pictures turn from one into the other, most relevant pixels first: (B,)."""
    ranks = relevance_ranks(seen.map_predicted)[:, None]
    pixels = ranks[0].numel()
    counts = [step * pixels // STEPS for step in range(STEPS + 1)]
    curve = torch.stack([confidence(seen.classifier, torch.where(ranks < count, after, before), seen.predicted) for count in counts], dim=1)
    return torch.trapezoid(curve, torch.tensor(counts, device=curve.device) / pixels, dim=1)


def _drop(seen: Explained) -> dict[str, Tensor]:
    whole = of_class(seen.logits, seen.predicted)
    explained = confidence(seen.classifier, seen.images * seen.map_predicted[:, None], seen.predicted)
    return {"drop": (whole - explained).clamp(min=0) / whole, "increase": (explained > whole).float()}


DELETION = Measure(
    name="deletion",
    columns=(Column(name="deletion", title="Deletion", better="lower"),),
    needs_au_map=False,
    passes=STEPS + 1,
    source="Petsiuk et al., BMVC 2018 (RISE)",
    formula="area under p(predicted class) over the share of pixels put to the mean colour, most relevant first",
    compute=_deletion,
)
INSERTION = Measure(
    name="insertion",
    columns=(Column(name="insertion", title="Insertion", better="higher"),),
    needs_au_map=False,
    passes=STEPS + 1,
    source="Petsiuk et al., BMVC 2018 (RISE)",
    formula="area under p(predicted class) over the share of pixels restored in the blurred picture, most relevant first",
    compute=_insertion,
)
DROP = Measure(
    name="drop",
    columns=(
        Column(name="drop", title="Average drop", better="lower"),
        Column(name="increase", title="Increase in confidence", better="higher"),
    ),
    needs_au_map=False,
    passes=1,
    source="Chattopadhay et al., WACV 2018 (Grad-CAM++)",
    formula="drop: max(0, Y - O) / Y, increase: 1 if O > Y, with Y = p(predicted class) of the picture, O of picture x map",
    compute=_drop,
)
