"""``bench data verify``: is a prepared dataset, byte for byte and sample for sample, what its index says?

Tar members are looked up where the index says they are, never by walking the archive: tar readers take a damaged header for the end of
the archive and silently return fewer samples. Nothing is unpickled, imported or executed; a member of any other kind than jpg, cls and
json is reported by name and left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bench.data.index import INDEX_NAME, REPORT_NAME, Index, Member, Shard, count_classes, hash_keys, load_index

_BLOCK = tarfile.BLOCKSIZE


class Problem(NamedTuple):
    """One difference between the index and what is there."""

    shard: str | None
    """File name; None if the difference is in the index or the folder."""
    key: str | None
    """Sample; None if no sample is concerned."""
    what: str

    def __str__(self) -> str:
        place = ", ".join([f"shard {self.shard}"] * (self.shard is not None) + [f"sample {self.key}"] * (self.key is not None))
        return f"{place}: {self.what}" if place else self.what


def verify(folder: Path, *, deep: bool = True, workers: int = 1, on_progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Compare a prepared dataset with its index.

    Args:
        folder: the prepared dataset.
        deep: read every byte: sha256 of each shard; tar header, padding, checksum, class, annotation and picture of each sample.
            Otherwise only the index itself, the list of files and their sizes.
        workers: processes that read shards, for ``deep``.
        on_progress: called with (samples done, samples in all) after every shard.

    Returns:
        The problems found, in the order of the index; empty if all is well.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index cannot be read.
    """
    index = load_index(folder)
    problems = [*_index_problems(index), *_undeclared(folder, index)]
    shards = [shard for split in index.splits.values() for shard in split.shards]
    total = sum(shard.samples for shard in shards)
    check = partial(_shard_problems, folder, index.image_size, deep)
    done = 0
    for shard, shard_problems in zip(shards, _each(check, shards, workers=min(workers, len(shards)) if deep else 1), strict=True):
        problems += shard_problems
        done += shard.samples
        if on_progress:
            on_progress(done, total)
    return problems


def _each(check: Callable[[Shard], list[Problem]], shards: Sequence[Shard], *, workers: int) -> Iterator[list[Problem]]:
    if workers <= 1:
        yield from map(check, shards)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(check, shards)


def _index_problems(index: Index) -> Iterator[Problem]:
    """Contradictions inside the index."""
    names: set[str] = set()
    for name, split in index.splits.items():
        for shard in split.shards:
            if shard.name in names or Path(shard.name).name != shard.name:
                yield Problem(None, None, f"{INDEX_NAME}: shard name {shard.name!r} is used twice or is no plain file name")
            names.add(shard.name)
            if shard.samples != len(shard.members):
                yield Problem(shard.name, None, f"{INDEX_NAME} counts {shard.samples} samples but lists {len(shard.members)}")
            for member in shard.members:
                if not 0 <= member.label < len(index.classes):
                    yield Problem(shard.name, member.key, f"{INDEX_NAME} gives class id {member.label} of {len(index.classes)} classes")
        keys = [member.key for member in split.members]
        labels = [member.label for member in split.members if 0 <= member.label < len(index.classes)]
        if sorted(set(keys)) != keys:
            yield Problem(None, None, f"{INDEX_NAME}: keys of split {name!r} are not unique and ascending")
        if split.samples != len(keys):
            yield Problem(None, None, f"{INDEX_NAME}: split {name!r} counts {split.samples} samples but lists {len(keys)}")
        if hash_keys(keys) != split.keys_sha256:
            yield Problem(None, None, f"{INDEX_NAME}: keys of split {name!r} do not have the hash that it states")
        if dict(count_classes(labels, index.classes)) != split.class_counts:
            yield Problem(None, None, f"{INDEX_NAME}: counts per class of split {name!r} are not those of its samples")


def _undeclared(folder: Path, index: Index) -> Iterator[Problem]:
    declared = {INDEX_NAME, REPORT_NAME} | {shard.name for split in index.splits.values() for shard in split.shards}
    for path in sorted(folder.iterdir()):
        if path.name not in declared:
            yield Problem(path.name if path.suffix == ".tar" else None, None, f"{path.name} is not declared in {INDEX_NAME}")


def _shard_problems(folder: Path, image_size: int, deep: bool, shard: Shard) -> list[Problem]:
    path = folder / shard.name
    first = shard.members[0].key if shard.members else None
    if not path.is_file():
        return [Problem(shard.name, first, "the file is missing")]
    size = path.stat().st_size
    problems = []
    if size != shard.bytes:
        lost = next((member.key for member in shard.members if _end(member) > size), None)
        problems.append(Problem(shard.name, lost, f"has {size} bytes, {shard.bytes} are declared"))
    if deep:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            problems.append(Problem(shard.name, None, "sha256 differs from the declared one"))
        problems += _content_problems(shard, data, image_size)
    return problems


def _content_problems(shard: Shard, data: bytes, image_size: int) -> Iterator[Problem]:
    position = 0  # where the next header must be
    for number, member in enumerate(shard.members):
        for suffix, offset, count in _parts(member):
            for what in _header_problems(data, f"{member.key}.{suffix}", position, offset, count):
                yield Problem(shard.name, member.key, what)
            position = offset + _padded(count)
        if _end(member) > len(data):
            lost = len(shard.members) - number
            yield Problem(shard.name, member.key, f"the shard ends inside this sample: {lost} of {len(shard.members)} samples are lost")
            return
        for what in _sample_problems(member, data, image_size):
            yield Problem(shard.name, member.key, what)
    last = shard.members[-1].key if shard.members else None
    tail = data[position:]
    if tail.strip(b"\0"):
        yield Problem(shard.name, last, f"after this sample comes {_named(data, position)}, which is not declared")
    elif len(tail) < 2 * _BLOCK:
        yield Problem(shard.name, last, "the blocks that end the archive are missing after this sample")


def _header_problems(data: bytes, name: str, position: int, offset: int, count: int) -> Iterator[str]:
    header = offset - _BLOCK
    if header != position:
        yield f"{name} should begin at byte {position} but is declared at {header}: before it comes {_named(data, position)}"
    if header + _BLOCK > len(data):
        return  # the caller reports where the shard ends
    try:
        info = tarfile.TarInfo.frombuf(data[header : header + _BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        yield f"the tar header of {name} is damaged ({error}); common readers would stop here without an error"
        return
    if info.name != name or not info.isreg():
        yield f"where {name} is declared lies {info.name!r}{'' if info.isreg() else ', which is no plain file'}"
    elif info.size != count:
        yield f"{name} has {info.size} bytes, {count} are declared"
    if data[offset + count : offset + _padded(count)].strip(b"\0"):
        yield f"the padding after {name} is not empty"


def _sample_problems(member: Member, data: bytes, image_size: int) -> Iterator[str]:
    parts = {suffix: data[offset : offset + count] for suffix, offset, count in _parts(member)}
    crc = 0
    for content in parts.values():
        crc = zlib.crc32(content, crc)
    if member.crc32 is not None and crc != member.crc32:
        yield "its data does not have the declared checksum"
    if parts["cls"] != str(member.label).encode():
        yield f"its cls member says {parts['cls'][:20]!r}, class id {member.label} is declared"
    yield from _annotation_problems(parts["json"])
    yield from _picture_problems(parts["jpg"], image_size)


def _annotation_problems(content: bytes) -> Iterator[str]:
    try:
        annotation: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        yield f"its json member cannot be read: {error}"
        return
    if not isinstance(annotation, Mapping) or not {"landmarks", "identity", "source"} <= annotation.keys():
        yield "its json member lacks landmarks, identity or source"
        return
    points = annotation["landmarks"]
    if points is not None and not (
        isinstance(points, list)
        and len(points) == 68
        and all(isinstance(p, list) and len(p) == 2 and all(type(v) in (int, float) and math.isfinite(v) for v in p) for p in points)
    ):
        yield "its landmarks are neither null nor 68 pairs of finite numbers"


def _picture_problems(content: bytes, image_size: int) -> Iterator[str]:
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
            if picture.size != (image_size, image_size) or picture.mode != "RGB":
                yield f"its picture is {picture.width} x {picture.height} {picture.mode}, {image_size} x {image_size} RGB is declared"
                return  # and its pixels are not unpacked: there may be very many
            picture.load()
    except Exception as error:  # noqa: BLE001 - whatever a decoder makes of damaged bytes
        yield f"its picture cannot be decoded: {error}"


def _parts(member: Member) -> tuple[tuple[str, int, int], ...]:
    """(suffix, offset, bytes) in the order in which the packer writes them."""
    return (
        ("jpg", member.jpg_offset, member.jpg_bytes),
        ("cls", member.cls_offset, member.cls_bytes),
        ("json", member.json_offset, member.json_bytes),
    )


def _named(data: bytes, position: int) -> str:
    """What lies at a header position, for a message."""
    try:
        return repr(tarfile.TarInfo.frombuf(data[position : position + _BLOCK], "utf-8", "surrogateescape").name)
    except tarfile.HeaderError:
        return "something that is no tar member"


def _end(member: Member) -> int:
    return max(offset + count for _, offset, count in _parts(member))


def _padded(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK
