"""APViT: a classifier on the class token of a transformer with attentive pooling; the map is what the pooling decides by."""

from __future__ import annotations

from torch import Tensor, nn

from bench.backbone import Backbone
from bench.backbones.apvit import PoolingViT
from bench.method import METHODS, Classifier, Default, Method, Output


class ClassTokenClassifier(Classifier):
    """One linear layer on the normed class token."""

    def __init__(self, backbone: Backbone, *, num_classes: int, zero: bool) -> None:
        super().__init__()
        assert isinstance(backbone, PoolingViT)
        self.backbone = backbone
        self.head = nn.Linear(backbone.token_dim, num_classes)
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:  # noqa: ARG002 - the contract's
        """See `Classifier.forward`."""
        features = self.backbone(images)
        return Output(logits=self.head(features.extras["cls"]), layers=features.layers, extras=features.extras)


_SOURCE = "APViT's own training on RAF-DB (variant paper; the FER code trains it with SGD like the rest)"


@METHODS.register(
    "apvit",
    title="APViT",
    paper="Xue et al., IEEE TAC 2022, Vision Transformer with Attentive Pooling for Robust Facial Expression Recognition",
    year=2022,
    doi="10.1109/TAFFC.2022.3226473",
    kind="trained",
    backbones=("apvit",),
    defaults=(
        Default("train.lr", 0.001, "rafdb", _SOURCE, "paper"),
        Default("train.schedule", "cosine", "rafdb", _SOURCE, "paper"),
        Default("train.min_lr", 0.0, "rafdb", _SOURCE, "paper"),
        Default("train.epochs", 40, "rafdb", _SOURCE, "paper"),
        Default("train.batch_size", 128, "rafdb", _SOURCE, "paper"),
        Default("train.clip_norm", 10.0, "rafdb", _SOURCE, "paper"),
    ),
)
class APViT(Method):
    """map = class-agnostic attention of the patches, the one attentive patch pooling decides by; L1 norm of the projected features.

    Neither the paper nor the published FER code gives a map per class, so both variants read the same map, whatever the
    class. ``paper`` starts from a zero classifier, as the authors' code does; in ``official`` that start is lost to a renamed
    attribute and the classifier begins at random.

    One bug of the published code is in neither variant: a batch of just as many pictures as there are tokens is not pruned,
    which makes logits depend on the batch (`bench.backbones.apvit.pooling_block`).
    """

    def classifier(self, backbone: Backbone, *, num_classes: int) -> ClassTokenClassifier:
        """See `Method.classifier`."""
        return ClassTokenClassifier(backbone, num_classes=num_classes, zero=self.variant == "paper")

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:  # noqa: ARG002 - the contract's
        """See `Method.maps`."""
        return output.layers[2][:, 0]
