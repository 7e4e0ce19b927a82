"""Ablation-CAM in closed form."""

from __future__ import annotations

from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum


@METHODS.register(
    "ablationcam",
    title="Ablation-CAM",
    paper="Desai and Ramaswamy, WACV 2020, Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free Localization",
    year=2020,
    doi="10.1109/WACV45572.2020.9093360",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class AblationCAM(CAM):
    """map = ReLU(sum_k w_k A_k), w_k = (y - y_k) / y: the share of the logit y that is lost without channel k (eq. 2 and 4).

    Zeroing A_k takes W[y, k] mean(A_k) away from the logit, so no channel needs to be zeroed in earnest. As published, a
    negative logit turns the signs of all weights; for a logit of exactly 0, where the share is undefined, the map is zero.
    Both variants compute the same.
    """

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        weights, channels = evidence(classifier, output, classes)
        logit = output.logits.gather(1, classes[:, None]).to(channels.dtype)
        lost = weights * channels.mean(dim=(2, 3))
        share = (lost / logit.masked_fill(logit == 0, 1)).masked_fill(logit == 0, 0)
        return weighted_sum(share, channels).relu()
