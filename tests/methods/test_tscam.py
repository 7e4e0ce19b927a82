"""TS-CAM against the published code's figures, a plain timm forward, and the rules of the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.backbone import BACKBONES
from bench.evaluation.maps import attention_cosines, map_cosines, min_max
from bench.method import METHODS, Batch, Classifier, Method, Output
from bench.training.guidance import layer_attention
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"


def build(variant: str, backbone: str = "mini-vit", *, size: int = 32, **options: object) -> tuple[Method, Classifier]:
    torch.manual_seed(3)
    network, method = BACKBONES.get(backbone).target, METHODS.get("tscam").target
    tscam = method(method.Options(), variant=variant)
    return tscam, tscam.classifier(network.build(network.Options.model_validate(options), image_size=size), num_classes=7).eval()


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], Method, Classifier, Output]:
    figures = dict(np.load(GOLDEN / "official_TSCAM.npz", allow_pickle=False))
    method, classifier = build("official", "deit-small", size=224)
    fill(classifier, lambda name: name.removeprefix("backbone.net."), gain=float(figures["gain"]))
    images = pictures("images", count=3, size=224)
    assert [images.double().sum().item(), images.double().abs().sum().item()] == pytest.approx(figures["image_digest"].tolist(), rel=1e-9)
    with torch.inference_mode():
        return figures, method, classifier, classifier(images)


def agree(value: torch.Tensor, expected: np.ndarray, *, atol: float) -> None:
    torch.testing.assert_close(value, torch.from_numpy(expected), rtol=0, atol=atol)


def test_logits_and_maps_are_the_published_codes(golden):
    figures, method, classifier, output = golden
    maps = method.maps(classifier, output, torch.from_numpy(figures["labels"]))
    agree(output.logits, figures["logits"], atol=1e-5)
    agree(maps, figures["maps_raw"], atol=1e-5)
    agree(min_max(maps), figures["maps"], atol=1e-4)


def test_attentions_of_both_layers_are_the_published_codes(golden):
    figures, _, _, output = golden
    for layer in (1, 2):
        agree(layer_attention(output.layers[layer]), figures[f"attention_layer{layer}"], atol=1e-5)


def test_cosines_are_the_published_codes(golden):
    figures, method, classifier, output = golden
    au = np.load(GOLDEN / "au_maps.npz", allow_pickle=False)
    columns = [str(name) for name in au["expressions"]]
    chosen = [au["maps_224"][i, columns.index(str(e))] for i, e in zip(figures["au_index"], figures["au_expression"], strict=True)]
    au_maps = torch.from_numpy(np.stack(chosen).astype(np.float32))
    of_layers = [attention_cosines(layer_attention(output.layers[layer]), au_maps) for layer in (1, 2)]
    of_maps = map_cosines(method.maps(classifier, output, torch.from_numpy(figures["labels"])), au_maps)
    agree(torch.stack([*of_layers, of_maps], dim=1), figures["cosines"], atol=1e-4)


def test_parameters_are_as_many_and_named_as_in_the_published_checkpoints(golden):
    _, _, classifier, _ = golden
    names = [name.removeprefix("backbone.net.") for name in classifier.state_dict()]
    assert sum(p.numel() for p in classifier.parameters()) == 21_689_863
    assert len(names) == 152
    assert {"cls_token", "pos_embed", "blocks.11.attn.qkv.bias", "norm.weight", "head.weight"} <= set(names)


def test_map_is_a_plain_timm_forwards_attention_times_class_map():
    method, classifier = build("paper")
    images = torch.randn(3, 3, 32, 32)
    classes = torch.tensor([6, 0, 2])
    net = classifier.backbone.net
    rows: list[torch.Tensor] = []
    hooks = []
    with torch.inference_mode():
        maps = method.maps(classifier, classifier(images), classes)
        for block in net.blocks:
            block.attn.fused_attn = False
            hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: rows.append(output[:, :, 0, 1:])))
        tokens = net.forward_features(images)[:, 1:]
        for hook in hooks:
            hook.remove()
        for i in range(3):
            grid = F.pad(tokens[i].T.reshape(-1, 4, 4), (1, 1, 1, 1))
            for y in range(4):
                for x in range(4):
                    score = (classifier.head.weight[classes[i]] * grid[:, y : y + 3, x : x + 3]).sum() + classifier.head.bias[classes[i]]
                    attention = sum(row[i, :, y * 4 + x].mean() for row in rows)
                    assert maps[i, y, x].item() == pytest.approx((attention * score).item(), abs=1e-5)


@given(data=st.data(), count=st.integers(1, 5))
@settings(max_examples=15)
def test_a_map_depends_on_its_own_image_and_class_only(data, count):
    method, classifier = build("official")
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    classes = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)))
    with torch.inference_mode():
        together = method.maps(classifier, classifier(images), classes)
        for i in range(count):
            alone = method.maps(classifier, classifier(images[i : i + 1]), classes[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_class_token_has_no_part_in_the_logits_but_its_attention_in_the_map():
    method, classifier = build("paper")
    output = classifier(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.logits, output.class_maps.mean(dim=(2, 3)))
    silent = torch.zeros_like(output.layers[2])
    unseen = Output(logits=output.logits, layers={**output.layers, 2: silent}, class_maps=output.class_maps)
    assert method.maps(classifier, unseen, torch.tensor([0, 1])).abs().max() == 0


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("layer", [1, 2])
def test_one_guided_step_moves_every_parameter_and_leaves_a_map(variant, layer):
    method, classifier = build(variant, dim=24, depth=2, heads=2)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(layer,))).train()
    batch = Batch(
        positions=torch.arange(4),
        seeds=torch.arange(4),
        images=torch.randn(4, 3, 32, 32),
        labels=torch.tensor([4, 0, 2, 6]),
        au_maps=torch.rand(4, 28, 28),
        au_valid=torch.tensor([True, False, True, True]),
    )
    losses = task(method.mix(batch), guided_share(3, parts=1))
    losses["loss"].backward()
    assert losses["guidance"] > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())
    before = classifier.head.weight.detach().clone()
    torch.optim.SGD(task.parameters(), lr=0.1).step()
    assert not torch.equal(classifier.head.weight, before)
    gradients = [p.grad.clone() for p in task.parameters()]
    with torch.inference_mode():
        maps = method.maps(classifier, classifier(batch.images), batch.labels)
    assert maps.shape == (4, 4, 4)
    assert maps.isfinite().all()
    assert classifier.training
    assert all(torch.equal(p.grad, g) for p, g in zip(task.parameters(), gradients, strict=True))
