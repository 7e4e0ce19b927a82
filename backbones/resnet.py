"""ResNet-18/34/50/101/152 from timm, with the last two strides removed (``large_maps``) or not."""

from __future__ import annotations

from typing import Any, ClassVar

import timm
from pydantic import Field
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, BackboneOptions, Features
from bench.weights import load_weights


class TimmResNet(Backbone):
    """Five layers of a timm ResNet: the stem after its activation, then the four stages."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        info: Any = net.feature_info
        self.channels = {number: stage["num_chs"] for number, stage in enumerate(info, start=1)}

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        net: Any = self.net
        stem = net.act1(net.bn1(net.conv1(images)))
        layers = {1: stem}
        x = net.maxpool(stem)
        for number, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
            x = layers[number] = stage(x)
        return Features(layers=layers)


def remove_last_strides(net: nn.Module) -> None:
    """Give the first block of stages 3 and 4 stride 1, without dilation: 28 x 28 maps at 224 (METHODS.md 1.1).

    All weights keep their shapes. timm's ``output_stride=8`` is not this: it dilates.
    """
    for stage in (net.layer3, net.layer4):
        block: Any = stage[0]  # type: ignore[index]
        strided = block.conv2 if hasattr(block, "conv3") else block.conv1
        strided.stride = (1, 1)
        block.downsample[0].stride = (1, 1)


class ResNet(TimmResNet):
    """A timm ResNet by name."""

    arch: ClassVar[str]

    class Options(BackboneOptions):
        """Accepted keys of ``[backbones.resnetN]``."""

        large_maps: bool = True
        """28 x 28 maps at 224 pixels instead of 7 x 7."""
        drop_path: float = Field(default=0.0, ge=0, lt=1)
        """Stochastic depth rate."""

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> ResNet:  # noqa: ARG003 - any size will do
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        net = timm.create_model(cls.arch, pretrained=False, num_classes=0, global_pool="", drop_path_rate=options.drop_path)
        load_weights(net, options.weights, timm_name=f"{cls.arch}.tv_in1k")
        if options.large_maps:
            remove_last_strides(net)
        return cls(net)


_PAPER = {"paper": "He et al., CVPR 2016, Deep Residual Learning for Image Recognition", "year": 2016, "doi": "10.1109/CVPR.2016.90"}


@BACKBONES.register("resnet18", title="ResNet-18", kind="cnn", **_PAPER)
class ResNet18(ResNet):
    """11 M parameters."""

    arch = "resnet18"


@BACKBONES.register("resnet34", title="ResNet-34", kind="cnn", **_PAPER)
class ResNet34(ResNet):
    """21 M parameters."""

    arch = "resnet34"


@BACKBONES.register("resnet50", title="ResNet-50", kind="cnn", **_PAPER)
class ResNet50(ResNet):
    """24 M parameters; the network of the published tables."""

    arch = "resnet50"


@BACKBONES.register("resnet101", title="ResNet-101", kind="cnn", **_PAPER)
class ResNet101(ResNet):
    """43 M parameters."""

    arch = "resnet101"


@BACKBONES.register("resnet152", title="ResNet-152", kind="cnn", **_PAPER)
class ResNet152(ResNet):
    """58 M parameters."""

    arch = "resnet152"
