"""Deletion, insertion, drop: step by step in double precision, against grad-cam and torchcam, and on a network whose pixels are known."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from bench.evaluation.measures import MEASURES
from bench.evaluation.measures.faithfulness import blurred
from bench.evaluation.measures.ranks import relevance_ranks
from tests.evaluation.explained import Logits, doubled, explained, explained_window


def compute(name, seen):
    return {column: values.double().numpy() for column, values in MEASURES[name].compute(seen).items()}


class Given:
    """What torchcam asks for maps: gives those of `explained`."""

    def __init__(self, seen):
        self.model = Logits(seen.classifier)
        self.maps = seen.map_predicted

    def __call__(self, class_idx=None, scores=None, **_):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return torch.no_grad()


def curve(seen, i, *, before, after):
    """Confidence of one picture while its pixels change one after the other, 21 points, in double precision."""
    order = sorted(range(seen.map_predicted[i].numel()), key=lambda p: relevance_ranks(seen.map_predicted)[i].flatten()[p].item())
    picture, points = before.clone().flatten(1), []
    done = 0
    for step in range(21):
        count = step * len(order) // 20
        for pixel in order[done:count]:
            picture[:, pixel] = after.flatten(1)[:, pixel]
        done = count
        logits = seen.classifier(picture.view(1, *before.shape)).logits[0]
        points.append((count / len(order), float(logits.double().softmax(0)[seen.predicted[i]])))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("size", [12, 17])
@torch.no_grad()
def test_deletion_and_insertion_are_the_areas_found_step_by_step(size):
    seen = explained(1, count=3, size=size)
    exact = doubled(seen)
    for name in ("deletion", "insertion"):
        start, end = (exact.images, exact.images * 0) if name == "deletion" else (blurred(exact.images), exact.images)
        by_hand = [curve(exact, i, before=start[i], after=end[i]) for i in range(3)]
        np.testing.assert_allclose(compute(name, seen)[name], by_hand, atol=1e-5)


def test_deletion_and_insertion_agree_with_torchcam():
    """Without equal pixels, which torchcam takes row by row, and where the steps divide the pixels: elsewhere its last step is shorter."""
    seen = explained(2, count=5, size=40)
    seen = dataclasses.replace(seen, map_predicted=torch.rand(seen.map_predicted.shape, generator=torch.Generator().manual_seed(0)))
    peer = DeletionInsertionMetric(Given(seen), lambda logits: logits.softmax(dim=1), steps=20)
    peer.update(seen.images)
    assert compute("deletion", seen)["deletion"].mean() == pytest.approx(peer.summary()["deletion_auc"], abs=1e-5)
    blurry = DeletionInsertionMetric(Given(seen), lambda logits: logits.softmax(dim=1), steps=20, baseline=blurred)
    blurry.update(seen.images)
    assert compute("insertion", seen)["insertion"].mean() == pytest.approx(blurry.summary()["insertion_auc"], abs=1e-5)


def test_average_drop_and_increase_agree_with_torchcam():
    seen = explained(3, count=16)
    peer = ClassificationMetric(Given(seen), lambda logits: logits.softmax(dim=1))
    peer.update(seen.images)
    figures = compute("drop", seen)
    assert figures["drop"].mean() == pytest.approx(peer.summary()["avg_drop"], abs=1e-5)
    assert figures["increase"].mean() == peer.summary()["conf_increase"]
    assert 0 < figures["increase"].mean() < 1


def test_gradcam_leaves_out_the_division_of_the_average_drop():
    """grad-cam's DropInConfidence is max(0, Y - O); Chattopadhay et al. divide by Y. Its IncreaseInConfidence is theirs."""
    seen = explained(3, count=16)
    targets = [ClassifierOutputSoftmaxTarget(int(k)) for k in seen.predicted]
    cams = seen.map_predicted.numpy()
    figures = compute("drop", seen)
    whole = seen.logits.softmax(dim=1).amax(dim=1).numpy()
    drops = DropInConfidence()(seen.images, cams, targets, Logits(seen.classifier))
    np.testing.assert_allclose(figures["drop"] * whole, drops, atol=1e-5)
    assert np.abs(figures["drop"] - drops).max() > 0.05
    np.testing.assert_array_equal(figures["increase"], IncreaseInConfidence()(seen.images, cams, targets, Logits(seen.classifier)))


@pytest.mark.parametrize("name", ["deletion", "insertion", "drop", "road"])
def test_a_map_that_knows_the_pixels_that_matter_is_better_than_its_inverse(name):
    right, wrong = (compute(name, explained_window(inverse=inverse)) for inverse in (False, True))
    for column in MEASURES[name].columns:
        sign = 1 if column.better == "higher" else -1
        if column.name != "increase":  # nothing but the window counts: neither map can add confidence
            assert (sign * (right[column.name] - wrong[column.name]) > 0.02).all(), column.name


def test_ranks_are_a_permutation_from_high_to_low():
    maps = torch.rand(3, 9, 9)
    ranks = relevance_ranks(maps)
    for values, order in zip(maps, ranks, strict=True):
        assert sorted(order.flatten().tolist()) == list(range(81))
        assert values.flatten()[order.flatten().argsort()].diff().max() <= 0


def test_equal_pixels_are_ranked_without_a_pattern_and_in_every_map_alike():
    ranks = relevance_ranks(torch.zeros(2, 64, 64)).double()
    assert torch.equal(ranks[0], ranks[1])
    halves = ranks[0].flatten().view(2, -1).mean(dim=1) / 4096  # top and bottom
    assert (halves - 0.5).abs().max() < 0.02
