"""From stored pictures to the network's input, on the device that holds the batch.

Training follows the published recipe (the recipe of APViT, arXiv 2212.05463, as used by "Guided Interpretable
Facial Expression Recognition via Spatial Action Unit Cues", FG 2024): rotation, square crop, flip, grey, colour jitter,
erasing, normalisation. Rotation, crop and flip are composed into *one* affine warp, so that the picture is resampled once,
and the AU map goes through the same warp. Every random number is a function of (seed, epoch, sample key).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import GRID, action_unit_maps
from bench.config import AugmentConfig
from bench.data.batch import RawBatch
from bench.keyed import keyed_normal_at, keyed_seeds, keyed_uniform
from bench.method import Batch

RESIZE = 256
CROP = 224
"""The published recipe shrinks pictures to 256 pixels, of which it crops at least 80 % and makes 224."""

_GREY = (0.2989, 0.587, 0.114)
_ERASE_TRIES = 10
"""Boxes drawn before a picture is left whole, as in torchvision's RandomErasing."""

_CACHED = 2**19
"""Numbers that a CPU core works on without waiting for memory."""


class _Stream:
    """What a number is drawn for; never renumber, or every training changes."""

    GEOMETRY = 1
    COLOUR = 2
    ERASE = 3
    NOISE = 4


@torch.no_grad()
def train_batch(
    raw: RawBatch,
    *,
    seed: int,
    epoch: int,
    size: int,
    grid: int = GRID,
    augment: AugmentConfig,
    expressions: Tensor,
    au_variant: Literal["official", "symmetric"],
    mean: Sequence[float],
    std: Sequence[float],
    with_au_maps: bool,
) -> Batch:
    """Augment a batch. What happens to a sample does not depend on the other samples of the batch.

    Where this departs from the published code: one bilinear resampling instead of a bicubic rotation and a bilinear crop;
    AU maps are warped bilinearly instead of to the nearest pixel; the four colour changes come in the fixed order
    brightness, contrast, saturation, hue instead of a random one; no rounding to bytes between the steps.

    Args:
        raw: Stored samples, on the device where everything happens.
        seed: Seed of the training's data.
        epoch: Number of the epoch.
        size: Side of the network's input.
        grid: Side of the AU maps.
        augment: The recipe's numbers. All probabilities zero and ``crop_scale = (1, 1)`` leave the whole, unchanged picture.
        expressions: (number of classes,) int64, `bench.au.expression_ids` of the classes.
        au_variant: See `bench.au.action_unit_maps`.
        mean: Three channel means, for pictures in [0, 1].
        std: Three channel standard deviations.
        with_au_maps: Whether to make AU maps; without, they are zero and none is valid.
    """
    device, count = raw.images.device, len(raw)
    seeds = keyed_seeds(raw.hashes, seed, epoch)
    theta = _random_warp(seeds, augment)
    images = _warp(_shrunk(raw.images, round(size * RESIZE / CROP)), theta, size)
    if with_au_maps:
        # Made in the frame for which the published pixel radii are meant, whatever size happens to be stored.
        landmarks = eval_landmarks(raw.landmarks, stored=raw.images.shape[-1], size=REFERENCE_FRAME)
        ids = expressions.to(device)[raw.labels]
        maps, valid = action_unit_maps(landmarks, ids, frame=REFERENCE_FRAME, size=GRID, variant=au_variant)
        maps = _warp(maps[:, None], theta, grid)[:, 0]
        valid = valid & (maps.flatten(1).amax(1) > 0)  # the warp may move all of it out of the picture
    else:
        maps = torch.zeros(count, grid, grid, device=device)
        valid = torch.zeros(count, dtype=torch.bool, device=device)
    _recolour(images, seeds, augment)
    _erase(images, seeds, augment, everywhere=device.type != "cpu")
    return Batch(
        positions=raw.positions, seeds=seeds, images=_normalise(images, mean, std), labels=raw.labels, au_maps=maps, au_valid=valid
    )


@torch.no_grad()
def eval_images(images: Tensor, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Stored pictures (B, 3, S, S) uint8 to the network's input (B, 3, size, size) float32: resized (antialiased), normalised."""
    return _normalise(_resized(_unit(images), size), mean, std)


def eval_landmarks(landmarks: Tensor, *, stored: int, size: int) -> Tensor:
    """Landmarks of a picture of side ``stored`` in the picture that `eval_images` makes of it.

    Pixels are counted at their centres, the first one 0; resizing keeps the picture's outer borders in place.
    """
    return (landmarks + 0.5) * (size / stored) - 0.5


def _unit(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _shrunk(images: Tensor, size: int) -> Tensor:
    """Pictures in [0, 1], not larger than needed: a warp reads four pixels for each it makes, and would skip the others."""
    return _resized(_unit(images), min(size, images.shape[-1]))


def _random_warp(seeds: Tensor, augment: AugmentConfig) -> Tensor:
    """(B, 2, 3): affine map from the output picture to the input picture, both [-1, 1] from border to border (float32).

    Read backwards, which is how a warp is computed: undo the flip, go to the crop, undo the rotation.
    """
    turned, angle, area, left, top, flipped = keyed_uniform(seeds, stream=_Stream.GEOMETRY, count=6).unbind(1)
    angle = torch.where(turned < augment.rotation_p, (2 * angle - 1) * math.radians(augment.rotation_degrees), 0.0)
    low, high = augment.crop_scale
    side = (low + (high - low) * area).sqrt()
    x, y = ((2 * place - 1) * (1 - side) for place in (left, top))
    sign = torch.where(flipped < augment.flip_p, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([cos * side * sign, -sin * side, cos * x - sin * y], 1),
        torch.stack([sin * side * sign, cos * side, sin * x + cos * y], 1),
    )
    return torch.stack(rows, 1).float()


def _warp(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """Sample (B, C, S, S) bilinearly at (size, size) places; what lies outside of the input picture is 0.

    The grid is computed elementwise: `F.affine_grid` is a matrix product, which TF32 would round to a tenth of a pixel.
    """
    ticks = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    x, y, offset = (theta[:, :, i, None, None] for i in range(3))
    places = x * ticks + y * ticks[:, None] + offset  # (B, 2, size, size)
    # Border padding and a hard edge, because zero padding would already fade the outermost half pixel of an upright picture.
    inside = (places.abs() <= 1).all(1, keepdim=True)
    sampled = F.grid_sample(images, places.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.mul_(inside)


def _recolour(images: Tensor, seeds: Tensor, augment: AugmentConfig) -> None:
    """Grey with some probability, then brightness, contrast, saturation and hue with some probability; in place."""
    draws = keyed_uniform(seeds, stream=_Stream.COLOUR, count=6)
    # A dozen steps per pixel: on a CPU a few pictures at a time, so that they stay in its cache.
    step = max(1, _CACHED // max(1, images[:1].numel())) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        images[part] = _recoloured(images[part], draws[part].unbind(1), augment)


def _recoloured(images: Tensor, draws: Sequence[Tensor], augment: AugmentConfig) -> Tensor:
    grey, jittered = draws[0] < augment.grayscale_p, draws[1] < augment.jitter_p
    if augment.grayscale_p > 0:
        images = torch.where(_column(grey), _grey(images), images)
    if augment.jitter_p == 0:
        return images

    def factor(draw: Tensor, strength: float) -> Tensor:
        low = max(0.0, 1 - strength)
        return _column(torch.where(jittered, low + (1 + strength - low) * draw, 1.0).float())

    if augment.brightness > 0:
        images = (images * factor(draws[2], augment.brightness)).clamp_(0, 1)
    if augment.contrast > 0:
        images = _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor(draws[3], augment.contrast))
    if augment.saturation > 0:
        images = _blend(images, _grey(images), factor(draws[4], augment.saturation))
    if augment.hue > 0:
        turn = torch.where(jittered, (2 * draws[5] - 1) * augment.hue, 0.0).float()
        images = _turn_hue(images, _column(turn))
    return images


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, (B, 1, S, S)."""
    red, green, blue = torch.tensor_split(images, 3, dim=1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def _blend(images: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """``factor`` parts of the picture and ``1 - factor`` of the other one."""
    return torch.lerp(target.expand_as(images), images, factor).clamp_(0, 1)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by shares of the colour circle in [-0.5, 0.5], saturation and value as they are (HSV).

    The way back is the closed form of the hexcone: channel n = value - chroma * clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = torch.tensor_split(images, 3, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    k = hue.add_(6 * turn) + torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = k.remainder_(6.0)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


class _Boxes(NamedTuple):
    """Boxes to erase, each field (B,) int64; a height of 0 where there is none."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def _random_boxes(seeds: Tensor, augment: AugmentConfig, size: int) -> _Boxes:
    """Z. Zhong et al., "Random Erasing Data Augmentation" (AAAI 2020), with the numbers of torchvision's RandomErasing."""
    draws = keyed_uniform(seeds, stream=_Stream.ERASE, count=1 + 4 * _ERASE_TRIES)
    erased = draws[:, 0] < augment.erase_p
    area, ratio, top, left = draws[:, 1:].reshape(-1, 4, _ERASE_TRIES).unbind(1)
    low, high = augment.erase_area
    area = (low + (high - low) * area) * size * size
    low, high = (math.log(r) for r in augment.erase_ratio)
    ratio = (low + (high - low) * ratio).exp()
    height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (height < size) & (width < size)
    first = fits.int().argmax(1, keepdim=True)
    height, width, top, left, fits = (value.gather(1, first)[:, 0] for value in (height, width, top, left, fits))
    height = torch.where(erased & fits, height, 0)
    return _Boxes(*(v.long() for v in (top * (size - height + 1), left * (size - width + 1), height, width)))


def _erase(images: Tensor, seeds: Tensor, augment: AugmentConfig, *, everywhere: bool) -> None:
    """Fill one box of some pictures, in place, with standard normal noise: not bounded to [0, 1], as published.

    Args:
        images: (B, 3, S, S), changed.
        seeds: (B,).
        augment: Probability, area and ratio.
        everywhere: Compute noise for all pixels instead of those erased; the result is the same. An accelerator does
            that sooner than it tells the host how many pixels are erased.
    """
    if augment.erase_p == 0:
        return
    size = images.shape[-1]
    box = _random_boxes(seeds, augment, size)
    ticks = torch.arange(size, device=images.device)
    rows = (ticks >= box.top[:, None]) & (ticks < (box.top + box.height)[:, None])
    columns = (ticks >= box.left[:, None]) & (ticks < (box.left + box.width)[:, None])
    mask = rows[:, :, None] & columns[:, None, :]
    if everywhere:
        places = torch.arange(size * size, device=images.device).repeat(len(images))
        noise = keyed_normal_at(seeds.repeat_interleave(size * size), places, stream=_Stream.NOISE, count=3)
        images.copy_(torch.where(mask[:, None], noise.view(-1, size, size, 3).movedim(3, 1), images))
        return
    sample, y, x = mask.nonzero(as_tuple=True)
    images[sample, :, y, x] = keyed_normal_at(seeds[sample], y * size + x, stream=_Stream.NOISE, count=3)


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None] for values in (tuple(mean), tuple(std)))
    return (images - shift).div_(scale)
