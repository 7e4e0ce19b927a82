"""Score-CAM: a channel weighs what the network scores when only the pixels under it are left of the picture."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bench.evaluation.maps import min_max
from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import weighted_sum
from bench.registry import EntryOptions


@METHODS.register(
    "scorecam",
    title="Score-CAM",
    paper="Wang et al., CVPR Workshops 2020, Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
    year=2020,
    doi="10.1109/CVPRW50498.2020.00020",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class ScoreCAM(CAM):
    """map = ReLU(sum_k w_k A_k), w_k from the increase of confidence f_y(X * H_k) - f_y(X_b) (definitions 2 and 3).

    H_k is channel k, brought to the size of the picture and then to [0, 1]; f_y the logit; the baseline X_b the picture
    that an empty mask leaves: zero everywhere after normalisation. One forward pass a picture and channel: with the 2048
    channels of a ResNet-50 this is by far the slowest read-out, and ``channels`` the way out. Both variants compute the same.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.scorecam]``."""

        weights: Literal["softmax", "increase"] = "softmax"
        """``softmax`` of the increases over the channels, as in algorithm 1 of the paper (the baseline, common to all, then
        cancels); ``increase``: the increases as they are, as in definition 3."""
        channels: int | None = Field(default=None, ge=1)
        """Use only so many channels of each picture, those that vary most over its pixels; None = all."""
        chunk: int = Field(default=64, ge=1)
        """Masked pictures a forward pass. No result depends on it."""

    def for_trial(self) -> ScoreCAM:
        """See `Method.for_trial`."""
        return ScoreCAM(self.options.model_copy(update={"channels": 2}), variant=self.variant)

    @torch.no_grad()
    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        assert isinstance(self.options, ScoreCAM.Options)
        channels = output.layers[classifier.backbone.last]
        if self.options.channels is not None and self.options.channels < channels.shape[1]:
            kept = channels.var(dim=(2, 3), correction=0).sort(dim=1, descending=True, stable=True).indices[:, : self.options.channels]
            channels = channels.take_along_dim(kept[:, :, None, None], dim=1)
        # The masks do not depend on the class: the scores of all classes are kept for the next question about this output.
        key = f"scorecam/{channels.shape[1]}"
        if key not in output.extras:
            output.extras[key] = self._increases(classifier, output, channels, self.options.chunk)
        increase = output.extras[key].take_along_dim(classes[:, None, None], dim=2)[:, :, 0].to(channels.dtype)
        return weighted_sum(increase.softmax(dim=1) if self.options.weights == "softmax" else increase, channels).relu()

    @staticmethod
    def _increases(classifier: Classifier, output: Output, channels: Tensor, chunk: int) -> Tensor:
        """Logits of the picture under each mask minus those of the baseline: (B, C, classes)."""
        assert output.images is not None
        assert not classifier.training
        images = output.images
        count = channels.shape[1]
        scores = []
        # Pictures and channels are one long list, cut without regard to where a picture ends.
        for start in range(0, len(images) * count, chunk):
            pairs = torch.arange(start, min(start + chunk, len(images) * count), device=images.device)
            sample, channel = pairs // count, pairs % count
            grown = F.interpolate(channels[sample, channel][:, None], size=images.shape[2:], mode="bilinear", align_corners=False)
            scores.append(classifier(images[sample] * min_max(grown)).logits)
        baseline: Tensor = classifier(torch.zeros_like(images[:1])).logits
        return torch.cat(scores).reshape(len(images), count, -1) - baseline[:, None]
