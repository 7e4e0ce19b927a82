"""HiResCAM in closed form."""

from __future__ import annotations

from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum


@METHODS.register(
    "hirescam",
    title="HiResCAM",
    paper="Draelos and Carin, arXiv 2020, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
    year=2020,
    doi="10.48550/arXiv.2011.08891",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class HiResCAM(CAM):
    """map = sum_k g_k A_k, pixel by pixel, without ReLU.

    With g_k = W[y, k] / (h w) this is CAM / (h w), as the paper proves for networks that end in one linear layer: after
    min-max scaling its maps are those of CAM. Both variants compute the same.
    """

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        weights, channels = evidence(classifier, output, classes)
        return weighted_sum(weights, channels) / channels[0, 0].numel()
