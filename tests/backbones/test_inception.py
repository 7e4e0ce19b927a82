"""InceptionV3 in its form for localisation."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bench.backbone import BACKBONES
from bench.method import METHODS

InceptionV3 = BACKBONES.get("inceptionv3").target


def build(weights: str = "random"):
    return InceptionV3.build(InceptionV3.Options(weights=weights), image_size=64)


@functools.cache
def without_values():
    with torch.device("meta"):
        return build()


def test_sizes_and_channels_of_the_layers_at_224():
    with torch.no_grad():
        layers = without_values()(torch.empty(1, 3, 224, 224, device="meta")).layers
    expected = {1: (112, 64), 2: (57, 80), 3: (29, 288), 4: (29, 768), 5: (29, 1024)}
    assert {n: (layer.shape[2], layer.shape[1]) for n, layer in layers.items()} == expected


def plain_forward(net, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """The network of the weakly supervised localisation benchmark, written out; paddings given by hand."""

    def cba(module, x, *, stride=1, padding=0):
        bn = module.bn
        x = F.conv2d(x, module.conv.weight, None, stride, padding)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-3).relu()

    layers = {}
    x = cba(net.Conv2d_1a_3x3, x, stride=2, padding=1)
    x = cba(net.Conv2d_2a_3x3, x, padding=1)
    x = layers[1] = cba(net.Conv2d_2b_3x3, x, padding=1)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    x = layers[2] = cba(net.Conv2d_3b_1x1, x)
    x = cba(net.Conv2d_4a_3x3, x, padding=1)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        m = net.get_submodule(name)
        triple = cba(m.branch3x3dbl_3, cba(m.branch3x3dbl_2, cba(m.branch3x3dbl_1, x), padding=1), padding=1)
        pooled = cba(m.branch_pool, F.avg_pool2d(x, 3, 1, 1))
        x = torch.cat([cba(m.branch1x1, x), cba(m.branch5x5_2, cba(m.branch5x5_1, x), padding=2), triple, pooled], 1)
        if name == "Mixed_5c":
            layers[3] = x
    m = net.Mixed_6a
    triple = cba(m.branch3x3dbl_3, cba(m.branch3x3dbl_2, cba(m.branch3x3dbl_1, x), padding=1), padding=1)
    x = torch.cat([cba(m.branch3x3, x, padding=1), triple, F.max_pool2d(x, 3, 1, 1)], 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        m = net.get_submodule(name)
        across, down = {"padding": (0, 3)}, {"padding": (3, 0)}
        seven = cba(m.branch7x7_3, cba(m.branch7x7_2, cba(m.branch7x7_1, x), **across), **down)
        double = cba(m.branch7x7dbl_3, cba(m.branch7x7dbl_2, cba(m.branch7x7dbl_1, x), **down), **across)
        double = cba(m.branch7x7dbl_5, cba(m.branch7x7dbl_4, double, **down), **across)
        x = torch.cat([cba(m.branch1x1, x), seven, double, cba(m.branch_pool, F.avg_pool2d(x, 3, 1, 1))], 1)
    layers[4] = x
    for block in (net.SPG_A3_1b, net.SPG_A3_2b):
        x = F.conv2d(x, block[1].weight, block[1].bias, padding=1).relu()
    layers[5] = x
    return layers


def test_the_forward_pass_equals_a_plain_one():
    backbone = build().eval()
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    images = torch.randn(1, 3, 48, 48, generator=generator)
    with torch.no_grad():
        layers, wanted = backbone(images).layers, plain_forward(backbone.net, images)
    for number, layer in layers.items():
        torch.testing.assert_close(layer, wanted[number], rtol=1e-4, atol=1e-5 * float(layer.abs().max()))


@functools.cache
def published() -> dict[str, torch.Tensor]:
    """A file as published: the whole network with both classifiers."""
    return timm.create_model("inception_v3", pretrained=False, aux_logits=True).state_dict()


def test_the_published_file_lacks_the_last_two_convolutions_alone_and_that_is_allowed(tmp_path):
    state = published()
    save_file(state, tmp_path / "w.safetensors")
    backbone = build(str(tmp_path / "w.safetensors"))
    for name, tensor in backbone.net.state_dict().items():
        assert name.startswith("SPG_A3_") or torch.equal(tensor, state[name]), name
    assert backbone.net.SPG_A3_2b[1].weight.std() > 0


def test_no_other_gap_is_allowed(tmp_path):
    state = dict(published())
    del state["Mixed_6a.branch3x3.conv.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the network: missing Mixed_6a\.branch3x3\.conv\.weight\. The network"):
        build(str(tmp_path / "w.safetensors"))


def test_dropout_acts_in_training_alone():
    with torch.no_grad():
        backbone = build().eval()
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(backbone(images).layers[5], backbone(images).layers[5])
        backbone.net.SPG_A3_1b.train()
        assert not torch.equal(backbone(images).layers[5], backbone(images).layers[5])


def test_pictures_go_in_as_the_published_weights_want():
    cfg = timm.get_pretrained_cfg("inception_v3.tv_in1k")
    backbone = without_values()
    assert (backbone.mean, backbone.std) == (cfg.mean, cfg.std)


def test_attention_layers_stand_where_wsol_has_them():
    backbone = without_values()
    blocks = [backbone.blocks(layer)[index] for layer, index in backbone.attention_points()]
    assert blocks == [backbone.net.Mixed_5d, backbone.net.Mixed_6e, backbone.net.SPG_A3_2b]


def test_a_step_trains_every_parameter():
    method = METHODS.get("cam").target
    classifier = method(method.Options(), variant="paper").classifier(build(), num_classes=7)
    classifier(torch.randn(2, 3, 48, 48)).logits.square().sum().backward()
    assert [n for n, p in classifier.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
