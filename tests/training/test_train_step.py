"""One optimisation step of ResNet-50 with CAM and guidance against the published code in double precision (tests/golden/train_step.npz)."""

from __future__ import annotations

import pytest

from bench.method import METHODS
from tests.training.golden_step import take_step


@pytest.mark.slow
def test_losses_gradients_statistics_and_update_agree_with_the_published_step():
    cam = METHODS.get("cam").target
    step = take_step(cam(cam.Options(), variant="official"), key="CAM", published_head=lambda name: name.replace("head.", "fc."))
    step.assert_agrees(head_bias="head.bias")
