"""The sanity check: rank correlation against scipy, and maps of networks that have forgotten what they learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bench.backbone import BACKBONES
from bench.evaluation.measures import MEASURES
from bench.evaluation.measures.randomisation import randomise
from bench.evaluation.measures.ranks import spearman
from bench.method import METHODS
from bench.training.checkpoint import hash_weights
from tests.evaluation.explained import explained


@pytest.mark.parametrize("levels", [None, 3])
def test_similarity_is_spearmans_with_and_without_equal_values(levels):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(6, 9, 9, generator=generator) for _ in range(2))
    b = a + 0.5 * b
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-5)


def test_similarity_with_a_constant_map_is_not_a_number():
    assert spearman(torch.rand(1, 4, 4), torch.zeros(1, 4, 4)).isnan().all()


def small(method, backbone="mini"):
    target, net = METHODS.get(method).target, BACKBONES.get(backbone).target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        built = net.build(net.Options(), image_size=64)
        return target(target.Options(), variant="paper").classifier(built, num_classes=7).eval()


CASES = [
    ("cam", "mini"),
    ("acol", "mini"),
    ("adl", "mini"),
    ("prm", "mini"),
    ("wildcat", "mini"),
    ("tscam", "mini-vit"),
    ("apvit", "mini-apvit"),
]


@pytest.mark.parametrize(("method", "backbone"), CASES)
def test_every_weight_of_the_chosen_part_is_drawn_anew_and_the_others_stay(method, backbone):
    trained = small(method, backbone)
    for weights in trained.parameters():
        if weights.numel() > 1 and weights.unique().numel() == 1:
            weights.data += torch.linspace(0.1, 1, weights.numel()).view_as(weights)  # so that what stays 0 or 1 shows
    before = {name: weights.clone() for name, weights in trained.state_dict().items()}
    head, everything = (randomise(trained, part, seed=3) for part in ("head", "all"))
    for name, weights in trained.named_parameters():
        assert torch.equal(head.get_parameter(name), weights) == name.startswith("backbone."), name
        assert not torch.equal(everything.get_parameter(name), weights) or weights.numel() == 1, name
    assert all(torch.equal(weights, before[name]) for name, weights in trained.state_dict().items())
    assert not head.training
    assert not everything.training


def test_a_randomised_network_is_a_function_of_the_seed():
    trained = small("cam")
    state = torch.random.get_rng_state()
    first, again, different = (hash_weights(randomise(trained, "all", seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != different
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["cam", "gradcampp", "smoothgradcampp"])
def test_maps_change_with_the_weights(name):
    figures = MEASURES["randomisation"].compute(explained(2, count=12, size=64, name=name))
    assert figures["randomisation_all"].nanmean() < 0.7
    assert figures["randomisation_head"].nanmean() < 0.95


def test_a_method_that_does_not_look_at_the_head_is_found_out():
    figures = MEASURES["randomisation"].compute(explained(2, count=12, name="eigencam"))
    assert figures["randomisation_head"].min() > 0.999
    assert figures["randomisation_all"].nanmean() < 0.9
