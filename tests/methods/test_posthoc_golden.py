"""Grad-CAM, Grad-CAM++ and LayerCAM of ResNet-50 against the figures of the published code (tests/golden/official_*.npz)."""

from __future__ import annotations

import numpy as np
import pytest

from bench.evaluation.maps import min_max, upsample
from tests.methods import posthoc

RUNS = [("gradcam", "GradCam"), ("gradcampp", "GradCAMpp"), ("layercam", "LayerCAM")]


@pytest.mark.parametrize(("name", "published"), RUNS)
def test_logits_are_the_published_ones(name, published):
    _, output = posthoc.golden_output(True)
    np.testing.assert_allclose(output.logits.numpy(), posthoc.golden(published)["logits"], atol=1e-4)


@pytest.mark.parametrize(("name", "published"), RUNS)
def test_official_maps_are_the_published_ones(name, published):
    golden = posthoc.golden(published)
    maps = posthoc.golden_maps(name, "official", golden["labels"])
    peaks = golden["maps_raw"].max(axis=(1, 2), keepdims=True)  # 1e-8 for Grad-CAM++: only a relative comparison says anything
    np.testing.assert_allclose(maps.numpy() / peaks, golden["maps_raw"] / peaks, atol=1e-4)
    np.testing.assert_allclose(min_max(maps).numpy(), golden["maps"], atol=1e-4)
    np.testing.assert_allclose(upsample(min_max(maps), size=224)[0].numpy(), golden["map_up_first"], atol=1e-4)


def test_gradcampp_of_the_paper_is_the_formula_carried_out_in_full():
    golden = posthoc.golden("GradCAMpp")
    maps = posthoc.golden_maps("gradcampp", "paper", golden["labels"])
    np.testing.assert_allclose(maps.numpy(), golden["maps_paper_raw"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(min_max(maps).numpy(), golden["maps_paper"], atol=1e-4)
    assert np.abs(golden["maps_paper"] - golden["maps"]).max() > 0.05, "the variants would not be told apart"


def test_gradcam_without_any_support_is_a_map_of_zeros():
    golden = posthoc.golden("GradCam")
    assert golden["degenerate_map_is_nan"]
    maps = posthoc.golden_maps("gradcam", "official", golden["degenerate_label"].repeat(3))
    np.testing.assert_array_equal(min_max(maps)[0].numpy(), golden["degenerate_map"])
    assert not golden["degenerate_map"].any()
