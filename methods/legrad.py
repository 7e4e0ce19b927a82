"""LeGrad: the gradient of the class score with respect to the attention maps of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.backbones.deit import TimmViT
from bench.method import METHODS, Classifier, Output
from bench.methods.tscam import TSCAM, TokenClassifier


@METHODS.register(
    "legrad",
    title="LeGrad",
    paper="Bousselham et al., ICCV 2025, LeGrad: An Explainability Method for Vision Transformers via Feature Formation Sensitivity",
    year=2024,
    doi="10.48550/arXiv.2404.03214",
    kind="posthoc",
    trains_as="tscam",
    backbones=("vit",),
    in_all=False,
)
class LeGrad(TSCAM):
    """Mean over blocks l, heads and queries of relu(d s_l / d A_l), for each patch as key.

    s_l is the score of the class from the tokens after block l, through the classifier's own norm and head, as if the network
    ended there; A_l is the softmax attention of block l. For a TS-CAM classifier the score pools patch tokens, so the
    queries that matter are the patches; the columns of the class token and its like are left out of the map.
    The published FER code has no LeGrad: the variants are the same.
    """

    # `needs_grad` stays False: the graph is that of a second pass made here, and the evaluation need not keep its own.

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`. Looks at ``output.images`` again."""
        assert isinstance(classifier, TokenClassifier)
        backbone = classifier.backbone
        assert isinstance(backbone, TimmViT)
        assert output.images is not None
        with torch.inference_mode(False), torch.enable_grad():
            relevance = torch.zeros((), device=output.images.device)
            # A clone made here is an ordinary tensor, also where the images came out of inference mode.
            tokens, chosen = backbone.embed(output.images.clone()), classes.clone()
            for number in range(backbone.depth):
                # s_l is differentiated by A_l alone: the graph never reaches further back than one block.
                tokens, attention = backbone.block(number, tokens.detach().requires_grad_(), whole=True)
                scores = classifier.head(backbone.patches(tokens)).mean(dim=(2, 3))
                (gradient,) = torch.autograd.grad(scores.gather(1, chosen[:, None]).sum(), attention)
                relevance = relevance + gradient.clamp(min=0).mean(dim=(1, 2))[:, backbone.prefix :]
            return backbone.on_grid(relevance / backbone.depth)
