"""Open a split of a prepared dataset for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from bench.data.batch import Reader
from bench.data.indexed import IndexedReader
from bench.data.plan import Balance
from bench.data.samples import load_split
from bench.data.stream import StreamReader
from bench.registry import did_you_mean

Kind = Literal["indexed", "stream"]

CACHE_BYTES = 2 << 30
"""Decoded pictures up to this size are kept in memory, per process."""


def open_reader(
    folder: Path,
    split: str,
    *,
    kind: Kind = "indexed",
    workers: int = 0,
    cache_bytes: int = CACHE_BYTES,
    verify: bool = True,
    balance: Balance = "none",
    base_url: str | None = None,
    allow_pipe: bool = False,
) -> Reader:
    """Open one split.

    Args:
        folder: the prepared dataset; with ``base_url`` only its ``index.json`` is needed there.
        split: name of the split.
        kind: ``indexed``: random access, a true permutation in every epoch that does not depend on world size or workers;
            the shards lie in ``folder``. ``stream``: shards read front to back, for shards that are far away; the order
            depends on world size and workers too.
        workers: processes that decode, per rank; 0 decodes in this one. Not used by an indexed split that is cached.
        cache_bytes: ``indexed`` keeps the decoded uint8 split in memory if it is not larger than this; 0 never does.
        verify: compare the sha256 of every shard with the index: once per reader, before the first batch, or, behind
            ``base_url``, whenever a shard has been read to its end, besides the checksum of every sample. Sizes and
            counts are compared in any case.
        balance: how ``indexed`` draws an epoch, see `bench.data.plan.epoch_order`.
        base_url: ``stream`` only: where the shards are, such as ``https://host/folder``. ``{}`` in it stands for the
            shard's name, otherwise the name is appended.
        allow_pipe: accept a ``base_url`` that starts with ``pipe:``, whose command runs in a shell.

    Raises:
        FileNotFoundError: the folder is not a prepared dataset.
        ValueError: unknown split or kind, options that exclude each other, or an index that contradicts itself. Damaged
            shards and samples raise ValueError when they are read.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of reader {kind!r}.{did_you_mean(kind, get_args(Kind))}")
    if balance not in get_args(Balance):
        raise ValueError(f"unknown balance {balance!r}.{did_you_mean(balance, get_args(Balance))}")
    if workers < 0:
        raise ValueError(f"workers = {workers}: must be 0 (decode in this process) or more")
    samples = load_split(folder, split)
    if kind == "indexed":
        if base_url is not None:
            raise ValueError(f"the indexed reader needs the shards in {folder}: for shards at {base_url!r} use kind='stream'")
        return IndexedReader(samples, workers=workers, cache_bytes=cache_bytes, verify=verify, balance=balance)
    if balance != "none":
        raise ValueError(f"the stream reader cannot draw samples by class: use kind='indexed' for balance={balance!r}")
    return StreamReader(samples, base_url=base_url, allow_pipe=allow_pipe, workers=workers, verify=verify)
