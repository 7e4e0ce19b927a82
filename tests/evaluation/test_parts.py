"""Values that come in parts, put together field by field."""

from __future__ import annotations

import dataclasses

import torch

from bench.evaluation.parts import combine, convert


@dataclasses.dataclass(frozen=True)
class Part:
    labels: torch.Tensor
    maps: dict[str, dict[int, torch.Tensor]]


def part(*values):
    tensor = torch.tensor(values)
    return Part(labels=tensor, maps={"cam": {5: 10 * tensor}})


def test_parts_are_joined_in_every_nested_field():
    whole = combine([part(1, 2), part(3)], lambda tensors: torch.cat(list(tensors)))
    assert whole.labels.tolist() == [1, 2, 3]
    assert whole.maps["cam"][5].tolist() == [10, 20, 30]


def test_a_conversion_leaves_the_original_as_it_is():
    original = part(1, 2)
    assert convert(original, torch.Tensor.tolist) == Part(labels=[1, 2], maps={"cam": {5: [10, 20]}})
    assert original.labels.tolist() == [1, 2]
