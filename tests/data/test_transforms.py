from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as reference

from bench.au import REFERENCE_FRAME, action_unit_maps
from bench.config import AugmentConfig
from bench.data import transforms
from bench.data.batch import RawBatch, key_hash
from bench.data.transforms import eval_images, eval_landmarks, train_batch
from bench.keyed import keyed_seeds

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STILL = AugmentConfig(rotation_p=0, crop_scale=(1, 1), flip_p=0, grayscale_p=0, jitter_p=0, erase_p=0)


def smooth(count, side, *, seed=0):
    """(count, 3, side, side) in [0, 1]: pictures without detail finer than a twelfth of their side."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 3, 12, 12, generator=generator), size=(side, side), mode="bicubic").clamp(0, 1)


def raw_batch(count=12, side=48, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Landmarks spread over the picture stand in for a face: nothing here depends on which is which.
    return RawBatch(
        positions=torch.arange(count),
        hashes=torch.tensor([key_hash(f"{seed}/{i}") for i in range(count)]),
        images=(smooth(count, side, seed=seed) * 255).round().to(torch.uint8),
        labels=torch.arange(count) % 7,
        landmarks=side * (0.25 + 0.5 * torch.rand(count, 68, 2, generator=generator)),
    )


def augmented(raw, augment=None, **options):
    fixed = {"seed": 3, "epoch": 5, "size": 48, "expressions": torch.arange(7), "au_variant": "symmetric", "with_au_maps": True}
    return train_batch(raw, **{**fixed, "augment": augment or AugmentConfig(), "mean": MEAN, "std": STD, **options})


def pick(raw, indices):
    return RawBatch(**{f.name: getattr(raw, f.name)[indices] for f in dataclasses.fields(raw)})


def warped(images, theta, size):
    return transforms._warp(images, torch.tensor(theta, dtype=torch.float32)[None].expand(len(images), 2, 3), size)


@pytest.mark.parametrize("side", [48, 96])
def test_a_sample_comes_out_the_same_in_any_batch(side):
    raw = raw_batch(side=side)
    order = torch.tensor([7, 2, 11])
    whole, some = augmented(raw), augmented(pick(raw, order))
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(some, field.name), getattr(whole, field.name)[order]), field.name


def test_the_same_call_gives_the_same_batch():
    assert torch.equal(augmented(raw_batch()).images, augmented(raw_batch()).images)


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 6}])
def test_every_sample_changes_with_seed_and_epoch(change):
    raw = raw_batch()
    assert ((augmented(raw).images - augmented(raw, **change).images).flatten(1).abs().amax(1) > 0).all()


def test_without_augmentation_a_training_picture_is_the_evaluation_picture():
    raw = raw_batch()
    assert torch.allclose(augmented(raw, STILL).images, eval_images(raw.images, size=48, mean=MEAN, std=STD), atol=1e-5)


def test_without_augmentation_a_larger_stored_picture_is_close_to_the_evaluation_picture():
    raw = raw_batch(side=160)
    own, evaluated = augmented(raw, STILL, **IDENTITY).images, eval_images(raw.images, size=48, **IDENTITY)
    assert (own - evaluated).abs().mean() < 0.01


def test_without_augmentation_the_au_map_is_that_of_the_landmarks():
    raw = raw_batch()
    landmarks = eval_landmarks(raw.landmarks, stored=48, size=REFERENCE_FRAME)
    expected = action_unit_maps(landmarks, raw.labels, frame=REFERENCE_FRAME, size=28, variant="symmetric")
    batch = augmented(raw, STILL)
    assert torch.allclose(batch.au_maps, expected.maps, atol=1e-5)
    assert torch.equal(batch.au_valid, expected.valid)
    assert batch.au_valid.tolist() == [label != 0 for label in raw.labels.tolist()]


def test_picture_and_au_map_move_together():
    raw = raw_batch(count=30)
    landmarks = eval_landmarks(raw.landmarks, stored=48, size=REFERENCE_FRAME)
    drawn = action_unit_maps(landmarks, raw.labels, frame=REFERENCE_FRAME, size=28, variant="symmetric").maps
    pictures = (F.interpolate(drawn[:, None], size=(48, 48), mode="bilinear") * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    geometry = AugmentConfig(rotation_degrees=40, rotation_p=1, crop_scale=(0.3, 0.6), flip_p=0.5, grayscale_p=0, jitter_p=0, erase_p=0)
    batch = augmented(dataclasses.replace(raw, images=pictures), geometry, **IDENTITY)
    seen = F.interpolate(batch.images[:, :1], size=(28, 28), mode="bilinear", antialias=True)[:, 0]
    cosines = F.cosine_similarity(seen.flatten(1), batch.au_maps.flatten(1))
    still = F.cosine_similarity(drawn.flatten(1), batch.au_maps.flatten(1))
    assert cosines[batch.au_valid].min() > 0.97
    assert still[batch.au_valid].mean() < 0.9  # the comparison would notice


def test_an_au_map_that_leaves_the_picture_becomes_invalid():
    raw = raw_batch(count=40)
    corner = dataclasses.replace(raw, landmarks=raw.landmarks * 0.4, labels=torch.ones(40, dtype=torch.int64))
    crop = AugmentConfig(rotation_p=0, crop_scale=(0.2, 0.2), flip_p=0)
    batch = augmented(corner, crop)
    assert 0 < batch.au_valid.sum() < 40
    assert torch.equal(batch.au_valid, batch.au_maps.flatten(1).amax(1) > 0)


def test_without_au_maps_none_is_valid():
    batch = augmented(raw_batch(), with_au_maps=False, grid=14)
    assert batch.au_maps.shape == (12, 14, 14)
    assert not batch.au_maps.any()
    assert not batch.au_valid.any()


def test_flip_mirrors_the_picture():
    raw = raw_batch()
    flip = AugmentConfig(**{**STILL.model_dump(), "flip_p": 1.0})
    assert torch.allclose(augmented(raw, flip).images, augmented(raw, STILL).images.flip(3), atol=1e-5)


def test_warp_rotates_as_torchvision_does():
    images = smooth(3, 64)
    angle = math.radians(6)
    own = warped(images, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]], 64)
    expected = reference.rotate(images, 6.0, interpolation=reference.InterpolationMode.BILINEAR)
    assert (own - expected)[..., 4:-4, 4:-4].abs().max() < 1e-4
    assert (own[..., 0, 0] == 0).all()


def test_warp_crops_as_torchvision_does():
    images = smooth(3, 64)
    own = warped(images, [[0.5, 0, -0.25], [0, 0.5, 0.5]], 48)  # the half as wide picture with its corner at (8, 32)
    expected = reference.resized_crop(images, top=32, left=8, height=32, width=32, size=[48, 48], antialias=False)
    assert (own - expected)[..., 1:-1, 1:-1].abs().max() < 1e-5


def test_random_warps_stay_inside_and_follow_the_recipe():
    seeds = keyed_seeds(torch.arange(4000), 0)
    theta = transforms._random_warp(seeds, AugmentConfig()).double()
    side = theta[:, :, 0].norm(dim=1)
    assert torch.allclose(theta[:, :, 1].norm(dim=1), side)
    area = side.square()
    assert area.min() >= 0.8 - 1e-6
    assert area.max() <= 1 + 1e-6
    assert area.mean() == pytest.approx(0.9, abs=0.005)
    flipped = theta[:, :, :2].det() < 0
    assert flipped.double().mean() == pytest.approx(0.5, abs=0.03)
    angle = torch.atan2(-theta[:, 0, 1], theta[:, 1, 1]).rad2deg()
    assert (angle != 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert 5.9 < angle.abs().max() <= 6.001
    # Before the rotation, the crop lies inside of the picture: |centre| + side <= 1.
    centre = torch.einsum("nij,nj->ni", torch.stack([theta[:, :, 0] / side[:, None] * torch.where(flipped, -1, 1)[:, None],
                                                     theta[:, :, 1] / side[:, None]], 2).mT, theta[:, :, 2])  # fmt: skip
    assert (centre.abs() + side[:, None]).max() <= 1 + 1e-6


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.03, 0.4])
def test_hue_agrees_with_torchvision(turn):
    images = torch.cat([smooth(4, 16), torch.full((1, 3, 16, 16), 0.3), torch.zeros(1, 3, 16, 16)])
    own = transforms._turn_hue(images, torch.full((6, 1, 1, 1), turn))
    assert torch.allclose(own, reference.adjust_hue(images, turn), atol=1e-5)


@pytest.mark.parametrize("strength", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_agrees_with_torchvision(strength):
    images = smooth(5, 16)
    seeds = keyed_seeds(torch.arange(5), 0)
    only = AugmentConfig(
        **{**STILL.model_dump(), "jitter_p": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, strength: 0.4}
    )
    own = images.clone()
    transforms._recolour(own, seeds, only)
    draws = transforms.keyed_uniform(seeds, stream=transforms._Stream.COLOUR, count=6)
    column = {"brightness": 2, "contrast": 3, "saturation": 4, "hue": 5}[strength]
    centre = 0 if strength == "hue" else 1
    adjust = getattr(reference, f"adjust_{strength}")
    expected = torch.stack(
        [adjust(image, centre + 0.4 * (2 * float(draw) - 1)) for image, draw in zip(images, draws[:, column], strict=True)]
    )
    assert torch.allclose(own, expected, atol=1e-5)
    assert (own - images).abs().max() > 0.01


def test_grey_agrees_with_torchvision():
    images = smooth(5, 16)
    own = images.clone()
    transforms._recolour(own, keyed_seeds(torch.arange(5), 0), AugmentConfig(**{**STILL.model_dump(), "grayscale_p": 1.0}))
    assert torch.allclose(own, reference.rgb_to_grayscale(images, 3), atol=1e-6)


def test_colour_changes_do_not_touch_the_au_map():
    raw = raw_batch()
    colour = AugmentConfig(**{**STILL.model_dump(), "jitter_p": 1.0, "grayscale_p": 0.5, "erase_p": 1.0})
    assert torch.equal(augmented(raw, colour).au_maps, augmented(raw, STILL).au_maps)


def test_erasing_puts_standard_noise_into_one_box_before_normalisation():
    raw = raw_batch(count=60)
    erase = AugmentConfig(**{**STILL.model_dump(), "erase_p": 1.0})
    still, erased = (augmented(raw, config, **IDENTITY).images for config in (STILL, erase))
    changed = (still != erased).all(1)
    noise = erased[changed[:, None].expand_as(erased)]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    for mask in changed:
        box = mask.any(1)[:, None] & mask.any(0)[None]
        assert torch.equal(mask, box)
    share = changed.double().mean((1, 2))
    assert 0.015 < share.min() < share.max() < 0.34
    normalised = augmented(raw, erase).images
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert torch.allclose(normalised, (erased - mean) / std, atol=1e-5)


def test_erased_boxes_follow_the_recipe():
    box = transforms._random_boxes(keyed_seeds(torch.arange(4000), 0), AugmentConfig(), 224)
    some = box.height > 0
    assert some.double().mean() == pytest.approx(0.5, abs=0.03)
    height, width = box.height[some].double(), box.width[some].double()
    assert (height * width / 224**2 >= 0.02 * 0.97).all()
    assert (height * width / 224**2 <= 0.33 * 1.01).all()
    assert (height / width).log().abs().max() <= math.log(3.4)
    assert (height / width).log().mean().abs() < 0.1
    assert box.top.min() == box.left.min() == 0
    assert ((box.top + box.height)[some]).max() == ((box.left + box.width)[some]).max() == 224


def test_noise_for_all_pixels_and_for_the_erased_ones_are_the_same():
    seeds, config = keyed_seeds(torch.arange(8), 0), AugmentConfig(erase_p=1.0)
    sparse, dense = smooth(8, 32), smooth(8, 32)
    transforms._erase(sparse, seeds, config, everywhere=False)
    transforms._erase(dense, seeds, config, everywhere=True)
    assert torch.equal(sparse, dense)


def test_evaluation_picture_is_resized_directly_with_antialiasing():
    images = (torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = (reference.resize(images / 255, [48, 48], antialias=True) - mean) / std
    assert torch.allclose(eval_images(images, size=48, mean=MEAN, std=STD), expected, atol=1e-5)


def test_evaluation_landmarks_follow_the_picture():
    # A bright spot of 4 x 4 stored pixels becomes one pixel; its centre is the landmark.
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[..., 20:24, 40:44] = 255
    small = eval_images(images, size=16, **IDENTITY)[0, 0]
    landmark = eval_landmarks(torch.tensor([[[41.5, 21.5]]]), stored=64, size=16)
    assert landmark.tolist() == [[[10.0, 5.0]]]
    assert small.argmax() == 5 * 16 + 10
