"""Attention rollout: how much of each input token reaches the class token, through all blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.backbones.deit import TimmViT
from bench.method import METHODS, Classifier, Output
from bench.methods.tscam import TSCAM


@METHODS.register(
    "rollout",
    title="Attention rollout",
    paper="Abnar and Zuidema, ACL 2020, Quantifying Attention Flow in Transformers",
    year=2020,
    doi="10.18653/v1/2020.acl-main.385",
    kind="posthoc",
    trains_as="tscam",
    backbones=("vit",),
    in_all=False,
)
class Rollout(TSCAM):
    """Row of the class token, for patches alone, of the product of (A_l + I) / 2 over all blocks (Abnar and Zuidema, eq. 1).

    A_l is the attention of block l averaged over heads. The map does not depend on the class. The classifier is trained as
    TS-CAM, whose logits see patch tokens only: the class token is read because its attention is what TS-CAM couples with.
    The published FER code has no rollout: the variants are the same.
    """

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:  # noqa: ARG002 - the contract's
        """See `Method.maps`. Looks at ``output.images`` again: the first pass keeps the class token's attention only."""
        backbone = classifier.backbone
        assert isinstance(backbone, TimmViT)
        assert output.images is not None
        with torch.no_grad():
            tokens = backbone.embed(output.images)
            reach = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device)  # share of input token j in token i so far
            for number in range(backbone.depth):
                tokens, weights = backbone.block(number, tokens, whole=True)
                reach = (weights.mean(dim=1) @ reach + reach) / 2
            return backbone.on_grid(reach[:, 0, backbone.prefix :])
