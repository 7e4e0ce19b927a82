"""LayerCAM: weights of their own for every pixel, so that layers of fine resolution can be used and fused."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bench.backbone import traced
from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.methods.gradcam import evidence, weighted_sum
from bench.registry import EntryOptions


@METHODS.register(
    "layercam",
    title="LayerCAM",
    paper="Jiang et al., IEEE TIP 2021, LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
    year=2021,
    doi="10.1109/TIP.2021.3089943",
    kind="posthoc",
    trains_as="cam",
)
class LayerCAM(CAM):
    """map = ReLU(sum_k ReLU(g_k) A_k), pixel by pixel (eq. 6 to 8).

    On the last layer g_k = W[y, k] / (h w), without any differentiation. Earlier layers are differentiated through the
    network, in a second forward pass. Several layers are fused as in the paper: each map is divided by its maximum, those
    of the shallow layers (all but the two deepest) go through tanh(gamma x) (eq. 9), and the maximum of all is taken at
    the finest of their resolutions. Both variants compute the same.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.layercam]``."""

        layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
        """Layers to fuse; empty = the last one (5 in a ResNet)."""
        gamma: float = Field(default=2.0, gt=0)
        """Scale inside of the tanh for shallow layers; the paper's value."""

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`.

        Raises:
            ValueError: an option names a layer that the network does not have.
        """
        assert isinstance(self.options, LayerCAM.Options)
        last = classifier.backbone.last
        wanted = sorted(set(self.options.layers or (last,)))
        for layer in wanted:
            if layer not in output.layers:
                known = ", ".join(map(str, sorted(output.layers)))
                raise ValueError(
                    f"methods.layercam.layers names layer {layer}; this network has the layers {known}; "
                    f"--set methods.layercam.layers=[{last}]"
                )
        maps = self._differentiated(classifier, output, classes, [layer for layer in wanted if layer != last])
        if last in wanted:
            weights, channels = evidence(classifier, output, classes)
            maps[last] = weighted_sum(weights.relu(), channels).relu() / channels[0, 0].numel()
        if len(maps) == 1:
            return maps[wanted[0]]
        height, width = (max(m.shape[axis] for m in maps.values()) for axis in (1, 2))
        scaled = []
        for layer, raw in maps.items():
            peak = raw.amax(dim=(1, 2), keepdim=True)
            raised = raw / peak.masked_fill(peak == 0, 1)
            if layer <= last - 2:
                raised = torch.tanh(self.options.gamma * raised)
            scaled.append(F.interpolate(raised[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0])
        return torch.stack(scaled).amax(dim=0)

    @staticmethod
    def _differentiated(classifier: Classifier, output: Output, classes: Tensor, layers: list[int]) -> dict[int, Tensor]:
        if not layers:
            return {}
        assert output.images is not None
        assert not classifier.training
        # The evaluation runs in inference mode, whose tensors can never be differentiated: leave it, and work on copies.
        with torch.inference_mode(False), torch.enable_grad():
            again = classifier(output.images.detach().clone().requires_grad_())
            # In eval mode samples do not meet, so one backward pass of the sum gives each sample its own gradient.
            logit = again.logits.gather(1, classes.clone()[:, None]).sum()
            taps = [again.extras.get(traced(layer), again.layers[layer]) for layer in layers]
            gradients = torch.autograd.grad(logit, taps, allow_unused=True)
        return {
            layer: (_by_channels(gradient, again, layer).relu() * again.layers[layer].detach()).sum(dim=1).relu()
            for layer, gradient in zip(layers, gradients, strict=True)
        }


def _by_channels(gradient: Tensor | None, output: Output, layer: int) -> Tensor:
    """The gradient of the logit by a layer, (B, C, h, w).

    Raises:
        ValueError: the logit does not depend on the layer.
    """
    if gradient is None:
        last = max(output.layers)
        raise ValueError(
            f"methods.layercam.layers names layer {layer}, which the logit does not depend on: the layers of this network stand side by "
            f"side, and its last alone leads to the classifier; --set methods.layercam.layers=[{last}]"
        )
    return gradient.permute(0, 3, 1, 2) if traced(layer) in output.extras else gradient
