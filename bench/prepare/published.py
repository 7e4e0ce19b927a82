"""What datasets with a published annotation have in common: the cut of val, lines that cannot be used, and the published folds.

The folds are those of Belharbi et al., FG 2024 (github.com/sbelharbi/interpretable-fer-aus): per split ``image_ids.txt``,
``class_labels.txt`` (``id,label``) and ``landmarks.txt`` (``id,x1..x68,y1..y68``, inf = no face found), plus ``class_id.yaml``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from bench.dataset import EXPRESSIONS, Dataset, Item, Rejected
from bench.prepare.plausibility import is_one_place
from bench.prepare.splits import cut_val, mixed
from bench.registry import did_you_mean

_FOLD_SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


class PublishedOptions(Dataset.Options):
    """Options of datasets with a published annotation."""

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the published training split that becomes val. 0: none, as published; only protocol ``test-selected`` can use such data."""
    val_salt: str = "bench-val-1"
    """What the cut hashes beside the names; another salt is another cut."""
    folds: str = ""
    """Folder of the published folds, whose splits, classes and landmarks replace the dataset's own."""


class PublishedDataset(Dataset):
    """A dataset whose splits and classes are published lists, of which every line is used or reported."""

    class Options(PublishedOptions):
        """Accepted keys."""

    options: Options

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options; nothing is read yet.

        Raises:
            ValueError: no raw folder is given.
        """
        super().__init__(options, raw=raw)
        if raw is None:
            raise ValueError(f"dataset {type(self).__name__!r} reads your download: say where it is with --raw DIR")
        self.root = raw
        self._rejected: list[Rejected] = []
        self._facts: dict[str, Any] = {}

    def rejected(self) -> Sequence[Rejected]:
        """Every line of the annotation that could not be used."""
        return tuple(self._rejected)

    def provenance(self) -> Mapping[str, Any]:
        """How val came about, what the original labels became, what was odd."""
        return self._facts

    def _reject(self, split: str, source: str, reason: str) -> None:
        self._rejected.append(Rejected(split=split, source=source, reason=reason))

    def _with_val(
        self, train: Sequence[Item], test: Sequence[Item], *, names: Mapping[str, str] | None = None
    ) -> dict[str, Sequence[Item]]:
        """The splits to store: val cut off train unless the option says 0.

        Args:
            train: pictures of the published training split.
            test: pictures of the test split.
            names: source -> what is hashed in its place, all different; for datasets that have each picture at several paths, so that
                val is the same whichever is read. None: the sources.
        """
        if not self.options.val_fraction:
            self._facts["val"] = {"cut_from_train": False}
            return {"train": mixed(train), "test": mixed(test)}
        named = {names[item.source] if names else item.source: item for item in train}
        assert len(named) == len(train), "names of the training split are repeated"
        stand_ins = [dataclasses.replace(item, source=name) for name, item in named.items()]
        _, cut, self._facts["val"] = cut_val(stand_ins, fraction=self.options.val_fraction, salt=self.options.val_salt)
        val = {item.source for item in cut}
        if names:
            self._facts["val"]["hashed"] = "the name in the dataset's own list, in place of the source"
        return {
            "train": mixed(item for name, item in named.items() if name not in val),
            "val": mixed(item for name, item in named.items() if name in val),
            "test": mixed(test),
        }


def unsafe_path(path: str) -> str | None:
    """Why a path of an annotation must not be followed, or None if it stays inside the download."""
    if not path or "\0" in path:
        return "no file name"
    if PurePosixPath(path).is_absolute() or re.match(r"[A-Za-z]:|\\", path):
        return "an absolute path; only paths inside the download are read"
    if ".." in re.split(r"[/\\]", path):
        return "a path with '..'; only paths inside the download are read"
    return None


def repeated(keys: Iterable[tuple[str, int]]) -> Mapping[str, str]:
    """Names that a list has more than once, with the reason to give.

    Args:
        keys: (name, original label) of every line.

    Returns:
        name -> reason, for names whose lines disagree about the label. Names listed repeatedly with one label are not in it.
    """
    labels: dict[str, Counter[int]] = {}
    for name, label in keys:
        labels.setdefault(name, Counter())[label] += 1
    return {name: f"listed with different labels: {', '.join(map(str, sorted(seen)))}" for name, seen in labels.items() if len(seen) > 1}


class LandmarkRows:
    """``landmarks.txt`` of a fold, read row by row where it lies: the file of a large dataset is not held in memory."""

    def __init__(self, path: Path) -> None:
        """Find the row of every picture.

        Raises:
            ValueError: a row has no id, or two rows have the same; the message gives the lines.
        """
        self.path = path
        self._where: dict[str, tuple[int, int, int]] = {}
        digest = hashlib.sha256()
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    name = self._cells(line, number)[0]
                    if not name:
                        raise ValueError(f"{path}: line {number} has no id")
                    if name in self._where:
                        raise ValueError(f"{path}: lines {self._where[name][2]} and {number} are both about {name}; keep one")
                    self._where[name] = (offset, len(line), number)
                offset += len(line)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def names(self) -> Sequence[str]:
        """The pictures that have a row, in the file's order."""
        return tuple(self._where)

    def points(self, name: str) -> npt.NDArray[np.float64] | None:
        """Return the (68, 2) landmarks of a picture in pixels; None if it has no row, or one that says "not found" (inf) in every cell.

        Raises:
            ValueError: the row has not 136 coordinates, one that is no number, or only some that are finite.
        """
        if name not in self._where:
            return None
        offset, size, number = self._where[name]
        with self.path.open("rb") as file:
            line = os.pread(file.fileno(), size, offset)
        cells = self._cells(line, number)[1]
        where = f"{self.path}: line {number} ({name})"
        if len(cells) != 136:
            raise ValueError(f"{where} has {len(cells)} coordinates, 136 are needed: x1..x68, then y1..y68")
        try:
            values = np.array([float(cell) for cell in cells])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not np.isfinite(values).any():
            return None
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: only some coordinates are finite. 'inf' in all 136 cells means that no face was found")
        points = values.reshape(2, 68).T.copy()
        return None if is_one_place(points) else points

    def _cells(self, line: bytes, number: int) -> tuple[str, list[str]]:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: line {number} is not UTF-8. Save the file as UTF-8") from error
        # A name may hold commas: the coordinates are the last 136 cells.
        cells = text.split(",")
        count = min(136, len(cells) - 1)
        return ",".join(cells[: len(cells) - count]).strip(), cells[len(cells) - count :]


class Folds:
    """The published folds: which picture is in which split, of which class, with which landmarks."""

    def __init__(self, folder: Path) -> None:
        """Read the lists; landmarks are read on demand.

        Raises:
            FileNotFoundError: a split or a list is missing; the message says what is expected where.
            ValueError: a line cannot be read, or two lists disagree.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"--folds {folder}: no such folder")
        self.folder = folder
        self.labels: dict[str, dict[str, int]] = {}
        """Split -> id -> position in `EXPRESSIONS`."""
        self._rows: list[LandmarkRows] = []
        digest = hashlib.sha256()
        names = self._class_names(digest)
        for split, spellings in _FOLD_SPLITS.items():
            place = next((folder / name for name in spellings if (folder / name).is_dir()), None)
            if place is None and split == "val":
                continue
            if place is None:
                raise FileNotFoundError(f"--folds {folder} has no {split!r} folder with image_ids.txt and class_labels.txt")
            self.labels[split] = self._split(place, names, digest)
            if (place / "landmarks.txt").is_file():
                self._rows.append(LandmarkRows(place / "landmarks.txt"))
        if (folder / "landmarks.txt").is_file():
            self._rows.append(LandmarkRows(folder / "landmarks.txt"))
        for rows in self._rows:
            digest.update(rows.sha256.encode())
        self.sha256 = digest.hexdigest()
        for first, second in combinations(self.labels, 2):
            twice = self.labels[first].keys() & self.labels[second].keys()
            if twice and not (second == "test" and first == "val" and self.val_is_test):
                raise ValueError(f"--folds {folder}: {len(twice)} ids are in both {first} and {second}, first: {min(twice)}")

    @property
    def val_is_test(self) -> bool:
        """Whether the published validation split is the test split, as in the release."""
        return self.labels.get("val") == self.labels["test"]

    @property
    def has_landmarks(self) -> bool:
        """Whether there is any ``landmarks.txt``."""
        return bool(self._rows)

    def points(self, name: str) -> npt.NDArray[np.float64] | None:
        """The landmarks of a picture; see `LandmarkRows.points`."""
        return next((rows.points(name) for rows in self._rows if name in rows), None)

    def facts(self) -> dict[str, Any]:
        """JSON-able facts for the index."""
        ids = {name for labels in self.labels.values() for name in labels}
        rows = {name for rows in self._rows for name in rows.names()}
        return {
            "sha256": self.sha256,
            "pictures": {split: len(labels) for split, labels in self.labels.items()},
            "val_is_test": self.val_is_test,
            "landmark_rows": sum(map(len, self._rows)),
            "rows_without_picture": len(rows - ids),
            "pictures_without_row": len(ids - rows),
        }

    def _class_names(self, digest: hashlib._Hash) -> Mapping[int, str]:
        path = self.folder / "class_id.yaml"
        if not path.is_file():
            return dict(enumerate(EXPRESSIONS))
        names: dict[int, str] = {}
        for number, line in enumerate(_lines(path, digest), start=1):
            if not line or line.startswith("#"):
                continue
            match = re.fullmatch(r"\s*['\"]?([^'\":]+)['\"]?\s*:\s*([0-9]+)\s*", line)
            if not match:
                raise ValueError(f"{path}: line {number} is not NAME: NUMBER")
            name = match.group(1).strip().lower()
            if name not in EXPRESSIONS:
                raise ValueError(f"{path}: line {number}: {match.group(1)!r} is no expression.{did_you_mean(name, EXPRESSIONS)}")
            if int(match.group(2)) in names or name in names.values():
                raise ValueError(f"{path}: line {number}: {line!r} repeats a name or a number; each expression has one of its own")
            names[int(match.group(2))] = name
        return names

    def _split(self, place: Path, names: Mapping[int, str], digest: hashlib._Hash) -> dict[str, int]:
        listed = [line for line in _lines(place / "image_ids.txt", digest) if line]
        labels: dict[str, int] = {}
        for number, line in enumerate(_lines(place / "class_labels.txt", digest), start=1):
            if not line:
                continue
            name, comma, value = line.rpartition(",")
            name = name.strip()
            where = f"{place / 'class_labels.txt'}: line {number}"
            if not comma or not re.fullmatch(r"\s*[0-9]{1,9}", value) or int(value) not in names:
                raise ValueError(f"{where} must be ID,LABEL with a label of {', '.join(map(str, sorted(names)))}, but is {line[:80]!r}")
            if name in labels:
                raise ValueError(f"{where}: {name} is listed twice; keep one line")
            reason = unsafe_path(name)
            if reason:
                raise ValueError(f"{where}: {name!r} is {reason}")
            labels[name] = EXPRESSIONS.index(names[int(value)])
        if len(set(listed)) != len(listed):
            again = next(name for name, count in Counter(listed).items() if count > 1)
            raise ValueError(f"{place / 'image_ids.txt'}: {again} is listed twice; keep one line")
        odd = sorted(set(listed) ^ labels.keys())
        if odd:
            raise ValueError(f"{place}: image_ids.txt and class_labels.txt differ in {len(odd)} ids, first: {odd[0]}")
        return {name: labels[name] for name in listed}


def _lines(path: Path, digest: hashlib._Hash) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: each split of the folds has image_ids.txt and class_labels.txt")
    data = path.read_bytes()
    digest.update(data)
    try:
        return [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8") from error
