"""A picture of maps: one face per expression, its AU map, and the map of every method, without and with guidance."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bench.au.maps import action_unit_maps, expression_ids
from bench.data.batch import RawBatch, Reader
from bench.evaluation.maps import enlarged, stored_au_maps
from bench.evaluation.parts import combine, convert
from bench.evaluation.read_out import forward, grad_mode, network_input, read_out
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
class ExpressionFaces:
    """The faces of a gallery, one for each expression."""

    names: tuple[str, ...]
    batch: RawBatch


def choose_faces(reader: Reader, *, skip: int = 0) -> ExpressionFaces:
    """The first sample of each expression that has an AU map, after ``skip`` of them.

    Raises:
        ValueError: no class of the dataset is an expression with a usable face.
    """
    ids = expression_ids(reader.classes)
    left = {label: skip for label in range(len(reader.classes)) if ids[label] > 0}
    chosen: dict[int, RawBatch] = {}
    for raw in reader.eval_batches(rank=0, world_size=1, batch_size=64):
        _, valid = action_unit_maps(raw.landmarks, ids[raw.labels], frame=raw.images.shape[-1], size=28, variant="symmetric")
        for i in valid.nonzero().flatten().tolist():
            label = int(raw.labels[i])
            if label not in chosen and left[label] == 0:
                chosen[label] = convert(raw, operator.itemgetter(slice(i, i + 1)))
            left[label] = max(0, left[label] - 1)
        if len(chosen) == len(left):
            break
    if not chosen:
        raise ValueError("no face with an AU map: none of the classes is an expression, or no face has landmarks")
    labels = sorted(chosen)
    batch = combine([chosen[label] for label in labels], lambda tensors: torch.cat(list(tensors)))
    return ExpressionFaces(names=tuple(reader.classes[label] for label in labels), batch=batch)


def draw_gallery(plan: Plan, faces: ExpressionFaces, reader: Reader, *, fingerprint: str, seed: int, cell: int = 72) -> Image.Image:
    """Rows: the face, its AU map, one row a method. Columns: each expression, without and with guidance.

    Maps are of the true class, min-max scaled, laid over the face as heat. Cells of trainings that are not finished stay blank.

    Args:
        plan: the trainings.
        faces: see `choose_faces`.
        reader: of the split that the faces are from.
        fingerprint: of the dataset.
        seed: of the trainings.
        cell: side of one picture of the sheet, in pixels.

    Raises:
        ValueError: no training of the plan is finished.
    """
    cells = [c for c in plan.matrix.cells if c.training.dataset.fingerprint == fingerprint and c.training.seed == seed]
    store = Store(plan.settings.config.run.results)
    maps = _maps(cells, faces.batch, store, num_classes=len(reader.classes))
    if not maps:
        raise ValueError(f"nothing is trained for this data with seed {seed} in {store.root}; run bench run first")
    batch, variant = faces.batch, plan.settings.config.evaluation.au_maps
    size, expressions = batch.images.shape[-1], expression_ids(reader.classes)[batch.labels]
    au_maps = stored_au_maps(batch.landmarks, expressions, stored=size, size=size, variant=variant).maps.numpy()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch.images]
    rows = sorted({(c.method, c.training.backbone) for c in cells}, key=lambda row: (table_order(row[0]), row[1]))

    width, step = 2 * cell + 3 * _GAP, cell + _GAP
    sheet = Image.new("RGB", (_LABEL + len(faces.names) * width, _HEADING + (2 + len(rows)) * step), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    titles = ["face", "AU map", *(METHODS.get(method).info.title for method, _ in rows)]
    for number, title in enumerate(titles):
        draw.text((4, _HEADING + number * step + cell // 2 - 8), title, "black", font=font)
    for column, name in enumerate(faces.names):
        left, picture = _LABEL + column * width, pictures[column]
        draw.text((left, 2), name, "black", font=font)
        for half, guidance in enumerate(GUIDANCE):
            x = left + half * step
            draw.text((x, 18), GUIDANCE_TITLES[guidance], "dimgray", font=font)
            heats = [au_maps, *(maps.get((method, backbone, guidance)) for method, backbone in rows)]
            tiles = [picture, *(None if heat is None else overlay(picture, heat[column]) for heat in heats)]
            for row, tile in enumerate(tiles):
                if tile is not None:
                    sheet.paste(tile.resize((cell, cell), Image.Resampling.BICUBIC), (x, _HEADING + row * step))
    return sheet


def overlay(picture: Image.Image, heat: Grey) -> Image.Image:
    """Lay a map in [0, 1] over a picture: cold is transparent, hot is opaque from dark red to yellow."""
    strength = Image.fromarray((heat * 255).clip(0, 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = ImageOps.colorize(strength, black="#30007a", mid="#e0004d", white="#ffe600")
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.composite(colours, grey, strength.point(lambda value: 40 + value * 0.65))


def _maps(cells: Sequence[Cell], batch: RawBatch, store: Store, *, num_classes: int) -> dict[tuple[str, str, str], Grey]:
    """(method, backbone, guidance) -> maps (B, S, S) of the true classes, for the cells whose trainings are finished."""
    maps: dict[tuple[str, str, str], Grey] = {}
    for training in {c.training.key: c.training for c in cells}.values():
        if not store.is_trained(training):
            continue
        classifier = load_trained(training, store.training_folder(training), num_classes=num_classes)
        readers = {cell.method: build_reader(cell) for cell in cells if cell.training.key == training.key}
        with grad_mode(readers.values()):
            output = forward(classifier, network_input(classifier, batch.images, size=training.settings["images"]["size"]))
            for name, method in readers.items():
                shown = enlarged(read_out(method, classifier, output, batch.labels), size=batch.images.shape[-1])
                maps[name, training.backbone, training.guidance] = shown.numpy()
    return maps
