"""The contract of a method entry: how a classifier is trained to localise, and how its map is read out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbone import Backbone, Kind
from bench.registry import Default, EntryInfo, EntryOptions, Registry

__all__ = ["METHODS", "Batch", "Classifier", "Default", "Method", "MethodInfo", "Output", "Variant"]

Variant = Literal["paper", "official"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo(EntryInfo):
    """Data of a method entry."""

    kind: Literal["trained", "posthoc"]
    """``posthoc`` methods only read out: they share the training of the method named by ``trains_as``."""
    trains_as: str | None = None
    variants: tuple[Variant, ...] = ("paper", "official")
    backbones: tuple[Kind, ...] = ("cnn",)
    """Kinds of backbone the method can take."""

    def __post_init__(self) -> None:
        if (self.kind == "posthoc") != (self.trains_as is not None):
            raise ValueError(
                f"{self.title}: kind {self.kind!r} with trains_as={self.trains_as!r}; post-hoc methods, and only they, train as another"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch on the device, warped and normalised.

    Shapes: ``positions`` (B,) int64, index in the split; ``seeds`` (B,) int64, randomness of this sample in this epoch;
    ``images`` (B, 3, S, S) float32; ``labels`` (B,) int64; ``au_maps`` (B, G, G) float32 in the frame of ``images``,
    zeros where ``au_valid`` (B,) bool is False.

    A subclass may add tensors: those with dimensions begin with B, those without, (), are of the batch as a whole.
    """

    positions: Tensor
    seeds: Tensor
    images: Tensor
    labels: Tensor
    au_maps: Tensor
    au_valid: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def chunks(self, count: int) -> list[Self]:
        """Cut into ``count`` equal batches in order (processes, gradient accumulation)."""
        size, rest = divmod(len(self), count)
        assert not rest, (len(self), count)
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [
            dataclasses.replace(self, **{name: tensor[start : start + size] for name, tensor in tensors.items() if tensor.dim()})
            for start in range(0, len(self), size)
        ]


@dataclasses.dataclass(slots=True, kw_only=True)
class Output:
    """What a classifier computes for a batch of B images and K classes."""

    logits: Tensor
    """(B, K)."""
    layers: dict[int, Tensor]
    """Layer l -> (B, C_l, h_l, w_l), as the backbone gives them."""
    class_maps: Tensor | None = None
    """(B, K, h, w), for heads that keep one map a class."""
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What only some methods read, by name: the backbone's, and the head's own."""
    images: Tensor | None = None
    """(B, 3, S, S), the input: set by the evaluator, for methods whose read-out looks at the picture again (ScoreCAM)."""


class Classifier(nn.Module, ABC):
    """A backbone with a head. Everything with parameters is reached by one call of it."""

    backbone: Backbone

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """(B, 3, S, S) images -> output. ``labels`` (B,) steer training-time tricks only; logits never depend on them."""


class Method(ABC):
    """Base of all methods. One instance serves one training or its read-out; it holds options, no parameters."""

    class Options(EntryOptions):
        """Accepted keys of ``[methods.NAME]``."""

    needs_grad: ClassVar[bool] = False
    """True if `maps` differentiates through the classifier's output (the evaluator then keeps the graph)."""

    def __init__(self, options: Options, *, variant: Variant) -> None:
        """Keep the options; ``variant`` is ``paper`` or ``official``."""
        self.options = options
        self.variant = variant

    @abstractmethod
    def classifier(self, backbone: Backbone, *, num_classes: int) -> Classifier:
        """Put this method's head on the backbone."""

    def mix(self, batch: Batch) -> Batch:
        """Mix samples of a training batch (CutMix), which is all that a step sees, over all processes and micro-batches.

        Randomness comes from ``batch.seeds`` only. Every process gets the same batch, in the order of the epoch plan, and goes on with
        its own part of what this gives: sample for sample the same number, in the same order.
        """
        return batch

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Mean classification loss of the batch, a scalar. Guidance is added by the training task, not here."""
        return F.cross_entropy(output.logits, batch.labels)

    def for_trial(self) -> Method:
        """This read-out as a plan tries it on two pictures: the same operations. One that looks at the picture many times does it less."""
        return self

    @abstractmethod
    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """Raw maps (B, h, w) of the given class (B,) of each sample, before min-max scaling.

        Batched, without a loop over samples; touches neither parameter gradients nor the train/eval mode.
        """


METHODS: Registry[Method, MethodInfo] = Registry("method", group="bench.methods", base=lambda: Method, info=MethodInfo)
