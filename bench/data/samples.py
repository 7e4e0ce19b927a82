"""What the index says about one split, and how one stored sample is decoded."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import mmap
import os
import re
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torchvision.io  # defines torch.ops.image
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.data.batch import RawBatch, key_hash
from bench.data.index import INDEX_NAME, Member, Shard, count_classes, hash_keys, load_index
from bench.io import file_sha256
from bench.registry import did_you_mean

LANDMARKS = 68
_ALIGNED = 64
"""Bytes: where a column may begin in memory."""

Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of `RawBatch` in order. DataLoader pins tuples, but not classes it does not know."""


@dataclasses.dataclass(frozen=True)
class SplitSamples:
    """One split as its index describes it. Holds no file open: cheap to copy into worker processes."""

    folder: Path
    split: str
    classes: tuple[str, ...]
    image_size: int
    shards: tuple[Shard, ...]
    members: tuple[Member, ...]

    @functools.cached_property
    def keys(self) -> Sequence[str]:
        """(N,) keys by position."""
        return tuple(member.key for member in self.members)

    @functools.cached_property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.tensor([member.label for member in self.members], dtype=torch.int64)

    @functools.cached_property
    def people(self) -> Tensor:
        """(N,) int64, number of the person shown; -1 = unknown."""
        return torch.tensor([-1 if member.person is None else member.person for member in self.members], dtype=torch.int64)

    @functools.cached_property
    def hashes(self) -> Tensor:
        """(N,) int64, `key_hash` of the keys."""
        return torch.tensor([key_hash(key) for key in self.keys], dtype=torch.int64)

    def shard_of(self, position: int) -> int:
        """Number of the shard that holds a sample."""
        # The last shard that starts there: one without samples starts where the next one does.
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    @functools.cached_property
    def _starts(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """(shards,) position of the first sample of every shard."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)[:-1]

    def damaged(self, shard: Shard, what: str, *, key: str | None = None) -> ValueError:
        """The error for a shard that is not what the index says."""
        sample = "" if key is None else f", sample {key!r}"
        return ValueError(
            f"shard {shard.name} of split {self.split!r}{sample}: {what}. "
            f"To check the whole dataset: bench data verify {self.folder}. If it is damaged, copy or prepare it again"
        )

    def check_files(self, *, hashes: bool) -> None:
        """Compare the size, and with ``hashes`` the sha256, of every shard in the folder with the index.

        Raises:
            ValueError: a shard is missing or differs; the message names it and, if it is too short, the first sample lost.
        """
        for shard in self.shards:
            path = self.folder / shard.name
            if not path.is_file():
                raise self.damaged(shard, "the file does not exist", key=shard.members[0].key if shard.members else None)
            size = path.stat().st_size
            if size != shard.bytes:
                ends = (
                    (m.key, max(m.jpg_offset + m.jpg_bytes, m.cls_offset + m.cls_bytes, m.json_offset + m.json_bytes))
                    for m in shard.members
                )
                lost = next((key for key, end in ends if end > size), None)
                raise self.damaged(shard, f"has {size} bytes where the index says {shard.bytes}", key=lost)
            if hashes:
                sha256 = file_sha256(path)
                if sha256 != shard.sha256:
                    raise self.damaged(
                        shard, f"its sha256 is {sha256[:16]}... where the index says {shard.sha256[:16]}...: its content has changed"
                    )

    def check_crc(self, shard: Shard, member: Member, parts: Sequence[bytes]) -> None:
        """Raise ValueError unless the jpg, cls and json data of a sample are those of the index; indexes of old have no checksum."""
        if member.crc32 is not None and functools.reduce(_crc32, parts, 0) != member.crc32:
            raise self.damaged(shard, "its content is not that of the index (crc32 differs)", key=member.key)

    def decode(self, shard: Shard, member: Member, *, jpg: bytes, cls: bytes, annotation: bytes) -> tuple[Tensor, Tensor]:
        """Decode one sample and compare it with the index.

        Returns:
            The picture, (3, S, S) uint8, and its landmarks, (68, 2) float32, NaN if the face has none.

        Raises:
            ValueError: the picture, class or annotation is not what the index promises; names shard and key.
        """
        try:
            image = decode_jpeg(jpg)
        except (RuntimeError, ValueError, OSError) as error:
            raise self.damaged(shard, f"the picture cannot be decoded ({str(error).splitlines()[0]})", key=member.key) from error
        if image.shape != (3, self.image_size, self.image_size):
            height, width = image.shape[-2:]
            raise self.damaged(
                shard, f"the picture is {width} x {height} where the index says {self.image_size} x {self.image_size}", key=member.key
            )
        # Compared as text: int() would take " 1_0 ", and there is one way to write a class.
        if cls.strip() != str(member.label).encode():
            raise self.damaged(shard, f"class {cls[:20]!r} where the index says {member.label}", key=member.key)
        return image, self._landmarks(shard, member, annotation)

    def _landmarks(self, shard: Shard, member: Member, annotation: bytes) -> Tensor:
        try:
            points = json.loads(annotation)["landmarks"]
            if points is None:
                return torch.full((LANDMARKS, 2), torch.nan)
            array = np.asarray(points, dtype=np.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise self.damaged(
                shard, f"its json member is not an annotation with landmarks ({type(error).__name__}: {error})", key=member.key
            ) from error
        if array.shape != (LANDMARKS, 2) or not np.isfinite(array).all():
            raise self.damaged(shard, f"landmarks must be null or {LANDMARKS} finite points, got shape {array.shape}", key=member.key)
        return torch.from_numpy(array)

    def columns(self, positions: Tensor, images: Tensor, landmarks: Tensor) -> Columns:
        """Complete decoded samples, (B, 3, S, S) and (B, 68, 2), with what the index knows at their (B,) positions."""
        return positions, self.hashes[positions], images, self.labels[positions], landmarks


def decode_with_torchvision(jpg: bytes) -> Tensor:
    """A JPEG file as (3, height, width) uint8, RGB: twice as fast as with Pillow, equal to the bit.

    Raises:
        RuntimeError: not a JPEG file, or a truncated one.
    """
    # The operator itself: the Python function around it warns at every call that TorchCodec will follow. A copy of the
    # bytes, because torch wants memory that it may write to.
    data = torch.frombuffer(bytearray(jpg), dtype=torch.uint8)
    image: Tensor = torch.ops.image.decode_jpeg(data, torchvision.io.ImageReadMode.RGB.value, False)
    return image


def decode_with_pillow(jpg: bytes) -> Tensor:
    """As `decode_with_torchvision`, for a torchvision without its decoder, which it has announced.

    Raises:
        OSError: not a JPEG file, or a truncated one.
    """
    with Image.open(io.BytesIO(jpg), formats=("JPEG",)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


decode_jpeg = decode_with_torchvision if hasattr(torch.ops.image, "decode_jpeg") else decode_with_pillow


def to_batch(columns: Columns) -> RawBatch:
    """The batch of these columns."""
    positions, hashes, images, labels, landmarks = columns
    return RawBatch(positions=positions, hashes=hashes, images=images, labels=labels, landmarks=landmarks)


def _crc32(so_far: int, data: bytes) -> int:
    return zlib.crc32(data, so_far)


def iterate(dataset: Dataset[Any], *, workers: int, batches: Sequence[Any]) -> Iterator[Any]:
    """What torch's DataLoader makes of a dataset that yields finished batches; pinned where there is CUDA.

    Batches come from the workers in files of no folder: see `_Parcel`.

    Args:
        dataset: has ``__getitems__``, which gives tuples of tensors.
        workers: processes; they end with the pass. 0 stays in this one.
        batches: what to ask the dataset for, batch by batch.
    """
    collate: Callable[[Any], Any] = _Parcel if workers else _as_is
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
            # A generator of its own: the default one would take a number from torch's global stream, which is the model's.
            generator=torch.Generator(),
        )
    )
    try:
        yield from loader
    except ValueError as error:
        if workers == 0:
            raise
        # The frames below hold the iterator in a cycle with the error. Collected as a cycle, it waits five seconds for every
        # worker, since its queues are gone before it is; let go of here, it ends them at once. The text has the worker's trace.
        del loader
        raise error.with_traceback(None) from None


def _leave_signals_to_the_parent(_: int) -> None:
    # Ctrl-C and a batch system's warning go to the whole process group. They ask the parent to save, for which it still needs its
    # workers. SIGTERM keeps its meaning: it is how the parent ends them.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch


class _Parcel:
    """A batch on its way from a worker, in a file that has no name. Its descriptor is pickled, and at the other end there are tensors.

    torch hands tensors over in /dev/shm, of which a container has 64 MiB. Where that is full, it drops the batch in a thread of the worker,
    and whoever waits for it waits for ever. A file of no folder takes memory like any other object; and what fails here fails in the
    worker's own code, which tells the parent.
    """

    def __init__(self, columns: tuple[Tensor, ...]) -> None:
        self._layout: list[tuple[str, tuple[int, ...], int]] = []
        with os.fdopen(os.memfd_create("batch"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as file:
            for column in columns:
                array = np.ascontiguousarray(column.numpy())
                file.write(bytes(-file.tell() % _ALIGNED))
                self._layout.append((array.dtype.str, array.shape, file.tell()))
                file.write(array.data)
            file.flush()
            self._descriptor = DupFd(file.fileno())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self._descriptor, self._layout)


def _unpack(descriptor: Any, layout: list[tuple[str, tuple[int, ...], int]]) -> tuple[Tensor, ...]:
    number = descriptor.detach()
    try:
        memory = mmap.mmap(number, 0)
    finally:
        os.close(number)
    return tuple(
        torch.from_numpy(np.frombuffer(memory, dtype, count=math.prod(shape), offset=start).reshape(shape))
        for dtype, shape, start in layout
    )


def load_split(folder: Path, split: str) -> SplitSamples:
    """Read one split of a prepared dataset's index, and check that the index agrees with itself.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset.
        ValueError: no such split (the message lists those there are), or the index contradicts itself.
    """
    index = load_index(folder)
    if split not in index.splits:
        raise ValueError(f"dataset {index.name!r} in {folder} has no split {split!r}.{did_you_mean(split, index.splits)}")
    facts = index.splits[split]
    members = facts.members
    keys = [member.key for member in members]
    where = f"{folder / INDEX_NAME}, split {split!r}"
    again = "Prepare the dataset again"
    for shard in facts.shards:
        name = PurePosixPath(shard.name)
        # Names go into paths, addresses and, where allowed, command lines: nothing may leave the folder or be an option.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", shard.name) or ".." in name.parts:
            raise ValueError(f"{where}: shard name {shard.name!r} is not a plain relative path. {again}")
        if len(shard.members) != shard.samples:
            raise ValueError(f"{where}: shard {shard.name} lists {len(shard.members)} members for {shard.samples} samples. {again}")
    if len(members) != facts.samples or len(set(keys)) != len(keys):
        raise ValueError(f"{where}: {facts.samples} samples, but {len(members)} members with {len(set(keys))} different keys. {again}")
    if hash_keys(keys) != facts.keys_sha256:
        raise ValueError(f"{where}: the keys are not those of keys_sha256. {again}")
    if any(not 0 <= member.label < len(index.classes) for member in members):
        raise ValueError(f"{where}: a label lies outside the {len(index.classes)} classes. {again}")
    if count_classes((member.label for member in members), index.classes) != facts.class_counts:
        raise ValueError(f"{where}: the labels do not add up to class_counts. {again}")
    return SplitSamples(folder, split, index.classes, index.image_size, facts.shards, members)
