"""Definition of an optional measure, and the inputs it gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from bench.evaluation.parts import convert
from bench.method import Classifier, Method

Part = Literal["head", "all"]
"""Part of a network whose weights are drawn anew: ``head`` is all that is not its backbone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """B pictures of side S, the network's output for them, and one method's maps. No tensor carries a graph."""

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
    """(B, S, S) map of the predicted class, scaled and enlarged in the same way."""
    landmarks: Tensor
    """(B, 68, 2), pixels of a picture of side `bench.au.REFERENCE_FRAME`."""
    expressions: Tensor
    """(B,) of the true class: position in `bench.dataset.EXPRESSIONS`, -1 = no expression."""
    au_maps: Tensor
    """(B, S, S) in [0, 1], of the true class."""
    au_valid: Tensor
    """(B,) bool."""
    au_variant: Literal["official", "symmetric"]

    def take(self, rows: Tensor) -> Explained:
        """The samples at these places of the batch, (R,) int64."""
        return convert(self, lambda value: value[rows] if isinstance(value, Tensor) else value)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One figure of each sample."""

    name: str
    """Name in ``metrics["measures"]`` of a record; the column of the rows is ``measure_<name>``."""
    title: str
    better: Literal["higher", "lower"]
    part_of: str | None = None
    """Column that summarises this one and its siblings. Tables for people show the summary alone."""


Compute = Callable[[Explained], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What ``--metrics NAME`` adds. Figures of a sample depend only on the sample, the network and the method."""

    name: str
    columns: tuple[Column, ...]
    compute: Compute
    """Returns column name -> (B,); NaN where a sample does not count."""
    needs_au_map: bool
    """Whether only samples with an AU map count."""
    passes: int
    """Forward passes for each sample and method, beyond the one of the evaluation."""
    most_samples: int | None
    """Largest number of samples measured, evenly spread over the split; None: no limit."""


def measure(*columns: Column, needs_au_map: bool = False, passes: int = 0, most_samples: int | None = None) -> Callable[[Compute], Measure]:
    """Make the decorated function a `Measure` of the function's name."""

    def wrap(compute: Compute) -> Measure:
        return Measure(
            name=compute.__name__, columns=columns, compute=compute, needs_au_map=needs_au_map, passes=passes, most_samples=most_samples
        )

    return wrap


@torch.no_grad()
def confidence(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability (B,) of the given class (B,) of each picture (B, 3, S, S)."""
    return probability(classifier(images).logits, classes)


def probability(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability (B,) of the given class (B,), from logits (B, K)."""
    return logits.float().softmax(dim=1).take_along_dim(classes[:, None], dim=1)[:, 0]
