"""The exponential moving average of the weights (``train.ema``)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bench.method import Classifier


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after every step, starting at the initial weights.

    Running statistics are averaged like weights, as in timm's ModelEmaV3; counters are copied.
    """

    def __init__(self, module: Classifier, *, decay: float) -> None:
        """Copy ``module``, before anything is wrapped around it."""
        self.module: Classifier = copy.deepcopy(module).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of a step."""
        current = module.state_dict()
        averages, weights = [], []
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(tensor)
                weights.append(current[name])
            else:
                tensor.copy_(current[name])
        torch._foreach_lerp_(averages, weights, 1 - self._decay)
