"""ResNet-18/34/50/101/152 from timm, with the last two strides removed (``large_maps``) or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import timm
from pydantic import Field
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, BackboneOptions, Features
from bench.weights import VGGFACE2_MEAN, VGGFACE2_STD, load_weights, vggface2_weights

NORMALIZATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": (Backbone.mean, Backbone.std),
    "vggface2": (VGGFACE2_MEAN, VGGFACE2_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation, RGB, for pictures in [0, 1]."""


class TimmResNet(Backbone):
    """Five layers of a timm ResNet: the stem after its activation, then the four stages."""

    def __init__(self, net: nn.Module, *, pretrained: bool = False) -> None:
        super().__init__()
        self.net = net
        self.pretrained = pretrained
        info: Any = net.feature_info
        self.channels = {number: stage["num_chs"] for number, stage in enumerate(info, start=1)}

    def blocks(self, layer: int) -> Sequence[nn.Module]:
        """See `Backbone.blocks`; the stem is no sequence of blocks."""
        return tuple(self.net.get_submodule(f"layer{layer - 1}").children()) if layer > 1 else super().blocks(layer)

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
    """Give the first block of stages 3 and 4 stride 1, without dilation: 28 x 28 maps at 224.

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
    other_weights: ClassVar[Mapping[str, Callable[[], dict[str, Tensor]]]] = {}
    """Weights beside ImageNet's: name -> what reads them. Each name has an entry in `NORMALIZATIONS`."""

    class Options(BackboneOptions):
        """Accepted keys of ``[backbones.resnetN]``."""

        large_maps: bool = True
        """28 x 28 maps at 224 pixels instead of 7 x 7."""
        drop_path: float = Field(default=0.0, ge=0, lt=1)
        """Stochastic depth rate."""
        normalization: Literal["weights", "imagenet", "vggface2", "none"] = "weights"
        """Mean and scale taken off the pictures. ``weights``: what the named weights were trained with, for a file
        ImageNet's. ``none``: pictures stay in [0, 1], as the published code has it for random weights."""

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> ResNet:  # noqa: ARG003 - any size will do
        """See `Backbone.build`. ResNet-50 also has the weights ``vggface2``."""
        assert isinstance(options, cls.Options)
        net = timm.create_model(cls.arch, pretrained=False, num_classes=0, global_pool="", drop_path_rate=options.drop_path)
        load_weights(net, options.weights, timm_name=f"{cls.arch}.tv_in1k", sources=cls.other_weights)
        if options.large_maps:
            remove_last_strides(net)
        backbone = cls(net, pretrained=options.weights != "random")
        known = options.weights if options.weights in cls.other_weights else "imagenet"
        backbone.mean, backbone.std = NORMALIZATIONS[known if options.normalization == "weights" else options.normalization]
        return backbone


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
    other_weights = {"vggface2": vggface2_weights}  # noqa: RUF012 - a ClassVar of the base


@BACKBONES.register("resnet101", title="ResNet-101", kind="cnn", **_PAPER)
class ResNet101(ResNet):
    """43 M parameters."""

    arch = "resnet101"


@BACKBONES.register("resnet152", title="ResNet-152", kind="cnn", **_PAPER)
class ResNet152(ResNet):
    """58 M parameters."""

    arch = "resnet152"
