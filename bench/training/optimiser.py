"""Optimiser and schedule. The schedule is a pure function of the step, set on the optimiser before every step.

It is not given to Accelerate: prepared schedulers step once per process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from bench.config import TrainConfig


def build_optimiser(backbone: nn.Module, head_parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """SGD with Nesterov momentum, or AdamW. Two groups, backbone and head, the second with ``head_lr_ratio``.

    Weight decay is on everything, as in the published runs.
    """
    groups = [
        {"params": list(backbone.parameters()), "lr_ratio": 1.0},
        {"params": list(head_parameters), "lr_ratio": config.head_lr_ratio},
    ]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay)
    return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, *, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the backbone at a global step (counted from 0).

    ``step`` changes once an epoch (the published ``mystep``); warm-up and ``cosine`` change every step.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (math.floor(warmup) + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return max(config.min_lr, config.lr * config.gamma ** (step // steps_per_epoch // config.step_epochs))
    total = config.epochs * steps_per_epoch
    progress = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: Optimizer, value: float) -> None:
    """Write the rate into every group, times the group's own ratio."""
    for group in optimiser.param_groups:
        group["lr"] = value * group["lr_ratio"]
