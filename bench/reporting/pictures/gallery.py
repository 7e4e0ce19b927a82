"""A picture of maps: one face per expression, its AU map, and the map of every method, without and with guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import action_unit_maps, expression_ids
from bench.data.batch import RawBatch, Reader
from bench.data.transforms import eval_images, eval_landmarks
from bench.evaluation.maps import min_max, read_maps, upsample
from bench.matrix import Cell
from bench.method import METHODS
from bench.reporting.tables.leaderboard import GUIDANCE, GUIDANCE_TITLES, table_order
from bench.sweep.plan import Plan
from bench.sweep.store import Store
from bench.training.build import build_reader
from bench.training.trainer import load_trained

Grey = npt.NDArray[np.float32]

_LABEL = 92
_GAP = 3
_HEADING = 36


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faces:
    """The faces shown, one per expression."""

    names: tuple[str, ...]
    batch: RawBatch


def choose_faces(reader: Reader, *, skip: int = 0) -> Faces:
    """The first sample of each expression that has an AU map, after ``skip`` of them.

    Raises:
        ValueError: no class of the dataset is an expression with a usable face.
    """
    ids = expression_ids(reader.classes)
    left = {label: skip for label in range(len(reader.classes)) if ids[label] > 0}
    found: dict[int, RawBatch] = {}
    for raw in reader.eval_batches(rank=0, world_size=1, batch_size=64):
        _, valid = action_unit_maps(raw.landmarks, ids[raw.labels], frame=raw.images.shape[-1], size=28, variant="symmetric")
        for i in valid.nonzero().flatten().tolist():
            label = int(raw.labels[i])
            if label not in found and left[label] == 0:
                found[label] = RawBatch(**{f.name: getattr(raw, f.name)[i : i + 1] for f in dataclasses.fields(raw)})
            left[label] = max(0, left[label] - 1)
        if len(found) == len(left):
            break
    if not found:
        raise ValueError("no face with an AU map: none of the classes is an expression, or no face has landmarks")
    labels = sorted(found)
    parts = [found[label] for label in labels]
    batch = RawBatch(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(RawBatch)})
    return Faces(names=tuple(reader.classes[label] for label in labels), batch=batch)


def draw_gallery(plan: Plan, faces: Faces, reader: Reader, *, fingerprint: str, seed: int, cell: int = 72) -> Image.Image:
    """Rows: the face, its AU map, one row a method. Columns: each expression, without and with guidance.

    Maps are of the true class, min-max scaled, laid over the face as heat. Trainings that are not finished are left blank.

    Args:
        plan: whose trainings are shown.
        faces: of `choose_faces`.
        reader: of the split they are from.
        fingerprint: of the dataset.
        seed: of the trainings.
        cell: side of a picture of the sheet, in pixels.

    Raises:
        ValueError: nothing of the plan is trained yet.
    """
    cells = [c for c in plan.matrix.cells if c.training.dataset.fingerprint == fingerprint and c.training.seed == seed]
    store = Store(plan.settings.config.run.results)
    maps = _maps(cells, faces, reader, store)
    if not maps:
        raise ValueError(f"nothing is trained yet for this data, seed {seed}, in {store.root}; first: bench run")
    rows = sorted({(c.method, c.training.backbone) for c in cells}, key=lambda row: (table_order(row[0]), row[1]))
    size = faces.batch.images.shape[-1]
    landmarks = eval_landmarks(faces.batch.landmarks, stored=size, size=REFERENCE_FRAME)
    ids = expression_ids(reader.classes)[faces.batch.labels]
    au = action_unit_maps(landmarks, ids, frame=REFERENCE_FRAME, size=size, variant=plan.settings.config.evaluation.au_maps).maps.numpy()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in faces.batch.images]

    pair = 2 * cell + _GAP
    sheet = Image.new("RGB", (_LABEL + len(faces.names) * (pair + 2 * _GAP), _HEADING + (2 + len(rows)) * (cell + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    titles = ["face", "AU map", *(METHODS.get(method).info.title for method, _ in rows)]
    for number, title in enumerate(titles):
        draw.text((4, _HEADING + number * (cell + _GAP) + cell // 2 - 8), title, "black", font=font)
    for column, name in enumerate(faces.names):
        left = _LABEL + column * (pair + 2 * _GAP)
        draw.text((left, 2), name, "black", font=font)
        for half, guidance in enumerate(GUIDANCE):
            x = left + half * (cell + _GAP)
            draw.text((x, 18), GUIDANCE_TITLES[guidance], "dimgray", font=font)
            tiles: list[Image.Image | None] = [pictures[column], overlay(pictures[column], au[column])]
            tiles += [overlay(pictures[column], maps[m, b, guidance][column]) if (m, b, guidance) in maps else None for m, b in rows]
            for row, tile in enumerate(tiles):
                if tile is not None:
                    sheet.paste(tile.resize((cell, cell), Image.Resampling.BICUBIC), (x, _HEADING + row * (cell + _GAP)))
    return sheet


def overlay(picture: Image.Image, heat: Grey) -> Image.Image:
    """Lay a map in [0, 1] over a picture: cold is transparent, hot is opaque from dark red to yellow."""
    strength = Image.fromarray((heat * 255).clip(0, 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = ImageOps.colorize(strength, black="#30007a", mid="#e0004d", white="#ffe600")
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.composite(colours, grey, strength.point(lambda value: 40 + value * 0.65))


def _maps(cells: Sequence[Cell], faces: Faces, reader: Reader, store: Store) -> dict[tuple[str, str, str], Grey]:
    maps: dict[tuple[str, str, str], Grey] = {}
    for training in {c.training.key: c.training for c in cells}.values():
        if not store.is_trained(training):
            continue
        classifier = load_trained(training, store.training_folder(training), num_classes=len(reader.classes))
        backbone = classifier.backbone
        images = eval_images(faces.batch.images, size=training.settings["images"]["size"], mean=backbone.mean, std=backbone.std)
        output = classifier(images)
        output.images = images
        for cell in cells:
            if cell.training.key == training.key:
                raw = read_maps(build_reader(cell), classifier, output, faces.batch.labels)
                shown = upsample(min_max(raw), size=faces.batch.images.shape[-1])
                maps[cell.method, training.backbone, training.guidance] = shown.numpy()
    return maps
