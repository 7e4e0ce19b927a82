"""The ResNets: sizes of maps, numbers of parameters, and the stride patch against the published code's."""

from __future__ import annotations

import pytest
import timm
import torch
from pydantic import ValidationError

from bench.backbone import BACKBONES
from bench.method import METHODS

DEEPER = {"resnet34", "resnet101", "resnet152"}
"""They have more of the same blocks than resnet18 and resnet50."""


def deeper_are_slow(names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in DEEPER else []) for name in names]


def build(name: str, *, image_size: int = 64, **options: object):
    target = BACKBONES.get(name).target
    return target.build(target.Options(**options), image_size=image_size)


def sizes(backbone, side: int) -> list[int]:
    with torch.no_grad():
        layers = backbone(torch.empty(1, 3, side, side, device="meta")).layers
    assert {number: layer.shape[1] for number, layer in layers.items()} == backbone.channels
    assert all(layer.shape[2] == layer.shape[3] for layer in layers.values())
    return [layers[number].shape[2] for number in sorted(layers)]


@pytest.mark.parametrize("name", deeper_are_slow(["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]))
@pytest.mark.parametrize(("large", "expected"), [(True, [112, 56, 28, 28, 28]), (False, [112, 56, 28, 14, 7])])
def test_sizes_of_the_maps(name, large, expected):
    with torch.device("meta"):
        assert sizes(build(name, large_maps=large), 224) == expected


@pytest.mark.parametrize(
    ("name", "backbone_parameters"),
    # torchvision's published totals without the classifier of 1000 classes: 11,689,512 - 513,000 and so on.
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
    ],
)
def test_numbers_of_parameters(name, backbone_parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) == backbone_parameters


def test_resnet50_with_the_head_of_cam_has_the_published_number_of_parameters():
    method = METHODS.get("cam").target
    with torch.device("meta"):
        classifier = method(method.Options(), variant="official").classifier(build("resnet50"), num_classes=7)
    assert sum(p.numel() for p in classifier.parameters()) == 23_522_375


def shaken(backbone):
    """In eval mode, with batch norms that do something: fresh ones scale the residual branches by zero, which would hide them."""
    generator = torch.Generator().manual_seed(1)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1, generator=generator)
    return backbone.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_last_layer_equals_a_plain_timm_forward_with_strides_patched_by_hand(name):
    backbone = shaken(build(name))
    plain = timm.create_model(name, pretrained=False, num_classes=0, global_pool="").eval()
    plain.load_state_dict(backbone.net.state_dict())
    strided = "conv1" if name == "resnet18" else "conv2"
    for stage in ("layer3", "layer4"):
        plain.get_submodule(f"{stage}.0.{strided}").stride = (1, 1)
        plain.get_submodule(f"{stage}.0.downsample.0").stride = (1, 1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = backbone(images).layers
        assert torch.equal(layers[5], plain(images))
        assert torch.equal(layers[1], plain.act1(plain.bn1(plain.conv1(images))))


def test_removing_strides_is_not_dilation():
    backbone = shaken(build("resnet18"))
    dilated = timm.create_model("resnet18", pretrained=False, num_classes=0, global_pool="", output_stride=8).eval()
    dilated.load_state_dict(backbone.net.state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (backbone(images).layers[5] - dilated(images)).abs().max() > 1e-3


def test_weights_fit_with_and_without_large_maps():
    large, small = build("resnet18", large_maps=True), build("resnet18", large_maps=False)
    small.load_state_dict(large.state_dict())


@pytest.mark.parametrize(
    ("options", "message"), [({"drop_path": 1.0}, "less than 1"), ({"normalization": "faces"}, "'weights', 'imagenet'")]
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        build("resnet50", **options)


@pytest.mark.parametrize(
    "name",
    deeper_are_slow(n for n in BACKBONES.names() if BACKBONES.get(n).info.kind == "cnn" and BACKBONES.get(n).origin.count("/backbones/")),
)
def test_every_convolutional_network_builds_for_real_and_gives_what_it_declares(name):
    backbone = build(name).eval()
    assert backbone.last == max(backbone.channels)
    assert set(BACKBONES.get(name).info.guided_layers) <= set(backbone.channels)
    with torch.no_grad():
        layers = backbone(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).layers
    assert {number: layer.shape[1] for number, layer in layers.items()} == backbone.channels
    assert all(layer.isfinite().all() and layer.std() > 0 for layer in layers.values())
