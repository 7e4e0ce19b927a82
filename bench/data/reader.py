"""The indexed reader: random access into tar shards through the byte offsets of the index."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.data import order as plan
from bench.data.batch import RawBatch
from bench.data.samples import LANDMARKS, Columns, SplitSamples, iterate, to_batch


class IndexedReader:
    """`Reader` of a split in a local folder. Made by `bench.data.readers.open_reader`.

    A split whose decoded pictures fit in ``cache_bytes`` is decoded once, by threads, and served from memory; what a pass
    does not need is not decoded. A larger one is decoded by worker processes in every pass.
    """

    def __init__(self, samples: SplitSamples, *, workers: int, cache_bytes: int, verify: bool, balance: plan.Balance) -> None:
        self.classes = samples.classes
        self.keys = samples.keys
        self.labels = samples.labels
        self.people = samples.people
        self._samples = samples
        self._disk = _DiskSamples(samples)
        self._workers = workers
        self._verify = verify
        self._checked = False
        self._balance = balance
        decoded = len(samples.members) * (3 * samples.image_size**2 + LANDMARKS * 2 * 4)
        self._memory = _MemorySamples(self._disk) if decoded <= cache_bytes else None

    def train_steps(self, *, seed: int, epoch: int, rank: int, world_size: int, batch_size: int, start_step: int = 0) -> Iterator[RawBatch]:
        """See `Reader`. Order: `bench.data.order.train_positions`.

        Raises:
            ValueError: the batch size does not fit the split or the world size; a shard or sample is damaged.
        """
        positions = plan.train_positions(
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            samples=len(self.keys),
            batch_size=batch_size,
            start_step=start_step,
            balance=self._balance,
            labels=self.labels.numpy(),
        )
        return self._serve(list(positions))

    def eval_batches(self, *, rank: int, world_size: int, batch_size: int) -> Iterator[RawBatch]:
        """See `Reader`. A contiguous range per rank, in order.

        Raises:
            ValueError: no such rank; a shard or sample is damaged.
        """
        plan.local_batch_size(batch_size=batch_size, world_size=1)
        own = plan.eval_range(rank=rank, world_size=world_size, samples=len(self.keys))
        ends = (min(start + batch_size, own.stop) for start in own[::batch_size])
        return self._serve([np.arange(start, stop) for start, stop in zip(own[::batch_size], ends, strict=True)])

    def _serve(self, batches: Sequence[plan.Positions]) -> Iterator[RawBatch]:
        # Checked here, when the pass is asked for and before a worker starts, not at its first batch.
        if not self._checked:
            self._samples.check_files(hashes=self._verify)
            self._checked = True
        if self._memory is not None:
            self._memory.fill(batches)
            return map(self._memory.batch, batches)
        return map(to_batch, iterate(self._disk, workers=self._workers, batches=batches))


class _ShardFiles:
    """Reads pieces of shards. Every process opens what it needs when it needs it; forked and spawned copies work alike."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type[_ShardFiles], tuple[Sequence[Path]]]:
        return _ShardFiles, (self._paths,)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes at ``offset``; fewer only at the end of the file. Safe in threads: there is no file position."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            opened = os.open(self._paths[shard], os.O_RDONLY)
            descriptor = self._descriptors.setdefault(shard, opened)
            if descriptor != opened:  # another thread was faster
                os.close(opened)
        return os.pread(descriptor, size, offset)


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class _DiskSamples(Dataset[Columns]):
    """Samples read and decoded on demand."""

    def __init__(self, samples: SplitSamples) -> None:
        self.samples = samples
        self._files = _ShardFiles([samples.folder / shard.name for shard in samples.shards])

    def decode(self, position: int) -> tuple[Tensor, Tensor]:
        """(3, S, S) uint8 picture and (68, 2) float32 landmarks.

        Raises:
            ValueError: the sample is damaged; names shard and key.
        """
        number, member = self.samples.shard_of(position), self.samples.members[position]
        shard = self.samples.shards[number]
        parts = []
        for name, offset, size in (
            ("jpg", member.jpg_offset, member.jpg_bytes),
            ("cls", member.cls_offset, member.cls_bytes),
            ("json", member.json_offset, member.json_bytes),
        ):
            try:
                data = self._files.read(number, offset, size)
            except OSError as error:
                raise self.samples.damaged(shard, f"cannot be read ({error})", key=member.key) from error
            if len(data) != size:
                raise self.samples.damaged(shard, f"the file ends inside its {name} member", key=member.key)
            parts.append(data)
        self.samples.check_crc(shard, member, parts)  # always: the hash of a shard was compared when it was opened, perhaps days ago
        jpg, cls, annotation = parts
        return self.samples.decode(shard, member, jpg=jpg, cls=cls, annotation=annotation)

    def __getitems__(self, positions: plan.Positions) -> Columns:
        """A whole batch at once: DataLoader calls this instead of item by item, so that a batch is five tensors to hand over."""
        images, landmarks = zip(*(self.decode(position) for position in positions.tolist()), strict=True)
        return self.samples.columns(torch.from_numpy(np.ascontiguousarray(positions)), torch.stack(images), torch.stack(landmarks))


class _MemorySamples:
    """Decoded samples, kept."""

    def __init__(self, disk: _DiskSamples) -> None:
        samples = disk.samples
        count, side = len(samples.members), samples.image_size
        self._disk = disk
        self._filled = np.zeros(count, dtype=np.bool_)
        self._images = torch.empty(count, 3, side, side, dtype=torch.uint8)
        self._landmarks = torch.empty(count, LANDMARKS, 2)

    def fill(self, batches: Sequence[plan.Positions]) -> None:
        """Decode what these batches need and is not there yet, with all cores of this process."""
        wanted = np.zeros_like(self._filled)
        for batch in batches:
            wanted[batch] = True
        missing = np.flatnonzero(wanted & ~self._filled).tolist()
        threads = min(len(missing), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        if not missing:
            return
        pool = ThreadPoolExecutor(threads)
        try:
            for _ in pool.map(self._decode, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, do not first decode all the others
        self._filled[missing] = True

    def _decode(self, position: int) -> None:
        self._images[position], self._landmarks[position] = self._disk.decode(position)

    def batch(self, positions: plan.Positions) -> RawBatch:
        """The batch of these positions, which have been filled; in pinned memory where there is CUDA."""
        index = torch.from_numpy(np.ascontiguousarray(positions))
        columns = self._disk.samples.columns(index, self._take(self._images, index), self._take(self._landmarks, index))
        return to_batch(columns)

    @staticmethod
    def _take(values: Tensor, index: Tensor) -> Tensor:
        out = torch.empty((len(index), *values.shape[1:]), dtype=values.dtype, pin_memory=torch.cuda.is_available())
        return torch.index_select(values, 0, index, out=out)
