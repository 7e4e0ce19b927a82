"""A contact sheet: what is really in the shards, as a person sees it. One row per class; face, landmarks, AU map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from bench.data.index import load_index
from bench.data.stored import StoredSample, read_sample
from bench.registry import did_you_mean

_LABEL_WIDTH = 110
_GAP = 4
_HEADING = 22


def contact_sheet(folder: Path, *, split: str = "train", per_class: int = 3, cell: int = 128) -> Image.Image:
    """Draw samples of every class, each as the stored picture, with its landmarks, and with the AU map of its class.

    Samples are spread evenly over the class, the same ones every time.

    Args:
        folder: a prepared dataset.
        split: which split of it.
        per_class: samples per row; fewer where the class has fewer.
        cell: side of a drawn picture in pixels.

    Returns:
        An RGB picture. Samples without landmarks and classes without action units say so instead of showing a map.

    Raises:
        FileNotFoundError: no prepared dataset.
        ValueError: unknown split, or a sample that cannot be read (see ``bench data verify``).
    """
    index = load_index(folder)
    if split not in index.splits:
        raise ValueError(f"{folder} has no split {split!r}.{did_you_mean(split, index.splits)}")
    located = [(shard, member) for shard in index.splits[split].shards for member in shard.members]
    font = ImageFont.load_default(13)
    width = _LABEL_WIDTH + per_class * (3 * cell + 3 * _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEADING + len(index.classes) * (cell + _GAP) + _GAP), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 4), f"{index.name}, {split}: {len(located)} pictures, {index.image_size} x {index.image_size}", (0, 0, 0), font=font)
    for label, name in enumerate(index.classes):
        top = _HEADING + label * (cell + _GAP)
        of_class = [(shard, member) for shard, member in located if member.label == label]
        draw.text((6, top + cell // 2 - 16), f"{name}\n{len(of_class)}", (0, 0, 0), font=font)
        count = min(per_class, len(of_class))
        chosen = [of_class[i] for i in np.linspace(0, len(of_class) - 1, count).round().astype(int)] if count else []
        samples = [read_sample(folder, shard, member) for shard, member in chosen]
        maps = _au_maps(samples, name, size=index.image_size)
        for column, (sample, au_map) in enumerate(zip(samples, maps, strict=True)):
            left = _LABEL_WIDTH + column * (3 * cell + 3 * _GAP)
            for place, picture in enumerate(_views(sample, au_map, cell=cell, font=font)):
                sheet.paste(picture, (left + place * (cell + _GAP // 2), top))
    return sheet


def _au_maps(samples: Sequence[StoredSample], class_name: str, *, size: int) -> list[npt.NDArray[np.float32] | None]:
    import torch  # only here: listing and checking data must not wait for torch

    from bench.au import action_unit_maps, expression_ids

    if not samples:
        return []
    missing = np.full((68, 2), np.nan)
    points = np.stack([missing if sample.landmarks is None else sample.landmarks for sample in samples])
    ids = expression_ids([class_name]).expand(len(samples))
    maps, valid = action_unit_maps(torch.from_numpy(points).float(), ids, frame=size, size=size)
    return [m.numpy() if ok else None for m, ok in zip(maps, valid.tolist(), strict=True)]


def _views(
    sample: StoredSample, au_map: npt.NDArray[np.float32] | None, *, cell: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> tuple[Image.Image, Image.Image, Image.Image]:
    face = sample.image.resize((cell, cell), Image.Resampling.LANCZOS)
    marked = face.copy()
    draw = ImageDraw.Draw(marked)
    if sample.landmarks is None:
        draw.text((4, 4), "no landmarks", (255, 80, 80), font=font)
    else:
        for x, y in (sample.landmarks + 0.5) * (cell / sample.image.width) - 0.5:
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(60, 255, 60))
    if au_map is None:
        blank = Image.blend(face, Image.new("RGB", face.size, (250, 250, 250)), 0.7)
        ImageDraw.Draw(blank).text((4, 4), "no AU map", (90, 90, 90), font=font)
        return face, marked, blank
    strength = Image.fromarray((au_map * 170).clip(0, 255).astype(np.uint8)).resize((cell, cell), Image.Resampling.BILINEAR)
    return face, marked, Image.composite(Image.new("RGB", face.size, (255, 40, 0)), face, strength)
