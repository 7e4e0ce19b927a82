"""What an optional measure is, and what it may look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bench.method import Classifier, Method

Part = Literal["head", "all"]
"""What of a network is drawn anew: all that is not its backbone, or everything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """B pictures of side S, what the network says of them, and how one method explains that. Nothing in it carries a graph."""

    method: Method
    classifier: Classifier
    """In eval mode."""
    randomised: Callable[[Part], Classifier]
    """The same network with weights drawn anew, in eval mode."""
    images: Tensor
    """(B, 3, S, S), normalised: 0 is the mean colour of the backbone's training pictures."""
    logits: Tensor
    """(B, K)."""
    predicted: Tensor
    """(B,) class of the largest logit."""
    raw_predicted: Tensor
    """(B, h, w) map of the predicted class, as the method gives it."""
    map_true: Tensor
    """(B, S, S) map of the true class, min-max scaled at its own resolution and then enlarged, as for CAM-COS."""
    map_predicted: Tensor
    """(B, S, S) the same of the predicted class."""
    landmarks: Tensor
    """(B, 68, 2), pixels of a picture of side `bench.au.REFERENCE_FRAME`."""
    expressions: Tensor
    """(B,) of the true class: position in `bench.dataset.EXPRESSIONS`, -1 = none of them."""
    au_maps: Tensor
    """(B, S, S) in [0, 1], of the true class."""
    au_valid: Tensor
    """(B,) bool."""
    au_variant: Literal["official", "symmetric"]

    def take(self, rows: Tensor) -> Explained:
        """The samples at these places, (R,) int64."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken: dict[str, Any] = {name: value[rows] if isinstance(value, Tensor) else value for name, value in fields.items()}
        return Explained(**taken)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of each sample."""

    name: str
    """Of the column ``measure_<name>`` of the rows, and of the summary in ``metrics["measures"]``."""
    title: str
    better: Literal["higher", "lower"]
    part_of: str | None = None
    """The column that sums this one up with others: tables for people show that one alone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What ``--metrics NAME`` adds. Figures of a sample depend on nothing but the sample, the network and the method."""

    name: str
    columns: tuple[Column, ...]
    needs_au_map: bool
    """Whether only samples with an AU map count."""
    passes: int
    """Forward passes a sample and method, beyond the one of the evaluation."""
    source: str
    formula: str
    compute: Callable[[Explained], Mapping[str, Tensor]]
    """Column name -> (B,); NaN where a sample does not count."""
    most_samples: int | None = None
    """No more samples than these are looked at, evenly spread over the split."""


@torch.no_grad()
def confidence(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability (B,) of the given class (B,) of each picture (B, 3, S, S)."""
    return of_class(classifier(images).logits, classes)


def of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability (B,) of the given class (B,), from logits (B, K)."""
    return logits.float().softmax(dim=1).take_along_dim(classes[:, None], dim=1)[:, 0]
