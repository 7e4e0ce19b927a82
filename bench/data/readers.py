"""Open a split of a prepared dataset for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from bench.data.batch import Reader
from bench.data.order import Balance
from bench.data.reader import IndexedReader
from bench.data.samples import load_split
from bench.registry import did_you_mean

CACHE_BYTES = 2 << 30
"""Decoded pictures up to this size are kept in memory, per process."""


def open_reader(
    folder: Path,
    split: str,
    *,
    workers: int = 0,
    cache_bytes: int = CACHE_BYTES,
    verify: bool = True,
    balance: Balance = "none",
) -> Reader:
    """Open one split.

    Args:
        folder: the prepared dataset.
        split: name of the split.
        workers: processes that decode, per rank; 0 decodes in this one. Not used by a split that is cached.
        cache_bytes: keep the decoded uint8 split in memory if it is not larger than this; 0 never does.
        verify: compare the sha256 of every shard with the index, once per reader, before the first batch. Sizes, and the
            checksum of every sample read, are compared in any case.
        balance: how an epoch is drawn, see `bench.data.order.epoch_order`.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset.
        ValueError: unknown split or balance, or an index that contradicts itself. Damaged shards and
            samples raise ValueError when they are read.
    """
    if balance not in get_args(Balance):
        raise ValueError(f"unknown balance {balance!r}.{did_you_mean(balance, get_args(Balance))}")
    if workers < 0:
        raise ValueError(f"workers = {workers}: must be 0 (decode in this process) or more")
    return IndexedReader(load_split(folder, split), workers=workers, cache_bytes=cache_bytes, verify=verify, balance=balance)
