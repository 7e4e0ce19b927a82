"""CAM against the published code's figures and against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.evaluation.maps import min_max, upsample
from bench.training.guidance import layer_attention
from tests.methods import posthoc

RUNS = [("CAM", True), ("CAM_variant", False)]


@pytest.mark.parametrize(("name", "large_maps"), RUNS)
def test_logits_are_the_published_ones(name, large_maps):
    _, output = posthoc.golden_output(large_maps)
    np.testing.assert_allclose(output.logits.numpy(), posthoc.golden(name)["logits"], atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("name", "large_maps"), RUNS)
def test_maps_are_the_published_ones(name, large_maps, variant):
    golden = posthoc.golden(name)
    maps = posthoc.golden_maps("cam", variant, golden["labels"], large_maps=large_maps)
    np.testing.assert_allclose(maps.numpy(), golden["maps_raw"], atol=1e-5)
    np.testing.assert_allclose(min_max(maps).numpy(), golden["maps"], atol=1e-4)
    if "map_up_first" in golden:
        np.testing.assert_allclose(upsample(min_max(maps), size=224)[0].numpy(), golden["map_up_first"], atol=1e-4)


def test_attentions_of_all_layers_are_the_published_ones():
    _, output = posthoc.golden_output(True)
    for layer, features in output.layers.items():
        np.testing.assert_allclose(layer_attention(features).numpy(), posthoc.golden("CAM")[f"attention_layer{layer}"], atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 9), classes=st.integers(2, 7), count=st.integers(1, 4), rectified=st.booleans())
def test_map_is_the_gradient_of_the_logit_times_the_activations(seed, channels, classes, count, rectified):
    classifier = posthoc.tiny(seed, channels=channels, classes=classes, rectified=rectified)
    images, labels = posthoc.draw(seed, count=count, classes=classes)
    maps = posthoc.read(posthoc.method("cam"), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):
        expected = posthoc.cam(*posthoc.pull(classifier, image, label)) * actual.numel()  # the gradient is W / (h w)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
