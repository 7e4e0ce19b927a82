"""Pictures per second of the reader beside a plain webdataset pipeline, side by side in one run on one core.

    python benchmarks/readers.py                        # synthetic faces of 96 and 224 pixels, made on the spot
    python benchmarks/readers.py --folder data/raf_db   # a prepared dataset

Every way yields the same thing, uint8 batches with labels and landmarks (the plain pipeline leaves those in JSON's lists), in this
process, without workers. Files are in the page cache, hashes have been checked before the clock starts; passes of the ways alternate,
and the median, the slowest and the fastest pass are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from bench.data.index import load_index
from bench.data.readers import open_reader
from bench.prepare.pack import prepare


def ways(folder: Path, split: str, batch_size: int) -> dict[str, Callable[[int], Iterator[Any]]]:
    """Name of a way to read -> a function that starts pass number ``epoch``."""

    def train(**options: Any) -> Callable[[int], Iterator[Any]]:
        reader = open_reader(folder, split, **options)
        return lambda epoch: reader.train_steps(seed=0, epoch=epoch, rank=0, world_size=1, batch_size=batch_size)

    def first_pass(epoch: int) -> Iterator[Any]:
        return train(cache_bytes=1 << 40, verify=False)(epoch)

    def plain(_: int) -> Iterator[Any]:
        urls = [str(folder / shard.name) for shard in load_index(folder).splits[split].shards]
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(2048, initial=2048)
        return iter(dataset.decode("torchrgb8").to_tuple("jpg", "cls", "json").batched(batch_size, partial=False))

    return {
        "indexed, cached, first pass": first_pass,
        "indexed, cached": train(cache_bytes=1 << 40),
        "indexed, not cached": train(cache_bytes=0),
        "plain webdataset": plain,
    }


def measure(folder: Path, split: str, *, batch_size: int, passes: int) -> None:
    index = load_index(folder)
    batches = index.splits[split].samples // batch_size
    chosen = ways(folder, split, batch_size)
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    for epoch in range(passes + 1):
        for name, start in chosen.items():
            begin = time.perf_counter()
            count = sum(1 for _ in start(epoch))
            seconds = time.perf_counter() - begin
            assert count == batches, (name, count, batches)
            if epoch:  # pass 0 warms up: hashes, page cache, the decoded cache
                speeds[name].append(count * batch_size / seconds)
    jpeg = statistics.mean(member.jpg_bytes for member in index.splits[split].members)
    print(f"\n{index.name}, {index.image_size} px, {batches} batches of {batch_size}, JPEG {jpeg / 1000:.1f} kB, {passes} passes")
    for name, values in speeds.items():
        print(f"  {name:<28}{statistics.median(values):>9,.0f} pictures/s  ({min(values):,.0f} to {max(values):,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a prepared dataset; without it synthetic ones are made and removed")
    parser.add_argument("--split", default="train")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if args.folder is not None:
        measure(args.folder, args.split, batch_size=args.batch_size, passes=args.passes)
        return
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "synthetic"
            options = {"size": size, "train": args.samples, "val": 8, "test": 8, "val_identities": 8, "test_identities": 8}
            prepare("synthetic", name="synthetic", options=options, raw=None, out=folder, workers=1)
            measure(folder, "train", batch_size=args.batch_size, passes=args.passes)


if __name__ == "__main__":
    main()
