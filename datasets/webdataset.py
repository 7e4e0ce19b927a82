"""A user's own WebDataset shards, made by anybody: ``<root>/train*.tar`` or ``<root>/train/*.tar``, the same for val and test.

A sample is what webdataset makes of neighbouring members of a shard: one key, and a picture (``jpg``, ``jpeg``, ``png`` or ``webp``) with
its class in ``cls``, or in a field of ``json``. ``landmarks`` and ``identity`` in ``json`` are those of our own shards, which are read back
so. Keys have to be unique in their shard only. Without val, one is cut from train (`bench.prepare.splits.stratified_cut`).

Members are located through tarfile, which skips the pictures while listing, and read at their offsets. Nothing is unpickled: of webdataset
only the rule that splits a name into key and suffix is used, none of its decoders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from bench.dataset import DATASETS, EXPRESSIONS, SPLITS, Dataset, Face, Item, Rejected
from bench.prepare.plausibility import is_one_place
from bench.prepare.preparation import read_face
from bench.prepare.splits import cut_val, hash_sources, mixed
from bench.registry import did_you_mean

CLASSES_NAME = "classes.txt"
PICTURES = ("jpg", "jpeg", "png", "webp")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself and passes over


class _Place(NamedTuple):
    """Where a member's data lies in its shard."""

    name: str
    offset: int
    size: int


class _Sample(NamedTuple):
    """A sample as listed, its class still as it is written."""

    item: Item
    label: str | int


class _UnusableError(ValueError):
    """A sample that cannot be used, and why."""


@DATASETS.register(
    "webdataset",
    title="Own WebDataset shards",
    license="That of the pictures you provide; nothing is known about it here.",
    in_all=False,
)
class WebDatasetShards(Dataset):
    """Samples of the tar files ``train*.tar``, ``val*.tar`` and ``test*.tar``, or of those in folders of these names."""

    class Options(Dataset.Options):
        """Options of ``webdataset``."""

        classes: tuple[str, ...] = ()
        """Names of the classes; position = number. Empty: the lines of ``classes.txt``, or else the names that occur."""
        label_field: str = Field(default="label", min_length=1)
        """Field of the json member that holds the class, as a number or a name, where a sample has no cls member."""
        val_fraction: float = Field(default=0.1, gt=0, lt=1)
        """Share of train that becomes val where there are no shards of val."""
        val_salt: str = "bench-val-1"
        """What the cut hashes beside the names; another salt is another cut."""

        @field_validator("classes")
        @classmethod
        def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
            if len(set(value)) != len(value) or not all(name.strip() == name != "" for name in value):
                raise ValueError("names must differ, and be neither empty nor begin or end with a space")
            return value

    options: Options

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options; nothing is read yet."""
        super().__init__(options, raw=raw)
        if raw is None:
            raise ValueError("dataset 'webdataset' reads your shards: say where they are with --raw DIR")
        self.root = raw
        self._classes: tuple[str, ...] = ()
        self._rejected: list[Rejected] = []
        self._provenance: dict[str, Any] = {}
        self._shards: dict[str, dict[str, dict[str, _Place]]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names given by the option or ``classes.txt``; else those that occur: expressions in the project's order, then the others."""
        if not self._classes:
            self.splits()
        return self._classes

    def splits(self) -> Mapping[str, Sequence[Item]]:
        """List every sample, give its class a number, and cut val if there is none.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: shards are missing or damaged, a key repeats in its shard, or numbers stand for classes that nothing names.
        """
        notes: list[str] = []
        self._rejected = []
        shards = self._find_shards(notes)
        contents: dict[str, Any] = {}
        listed = {split: [s for shard in names for s in self._list(shard, split, contents)] for split, names in shards.items()}
        names = self._names(listed)
        items_of = {split: self._numbered(split, samples, names) for split, samples in listed.items()}
        for split, items in items_of.items():
            if not items:
                first = next((f"; first: {r.source}: {r.reason}" for r in self._rejected if r.split == split), "")
                raise ValueError(f"split {split!r} of {self.root} has no usable sample{first}")
        self._classes = names
        self._check_classes(items_of, notes)
        without = sum(facts["without_landmarks"] for facts in contents.values())
        if without and self.options.landmarks == "shipped":
            what = "have no landmarks, hence no AU maps, no guidance and no CAM-COS"
            notes.append(f"{without} of {sum(facts['samples'] for facts in contents.values())} samples {what}")
        if "val" in items_of:
            cut: dict[str, Any] = {"sources_sha256": hash_sources(items_of["val"]), "cut_from_train": False}
        else:
            items_of["train"], items_of["val"], cut = cut_val(
                items_of["train"], fraction=self.options.val_fraction, salt=self.options.val_salt
            )
        self._provenance = {"val": cut, "shards": contents, "notes": notes}
        return {split: mixed(items_of[split]) for split in SPLITS}

    def read(self, item: Item) -> Face:
        """Read one picture upright, with its landmarks turned along.

        Raises:
            BadPictureError: not a picture, damaged, empty, or landmarks that all lie beside it.
            OSError: the shard cannot be read at all; that says nothing about the picture, so it stops the work.
        """
        from webdataset.tariterators import base_plus_ext

        shard, name = _split_source(item.source)
        parts = self._samples(shard)[base_plus_ext(name)[0]]
        with (self.root / shard).open("rb") as file:
            picture = _data(file, _picture(parts))
            note = _note(_data(file, parts["json"])) if "json" in parts else {}
        return read_face(picture, self._landmarks(note), frame="stored")

    def rejected(self) -> Sequence[Rejected]:
        """Samples without a picture, without a class, or with one that there is not."""
        return self._rejected

    def provenance(self) -> Mapping[str, Any]:
        """How val came about, size and hash of what every shard lists, and what was odd."""
        return self._provenance

    def _find_shards(self, notes: list[str]) -> dict[str, list[str]]:
        """The shards of every split, as paths relative to the root with ``/``."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"--raw {self.root}: no such folder")
        visible = [path for path in sorted(self.root.iterdir()) if not path.name.startswith(".")]
        folders = (self.root, *(self.root / split for split in SPLITS))
        packed = [path for folder in folders for path in sorted(folder.glob("*")) if path.name.endswith(_PACKED)]
        if packed:
            raise ValueError(
                f"{packed[0]} is compressed, so its members cannot be read one by one. Unpack it to a plain .tar (.gz: gunzip {packed[0]})"
            )
        shards: dict[str, list[str]] = {}
        for split in SPLITS:
            paths = [path for path in visible if path.is_file() and path.suffix == ".tar" and path.name.startswith(split)]
            if (self.root / split).is_dir():
                paths += sorted(p for p in (self.root / split).glob("*.tar") if p.is_file() and not p.name.startswith("."))
            if paths:
                shards[split] = [path.relative_to(self.root).as_posix() for path in paths]
        for split in ("train", "test"):
            if split not in shards:
                have = ", ".join(path.name for path in visible[:10]) or "nothing"
                raise ValueError(
                    f"{self.root} has no shards of {split!r} (it has {have}). Expected: {split}*.tar or {split}/*.tar in {self.root}"
                )
        used = {name.split("/")[0] for names in shards.values() for name in names}
        stray = [path.name for path in visible if (path.is_dir() or path.suffix == ".tar") and path.name not in used]
        if stray:
            notes.append(f"not a split, left out: {', '.join(stray)}")
        return shards

    def _samples(self, shard: str) -> dict[str, dict[str, _Place]]:
        """Key -> suffix -> place, of a shard; listed once per process."""
        if shard not in self._shards:
            self._shards[shard] = _list_members(self.root / shard)
        return self._shards[shard]

    def _list(self, shard: str, split: str, contents: dict[str, Any]) -> list[_Sample]:
        path = self.root / shard
        samples: list[_Sample] = []
        without = 0
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for key, parts in self._samples(shard).items():
                for place in parts.values():
                    digest.update(f"{place.name}\n{place.size}\n".encode())
                small = {suffix: _data(file, parts[suffix]) for suffix in ("cls", "json") if suffix in parts}
                for data in small.values():
                    digest.update(data)
                try:
                    source = f"{shard}/{_picture(parts).name}"
                    note = _note(small["json"]) if "json" in small else {}
                    label = self._label(small.get("cls"), note)
                    landmarks = self._landmarks(note)
                    samples.append(_Sample(Item(source=source, label=-1, identity=_identity(note)), label))
                    without += landmarks is None
                except _UnusableError as error:
                    self._rejected.append(Rejected(split=split, source=f"{shard}/{key}", reason=str(error)))
        contents[shard] = {
            "bytes": path.stat().st_size,
            "listing_sha256": digest.hexdigest(),
            "samples": len(samples),
            "without_landmarks": without,
        }
        return samples

    def _landmarks(self, note: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
        # Where they come from elsewhere, what a note calls so may be anything.
        return _landmarks(note) if self.options.landmarks == "shipped" else None

    def _label(self, cls: bytes | None, note: Mapping[str, Any]) -> str | int:
        """The class as written: a name, or a number (a text of digits is one, unless a class is called so)."""
        if cls is None and self.options.label_field not in note:
            raise _UnusableError(f"has neither a cls member nor a field {self.options.label_field!r} in a json member")
        try:
            value = note[self.options.label_field] if cls is None else cls.decode().strip()
        except UnicodeDecodeError:
            raise _UnusableError(f"its cls member {cls!r:.40} is no text") from None
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise _UnusableError(f"its class {value!r:.40} is neither a number nor a name")
        return value

    def _names(self, listed: Mapping[str, Sequence[_Sample]]) -> tuple[str, ...]:
        if self.options.classes:
            return self.options.classes
        path = self.root / CLASSES_NAME
        if path.is_file():
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n"))
            if len(set(names)) != len(names) or "" in names:
                raise ValueError(f"{path}: needs one class a line, each once, without empty lines between them")
            return names
        for sample in (sample for samples in listed.values() for sample in samples):
            if _number(sample.label) is not None:
                raise ValueError(
                    f"{self.root / sample.item.source} has class {sample.label}: a number, and nothing says which class that is. Name the "
                    f'classes in the order of their numbers: --option \'classes=["neutral", "happiness"]\', or one a line in {path}'
                )
        occur = {str(sample.label) for samples in listed.values() for sample in samples}
        expressions = tuple(name for name in EXPRESSIONS if name in occur)
        return expressions + tuple(sorted(occur - set(expressions)))

    def _numbered(self, split: str, samples: Sequence[_Sample], names: Sequence[str]) -> list[Item]:
        items = []
        numbers = {name: number for number, name in enumerate(names)}
        for item, label in samples:
            number = numbers.get(label) if isinstance(label, str) else None
            if number is None:
                number = _number(label)
            if number is not None and 0 <= number < len(names):
                items.append(dataclasses.replace(item, label=number))
                continue
            hint = did_you_mean(str(label), names) if number is None else f" Numbers are 0 to {len(names) - 1}"
            self._rejected.append(Rejected(split=split, source=item.source, reason=f"there is no class {label!r:.60}.{hint}"))
        return items

    def _check_classes(self, items_of: Mapping[str, Sequence[Item]], notes: list[str]) -> None:
        counts = {split: Counter(item.label for item in items) for split, items in items_of.items()}
        for label, name in enumerate(self._classes):
            lacking = [split for split in items_of if not counts[split][label]]
            if "train" in lacking:
                raise ValueError(f"class {name!r} has no usable sample in the train shards of {self.root}, so it cannot be learnt")
            notes.extend(f"class {name!r} has no sample in {split}" for split in lacking)


def _list_members(path: Path) -> dict[str, dict[str, _Place]]:
    """Key -> suffix -> place, by the rules of webdataset's readers.

    Raises:
        ValueError: the file is no whole tar archive, or a key repeats.
    """
    from webdataset.tariterators import base_plus_ext  # here, because it loads torch

    samples: dict[str, dict[str, _Place]] = {}
    last, end = None, 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                end = info.offset_data + (-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if info.isreg() else 0)
                key, suffix = base_plus_ext(info.name)
                if not info.isreg() or _META.match(info.name) or key is None:
                    continue
                _check_text(path, info.name)
                suffix = suffix.lower()
                if key != last and key in samples:
                    raise ValueError(f"{path}: the key {key!r} repeats, at {info.name!r}. Give every sample of a shard a key of its own")
                parts = samples.setdefault(key, {})
                if suffix in parts:
                    raise ValueError(f"{path}: sample {key!r} has two members {suffix!r}. Give every sample of a shard a key of its own")
                parts[suffix] = _Place(info.name, info.offset_data, info.size)
                last = key
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar archive ({error}), {_after(last)}. Copy it again") from error
    # Tar readers take a damaged header, and a cut between two members, for the end of the archive.
    with path.open("rb") as file:
        file.seek(end)
        rest = 0
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise ValueError(f"{path}: damaged, {_after(last)}: what follows at byte {end} is no tar member. Copy it again")
            rest += len(block)
    if rest < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"{path}: cut short, {_after(last)}: the blocks that end a tar archive are missing. Copy it again")
    return samples


def _after(key: str | None) -> str:
    return "at its beginning" if key is None else f"after sample {key!r}"


def _check_text(path: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: the member name {name!r} is not valid UTF-8. Rename it") from None


def _split_source(source: str) -> tuple[str, str]:
    """A source as (shard, member)."""
    shard, _, name = source.partition(".tar/")
    return f"{shard}.tar", name


def _data(file: BinaryIO, place: _Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _picture(parts: Mapping[str, _Place]) -> _Place:
    pictures = [suffix for suffix in PICTURES if suffix in parts]
    if len(pictures) != 1:
        have = f"has {' and '.join(pictures)}" if pictures else f"has no picture ({', '.join(PICTURES)}), only {', '.join(sorted(parts))}"
        raise _UnusableError(have)
    return parts[pictures[0]]


def _note(data: bytes) -> Mapping[str, Any]:
    try:
        note = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"its json member cannot be read: {error}") from error
    if not isinstance(note, dict):
        raise _UnusableError(f"its json member is no object but {json.dumps(note)[:40]}")
    return note


def _landmarks(note: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    """(68, 2) points in pixels of the stored picture; None where the note has none."""
    points = note.get("landmarks")
    if points is None:
        return None
    try:
        array = np.asarray(points, dtype=np.float64)
    except (ValueError, TypeError):
        array = np.empty(0)
    if array.shape != (68, 2) or not np.isfinite(array).all():
        raise _UnusableError("its landmarks are neither null nor 68 pairs of finite numbers")
    if is_one_place(array):  # zeros or -1 for "no face found"
        return None
    if 0 < array.max() <= 1:
        raise _UnusableError("no coordinate of its landmarks exceeds 1; multiply them by the picture's width and height, pixels are needed")
    return array


def _identity(note: Mapping[str, Any]) -> str | None:
    identity = note.get("identity")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise _UnusableError(f"its identity {identity!r:.40} is neither a text nor a number")
    return None if identity is None else str(identity)


def _number(label: str | int) -> int | None:
    if isinstance(label, int):
        return label
    return int(label) if re.fullmatch(r"-?[0-9]{1,9}", label) else None
