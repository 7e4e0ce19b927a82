"""RAF-DB, basic set: 15,339 faces from the web, each with one of seven expressions that about 40 people agreed on.

The download holds, below ``basic/`` (its readme, version 1.1):

* ``EmoLabel/list_patition_label.txt``, that spelling: ``train_00001.jpg 5``;
* ``Image/original/NAME.jpg``, and ``Image/aligned/NAME_aligned.jpg``, 100 x 100;
* ``Annotation/manual/NAME_manu_attri.txt``: five points, then gender, race and age as numbers;
* ``Annotation/auto/`` with 37 points of another detector, and ``Annotation/boundingbox/``; neither is needed here.

Originals are turned and scaled so that the five points come onto a template, as the published code has it done, but by the annotated
points, not by detected ones: the same for everybody, and no face is missed.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from bench.dataset import DATASETS, EXPRESSIONS, BadPictureError, Box, DatasetOptions, Face, Item, Reading
from bench.prepare.alignment import TEMPLATE_NAME, align_face, template_points
from bench.prepare.pictures import decode_picture, orient_landmarks
from bench.prepare.published import Folds, PublishedDataset, repeated, unsafe_path
from bench.prepare.splits import hash_sources, mixed
from bench.registry import Default

LIST_NAME = "EmoLabel/list_patition_label.txt"
ORIGINAL_LABELS: Mapping[int, str] = {
    1: "surprise",
    2: "fear",
    3: "disgust",
    4: "happiness",
    5: "sadness",
    6: "anger",
    7: "neutral",
}
"""What the numbers of the list mean; from the download's readme."""
PUBLISHED: Mapping[str, tuple[int, ...]] = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
"""Number of pictures per split, in the order of `ORIGINAL_LABELS`."""
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "gender": ("male", "female", "unsure"),
    "race": ("Caucasian", "African-American", "Asian"),
    "age": ("0-3", "4-19", "20-39", "40-69", "70+"),
}
"""Lines 6 to 8 of a manual annotation: what the numbers 0, 1, ... mean, in the readme's words."""
FACE_BOX = np.array([[16.0, 38.5], [96.0, 114.5]])
"""Top left and bottom right corner of the face in the 112 x 112 template: the median extent of the 68 landmarks, from brows to chin, of 572
photographs aligned to it. It is such a box that the landmark networks were trained with."""
OUTSIDE = 0.05
"""How far, as a share of the longer side, an annotated point may lie outside of its picture: a corner of the mouth that is just cut off."""

_FOLDERS = {"original": "Image/original", "aligned": "Image/aligned"}
_MANUAL = "Annotation/manual"
_ARCHIVES = {".zip", ".rar", ".7z", ".tar", ".gz", ".tgz"}


class _Line(NamedTuple):
    """One line of the list."""

    split: str
    name: str
    """``train_00001.jpg``."""
    label: int
    """Position in `EXPRESSIONS`."""


@DATASETS.register(
    "rafdb",
    title="RAF-DB",
    paper="Li, Deng and Du, CVPR 2017, Reliable Crowdsourcing and Deep Locality-Preserving Learning for Expression Recognition "
    "in the Wild; Li and Deng, IEEE TIP 2019",
    year=2017,
    doi="10.1109/CVPR.2017.277",
    url="http://www.whdeng.cn/RAF/model1.html",
    license="For non-commercial research only, on request from its authors; the pictures must not be passed on.",
    defaults=(
        Default(
            "guidance.weight",
            4.0,
            "rafdb",
            "4 fits the published RAF-DB figures: CAM has its accuracy of Table 1 there in the ablation of Belharbi et al., FG 2024",
        ),
    ),
)
class RAFDB(PublishedDataset):
    """The seven basic expressions of RAF-DB."""

    class Options(PublishedDataset.Options):
        """Accepted keys of ``[datasets.rafdb]``."""

        source: Literal["original", "aligned"] = "original"
        """Originals, aligned here to ``size`` x ``size`` by the five annotated points; or the 100 x 100 pictures as shipped."""
        landmarks: Literal["shipped", "face-alignment", "dlib", "none"] = "face-alignment"
        """Where the 68 landmarks come from. ``shipped``, the default with ``folds``: those of the published folds."""

        @model_validator(mode="before")
        @classmethod
        def _folds_bring_landmarks(cls, given: Any) -> Any:
            if isinstance(given, dict) and given.get("folds") and "landmarks" not in given:
                return {**given, "landmarks": "shipped"}
            return given

        @model_validator(mode="after")
        def _landmarks_exist(self) -> RAFDB.Options:
            if self.landmarks == "shipped" and not self.folds:
                raise ValueError(
                    "landmarks = shipped: RAF-DB ships 5 and 37 points, not the 68 that are needed. Use --landmarks face-alignment, dlib "
                    "or none; or --folds DIR, the published folds with their landmarks.txt"
                )
            return self

    options: Options

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options; nothing is read yet."""
        super().__init__(options, raw=raw)
        self._read_folds: Folds | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The seven expressions, in the project's order."""
        return EXPRESSIONS

    def expected(self) -> Mapping[str, Mapping[str, int]]:
        """The published number of pictures, class by class; that of the published folds too."""
        return {split: dict(zip(ORIGINAL_LABELS.values(), counts, strict=True)) for split, counts in PUBLISHED.items()}

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """What the list, or the folds, say. Folders are listed once; no picture is opened.

        Raises:
            FileNotFoundError: a file or folder of the download is not where it belongs; the message says what to do.
            ValueError: the folds cannot be used.
        """
        self._rejected.clear()
        notes: list[str] = []
        labels = {str(number): name for number, name in ORIGINAL_LABELS.items()}
        self._facts = {"original_labels": labels, "source": self.options.source, "notes": notes}
        items_of, names = self._of_folds(notes) if self.options.folds else self._of_list(notes)
        for split, items in items_of.items():
            if not items:
                lost = [line for line in self._rejected if line.split in (split, "?")]
                first = f"; the first of {len(lost)} unusable ones: {lost[0].source}: {lost[0].reason}" if lost else ""
                raise ValueError(f"{self.root}: no picture of split {split!r} can be used{first}")
        self._facts["alignment"] = TEMPLATE_NAME if self._facts["source"] == "original" else None
        if "val" in items_of:
            self._facts["val"] = {"cut_from_train": False, "sources_sha256": hash_sources(items_of["val"])}
            return {split: mixed(items) for split, items in items_of.items()}
        return self._with_val(items_of["train"], items_of["test"], names=names)

    def read(self, item: Item) -> Face:
        """Read one picture upright, aligned if it is an original.

        ``extra`` has gender, race and age in the words of `ATTRIBUTES`, as far as the manual annotation says.

        Raises:
            BadPictureError: not a picture, damaged, empty, or without five usable points.
            OSError: a file cannot be read at all; that says nothing about the picture, so it stops the work.
        """
        image, orientation = decode_picture((self.root / item.source).read_bytes())
        height, width = image.shape[:2]
        path = PurePosixPath(item.source)
        if self.options.folds and item.source in self._ids_of_folds:
            return Face(
                image=image,
                landmarks=self._landmarks_of_folds(item.source, orientation=orientation, width=width, height=height),
                extra=_attributes(self._annotation(path.stem.removesuffix("_aligned"), needed=False)),
            )
        if self.options.source == "aligned":
            lines = self._annotation(path.stem.removesuffix("_aligned"), needed=False)
            # The shipped pictures are cut so close that they are the face's box.
            whole = Box(-0.5, -0.5, width - 0.5, height - 0.5)
            return Face(image=image, landmarks=None, box=whole, extra=_attributes(lines))
        lines = self._annotation(path.stem, needed=True)
        points = orient_landmarks(_five_points(lines), orientation=orientation, width=width, height=height)
        slack = OUTSIDE * max(width, height)
        if (points < -0.5 - slack).any() or (points > np.array([width, height]) - 0.5 + slack).any():
            x, y = points[np.argmax(np.abs(points - np.array([width, height]) / 2).max(axis=1))]
            raise BadPictureError(f"an annotated point, ({x:.1f}, {y:.1f}), lies outside of the {width} x {height} picture")
        try:
            face = align_face(image, points, size=self.options.size)
        except ValueError as error:
            raise BadPictureError(f"cannot be aligned by its five points: {error}") from None
        box = Box(*template_points(self.options.size, FACE_BOX).ravel().tolist())
        return Face(image=face.image, landmarks=None, box=box, extra=_attributes(lines))

    @classmethod
    def reading(cls, options: DatasetOptions, provenance: Mapping[str, Any]) -> Reading:  # noqa: ARG003 - what others need
        """Originals are aligned by their annotated points; the other pictures are taken whole."""
        if provenance.get("alignment") is None:
            return Reading()
        return Reading(aligned=True, needs="the five points that RAF-DB's annotation has of each picture")

    # What the list says

    def _of_list(self, notes: list[str]) -> tuple[dict[str, list[Item]], dict[str, str]]:
        items_of: dict[str, list[Item]] = {"train": [], "test": []}
        return self._released(self._lines(), items_of, notes)

    def _lines(self) -> list[_Line]:
        """The usable lines of the list; the others are rejected."""
        path = self._base / LIST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: it names every picture and its expression.{_hint(path.parent, {path.name})}")
        data = path.read_bytes()
        self._facts["annotation_sha256"] = hashlib.sha256(data).hexdigest()
        parsed: list[tuple[int, str, int]] = []
        for number, raw_line in enumerate(_lines_of(data), start=1):
            if not raw_line.strip():
                continue
            try:
                line = raw_line.decode("utf-8").strip()
            except UnicodeDecodeError:
                self._reject("?", f"{LIST_NAME}: line {number}", f"not UTF-8: {raw_line[:80]!r}")
                continue
            # As shipped: NAME LABEL. Spreadsheets make commas or semicolons of the space, and 5.0 of 5.
            match = re.fullmatch(r"(.*[^\s,;])(?:[ \t]+|[ \t]*[,;][ \t]*)([0-9]{1,9})(?:\.0+)?", line)
            if match and re.search(r"[\s,;][0-9.]+$", match.group(1)):
                self._reject("?", f"{LIST_NAME}: line {number}", f"has more than two columns, NAME LABEL are wanted: {line[:80]!r}")
            elif match:
                parsed.append((number, match.group(1), int(match.group(2))))
            else:
                self._reject("?", f"{LIST_NAME}: line {number}", f"is not NAME LABEL, such as 'train_00001.jpg 5': {line[:80]!r}")
        disagreeing = repeated((name, label) for _, name, label in parsed)
        lines: dict[str, _Line] = {}
        for number, name, label in parsed:
            split = name.partition("_")[0]
            reason = unsafe_path(name)
            if reason is None and ("/" in name or "\\" in name):
                reason = f"a path; the pictures lie directly in {_FOLDERS[self.options.source]}"
            if reason is None and not name.startswith(("train_", "test_")):
                reason = "neither train_... nor test_..., so its split is not known"
            if reason is None and name in disagreeing:
                reason = disagreeing[name]
            if reason is None and label not in ORIGINAL_LABELS:
                reason = f"label {label} in line {number}; labels are 1 to 7"
            if reason is None and name in lines:
                reason = f"listed again in line {number}"
            if reason is None:
                lines[name] = _Line(split, name, EXPRESSIONS.index(ORIGINAL_LABELS[label]))
            else:
                self._reject(split if split in PUBLISHED else "?", name, reason)
        return list(lines.values())

    def _released(
        self, lines: Iterable[_Line], items_of: dict[str, list[Item]], notes: list[str]
    ) -> tuple[dict[str, list[Item]], dict[str, str]]:
        """Items of the pictures of the download that lines name, and source -> name; those that lack a file are rejected."""
        lines = list(lines)
        wanted = {line.name: self._file_of(line.name) for line in lines}
        place = _FOLDERS[self.options.source]
        pictures = self._listing(place, wanted.values())
        annotations = {f"{_stem(name)}_manu_attri.txt" for name in wanted}
        points = _files(self._base / _MANUAL) if self.options.source == "aligned" else self._listing(_MANUAL, annotations)
        names: dict[str, str] = {}
        for line in lines:
            file = wanted[line.name]
            source = f"{self._prefix}{place}/{file}"
            if file not in pictures:
                self._reject(line.split, source, f"no such file in {place}")
            elif self.options.source == "original" and f"{_stem(line.name)}_manu_attri.txt" not in points:
                self._reject(line.split, source, f"no five points: {_MANUAL}/{_stem(line.name)}_manu_attri.txt is missing")
            else:
                items_of[line.split].append(Item(source=source, label=line.label))
                names[source] = line.name
        unlisted = sorted(_printable(name) for name in pictures - set(wanted.values()) if not name.startswith("."))
        if unlisted:
            notes.append(f"{place}: {len(unlisted)} files are not listed and are left out, first: {unlisted[0]}")
        without = len(annotations - points)
        if self.options.source == "aligned" and without:
            notes.append(
                f"{_MANUAL}: {without} of {len(lines)} pictures have no annotation, so their gender, race and age are not recorded"
            )
        return items_of, names

    def _file_of(self, name: str) -> str:
        """The file of a name of the list: train_00001.jpg, or train_00001_aligned.jpg."""
        return name if self.options.source == "original" else f"{_stem(name)}_aligned{PurePosixPath(name).suffix}"

    # What the published folds say

    @property
    def _folds(self) -> Folds:
        if self._read_folds is None:
            self._read_folds = Folds(Path(self.options.folds))
        return self._read_folds

    @cached_property
    def _ids_of_folds(self) -> Mapping[str, str]:
        """Path below the raw folder -> id. The ids begin with ``basic/``, which may be the raw folder itself."""
        ids = [name for labels in self._folds.labels.values() for name in labels]
        return {name if self._prefix else name.removeprefix("basic/"): name for name in ids}

    def _of_folds(self, notes: list[str]) -> tuple[dict[str, list[Item]], dict[str, str]]:
        folds = self._folds
        facts = folds.facts()
        splits = [split for split in folds.labels if split != "val" or not folds.val_is_test]
        items_of: dict[str, list[Item]] = {split: [] for split in splits}
        sources = {name: source for source, name in self._ids_of_folds.items()}
        folders = {str(PurePosixPath(source).parent) for source in sources.values()}
        listings = {folder: _files(self.root / folder) for folder in folders}
        present = {name for name, source in sources.items() if PurePosixPath(source).name in listings[str(PurePosixPath(source).parent)]}
        self._facts["folds"] = {**facts, "pictures_found": bool(present)}
        self._check_landmarks(found_pictures=bool(present), example=next(iter(sources), ""))

        lines: dict[str, _Line] = {}
        ids: dict[str, str] = {}
        for split in splits:
            for name, label in folds.labels[split].items():
                stem = _stem(name).removesuffix("_aligned")
                if stem in ids:
                    self._reject(split, name, f"another id of the folds is the same picture: {ids[stem]}")
                    continue
                ids[stem] = name
                lines[name] = _Line(split, stem, label)
        if present:
            self._facts["source"] = "folds"
            if self.options.landmarks == "shipped" and facts["pictures_without_row"]:
                notes.append(f"folds: {facts['pictures_without_row']} pictures have no row in landmarks.txt, hence no landmarks")
            names: dict[str, str] = {}
            for name, line in lines.items():
                if name in present:
                    items_of[line.split].append(Item(source=sources[name], label=line.label))
                    names[sources[name]] = f"{line.name}.jpg"  # the name in RAF-DB's list: val is the same with and without folds
                else:
                    self._reject(line.split, name, "no such file below the raw folder")
            return items_of, names
        notes.append(
            f"folds: the pictures they name, such as {min(sources, default='none')}, are not here; splits and classes are those of the "
            f"folds, pictures those of source = {self.options.source}"
        )
        ending = "_aligned" if self.options.source == "aligned" else ""
        by_stem = {
            _stem(file).removesuffix(ending): PurePosixPath(file).suffix for file in _files(self._base / _FOLDERS[self.options.source])
        }
        return self._released(
            (line._replace(name=f"{line.name}{by_stem.get(line.name, '.jpg')}") for line in lines.values()), items_of, notes
        )

    def _check_landmarks(self, *, found_pictures: bool, example: str) -> None:
        if self.options.landmarks != "shipped":
            return
        ways = "Go on with --landmarks face-alignment, dlib or none"
        if not self._folds.has_landmarks:
            raise ValueError(f"--folds {self._folds.folder} has no landmarks.txt. {ways}")
        if not found_pictures:
            raise ValueError(
                f"landmarks = shipped: the landmarks of --folds {self._folds.folder} are in pixels of pictures that are not here, such as "
                f"{self.root / example}; they do not fit those of RAF-DB itself. Put the pictures there. {ways}"
            )

    def _landmarks_of_folds(self, source: str, *, orientation: int, width: int, height: int) -> npt.NDArray[np.float64] | None:
        if self.options.landmarks != "shipped":
            return None
        try:
            stored = self._folds.points(self._ids_of_folds[source])
        except ValueError as error:
            raise BadPictureError(str(error)) from None
        if stored is None:
            return None
        points = orient_landmarks(stored, orientation=orientation, width=width, height=height)
        if not ((points >= -0.5) & (points <= np.array([width, height]) - 0.5)).all(axis=1).any():
            raise BadPictureError(f"all landmarks of the folds lie outside of the {width} x {height} picture; are they in its pixels?")
        return points

    # Where things are

    @cached_property
    def _base(self) -> Path:
        """The folder ``basic``."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"--raw {self.root}: no such folder")
        for folder in (self.root / "basic", self.root):
            if any((folder / part).is_dir() for part in ("EmoLabel", "Image", "Annotation")):
                return folder
        deeper = next((path.parent for path in sorted(self.root.glob("*/basic")) if path.is_dir()), None)
        if deeper is not None:
            raise FileNotFoundError(f"--raw {self.root} has no basic/, but {deeper} has. Say --raw {deeper}")
        content = ", ".join(sorted(_printable(path.name) for path in self.root.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"--raw {self.root} has no basic/ (there is: {content}). Expected below it: basic/{LIST_NAME}, "
            f"basic/{_FOLDERS['original']}/*.jpg and basic/{_MANUAL}/*_manu_attri.txt.{_hint(self.root / 'basic', {'EmoLabel'})}"
        )

    @cached_property
    def _prefix(self) -> str:
        """What a path below `_base` begins with, seen from the raw folder."""
        return "" if self._base == self.root else "basic/"

    def _listing(self, place: str, wanted: Iterable[str]) -> frozenset[str]:
        """The files of a folder of the download.

        Raises:
            FileNotFoundError: it has none of those wanted.
        """
        folder, names = self._base / place, frozenset(wanted)
        files = _files(folder)
        if names and not names & files:
            state = f"has none of the {len(names)} files that are listed, such as {min(names)}" if folder.is_dir() else "is missing"
            raise FileNotFoundError(f"{folder} {state}.{_hint(folder, names)}")
        return files

    def _annotation(self, stem: str, *, needed: bool) -> list[str]:
        """The lines of a manual annotation that are not empty."""
        path = self._base / _MANUAL / f"{stem}_manu_attri.txt"
        try:
            text = path.read_bytes().decode("utf-8-sig", errors="replace")
        except FileNotFoundError:
            if needed:
                raise
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]


def _lines_of(data: bytes) -> list[bytes]:
    """Lines of a text file with any line ends, without its byte order mark; UTF-16, which has one, becomes UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def _five_points(lines: Sequence[str]) -> npt.NDArray[np.float64]:
    """(5, 2): the first five lines, each x and y with a tab or blanks between them.

    Raises:
        BadPictureError: there are fewer, or one is not two finite numbers.
    """
    if len(lines) < 5:
        raise BadPictureError(f"its manual annotation has {len(lines)} lines; the first five must be points")
    points = []
    for number, line in enumerate(lines[:5], start=1):
        try:
            values = [float(cell) for cell in line.split()]
        except ValueError:
            values = []
        if len(values) != 2 or not all(map(math.isfinite, values)):
            raise BadPictureError(f"line {number} of its manual annotation is not a point x y: {line[:40]!r}")
        points.append(values)
    return np.array(points)


def _attributes(lines: Sequence[str]) -> dict[str, str]:
    """Gender, race and age in words; what is missing or no known number is left out."""
    return {
        what: words[int(line)]
        for (what, words), line in zip(ATTRIBUTES.items(), lines[5:8], strict=False)
        if re.fullmatch("[0-9]", line) and int(line) < len(words)
    }


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _files(folder: Path) -> frozenset[str]:
    """Names of the files in a folder; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _printable(name: str) -> str:
    """A file name as it can be written anywhere, even if it is not valid UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _hint(folder: Path, wanted: Iterable[str]) -> str:
    """A sentence about what to unpack, or to move up, so that ``folder`` holds what is wanted; empty if nothing is in sight."""
    names = frozenset(wanted)
    for deeper in sorted(path for path in folder.glob("*") if path.is_dir()):
        if names & {path.name for path in deeper.iterdir()}:
            return f" They lie one level deeper: mv {deeper}/* {folder}/"
    for archive in sorted([*folder.parent.glob(f"{folder.name}*"), *folder.glob("*")]):
        if archive.is_file() and archive.suffix.lower() in _ARCHIVES:
            if archive.suffix.lower() == ".zip":
                return f" Unpack it: unzip {archive} -d {folder.parent if _has_top_folder(archive, folder.name) else folder}"
            return f" Unpack {archive} so that {folder / min(names)} is there"
    return ""


def _has_top_folder(archive: Path, name: str) -> bool:
    """Whether a zip file's content lies in a folder of this name."""
    try:
        with zipfile.ZipFile(archive) as file:
            return all(entry.startswith(f"{name}/") for entry in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
