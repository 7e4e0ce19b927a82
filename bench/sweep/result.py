"""From an evaluation to the record of a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.au.maps import expression_ids
from bench.backbone import BACKBONES
from bench.config import Settings
from bench.data.index import Index, hash_keys
from bench.evaluation.evaluator import Evaluated
from bench.evaluation.metrics import compute_metrics
from bench.io import timestamp
from bench.matrix import Cell, Training
from bench.method import Classifier
from bench.runtime.engine import Engine
from bench.sweep.record import CellName, CodeFacts, DataFacts, ProcessFacts, Record, hardware_facts
from bench.sweep.store import Hashes

PLACES = ("results", "data")
"""Keys of ``[run]`` that no record holds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What all records of an evaluation share."""

    settings: Settings
    code: CodeFacts
    index: Index
    engine: Engine
    seconds: float
    """Duration of the evaluation, which is one pass for several cells."""
    cells: int
    """Number of cells that the pass served."""
    macs: int
    """Multiply-accumulates of one picture."""
    weights: str
    """sha256 of the weights."""
    trained: Mapping[str, Any]
    """See `bench.training.trainer.read_trained`."""


def attention_layer(training: Training, settings: Settings, classifier: Classifier) -> int:
    """The first guided layer, or the layer that guidance would take. A configured layer may belong to another backbone of the run."""
    configured = [layer for layer in settings.config.guidance.layers if layer in classifier.backbone.channels]
    guided = training.settings.get("guidance", {}).get("layers") or configured
    return int((guided or BACKBONES.get(training.backbone).info.guided_layers)[0])


def compose_record(cell: Cell, result: Evaluated, facts: RunFacts, *, hashes: Hashes) -> Record:
    """The record of a cell.

    Args:
        cell: the cell.
        result: its evaluation.
        facts: of the training and the run.
        hashes: of the files beside the record.
    """
    training, index, config, trained, rows = cell.training, facts.index, facts.settings.config, facts.trained, result.rows
    expressive = (expression_ids(index.classes) > 0).tolist()
    return Record(
        key=cell.key,
        training_key=training.key,
        scheme=training.scheme,
        cell=CellName(
            method=cell.method, guidance=training.guidance, backbone=training.backbone, dataset=training.dataset.name, seed=training.seed
        ),
        trains_as=training.trains_as,
        variant=training.variant,
        protocol=training.settings["protocol"],
        method_options=dict(cell.method_options),
        training_options=dict(training.method_options),
        backbone_options=dict(training.backbone_options),
        keyed_code={**training.code, **cell.code},
        settings=dict(training.settings),
        brought=dict(training.brought),
        evaluation=dict(cell.evaluation),
        # The folders of this machine decide nothing, and may be private.
        config=config.model_dump(mode="json", exclude={"run": set(PLACES)}),
        origins={key: origin.text for key, origin in facts.settings.origins.items() if key not in {f"run.{name}" for name in PLACES}},
        data=DataFacts(
            entry=index.entry,
            fingerprint=index.fingerprint,
            classes=index.classes,
            split="test",
            samples=len(rows.keys),
            keys_sha256=hash_keys(rows.keys),
            bad_pictures=len(index.bad_pictures),
            provenance=index.provenance,
        ),
        attention_layer=result.attention_layer,
        metrics=compute_metrics(rows, classes=index.classes, expressive=expressive),
        invariance=dict(result.invariance),
        selection=dict(trained["best"]),
        epochs=trained["epochs"],
        processes=ProcessFacts(counts=tuple(trained["process_counts"]), dependent=tuple(trained["process_dependent"])),
        weights_sha256=facts.weights,
        rows_sha256=hashes.rows,
        maps_sha256=hashes.maps,
        code=facts.code,
        hardware=hardware_facts(facts.engine.device, world_size=facts.engine.world_size),
        cost=_cost(result, facts),
        seeds=training.seeds,
        finished=timestamp(),
    )


def _cost(result: Evaluated, facts: RunFacts) -> dict[str, Any]:
    trained = facts.trained
    return {
        "parameters": trained["parameters"],
        "macs": facts.macs,
        "training_seconds": trained["seconds"],
        "training_images_per_second": trained["images_per_second"],
        "training_peak_memory_bytes": trained["peak_memory_bytes"],
        "training_processes": trained["process_counts"][-1],
        "evaluation_seconds": facts.seconds,
        "evaluation_cells": facts.cells,
        "evaluation_images_per_second": len(result.rows.keys) / facts.seconds,
        "evaluation_peak_memory_bytes": result.peak_memory_bytes,
        "map_seconds_per_image": result.map_seconds_per_image,
    }
