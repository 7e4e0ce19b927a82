"""CAM-COS and ATT-COS against the published code's figures (tests/golden/cosines.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.evaluation.maps import attention_cosines, map_cosines, min_max, upsample
from bench.training.guidance import layer_attention

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cosines.npz", allow_pickle=False)


def _tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name].astype(np.float32))[None]


@pytest.mark.parametrize("case", range(11))
def test_cosines_agree_with_the_published_code(case):
    au = _tensor(f"case{case}_au")
    assert map_cosines(_tensor(f"case{case}_cam_raw"), au).item() == pytest.approx(float(GOLDEN["cam_cos"][case]), abs=1e-4)
    attention = layer_attention(_tensor(f"case{case}_features"))
    assert attention_cosines(attention, au).item() == pytest.approx(float(GOLDEN["att_cos"][case]), abs=1e-4)


@pytest.mark.parametrize("case", range(11))
def test_min_max_agrees_with_the_published_code(case):
    expected = np.nan_to_num(GOLDEN[f"case{case}_cam_norm"])
    np.testing.assert_allclose(min_max(_tensor(f"case{case}_cam_raw"))[0], expected, atol=1e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_upsampling_agrees_with_the_published_code(case):
    grown = upsample(_tensor(f"case{case}_cam_norm"), size=224)[0]
    np.testing.assert_allclose(grown, GOLDEN[f"case{case}_cam_up"], atol=1e-6)


@given(st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_min_max_is_free_of_scale(scale, seed):
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(min_max(maps * scale), min_max(maps), rtol=1e-9, atol=1e-9)


def test_a_constant_map_becomes_zeros_and_has_cosine_zero():
    constant = torch.full((1, 7, 7), 3.0)
    assert min_max(constant).abs().max() == 0
    assert map_cosines(constant, torch.rand(1, 28, 28)).item() == 0


def test_a_map_with_nan_becomes_zeros():
    assert min_max(torch.full((1, 7, 7), float("nan"))).abs().max() == 0


def test_cosines_do_not_depend_on_the_batch():
    maps, au = torch.randn(5, 7, 7), torch.rand(5, 28, 28)
    whole = map_cosines(maps, au)
    single = torch.cat([map_cosines(maps[i : i + 1], au[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-6)
