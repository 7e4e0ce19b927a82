"""Check that a classifier returns what `bench.method.Output` promises. A head with an output too many would shift every prediction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.method import Classifier, Output


class ContractError(ValueError):
    """The output of a classifier breaks its contract."""


def check_output(output: Any, classifier: Classifier, *, samples: int, num_classes: int) -> None:
    """Compare an output with its contract.

    Args:
        output: of the classifier, for a batch.
        classifier: its backbone declares the layers.
        samples: B, number of pictures in the batch.
        num_classes: K of the dataset.

    Raises:
        ContractError: a wrong type or shape, values that are not finite, or probabilities in place of logits.
    """
    if not isinstance(output, Output):
        raise ContractError(f"its forward returns {_kind(output)}; wanted is a bench.method.Output with logits and layers")
    _check_tensor(output.logits, "logits", (samples, num_classes), meaning=f"one value for each of the dataset's {num_classes} classes")
    sums = output.logits.detach().double().sum(dim=1)
    if num_classes > 1 and bool((output.logits >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all()):
        raise ContractError("its logits are probabilities, not negative and with a sum of 1 in each row; leave the softmax to the loss")
    channels = classifier.backbone.channels
    if not isinstance(output.layers, dict) or set(output.layers) != set(channels):
        has = ", ".join(map(str, output.layers)) if isinstance(output.layers, dict) else _kind(output.layers)
        raise ContractError(f"its output has the layers {has}; its backbone declares {', '.join(map(str, channels))}")
    for layer, values in output.layers.items():
        _check_tensor(values, f"layer {layer}", (samples, channels[layer], None, None), meaning="as the backbone declares its channels")
    if output.class_maps is not None:
        _check_tensor(output.class_maps, "class_maps", (samples, num_classes, None, None), meaning="a map for each class")


def _check_tensor(values: Any, name: str, shape: tuple[int | None, ...], *, meaning: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = f"a tensor of {values.dtype}" if isinstance(values, Tensor) else _kind(values)
        raise ContractError(f"{name}: {kind}; wanted are floating-point values")
    if len(values.shape) != len(shape) or any(w not in (None, h) for h, w in zip(values.shape, shape, strict=True)):
        wanted = ", ".join("hw"[i - 2] if size is None else str(size) for i, size in enumerate(shape))
        raise ContractError(f"{name}: shape {tuple(values.shape)}, wanted ({wanted}): {meaning}")
    if not bool(values.isfinite().all()):
        raise ContractError(f"{name}: NaN or infinite values")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
