"""One forward pass of a network, and the maps that methods read off its output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.data.transforms import eval_images
from bench.method import Classifier, Method, Output


def grad_mode(methods: Iterable[Method]) -> contextlib.AbstractContextManager[object]:
    """The mode for a forward pass and its read-outs: inference mode, unless a method differentiates through the output."""
    return torch.enable_grad() if any(method.needs_grad for method in methods) else torch.inference_mode()


def network_input(classifier: Classifier, stored: Tensor, *, size: int) -> Tensor:
    """Stored pictures (B, 3, S, S) uint8 as the classifier takes them: (B, 3, size, size) float32, normalised for its backbone."""
    return eval_images(stored, size=size, mean=classifier.backbone.mean, std=classifier.backbone.std)


def forward(classifier: Classifier, images: Tensor, *, label: str | None = None) -> Output:
    """Output of the classifier for normalised pictures (B, 3, S, S). It keeps the pictures, which some read-outs look at again.

    Args:
        classifier: in eval mode, on the device of the pictures.
        images: see `network_input`.
        label: name of the training, for the error. None: logits are not checked.

    Raises:
        ValueError: logits are NaN or infinite; see `check_finite`.
    """
    output: Output = classifier(images)
    output.images = images
    if label is not None:
        check_finite(output.logits, label=label)
    return output


def read_out(method: Method, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
    """`Method.maps` with its input and output checked: (B, h, w), float32, without graph.

    Raises:
        ValueError: a class id that the classifier does not have (PyTorch takes negative ids from the end), or maps of another
            type or shape than `Method.maps` promises.
    """
    count = output.logits.shape[1]
    bad = classes[(classes < 0) | (classes >= count)]
    if len(bad):
        raise ValueError(f"class id {int(bad[0])} is out of range: the classifier has {count} classes, 0 to {count - 1}")
    maps = method.maps(classifier, output, classes)
    name = f"{type(method).__name__}.maps"
    if not isinstance(maps, Tensor) or maps.is_complex():
        kind = f"a tensor of {maps.dtype}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
        raise ValueError(f"{name} returned {kind}, wanted a tensor of real numbers, ({len(classes)}, h, w)")
    if maps.ndim != 3 or len(maps) != len(classes):
        raise ValueError(f"{name} returned the shape {tuple(maps.shape)}, wanted ({len(classes)}, h, w)")
    return maps.detach().float()


def check_finite(logits: Tensor, *, label: str) -> None:
    """Refuse logits that are NaN or infinite: argmax would still name a class.

    Raises:
        ValueError: the message begins with ``label``, the name of the training.
    """
    if not logits.isfinite().all():
        raise ValueError(f"{label}: the network gives NaN or infinite logits; its weights are damaged, or its training diverged")
