"""Does a result depend on the batch it was computed in? Every evaluation checks it on a few samples.

Accuracies that depend on the composition of the test batches have led leaderboards of this field: a repository's 92.05 % on RAF-DB needed
batches sorted by label. Here a slice of the test split is computed again, in batches of 1 and of 64, and shuffled in batches of an odd
size. Logits and maps must be those of the evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.data.batch import RawBatch
from bench.evaluation.maps import map_ranges, min_max
from bench.evaluation.parts import combine, convert
from bench.evaluation.read_out import forward, grad_mode, network_input, read_out
from bench.method import Classifier, Method
from bench.runtime.engine import Engine

SAMPLES = 64
"""Size of the slice, whatever the size of the split."""
PASSES = {"batch_1": 1, "batch_64": 64, "shuffled": 7}
"""Pass -> batch size."""
TOLERANCE = 1e-3
"""Largest difference (see `logit_difference`, `map_difference`) that rounding may explain.

Another batch size selects other kernels, which sum in another order. With every method, on trainings of the quick profile (float32, CPU),
logits and maps differ by up to 5e-6. The rest is a margin for deeper networks and accelerators, which were not measured.
"""
UNLIKE = 1e9
"""Stands for a difference that is not finite: JSON has no infinity."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SliceSamples:
    """Some samples of the slice with their results, on the CPU.

    Shapes: ``positions`` and ``labels`` (n,) int64; ``images`` (n, 3, S, S) uint8, as stored; ``logits`` (n, K); ``maps``: method ->
    (n, h, w), raw maps of the true class.
    """

    positions: Tensor
    images: Tensor
    labels: Tensor
    logits: Tensor
    maps: Mapping[str, Tensor]


class Slice:
    """The samples that are computed again, collected while the evaluation passes over them."""

    def __init__(self, count: int) -> None:
        """``count``: samples of the split; the slice is spread evenly over their positions."""
        self._chosen = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).round().long()
        self.parts: list[SliceSamples] = []

    def keep(self, raw: RawBatch, *, logits: Tensor, maps: Mapping[str, Tensor]) -> None:
        """Keep the samples of a batch that belong to the slice. ``raw`` is the batch as read, on the CPU."""
        rows = torch.isin(raw.positions, self._chosen).nonzero().flatten()
        if len(rows):
            batch = SliceSamples(positions=raw.positions, images=raw.images, labels=raw.labels, logits=logits.detach(), maps=maps)
            self.parts.append(convert(batch, lambda values: values[rows.to(values.device)].cpu()))

    @staticmethod
    def join(parts: Sequence[SliceSamples]) -> SliceSamples:
        """The slice from its parts, in the order of the split."""
        order = torch.cat([part.positions for part in parts]).argsort()
        return combine(parts, lambda tensors: torch.cat(list(tensors))[order])


def check_invariance(
    classifier: Classifier, methods: Mapping[str, Method], samples: SliceSamples, *, size: int, batch_size: int, engine: Engine
) -> dict[str, dict[str, Any]]:
    """Compute a slice again in other batches, and compare. In one process.

    Args:
        classifier: that of the evaluation, in the same state.
        methods: name -> read-out.
        samples: the slice with the results of the evaluation.
        size: side of the network's input.
        batch_size: of the evaluation. It is used where the device's memory is too small for 64 pictures.
        engine: device, and whether to stop.

    Returns:
        Method -> ``samples``, ``tolerance``, ``logits`` and ``maps`` (pass -> worst difference), ``holds``. JSON-able.

    Raises:
        StoppedError: between two batches, if this run was asked to stop.
    """
    logits: dict[str, float] = {}
    maps: dict[str, dict[str, float]] = {name: {} for name in methods}
    compute = functools.partial(_compute, classifier, methods, samples, size=size, engine=engine)
    for name, count in PASSES.items():
        order = torch.arange(len(samples.positions))
        if name == "shuffled":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        try:
            again = compute(order, batch_size=count)
        except torch.OutOfMemoryError:
            again = None  # outside of this block the error is gone, and with it the memory that its frames hold
        except Exception as error:
            error.add_note(f"in the invariance check, in batches of {count}")
            raise
        if again is None:
            again = compute(order, batch_size=min(count, batch_size))
        logits[name] = logit_difference(again.logits, samples.logits)
        for method, values in again.maps.items():
            maps[method][name] = map_difference(values, samples.maps[method])
    return {
        method: {
            "samples": len(samples.positions),
            "tolerance": TOLERANCE,
            "logits": logits,
            "maps": maps[method],
            "holds": max(*logits.values(), *maps[method].values()) <= TOLERANCE,
        }
        for method in methods
    }


def logit_difference(logits: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of two (n, K), over the standard deviation of the reference's values."""
    difference, spread = (logits - reference).double().abs().max(), reference.double().std(correction=0)
    return _finite(difference / spread if spread or difference else 0.0)


def map_difference(maps: Tensor, reference: Tensor) -> float:
    """How much two sets of raw maps (n, h, w) differ: the larger of two numbers.

    - The second largest distance of two maps, each min-max scaled as for every figure: the norm of their difference over the larger
      norm. The largest is left out, because a read-out that follows the larger of two values down the network (PRM) takes another way
      where rounding decides. Seen in 18 of 7,700 of its maps, by up to 8e-3; in all the rest by less than 3e-6.
    - The median change of a map's range (max - min), over the larger range. No figure depends on the range, but a range that changes
      with the batch shows that the read-out looks at other samples. The median, because a read-out may divide by a number near zero
      (Ablation-CAM by the logit): then rounding decides the range of a single map.
    """
    scaled, known = (min_max(values.double()).flatten(1) for values in (maps, reference))
    distances = _relative((scaled - known).norm(dim=1), scaled.norm(dim=1), known.norm(dim=1))
    distance = distances.kthvalue(max(len(distances) - 1, 1)).values
    # A map with NaN counts as zeros in every figure, and so it does here.
    ranges, known_ranges = (map_ranges(values).double().nan_to_num(nan=0.0) for values in (maps, reference))
    change = _relative((ranges - known_ranges).abs(), ranges, known_ranges).median()
    return max(_finite(distance), _finite(change))


def _relative(difference: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Difference over the larger of the two; 0 where both are 0."""
    scale = torch.maximum(first, second)
    return difference / scale.masked_fill(scale == 0, 1)


def _finite(value: Tensor | float) -> float:
    return float(value) if value < UNLIKE else UNLIKE  # NaN too


def _compute(
    classifier: Classifier,
    methods: Mapping[str, Method],
    samples: SliceSamples,
    order: Tensor,
    *,
    batch_size: int,
    size: int,
    engine: Engine,
) -> SliceSamples:
    """The slice, computed again in the given order of its samples and returned in the order of the split."""
    parts = []
    with grad_mode(methods.values()):
        for start in range(0, len(order), batch_size):
            engine.stop.check()
            batch = convert(dataclasses.replace(samples, maps={}), operator.itemgetter(order[start : start + batch_size]))
            labels = batch.labels.to(engine.device)
            output = forward(classifier, network_input(classifier, batch.images.to(engine.device), size=size))
            maps = {name: read_out(method, classifier, output, labels).cpu() for name, method in methods.items()}
            parts.append(dataclasses.replace(batch, logits=output.logits.detach().cpu(), maps=maps))
    return Slice.join(parts)
