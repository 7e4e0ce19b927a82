"""Eigen-CAM: the first principal component of the last layer, whatever the class."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM
from bench.registry import EntryOptions


@METHODS.register(
    "eigencam",
    title="Eigen-CAM",
    paper="Muhammad and Yeasin, IJCNN 2020, Eigen-CAM: Class Activation Map using Principal Components",
    year=2020,
    doi="10.1109/IJCNN48605.2020.9206626",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class EigenCAM(CAM):
    """map = O V_1: the activations O (pixels x C) projected on their first right singular vector. The class plays no part.

    The sign of a singular vector is arbitrary; here the map correlates positively with the mean activation (for
    uncorrelated ones its sum is positive). Both variants compute the same.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.eigencam]``."""

        centre: bool = False
        """Subtract each channel's mean first, as some implementations do; the paper does not."""

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:  # noqa: ARG002 - the contract's
        """See `Method.maps`."""
        assert isinstance(self.options, EigenCAM.Options)
        channels = output.layers[classifier.backbone.last]
        activations = channels.flatten(2)
        # The solver raises on NaN, and one broken sample must not stop the others: solve zeros, and put the NaN back.
        broken = ~activations.isfinite().all(dim=2).all(dim=1)
        activations = activations.masked_fill(broken[:, None, None], 0)
        if self.options.centre:
            activations = activations - activations.mean(dim=2, keepdim=True)
        # The eigenvectors of the smaller Gram matrix give the same as the singular value decomposition, several times faster.
        # Its entries are squares: brought to unit scale first, they neither overflow nor underflow.
        scale = activations.abs().amax(dim=(1, 2), keepdim=True)
        unit = activations / scale.masked_fill(scale == 0, 1)
        if unit.shape[1] <= unit.shape[2]:
            _, vectors = torch.linalg.eigh(unit @ unit.mT)
            component = torch.einsum("bc,bcp->bp", vectors[..., -1], unit)
        else:
            values, vectors = torch.linalg.eigh(unit.mT @ unit)
            component = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
        mean = unit.mean(dim=1) if not self.options.centre else channels.flatten(2).mean(dim=1)
        agreement = ((component - component.mean(dim=1, keepdim=True)) * (mean - mean.mean(dim=1, keepdim=True))).sum(dim=1)
        agreement = torch.where(agreement == 0, component.sum(dim=1), agreement)
        component = torch.where(agreement[:, None] < 0, -component, component) * scale[:, 0]
        return component.masked_fill(broken[:, None], float("nan")).reshape(-1, *channels.shape[2:])
