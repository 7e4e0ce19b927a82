"""InceptionV3 as weakly supervised localisation has it: up to Mixed_6e, wide maps, two more convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers.conv_bn_act import ConvNormAct
from timm.models.inception_v3 import InceptionB
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, Features
from bench.weights import load_weights

STAGES = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Pool1", "Conv2d_3b_1x1"),
    ("Conv2d_4a_3x3", "Pool2", "Mixed_5b", "Mixed_5c"),
    ("Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("SPG_A3_1b", "SPG_A3_2b"),
)
_DROPPED = ("AuxLogits", "Mixed_7a", "Mixed_7b", "Mixed_7c", "global_pool", "head_drop", "fc")


class _WideB(InceptionB):
    """timm's block with stride 1: its pooling branch has the stride in the code, the others in their layers."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), branch, F.max_pool2d(x, kernel_size=3, stride=1, padding=1)]


@BACKBONES.register(
    "inceptionv3",
    title="InceptionV3",
    paper="Szegedy et al., CVPR 2016; up to Mixed_6e and with two convolutions: Zhang et al., ECCV 2018 (SPG); Choe et al., CVPR 2020",
    year=2016,
    doi="10.1109/CVPR.2016.308",
    kind="cnn",
)
class InceptionV3(Backbone):
    """Five layers, at 224 pixels 112 (64 channels), 57 (80), 29 (288), 29 (768) and 29 (1024); 26 M parameters.

    All 3 x 3 convolutions and poolings have padding 1, Mixed_6a has stride 1, as in the published FER code.
    Names and, with ``weights = "imagenet"``, weights are those of timm's ``inception_v3.tv_in1k``; the last two
    convolutions, SPG_A3_1b and SPG_A3_2b (dropout 0.5, 3 x 3 to 1024, ReLU), exist in no published file and start from
    random weights unless a file of your own has them.
    """

    mean = (0.5, 0.5, 0.5)  # the published weights were trained on pictures in [-1, 1]
    std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        net: Any = timm.create_model("inception_v3", pretrained=False, num_classes=0)
        for name in _DROPPED:
            delattr(net, name)
        norm_act: dict[str, Any] = {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"inplace": True}}
        wide: Any = _WideB(288, conv_block=partial(ConvNormAct, padding=0, norm_layer="batchnorm2d", act_layer="relu", **norm_act))  # type: ignore[arg-type]  # timm's annotation means the class
        wide.load_state_dict(net.Mixed_6a.state_dict())
        for convolution in (wide.branch3x3.conv, wide.branch3x3dbl_3.conv):
            convolution.stride = (1, 1)
        net.Mixed_6a = wide
        for inputs, name in ((768, "SPG_A3_1b"), (1024, "SPG_A3_2b")):
            convolution = nn.Conv2d(inputs, 1024, 3)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # there is one
            net.add_module(name, nn.Sequential(nn.Dropout(0.5), convolution, nn.ReLU()))
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.padding = (1, 1)
            elif isinstance(module, nn.MaxPool2d):
                module.padding, module.ceil_mode = 1, True
        self.net: nn.Module = net
        self.channels = {1: 64, 2: 80, 3: 288, 4: 768, 5: 1024}

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> InceptionV3:  # noqa: ARG003 - any size will do
        """See `Backbone.build`."""
        backbone = cls()
        load_weights(
            backbone.net,
            options.weights,
            timm_name="inception_v3.tv_in1k",
            dropped=tuple(f"{name}." for name in _DROPPED),
            fresh=("SPG_A3_1b.", "SPG_A3_2b."),
        )
        backbone.pretrained = options.weights != "random"
        return backbone

    def blocks(self, layer: int) -> Sequence[nn.Module]:
        """See `Backbone.blocks`."""
        return tuple(self.net.get_submodule(name) for name in STAGES[layer - 1])

    def attention_points(self) -> tuple[tuple[int, int], ...]:
        """After Mixed_5d, Mixed_6e and SPG_A3_2b (Choe et al., CVPR 2020)."""
        return ((4, 0), (4, 5), (5, 1))

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        layers = {}
        x = images
        for number in self.channels:
            for block in self.blocks(number):
                x = block(x)
            layers[number] = x
        return Features(layers=layers)
