"""What cannot be explained is an error or a defined value, for every method; never a figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.evaluation.evaluator import Unusable
from bench.evaluation.maps import map_ranges, min_max
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.read_out import check_finite, forward, read_out
from bench.method import METHODS

BUILT_IN = [entry.name for entry in METHODS if entry.target.__module__.startswith("bench.methods")]


@pytest.fixture
def explained(make_method):
    """A method and a classifier by the method's name, and the classifier's output for two pictures."""

    def make(name, *, break_weights=False):
        method, classifier = make_method(name)
        if break_weights:
            with torch.no_grad():
                next(classifier.parameters()).fill_(float("nan"))
        with torch.inference_mode():
            return method, classifier, forward(classifier, torch.randn(2, 3, 32, 32))

    return make


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_class_id_out_of_range_is_an_error_that_names_it(explained, name, wrong):
    method, classifier, output = explained(name)
    with pytest.raises(ValueError, match=rf"class id {wrong} is out of range: the classifier has 7 classes, 0 to 6"):
        read_out(method, classifier, output, torch.tensor([0, wrong]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_network_with_nan_weights_is_refused(explained, name):
    _, _, output = explained(name, break_weights=True)
    with pytest.raises(ValueError, match="faces/cam: the network gives NaN or infinite logits"):
        check_finite(output.logits, label="faces/cam")


@pytest.mark.parametrize("name", BUILT_IN)
def test_maps_of_every_method_are_scaled_to_the_unit_interval(explained, name):
    method, classifier, output = explained(name)
    with torch.inference_mode():  # as the evaluator
        scaled = min_max(read_out(method, classifier, output, torch.tensor([1, 6])))
    assert scaled.isfinite().all()
    assert scaled.min() == 0
    assert scaled.max() <= 1


def test_maps_of_the_wrong_form_are_an_error_that_names_the_method(explained):
    method, classifier, output = explained("cam")
    method.maps = lambda *_: torch.zeros(2, 7, 4, 4)
    with pytest.raises(ValueError, match=r"CAM\.maps returned the shape \(2, 7, 4, 4\), wanted \(2, h, w\)"):
        read_out(method, classifier, output, torch.tensor([0, 1]))


NAN = float("nan")


def spoil(method, change, *, of=(3, 7)):
    """Let the maps of a method come out changed for some samples of the split, which come in batches of 9."""
    seen, plain = [0], method.maps

    def maps(classifier, output, classes):
        values = plain(classifier, output, classes).clone()
        first = seen[0] // 2 * 9  # twice a batch: of the true and of the predicted class
        seen[0] += 1
        for sample in of:
            if first <= sample < first + len(values):
                values[sample - first] = change(values[sample - first])
        return values

    method.maps = maps
    return method


@pytest.mark.parametrize("change", [lambda m: m * NAN, lambda m: m.index_fill(0, torch.tensor([0]), float("inf"))], ids=["nan", "inf"])
def test_maps_that_are_not_finite_fail_their_cell_alone_with_their_number_and_the_first(evaluated, make_method, split, change):
    method, classifier = make_method("cam")
    results = evaluated(classifier, {"cam": make_method("cam")[0], "spoiled": spoil(method, change)})
    assert results["cam"].rows.map_cosines_true is not None
    assert isinstance(results["spoiled"], Unusable)
    assert (
        f"maps of 2 of 27 samples hold NaN or infinite values, the first that of sample {split.reader.keys[3]}" in results["spoiled"].reason
    )


def test_the_variant_official_counts_them_as_zeros_and_says_how_many(evaluated, make_method):
    method, classifier = make_method("cam")
    method.variant = "official"
    rows = evaluated(classifier, {"cam": spoil(method, lambda m: m * NAN)})["cam"].rows
    counts = compute_metrics(rows, classes=tuple("abcdefg"), expressive=[False] + [True] * 6)["maps"]
    assert counts["true"] == {"samples": 27, "constant": 0, "not_finite": 2}
    assert np.nan_to_num(rows.map_cosines_true[[3, 7]]).tolist() == [0, 0]


def test_constant_maps_count_as_zeros_and_are_counted(evaluated, make_method):
    method, classifier = make_method("cam")
    result = evaluated(classifier, {"cam": spoil(method, torch.ones_like, of=range(5))})["cam"]
    counts = compute_metrics(result.rows, classes=tuple("abcdefg"), expressive=[False] + [True] * 6)["maps"]
    assert counts["true"] == {"samples": 27, "constant": 5, "not_finite": 0}


@pytest.mark.parametrize(
    ("values", "span"),
    [([[0.0, 1.0], [2.0, 5.0]], 5.0), ([[3.0, 3.0], [3.0, 3.0]], 0.0), ([[7.0]], 0.0), ([[0.0, NAN]], NAN), ([[0.0, -float("inf")]], NAN)],
)
def test_the_range_of_a_map_tells_constant_ones_and_those_that_are_not_finite(values, span):
    np.testing.assert_array_equal(map_ranges(torch.tensor([values])), [span])
