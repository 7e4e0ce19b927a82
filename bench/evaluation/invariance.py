"""Does a result depend on the batch it was computed in? Looked at in every evaluation, on a few samples.

Accuracies that rest on the make-up of the test batches have led boards of this field (a repository's 92.05 % on RAF-DB needed batches
sorted by label). Here a slice of the test split is computed again, one by one, in batches of 64, and shuffled in batches of an odd
size; logits and maps must be those of the evaluation itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.data.batch import RawBatch
from bench.data.transforms import eval_images
from bench.evaluation.maps import map_ranges, min_max, read_maps
from bench.method import Classifier, Method
from bench.runtime.engine import Engine

SAMPLES = 64
"""Size of the slice, whatever the size of the split."""
PASSES = {"batch_1": 1, "batch_64": 64, "shuffled": 7}
"""Pass -> batch size."""
TOLERANCE = 1e-3
"""Largest difference (see `logit_difference`, `map_difference`) that rounding may explain.

Other batch sizes make other kernels sum in another order. Seen with every method on trainings of the quick profile (float32, CPU): logits
and maps differ by up to 5e-6. More is allowed for deeper networks and accelerators, which were not measured.
"""
UNLIKE = 1e9
"""Stands for a difference that is not finite: JSON has no infinity."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """Some samples of the slice, as the evaluation saw them. On the CPU."""

    positions: Tensor
    """(n,) int64."""
    images: Tensor
    """(n, 3, S, S) uint8, as stored."""
    labels: Tensor
    """(n,) int64."""
    logits: Tensor
    """(n, K)."""
    maps: Mapping[str, Tensor]
    """Method -> (n, h, w) raw maps of the true class."""


class Slice:
    """The samples to look at again, collected while the evaluation passes over them."""

    def __init__(self, count: int) -> None:
        """``count``: samples of the split; the slice is spread evenly over their positions."""
        self._chosen = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).round().long()
        self.parts: list[Looked] = []

    def keep(self, raw: RawBatch, *, logits: Tensor, maps: Mapping[str, Tensor]) -> None:
        """Keep what belongs to the slice. ``raw`` is the batch as read, on the CPU."""
        mine = torch.isin(raw.positions, self._chosen).nonzero().flatten()
        if len(mine):
            there = mine.to(logits.device)
            self.parts.append(
                Looked(
                    positions=raw.positions[mine],
                    images=raw.images[mine],
                    labels=raw.labels[mine],
                    logits=logits.detach()[there].cpu(),
                    maps={name: values[there].cpu() for name, values in maps.items()},
                )
            )


def join(parts: Sequence[Looked]) -> Looked:
    """The slice from what all processes have kept, in the order of the split."""
    order = torch.cat([part.positions for part in parts]).argsort()
    return Looked(
        **{name: torch.cat([getattr(part, name) for part in parts])[order] for name in ("positions", "images", "labels", "logits")},
        maps={name: torch.cat([part.maps[name] for part in parts])[order] for name in parts[0].maps},
    )


def check_invariance(
    classifier: Classifier, methods: Mapping[str, Method], seen: Looked, *, size: int, batch_size: int, engine: Engine
) -> dict[str, dict[str, Any]]:
    """Compute a slice again in other batches, and compare. In one process.

    Args:
        classifier: that of the evaluation, as it was there.
        methods: name -> read-out.
        seen: the slice, as the evaluation saw it.
        size: side of the network's input.
        batch_size: of the evaluation. Where the device's memory is too small for 64 pictures, this is known to fit.
        engine: device, and whether to stop.

    Returns:
        Method -> ``samples``, ``tolerance``, ``logits`` and ``maps`` (pass -> worst difference), ``holds``. JSON-able.

    Raises:
        StoppedError: between two batches, if this run was asked to stop.
    """
    logits: dict[str, float] = {}
    maps: dict[str, dict[str, float]] = {name: {} for name in methods}
    for name, count in PASSES.items():
        order = torch.arange(len(seen.positions))
        if name == "shuffled":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        try:
            again = _compute(classifier, methods, seen, order=order, batch_size=count, size=size, engine=engine)
        except torch.OutOfMemoryError:
            again = None  # the error is gone, and with it what its frames held, when this is tried with less
        except Exception as error:
            error.add_note(f"in the invariance check, in batches of {count}")
            raise
        if again is None:
            again = _compute(classifier, methods, seen, order=order, batch_size=min(count, batch_size), size=size, engine=engine)
        logits[name] = logit_difference(again.logits, seen.logits)
        for method, values in again.maps.items():
            maps[method][name] = map_difference(values, seen.maps[method])
    return {
        method: {
            "samples": len(seen.positions),
            "tolerance": TOLERANCE,
            "logits": logits,
            "maps": maps[method],
            "holds": max(*logits.values(), *maps[method].values()) <= TOLERANCE,
        }
        for method in methods
    }


def logit_difference(logits: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of two (n, K), over the standard deviation of the reference's values."""
    return _number((logits - reference).double().abs().max(), over=reference.double().std(correction=0))


def map_difference(maps: Tensor, reference: Tensor) -> float:
    """How unlike two sets of raw maps (n, h, w) are: the larger of two numbers.

    - The worst distance but one of two maps, min-max scaled as they are for every figure: the norm of their difference over the larger
      norm. One map may differ as it will: a read-out that follows the larger of two values down the network (PRM) takes another way where
      rounding decides. Seen in 18 of 7,700 of its maps, by up to 8e-3; in all others by less than 3e-6.
    - The median change of a map's range (max - min), over the larger range. No figure depends on the range, but one that follows the
      batch tells of a read-out that looks at other samples. The median, because a read-out may divide by a number near zero
      (Ablation-CAM by the logit): there the range of a single map is one of rounding.
    """
    ours, theirs = (min_max(values.double()).flatten(1) for values in (maps, reference))
    shapes = _relative((ours - theirs).norm(dim=1), ours.norm(dim=1), theirs.norm(dim=1))
    shape = shapes.kthvalue(max(len(shapes) - 1, 1)).values
    # A map with NaN is compared as what it counts as, zeros.
    ranges, known = (map_ranges(values).double().nan_to_num(nan=0.0) for values in (maps, reference))
    spread = _relative((ranges - known).abs(), ranges, known).median()
    return max(_number(shape), _number(spread))


def _relative(difference: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Over the larger of the two; 0 where both are 0."""
    scale = torch.maximum(ours, theirs)
    return difference / scale.masked_fill(scale == 0, 1)


def _number(value: Tensor, *, over: Tensor | None = None) -> float:
    ratio = float(value) if over is None else float(value / over) if float(over) or float(value) else 0.0
    return ratio if ratio < UNLIKE else UNLIKE  # also where it is no number


def _compute(
    classifier: Classifier, methods: Mapping[str, Method], seen: Looked, *, order: Tensor, batch_size: int, size: int, engine: Engine
) -> Looked:
    """The slice, computed in ``order`` and put back into its own."""
    graph = any(method.needs_grad for method in methods.values())
    parts = []
    with contextlib.nullcontext() if graph else torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            engine.stop.check()
            stored = seen.images[chosen].to(engine.device)
            images = eval_images(stored, size=size, mean=classifier.backbone.mean, std=classifier.backbone.std)
            labels = seen.labels[chosen].to(engine.device)
            output = classifier(images)
            output.images = images
            maps = {name: read_maps(method, classifier, output, labels).cpu() for name, method in methods.items()}
            parts.append(
                Looked(
                    positions=seen.positions[chosen],
                    images=seen.images[chosen],
                    labels=seen.labels[chosen],
                    logits=output.logits.detach().cpu(),
                    maps=maps,
                )
            )
    return join(parts)
