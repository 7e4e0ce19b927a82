"""AffectNet, the manually annotated part, as its authors hand it out: in the newer layout of ``.npy`` files, or the older one of CSV files.

``npy``: face crops in ``train_set/images/ID.jpg`` and ``val_set/images/ID.jpg``; beside them in ``annotations/``: ``ID_exp.npy`` (the
expression), ``ID_lnd.npy`` (68 landmarks in pixels of the crop), ``ID_val.npy`` and ``ID_aro.npy`` (valence, arousal).

``csv``: whole pictures in ``Manually_Annotated_Images/``, ``training.csv`` and ``validation.csv`` with the face box, landmarks in pixels of
the whole picture, expression, valence and arousal. The face box is cut out just as it is given, clipped to the picture: that is what the
other layout ships too.

The public release has no test set: its validation set is the test split here, and val is cut from train.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import posixpath
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bench.dataset import DATASETS, EXPRESSIONS, BadPictureError, Box, DatasetOptions, Face, Item, Reading
from bench.prepare.pictures import decode_picture, orient_landmarks
from bench.prepare.plausibility import is_one_place
from bench.prepare.published import Folds, PublishedDataset, unsafe_path
from bench.registry import Default

ORIGINAL = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt", "none", "uncertain", "no-face")
"""What the numbers 0 to 10 of the annotation mean."""

CSV_COLUMNS = (
    "subDirectory_filePath",
    "face_x",
    "face_y",
    "face_width",
    "face_height",
    "facial_landmarks",
    "expression",
    "valence",
    "arousal",
)
"""Columns of the CSV files, in the published order."""

_LAYOUTS = (
    "The npy layout has train_set/images, train_set/annotations, val_set/images and val_set/annotations; the csv layout has training.csv, "
    "validation.csv and Manually_Annotated_Images"
)
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})

Reject = Callable[[str, str, str], None]
"""Takes (split, source, reason)."""


class Release(ABC):
    """One of the two layouts below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    @abstractmethod
    def lacking(root: Path) -> list[str]:
        """What of the layout is not below ``root``."""

    @abstractmethod
    def pictures(self, split: str, *, keep: Container[int], reject: Reject, notes: list[str]) -> Iterator[tuple[str, int]]:
        """Every picture of a split that can be used, as (source, original label), each source once.

        Args:
            split: ``train`` or ``test``.
            keep: original labels that are wanted; pictures of the others are yielded unchecked, to be counted.
            reject: told about every line or file that cannot be used.
            notes: gets sentences about what is odd but harms nothing.
        """

    @abstractmethod
    def sources(self, split: str) -> Iterator[str]:
        """The names of the pictures of a split, without a look at their labels."""

    @abstractmethod
    def covers(self, source: str) -> bool:
        """Whether the source lies where the pictures of this layout are."""

    @abstractmethod
    def face(self, source: str, *, landmarks: bool) -> Face:
        """Read a face with valence and arousal and, if asked for, its landmarks.

        Raises:
            BadPictureError: the picture, or what is said about it, cannot be used.
        """

    @abstractmethod
    def affect(self, source: str) -> dict[str, float]:
        """``valence`` and ``arousal`` of a picture, as far as they are known.

        Raises:
            BadPictureError: they are no numbers.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON-able facts for the index. Called after `pictures`."""


class NpyRelease(Release):
    """``train_set/`` and ``val_set/`` with ``images/`` and ``annotations/``."""

    FOLDERS: Mapping[str, str] = {"train": "train_set", "test": "val_set"}
    _KINDS: Mapping[str, int] = {"_exp.npy": 1, "_lnd.npy": 2, "_val.npy": 4, "_aro.npy": 8}
    _USED = 16

    @staticmethod
    def lacking(root: Path) -> list[str]:
        """See `Release.lacking`."""
        wanted = [f"{folder}/{part}" for folder in NpyRelease.FOLDERS.values() for part in ("images", "annotations")]
        return [path for path in wanted if not (root / path).is_dir()]

    def pictures(self, split: str, *, keep: Container[int], reject: Reject, notes: list[str]) -> Iterator[tuple[str, int]]:
        """See `Release.pictures`. Both folders are listed once; of every picture only ``_exp.npy`` is opened."""
        folder = self.FOLDERS[split]
        annotations = self.root / folder / "annotations"
        have = self._annotated(annotations, notes, f"{folder}/annotations")
        lacking = dict.fromkeys((kind for kind in self._KINDS if kind != "_exp.npy"), 0)
        place = os.open(annotations, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in self._names(split, reject):
                source, stem = f"{folder}/images/{name}", _stem(name)
                mask = have.get(stem, 0)
                if mask & self._USED:
                    reject(split, source, f"another picture has the id {stem!r} too, and is used")
                    continue
                have[stem] = mask | self._USED
                if not mask & self._KINDS["_exp.npy"]:
                    reject(split, source, f"no annotation: {stem}_exp.npy is not in {folder}/annotations")
                    continue
                try:
                    label = _expression(_small_file(f"{stem}_exp.npy", place))
                except ValueError as error:
                    reject(split, source, f"{stem}_exp.npy: {error}")
                    continue
                if label in keep:
                    for kind in lacking:
                        lacking[kind] += not mask & self._KINDS[kind]
                yield source, label
        finally:
            os.close(place)
        for kind, what in (("_lnd.npy", "landmarks"), ("_val.npy", "valence"), ("_aro.npy", "arousal")):
            if lacking[kind]:
                notes.append(f"{folder}: {lacking[kind]} pictures have no {kind}, hence no {what}")
        for stem in sorted(stem for stem, mask in have.items() if not mask & self._USED):
            kind = next(kind for kind, bit in self._KINDS.items() if have[stem] & bit)
            reject(
                split,
                f"{folder}/annotations/{_printable(stem + kind)}",
                f"no picture: nothing called {_printable(stem)} in {folder}/images",
            )

    def sources(self, split: str) -> Iterator[str]:
        """See `Release.sources`."""
        yield from (f"{self.FOLDERS[split]}/images/{name}" for name in self._names(split, lambda *_: None))

    def covers(self, source: str) -> bool:
        """See `Release.covers`."""
        folder, _, rest = source.partition("/")
        return folder in self.FOLDERS.values() and rest.startswith("images/") and rest.count("/") == 1

    def face(self, source: str, *, landmarks: bool) -> Face:
        """See `Release.face`. A missing ``_lnd.npy`` means no landmarks."""
        points: npt.NDArray[np.float64] | None = None
        path = self._beside(source, "_lnd.npy")
        if landmarks and path.is_file():
            try:
                values = _load(path.read_bytes())
                # Most files hold x0, y0, x1, y1, ...; two rows of 68 can only be all x, then all y.
                points = _landmarks((values.T if values.shape == (2, 68) else values).reshape(-1))
            except ValueError as error:
                raise BadPictureError(f"{path.name}: {error}") from error
        return _whole(self.root / source, points, self.affect(source))

    def affect(self, source: str) -> dict[str, float]:
        """See `Release.affect`. A missing file means that it is not known."""
        values: dict[str, float] = {}
        for name, kind in (("valence", "_val.npy"), ("arousal", "_aro.npy")):
            path = self._beside(source, kind)
            if path.is_file():
                try:
                    value = float(_one(_load(path.read_bytes())))
                except ValueError as error:
                    raise BadPictureError(f"{path.name}: {error}") from error
                if -1 <= value <= 1:  # -2 says "not known"
                    values[name] = value
        return values

    def facts(self) -> dict[str, Any]:
        """See `Release.facts`."""
        return {"distribution": "npy"}

    def _beside(self, source: str, kind: str) -> Path:
        folder, _, name = source.split("/", 2)
        return self.root / folder / "annotations" / f"{_stem(name)}{kind}"

    def _annotated(self, annotations: Path, notes: list[str], where: str) -> dict[str, int]:
        """Id -> which files there are about it, as a sum of `_KINDS`: a million names are not kept."""
        have: dict[str, int] = {}
        strays = 0
        with os.scandir(annotations) as entries:
            for entry in entries:
                bit = self._KINDS.get(entry.name[-8:])
                if bit:
                    stem = entry.name[:-8]
                    have[stem] = have.get(stem, 0) | bit
                else:
                    strays += not entry.name.startswith(".")
        if strays:
            notes.append(f"{where}: {strays} files are called neither {', '.join(f'ID{kind}' for kind in self._KINDS)}; not read")
        return have

    def _names(self, split: str, reject: Reject) -> list[str]:
        """Names of the pictures, sorted, those that end in .jpg first: of two with one id, it is the release's own that is used."""
        names: list[str] = []
        where = f"{self.FOLDERS[split]}/images"
        with os.scandir(self.root / where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_file():
                    what = "a folder" if entry.is_dir() else "a link to nothing" if entry.is_symlink() else "no regular file"
                    reject(split, f"{where}/{_printable(entry.name)}", f"{what}, not a picture")
                elif _printable(entry.name) != entry.name:
                    reject(split, f"{where}/{_printable(entry.name)}", "the file name is not valid UTF-8; rename the file")
                else:
                    names.append(entry.name)
        names.sort()
        names.sort(key=lambda name: not name.endswith(".jpg"))
        return names


class Table:
    """One of the CSV files: streamed for a list, read row by row at offsets for the pictures.

    What a worker keeps of a row is 24 bytes (hash of the path, its place, offset of the line), never its text.
    """

    def __init__(self, root: Path, relative: str) -> None:
        """Read the first line.

        Raises:
            ValueError: it is neither a header with all columns nor a row of as many cells as the published one.
        """
        self.relative = relative
        self.path = root / relative
        self.sha256 = ""
        """Of the file; known after `rows` has come to its end."""
        self._index: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
        with self.path.open("rb") as file:
            try:
                first = _cells(file.readline())
            except ValueError as error:
                raise ValueError(f"{self.path}: line 1: {error}") from None
        names = [cell.strip().lower() for cell in first]
        self.has_header = CSV_COLUMNS[0].lower() in names or "expression" in names
        missing = [column for column in CSV_COLUMNS if column.lower() not in names]
        if self.has_header and missing:
            raise ValueError(f"{self.path}: line 1 lacks the column {missing[0]!r}. The columns are {', '.join(CSV_COLUMNS)}")
        if not self.has_header and len(first) != len(CSV_COLUMNS):
            raise ValueError(
                f"{self.path}: line 1 has {len(first)} cells and is no header. The columns are {', '.join(CSV_COLUMNS)}; a file without "
                "header must have just these"
            )
        self._width = len(first)
        self._at = {column: names.index(column.lower()) if self.has_header else i for i, column in enumerate(CSV_COLUMNS)}

    def rows(self) -> Iterator[tuple[int, list[str] | str]]:
        """Every row as (line number, cells in the order of `CSV_COLUMNS`), or, in place of the cells, why it cannot be read.

        A row is one line: a quote that is never closed costs its own row, not all that follow.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if (number == 1 and self.has_header) or not line.strip():
                    continue
                try:
                    yield number, self._ordered(line)
                except ValueError as error:
                    yield number, str(error)
        self.sha256 = digest.hexdigest()

    def find(self, path: str) -> tuple[int, list[str]] | None:
        """Return the first usable row about a picture, as (line number, cells in the order of `CSV_COLUMNS`), if there is one."""
        if self._index is None:
            self._index = self._locate()
        hashes, lines, offsets = self._index
        wanted = hash(path)
        with self.path.open("rb") as file:
            for i in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
                if hashes[i] != wanted:
                    return None
                file.seek(offsets[lines[i]])
                try:
                    cells = self._ordered(file.readline())
                    _label(cells[6])
                except ValueError:  # reported, and not used
                    continue
                if _tidy(cells[0]) == path:
                    return int(lines[i]) + 1, cells
        return None

    def _locate(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        # Python's own hash of a text: quick, and different in every process, which is where the index lives and dies.
        column = self._at[CSV_COLUMNS[0]]
        hashes, offsets = array("q"), array("q")
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                try:  # the 136 numbers of a row are left alone where no quote asks for more care
                    path = _cells(line)[column] if b'"' in line else line.removeprefix(_BOM).split(b",", column + 1)[column].decode()
                    path = _tidy(path)
                except (ValueError, IndexError):  # reported by `rows`
                    path = ""
                hashes.append(hash(path))
                offsets.append(offset)
                offset += len(line)
        numbers = np.frombuffer(hashes, np.int64)
        order = np.argsort(numbers, kind="stable")
        return numbers[order], order, np.frombuffer(offsets, np.int64)

    def _ordered(self, line: bytes) -> list[str]:
        cells = _cells(line)
        if len(cells) != self._width:
            raise ValueError(f"{len(cells)} cells, {self._width} are needed; a path with a comma must be in quotes")
        return [cells[at].strip() for at in self._at.values()]


class CsvRelease(Release):
    """``training.csv`` and ``validation.csv``, and the whole pictures they speak of."""

    FILES: Mapping[str, str] = {"train": "training.csv", "test": "validation.csv"}
    _LISTS = (".", "Manually_Annotated_file_lists", "Manually_Annotated", "Manually_Annotated/Manually_Annotated_file_lists")
    _IMAGES = ("Manually_Annotated_Images", "Manually_Annotated/Manually_Annotated_Images")

    def __init__(self, root: Path) -> None:
        """Find the files; `lacking` has said that they are there."""
        super().__init__(root)
        self.images = next(place for place in self._IMAGES if (root / place).is_dir())
        self.tables = {split: Table(root, self._list(root, name) or name) for split, name in self.FILES.items()}

    @staticmethod
    def lacking(root: Path) -> list[str]:
        """See `Release.lacking`."""
        lists = [name for name in CsvRelease.FILES.values() if CsvRelease._list(root, name) is None]
        return lists + ([] if any((root / place).is_dir() for place in CsvRelease._IMAGES) else [CsvRelease._IMAGES[0]])

    @staticmethod
    def _list(root: Path, name: str) -> str | None:
        paths = (posixpath.normpath(f"{place}/{name}") for place in CsvRelease._LISTS)
        return next((path for path in paths if (root / path).is_file()), None)

    def pictures(self, split: str, *, keep: Container[int], reject: Reject, notes: list[str]) -> Iterator[tuple[str, int]]:  # noqa: ARG002
        """See `Release.pictures`. Rows are checked for their path and expression; what else they say is checked in `face`."""
        table = self.tables[split]
        seen: dict[str, int] = {}  # source -> line * 16 + label, one number to spare memory
        again: dict[str, list[tuple[int, int]]] = {}
        for number, cells in table.rows():
            where = f"{table.relative}: line {number}"
            if isinstance(cells, str):
                reject(split, where, cells)
                continue
            unsafe = unsafe_path(cells[0])
            if unsafe:
                reject(split, where, f"{cells[0]!r}: {unsafe}")
                continue
            source = f"{self.images}/{_tidy(cells[0])}"
            try:
                label = _label(cells[6])
            except ValueError as error:
                reject(split, source, f"{where}: {error}")
                continue
            if source in seen:
                again.setdefault(source, [divmod(seen[source], 16)]).append((number, label))
            else:
                seen[source] = number * 16 + label
        for source, lines in again.items():
            labels = sorted({label for _, label in lines})
            if not any(label in keep for label in labels):
                continue
            if len(labels) > 1:
                del seen[source]
            for number, label in lines[len(labels) == 1 :]:
                reject(
                    split,
                    source,
                    f"{table.relative}: line {number}: listed again; line {lines[0][0]} is used"
                    if len(labels) == 1
                    else f"{table.relative}: line {number} says {label}, but the lines about it differ: {', '.join(map(str, labels))}",
                )
        for source, packed in seen.items():
            if packed % 16 in keep and not _is_file(f"{self.root}/{source}"):
                reject(split, source, f"{table.relative}: line {packed // 16}: no such file")
            else:
                yield source, packed % 16

    def sources(self, split: str) -> Iterator[str]:
        """See `Release.sources`."""
        for _, cells in self.tables[split].rows():
            if not isinstance(cells, str) and not unsafe_path(cells[0]):
                yield f"{self.images}/{_tidy(cells[0])}"

    def covers(self, source: str) -> bool:
        """See `Release.covers`."""
        return source.startswith(f"{self.images}/")

    def face(self, source: str, *, landmarks: bool) -> Face:
        """See `Release.face`. The picture is the face box of the row."""
        row = self._row(source)
        if row is None:
            raise BadPictureError(f"no line of {' or '.join(table.relative for table in self.tables.values())} is about it")
        where, cells = row
        try:
            x, y, width, height = (float(cell) for cell in cells[1:5])
        except ValueError:
            raise BadPictureError(f"{where}: the face box {' '.join(cells[1:5])!r} is not four numbers") from None
        if not (math.isfinite(x) and math.isfinite(y) and 0 < width < math.inf and 0 < height < math.inf):
            raise BadPictureError(f"{where}: the face box {' '.join(cells[1:5])!r} has no area")
        points: npt.NDArray[np.float64] | None = None
        if landmarks:
            try:
                points = _landmarks(np.array([float(cell) for cell in cells[5].split(";")]))
            except ValueError as error:
                raise BadPictureError(f"{where}: facial_landmarks: {error}") from error
        extra = self._affect(where, cells)
        image, orientation = decode_picture((self.root / source).read_bytes())
        # Pixels lie at integers, so the box begins half a pixel before its first one.
        corners = np.array([[x, y], [x + width, y + height]]) - 0.5
        corners = _upright(corners, image, orientation) + 0.5
        size = np.array([image.shape[1], image.shape[0]])
        left, top = np.clip(np.floor(corners.min(0)), 0, size).astype(int).tolist()
        right, bottom = np.clip(np.ceil(corners.max(0)), 0, size).astype(int).tolist()
        if left >= right or top >= bottom:
            raise BadPictureError(f"{where}: the face box {' '.join(cells[1:5])!r} is outside of the {size[0]} x {size[1]} picture")
        if points is not None:
            points = _upright(points, image, orientation) - np.array([left, top])
        return _face(image[top:bottom, left:right].copy(), points, extra)

    def affect(self, source: str) -> dict[str, float]:
        """See `Release.affect`."""
        row = self._row(source)
        return self._affect(*row) if row else {}

    def facts(self) -> dict[str, Any]:
        """See `Release.facts`."""
        tables = {table.relative: {"sha256": table.sha256, "header": table.has_header} for table in self.tables.values() if table.sha256}
        return {"distribution": "csv", "lists": tables}

    def _row(self, source: str) -> tuple[str, list[str]] | None:
        for split in ("test", "train"):  # a picture that both list is in test
            table = self.tables[split]
            row = table.find(source.removeprefix(f"{self.images}/"))
            if row is not None:
                return f"{table.relative}: line {row[0]}", row[1]
        return None

    @staticmethod
    def _affect(where: str, cells: Sequence[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, cell in (("valence", cells[7]), ("arousal", cells[8])):
            try:
                value = float(cell)
            except ValueError:
                raise BadPictureError(f"{where}: {name} {cell!r} is not a number") from None
            if -1 <= value <= 1:  # -2 says "not known"
                values[name] = value
        return values


_PAPER = (
    "Mollahosseini, Hasani and Mahoor, IEEE TAC 2019, "
    "AffectNet: A Database for Facial Expression, Valence, and Arousal Computing in the Wild"
)
_LICENSE = "For research only, on request to the authors; the pictures, and anything made of them, must not be passed on."
_WEIGHT = "published command for AffectNet"


@DATASETS.register(
    "affectnet",
    title="AffectNet-7",
    paper=_PAPER,
    year=2019,
    doi="10.1109/TAFFC.2017.2740923",
    url="http://mohammadmahoor.com/affectnet/",
    license=_LICENSE,
    defaults=(Default("guidance.weight", 9.0, "affectnet", _WEIGHT),),
)
class AffectNet(PublishedDataset):
    """The seven expressions; contempt and what is no expression are left out, and counted."""

    class Options(PublishedDataset.Options):
        """Options of ``affectnet`` and ``affectnet8``."""

        distribution: Literal["auto", "npy", "csv"] = "auto"
        """Layout of the download; ``auto`` looks which of the two is there."""

    options: Options

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options; nothing is read yet."""
        super().__init__(options, raw=raw)
        self._opened: Release | None = None
        self._read_folds: Folds | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The seven expressions, in the project's order."""
        return EXPRESSIONS

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """List every picture, and cut val off train.

        Raises:
            ValueError: neither layout is there, or both; a split without any usable picture.
        """
        self._rejected.clear()
        self._facts.clear()
        self._facts["original_labels"] = {str(i): name for i, name in enumerate(ORIGINAL) if name in self.classes}
        self._facts["notes"] = notes = list[str]()
        return self._of_folds(notes) if self.options.folds else self._of_release(notes)

    def read(self, item: Item) -> Face:
        """Read one face.

        Raises:
            BadPictureError: the picture, its annotation, or its row cannot be used.
            OSError: a file cannot be read at all; that says nothing about the picture, so it stops the work.
        """
        shipped = self.options.landmarks == "shipped"
        folds = self._folds() if self.options.folds else None
        release = self._release(required=folds is None)
        known = release if release is not None and release.covers(item.source) else None
        # The published landmarks are in pixels of the very files that the folds name; pictures found by their name have the release's.
        if folds is not None and folds.has_landmarks and any(item.source in names for names in folds.labels.values()):
            try:
                points = folds.points(item.source) if shipped else None
            except ValueError as error:
                raise BadPictureError(str(error)) from error
            return _whole(self.root / item.source, points, known.affect(item.source) if known else {})
        return known.face(item.source, landmarks=shipped) if known else _whole(self.root / item.source, None, {})

    @classmethod
    def reading(cls, options: DatasetOptions, provenance: Mapping[str, Any]) -> Reading:  # noqa: ARG003 - what others need
        """Face crops are taken whole; of whole pictures the annotation's box is cut out."""
        return Reading(
            needs="the face box that AffectNet's annotation has of each picture" if provenance.get("distribution") == "csv" else ""
        )

    def expected(self) -> Mapping[str, Mapping[str, int]]:
        """Published numbers, of which those of train include val."""
        train = dict(zip(ORIGINAL, (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750), strict=False))
        test = dict.fromkeys(ORIGINAL[:8], 500)
        if self._facts.get("distribution") == "npy":
            test["contempt"] = 499  # one picture less than in the older layout: 3,999 in all
        return {"train": {name: train[name] for name in self.classes}, "test": {name: test[name] for name in self.classes}}

    def _release(self, *, required: bool) -> Release | None:
        if self._opened is None:
            self._opened = _open_release(self.root, self.options.distribution, required=required)
        return self._opened

    def _folds(self) -> Folds:
        if self._read_folds is None:
            self._read_folds = Folds(Path(self.options.folds))
        return self._read_folds

    def _of_release(self, notes: list[str]) -> Mapping[str, Sequence[Item]]:
        release = self._release(required=True)
        assert release is not None
        wanted = {original: self.classes.index(name) for original, name in enumerate(ORIGINAL) if name in self.classes}
        items_of: dict[str, list[Item]] = {"test": [], "train": []}
        left_out: dict[str, dict[str, int]] = {}
        of_test: set[str] = set()
        for split, items in items_of.items():
            excluded: Counter[int] = Counter()
            for source, original in release.pictures(split, keep=wanted, reject=self._reject, notes=notes):
                if split == "test":
                    of_test.add(source)
                if original not in wanted:
                    excluded[original] += 1
                elif split == "train" and source in of_test:
                    self._reject(split, source, "listed for test too, and kept there only")
                else:
                    items.append(Item(source=source, label=wanted[original]))
            left_out[split] = {ORIGINAL[original]: excluded[original] for original in sorted(excluded)}
        self._facts |= {**release.facts(), "left_out": left_out}
        self._require(items_of)
        return self._with_val(items_of["train"], items_of["test"])

    def _of_folds(self, notes: list[str]) -> Mapping[str, Sequence[Item]]:
        if self.classes != EXPRESSIONS:
            raise ValueError("option folds: the published folds have the seven expressions; use dataset 'affectnet'")
        folds = self._folds()
        release = self._release(required=False)
        splits = ["train", "test"] if folds.val_is_test or "val" not in folds.labels else ["train", "val", "test"]
        items_of: dict[str, list[Item]] = {}
        by_name: dict[str, int] = {}
        for split in splits:
            items = items_of[split] = []
            used: set[str] = set()
            names: Mapping[str, list[str]] | None = None
            for name, label in folds.labels[split].items():
                source = name
                if not _is_file(f"{self.root}/{name}"):
                    if names is None:
                        names = self._by_stem(release, "test" if split == "test" else "train")
                    matches = names.get(_stem(posixpath.basename(name)), [])
                    if len(matches) != 1:
                        several = f"the release has several of that name: {', '.join(matches[:3])}"
                        self._reject(split, name, f"no such file, and {several if matches else 'the release has none of that name'}")
                        continue
                    (source,) = matches
                    by_name[split] = by_name.get(split, 0) + 1
                if source in used:
                    self._reject(split, name, f"another id of the folds is {source} too, and is used")
                    continue
                used.add(source)
                items.append(Item(source=source, label=label))
                covered = release is not None and release.covers(source)
                if self.options.landmarks == "shipped" and not covered and not folds.has_landmarks:
                    raise ValueError(
                        f"--folds {folds.folder} has no landmarks.txt, and {source} is not where AffectNet's own pictures are, so "
                        "it has no landmarks. Add landmarks.txt, or go on with --landmarks face-alignment, dlib or none"
                    )
        if by_name and folds.has_landmarks:
            notes.append(
                f"{sum(by_name.values())} ids of the folds are no files below the raw folder: AffectNet's pictures of the same name are "
                "used, with their own landmarks, as those of the folds belong to other pixels"
            )
        self._facts |= {**(release.facts() if release else {}), "folds": {**folds.facts(), "pictures_found_by_name": by_name}}
        self._require(items_of)
        if "val" in items_of:
            self._facts["val"] = {"cut_from_train": False}
            return items_of
        return self._with_val(items_of["train"], items_of["test"])

    @staticmethod
    def _by_stem(release: Release | None, split: str) -> Mapping[str, list[str]]:
        names: dict[str, list[str]] = {}
        for source in release.sources(split) if release else ():
            names.setdefault(_stem(posixpath.basename(source)), []).append(source)
        return names

    def _require(self, items_of: Mapping[str, Sequence[Item]]) -> None:
        for split, items in items_of.items():
            lost = [line for line in self._rejected if line.split == split]
            if not items:
                first = f"; first of {len(lost)} that cannot be used: {lost[0].source}: {lost[0].reason}" if lost else ""
                raise ValueError(f"{self.root}: no picture of {', '.join(self.classes)} for split {split!r}{first}")


@DATASETS.register(
    "affectnet8",
    title="AffectNet-8",
    paper=_PAPER,
    year=2019,
    doi="10.1109/TAFFC.2017.2740923",
    url="http://mohammadmahoor.com/affectnet/",
    license=_LICENSE,
    in_all=False,
    defaults=(Default("guidance.weight", 9.0, "affectnet8", _WEIGHT),),
)
class AffectNet8(AffectNet):
    """The seven expressions and contempt."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The seven expressions in the project's order, then contempt."""
        return (*EXPRESSIONS, "contempt")


def _open_release(root: Path, distribution: str, *, required: bool) -> Release | None:
    """The layout that is below a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: both layouts are there, or, if ``required``, none is whole; the message says what is missing where.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--raw {root}: no such folder")
    kinds: Mapping[str, type[Release]] = {"npy": NpyRelease, "csv": CsvRelease}
    asked = kinds if distribution == "auto" else {distribution: kinds[distribution]}
    lacking = {name: kind.lacking(root) for name, kind in asked.items()}
    whole = [name for name in asked if not lacking[name]]
    if len(whole) > 1:
        raise ValueError(
            f"{root} holds both layouts of AffectNet. Say which to read: --option distribution=npy, or --option distribution=csv"
        )
    if whole:
        return kinds[whole[0]](root)
    if not required:
        return None
    # What lies one folder deeper is the likeliest mistake.
    deeper = next(
        (path for path in sorted(root.iterdir()) if path.is_dir() and any(not kind.lacking(path) for kind in kinds.values())), None
    )
    words = " and ".join(f"of the {name} layout it lacks {', '.join(missing)}" for name, missing in lacking.items())
    hint = f" {deeper} holds one: give --raw {deeper}" if deeper else ""
    raise ValueError(f"{root} does not hold AffectNet: {words}. {_LAYOUTS}.{hint}")


def _stem(name: str) -> str:
    """The id of a picture file: its name without the suffix of a picture. Other dots belong to the id."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in _SUFFIXES else name


def _is_file(path: str) -> bool:
    # Not pathlib: it interns the parts of half a million paths, and raises where a name is longer than any file's.
    return os.path.isfile(path)  # noqa: PTH113


def _printable(name: str) -> str:
    """A file name as text that can be stored; another text than ``name`` if that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _cells(line: bytes) -> list[str]:
    """The cells of one line of a CSV file.

    Raises:
        ValueError: it is not UTF-8, or quoted wrongly.
    """
    try:
        text = line.removeprefix(_BOM).decode().rstrip("\r\n")
        return next(csv.reader([text], strict=True)) if '"' in text else text.split(",")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"quoted wrongly: {error}") from None


def _tidy(path: str) -> str:
    """One spelling of a path, so that a picture listed twice is noticed."""
    path = path.strip()
    return posixpath.normpath(path) if "//" in path or path.startswith("./") or "/./" in path else path


def _small_file(name: str, folder: int) -> bytes:
    """The bytes of a file in an open folder; of a large one the beginning, which `_load` will refuse."""
    descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _load(data: bytes) -> npt.NDArray[Any]:
    """The array of an ``.npy`` file.

    Raises:
        ValueError: it is empty, cut short, none, or holds a pickled object, which might run code and is not read.
    """
    if not data:
        raise ValueError("the file is empty")
    if not data.startswith(b"\x93NUMPY"):
        raise ValueError("holds a pickled object; not read" if data[:1] == b"\x80" else "not an .npy file")
    try:
        values = _array(data)
    except Exception as error:  # on damaged headers numpy raises nearly anything, MemoryError and SyntaxError included
        pickled = "Object arrays" in str(error)
        raise ValueError("holds a pickled object; not read" if pickled else f"damaged: {str(error).splitlines()[0]}") from error
    if values.dtype.kind not in "iufSU":
        raise ValueError(f"holds {values.dtype}, not numbers or their text")
    return values


def _array(data: bytes) -> npt.NDArray[Any]:
    """What `numpy.load` gives, faster for small files: a folder's headers are nearly all the same, and parsing one costs 0.1 ms."""
    end = 10 + int.from_bytes(data[8:10], "little")
    layout = _layout(data[:end]) if data[6:8] == b"\x01\x00" and len(data) >= end else None
    if layout is None or len(data) < end + layout[0].itemsize * math.prod(layout[1]):
        values: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        return values
    dtype, shape = layout
    return np.frombuffer(data, dtype, count=math.prod(shape), offset=end).reshape(shape)


@lru_cache(maxsize=256)
def _layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Type and shape that a header of version 1.0 tells; None for what `numpy.load` had better look at itself."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    return None if dtype.hasobject or (by_columns and len(shape) > 1) else (dtype, shape)


def _one(values: npt.NDArray[Any]) -> str:
    if values.size != 1:
        raise ValueError(f"holds {values.size} values, one is needed")
    value = values.reshape(-1)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@lru_cache(maxsize=256)  # the files of one expression are the same to the byte
def _expression(data: bytes) -> int:
    return _label(_one(_load(data)))


def _label(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value not in range(len(ORIGINAL)):
        raise ValueError(f"expression {text!r} is not one of 0 to {len(ORIGINAL) - 1}")
    return int(value)


def _landmarks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64] | None:
    """(136,) numbers or texts x0, y0, x1, y1, ... -> (68, 2); None where infinite values, or one place for all, say that there are none."""
    if values.size != 136:
        raise ValueError(f"{values.size} numbers, 136 are needed")
    points = values.astype(np.float64).reshape(68, 2)
    return points if np.isfinite(points).all() and not is_one_place(points) else None


def _upright(points: npt.NDArray[np.float64], image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.float64]:
    """Points of the stored pixels in the picture as decoded: the annotation counts the pixels of the file."""
    return orient_landmarks(points, orientation=orientation, width=image.shape[1], height=image.shape[0])


def _whole(path: Path, points: npt.NDArray[np.float64] | None, extra: Mapping[str, float]) -> Face:
    """A picture file that is a face crop already."""
    image, orientation = decode_picture(path.read_bytes())
    return _face(image, None if points is None else _upright(points, image, orientation), extra)


def _face(image: npt.NDArray[np.uint8], points: npt.NDArray[np.float64] | None, extra: Mapping[str, float]) -> Face:
    height, width = image.shape[:2]
    if points is not None and not ((points >= -0.5) & (points <= np.array([width, height]) - 0.5)).all(1).any():
        raise BadPictureError(f"all landmarks lie outside of the {width} x {height} face; are they in pixels of this very picture?")
    return Face(image=image, landmarks=points, box=Box(0, 0, width, height), extra=extra)
