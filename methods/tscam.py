"""TS-CAM: a class map on the patch tokens of a transformer, coupled with the attention of its class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.backbone import Backbone
from bench.method import METHODS, Classifier, Default, Method, Output


class TokenClassifier(Classifier):
    """A 3 x 3 convolution from patch tokens to class maps, then global average pooling. The class token has no part in the logits."""

    def __init__(self, backbone: Backbone, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        # torch's own initialisation, in the paper's code and in the published FER code.
        self.head = nn.Conv2d(backbone.channels[1], num_classes, kernel_size=3, padding=1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:  # noqa: ARG002 - the contract's
        """See `Classifier.forward`. ``class_maps`` are (B, K, g, g)."""
        features = self.backbone(images)
        class_maps = self.head(features.layers[1])
        return Output(logits=class_maps.mean(dim=(2, 3)), layers=features.layers, class_maps=class_maps, extras=features.extras)


_SOURCE = "TS-CAM's own training (variant paper; the FER code trains it with SGD like the rest)"


@METHODS.register(
    "tscam",
    title="TS-CAM",
    paper="Gao et al., ICCV 2021, TS-CAM: Token Semantic Coupled Attention Map for Weakly Supervised Object Localization",
    year=2021,
    doi="10.1109/ICCV48922.2021.00288",
    kind="trained",
    backbones=("vit",),
    defaults=(
        Default("train.optimizer", "adamw", None, _SOURCE, "paper"),
        Default("train.weight_decay", 0.05, None, _SOURCE, "paper"),
        Default("train.lr", 5e-5, None, f"{_SOURCE} for CUB, batches of 128: the fine-grained data nearest to faces", "paper"),
    ),
)
class TSCAM(Method):
    """map = attention * class map of y, no ReLU: maps may be negative.

    Both variants compute the same: the published FER code has this right. They differ in training recipes only: the paper's
    is in the entry's ``defaults``; the FER code trains like all its methods, with SGD.
    """

    def classifier(self, backbone: Backbone, *, num_classes: int) -> TokenClassifier:
        """See `Method.classifier`."""
        return TokenClassifier(backbone, num_classes=num_classes)

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:  # noqa: ARG002 - the contract's
        """See `Method.maps`."""
        assert output.class_maps is not None
        of_class = output.class_maps[torch.arange(len(classes), device=classes.device), classes]
        return output.layers[2][:, 0] * of_class
