"""Finer-CAM in closed form: what tells a class from those nearest to it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum
from bench.registry import EntryOptions


@METHODS.register(
    "finercam",
    title="Finer-CAM",
    paper="Zhang et al., CVPR 2025, Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation",
    year=2025,
    doi="10.48550/arXiv.2501.11309",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class FinerCAM(CAM):
    """Grad-CAM of logit y minus gamma times the mean of the logits nearest to it.

    The difference is linear in the activations, so its Grad-CAM weights are those of the head, combined alike.
    Both variants compute the same.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.finercam]``."""

        gamma: float = Field(default=0.6, ge=0)
        """How much of the other classes is taken away; the paper's value."""
        references: int = Field(default=3, ge=1)
        """Number of nearest classes; all others where there are fewer."""

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        assert isinstance(self.options, FinerCAM.Options)
        weights, channels = evidence(classifier, output, classes)
        # The class itself sorts last, behind every distance; a stable sort settles ties by class id.
        distance = (output.logits - output.logits.gather(1, classes[:, None])).abs()
        distance = distance.scatter(1, classes[:, None], float("inf"))
        count = min(self.options.references, distance.shape[1] - 1)
        nearest = distance.sort(dim=1, stable=True).indices[:, :count]
        nearby, _ = evidence(classifier, output, nearest)  # (B, count, C)
        return weighted_sum(weights - self.options.gamma * nearby.mean(dim=1), channels).relu() / channels[0, 0].numel()
