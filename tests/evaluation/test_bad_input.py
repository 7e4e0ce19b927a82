"""What cannot be explained is an error or a defined value, for every method; never a figure."""

from __future__ import annotations

import pytest
import torch

from bench.backbone import BACKBONES
from bench.evaluation.maps import check_finite, min_max, read_maps
from bench.method import METHODS

SMALL = {"cnn": "mini", "vit": "mini-vit", "apvit": "mini-apvit"}
BUILT_IN = [entry for entry in METHODS if entry.target.__module__.startswith("bench.methods")]


def explained(entry, *, break_weights=False):
    torch.manual_seed(0)
    small = BACKBONES.get(SMALL[entry.info.backbones[0]]).target
    method = entry.target(entry.target.Options(), variant="paper")
    classifier = method.classifier(small.build(small.Options(), image_size=32), num_classes=7).eval()
    if break_weights:
        with torch.no_grad():
            next(classifier.parameters()).fill_(float("nan"))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        output = classifier(images)
    output.images = images
    return method, classifier, output


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda e: e.name)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_class_id_out_of_range_is_an_error_that_names_it(entry, wrong):
    method, classifier, output = explained(entry)
    with pytest.raises(ValueError, match=rf"class id {wrong} is out of range: the classifier has 7 classes, 0 to 6"):
        read_maps(method, classifier, output, torch.tensor([0, wrong]))


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda e: e.name)
def test_a_network_with_nan_weights_is_refused(entry):
    _, _, output = explained(entry, break_weights=True)
    with pytest.raises(ValueError, match="faces/cam: the network gives NaN or infinite logits"):
        check_finite(output.logits, label="faces/cam")


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda e: e.name)
def test_maps_of_every_method_are_scaled_to_the_unit_interval(entry):
    method, classifier, output = explained(entry)
    with torch.inference_mode():  # as the evaluator
        scaled = min_max(read_maps(method, classifier, output, torch.tensor([1, 6])))
    assert scaled.isfinite().all()
    assert scaled.min() == 0
    assert scaled.max() <= 1


def test_maps_of_the_wrong_form_are_an_error_that_names_the_method():
    method, classifier, output = explained(METHODS.get("cam"))
    method.maps = lambda *_: torch.zeros(2, 7, 4, 4)
    with pytest.raises(ValueError, match=r"CAM\.maps returned the shape \(2, 7, 4, 4\), wanted \(2, h, w\)"):
        read_maps(method, classifier, output, torch.tensor([0, 1]))
