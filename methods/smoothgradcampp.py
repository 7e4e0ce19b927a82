"""Smooth Grad-CAM++: Grad-CAM++ averaged over noisy copies of the picture."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from bench.evaluation.maps import min_max
from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum
from bench.methods.gradcampp import channel_weights
from bench.registry import EntryOptions


@METHODS.register(
    "smoothgradcampp",
    title="Smooth Grad-CAM++",
    paper="Omeiza et al., arXiv 2019, Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep CNN Models",
    year=2019,
    doi="10.48550/arXiv.1908.01224",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class SmoothGradCAMPlusPlus(CAM):
    """map = mean over noisy copies of the picture of their Grad-CAM++ maps, each scaled to [0, 1] first.

    The paper averages the derivatives over the copies instead. In a pooled linear classifier these do not depend on the
    input at all, and that map is exactly the one of Grad-CAM++ without noise; what noise does change, the activations,
    only an average of maps can show. The noise comes from a fixed seed and is the same for every picture, so that no map
    depends on its neighbours or their order. Both variants compute the same, with the true Grad-CAM++ weights.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.smoothgradcampp]``."""

        samples: int = Field(default=8, ge=1)
        """Noisy copies of each picture, one forward pass each."""
        noise: float = Field(default=0.15, ge=0)
        """Standard deviation as a share of the picture's range; 0.1 to 0.2 is what SmoothGrad recommends (Smilkov et al. 2017)."""
        seed: int = Field(default=0, ge=0)
        """Of the noise."""

    def for_trial(self) -> SmoothGradCAMPlusPlus:
        """See `Method.for_trial`."""
        return SmoothGradCAMPlusPlus(self.options.model_copy(update={"samples": 1}), variant=self.variant)

    @torch.no_grad()
    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        assert isinstance(self.options, SmoothGradCAMPlusPlus.Options)
        assert output.images is not None
        assert not classifier.training
        images = output.images
        sigma = self.options.noise * (images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True))
        generator = torch.Generator().manual_seed(self.options.seed)  # on the CPU: the same numbers on every device
        total = torch.zeros((), device=images.device, dtype=images.dtype)
        for _ in range(self.options.samples):
            noise = torch.randn(images.shape[1:], generator=generator, dtype=torch.float32).to(images)
            weights, channels = evidence(classifier, classifier(images + sigma * noise), classes)
            total = total + min_max(weighted_sum(channel_weights(weights, channels), channels).relu())
        return total / self.options.samples
