"""XGrad-CAM in closed form."""

from __future__ import annotations

from bench.method import METHODS
from bench.methods.gradcam import GradCAM


@METHODS.register(
    "xgradcam",
    title="XGrad-CAM",
    paper="Fu et al., BMVC 2020, Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs",
    year=2020,
    doi="10.48550/arXiv.2008.02312",
    kind="posthoc",
    trains_as="cam",
    in_all=False,
)
class XGradCAM(GradCAM):
    """map = ReLU(sum_k w_k A_k), w_k = sum_ij g_k A_k / sum(A_k): gradients averaged by activation (eq. 8).

    With g_k = W[y, k] / (h w) at every pixel any weighted average of g_k is g_k itself, so the maps are those of Grad-CAM.
    (For sum(A_k) = 0 the formula is 0 / 0; its limit is taken. A rectified channel is then empty and adds nothing anyway.)
    """
