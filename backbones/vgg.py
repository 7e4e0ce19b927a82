"""VGG-16 as weakly supervised localisation has it: without the last two poolings, one more convolution, no dense layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from bench.backbone import BACKBONES, Backbone, Features
from bench.weights import load_weights

STAGES = ((0, 4), (4, 9), (9, 16), (16, 30))
"""Positions in ``features`` of the stages; each but the first begins with the pooling that halves the map."""


@BACKBONES.register(
    "vgg16",
    title="VGG-16",
    paper="Simonyan and Zisserman, ICLR 2015; without the last two poolings and with conv6: Choe et al., CVPR 2020",
    year=2015,
    doi="10.48550/arXiv.1409.1556",
    kind="cnn",
    guided_layers=(4,),
)
class VGG16(Backbone):
    """Four layers, at 224 pixels 224 (64 channels), 112 (128), 56 (256) and 28 (1024); 19 M parameters.

    The 13 convolutions have the names and, with ``weights = "imagenet"``, the weights of timm's ``vgg16.tv_in1k``. The last
    one, ``conv6`` (3 x 3, 512 -> 1024), exists in no published file: it starts from random weights unless a file of
    your own has it.
    """

    def __init__(self) -> None:
        super().__init__()
        plan: list[str | int] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
        self.features = make_layers(plan)
        self.features[23] = nn.Identity()  # the fourth pooling; an empty place keeps the published names
        self.conv6 = nn.Sequential(nn.Conv2d(512, 1024, 3, padding=1), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # there is one
        self.channels = {1: 64, 2: 128, 3: 256, 4: 1024}

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> VGG16:  # noqa: ARG003 - any size will do
        """See `Backbone.build`."""
        backbone = cls()
        load_weights(backbone, options.weights, timm_name="vgg16.tv_in1k", dropped=("pre_logits.", "classifier."), fresh=("conv6.",))
        backbone.pretrained = options.weights != "random"
        return backbone

    def blocks(self, layer: int) -> Sequence[nn.Module]:
        """See `Backbone.blocks`: the last layer is the third pooling, then three groups of convolutions, by their last module."""
        if layer != self.last:
            return super().blocks(layer)
        return (self.features[16], self.features[22], self.features[29], self.conv6)

    def attention_points(self) -> tuple[tuple[int, int], ...]:
        """After the third pooling, conv4_3 and conv5_3 (Choe et al., CVPR 2020)."""
        return ((self.last, 0), (self.last, 1), (self.last, 2))

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        layers = {}
        x = images
        for number, (start, end) in enumerate(STAGES, start=1):
            x = layers[number] = self.features[start:end](x)
        layers[self.last] = self.conv6(x)
        return Features(layers=layers)
