"""Seconds and memory of a large leaderboard: 2,000 records with 3,000 samples each, read, judged, and written in every format.

    OMP_NUM_THREADS=2 python benchmarks/leaderboard.py [--datasets 1] [--folder DIR]

20 methods x 10 backbones x 2 guidances x 5 seeds of invented figures: one dataset gives one table with 200 rows, of which every pair
is tested in every column; several datasets (of fewer backbones each) give smaller tables and a ranking. The folder is made once and
used again where it is there. What is measured runs in a process of its own, so that its peak memory is that of the leaderboard alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.config import load_settings
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows, write_rows
from bench.matrix import digest
from bench.reporting.tables.evidence import load_runs
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.render import FORMATS, render, rich_tables
from bench.sweep.record import CellName, CodeFacts, DataFacts, Record
from bench.sweep.store import DONE, RECORD, ROWS

METHODS, BACKBONES, SEEDS, SAMPLES, PEOPLE = 20, 10, 5, 3000, 600
CLASSES = ("neutral", "happiness", "surprise", "fear", "anger", "disgust", "sadness")
EXPRESSIVE = [name != "neutral" for name in CLASSES]


def make(root: Path, *, datasets: int) -> None:
    """Write all records below a folder."""
    config = load_settings(environ={}).config.model_dump(mode="json")
    draw = np.random.default_rng(0)
    for number in range(datasets):
        labels, people = draw.integers(0, len(CLASSES), SAMPLES), draw.integers(0, PEOPLE, SAMPLES)
        for method in range(METHODS):
            for backbone in range(number, BACKBONES, datasets):
                for guidance in ("none", "au"):
                    for seed in range(SEEDS):
                        cell = CellName(
                            method=f"method{method}",
                            guidance=guidance,
                            backbone=f"backbone{backbone // datasets}",
                            dataset=f"faces{number}",
                            seed=seed,
                        )
                        write(root, cell, invent(draw, labels, people, skill=1 + method / METHODS + (guidance == "au")), config)


def invent(draw: np.random.Generator, labels: np.ndarray, people: np.ndarray, *, skill: float) -> Rows:
    """Rows of one cell, the better the larger ``skill``."""
    logits = draw.standard_normal((SAMPLES, len(CLASSES)), dtype=np.float32)
    logits[np.arange(SAMPLES), labels] += skill
    valid = labels > 0

    def cosines() -> np.ndarray:
        values = 0.2 * skill + 0.1 * draw.standard_normal(SAMPLES, dtype=np.float32)
        return np.where(valid, values, np.nan).astype(np.float32)

    return Rows(
        keys=[f"{i:08d}" for i in range(SAMPLES)],
        labels=labels,
        people=people,
        logits=logits,
        au_valid=valid,
        attention_cosines={layer: cosines() for layer in range(1, 6)},
        map_cosines_true=cosines(),
        map_cosines_predicted=cosines(),
    )


def write(root: Path, cell: CellName, rows: Rows, config: dict) -> None:
    """A cell's folder, as `bench.sweep.store.Store` would write it."""
    settings = {section: config[section] for section in ("train", "augment", "images")} | {"protocol": "val"}
    if cell.guidance == "au":
        settings["guidance"] = config["guidance"] | {"layers": [5]}
    key = digest(cell.model_dump())
    record = Record(
        key=key,
        training_key=key,
        scheme=2,
        cell=cell,
        trains_as=cell.method,
        variant="paper",
        protocol="val",
        method_options={},
        training_options={},
        backbone_options={},
        settings=settings,
        brought={},
        evaluation={"au_maps": "symmetric", "measures": []},
        config=config,
        origins={f"train.{name}": "default" for name in config["train"]},
        data=DataFacts(
            entry="folder",
            fingerprint=digest(cell.dataset),
            classes=CLASSES,
            split="test",
            samples=SAMPLES,
            keys_sha256=digest("keys"),
            bad_pictures=0,
            provenance={},
        ),
        attention_layer=5,
        metrics=compute_metrics(rows, classes=CLASSES, expressive=EXPRESSIVE),
        invariance=None,
        selection={"epoch": 19, "accuracy": 0.5},
        epochs=[{"epoch": epoch, "loss": 1 / (epoch + 1), "accuracy": 0.5, "seconds": 60.0} for epoch in range(20)],
        processes=None,
        weights_sha256=key,
        rows_sha256=key,
        maps_sha256=None,
        code=CodeFacts(version="0", commit=None, clean=None, dirty_diff_sha256=None, source_sha256=None, entries={}, libraries={}),
        hardware={"device": "cpu", "name": "x86_64", "processes": 1},
        cost={"parameters": 23_522_375, "training_seconds": 1000.0, "training_images_per_second": 240.0},
        seeds={"seed": cell.seed},
        finished="2026-11-20T00:00:00+00:00",
    )
    folder = root / "cells" / cell.dataset / cell.backbone / cell.method / cell.guidance / f"seed{cell.seed}"
    folder.mkdir(parents=True)
    write_rows(folder / ROWS, rows)
    (folder / RECORD).write_text(record.model_dump_json(indent=2))
    (folder / DONE).touch()


def measure(root: Path) -> None:
    """Build everything once, and print what each part took."""
    start, cpu = time.perf_counter(), time.process_time()
    last = start

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{name:>12}: {now - last:6.2f} s")
        last = now

    runs = tuple(load_runs(root))
    lap(f"read {len(runs)}")
    tables = build_tables(runs)
    lap("judge")
    rankings = rank(tables)
    lap("rank")
    for fmt in FORMATS:
        text = render(tables, fmt, rankings=rankings, columns="all")
        lap(f"{fmt} {len(text) // 1024} KiB")
    rich_tables(tables, rankings=rankings, columns="all")
    lap("terminal")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'in all':>12}: {last - start:6.2f} s, of which {time.process_time() - cpu:.2f} s on the processor; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=1, choices=(1, 2, 5))
    parser.add_argument("--folder", type=Path, help="where the records are, or are to be made [default: a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "results"
        if not folder.exists():
            make(folder, datasets=options.datasets)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder,))
        process.start()
        process.join()
