"""The measures of one evaluation: which ones, on which samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.evaluation.measures.base import Column, Explained, Measure
from bench.evaluation.measures.faithfulness import deletion, drop, insertion
from bench.evaluation.measures.randomisation import randomisation, randomise
from bench.evaluation.measures.regions import ap, au, energy, pointing
from bench.evaluation.measures.road import road
from bench.matrix import Cell
from bench.method import Classifier

MEASURES: Mapping[str, Measure] = {
    measure.name: measure for measure in (au, energy, pointing, ap, deletion, insertion, drop, road, randomisation)
}
"""Name -> measure, in the order of `bench.config.MEASURES`."""
COLUMNS: Mapping[str, Column] = {column.name: column for measure in MEASURES.values() for column in measure.columns}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The optional measures of a cell."""

    names: tuple[str, ...]
    """Of `MEASURES`."""
    samples: int
    """Number of samples, evenly spread over the split; 0 = all."""
    seed: int
    """Of the randomised networks."""


NO_MEASURES = Choice(names=(), samples=0, seed=0)


def choice_of(cell: Cell) -> Choice:
    """The measures that the settings of a cell ask for. Records of versions without measures ask for none."""
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
        measures = [MEASURES[name] for name in choice.names]
        self._chosen = [(measure, _spread(total, choice.samples, measure.most_samples)) for measure in measures]
        self.randomised = functools.cache(functools.partial(randomise, classifier, seed=choice.seed))
        """Part -> randomised network, made at the first call."""

    def measure(self, explained: Explained, *, positions: Tensor) -> dict[str, Tensor]:
        """Column name -> (B,) float32 for samples at these positions (B,) of the split; NaN where a sample does not count."""
        columns: dict[str, Tensor] = {}
        for measure, chosen in self._chosen:
            counted = chosen.to(positions.device)[positions]
            if measure.needs_au_map:
                counted = counted & explained.au_valid
            rows = counted.nonzero()[:, 0]
            computed = measure.compute(explained.take(rows)) if len(rows) else {}
            for column in measure.columns:
                values = columns[column.name] = explained.images.new_full((len(positions),), float("nan"))
                if len(rows):
                    values[rows] = computed[column.name].detach().float()
        return columns


def _spread(total: int, *limits: int | None) -> Tensor:
    """(total,) bool: as many samples as the lowest limit allows, evenly spread. A limit of 0 or None is no limit."""
    count = min([total, *(limit for limit in limits if limit)])
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.arange(count) * total // count] = True
    return chosen
