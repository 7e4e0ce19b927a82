"""CAM: class activation mapping of a network that ends in global average pooling and one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.backbone import Backbone
from bench.method import METHODS, Classifier, Method, Output


class GAPClassifier(Classifier):
    """Global average pooling of the last layer, then one linear layer (``WGAP`` of the published code)."""

    def __init__(self, backbone: Backbone, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.channels[backbone.last], num_classes)
        nn.init.xavier_uniform_(self.head.weight)  # as the published heads
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:  # noqa: ARG002 - the contract's
        """See `Classifier.forward`."""
        features = self.backbone(images)
        last = features.layers[self.backbone.last]
        return Output(logits=self.head(last.mean(dim=(2, 3))), layers=features.layers, extras=features.extras)


@METHODS.register(
    "cam",
    title="CAM",
    paper="Zhou et al., CVPR 2016, Learning Deep Features for Discriminative Localization",
    year=2016,
    doi="10.1109/CVPR.2016.319",
    kind="trained",
)
class CAM(Method):
    """map = sum_k W[y, k] A_k over the channels A of the last layer (Zhou et al., eq. 2); no bias, no ReLU.

    Both variants compute the same: the published FER code has this right.
    """

    def classifier(self, backbone: Backbone, *, num_classes: int) -> GAPClassifier:
        """See `Method.classifier`."""
        return GAPClassifier(backbone, num_classes=num_classes)

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        assert isinstance(classifier, GAPClassifier)
        last = output.layers[classifier.backbone.last]
        return torch.einsum("bc,bchw->bhw", classifier.head.weight[classes].to(last.dtype), last)
