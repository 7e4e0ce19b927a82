"""Explain single pictures with a finished training: prediction, the maps of every method that can read it, and where they look."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bench import __version__
from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import action_unit_maps, expression_ids
from bench.config import EvaluationConfig
from bench.data.index import INDEX_NAME, load_index
from bench.data.samples import decode_jpeg
from bench.data.transforms import eval_images, eval_landmarks
from bench.dataset import BadPictureError, Face, Frame
from bench.evaluation.maps import check_finite, map_cosines, min_max, read_maps, upsample
from bench.io import write_bytes_atomic, write_json_atomic
from bench.matrix import Training
from bench.method import METHODS, Method, Output
from bench.prepare.alignment import align_face, carry_over
from bench.prepare.landmark_table import LandmarkTable
from bench.prepare.landmarks import WEIGHTS, describe_source, open_landmarker
from bench.prepare.preparation import DEFAULT, Preparation, preparation_of, read_face, store_face
from bench.registry import did_you_mean
from bench.reporting.pictures.gallery import overlay
from bench.sweep.record import parse_record
from bench.sweep.restore import Restored, restore
from bench.sweep.store import RECORD
from bench.training.trainer import TRAINED

BATCH = 16
REPORT = "explanation.json"
NOT_FINITE = "the map holds NaN or infinite values"

Prepared = Literal["aligned", "letterboxed"]
Points = npt.NDArray[np.float64]

_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One picture to explain."""

    path: Path
    name: str
    """Of its folder in the output; no other picture has it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Face:
    source: Source
    image: npt.NDArray[np.uint8]
    """(S, S, 3), S = the size of the training's stored pictures."""
    landmarks: Points | None
    """(68, 2) in pixels of ``image``."""
    prepared: Prepared
    deviation: str | None
    """In what it is prepared otherwise than the training's pictures; None: in nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What was found about one picture."""

    source: Source
    facts: dict[str, Any]
    """Its entry in the report, JSON-able."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A picture that cannot be explained."""

    path: Path
    reason: str


def open_training(folder: Path) -> Restored:
    """The network of a training's folder, or of a cell's: its training lies in the same results folder. A file stands for its folder.

    Raises:
        FileNotFoundError: no finished training is there.
        ValueError: see `bench.sweep.restore.restore`, or a record that cannot be read.
    """
    if folder.is_file():
        place = next((parent for parent in folder.resolve().parents if any((parent / name).is_file() for name in (RECORD, TRAINED))), None)
        if place is None:
            raise FileNotFoundError(f"{folder} is a file, and in no training's folder: give the folder <results>/trainings/<hash>")
        folder = place
    if not (folder / RECORD).is_file():
        return restore(folder)
    try:
        record = parse_record((folder / RECORD).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is not a readable record: {error}") from error
    cells = next((parent for parent in folder.resolve().parents if parent.name == "cells"), None)
    if cells is None:
        raise FileNotFoundError(f"{folder} lies in no results folder, so its training is not known: give <results>/trainings/<hash>")
    return restore(cells.parent / "trainings" / record.training_key[:16])


def with_preparation(restored: Restored, data: Path) -> Restored:
    """Say how the pictures of an older training were prepared, whose folder does not, by the index of its data.

    Args:
        restored: the network.
        data: the prepared dataset, or the folder of several.

    Raises:
        FileNotFoundError: the dataset of the training is not there.
    """
    if restored.preparation is not None:
        return restored
    dataset = restored.training.dataset
    places = [data, *sorted(data.glob(f"{glob.escape(dataset.name)}*"))]
    for place in places:
        if (place / INDEX_NAME).is_file() and (index := load_index(place)).fingerprint == dataset.fingerprint:
            return dataclasses.replace(restored, preparation=preparation_of(index))
    raise FileNotFoundError(f"--data {data}: the dataset {dataset.name!r} of the training, {dataset.fingerprint[:10]}, is not there")


def choose_readers(training: Training, names: Sequence[str] = ()) -> dict[str, Method]:
    """The methods that can read a training, with their default options; the one that trained it with its own.

    Args:
        training: what is to be read.
        names: keep these only; none = all.

    Raises:
        ValueError: a name that is no such method.
    """
    entries = {
        entry.name: entry
        for entry in METHODS
        if training.trains_as in (entry.name, entry.info.trains_as) and training.variant in entry.info.variants
    }
    for name in names:
        if name not in entries:
            raise ValueError(f"--methods {name}: it cannot read a training of {training.trains_as}.{did_you_mean(name, entries)}")
    options = {training.trains_as: training.method_options}
    return {
        name: entry.target(entry.target.Options.model_validate(options.get(name, {})), variant=training.variant)
        for name, entry in entries.items()
        if not names or name in names
    }


def find_pictures(paths: Iterable[Path]) -> tuple[list[Source], list[Failed]]:
    """Files as they are given, and all pictures below folders, by the ending of their names; and what is neither."""
    endings = Image.registered_extensions()
    found: dict[Path, str] = {}
    failed = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file() and not p.name.startswith("."))
            found |= {p: "_".join(p.relative_to(path).with_suffix("").parts) for p in below if p not in found}
            if not below:
                failed.append(Failed(path=path, reason="no picture is in this folder"))
        elif path.exists():
            found.setdefault(path, path.stem)
        else:
            failed.append(Failed(path=path, reason="no such file or folder"))
    used: set[str] = set()
    sources = []
    for path, wanted in found.items():
        base = _file_name(wanted)
        name = next(n for n in itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2))) if n.lower() not in used)
        used.add(name.lower())
        sources.append(Source(path=path, name=name))
    return sources, failed


class LandmarkSource:
    """Where the landmarks of pictures come from: a file, a network that finds them, or nowhere."""

    def __init__(self, source: str, *, weights: Path | None = None) -> None:
        """``source``: ``none``, ``face-alignment``, ``dlib`` or the path of a ``landmarks.csv``; ``weights``: see `describe_source`.

        Raises:
            ValueError: the file is none of landmarks, or what finds them cannot be used here.
            FileNotFoundError: no such file.
        """
        self.finds = source in WEIGHTS
        """Whether a face is searched for: then the picture may be a whole photograph."""
        self._table: LandmarkTable | None = None
        if self.finds or source == "none":
            self.facts = describe_source(source, weights=weights)
        elif Path(source).is_file():
            self._table = LandmarkTable(Path(source))
            self.facts = {"name": "file", "sha256": self._table.sha256}
        else:
            raise FileNotFoundError(f"--landmarks {source}: no such file; give FILE.csv, {', '.join(WEIGHTS)} or none")
        self._finder = open_landmarker(source, weights=weights) if self.finds else None

    def face(self, path: Path, *, frame: Frame) -> Face:
        """The upright picture of a file with its landmarks, as far as they are known.

        A table's rows are looked up by the path relative to the table, and by the bare name; ``frame`` says what pixels they count.

        Raises:
            BadPictureError: no picture; a face was searched for, and not found; or the row cannot be used.
            OSError: the file cannot be read.
        """
        face = read_face(path.read_bytes(), self._row(path), frame=frame)
        if self._finder is None:
            return face
        (points,) = self._finder.find([face.image], [None])
        if points is None:
            raise BadPictureError("no face was found in it; with --landmarks none the picture itself is taken as a face")
        return dataclasses.replace(face, landmarks=points)

    def _row(self, path: Path) -> Points | None:
        if self._table is None:
            return None
        names = [path.name]
        with contextlib.suppress(ValueError):
            names.insert(0, path.resolve().relative_to(self._table.path.resolve().parent).as_posix())
        try:
            return next((self._table.points(name) for name in names if name in self._table), None)
        except ValueError as error:
            raise BadPictureError(str(error)) from error


def five_points(landmarks: Points) -> Points:
    """The points of `bench.prepare.alignment.TEMPLATE` from the 68 of iBUG: middle of each eye, tip of the nose, corners of the mouth."""
    return np.stack([landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0), landmarks[30], landmarks[48], landmarks[54]])


def prepare_face(source: Source, landmarks: LandmarkSource, *, preparation: Preparation | None, align: bool | None) -> _Face:
    """Read a picture and bring its face to the stored pixels, as `bench.prepare.pack` does with the training's pictures.

    Args:
        source: the picture.
        landmarks: where they come from.
        preparation: of the training's pictures; None where it is not known: then the default options are assumed.
        align: where there are landmarks, turn, scale and cut by them; else the whole picture is kept, with black borders. None: as the
            training's pictures were; where that is not known, align where the face is searched for.

    Raises:
        BadPictureError: it is no picture, or its landmarks cannot be used.
        OSError: it cannot be read.
    """
    how = preparation or DEFAULT
    face = landmarks.face(source.path, frame=how.landmark_frame)
    if align is None:
        align = landmarks.finds if preparation is None else preparation.aligned
    prepared: Prepared = "letterboxed"
    if align and face.landmarks is not None:
        try:
            aligned = align_face(face.image, five_points(face.landmarks), size=how.size)
        except ValueError as error:
            raise BadPictureError(f"cannot be aligned by its landmarks: {error}") from error
        face = Face(image=aligned.image, landmarks=carry_over(face.landmarks, aligned.matrix))
        prepared = "aligned"
    stored = store_face(face, size=how.size, quality=how.quality)
    image = decode_jpeg(stored.jpg).permute(1, 2, 0).numpy()
    deviation = _deviation(preparation, prepared=prepared)
    return _Face(source=source, image=image, landmarks=stored.landmarks, prepared=prepared, deviation=deviation)


def _deviation(preparation: Preparation | None, *, prepared: Prepared) -> str | None:
    """In what a picture is prepared otherwise than those of the training, in words; None: in nothing."""
    if preparation is None:
        return (
            f"how the training's pictures were prepared is not known; assumed: {DEFAULT.size} x {DEFAULT.size} pixels, "
            f"JPEG quality {DEFAULT.quality}, {prepared}"
        )
    if preparation.needs:
        return f"the training's pictures ({preparation.entry}) are prepared with {preparation.needs}; this one is {prepared} without"
    if (prepared == "aligned") != preparation.aligned:
        return f"the training's pictures are {'aligned' if preparation.aligned else 'letterboxed'}; this one is {prepared}"
    return None


def explain(
    sources: Sequence[Source],
    restored: Restored,
    *,
    methods: Mapping[str, Method],
    classes: Sequence[str] = (),
    landmarks: LandmarkSource,
    align: bool | None,
    device: torch.device,
    out: Path,
    failed: Sequence[Failed] = (),
) -> Iterator[Explained | Failed]:
    """Explain pictures one after the other, and write what is seen: ``<out>/<name>/*.png``, and at the end ``<out>/explanation.json``.

    Where no picture can be explained, nothing is written.

    Args:
        sources: the pictures.
        restored: the network.
        methods: name -> read-out.
        classes: those whose maps are wanted beside that of the predicted class.
        landmarks: where they come from.
        align: see `prepare_face`.
        device: to compute on.
        out: a folder that is empty, or is not there yet.
        failed: what could not be explained before, for the report.

    Yields:
        Each picture when it is done.

    Raises:
        ValueError: a class that the network does not know, or a folder that holds something: nothing is overwritten.
    """
    for name in classes:
        if name not in restored.classes:
            raise ValueError(f"--class {name}: this network does not know it.{did_you_mean(name, restored.classes)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already and is not an empty folder; nothing is overwritten: choose another")
    network = _Network(restored, methods, device)
    wanted = [restored.classes.index(name) for name in classes]
    done: list[Explained] = []
    lost = list(failed)
    for start in range(0, len(sources), BATCH):
        faces: list[_Face] = []
        for source in sources[start : start + BATCH]:
            try:
                faces.append(prepare_face(source, landmarks, preparation=restored.preparation, align=align))
            except (BadPictureError, OSError) as error:
                lost.append(Failed(path=source.path, reason=str(error)))
                yield lost[-1]
        for explained in network.explain(faces, wanted, out=out) if faces else ():
            done.append(explained)
            yield explained
    if not done:
        return
    training = restored.training
    report = {
        "bench": __version__,
        "training": training.key,
        "trained": {
            "method": training.trains_as,
            "variant": training.variant,
            "guidance": training.guidance,
            "backbone": training.backbone,
            "dataset": training.dataset.name,
            "seed": training.seed,
            "image_size": training.settings["images"]["size"],
        },
        "classes": list(restored.classes),
        "methods": {name: method.options.model_dump(mode="json") for name, method in methods.items()},
        "landmarks": landmarks.facts,
        "preparation": None if restored.preparation is None else restored.preparation.model_dump(mode="json"),
        "au_maps": network.au_variant,
        "pictures": [explained.facts for explained in done],
        "failed": [{"picture": str(failure.path), "reason": failure.reason} for failure in lost],
    }
    write_json_atomic(out / REPORT, report)


class _Network:
    """A classifier with its read-outs."""

    def __init__(self, restored: Restored, methods: Mapping[str, Method], device: torch.device) -> None:
        self.classes = restored.classes
        self.classifier = restored.classifier.to(device)
        self.methods = methods
        self.device = device
        self.size = int(restored.training.settings["images"]["size"])
        self.au_variant = EvaluationConfig().au_maps

    def explain(self, faces: Sequence[_Face], wanted: Sequence[int], *, out: Path) -> Iterator[Explained]:
        """Each of some faces, its maps for the predicted class and for those ``wanted``."""
        stored = torch.from_numpy(np.stack([face.image for face in faces])).permute(0, 3, 1, 2).to(self.device)
        backbone = self.classifier.backbone
        images = eval_images(stored, size=self.size, mean=backbone.mean, std=backbone.std)
        graph = any(method.needs_grad for method in self.methods.values())
        with contextlib.nullcontext() if graph else torch.inference_mode():
            output = self.classifier(images)
            output.images = images
            check_finite(output.logits, label=", ".join(str(face.source.path) for face in faces))
            predicted = output.logits.argmax(dim=1)
            # Class of each face, method -> maps, AU maps; the predicted class first.
            looks = [self._look(output, faces, predicted)]
            looks += [self._look(output, faces, torch.full_like(predicted, label)) for label in wanted]
        shares = output.logits.detach().double().softmax(dim=1).tolist()
        for i, face in enumerate(faces):
            seen: dict[int, _Look] = {}
            for look in looks:
                seen.setdefault(int(look.labels[i]), look)
            yield self._write(face, i, seen, shares[i], out=out)

    def _look(self, output: Output, faces: Sequence[_Face], labels: Tensor) -> _Look:
        missing = np.full((68, 2), np.nan)
        points = torch.from_numpy(np.stack([missing if face.landmarks is None else face.landmarks for face in faces])).float()
        points = eval_landmarks(points.to(self.device), stored=len(faces[0].image), size=REFERENCE_FRAME)
        expressions = expression_ids(self.classes).to(self.device)[labels]
        au = action_unit_maps(points, expressions, frame=REFERENCE_FRAME, size=self.size, variant=self.au_variant)
        return _Look(
            labels=labels,
            maps={name: read_maps(method, self.classifier, output, labels) for name, method in self.methods.items()},
            au_maps=au.maps,
            au_valid=au.valid,
        )

    def _write(self, face: _Face, i: int, looks: Mapping[int, _Look], shares: Sequence[float], *, out: Path) -> Explained:
        folder = out / face.source.name
        folder.mkdir(parents=True)
        side = len(face.image)
        picture = Image.fromarray(face.image)
        _write_png(folder / "face.png", picture)
        maps: list[dict[str, Any]] = []
        for label, look in looks.items():
            name = self.classes[label]
            stem = f"{label}-{_file_name(name)}"
            au_map = look.au_maps[i : i + 1] if look.au_valid[i] else None
            if au_map is not None:
                _write_png(folder / f"{stem}-au-map.png", overlay(picture, upsample(au_map, size=side)[0].cpu().numpy()))
            for method, raw in look.maps.items():
                if not bool(raw[i].isfinite().all()):
                    maps.append({"class": name, "method": method, "file": None, "error": NOT_FINITE})
                    continue
                file = f"{stem}-{method}.png"
                shown = upsample(min_max(raw[i : i + 1]), size=side)[0].cpu().numpy()
                _write_png(folder / file, overlay(picture, shown))
                cosine = None if au_map is None else float(map_cosines(raw[i : i + 1], au_map))
                maps.append({"class": name, "method": method, "file": file, **_statistics(raw[i], shown), "au_cosine": cosine})
        prediction = max(range(len(shares)), key=shares.__getitem__)
        return Explained(
            source=face.source,
            facts={
                "picture": str(face.source.path),
                "folder": face.source.name,
                "face": face.prepared,
                "as_trained": face.deviation is None,
                "deviation": face.deviation,
                "landmarks": face.landmarks is not None,
                "prediction": self.classes[prediction],
                "probabilities": dict(zip(self.classes, shares, strict=True)),
                "maps": maps,
            },
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """The maps of one class of each face of a batch."""

    labels: Tensor
    """(B,)."""
    maps: Mapping[str, Tensor]
    """Method -> (B, h, w), raw."""
    au_maps: Tensor
    """(B, size, size)."""
    au_valid: Tensor
    """(B,) bool."""


def _statistics(raw: Tensor, shown: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Range of the raw map; of the map as shown, the place of its maximum and its size above one half."""
    low, high, mean = (float(value) for value in (raw.min(), raw.max(), raw.mean()))
    row, column = np.unravel_index(int(shown.argmax()), shown.shape)
    return {
        "grid": list(raw.shape),
        "minimum": low,
        "maximum": high,
        "mean": mean if math.isfinite(mean) else None,  # of values whose sum is too large
        "constant": low == high,
        "peak": [int(column), int(row)],
        "share_above_half": float((shown > 0.5).mean()),
    }


def _file_name(text: str) -> str:
    """Letters and digits of any alphabet; no leading dot, and nothing that a file system takes for more than a name."""
    return re.sub(r"[^\w.-]+", "_", text)[:_LONGEST_NAME].lstrip(".") or "picture"


def _write_png(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())
