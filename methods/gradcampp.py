"""Grad-CAM++ in closed form: the true weights, and those of the published code."""

from __future__ import annotations

from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum


def channel_weights(weights: Tensor, channels: Tensor) -> Tensor:
    """Grad-CAM++ weights w_k = sum_ij alpha ReLU(g), alpha = g^2 / (2 g^2 + sum(A) g^3) (eq. 5, 7 and 19 of the paper).

    With g = W / (h w) at every pixel this is ReLU(W) / (2 + W mean(A)), without a power of g that could underflow, so it
    holds at any scale of W. The paper derives alpha for rectified channels, where it lies in (0, 1/2]. A channel of
    negative mean, which only a last layer without ReLU has, would bring the denominator to zero or below: its mean counts
    as zero, alpha as 1/2.

    Args:
        weights: (B, C), of the head.
        channels: (B, C, h, w).

    Returns:
        (B, C), none negative.
    """
    return weights.relu() / (2 + weights.relu() * channels.mean(dim=(2, 3)).clamp(min=0))


@METHODS.register(
    "gradcampp",
    title="Grad-CAM++",
    paper="Chattopadhay et al., WACV 2018, Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional Networks",
    year=2018,
    doi="10.1109/WACV.2018.00097",
    kind="posthoc",
    trains_as="cam",
)
class GradCAMPlusPlus(CAM):
    """map = ReLU(sum_k w_k A_k) with the weights of `channel_weights`.

    ``official``: the published code computes the denominator of alpha but divides a copy by it, so that alpha = g^2 and
    w_k = sum_ij ReLU(g)^3 = ReLU(W)^3 / (h w)^2.
    """

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        weights, channels = evidence(classifier, output, classes)
        if self.variant == "official":
            pixels = channels[0, 0].numel()
            return weighted_sum(weights.relu() ** 3, channels).relu() / pixels**2
        return weighted_sum(channel_weights(weights, channels), channels).relu()
