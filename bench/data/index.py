"""``index.json``: what a prepared dataset is, down to the byte.

It is written last, so a folder with an index is a whole dataset. Every reader trusts the index and nothing else:
counts, offsets and hashes come from here, and a shard that disagrees is an error that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA = 1
INDEX_NAME = "index.json"
REPORT_NAME = "report.json"
"""The bad pictures and the notes of the index once more, for human eyes; nothing reads it."""


class Member(NamedTuple):
    """Where one sample lies inside its shard. Offsets point at the member's data, not at its tar header."""

    key: str
    label: int
    jpg_offset: int
    jpg_bytes: int
    cls_offset: int
    cls_bytes: int
    json_offset: int
    json_bytes: int
    crc32: int | None = None
    """`zlib.crc32` of the jpg, cls and json data in this order: tells *which* sample of a damaged shard is damaged."""
    person: int | None = None
    """Number of the person shown, where known: pictures of one person are not independent evidence."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Shard(_Frozen):
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str
    members: tuple[Member, ...]


class Split(_Frozen):
    """One split: its shards in order, and what their samples are together."""

    samples: int
    class_counts: dict[str, int]
    keys_sha256: str
    """`hash_keys` of all keys."""
    shards: tuple[Shard, ...]

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """All samples of the split in shard order; position here = sample index everywhere else."""
        return tuple(member for shard in self.shards for member in shard.members)


class BadPicture(_Frozen):
    """A picture that was left out, and why."""

    split: str
    source: str
    reason: str


class Index(_Frozen):
    """The whole of ``index.json``."""

    schema_version: int = SCHEMA
    name: str
    """What the user calls the dataset; the folder's name and the word in tables."""
    entry: str
    """The registered dataset that made it."""
    packer: str
    """Name and version of the code that wrote the shards."""
    options: dict[str, Any]
    """The entry's options, all of them."""
    classes: tuple[str, ...]
    image_size: int
    license: str
    provenance: dict[str, Any]
    bad_pictures: tuple[BadPicture, ...]
    splits: dict[str, Split]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides what a training sees: classes, size, and every shard's hash in order."""
        digest = hashlib.sha256()
        digest.update(repr((self.schema_version, self.classes, self.image_size)).encode())
        for split in sorted(self.splits):
            digest.update(split.encode())
            for shard in self.splits[split].shards:
                digest.update(shard.sha256.encode())
        return digest.hexdigest()


def partial_words(provenance: Mapping[str, Any]) -> str:
    """``train 40 of 12271 (7 classes), ...`` of the classes without their published number of pictures; empty where all have it."""
    partial: Mapping[str, Mapping[str, list[int]]] = provenance.get("partial") or {}
    return ", ".join(
        f"{split} {sum(have for have, _ in counts.values())} of {sum(count for _, count in counts.values())} "
        f"({len(counts)} {'class' if len(counts) == 1 else 'classes'})"
        for split, counts in partial.items()
    )


def hash_keys(keys: Iterable[str]) -> str:
    """sha256 of the sorted keys, newline-separated: equal exactly when two passes saw the same samples equally often."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def load_index(folder: Path) -> Index:
    """Read and check ``index.json`` of a prepared dataset.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset; the message gives the command that makes one.
        ValueError: the index is damaged or of an unknown schema version.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a prepared dataset: it has no {INDEX_NAME}. Make one with: bench data prepare NAME --raw DIR --out {folder}"
        )
    try:
        index = Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is damaged: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}. Prepare the dataset again."
        ) from error
    if index.schema_version != SCHEMA:
        raise ValueError(f"{path} has schema version {index.schema_version}, this bench reads {SCHEMA}. Prepare the dataset again.")
    return index


def count_classes(labels: Iterable[int], classes: tuple[str, ...]) -> Mapping[str, int]:
    """Samples per class name, in class order, zeros included."""
    counts = dict.fromkeys(classes, 0)
    for label in labels:
        counts[classes[label]] += 1
    return counts
