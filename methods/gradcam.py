"""Grad-CAM in closed form, and what the other read-outs of a pooled linear classifier share with it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM, GAPClassifier


def evidence(classifier: Classifier, output: Output, classes: Tensor) -> tuple[Tensor, Tensor]:
    """What every closed form is made of: the weights W[y] of the head, and the channels A of the last layer.

    The logit is sum_k W[y, k] mean(A_k) + b[y], so its gradient by A_k is W[y, k] / (h w) at every pixel.

    Args:
        classifier: ends in global average pooling and one linear layer.
        output: of this classifier.
        classes: (B,) class id of each sample.

    Returns:
        Weights (B, C) and channels (B, C, h, w), of one type.
    """
    assert isinstance(classifier, GAPClassifier)
    channels = output.layers[classifier.backbone.last]
    return classifier.head.weight[classes].to(channels.dtype), channels


def weighted_sum(weights: Tensor, channels: Tensor) -> Tensor:
    """sum_k w_k A_k: (B, C) weights and (B, C, h, w) channels -> (B, h, w)."""
    return torch.einsum("bc,bchw->bhw", weights, channels)


@METHODS.register(
    "gradcam",
    title="Grad-CAM",
    paper="Selvaraju et al., ICCV 2017, Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    year=2017,
    doi="10.1109/ICCV.2017.74",
    kind="posthoc",
    trains_as="cam",
)
class GradCAM(CAM):
    """map = ReLU(sum_k mean(g_k) A_k), g_k the gradient of the logit by A_k (eq. 1 and 2).

    Here mean(g_k) = W[y, k] / (h w), so the map is the positive part of CAM. Both variants compute the same.
    """

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        weights, channels = evidence(classifier, output, classes)
        return weighted_sum(weights, channels).relu() / channels[0, 0].numel()
