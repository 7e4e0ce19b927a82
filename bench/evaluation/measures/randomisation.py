"""The sanity check: a map that stays as it is when the network forgets what it has learned does not explain the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.evaluation.maps import read_maps
from bench.evaluation.measures.base import Column, Explained, Measure, Part
from bench.evaluation.measures.ranks import spearman
from bench.method import Classifier

SAMPLES = 256


@torch.inference_mode(mode=False)  # methods may differentiate through the copy, which weights made in inference mode forbid
def randomise(classifier: Classifier, part: Part, *, seed: int) -> Classifier:
    """A copy of a classifier with weights drawn anew: a function of the seed, whatever the device. The given one is not touched.

    Modules draw their own weights as PyTorch does for a new one, normalisations forget their statistics, and weights that belong to no
    such module (tokens, embeddings of positions) are shuffled.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        device = next(classifier.parameters()).device
        drawn = copy.deepcopy(classifier).cpu()
        spared = set() if part == "all" else set(drawn.backbone.modules())
        for module in drawn.modules():
            if module not in spared:
                _draw(module)
        return drawn.to(device).eval()


def _draw(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for weights in module.parameters(recurse=False):
        weights.copy_(weights.flatten()[torch.randperm(weights.numel())].view_as(weights))


def _similarity(seen: Explained) -> dict[str, Tensor]:
    found = {}
    parts: tuple[Part, ...] = ("head", "all")
    for part in parts:
        other = seen.randomised(part)
        output = other(seen.images)
        output.images = seen.images
        found[f"randomisation_{part}"] = spearman(seen.raw_predicted, read_maps(seen.method, other, output, seen.predicted))
    return found


RANDOMISATION = Measure(
    name="randomisation",
    columns=(
        Column(name="randomisation_head", title="Similarity with a randomised head", better="lower"),
        Column(name="randomisation_all", title="Similarity with all weights randomised", better="lower"),
    ),
    needs_au_map=False,
    passes=2,
    source="Adebayo et al., NeurIPS 2018; Sixt et al., ICML 2020",
    formula="Spearman's rank correlation of the maps of one class, of the trained and of the randomised network",
    compute=_similarity,
    most_samples=SAMPLES,
)
