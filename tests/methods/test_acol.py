"""ACoL against the published code (tests/golden/official_ACoL*.npz) and against a loop over samples and places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.backbone import BACKBONES
from bench.evaluation.maps import min_max
from bench.method import METHODS, Batch
from bench.methods.acol import LOGITS_B, ACoL, attention_of, erase
from bench.training.guidance import layer_attention
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures
from tests.training.golden_step import take_step

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ("paper", "official")


def published_name(name: str) -> str:
    if name.startswith("backbone."):
        return name.replace("backbone.net.", "encoder/")
    return name.replace("branch_a.", "classification_head/acol_pooler.classifier_A.").replace(
        "branch_b.", "classification_head/acol_pooler.classifier_B."
    )


def tiny(*, variant, **options):
    torch.manual_seed(0)
    target = BACKBONES.get("mini").target
    backbone = target.build(target.Options(width=8), image_size=32)
    method = ACoL(ACoL.Options(**options), variant=variant)
    return method, method.classifier(backbone, num_classes=7)


def tiny_batch(count=6):
    labels = torch.arange(count) % 7
    return Batch(
        positions=torch.arange(count),
        seeds=torch.arange(count),
        images=pictures("tiny", count=count, size=32),
        labels=labels,
        au_maps=torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(0)),
        au_valid=labels != 0,
    )


@pytest.fixture(scope="module")
def resnet():
    target = BACKBONES.get("resnet50").target
    backbone = target.build(target.Options(), image_size=224)
    method = ACoL(ACoL.Options(), variant="official")
    classifier = method.classifier(backbone, num_classes=7)
    fill(classifier, published_name, gain=0.7)
    classifier.eval()
    images = pictures("images", count=3, size=224)
    with torch.inference_mode():
        return classifier, images, classifier(images)


@pytest.mark.parametrize(("file", "threshold"), [("official_ACoL", None), ("official_ACoL_variant", 0.35)])
def test_logits_maps_and_erasing_are_the_published_ones(resnet, file, threshold):
    classifier, images, output = resnet
    golden = np.load(GOLDEN / f"{file}.npz", allow_pickle=False)
    assert [images.double().sum().item(), images.double().abs().sum().item()] == pytest.approx(golden["image_digest"].tolist(), rel=1e-9)
    method = ACoL(ACoL.Options(threshold=threshold), variant="official")
    classifier.threshold = threshold or 0.1
    labels = torch.from_numpy(golden["labels"])
    with torch.inference_mode():
        attention = attention_of(output.class_maps, labels, variant="official")
        b = classifier.erased_maps(output.layers[5], attention)
        maps = method.maps(classifier, output, labels)
        again = classifier(images[:1], labels[:1])

    def expect(value, key, atol):
        torch.testing.assert_close(value, torch.from_numpy(golden[key]), rtol=0, atol=atol)

    expect(output.logits, "logits", 1e-4)
    expect(b.mean(dim=(2, 3)), "logits_b", 1e-4)
    torch.testing.assert_close(again.extras[LOGITS_B], torch.from_numpy(golden["logits_b"][:1]), rtol=0, atol=1e-4)
    expect((attention >= classifier.threshold).float().mean(dim=(1, 2)), "erased_fraction", 1e-6)
    expect(torch.maximum(min_max(output.class_maps), min_max(b)), "head_maps", 1e-4)
    expect(maps, "maps_raw", 1e-4)
    expect(min_max(maps), "maps", 1e-4)
    if "attention_layer5" in golden:
        for layer in range(1, 6):
            expect(layer_attention(output.layers[layer]), f"attention_layer{layer}", 1e-5)


@pytest.mark.slow
def test_a_training_step_is_the_published_one():
    step = take_step(
        ACoL(ACoL.Options(), variant="official"),
        key="ACoL",
        published_head=lambda name: published_name(name).removeprefix("classification_head/"),
    )
    step.assert_agrees(head_bias="branch_b.4.bias")


def test_the_default_head_has_the_published_size():
    target = BACKBONES.get("resnet50").target
    with torch.device("meta"):
        classifier = ACoL(ACoL.Options(), variant="paper").classifier(target.build(target.Options(), image_size=224), num_classes=7)
    assert sum(p.numel() for p in classifier.parameters()) == 80_149_582


def test_a_small_network_gets_small_branches():
    _, classifier = tiny(variant="paper")
    assert classifier.branch_a[0].out_channels == 64
    assert tiny(variant="paper", channels=12)[1].branch_b[2].in_channels == 12


@given(
    classes=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    side=st.integers(1, 5),
    threshold=st.sampled_from([0.1, 0.35, 0.6, 1.0]),
    constant=st.booleans(),
    seed=st.integers(0, 2**16),
    variant=st.sampled_from(VARIANTS),
)
def test_erasing_is_that_of_a_loop_over_places(classes, side, threshold, constant, seed, variant):
    generator = torch.Generator().manual_seed(seed)
    count = len(classes)
    maps = torch.randn(count, 3, side, side, generator=generator)
    if constant:
        maps[0] = 1.5
    features = torch.randn(count, 2, side, side, generator=generator)
    erased = erase(features, attention_of(maps, torch.tensor(classes), variant=variant), threshold=threshold)
    for i, c in enumerate(classes):
        own = maps[i, c]
        low, high = own.min(), own.max()
        for y in range(side):
            for x in range(side):
                gone = bool(high > low) and bool((own[y, x] - low) / (high - low) >= threshold)
                assert torch.equal(erased[i, :, y, x], torch.zeros(2) if gone else features[i, :, y, x])


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_are_those_of_one_sample_at_a_time(variant):
    method, classifier = tiny(variant=variant)
    classifier.eval()
    images = pictures("tiny", count=5, size=32)
    classes = torch.tensor([3, 1, 6, 1, 0])
    with torch.inference_mode():
        together = method.maps(classifier, classifier(images), classes)
        for i, c in enumerate(classes.tolist()):
            output = classifier(images[i : i + 1])
            first = output.class_maps[0, c]
            first = (first - first.min()) / (first.max() - first.min())
            kept = output.layers[5][0] * (first < (0.6 if variant == "paper" else 0.1))
            second = classifier.branch_b(kept[None])[0, c]
            second = (second - second.min()) / (second.max() - second.min())
            torch.testing.assert_close(together[i], torch.maximum(first, second), rtol=0, atol=1e-5)


def test_a_constant_map_of_branch_a_leaves_the_map_to_branch_b():
    method, classifier = tiny(variant="paper")
    classifier.eval()
    torch.nn.init.zeros_(classifier.branch_a[4].weight)
    with torch.inference_mode():
        output = classifier(pictures("tiny", count=2, size=32))
        classes = torch.tensor([2, 5])
        maps = method.maps(classifier, output, classes)
        whole = classifier.branch_b(output.layers[5])[torch.arange(2), classes]
    torch.testing.assert_close(maps, min_max(whole))
    assert maps.amax() == 1


def test_a_constant_map_of_branch_a_empties_the_published_map():
    method, classifier = tiny(variant="official")
    classifier.eval()
    torch.nn.init.zeros_(classifier.branch_a[4].weight)
    with torch.inference_mode():
        maps = method.maps(classifier, classifier(pictures("tiny", count=2, size=32)), torch.tensor([2, 5]))
    assert torch.equal(min_max(maps), torch.zeros_like(maps))


def test_the_logits_do_not_depend_on_labels():
    _, classifier = tiny(variant="paper")
    classifier.eval()
    images = pictures("tiny", count=2, size=32)
    with torch.inference_mode():
        plain, labelled = classifier(images), classifier(images, torch.tensor([1, 2]))
    assert torch.equal(plain.logits, labelled.logits)
    assert LOGITS_B not in plain.extras


def test_the_loss_is_the_sum_of_both_branches_and_erasing_stops_their_gradient():
    method, classifier = tiny(variant="paper")
    batch = tiny_batch()
    output = classifier(batch.images, batch.labels)
    expected = sum(
        -logits.log_softmax(dim=1)[i, label] / 6
        for logits in (output.logits, output.extras[LOGITS_B])
        for i, label in enumerate(batch.labels.tolist())
    )
    torch.testing.assert_close(method.loss(output, batch), expected)
    last = output.layers[5]
    last.retain_grad()
    output.extras[LOGITS_B].sum().backward()
    erased = attention_of(output.class_maps, batch.labels, variant="paper") >= 0.6
    assert erased.any()
    assert (last.grad.movedim(1, 3)[erased] == 0).all()
    assert all(p.grad is None for p in classifier.branch_a.parameters()), "what is erased is no way to teach branch A"


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_and_explains(variant):
    method, classifier = tiny(variant=variant, channels=8)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(5,))).train()
    batch = method.mix(tiny_batch())
    task(batch, guided_share(int(batch.au_valid.sum()), parts=1))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    classifier.zero_grad()
    classifier.eval()
    maps = method.maps(classifier, classifier(batch.images), batch.labels)
    assert maps.shape == (6, 4, 4)
    assert not maps.requires_grad
    assert all(p.grad is None for p in classifier.parameters())


def test_it_is_registered():
    entry = METHODS.get("acol")
    assert entry.target is ACoL
    assert entry.info.kind == "trained"
