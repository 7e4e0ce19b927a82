"""The streaming reader: shards read front to back with webdataset, from a folder or from an address.

Only webdataset's openers, tar expansion and shuffle buffer are used. Who reads what is decided by
`bench.data.plan` (its own splitters drop or repeat samples with several nodes or workers), nothing is decoded by its
automatic decoders (they unpickle), and every sample is compared with the index, because a tar stream that ends early
looks like one that ends.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import random
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlparse

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen, gopen_schemes
from webdataset.handlers import reraise_exception
from webdataset.tariterators import tar_file_expander

from bench.data import plan
from bench.data.batch import RawBatch
from bench.data.samples import Columns, SplitSamples, iterate, to_batch

SHUFFLE_SAMPLES = 2048
"""Undecoded samples that a worker holds to draw from, while training."""


class StreamReader:
    """`Reader` of a split whose shards may be far away. Made by `bench.data.readers.open_reader`.

    The order of training is a function of (seed, epoch, world size, workers): shards in a new order, then samples through
    a shuffle buffer inside each worker's range.
    """

    def __init__(self, samples: SplitSamples, *, base_url: str | None, allow_pipe: bool, workers: int, verify: bool) -> None:
        self.classes = samples.classes
        self.keys = samples.keys
        self.labels = samples.labels
        self.people = samples.people
        self._samples = samples
        self._workers = workers
        self._local = base_url is None
        self._verify = verify
        self._checked = False
        # What lies in the folder is hashed before it is used; what comes from afar while it passes by.
        self._source = _Source(samples, base_url=base_url, allow_pipe=allow_pipe, hashes=verify and not self._local)

    def train_steps(self, *, seed: int, epoch: int, rank: int, world_size: int, batch_size: int, start_step: int = 0) -> Iterator[RawBatch]:
        """See `Reader`. Skipped steps are read over, not decoded.

        Raises:
            ValueError: the batch size does not fit the split or the world size; a shard or sample is damaged.
        """
        local = plan.local_batch_size(batch_size=batch_size, world_size=world_size)
        steps = plan.check_start(start_step, samples=len(self.keys), batch_size=batch_size)
        sizes = self._samples.shard_sizes
        order = plan.shard_order(seed=seed, epoch=epoch, shards=len(sizes)).tolist()
        ranges = plan.rank_ranges(sizes, order=order, rank=rank, world_size=world_size, workers=self._workers)
        chunks = plan.interleave(_lengths(ranges), chunk_size=local, total=steps * local)
        seeds = [plan.derive_seed(seed, "buffer", epoch, world_size, rank, worker) for worker in range(len(ranges))]
        return _rebatch(self._chunks(ranges, chunks, skip=start_step * local, seeds=seeds), local)

    def eval_batches(self, *, rank: int, world_size: int, batch_size: int) -> Iterator[RawBatch]:
        """See `Reader`. A contiguous range per rank, cut again for its workers.

        Raises:
            ValueError: no such rank; a shard or sample is damaged.
        """
        plan.local_batch_size(batch_size=batch_size, world_size=1)
        sizes = self._samples.shard_sizes
        ranges = plan.rank_ranges(sizes, order=range(len(sizes)), rank=rank, world_size=world_size, workers=self._workers)
        chunks = plan.interleave(_lengths(ranges), chunk_size=batch_size)
        return map(to_batch, self._chunks(ranges, chunks, skip=0, seeds=None))

    def _chunks(self, ranges: list[list[plan.Piece]], chunks: list[plan.Chunk], *, skip: int, seeds: list[int] | None) -> Iterator[Columns]:
        """The decoded chunks from sample number ``skip`` of the rank's sequence on."""
        if self._local and not self._checked:
            self._samples.check_files(hashes=self._verify)
            self._checked = True
        return self._load(_Pass(self._source, ranges, chunks, skip=skip, seeds=seeds), chunks, skip=skip)

    def _load(self, dataset: _Pass, chunks: list[plan.Chunk], *, skip: int) -> Iterator[Columns]:
        for chunk, columns in zip(chunks, iterate(dataset, workers=self._workers), strict=True):
            if columns is None:
                continue
            assert len(columns[0]) == chunk.length, (chunk, len(columns[0]))
            surplus = max(0, skip - chunk.at)
            first, second, third, fourth, fifth = (column[surplus:] for column in columns)
            yield first, second, third, fourth, fifth


class _Encoded(NamedTuple):
    """A sample as stored."""

    position: int
    jpg: bytes
    cls: bytes
    annotation: bytes


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _Source:
    """Undecoded samples of a split, in the order of their shard, each checked against the index."""

    def __init__(self, samples: SplitSamples, *, base_url: str | None, allow_pipe: bool, hashes: bool) -> None:
        self.samples = samples
        self._base_url = base_url
        self._hashes = hashes
        if base_url is None:
            return
        scheme = urlparse(base_url).scheme
        if scheme == "pipe" and not allow_pipe:
            raise ValueError(
                f"base_url {base_url!r} runs a command in a shell. If it is yours, allow it: open_reader(..., allow_pipe=True)"
            )
        known = sorted({"file", *gopen_schemes} - {"__default__"})
        if scheme not in known:
            raise ValueError(
                f"base_url {base_url!r}: no way to open {scheme or 'an address without a scheme'!r}. Known schemes: {', '.join(known)}; "
                "a local folder needs no base_url; anything else is reached with 'pipe:COMMAND {}' and allow_pipe=True"
            )

    def read(self, piece: plan.Piece) -> Iterator[_Encoded]:
        """The samples of a piece.

        Raises:
            ValueError: the shard does not hold what the index says, as far as it was read; names shard and key.
        """
        shard = self.samples.shards[piece.shard]
        to_the_end = piece.stop == shard.samples
        stream = self._open(piece.shard, piece.start)
        hashed = _Hashed(stream) if self._hashes and to_the_end else None
        try:
            found = tar_file_expander(iter([{"url": shard.name, "stream": hashed or stream}]), handler=reraise_exception, eof_value=None)
            for number in range(piece.stop):
                encoded = self._sample(found, piece.shard, number)
                if number >= piece.start:
                    yield encoded
            if to_the_end and (more := self._next(found, piece.shard, shard.samples - 1)) is not None:
                raise self.samples.damaged(shard, f"{more[0]!r} is in the shard but not in the index")
            if hashed is not None:
                self.samples.check_hash(shard, hashed.finish())
        finally:
            # A pipe that is left before its end reports that as an error of its own; all samples have been counted above.
            with contextlib.suppress(OSError):
                stream.close()

    def _open(self, shard: int, number: int) -> _Readable:
        name = self.samples.shards[shard].name
        try:
            if self._base_url is None:
                return (self.samples.folder / name).open("rb")
            url = self._base_url.replace("{}", name) if "{}" in self._base_url else f"{self._base_url.rstrip('/')}/{name}"
            stream: _Readable = gopen(url, "rb")
        except OSError as error:
            raise self._unreadable(shard, number, error) from error
        return stream

    def _next(self, found: Iterator[dict[str, Any]], shard: int, number: int) -> tuple[str, bytes] | None:
        """Name and content of the next member; None at the end of the stream, wherever that is."""
        try:
            file = next(found, None)
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise self._unreadable(shard, number, error) from error
        return None if file is None else (file["fname"], file["data"])

    def _unreadable(self, shard: int, number: int, error: Exception) -> ValueError:
        facts = self.samples.shards[shard]
        # webdataset appends its stream objects to the arguments and their addresses to the text.
        text = str(error.strerror or next(iter(error.args), "")) if isinstance(error, OSError) else str(next(iter(error.args), ""))
        reason = f"cannot be read ({type(error).__name__}: {text.split(' @ ')[0]})"
        return self.samples.damaged(facts, reason, key=facts.members[number].key)

    def _sample(self, found: Iterator[dict[str, Any]], shard: int, number: int) -> _Encoded:
        # Grouped here and not by webdataset, whose keys end at the first dot of a name (img.1.jpg and img.2.jpg would be one
        # sample), and which holds a sample back until the next one begins, so that an error would name the wrong one.
        facts = self.samples.shards[shard]
        member = facts.members[number]

        def damaged(what: str) -> ValueError:
            return self.samples.damaged(facts, what, key=member.key)

        sizes = {"jpg": member.jpg_bytes, "cls": member.cls_bytes, "json": member.json_bytes}
        stored: dict[str, bytes] = {}
        while missing := sizes.keys() - stored.keys():
            file = self._next(found, shard, number)
            lost = f"without its {' and '.join(sorted(missing))} member" if stored else "missing"
            if file is None:
                raise damaged(f"{lost}: the stream ends after {number} of {facts.samples} samples")
            name, data = file
            key, _, suffix = name.rpartition(".")
            if key != member.key or suffix not in missing:
                raise damaged(f"{lost}: the shard has {name!r} in its place")
            if len(data) != sizes[suffix]:
                raise damaged(f"its {suffix} member has {len(data)} bytes where the index says {sizes[suffix]}")
            stored[suffix] = data
        if self._hashes:
            self.samples.check_crc(facts, member, [stored[name] for name in sizes])
        return _Encoded(self.samples.starts[shard] + number, stored["jpg"], stored["cls"], stored["json"])


class _Pass(IterableDataset["Columns | None"]):
    """One pass of one rank, seen from its workers."""

    def __init__(
        self, source: _Source, ranges: list[list[plan.Piece]], chunks: list[plan.Chunk], *, skip: int, seeds: list[int] | None
    ) -> None:
        self._source = source
        self._ranges = ranges
        self._chunks = chunks
        self._skip = skip
        self._seeds = seeds

    def __iter__(self) -> Iterator[Columns | None]:
        """This worker's chunks in turn; None for one that lies before ``skip``, so that DataLoader's turns stay as planned."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        encoded = itertools.chain.from_iterable(map(self._source.read, self._ranges[worker]))
        if self._seeds is not None:
            rng = random.Random(self._seeds[worker])  # noqa: S311 - an order, not a secret
            encoded = wds.shuffle(SHUFFLE_SAMPLES, initial=SHUFFLE_SAMPLES, rng=rng)(encoded)
        for chunk in self._chunks:
            if chunk.worker == worker:
                taken = list(itertools.islice(encoded, chunk.length))
                yield self._decode(taken) if chunk.at + chunk.length > self._skip else None
        # Read on to the end of the range, past an epoch's remainder: what follows the last sample is checked there.
        collections.deque(encoded, maxlen=0)

    def _decode(self, encoded: Sequence[_Encoded]) -> Columns:
        samples = self._source.samples
        images, landmarks = zip(
            *(
                samples.decode(
                    samples.shards[samples.shard_of(e.position)], samples.members[e.position], jpg=e.jpg, cls=e.cls, annotation=e.annotation
                )
                for e in encoded
            ),
            strict=True,
        )
        positions = torch.tensor([e.position for e in encoded], dtype=torch.int64)
        return samples.columns(positions, torch.stack(images), torch.stack(landmarks))


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def close(self) -> None:
        self._stream.close()

    def finish(self) -> str:
        """sha256 of the whole stream, after reading what is left of it."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def _lengths(ranges: list[list[plan.Piece]]) -> list[int]:
    return [sum(piece.stop - piece.start for piece in pieces) for pieces in ranges]


def _rebatch(parts: Iterator[Columns], size: int) -> Iterator[RawBatch]:
    """Batches of exactly ``size`` samples out of parts of any size, without a copy where a part already is one."""
    held: list[Columns] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part[0])
        if count < size:
            continue
        first, second, third, fourth, fifth = held[0] if len(held) == 1 else (torch.cat(column) for column in zip(*held, strict=True))
        whole = count // size * size
        for at in range(0, whole, size):
            cut = slice(at, at + size)
            yield to_batch((first[cut], second[cut], third[cut], fourth[cut], fifth[cut]))
        count -= whole
        held = [(first[whole:], second[whole:], third[whole:], fourth[whole:], fifth[whole:])] if count else []
    assert count == 0, count
