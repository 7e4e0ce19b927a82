"""Results folders with little cells whose files agree with each other, made without training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bench.data.index import hash_keys
from bench.evaluation.class_maps import SIDE, AverageMaps, write_average_maps
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows, write_rows
from bench.io import file_sha256
from bench.sweep.record import CellName, CodeFacts, DataFacts, Record

CLASSES = ("neutral", "happiness", "sadness")
SAMPLES = 12


def random_rows(seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(CLASSES)), SAMPLES // len(CLASSES))
    valid = labels > 0
    cosines = {layer: np.where(valid, rng.random(SAMPLES), np.nan).astype(np.float32) for layer in (1, 5)}
    return Rows(
        keys=[f"k{i}" for i in range(SAMPLES)],
        labels=labels,
        people=np.full(SAMPLES, -1),
        logits=rng.standard_normal((SAMPLES, len(CLASSES))).astype(np.float32),
        au_valid=valid,
        attention_cosines=cosines,
        map_cosines_true=cosines[1] / 2,
        map_cosines_predicted=cosines[5] / 2,
    )


def random_maps(seed: int, *, positions: tuple[int, ...] = (0, 4, 8)) -> AverageMaps:
    rng = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)

    au_map = draw(len(CLASSES))
    au_map[0] = 0
    return AverageMaps(
        map=draw(len(CLASSES)),
        attention=draw(len(CLASSES)),
        au_map=au_map,
        count=np.full(len(CLASSES), SAMPLES // len(CLASSES)),
        example_position=np.array(positions),
        example_map=draw(len(positions)),
        example_attention=draw(len(positions)),
    )


def write_cell(
    results: Path,
    *,
    method: str = "cam",
    guidance: str = "none",
    backbone: str = "mini",
    dataset: str = "faces",
    seed: int = 0,
    entry: str = "folder",
    fingerprint: str = "f" * 64,
    maps: bool = True,
    protocol: str = "val",
) -> Path:
    """A finished cell below ``results``; its figures follow from its coordinates."""
    name = CellName(method=method, guidance=guidance, backbone=backbone, dataset=dataset, seed=seed)
    key = hashlib.sha256(f"{name}{protocol}{fingerprint}".encode()).hexdigest()
    folder = results / "cells" / key[:8]
    folder.mkdir(parents=True)
    rows = random_rows(int(key[:8], 16))
    write_rows(folder / "samples.parquet", rows)
    if maps:
        write_average_maps(folder / "maps.safetensors", random_maps(int(key[:8], 16)))
    train = {"epochs": 2, "lr": 0.1, "checkpoint_minutes": 1.0}
    settings = {"train": train, "augment": {}, "images": {"size": 64}, "protocol": protocol}
    if guidance == "au":
        settings["guidance"] = {"weight": 9.0, "layers": [5], "au_maps": "symmetric", "grid": 28}
    record = Record(
        key=key,
        training_key=hashlib.sha256(f"{guidance}{backbone}{seed}".encode()).hexdigest(),  # all methods read out one training
        scheme=2,
        cell=name,
        trains_as=method,
        variant="paper",
        protocol=protocol,
        method_options={},
        training_options={},
        backbone_options={},
        settings=settings,
        brought={},
        evaluation={"au_maps": "symmetric"},
        config={"train": train, "augment": {}, "images": {"size": 64}},
        origins={"train.epochs": "--set train.epochs=2", "train.lr": "default", "images.size": "bench.toml"},
        data=DataFacts(
            entry=entry,
            fingerprint=fingerprint,
            classes=CLASSES,
            split="test",
            samples=SAMPLES,
            keys_sha256=hash_keys(rows.keys),
            bad_pictures=0,
            provenance={"notes": [dataset]},
        ),
        attention_layer=5,
        metrics=compute_metrics(rows, classes=CLASSES, expressive=[False, True, True]),
        invariance=None,
        selection={"epoch": 2, "accuracy": 0.5},
        epochs=[
            {"epoch": 1, "lr": 0.1, "classification": 1.5, "guidance": 0.9},
            {"epoch": 2, "lr": 0.1, "classification": 1.25, "guidance": 0.5, "accuracy": 0.5},
        ],
        processes=None,
        weights_sha256="w",
        rows_sha256=file_sha256(folder / "samples.parquet"),
        maps_sha256=file_sha256(folder / "maps.safetensors") if maps else None,
        code=CodeFacts(
            version="0", commit=None, clean=None, dirty_diff_sha256=None, source_sha256=None, entries={}, libraries={"torch": "2"}
        ),
        hardware={"device": "cpu"},
        cost={"parameters": 1234567, "training_seconds": 3.5},
        seeds={"seed": seed},
        finished="2026-11-20T00:00:00+00:00",
    )
    (folder / "record.json").write_text(record.model_dump_json())
    (folder / "DONE").write_text(f"{file_sha256(folder / 'record.json')}\n")
    return folder


def write_matrix(results: Path) -> None:
    """Three rows, without and with guidance, two seeds."""
    for method, backbone in (("cam", "mini"), ("acol", "mini"), ("tscam", "mini-vit")):
        for guidance in ("none", "au"):
            for seed in (0, 1):
                write_cell(results, method=method, backbone=backbone, guidance=guidance, seed=seed)
