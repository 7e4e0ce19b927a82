"""ADL: attention-based dropout layers inside the network, which hide or stress in training what the network looks at."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.backbone import Backbone
from bench.draws import site_of, step_uniform
from bench.method import METHODS, Classifier, Method, Output, Variant
from bench.methods.cam import GAPClassifier
from bench.registry import EntryOptions

TAPPED = "adl_tapped"
"""Name in `Output.extras` of the features (B, C, h, w) that the published read-out weights, there in variant ``official``."""


class _Figures(NamedTuple):
    drop_rate: float
    threshold: float


_FIGURES: dict[Variant, _Figures] = {
    "paper": _Figures(drop_rate=0.75, threshold=0.9),  # the authors' command for ResNet-50-SE (github.com/junsukchoe/ADL)
    "official": _Figures(drop_rate=0.4, threshold=0.1),  # defaults of the published FER code
}


def attention_dropout(features: Tensor, *, drop: bool, threshold: float) -> Tensor:
    """One attention-based dropout layer (J. Choe, H. Shim, CVPR 2019), for a draw already made.

    The attention is the channel mean. No gradient goes through the drop mask, but some does through the importance map.

    Args:
        features: (B, C, h, w).
        drop: True: zero all channels where the attention of a sample is at or above its threshold; False: multiply by the
            sigmoid of the attention.
        threshold: share of the largest attention of the same sample.
    """
    attention = features.mean(dim=1, keepdim=True)
    if not drop:
        return features * attention.sigmoid()
    return features * (attention < threshold * attention.amax(dim=(2, 3), keepdim=True))


class ADLClassifier(GAPClassifier):
    """CAM's classifier on a network with dropout layers after the blocks that the backbone names.

    The layers are forward hooks: they have no parameters, and so no name in the weights shifts. They do nothing in eval mode.
    The output of a stage that ends in such a layer comes after it, so that is what guidance aligns, as published.
    """

    def __init__(self, backbone: Backbone, *, num_classes: int, figures: _Figures, variant: Variant) -> None:
        super().__init__(backbone, num_classes=num_classes)
        self._tapped: int | None = None
        if variant == "official":
            blocks = backbone.blocks(backbone.last)
            # `encoder.layer4.2` of the published code is the second block, since the list there holds dropout layers too.
            self._tapped = min(1, len(blocks) - 1) if _numbered(blocks) else len(blocks) - 1
        for layer, index in backbone.attention_points():
            backbone.blocks(layer)[index].register_forward_hook(
                functools.partial(_dropout_hook, figures=figures, site=site_of("adl", layer, index))
            )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """See `Classifier.forward`."""
        if self._tapped is None:
            return super().forward(images, labels)
        seen: list[Tensor] = []
        tapped = self.backbone.blocks(self.backbone.last)[self._tapped]
        handle = tapped.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            output = super().forward(images, labels)
        finally:
            handle.remove()
        output.extras = {**output.extras, TAPPED: seen[0]}
        return output


@METHODS.register(
    "adl",
    title="ADL",
    paper="Choe and Shim, CVPR 2019, Attention-Based Dropout Layer for Weakly Supervised Object Localization",
    year=2019,
    doi="10.1109/CVPR.2019.00232",
    kind="trained",
)
class ADL(Method):
    """CAM of a network trained with attention-based dropout layers.

    They stand after the first block of the last two stages and after the very last block: in a ResNet-50 after layer3.0,
    layer4.0 and layer4.2, as in the authors' code. In a network with one block a stage, the last two are the same place, which
    gets one layer. Each layer draws once a step, for all samples alike, whatever process they are on.

    Variant ``official`` has the two faults of the published FER code. The dropout layers shift
    the positions in the list of blocks, but not the names of pretrained weights: blocks get those of a later one, and the
    last block none. And the map weights the features of the second block of the last stage with the weights of a classifier that
    sees the last block. A last stage of one block has no other than that to show. Both faults are the ResNets' alone: other
    networks of the published code have named blocks.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.adl]``."""

        drop_rate: float | None = Field(default=None, ge=0, le=1)
        """Probability of hiding, instead of stressing; none = 0.75 in variant paper, 0.4 in official."""
        threshold: float | None = Field(default=None, gt=0, le=1)
        """Attention, as a share of its maximum, from which on a place is hidden; none = 0.9 in variant paper, 0.1 in official."""

    def classifier(self, backbone: Backbone, *, num_classes: int) -> ADLClassifier:
        """See `Method.classifier`.

        Raises:
            ValueError: the backbone is not made of blocks.
        """
        assert isinstance(self.options, self.Options)
        default = _FIGURES[self.variant]
        figures = _Figures(
            drop_rate=default.drop_rate if self.options.drop_rate is None else self.options.drop_rate,
            threshold=self.options.threshold or default.threshold,
        )
        if self.variant == "official" and backbone.pretrained:
            shift_pretrained(backbone)
        return ADLClassifier(backbone, num_classes=num_classes, figures=figures, variant=self.variant)

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        assert isinstance(classifier, ADLClassifier)
        features = output.extras[TAPPED] if self.variant == "official" else output.layers[classifier.backbone.last]
        return torch.einsum("bc,bchw->bhw", classifier.head.weight[classes].to(features.dtype), features)


def shift_pretrained(backbone: Backbone) -> None:
    """Put pretrained weights where the published code puts them: by position in a list that also holds dropout layers.

    A block gets the weights of the block whose index is its own position in that list. Where there is no such block it keeps
    its initial random weights: He et al. (fan out) for convolutions, ones and zeros for normalisation.
    """
    points = backbone.attention_points()
    for layer in sorted({layer for layer, _ in points}):
        blocks = backbone.blocks(layer)
        if not _numbered(blocks):
            continue
        weights = [copy.deepcopy(block.state_dict()) for block in blocks]
        for index, block in enumerate(blocks):
            position = index + sum(1 for at, after in points if at == layer and after < index)
            if position < len(blocks):
                block.load_state_dict(weights[position])
            else:
                _initialise(block)


def _numbered(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks are of one kind, as those of a ResNet: such the published code has in a list, others by name.

    The first block may differ: it changes the number of channels.
    """
    return len({tuple((name, value.shape) for name, value in block.state_dict().items()) for block in blocks[1:]}) <= 1


def _initialise(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.reset_parameters()


def _dropout_hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, *, figures: _Figures, site: int) -> Tensor:
    if not module.training:
        return output
    # floor(uniform + rate) as published; on the CPU, so that no device has to be waited for.
    drop = bool(step_uniform(site) + figures.drop_rate >= 1)
    return attention_dropout(output, drop=drop, threshold=figures.threshold)
