"""Measures against the AU map: pixel by pixel in double precision, and against scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from bench.au.codebook import ACTION_UNITS, EXPRESSION_UNITS
from bench.au.maps import action_unit_maps, unit_maps
from bench.dataset import EXPRESSIONS
from bench.evaluation.measures import MEASURES
from tests.au.faces import faces
from tests.evaluation.explained import explained


def compute(name, seen):
    return {column: values.numpy() for column, values in MEASURES[name].compute(seen).items()}


def maps(seen):
    return seen.map_true.double().numpy(), seen.au_maps.numpy() >= 0.5


@pytest.mark.parametrize("seed", range(3))
def test_energy_is_the_share_of_the_map_inside_of_the_region(seed):
    seen = explained(seed)
    values, region = maps(seen)
    by_hand = [
        sum(value for value, inside in zip(m.flat, r.flat, strict=True) if inside) / m.sum() for m, r in zip(values, region, strict=True)
    ]
    np.testing.assert_allclose(compute("energy", seen)["energy"], by_hand, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_pointing_asks_where_the_maximum_lies_and_how_far_from_the_region(seed):
    seen = explained(seed, count=24)
    seen = dataclasses.replace(seen, map_true=torch.rand(seen.map_true.shape, generator=torch.Generator().manual_seed(seed)))
    values, region = maps(seen)
    figures, size = compute("pointing", seen), values.shape[-1]
    for i, (m, r) in enumerate(zip(values, region, strict=True)):
        (top,) = np.argwhere(m == m.max())
        distance = np.sqrt(((np.argwhere(r) - top) ** 2).sum(axis=1)).min()
        assert figures["pointing"][i] == (distance == 0)
        assert figures["pointing_near"][i] == (distance <= 15 * size / 224)
    assert 0 < figures["pointing_near"].mean() < 1


def test_of_several_equal_maxima_the_share_that_hits_counts():
    seen = explained(count=1)
    (y, x), *_ = (seen.au_maps[0] >= 0.5).nonzero().tolist()
    (v, u), *_ = (seen.au_maps[0] == 0).nonzero().tolist()
    values = torch.zeros_like(seen.map_true)
    values[0, y, x] = values[0, v, u] = 1
    assert compute("pointing", dataclasses.replace(seen, map_true=values))["pointing"] == 0.5


@pytest.mark.parametrize("levels", [None, 5, 2])
def test_average_precision_is_that_of_scikit_learn_with_and_without_equal_values(levels):
    seen = explained(4, count=12)
    if levels:
        seen = dataclasses.replace(seen, map_true=(seen.map_true * levels).floor() / levels)
    values, region = maps(seen)
    figures = compute("ap", seen)["ap"]
    for compared, tolerance in ((values, {"rtol": 1e-3}), ((seen.map_true / 1e-5).round().numpy(), {"rtol": 1e-5})):
        expected = [average_precision_score(r.ravel(), m.ravel()) for m, r in zip(compared, region, strict=True)]
        np.testing.assert_allclose(figures, expected, **tolerance)


def test_rounding_decides_nothing_against_the_au_map():
    """A border of exactly one half, and a plateau at the maximum, each up to the last digits."""
    seen = explained(4, count=12)
    seen = dataclasses.replace(seen, map_true=seen.map_true.mul(4).floor() / 4, au_maps=seen.au_maps.mul(2).round() / 2)
    noise = 1e-7 * torch.rand((2, *seen.map_true.shape), generator=torch.Generator().manual_seed(0))
    noisy = dataclasses.replace(seen, map_true=seen.map_true - noise[0], au_maps=seen.au_maps - noise[1])
    for name in ("energy", "pointing", "ap"):
        for column, values in compute(name, seen).items():
            np.testing.assert_allclose(compute(name, noisy)[column], values, atol=2e-6, err_msg=column)


def test_a_constant_map_has_no_energy_and_does_in_games_what_chance_does():
    seen = explained()
    seen = dataclasses.replace(seen, map_true=torch.zeros_like(seen.map_true))
    area = (seen.au_maps >= 0.5).double().mean(dim=(1, 2)).numpy()
    assert compute("energy", seen)["energy"].max() == 0
    np.testing.assert_allclose(compute("pointing", seen)["pointing"], area, rtol=1e-6)
    np.testing.assert_allclose(compute("ap", seen)["ap"], area, rtol=1e-6)


def test_a_face_without_a_region_does_not_count():
    seen = explained()
    seen = dataclasses.replace(seen, au_maps=torch.where(torch.arange(6)[:, None, None] == 2, 0.0, seen.au_maps))
    for name in ("energy", "pointing", "ap"):
        for values in compute(name, seen).values():
            assert np.isnan(values).tolist() == [i == 2 for i in range(6)]


def test_every_action_unit_of_the_expression_has_its_own_cosine():
    seen = explained(count=6)
    figures = compute("au", seen)
    for i, expression in enumerate(seen.expressions.tolist()):
        cosines = []
        for unit in ACTION_UNITS:
            column = figures.get(f"au_{unit.facs}", np.full(6, np.nan))
            if unit.id not in EXPRESSION_UNITS[EXPRESSIONS[expression]]:
                assert np.isnan(column[i])
                continue
            drawn = unit_maps(seen.landmarks[i : i + 1], torch.tensor([unit.id]), frame=224, size=32, variant="symmetric").maps[0].double()
            heat = seen.map_true[i].double()
            cosines.append(float((heat * drawn).sum() / heat.norm() / drawn.norm()))
            assert column[i] == pytest.approx(cosines[-1], abs=1e-6)
        assert figures["au"][i] == pytest.approx(np.mean(cosines), abs=1e-6)


@pytest.mark.parametrize("variant", ["official", "symmetric"])
def test_the_units_of_an_expression_cover_together_what_its_map_covers(variant):
    landmarks = faces(4).float()
    whole = action_unit_maps(landmarks, torch.full((4,), 1), frame=224, size=28, variant=variant).maps
    units = [
        unit_maps(landmarks, torch.full((4,), unit), frame=224, size=28, variant=variant).maps for unit in EXPRESSION_UNITS["happiness"]
    ]
    assert torch.equal(torch.stack(units).amax(dim=0) > 0, whole > 0)
    assert all(unit.flatten(1).amax(dim=1).eq(1).all() for unit in units)
