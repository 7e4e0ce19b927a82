"""Explain single pictures with a finished training: the prediction, and the map of every method that can read the training."""

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
from bench.au.maps import expression_ids
from bench.config import EvaluationConfig
from bench.data.index import INDEX_NAME, load_index
from bench.data.samples import decode_jpeg
from bench.dataset import BadPictureError, Face, Frame
from bench.evaluation.maps import enlarged, map_cosines, stored_au_maps, upsample
from bench.evaluation.read_out import forward, grad_mode, network_input, read_out
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
AU_VARIANT = EvaluationConfig().au_maps
"""Geometry of the AU maps."""

Prepared = Literal["aligned", "letterboxed"]
Points = npt.NDArray[np.float64]

_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PictureFile:
    """One picture to explain."""

    path: Path
    name: str
    """Name of its folder in the output; unique."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreparedFace:
    """The face of a picture, prepared as the training's pictures were."""

    file: PictureFile
    image: npt.NDArray[np.uint8]
    """(S, S, 3), S = the size of the training's stored pictures."""
    landmarks: Points | None
    """(68, 2) in pixels of ``image``."""
    prepared: Prepared
    deviation: str | None
    """How its preparation differs from that of the training's pictures; None: it does not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The results for one picture."""

    file: PictureFile
    facts: dict[str, Any]
    """Its entry in the report, JSON-able."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A picture that cannot be explained."""

    path: Path
    reason: str


def open_training(folder: Path) -> Restored:
    """Load the network of a training.

    Args:
        folder: of a training, or of a cell; the training of a cell lies in the same results folder. A file stands for its folder.

    Raises:
        FileNotFoundError: no finished training is there.
        ValueError: see `bench.sweep.restore.restore`, or a record that cannot be read.
    """
    if folder.is_file():
        parents = folder.resolve().parents
        enclosing = next((parent for parent in parents if (parent / RECORD).is_file() or (parent / TRAINED).is_file()), None)
        if enclosing is None:
            raise FileNotFoundError(f"{folder} is a file outside of any training: give the folder <results>/trainings/<hash>")
        folder = enclosing
    if not (folder / RECORD).is_file():
        return restore(folder)
    try:
        record = parse_record((folder / RECORD).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is not a readable record: {error}") from error
    cells = next((parent for parent in folder.resolve().parents if parent.name == "cells"), None)
    if cells is None:
        raise FileNotFoundError(f"{folder} is a cell outside of a results folder, without its training: give <results>/trainings/<hash>")
    return restore(cells.parent / "trainings" / record.training_key[:16])


def with_preparation(restored: Restored, data: Path | None) -> Restored:
    """Add how the training's pictures were prepared, from the index of its data. Trainings of newer versions know it already.

    Args:
        restored: the network.
        data: the prepared dataset, or the folder of several. None: look in ``data``, and leave it unknown if it is not there.

    Raises:
        FileNotFoundError: ``data`` does not hold the dataset of the training.
    """
    if restored.preparation is not None:
        return restored
    dataset, folder = restored.training.dataset, data or Path("data")
    for candidate in (folder, *sorted(folder.glob(f"{glob.escape(dataset.name)}*"))):
        if (candidate / INDEX_NAME).is_file() and (index := load_index(candidate)).fingerprint == dataset.fingerprint:
            return dataclasses.replace(restored, preparation=preparation_of(index))
    if data is None:
        return restored
    raise FileNotFoundError(
        f"--data {data} does not hold the dataset of the training: {dataset.name!r} with the fingerprint {dataset.fingerprint[:10]}"
    )


def choose_readers(training: Training, names: Sequence[str] = ()) -> dict[str, Method]:
    """The methods that can read a training. The method that trained it has the options of the training, the rest their defaults.

    Args:
        training: what the methods read.
        names: keep only these; empty = all.

    Raises:
        ValueError: a name is no method that can read the training.
    """
    entries = {
        entry.name: entry
        for entry in METHODS
        if training.trains_as in (entry.name, entry.info.trains_as) and training.variant in entry.info.variants
    }
    for name in names:
        if name not in entries:
            raise ValueError(f"--methods {name}: this method cannot read a training of {training.trains_as}.{did_you_mean(name, entries)}")
    options = {training.trains_as: training.method_options}
    return {
        name: entry.target(entry.target.Options.model_validate(options.get(name, {})), variant=training.variant)
        for name, entry in entries.items()
        if not names or name in names
    }


def find_pictures(paths: Iterable[Path]) -> tuple[list[PictureFile], list[Failed]]:
    """The files given, and all files below the folders given whose names end as pictures do; and the paths that are neither."""
    endings = Image.registered_extensions()
    names: dict[Path, str] = {}
    failed = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file() and not p.name.startswith("."))
            names |= {p: "_".join(p.relative_to(path).with_suffix("").parts) for p in below if p not in names}
            if not below:
                failed.append(Failed(path=path, reason="no picture is in this folder"))
        elif path.exists():
            names.setdefault(path, path.stem)
        else:
            failed.append(Failed(path=path, reason="no such file or folder"))
    used: set[str] = set()
    files = []
    for path, wanted in names.items():
        base = _file_name(wanted)
        candidates = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate.lower() not in used)
        used.add(name.lower())
        files.append(PictureFile(path=path, name=name))
    return files, failed


class LandmarkSource:
    """Where the landmarks of pictures come from: a file, a face detector, or nowhere."""

    def __init__(self, source: str, *, weights: Path | None = None) -> None:
        """Open the source.

        Args:
            source: ``none``, ``face-alignment``, ``dlib`` or the path of a ``landmarks.csv``.
            weights: see `describe_source`.

        Raises:
            ValueError: the file does not hold landmarks, or the detector cannot be used here.
            FileNotFoundError: no such file.
        """
        self.finds = source in WEIGHTS
        """Whether a face is searched for, so that the picture may be a whole photograph."""
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
        """The upright picture of a file, with its landmarks if they are known.

        Args:
            path: of the picture. A table knows it by its path relative to the table, or by its bare name.
            frame: the pixels that the coordinates of a table refer to.

        Raises:
            BadPictureError: the file is no picture, the detector finds no face in it, or its row of the table cannot be used.
            OSError: the file cannot be read.
        """
        face = read_face(path.read_bytes(), self._row(path), frame=frame)
        if self._finder is None:
            return face
        (points,) = self._finder.find([face.image], [None])
        if points is None:
            raise BadPictureError("no face was found in it; with --landmarks none the whole picture is taken as a face")
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


def prepare_face(file: PictureFile, landmarks: LandmarkSource, *, preparation: Preparation | None, align: bool | None) -> PreparedFace:
    """Read a picture and prepare its face, as `bench.prepare.pack` does with the training's pictures.

    Args:
        file: the picture.
        landmarks: their source.
        preparation: of the training's pictures. None: not known; the default options are assumed.
        align: True: turn, scale and cut the face by its landmarks, if it has any. False: keep the whole picture, with black borders.
            None: as the training's pictures were; where that is not known, align if the face is searched for.

    Raises:
        BadPictureError: the file is no picture, or its landmarks cannot be used.
        OSError: the file cannot be read.
    """
    options = preparation or DEFAULT
    face = landmarks.face(file.path, frame=options.landmark_frame)
    if align is None:
        align = landmarks.finds if preparation is None else preparation.aligned
    prepared: Prepared = "letterboxed"
    if align and face.landmarks is not None:
        try:
            aligned = align_face(face.image, five_points(face.landmarks), size=options.size)
        except ValueError as error:
            raise BadPictureError(f"cannot be aligned by its landmarks: {error}") from error
        face = Face(image=aligned.image, landmarks=carry_over(face.landmarks, aligned.matrix))
        prepared = "aligned"
    stored = store_face(face, size=options.size, quality=options.quality)
    image = decode_jpeg(stored.jpg).permute(1, 2, 0).numpy()
    deviation = _deviation(preparation, prepared=prepared)
    return PreparedFace(file=file, image=image, landmarks=stored.landmarks, prepared=prepared, deviation=deviation)


def _deviation(preparation: Preparation | None, *, prepared: Prepared) -> str | None:
    """How the preparation of a picture differs from that of the training's pictures, in words; None: it does not."""
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
    files: Sequence[PictureFile],
    restored: Restored,
    *,
    methods: Mapping[str, Method],
    classes: Sequence[str] = (),
    landmarks: LandmarkSource,
    align: bool | None,
    device: torch.device,
    out: Path,
    failed: Sequence[Failed] = (),
) -> Iterator[Explanation | Failed]:
    """Explain pictures one after the other. Writes ``<out>/<name>/*.png`` for each, and at the end ``<out>/explanation.json``.

    Where no picture can be explained, nothing is written.

    Args:
        files: the pictures.
        restored: the network.
        methods: name -> read-out.
        classes: classes whose maps are drawn besides that of the predicted class.
        landmarks: their source.
        align: see `prepare_face`.
        device: to compute on.
        out: a folder that is empty or does not exist yet.
        failed: pictures that have failed before, for the report.

    Yields:
        Each picture when it is done.

    Raises:
        ValueError: a class that the network does not know, or an output folder that is not empty.
    """
    for name in classes:
        if name not in restored.classes:
            raise ValueError(f"--class {name}: this network does not know this class.{did_you_mean(name, restored.classes)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder; nothing is overwritten: choose another folder")
    network = _Network(restored, methods, device)
    labels = [restored.classes.index(name) for name in classes]
    explanations: list[Explanation] = []
    failures = list(failed)
    for start in range(0, len(files), BATCH):
        faces: list[PreparedFace] = []
        for file in files[start : start + BATCH]:
            try:
                faces.append(prepare_face(file, landmarks, preparation=restored.preparation, align=align))
            except (BadPictureError, OSError) as error:
                failures.append(Failed(path=file.path, reason=str(error)))
                yield failures[-1]
        for explanation in network.explain(faces, labels, out=out) if faces else ():
            explanations.append(explanation)
            yield explanation
    if explanations:
        results = {
            "pictures": [explanation.facts for explanation in explanations],
            "failed": [{"picture": str(failure.path), "reason": failure.reason} for failure in failures],
        }
        write_json_atomic(out / REPORT, _header(restored, methods, landmarks) | results)


def _header(restored: Restored, methods: Mapping[str, Method], landmarks: LandmarkSource) -> dict[str, Any]:
    """The part of the report that all pictures share."""
    training = restored.training
    return {
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
        "au_maps": AU_VARIANT,
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ClassMaps:
    """The maps of one class for each face of a batch.

    Shapes: ``labels`` (B,); ``maps``: method -> (B, h, w), raw; ``au_maps`` (B, size, size); ``au_valid`` (B,) bool.
    """

    labels: Tensor
    maps: Mapping[str, Tensor]
    au_maps: Tensor
    au_valid: Tensor


class _Network:
    """A classifier with its read-outs."""

    def __init__(self, restored: Restored, methods: Mapping[str, Method], device: torch.device) -> None:
        self.classes = restored.classes
        self.classifier = restored.classifier.to(device)
        self.methods = methods
        self.device = device
        self.size = int(restored.training.settings["images"]["size"])

    def explain(self, faces: Sequence[PreparedFace], labels: Sequence[int], *, out: Path) -> Iterator[Explanation]:
        """Draw and describe each face: its maps for the predicted class, and for the classes of these ``labels``."""
        stored = torch.from_numpy(np.stack([face.image for face in faces])).permute(0, 3, 1, 2).to(self.device)
        with grad_mode(self.methods.values()):
            images = network_input(self.classifier, stored, size=self.size)
            output = forward(self.classifier, images, label=", ".join(str(face.file.path) for face in faces))
            predicted = output.logits.argmax(dim=1)
            columns = [predicted, *(torch.full_like(predicted, label) for label in labels)]
            class_maps = [self._read_out(output, faces, column) for column in columns]
        probabilities = output.logits.detach().double().softmax(dim=1).tolist()
        for i, face in enumerate(faces):
            maps_of: dict[int, _ClassMaps] = {}
            for maps in class_maps:
                maps_of.setdefault(int(maps.labels[i]), maps)
            yield Explanation(file=face.file, facts=self._facts(face, probabilities[i], self._draw(face, i, maps_of, out / face.file.name)))

    def _read_out(self, output: Output, faces: Sequence[PreparedFace], labels: Tensor) -> _ClassMaps:
        missing = np.full((68, 2), np.nan)
        points = torch.from_numpy(np.stack([missing if face.landmarks is None else face.landmarks for face in faces])).float()
        expressions = expression_ids(self.classes).to(self.device)[labels]
        stored = len(faces[0].image)
        au = stored_au_maps(points.to(self.device), expressions, stored=stored, size=self.size, variant=AU_VARIANT)
        maps = {name: read_out(method, self.classifier, output, labels) for name, method in self.methods.items()}
        return _ClassMaps(labels=labels, maps=maps, au_maps=au.maps, au_valid=au.valid)

    def _draw(self, face: PreparedFace, i: int, class_maps: Mapping[int, _ClassMaps], folder: Path) -> list[dict[str, Any]]:
        """Write the pictures of the face at place ``i`` of its batch; returns the report's entry of each map."""
        folder.mkdir(parents=True)
        side = len(face.image)
        picture = Image.fromarray(face.image)
        _write_png(folder / "face.png", picture)
        entries: list[dict[str, Any]] = []
        for label, of_class in class_maps.items():
            name = self.classes[label]
            stem = f"{label}-{_file_name(name)}"
            au_map = of_class.au_maps[i : i + 1] if of_class.au_valid[i] else None
            if au_map is not None:
                _write_png(folder / f"{stem}-au-map.png", overlay(picture, upsample(au_map, size=side)[0].cpu().numpy()))
            for method, maps in of_class.maps.items():
                raw = maps[i : i + 1]
                if not bool(raw.isfinite().all()):
                    entries.append({"class": name, "method": method, "file": None, "error": NOT_FINITE})
                    continue
                file = f"{stem}-{method}.png"
                shown = enlarged(raw, size=side)[0].cpu().numpy()
                _write_png(folder / file, overlay(picture, shown))
                cosine = None if au_map is None else float(map_cosines(raw, au_map))
                entries.append({"class": name, "method": method, "file": file, **_statistics(raw[0], shown), "au_cosine": cosine})
        return entries

    def _facts(self, face: PreparedFace, probabilities: Sequence[float], maps: list[dict[str, Any]]) -> dict[str, Any]:
        """The report's entry of a picture."""
        return {
            "picture": str(face.file.path),
            "folder": face.file.name,
            "face": face.prepared,
            "as_trained": face.deviation is None,
            "deviation": face.deviation,
            "landmarks": face.landmarks is not None,
            "prediction": self.classes[probabilities.index(max(probabilities))],
            "probabilities": dict(zip(self.classes, probabilities, strict=True)),
            "maps": maps,
        }


def _statistics(raw: Tensor, shown: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Range and mean of the raw map (h, w); of the map as shown (S, S), the place of its maximum and the share above one half."""
    low, high, mean = (float(value) for value in (raw.min(), raw.max(), raw.mean()))
    row, column = np.unravel_index(int(shown.argmax()), shown.shape)
    return {
        "grid": list(raw.shape),
        "minimum": low,
        "maximum": high,
        "mean": mean if math.isfinite(mean) else None,  # the sum of large values may overflow
        "constant": low == high,
        "peak": [int(column), int(row)],
        "share_above_half": float((shown > 0.5).mean()),
    }


def _file_name(text: str) -> str:
    """A safe file name: letters, digits, ``_``, ``.`` and ``-`` only, no leading dot."""
    return re.sub(r"[^\w.-]+", "_", text)[:_LONGEST_NAME].lstrip(".") or "picture"


def _write_png(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())
