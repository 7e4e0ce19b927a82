"""How fast and how large `bench data prepare` is: against a plain loop of the same Pillow calls, on trees of different size.

    python benchmarks/prepare.py affectnet SMALL_RAW LARGE_RAW [--option KEY=VALUE ...]

For each raw folder, in processes of their own with one thread each: (1) a plain loop that reads, decodes, scales and encodes every picture;
(2) `prepare` with one worker, which also aligns, checks, hashes, writes shards and fsyncs. Printed: pictures per second of both,
their ratio, and the peak of resident memory of each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.cli.data import parse_options
from bench.dataset import DATASETS
from bench.prepare.pack import prepare
from bench.registry import check_options


def plain_loop(entry: str, raw: Path, options: dict[str, object]) -> int:
    """The least that any program would do with Pillow."""
    from PIL import Image

    checked = check_options(DATASETS, entry, options)
    dataset = DATASETS.get(entry).target(checked, raw=raw)
    sources = [item.source for items in dataset.splits().values() for item in items]
    size = dataset.options.size
    started = time.perf_counter()
    for source in sources:
        with Image.open(io.BytesIO((raw / source).read_bytes())) as picture:
            scaled = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        scaled.save(io.BytesIO(), "JPEG", quality=dataset.options.quality, subsampling=0)
    report(len(sources), time.perf_counter() - started)
    return len(sources)


def packer(entry: str, raw: Path, options: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        index = prepare(entry, name=entry, options=options, raw=raw, out=Path(folder) / "out", workers=1, allow_partial=True)
        report(sum(split.samples for split in index.splits.values()), time.perf_counter() - started)


def report(pictures: int, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"pictures": pictures, "seconds": seconds, "rate": pictures / seconds, "peak_mib": peak}))


def child(what: str, arguments: argparse.Namespace, raw: Path) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, arguments.entry, str(raw), "--child", what]
    command += [word for option in arguments.option for word in ("--option", option)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry")
    parser.add_argument("raw", nargs="+", type=Path)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--child", choices=("loop", "prepare"))
    arguments = parser.parse_args()
    if arguments.child:
        run = plain_loop if arguments.child == "loop" else packer
        run(arguments.entry, arguments.raw[0], parse_options(arguments.option))
        return
    for raw in arguments.raw:
        loop, packed = child("loop", arguments, raw), child("prepare", arguments, raw)
        print(
            f"{raw.name}: {packed['pictures']:.0f} pictures; loop {loop['rate']:.0f}/s, prepare {packed['rate']:.0f}/s "
            f"(loop / prepare = {loop['rate'] / packed['rate']:.2f}); peak memory: loop {loop['peak_mib']:.0f} MiB, "
            f"prepare {packed['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
