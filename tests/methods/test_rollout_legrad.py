"""Attention rollout and LeGrad on TS-CAM classifiers, against slow references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.backbone import BACKBONES
from bench.method import METHODS, Classifier, Method, Output

NAMES = ("rollout", "legrad")


def build(name: str, *, variant: str = "paper", seed: int = 0) -> tuple[Method, Classifier]:
    torch.manual_seed(seed)
    network, tscam, reader = (BACKBONES.get("mini-vit").target, METHODS.get("tscam").target, METHODS.get(name).target)
    backbone = network.build(network.Options(dim=24, depth=3, heads=3), image_size=32)
    with torch.no_grad():  # timm's small initial weights make attentions all but uniform
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    classifier = tscam(tscam.Options(), variant=variant).classifier(backbone, num_classes=7).eval()
    return reader(reader.Options(), variant=variant), classifier


def run(classifier: Classifier, images: torch.Tensor) -> Output:
    output = classifier(images)
    output.images = images
    return output


def timm_blocks(classifier: Classifier, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(attention (heads, N, N), tokens after the block (N, D)) of every block of one image, by timm's own unfused forward."""
    net = classifier.backbone.net
    attentions, tokens, hooks = [], [], []
    for block in net.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: attentions.append(output)))
        hooks.append(block.register_forward_hook(lambda module, inputs, output: tokens.append(output)))
    net.forward_features(image[None])
    for hook in hooks:
        hook.remove()
    return list(zip(attentions, tokens, strict=True))


def test_rollout_is_the_product_of_all_blocks_mixed_with_the_identity():
    method, classifier = build("rollout")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        maps = method.maps(classifier, run(classifier, images), torch.tensor([0, 5]))
        for i in range(2):
            product = torch.eye(17)
            for attention, _ in timm_blocks(classifier, images[i]):
                mixed = torch.zeros(17, 17)
                for head in range(3):
                    mixed += attention[0, head] / 3
                mixed = 0.5 * mixed + 0.5 * torch.eye(17)
                product = mixed @ product
            torch.testing.assert_close(maps[i].flatten(), product[0, 1:], rtol=0, atol=1e-6)


def test_rollout_is_what_is_left_of_one_beside_the_class_token():
    method, classifier = build("rollout")
    with torch.inference_mode():
        maps = method.maps(classifier, run(classifier, torch.randn(4, 3, 32, 32)), torch.zeros(4, dtype=torch.int64))
    total = maps.sum(dim=(1, 2))
    assert maps.min() >= 0
    assert total.min() > 0
    assert total.max() < 1 - 0.5**3  # the class token keeps at least half in each of three blocks


def test_legrad_is_the_positive_gradient_of_each_blocks_own_score():
    method, classifier = build("legrad")
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    maps = method.maps(classifier, run(classifier, images), classes)
    assert maps.max() > 0
    for i in range(2):
        total = torch.zeros(17)
        for attention, tokens in timm_blocks(classifier, images[i]):
            grid = classifier.backbone.net.norm(tokens)[0, 1:].T.reshape(1, -1, 4, 4)
            score = classifier.head(grid)[0, classes[i]].mean()
            (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
            for head in range(3):
                for query in range(17):
                    total += gradient[0, head, query].clamp(min=0) / (3 * 17)
        torch.testing.assert_close(maps[i].flatten(), total[1:] / 3, rtol=1e-4, atol=1e-7)


def test_legrad_tells_classes_apart_and_rollout_does_not():
    images = torch.randn(2, 3, 32, 32)
    for name, differ in (("legrad", True), ("rollout", False)):
        method, classifier = build(name)
        output = run(classifier, images)
        first, second = (method.maps(classifier, output, torch.tensor(classes)) for classes in ([0, 1], [5, 2]))
        assert torch.equal(first, second) != differ


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_maps_leave_gradients_mode_and_frozen_networks_alone(name, variant):
    method, classifier = build(name, variant=variant)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    classifier(images).logits.sum().backward()
    gradients = [p.grad.clone() for p in classifier.parameters()]
    free = method.maps(classifier, run(classifier, images), classes)
    assert all(torch.equal(p.grad, g) for p, g in zip(classifier.parameters(), gradients, strict=True))
    assert not classifier.training
    assert all(p.requires_grad for p in classifier.parameters())
    assert not free.requires_grad
    classifier.requires_grad_(requires_grad=False)
    torch.testing.assert_close(method.maps(classifier, run(classifier, images), classes), free)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_the_same_in_inference_mode(name):
    method, classifier = build(name)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    outside = method.maps(classifier, run(classifier, images), classes)
    with torch.inference_mode():
        inside = method.maps(classifier, run(classifier, images * 1), classes * 1)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 999), count=st.integers(1, 4))
@settings(max_examples=10)
def test_a_map_depends_on_its_own_image_and_class_only(name, seed, count):
    method, classifier = build(name, seed=seed % 3)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    classes = torch.randint(7, (count,), generator=generator)
    together = method.maps(classifier, run(classifier, images), classes)
    for i in range(count):
        alone = method.maps(classifier, run(classifier, images[i : i + 1]), classes[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_posthoc_entries_train_as_tscam_and_are_left_out_of_all(name):
    info = METHODS.get(name).info
    assert (info.kind, info.trains_as, info.in_all, info.backbones) == ("posthoc", "tscam", False, ("vit",))
