"""WILDCAT: several maps a class, pooled over the highest and the lowest responses."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.backbone import Backbone
from bench.method import METHODS, Classifier, Method, Output
from bench.registry import EntryOptions


def region_count(k: float, positions: int) -> int:
    """How many of ``positions`` the setting ``k`` selects (METHODS 2.2; the published k rule).

    A float up to 1.0 is a share, rounded half to even; any other number is a count, cut at ``positions``. So the integer 1
    is one position and the float 1.0 is all of them. Nothing is selected for k <= 0.
    """
    if k <= 0:
        return 0
    if k < 1:
        return round(k * positions)
    if isinstance(k, float) and k == 1:
        return positions
    return min(int(k), positions)


def top_mean(maps: Tensor, *, count: int) -> Tensor:
    """Mean of the ``count`` highest values of each map (..., h, w) -> (...)."""
    return maps.flatten(-2).topk(count, dim=-1, sorted=False).values.mean(dim=-1)


def bottom_mean(maps: Tensor, *, count: int) -> Tensor:
    """Mean of the ``count`` lowest values of each map (..., h, w) -> (...)."""
    return maps.flatten(-2).topk(count, dim=-1, largest=False, sorted=False).values.mean(dim=-1)


class WildcatClassifier(Classifier):
    """A 1 x 1 convolution to ``modalities`` maps a class, their mean, and spatial pooling."""

    def __init__(self, backbone: Backbone, *, num_classes: int, modalities: int, kmax: float, kmin: float | None, alpha: float) -> None:
        """``kmin`` None: no minimum term, as the published code computes."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.channels[backbone.last], num_classes * modalities, kernel_size=1)  # class-major
        nn.init.xavier_uniform_(self.head.weight)  # as the published heads
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        self._modalities = modalities
        self._kmax = kmax
        self._kmin = kmin
        self._alpha = alpha

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:  # noqa: ARG002 - the contract's
        """See `Classifier.forward`."""
        features = self.backbone(images)
        class_maps = self.head(features.layers[self.backbone.last]).unflatten(1, (-1, self._modalities)).mean(dim=2)
        return Output(logits=self._pool(class_maps), layers=features.layers, class_maps=class_maps, extras=features.extras)

    def _pool(self, class_maps: Tensor) -> Tensor:
        height, width = class_maps.shape[-2:]
        count = region_count(self._kmax, height * width)
        if count == 0:
            raise ValueError(
                f"methods.wildcat.kmax = {self._kmax} selects none of the {height} x {width} positions of the class maps; "
                f"a whole number is a count: --set methods.wildcat.kmax=1"
            )
        score = top_mean(class_maps, count=count)
        lowest = 0 if self._kmin is None else region_count(self._kmin, height * width)
        if lowest == 0 or self._alpha == 0:
            return score
        return (score + self._alpha * bottom_mean(class_maps, count=lowest)) / 2


@METHODS.register(
    "wildcat",
    title="WILDCAT",
    paper="Durand et al., CVPR 2017, WILDCAT: Weakly Supervised Learning of Deep ConvNets for Image Classification, "
    "Pointwise Localization and Segmentation",
    year=2017,
    doi="10.1109/CVPR.2017.631",
    kind="trained",
)
class Wildcat(Method):
    """map = mean of the M maps of the class (Durand et al., eq. 1); no ReLU.

    ``paper``: score = (mean of the highest kmax + alpha * mean of the lowest kmin) / 2 (eq. 2, with the factor of the
    authors' code); without a minimum term (kmin or alpha 0) the mean of the highest alone. ``official``: always the mean
    of the highest alone, because the published FER code discards the minimum term: kmin and alpha have no effect.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.wildcat]``.

        The defaults are those of the FER code; the authors' own for VOC 2007 are M = 8, kmax = kmin = 0.2, alpha = 0.7.
        """

        modalities: int = Field(default=5, ge=1, le=64)
        """Maps per class, M."""
        kmax: int | float = Field(default=0.5, gt=0)
        """Highest positions that count: a share if a float up to 1.0, else a number of positions."""
        kmin: int | float = Field(default=0.1, ge=0)
        """Lowest positions that count, in the same way; 0 for none."""
        alpha: float = Field(default=0.6, ge=0)
        """Weight of the lowest positions."""

    def classifier(self, backbone: Backbone, *, num_classes: int) -> WildcatClassifier:
        """See `Method.classifier`."""
        options = self.options
        assert isinstance(options, Wildcat.Options)
        return WildcatClassifier(
            backbone,
            num_classes=num_classes,
            modalities=options.modalities,
            kmax=options.kmax,
            kmin=options.kmin if self.variant == "paper" else None,
            alpha=options.alpha,
        )

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:  # noqa: ARG002 - the contract's
        """See `Method.maps`."""
        assert output.class_maps is not None
        return output.class_maps[torch.arange(len(classes), device=classes.device), classes]
