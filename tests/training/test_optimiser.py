from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.config import TrainConfig
from bench.training.optimiser import build_optimiser, learning_rate, set_learning_rate


def rates(config, steps_per_epoch):
    return [learning_rate(config, step=s, steps_per_epoch=steps_per_epoch) for s in range(config.epochs * steps_per_epoch)]


def test_the_published_schedule_multiplies_every_four_epochs_and_has_a_floor():
    got = rates(TrainConfig(epochs=20, lr=0.002, gamma=0.9, step_epochs=4), 3)
    assert got == pytest.approx([0.002 * 0.9 ** (step // 3 // 4) for step in range(60)])
    assert rates(TrainConfig(epochs=8, lr=0.002, gamma=0.01, step_epochs=4, min_lr=1e-3), 1)[-1] == 1e-3


def test_cosine_agrees_with_torch():
    config = TrainConfig(epochs=5, lr=0.1, schedule="cosine", min_lr=0.01)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20, eta_min=0.01)
    for got in rates(config, 4):
        assert got == pytest.approx(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()


def test_warm_up_rises_to_the_rate():
    got = rates(TrainConfig(epochs=4, lr=0.1, schedule="constant", warmup_epochs=1), 4)
    assert got[:4] == sorted(got[:4])
    assert got[0] < 0.03
    assert got[4:] == [0.1] * 12


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_head_has_its_own_rate(name):
    backbone, head = nn.Linear(2, 2), nn.Linear(2, 2)
    optimiser = build_optimiser(backbone, head.parameters(), TrainConfig(optimizer=name, head_lr_ratio=10))
    set_learning_rate(optimiser, 0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [0.5, 5.0]


def test_sgd_is_nesterov():
    assert build_optimiser(nn.Linear(2, 2), nn.Linear(2, 2).parameters(), TrainConfig()).param_groups[0]["nesterov"]
