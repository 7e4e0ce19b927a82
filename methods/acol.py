"""ACoL: two classifiers, of which the second does not see what the first one looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bench.backbone import Backbone
from bench.evaluation.maps import min_max
from bench.method import METHODS, Batch, Classifier, Method, Output, Variant
from bench.registry import EntryOptions

LOGITS_B = "logits_b"
"""Name in `Output.extras` of the logits of branch B, (B, K), there if labels were given."""

_WIDTH = 1024
_THRESHOLDS: dict[Variant, float] = {
    "paper": 0.6,  # default of the authors' code (github.com/xiaomengyc/ACoL, models/vgg); the paper tries 0.5 to 0.9
    "official": 0.1,  # default of the published FER code
}


def attention_of(class_maps: Tensor, classes: Tensor, *, variant: Variant) -> Tensor:
    """Maps of one class a sample, min-max scaled: (B, K, h, w) and (B,) -> (B, h, w) in [0, 1], without gradient.

    A constant map has no scale: it becomes zeros in ``paper``, NaN in ``official`` (the published code divides by zero).
    """
    maps = class_maps.detach()[torch.arange(len(classes), device=class_maps.device), classes]
    maps = maps.float() if maps.dtype.itemsize < 4 else maps
    if variant == "paper":
        return min_max(maps)
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low)


def erase(features: Tensor, attention: Tensor, *, threshold: float) -> Tensor:
    """Zero all channels where the attention is at or above the threshold (as in the authors' code).

    Nothing is erased where the attention came from a constant map: zeros and NaN alike are not above a threshold.

    Args:
        features: (B, C, h, w).
        attention: (B, h, w), of `attention_of`.
        threshold: in (0, 1].
    """
    return features.masked_fill((attention >= threshold)[:, None], 0.0)


class ACoLClassifier(Classifier):
    """Branches A and B, each two 3 x 3 convolutions and one 1 x 1 convolution to one map a class, then averaging.

    Names and shapes of the branches are those of the published heads (``acol_pooler.classifier_A`` and
    ``classifier_B``).
    """

    def __init__(self, backbone: Backbone, *, num_classes: int, channels: int, threshold: float, variant: Variant) -> None:
        super().__init__()
        self.backbone = backbone
        self.threshold = threshold
        self.variant: Variant = variant
        self.branch_a = _branch(backbone.channels[backbone.last], channels, num_classes)
        self.branch_b = _branch(backbone.channels[backbone.last], channels, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """See `Classifier.forward`. The logits are branch A's; those of B are computed where labels say what to erase."""
        features = self.backbone(images)
        maps = self.branch_a(features.layers[self.backbone.last])
        extras = dict(features.extras)
        if labels is not None:
            attention = attention_of(maps, labels, variant=self.variant)
            extras[LOGITS_B] = self.erased_maps(features.layers[self.backbone.last], attention).mean(dim=(2, 3))
        return Output(logits=maps.mean(dim=(2, 3)), layers=features.layers, class_maps=maps, extras=extras)

    def erased_maps(self, last: Tensor, attention: Tensor) -> Tensor:
        """Class maps of branch B, (B, K, h, w), which sees the last layer (B, C, h, w) without what the attention erases."""
        maps: Tensor = self.branch_b(erase(last, attention, threshold=self.threshold))
        return maps


@METHODS.register(
    "acol",
    title="ACoL",
    paper="Zhang et al., CVPR 2018, Adversarial Complementary Learning for Weakly Supervised Object Localization",
    year=2018,
    doi="10.1109/CVPR.2018.00144",
    kind="trained",
)
class ACoL(Method):
    """Loss CE(A) + CE(B); map = larger of the min-max scaled maps of A and B, where B does not see what A shows of that class.

    The two variants have different default thresholds, and deal differently with a constant map: `paper` gives it no say,
    `official` makes the whole map NaN, which the evaluation counts as empty.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.acol]``."""

        threshold: float | None = Field(default=None, gt=0, le=1)
        """Attention, as a share of its range, from which on a place is erased; none = 0.6 in variant paper, 0.1 in official."""
        channels: int | None = Field(default=None, ge=1)
        """Channels inside each branch; none = 1024 as published, or as many as the last layer has if those are fewer."""

    def classifier(self, backbone: Backbone, *, num_classes: int) -> ACoLClassifier:
        """See `Method.classifier`."""
        assert isinstance(self.options, self.Options)
        return ACoLClassifier(
            backbone,
            num_classes=num_classes,
            channels=self.options.channels or min(_WIDTH, backbone.channels[backbone.last]),
            threshold=self.options.threshold or _THRESHOLDS[self.variant],
            variant=self.variant,
        )

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """See `Method.loss`."""
        return F.cross_entropy(output.logits, batch.labels) + F.cross_entropy(output.extras[LOGITS_B], batch.labels)

    @torch.no_grad()
    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`. Branch B is computed here, since what it does not see depends on the class that is asked for."""
        assert isinstance(classifier, ACoLClassifier)
        assert output.class_maps is not None
        first = attention_of(output.class_maps, classes, variant=self.variant)
        second = attention_of(classifier.erased_maps(output.layers[classifier.backbone.last], first), classes, variant=self.variant)
        return torch.maximum(first, second)


def _branch(inputs: int, channels: int, num_classes: int) -> nn.Sequential:
    branch = nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, num_classes, 1),
    )
    for module in branch:
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)  # as in the authors' code and in the published heads
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return branch
