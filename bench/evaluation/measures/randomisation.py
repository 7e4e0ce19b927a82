"""The sanity check: a map that does not change when the network's weights are drawn anew does not explain the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.evaluation.measures.base import Column, Explained, Part, measure
from bench.evaluation.measures.ranks import spearman
from bench.evaluation.read_out import forward, read_out
from bench.method import Classifier

SAMPLES = 256


@torch.inference_mode(mode=False)  # methods may differentiate through the copy, which weights made in inference mode forbid
def randomise(classifier: Classifier, part: Part, *, seed: int) -> Classifier:
    """A copy of a classifier with weights drawn anew, in eval mode. The draw depends on the seed alone, not on the device.

    A module with ``reset_parameters`` draws its weights as a new one does, and a normalisation resets its statistics. Weights of any other
    module (tokens, position embeddings) are shuffled.
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


@measure(
    Column("randomisation_head", "Similarity with a randomised head", "lower"),
    Column("randomisation_all", "Similarity with all weights randomised", "lower"),
    passes=2,
    most_samples=SAMPLES,
)
def randomisation(explained: Explained) -> dict[str, Tensor]:
    """Spearman's rank correlation of two maps of one class: of the trained and of the randomised network.

    Adebayo et al., NeurIPS 2018; Sixt et al., ICML 2020.
    """
    columns = {}
    parts: tuple[Part, ...] = ("head", "all")
    for part in parts:
        classifier = explained.randomised(part)
        maps = read_out(explained.method, classifier, forward(classifier, explained.images), explained.predicted)
        columns[f"randomisation_{part}"] = spearman(explained.raw_predicted, maps)
    return columns
