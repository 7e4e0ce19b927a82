"""VGG-16 in its form for localisation."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from safetensors.torch import save_file

from bench.backbone import BACKBONES
from bench.method import METHODS

VGG16 = BACKBONES.get("vgg16").target
PUBLISHED = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Positions of the convolutions in the published file."""


def build(weights: str = "random"):
    return VGG16.build(VGG16.Options(weights=weights), image_size=64)


def published(names: object = PUBLISHED) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in timm.create_model("vgg16", num_classes=0).named_parameters() if n.startswith("features.")}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator) * 0.02 for n, shape in shapes.items() if int(n.split(".")[1]) in names}


def test_sizes_and_channels_of_the_layers_at_224():
    with torch.device("meta"), torch.no_grad():
        layers = build()(torch.empty(1, 3, 224, 224)).layers
    assert {n: (layer.shape[2], layer.shape[1]) for n, layer in layers.items()} == {
        1: (224, 64),
        2: (112, 128),
        3: (56, 256),
        4: (28, 1024),
    }


def test_the_number_of_parameters_is_that_of_the_convolutions():
    # 13 convolutions of VGG-16 (Simonyan and Zisserman, configuration D) and 512 -> 1024 with a bias.
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 1024]
    total = sum(9 * a * b + b for a, b in itertools.pairwise(widths))
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == total == 19_434_304


def test_the_forward_pass_equals_a_plain_one(tmp_path):
    save_file(published(), tmp_path / "vgg.safetensors")
    backbone = build(str(tmp_path / "vgg.safetensors")).eval()
    state = published()
    x = images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = {}
    for position in PUBLISHED:
        if position in (5, 10, 17):
            x = torch.nn.functional.max_pool2d(x, 2)
        x = torch.nn.functional.conv2d(x, state[f"features.{position}.weight"], state[f"features.{position}.bias"], padding=1).relu()
        wanted[{2: 1, 7: 2, 14: 3, 28: 4}.get(position, 0)] = x
    last = backbone.conv6[0]
    wanted[4] = torch.nn.functional.conv2d(wanted[4], last.weight, last.bias, padding=1).relu()
    with torch.no_grad():
        layers = backbone(images).layers
    for number in (1, 2, 3, 4):
        torch.testing.assert_close(layers[number], wanted[number], rtol=1e-4, atol=1e-6)


def test_the_published_file_lacks_conv6_alone_and_that_is_allowed(tmp_path):
    save_file({**published(), "pre_logits.fc1.weight": torch.ones(1), "head.fc.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    backbone = build(str(tmp_path / "w.safetensors"))
    assert torch.equal(backbone.features[28].weight, published()["features.28.weight"])
    assert backbone.conv6[0].weight.std() > 0
    assert backbone.pretrained


def test_no_other_gap_is_allowed(tmp_path):
    save_file(published(names=PUBLISHED[:-1]), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the network: missing features\.28\.bias; missing features\.28\.weight\. The network"):
        build(str(tmp_path / "w.safetensors"))


def test_a_file_of_ones_own_with_conv6_fills_it(tmp_path):
    donor = build()
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(build(str(tmp_path / "w.safetensors")).conv6[0].weight, donor.conv6[0].weight)


def test_attention_layers_stand_where_wsol_has_them():
    backbone = build()
    seen = {}
    for layer, index in backbone.attention_points():
        backbone.blocks(layer)[index].register_forward_hook(lambda _m, _i, out, at=(layer, index): seen.update({at: tuple(out.shape[1:])}))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 32, 32))
    assert list(seen.values()) == [(256, 4, 4), (512, 4, 4), (512, 4, 4)]


def test_a_step_trains_every_parameter():
    method = METHODS.get("cam").target
    classifier = method(method.Options(), variant="paper").classifier(build(), num_classes=7)
    classifier(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    assert [n for n, p in classifier.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
