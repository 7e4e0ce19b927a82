"""WILDCAT against the published figures and against plain references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.backbones.mini import MiniResNet
from bench.backbones.resnet import ResNet50
from bench.evaluation.maps import min_max
from bench.method import Batch
from bench.methods.wildcat import Wildcat, bottom_mean, region_count, top_mean
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures
from tests.training.golden_step import take_step

GOLDEN = Path(__file__).parents[1] / "golden"


def _mini(**options):
    return MiniResNet.build(MiniResNet.Options(width=8, **options), image_size=32)


# --- The rule for k ---


@pytest.mark.parametrize(
    ("k", "positions", "count"),
    [
        (0.5, 784, 392),  # of the published code
        (0.1, 784, 78),
        (0.5, 49, 24),  # 24.5, half to even, as Python rounds
        (0.1, 49, 5),
        (1.0, 49, 49),
        (1, 49, 1),
        (3, 49, 3),
        (2.7, 49, 2),
        (50, 49, 49),
        (0, 49, 0),
        (-1, 49, 0),
    ],
)
def test_k_selects_a_share_or_a_count(k, positions, count):
    assert region_count(k, positions) == count


@given(k=st.one_of(st.integers(-3, 2000), st.floats(-3, 2000)), positions=st.integers(1, 1000))
def test_k_never_selects_more_than_there_is(k, positions):
    assert 0 <= region_count(k, positions) <= positions


def test_an_option_keeps_the_difference_between_one_and_one_point_zero():
    assert region_count(Wildcat.Options.model_validate({"kmax": 1}).kmax, 49) == 1
    assert region_count(Wildcat.Options.model_validate({"kmax": 1.0}).kmax, 49) == 49


# --- Pooling ---


@given(values=hnp.arrays(np.float64, (2, 3, 4, 5), elements=st.floats(-100, 100, width=16)), count=st.integers(1, 20))
def test_means_of_the_highest_and_lowest_are_those_of_the_sorted_values(values, count):
    maps = torch.from_numpy(values)
    for sample in range(2):
        for channel in range(3):
            ordered = sorted(values[sample, channel].ravel().tolist())
            assert top_mean(maps, count=count)[sample, channel].item() == pytest.approx(sum(ordered[-count:]) / count)
            assert bottom_mean(maps, count=count)[sample, channel].item() == pytest.approx(sum(ordered[:count]) / count)


def test_each_class_map_is_the_mean_over_the_class_s_own_block_of_channels():
    method = Wildcat(Wildcat.Options(modalities=3), variant="paper")
    classifier = method.classifier(_mini(), num_classes=4).eval()
    output = classifier(torch.randn(2, 3, 32, 32))
    features = output.layers[classifier.backbone.last]
    weight, bias = classifier.head.weight[:, :, 0, 0], classifier.head.bias
    for label in range(4):
        rows = slice(3 * label, 3 * label + 3)
        wanted = torch.einsum("c,bchw->bhw", weight[rows].mean(dim=0), features) + bias[rows].mean()
        torch.testing.assert_close(output.class_maps[:, label], wanted, rtol=1e-4, atol=1e-5)


def test_without_a_minimum_term_the_score_is_the_mean_of_the_highest_alone():
    method = Wildcat(Wildcat.Options(kmin=0), variant="paper")
    output = method.classifier(_mini(), num_classes=7).eval()(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.logits, top_mean(output.class_maps, count=8))


def test_the_official_score_ignores_kmin_and_alpha():
    torch.manual_seed(0)
    method = Wildcat(Wildcat.Options(kmin=0.3, alpha=2.0), variant="official")
    output = method.classifier(_mini(), num_classes=7).eval()(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.logits, top_mean(output.class_maps, count=8))


def test_a_share_of_nothing_says_what_to_do():
    method = Wildcat(Wildcat.Options(kmax=0.01), variant="paper")
    with pytest.raises(ValueError, match=r"selects none of the 4 x 4 positions.*--set methods\.wildcat\.kmax=1"):
        method.classifier(_mini(), num_classes=7)(torch.randn(2, 3, 32, 32))


# --- Published figures ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("WILDCAT", {"modalities": 5, "kmax": 0.5, "kmin": 0.1, "alpha": 0.6}),
        ("WILDCAT_variant", {"modalities": 3, "kmax": 0.2, "kmin": 0.2, "alpha": 0.7}),
    ],
)
def test_logits_and_maps_are_the_published_ones(name, options):
    golden = np.load(GOLDEN / f"official_{name}.npz", allow_pickle=False)
    backbone = ResNet50.build(ResNet50.Options(), image_size=224)
    images = pictures(str(golden["image_tag"]), count=3, size=224)
    labels = torch.from_numpy(golden["labels"])

    def published(key):
        return key.replace("backbone.net.", "encoder/").replace("head.", "classification_head/to_modalities.")

    method = Wildcat(Wildcat.Options(**options), variant="official")
    classifier = method.classifier(backbone, num_classes=7).eval()
    fill(classifier, published, gain=float(golden["gain"]))
    with torch.inference_mode():
        output = classifier(images)
        maps = method.maps(classifier, output, labels)
    np.testing.assert_allclose(output.logits.numpy(), golden["logits"], atol=1e-4)
    np.testing.assert_allclose(output.class_maps.numpy(), golden["head_maps"], atol=1e-4)
    np.testing.assert_allclose(maps.numpy(), golden["maps_raw"], atol=1e-4)
    np.testing.assert_allclose(min_max(maps).numpy(), golden["maps"], atol=1e-4)
    paper = Wildcat(Wildcat.Options(**options), variant="paper").classifier(backbone, num_classes=7)
    np.testing.assert_allclose(paper._pool(output.class_maps).numpy(), golden["logits_paper"], atol=1e-4)


@pytest.mark.slow
def test_losses_gradients_statistics_and_update_agree_with_the_published_step():
    method = Wildcat(Wildcat.Options(modalities=5, kmax=0.5, kmin=0.1, alpha=0.6), variant="official")
    step = take_step(method, key="WILDCAT", published_head=lambda name: name.replace("head.", "to_modalities."))
    step.assert_agrees(head_bias="head.bias")


# --- In the harness ---


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_training_step_lowers_the_loss_and_maps_have_the_native_grid(variant):
    torch.manual_seed(0)
    method = Wildcat(Wildcat.Options(), variant=variant)
    classifier = method.classifier(_mini(norm="group"), num_classes=7)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=1.0, layers=(5,)))
    batch = Batch(
        positions=torch.arange(4),
        seeds=torch.arange(4),
        images=torch.randn(4, 3, 32, 32),
        labels=torch.tensor([0, 1, 2, 3]),
        au_maps=torch.rand(4, 32, 32),
        au_valid=torch.tensor([False, True, True, True]),
    )
    optimiser = torch.optim.SGD(task.parameters(), lr=0.01)
    first = task(batch, guided_share(3, parts=1))["loss"]
    first.backward()
    optimiser.step()
    assert task(batch, guided_share(3, parts=1))["loss"] < first
    classifier.eval()
    with torch.inference_mode():
        output = classifier(batch.images)
        assert method.maps(classifier, output, batch.labels).shape == (4, 4, 4)
