"""ROAD: the imputation against a sparse direct solution (that of the authors' code, in grad-cam), and the figures made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADLeastRelevantFirstAverage, ROADMostRelevantFirstAverage
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from bench.evaluation.measures import MEASURES
from bench.evaluation.measures.ranks import relevance_ranks
from bench.evaluation.measures.road import NOISE, SHARES, impute
from tests.evaluation.explained import Logits, explained

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # grad-cam's use of numpy


def pictures(count, size, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic") + 0.3 * torch.randn(count, 3, size, size, generator=generator)
    return images, F.interpolate(torch.rand(count, 1, 7, 7, generator=generator), size=(size, size), mode="bilinear")[:, 0]


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [32, 51, 64])
def test_imputed_pixels_are_those_of_a_direct_solver(size, share, least):
    images, maps = pictures(2, size)
    ranks = relevance_ranks(-maps if least else maps)
    missing = ranks < share * size**2
    peer = NoisyLinearImputer(noise=0)
    exact = torch.stack([peer(image, known) for image, known in zip(images, (~missing).float(), strict=True)])
    assert (impute(images, missing) - exact).abs().max() < NOISE / 10


@pytest.mark.slow
def test_imputed_pixels_are_those_of_a_direct_solver_at_full_size():
    images, maps = pictures(1, 224)
    missing = relevance_ranks(maps) < 0.9 * 224**2
    exact = NoisyLinearImputer(noise=0)(images[0], (~missing[0]).float())
    assert (impute(images, missing)[0] - exact).abs().max() < NOISE / 10


def test_known_pixels_stay_and_scattered_holes_are_filled_with_the_mean_of_their_neighbours():
    images, _ = pictures(1, 16)
    missing = torch.zeros(1, 16, 16, dtype=torch.bool)
    missing[0, 5, 7] = missing[0, 0, 0] = True
    left = impute(images, missing)[0]
    weights = {(dy, dx): (1 / 6 if 0 in (dy, dx) else 1 / 12) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)}
    inside = sum(w * images[0, :, 5 + dy, 7 + dx] for (dy, dx), w in weights.items())
    corner = sum(w * images[0, :, dy, dx] for (dy, dx), w in weights.items() if min(dy, dx) >= 0) / (1 / 6 + 1 / 6 + 1 / 12)
    torch.testing.assert_close(left[:, 5, 7], inside, atol=1e-5, rtol=0)
    torch.testing.assert_close(left[:, 0, 0], corner, atol=1e-5, rtol=0)
    torch.testing.assert_close(left[:, ~missing[0]], images[0][:, ~missing[0]], atol=0, rtol=0)


def test_imputation_does_not_depend_on_the_batch():
    images, maps = pictures(5, 32)
    missing = relevance_ranks(maps) < torch.tensor([50, 200, 500, 800, 1000])[:, None, None]
    whole = impute(images, missing)
    single = torch.cat([impute(images[i : i + 1], missing[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, single, atol=1e-6, rtol=0)


def test_road_agrees_with_gradcam():
    """To 0.01: the noise is drawn anew there, and its percentiles leave a pixel more or less. It gives differences to the whole picture."""
    seen = explained(6, count=3, size=32)
    figures = {name: values.numpy() for name, values in MEASURES["road"].compute(seen).items()}
    targets = [ClassifierOutputSoftmaxTarget(int(k)) for k in seen.predicted]
    percentiles = [round(100 * (1 - share)) for share in SHARES]
    arguments = (seen.images, seen.map_predicted.numpy(), targets, Logits(seen.classifier))
    most, least = (kind(percentiles)(*arguments) for kind in (ROADMostRelevantFirstAverage, ROADLeastRelevantFirstAverage))
    whole = seen.logits.softmax(dim=1).amax(dim=1).numpy()
    np.testing.assert_allclose(figures["road_most"], whole + most, atol=0.01)
    np.testing.assert_allclose(figures["road_least"], whole + least, atol=0.01)
    np.testing.assert_allclose(figures["road"], (least - most) / 2, atol=0.01)
    assert np.abs(figures["road"]).max() > 0.03


def test_gradcam_removes_all_of_a_picture_whose_map_is_mostly_zero():
    """Its threshold is a percentile, below which nothing lies where many pixels are equal: the whole picture goes, whatever the share."""
    image = torch.randn(1, 3, 16, 16)
    cam = np.zeros((1, 16, 16), np.float32)
    cam[0, :4] = 1
    asked = []

    def imputer(picture, mask):
        asked.append(int(mask.sum()))
        return picture

    measure = ROADMostRelevantFirstAverage([50])
    road = measure.imputer(50)
    road.perturbation.imputer = imputer
    road(image, cam, [lambda output: output.sum()], torch.nn.Flatten())
    assert asked == [0]
    assert int((relevance_ranks(torch.from_numpy(cam)) < 128).sum()) == 128
