"""Which measures of which samples: the measures of one evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.evaluation.measures.base import Column, Explained, Measure, Part
from bench.evaluation.measures.faithfulness import DELETION, DROP, INSERTION
from bench.evaluation.measures.randomisation import RANDOMISATION, randomise
from bench.evaluation.measures.regions import AU, AVERAGE_PRECISION, ENERGY, POINTING
from bench.evaluation.measures.road import ROAD
from bench.matrix import Cell
from bench.method import Classifier

MEASURES: Mapping[str, Measure] = {
    measure.name: measure for measure in (AU, ENERGY, POINTING, AVERAGE_PRECISION, DELETION, INSERTION, DROP, ROAD, RANDOMISATION)
}
"""Name -> measure, in the order of `bench.config.MEASURES`."""
COLUMNS: Mapping[str, Column] = {column.name: column for measure in MEASURES.values() for column in measure.columns}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to measure besides the cosines."""

    names: tuple[str, ...]
    """Of `MEASURES`."""
    samples: int
    """Of the split, evenly spread; 0 = all."""
    seed: int
    """Of the randomised networks."""


def choice_of(cell: Cell) -> Choice:
    """What the settings of a cell ask for. Records from before there were measures ask for none."""
    return Choice(
        names=tuple(cell.evaluation.get("measures", ())),
        samples=cell.evaluation.get("measure_samples", 0),
        seed=cell.training.derived_seed("randomise"),
    )


class Measuring:
    """The chosen measures of one classifier on one split."""

    def __init__(self, choice: Choice, classifier: Classifier, *, total: int) -> None:
        """Choose the samples of each measure.

        Args:
            choice: what to measure.
            classifier: trained, in eval mode, on the device.
            total: number of samples of the split.
        """
        self._measures = [MEASURES[name] for name in choice.names]
        self._chosen = {measure.name: _spread(total, (choice.samples, measure.most_samples)) for measure in self._measures}
        self.randomised = functools.cache(functools.partial(_randomised, classifier, seed=choice.seed))
        """Randomised networks, made when they are first asked for."""

    def measure(self, seen: Explained, *, positions: Tensor) -> dict[str, Tensor]:
        """Column name -> (B,) float32 for samples at these positions (B,) of the split; NaN where one does not count."""
        columns: dict[str, Tensor] = {}
        for measure in self._measures:
            counted = self._chosen[measure.name].to(positions.device)[positions]
            if measure.needs_au_map:
                counted = counted & seen.au_valid
            rows = counted.nonzero()[:, 0]
            found = measure.compute(seen.take(rows)) if len(rows) else {}
            for column in measure.columns:
                values = columns[column.name] = seen.images.new_full((len(positions),), float("nan"))
                if len(rows):
                    values[rows] = found[column.name].detach().float()
        return columns


def _randomised(classifier: Classifier, part: Part, *, seed: int) -> Classifier:
    return randomise(classifier, part, seed=seed)


def _spread(total: int, limits: tuple[int | None, ...]) -> Tensor:
    """(total,) bool: as many samples as the least limit allows (0 and None are none), evenly spread: a function of these numbers alone."""
    count = min([total, *(limit for limit in limits if limit)])
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.arange(count) * total // count] = True
    return chosen
