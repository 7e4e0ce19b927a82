"""The form of what a classifier gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.evaluation.contract import ContractError, check_output
from tests.methods.posthoc import tiny


def give(change=lambda output: output):
    classifier = tiny(0, classes=7)
    with torch.inference_mode():
        output = change(classifier(torch.randn(2, 3, 12, 12, dtype=torch.float64)))
    return output, classifier


def with_logits(change):
    return lambda output: dataclasses.replace(output, logits=change(output.logits))


def test_what_a_classifier_of_the_project_gives_passes():
    output, classifier = give()
    check_output(output, classifier, samples=2, num_classes=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: (o.logits, o.layers), r"returns a tuple; wanted is a bench\.method\.Output"),
        (lambda o: {"logits": o.logits}, r"returns a dict"),
        (lambda o: o.logits, r"returns a Tensor"),
        (
            with_logits(lambda z: torch.cat([z, z[:, :1]], dim=1)),
            r"logits: shape \(2, 8\), wanted \(2, 7\): one value for each of the .* 7",
        ),
        (with_logits(lambda z: z[:, :6]), r"logits: shape \(2, 6\), wanted \(2, 7\)"),
        (with_logits(lambda z: z[:, :, None, None]), r"logits: shape \(2, 7, 1, 1\), wanted \(2, 7\)"),
        (with_logits(lambda z: z.log()), r"logits: NaN or infinite values"),
        (with_logits(lambda z: z.softmax(dim=1)), r"logits are probabilities.*leave the softmax to the loss"),
        (with_logits(lambda z: z.argmax(dim=1)), r"logits: a tensor of torch.int64; wanted are floating-point values"),
        (lambda o: dataclasses.replace(o, layers={1: o.layers[1]}), r"has the layers 1; its backbone declares 1, 2, 3, 4"),
        (lambda o: dataclasses.replace(o, layers=o.layers | {2: o.layers[1]}), r"layer 2: shape \(2, 3, .*wanted \(2, 4, h, w\)"),
        (lambda o: dataclasses.replace(o, class_maps=o.layers[1]), r"class_maps: shape .*wanted \(2, 7, h, w\): a map for each class"),
    ],
)
def test_another_form_is_refused_in_words(change, message):
    output, classifier = give(change)
    with pytest.raises(ContractError, match=message):
        check_output(output, classifier, samples=2, num_classes=7)
