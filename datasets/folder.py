"""A user's own folder: ``<root>/<split>/<class>/<picture>`` plus ``landmarks.csv``.

Splits are ``train``, ``test`` and, optionally, ``val``; without ``val`` one is cut from train (`bench.prepare.splits.stratified_cut`).
Every file in a class folder counts as a picture unless its name begins with a dot; what cannot be decoded ends up in the list of bad
pictures. Class names are free: those that are one of the seven expressions take the project's order, the others follow alphabetically.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, field_validator

from bench.dataset import DATASETS, EXPRESSIONS, SPLITS, BadPictureError, Dataset, DatasetOptions, Face, Item, Reading, Rejected
from bench.prepare.landmark_table import LandmarkTable, same_name
from bench.prepare.pictures import decode_picture
from bench.prepare.preparation import read_face
from bench.prepare.splits import cut_val, hash_sources, mixed

LANDMARKS_NAME = "landmarks.csv"
_SPLIT_ALIASES = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}


@DATASETS.register(
    "folder",
    title="Own folder",
    license="That of the pictures you provide; nothing is known about it here.",
    in_all=False,
)
class Folder(Dataset):
    """Pictures in ``<root>/<split>/<class>/``, landmarks in ``<root>/landmarks.csv``."""

    class Options(Dataset.Options):
        """Options of ``folder``."""

        val_fraction: float = Field(default=0.1, gt=0, lt=1)
        """Share of train that becomes val where the folder has no val split."""
        val_salt: str = "bench-val-1"
        """What the cut hashes beside the names; another salt is another cut."""
        identity_pattern: str = ""
        """Regular expression, searched in the file name, whose first group is the person: ``^(.+)_[0-9]+\\.`` for Ann_Lee_0009.jpg."""
        landmark_frame: Literal["stored", "upright"] = "stored"
        """Pixels that the landmarks count: those stored in the file, or those seen after the EXIF orientation. Same without EXIF."""

        @field_validator("identity_pattern")
        @classmethod
        def _has_a_group(cls, value: str) -> str:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if value and not groups:
                raise ValueError("has no group; put the part that names the person in parentheses, such as ^(.+)_[0-9]+\\.")
            return value

    options: Options

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options; nothing is read yet."""
        super().__init__(options, raw=raw)
        if raw is None:
            raise ValueError("dataset 'folder' reads your pictures: say where they are with --raw DIR")
        self.root = raw
        self._classes: tuple[str, ...] | None = None
        self._table: LandmarkTable | None = None
        self._provenance: dict[str, Any] = {}
        self._rejected: list[Rejected] = []

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names found in any split: expressions first, in the project's order, then the others alphabetically."""
        if self._classes is None:
            names = {folder.name for split in self._split_folders().values() for folder in _folders(split)}
            expressions = tuple(name for name in EXPRESSIONS if name in names)
            self._classes = expressions + tuple(sorted(names - set(expressions)))
        return self._classes

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """List every picture, cut val if there is none, and check ``landmarks.csv`` to the last cell."""
        folders = self._split_folders()
        self._rejected.clear()
        notes: list[str] = []
        stray = [p.name for p in _folders(self.root) if p.name not in folders]
        if stray:
            notes.append(f"not a split, left out: {', '.join(stray)}")
        items_of = {split: self._items(folder) for split, folder in folders.items()}
        self._check_classes(items_of, notes)
        if self.options.identity_pattern:
            self._check_identities(items_of, notes)

        if "val" in items_of:
            facts: dict[str, Any] = {"sources_sha256": hash_sources(items_of["val"]), "cut_from_train": False}
        else:
            items_of["train"], items_of["val"], facts = cut_val(
                items_of["train"], fraction=self.options.val_fraction, salt=self.options.val_salt
            )
        self._provenance = {"val": facts}
        self._provenance["landmarks"] = self._check_landmarks(items_of, notes)
        self._provenance["notes"] = notes
        return {split: mixed(items_of[split]) for split in SPLITS}

    def read(self, item: Item) -> Face:
        """Read one picture upright, with its landmarks turned along.

        Raises:
            BadPictureError: not a picture, damaged, or empty.
            OSError: the file cannot be read at all; that says nothing about the picture, so it stops the work.
        """
        landmarks = None
        if self.options.landmarks == "shipped" and (self.root / LANDMARKS_NAME).is_file():
            self._table = self._table or LandmarkTable(self.root / LANDMARKS_NAME)
            landmarks = self._table.points(item.source)
        return read_face((self.root / item.source).read_bytes(), landmarks, frame=self.options.landmark_frame)

    @classmethod
    def reading(cls, options: DatasetOptions, provenance: Mapping[str, Any]) -> Reading:  # noqa: ARG003 - what others need
        """The whole picture, with landmarks in the frame that the options say."""
        assert isinstance(options, cls.Options)
        return Reading(landmark_frame=options.landmark_frame)

    def rejected(self) -> Sequence[Rejected]:
        """Files in folders of classes that are no pictures, neither by their names nor by their content."""
        return tuple(self._rejected)

    def provenance(self) -> Mapping[str, Any]:
        """How val came about, the hash of ``landmarks.csv``, and what was odd."""
        return self._provenance

    def _split_folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"--raw {self.root}: no such folder")
        folders = {path.name: path for path in _folders(self.root)}
        for name in folders:
            meant = _SPLIT_ALIASES.get(name.lower(), name.lower())
            if meant != name and meant in SPLITS:
                raise ValueError(f"{folders[name]}: the split is called {meant!r} here. Rename: mv {folders[name]} {self.root / meant}")
        for split in ("train", "test"):
            if split not in folders:
                have = f"it has {', '.join(folders)}" if folders else "it has no folder at all"
                raise ValueError(
                    f"{self.root} has no {split!r} folder ({have}). Expected: train/CLASS/PICTURE and test/CLASS/PICTURE in {self.root}"
                )
        return {split: folders[split] for split in SPLITS if split in folders}

    def _items(self, split: Path) -> list[Item]:
        pattern = re.compile(self.options.identity_pattern) if self.options.identity_pattern else None
        items = []
        real: dict[Path, Path] = {}
        for folder in _folders(split):
            twin = real.setdefault(folder.resolve(), folder)
            if twin != folder:
                raise ValueError(f"{folder} and {twin} are one folder, by a link: each of its pictures would be of two classes. Remove one")
            label = self.classes.index(folder.name)
            for path in sorted(folder.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.is_dir():
                    raise ValueError(f"{path} is a folder, but pictures must lie directly in {folder}")
                source = f"{split.name}/{folder.name}/{path.name}"
                try:
                    source.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{folder}: the file name {path.name!r} is not valid UTF-8. Rename it") from None
                if path.suffix.lower() not in Image.registered_extensions() and (reason := _no_picture(path)):
                    self._rejected.append(Rejected(split=split.name, source=source, reason=reason))
                    continue  # it takes no picture's place in the cut of val
                match = pattern.search(path.name) if pattern else None
                items.append(Item(source=source, label=label, identity=match.group(1) if match else None))
        if not items:
            raise ValueError(f"split {split.name!r} is empty: no picture in {split}/CLASS/")
        return items

    def _check_classes(self, items_of: Mapping[str, Sequence[Item]], notes: list[str]) -> None:
        counts = {split: Counter(item.label for item in items) for split, items in items_of.items()}
        for label, name in enumerate(self.classes):
            lacking = [split for split in items_of if not counts[split][label]]
            if "train" in lacking:
                seen = [candidate for i, candidate in enumerate(self.classes) if counts["train"][i]]
                close = difflib.get_close_matches(name.lower(), seen, n=1, cutoff=0.6)
                hint = f" Is it the same as {close[0]!r}?" if close else ""
                raise ValueError(f"class {name!r} has no picture in {self.root / 'train'}, so it cannot be learnt.{hint} Add or remove it")
            notes.extend(f"class {name!r} has no picture in {split}" for split in lacking)

    def _check_identities(self, items_of: Mapping[str, Sequence[Item]], notes: list[str]) -> None:
        items = [item for split in items_of.values() for item in split]
        known = sum(item.identity is not None for item in items)
        if not known:
            raise ValueError(
                f"option identity_pattern={self.options.identity_pattern!r} matches no file name, not even {Path(items[0].source).name!r}"
            )
        if known < len(items):
            notes.append(f"identity_pattern matches {known} of {len(items)} file names; the others count as one person each")

    def _check_landmarks(self, items_of: Mapping[str, Sequence[Item]], notes: list[str]) -> dict[str, Any]:
        path = self.root / LANDMARKS_NAME
        if not path.is_file():
            notes.append(f"no {LANDMARKS_NAME}: the pictures have no landmarks, hence no AU maps, no guidance and no CAM-COS")
            return {"file_sha256": None}
        self._table = table = LandmarkTable(path)
        wrong: list[str] = []
        faceless = 0
        largest = 0.0
        for source in table.sources():
            try:
                points = table.points(source)
                faceless += points is None
                largest = max(largest, 0.0 if points is None else float(points.max()))
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            more = f" ({len(wrong)} such rows in all)" if len(wrong) > 1 else ""
            raise ValueError(f"{wrong[0]}{more}")
        if 0 < largest <= 1:
            raise ValueError(f"{path}: no coordinate exceeds 1; multiply them by the picture's width and height, pixels are needed")
        pictures = {item.source for items in items_of.values() for item in items}
        normal = {same_name(source) for source in pictures}
        orphans = [source for source in table.sources() if source not in normal]
        if len(orphans) == len(table):
            raise ValueError(
                f"{path}: no row names a picture of {self.root}"
                + (f"; the first is {orphans[0]!r}" if orphans else "; there are no rows")
                + f". Paths are relative to {self.root}, such as {min(pictures)!r}"
            )
        if orphans:
            notes.append(f"{LANDMARKS_NAME}: {len(orphans)} of {len(table)} rows name no picture here, first: {orphans[0]}")
        if faceless:
            what = "have no landmarks: empty cells, or all points in one place, such as zeros or -1"
            notes.append(f"{LANDMARKS_NAME}: {faceless} of {len(table)} rows {what}")
        lacking = sum(source not in table for source in pictures)
        if lacking:
            first = min(source for source in pictures if source not in table)
            notes.append(f"{LANDMARKS_NAME}: {lacking} of {len(pictures)} pictures have no row, first: {first}")
        return {"file_sha256": table.sha256, "rows": len(table), "rows_without_picture": len(orphans), "pictures_without_row": lacking}


def _no_picture(path: Path) -> str:
    """Why a file with the ending of no picture is none; empty if it is one all the same."""
    try:
        decode_picture(path.read_bytes())
    except BadPictureError as error:
        return str(error)
    return ""


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
