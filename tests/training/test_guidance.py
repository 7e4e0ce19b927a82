"""The alignment loss against the published code's figures (tests/golden/alignment.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.training.guidance import fit_maps, layer_attention, misalignment

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "alignment.npz", allow_pickle=False)


def _loss(attention, heatmap, weight):
    maps = torch.from_numpy(heatmap.astype(np.float32))[:, 0]
    valid = maps.isfinite().flatten(1).all(dim=1)
    return weight * misalignment(attention[:, 0], maps, valid).sum() / valid.sum().clamp(min=1)


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("weight", [9, 4])
def test_loss_and_gradient_agree_with_the_published_code(case, weight):
    attention = torch.from_numpy(GOLDEN[f"case{case}_attention"]).requires_grad_()
    loss = _loss(attention, GOLDEN[f"case{case}_heatmap"], weight)
    (gradient,) = torch.autograd.grad(loss, attention)
    assert loss.item() == pytest.approx(float(GOLDEN[f"case{case}_loss_lambda{weight}"]), abs=1e-5)
    torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN[f"case{case}_grad_lambda{weight}"]), atol=1e-6, rtol=1e-4)


def test_several_layers_are_averaged_as_published():
    features = [torch.from_numpy(GOLDEN[f"multi_feat{layer}"]).requires_grad_() for layer in (5, 4)]
    losses = [_loss(layer_attention(f)[:, None], GOLDEN["multi_heatmap"], 9) for f in features]
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(float(GOLDEN["multi_loss_lambda9"]), abs=1e-5)
    for gradient, layer in zip(gradients, (5, 4), strict=True):
        torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN[f"multi_grad{layer}"]), atol=1e-6, rtol=1e-4)


def test_an_empty_map_gives_the_published_loss_and_gradient():
    attention = torch.from_numpy(GOLDEN["zero_attention"]).requires_grad_()
    loss = _loss(attention, GOLDEN["zero_heatmap"], 9)
    (gradient,) = torch.autograd.grad(loss, attention)
    assert loss.item() == pytest.approx(float(GOLDEN["zero_loss_lambda9"]), abs=1e-5)
    torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN["zero_grad_lambda9"]), atol=1e-6, rtol=1e-4)


def test_without_a_valid_sample_the_loss_is_zero_and_so_is_the_gradient():
    attention = torch.rand(2, 7, 7, requires_grad=True)
    loss = misalignment(attention, torch.full((2, 28, 28), float("inf")), torch.tensor([False, False])).sum()
    (gradient,) = torch.autograd.grad(loss, attention)
    assert loss.item() == float(GOLDEN["all_invalid_loss"]) == 0
    assert gradient.abs().max() == 0


def test_gradient_agrees_with_finite_differences_in_float64():
    torch.manual_seed(0)
    attention = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    maps = torch.rand(2, 28, 28, dtype=torch.float64)
    torch.autograd.gradcheck(lambda a: misalignment(a, maps, torch.tensor([True, True])), attention)


def test_maps_of_the_attentions_own_size_are_left_alone():
    maps = torch.rand(3, 28, 28)
    assert fit_maps(maps, (28, 28)) is maps
