"""The contract of a backbone entry: images -> the features of layers 1..L."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from bench.registry import EntryInfo, EntryOptions, Registry

Kind = Literal["cnn", "vit", "apvit"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BackboneInfo(EntryInfo):
    """Data of a backbone entry."""

    kind: Kind
    """What methods ask for: ``cnn`` has spatial maps at every layer, ``vit`` has tokens and attentions."""
    guided_layers: tuple[int, ...] = (5,)
    """Layers whose attention AU guidance aligns unless the configuration says otherwise."""


class BackboneOptions(EntryOptions):
    """Options every backbone has."""

    weights: str = "random"
    """``random``, ``imagenet``, or the path of a ``.safetensors`` or ``.pth`` file."""


def traced(layer: int) -> str:
    """Name in `Features.extras` of the tensor (B, h, w, C) that a network computes with, where ``layers[layer]`` is a copy of it in another
    order: only by the former can what follows be differentiated.
    """
    return f"traced/{layer}"


@dataclasses.dataclass(slots=True, kw_only=True)
class Features:
    """What a backbone computes for a batch of B images."""

    layers: dict[int, Tensor]
    """Layer l -> (B, C_l, h_l, w_l); 1 = stem after its activation, 2..5 = the stages."""
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What only some methods read, by name (``attention`` of a transformer, for instance)."""


class Backbone(nn.Module, ABC):
    """Base of all backbones."""

    class Options(BackboneOptions):
        """Accepted keys of ``[backbones.NAME]``."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    image_sizes: ClassVar[tuple[int, ...] | None] = None
    """The only input sizes the network takes, None for any."""

    pretrained: bool = False
    """Whether `build` filled the network with weights from elsewhere; set by it."""

    channels: dict[int, int]
    """Layer -> number of channels; the highest layer feeds the classifier."""

    @classmethod
    @abstractmethod
    def build(cls, options: Options, *, image_size: int) -> Backbone:
        """Make the network for square inputs of this side.

        Raises:
            ValueError: an option or the image size is impossible.
            FileNotFoundError: pretrained weights are asked for and cannot be had; the message says which file to put where.
        """

    @property
    def last(self) -> int:
        """The layer that feeds the classifier."""
        return max(self.channels)

    def blocks(self, layer: int) -> Sequence[nn.Module]:
        """The blocks a layer is computed by, one after the other, the output of the last being the layer.

        For methods that act inside a network (ADL): they put forward hooks on blocks, which leaves all names and
        weights as they are. So each block must be *called* in `forward`.

        Raises:
            ValueError: this network is not made of blocks.
        """
        raise ValueError(
            f"layer {layer} of {type(self).__name__} is not made of blocks that a method can act between; "
            f"take a residual network: --backbones resnet50"
        )

    def attention_points(self) -> tuple[tuple[int, int], ...]:
        """Where layers that act on attention (ADL) go: after these blocks, each as (layer, index in `blocks`), in order.

        Here: after the first block of the last two layers and after the last of all, each once. These are the places in
        a ResNet (J. Choe, H. Shim, CVPR 2019); a network for which others are published overrides this.
        """
        points = ((self.last - 1, 0), (self.last, 0), (self.last, len(self.blocks(self.last)) - 1))
        return tuple(dict.fromkeys(points))

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """(B, 3, S, S) normalised images -> features."""


BACKBONES: Registry[Backbone, BackboneInfo] = Registry("backbone", group="bench.backbones", base=lambda: Backbone, info=BackboneInfo)
