from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.au import GRID, VARIANTS, action_unit_maps, expression_ids
from bench.au import maps as module

from .faces import faces, mirrored

GOLDEN = Path(__file__).parents[1] / "golden" / "au_maps.npz"
SEEDS = st.integers(0, 10_000)
SOME = torch.arange(6) + 1


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def official(golden, frame):
    """Own and published maps, (sets, 6, frame, frame), and own validity (sets, 6)."""
    landmarks = torch.from_numpy(golden[f"landmarks_{frame}"])
    ids = expression_ids([str(name) for name in golden["expressions"]])
    own = action_unit_maps(landmarks.repeat_interleave(6, 0), ids.repeat(len(landmarks)), frame=frame, size=frame)
    published = torch.from_numpy(golden[f"maps_{frame}"].astype(np.float32))
    return own.maps.view_as(published), published, own.valid.view(len(landmarks), 6)


@pytest.mark.parametrize("frame", [224, 256])
def test_official_maps_agree_with_the_published_ones(golden, frame):
    own, published, _ = official(golden, frame)
    drawn = published.isfinite().all(-1).all(-1) & (published.amax((2, 3)) > 0)
    cosines = F.cosine_similarity(own[drawn].flatten(1), published[drawn].flatten(1))
    assert cosines.mean() >= 0.9998
    assert cosines.min() >= 0.999


@pytest.mark.parametrize("frame", [224, 256])
def test_official_maps_are_valid_where_the_published_ones_are(golden, frame):
    _, published, valid = official(golden, frame)
    assert torch.equal(valid, published.isfinite().all(-1).all(-1))


def test_a_drawing_that_vanishes_when_reduced_is_a_valid_zero_map(golden):
    own, published, valid = official(golden, 224)
    vanished = valid & (published.amax((2, 3)) == 0)
    assert vanished.sum() == 2
    assert own[vanished].abs().max() == 0


def test_official_generic_maps_agree_with_the_published_ones(golden):
    landmarks = torch.from_numpy(golden["landmarks_224"][golden["generic_index"]])
    own = action_unit_maps(landmarks, torch.tensor([0, -1, 3]), frame=224, size=224, generic=True)
    published = torch.from_numpy(golden["generic_maps"].astype(np.float32))
    assert own.valid.all()
    assert F.cosine_similarity(own.maps.flatten(1), published.flatten(1)).min() >= 0.999


def test_a_face_outside_of_the_picture_has_no_map(golden):
    landmarks = torch.from_numpy(golden["landmarks_outside"])[None].repeat(6, 1, 1)
    for variant in VARIANTS:
        own = action_unit_maps(landmarks, SOME, frame=224, size=GRID, variant=variant)
        assert not own.valid.any()
        assert own.maps.abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_face_that_was_not_found_is_invalid_and_harms_no_other(variant, bad):
    landmarks = faces(3)
    landmarks[1, 40, 1] = bad
    own = action_unit_maps(landmarks, SOME[:3], frame=224, size=224, variant=variant)
    assert own.valid.tolist() == [True, False, True]
    assert own.maps.isfinite().all()
    assert own.maps.amax((1, 2)).tolist() == [1, 0, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral_and_foreign_classes_have_no_map(variant):
    own = action_unit_maps(faces(3), torch.tensor([0, -1, 1]), frame=224, size=GRID, variant=variant)
    assert own.valid.tolist() == [False, False, True]
    assert own.maps[:2].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [7, GRID, 56, 224])
@given(seed=SEEDS, noise=st.sampled_from([0.0, 2.0, 60.0]))
@settings(max_examples=8)
def test_maps_lie_between_zero_and_one(variant, size, seed, noise):
    own = action_unit_maps(faces(6, seed=seed, noise=noise), SOME, frame=224, size=size, variant=variant)
    assert own.maps.shape == (6, size, size)
    assert own.maps.dtype == torch.float32
    assert own.maps.min() >= 0
    assert own.maps.max() <= 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [GRID, 224])
@given(seed=SEEDS)
@settings(max_examples=5)
def test_the_map_of_a_sample_does_not_depend_on_the_others(variant, size, seed):
    landmarks, ids = faces(70, seed=seed, noise=10), torch.arange(70) % 8 - 1
    order = torch.randperm(70, generator=torch.Generator().manual_seed(seed))
    whole = action_unit_maps(landmarks, ids, frame=224, size=size, variant=variant)
    some = action_unit_maps(landmarks[order[:9]], ids[order[:9]], frame=224, size=size, variant=variant)
    assert torch.equal(some.maps, whole.maps[order[:9]])
    assert torch.equal(some.valid, whole.valid[order[:9]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch_gives_no_maps(variant):
    own = action_unit_maps(torch.empty(0, 68, 2), torch.empty(0, dtype=torch.int64), frame=224, size=224, variant=variant)
    assert own.maps.shape == (0, 224, 224)


@pytest.mark.parametrize("variant", VARIANTS)
def test_double_and_single_precision_landmarks_give_the_same_map(variant):
    landmarks = faces(6).float()
    single = action_unit_maps(landmarks, SOME, frame=224, size=GRID, variant=variant)
    double = action_unit_maps(landmarks.double(), SOME, frame=224, size=GRID, variant=variant)
    assert torch.equal(single.maps, double.maps)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_symmetric_map_of_a_mirrored_face_is_the_mirrored_map(seed):
    landmarks = faces(6, seed=seed, noise=5)
    own = action_unit_maps(landmarks, SOME, frame=224, size=GRID, variant="symmetric")
    second = action_unit_maps(mirrored(landmarks, frame=224), SOME, frame=224, size=GRID, variant="symmetric")
    assert_same(own.maps.flip(2), second.maps)


@pytest.mark.parametrize("expression", [3, 4, 5, 6])  # those with a slip: chin raiser, lip stretcher, upper lip raiser
def test_official_map_of_a_mirrored_face_is_not_the_mirrored_map(expression):
    landmarks, ids = faces(1, noise=0), torch.tensor([expression])
    own = action_unit_maps(landmarks, ids, frame=224, size=GRID)
    second = action_unit_maps(mirrored(landmarks, frame=224), ids, frame=224, size=GRID)
    assert F.cosine_similarity(own.maps.flip(2).flatten(1), second.maps.flatten(1)) < 0.99


@given(seed=SEEDS, frame=st.integers(40, 600))
@settings(max_examples=20)
def test_symmetric_map_does_not_depend_on_the_resolution(seed, frame):
    own = action_unit_maps(faces(6, seed=seed), SOME, frame=224, size=GRID, variant="symmetric")
    second = action_unit_maps(faces(6, seed=seed, frame=frame), SOME, frame=frame, size=GRID, variant="symmetric")
    assert_same(own.maps, second.maps)


@pytest.mark.parametrize(("variant", "scales"), [("symmetric", True), ("official", False)])
def test_only_symmetric_radii_are_half_as_large_in_a_face_half_as_large(variant, scales):
    points = faces(3).permute(2, 1, 0).float()
    table = module._table(variant, 224, "expressions", points.device)
    _, radius = module._ellipses(points, table, frame=224, variant=variant)
    _, half = module._ellipses(points / 2 + 50, table, frame=224, variant=variant)
    assert torch.allclose(half, radius / 2, rtol=1e-4) == scales


def assert_same(own, second):
    """Equal but for pixels on the very outline, which rounding may put on either side: one of the four readings of a cell."""
    assert ((own - second).abs() > 1e-5).double().mean() < 0.005
    assert (own - second).abs().max() < 0.1


@pytest.mark.parametrize("frame", [28, 84, 112, 224])
def test_enlarging_by_whole_steps_is_bilinear_interpolation(frame):
    layers = torch.rand(GRID, GRID, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(layers.permute(3, 2, 0, 1), size=(frame, frame), mode="bilinear").amax(1)
    assert torch.allclose(module._enlarged_maximum(layers, frame), expected, atol=1e-6)


def test_other_sides_are_resampled_from_the_grid():
    own = action_unit_maps(faces(6), SOME, frame=224, size=GRID).maps
    expected = F.interpolate(own[:, None], size=(14, 14), mode="bilinear", antialias=True)[:, 0]
    assert torch.allclose(action_unit_maps(faces(6), SOME, frame=224, size=14).maps, expected, atol=1e-6)


def test_maps_made_in_inference_mode_and_outside_are_the_same():
    with torch.inference_mode():
        inside = action_unit_maps(faces(6), SOME, frame=97, size=97)
    assert torch.equal(inside.maps, action_unit_maps(faces(6), SOME, frame=97, size=97).maps)


@pytest.mark.parametrize(
    ("landmarks", "options", "message"),
    [
        (torch.zeros(2, 5, 2), {}, "68 points"),
        (torch.zeros(3, 68, 2), {}, "one id per face"),
        (torch.zeros(2, 68, 2), {"variant": "mended"}, "official, symmetric"),
        (torch.zeros(2, 68, 2), {"size": 0}, "size=0"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(landmarks, options, message):
    with pytest.raises(ValueError, match=message):
        action_unit_maps(landmarks, torch.tensor([1, 2]), **{"frame": 224, "size": 28, **options})
