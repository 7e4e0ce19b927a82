"""Run a plan: train what is not trained, evaluate once per training, write records, go on after failures."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import time
import traceback
from collections.abc import Mapping
from typing import Any

from bench.au.maps import expression_ids
from bench.backbone import BACKBONES
from bench.config import Settings
from bench.data.batch import Reader
from bench.data.index import Index, hash_keys
from bench.data.readers import open_reader
from bench.evaluation.evaluator import accuracy, evaluate
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows
from bench.matrix import Cell, Planned, Training
from bench.method import Classifier
from bench.sweep.datasets import Source
from bench.sweep.plan import Plan
from bench.sweep.record import CellName, DataFacts, Record, code_facts, hardware_facts
from bench.sweep.store import Store
from bench.training.build import build_reader
from bench.training.checkpoint import hash_weights
from bench.training.engine import Engine
from bench.training.observer import Observer
from bench.training.trainer import load_trained, read_trained, train

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    ran: tuple[Cell, ...]
    skipped: tuple[Cell, ...]
    failed: Mapping[str, str]
    """Cell label -> error."""
    trained: int
    seconds: float


def run_plan(plan: Plan, *, engine: Engine, observer: Observer) -> Outcome:
    """Do what is missing. Every dataset of the plan must be prepared.

    A training or read-out that fails is recorded with its error, and the others go on.
    """
    started = time.monotonic()
    store = Store(plan.settings.config.run.results)
    if engine.is_main:
        store.sweep_leftovers()
    to_do = engine.from_main([[cell.key for cell in planned.cells] for planned in plan.to_do])  # one view of what is missing
    wanted = {key for keys in to_do for key in keys}
    ran: list[Cell] = []
    failed: dict[str, str] = {}
    trained = 0
    readers = _Readers(plan, engine)
    for training, cells in plan.matrix.trainings:
        missing = [cell for cell in cells if cell.key in wanted]
        if not missing:
            continue
        fresh = engine.from_main(not store.is_trained(training))
        errors = _run_training(Planned(training, tuple(missing)), plan.settings, store, readers, engine, observer, fresh=fresh)
        trained += fresh and len(errors) < len(missing)
        ran += [cell for cell in missing if cell.label not in errors]
        failed |= errors
    skipped = tuple(cell for cell in plan.matrix.cells if cell.key not in wanted)
    return Outcome(ran=tuple(ran), skipped=skipped, failed=failed, trained=trained, seconds=time.monotonic() - started)


def _run_training(
    planned: Planned, settings: Settings, store: Store, readers: _Readers, engine: Engine, observer: Observer, *, fresh: bool
) -> dict[str, str]:
    """Train if ``fresh``, and evaluate; returns cell label -> error of those that failed."""
    training, cells = planned
    try:
        source = readers.source(training)
        folder = store.training_folder(training)
        config = settings.config
        if fresh:
            selection = readers.open(training, "test" if training.settings["protocol"] == "test-selected" else "val")

            def select(classifier: Classifier) -> float:
                size = training.settings["images"]["size"]
                return accuracy(classifier, selection, size=size, batch_size=config.evaluation.batch_size, engine=engine)

            train(
                training,
                folder=folder,
                reader=readers.open(training, "train"),
                select=select,
                engine=engine,
                observer=observer,
                checkpoint_minutes=config.train.checkpoint_minutes,
            )
        assert source.index is not None
        classifier = load_trained(training, folder, num_classes=len(source.index.classes)).to(engine.device)
        groups = [cells]
        errors: dict[str, str] = {}
        while groups:
            group = groups.pop(0)
            try:
                _evaluate_cells(
                    training, group, classifier, settings, source.index, store, readers.open(training, "test"), engine, observer
                )
            except Exception as error:  # noqa: BLE001 - a read-out may be anyone's code
                if len(group) > 1:  # one read-out is at fault: find out which, and keep the others
                    groups += [(cell,) for cell in group]
                else:
                    errors |= _fail(group, error, store, engine)
        return errors
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in one cell, the others go on
        engine.release()
        return _fail(cells, error, store, engine)


def _evaluate_cells(
    training: Training,
    cells: tuple[Cell, ...],
    classifier: Classifier,
    settings: Settings,
    index: Index,
    store: Store,
    reader: Reader,
    engine: Engine,
    observer: Observer,
) -> None:
    started = time.monotonic()
    results = evaluate(
        classifier,
        {cell.method: build_reader(cell) for cell in cells},
        reader,
        size=training.settings["images"]["size"],
        batch_size=settings.config.evaluation.batch_size,
        au_variant=settings.config.evaluation.au_maps,
        keys_sha256=index.splits["test"].keys_sha256,
        engine=engine,
        observer=observer,
        label=f"{training.label} evaluation",
    )
    seconds = time.monotonic() - started
    if engine.is_main:
        weights = hash_weights(classifier)
        for cell in cells:
            rows = results[cell.method]
            temporary, rows_sha256 = store.write_rows(cell, rows)
            facts = _Facts(settings=settings, index=index, engine=engine, seconds=seconds, weights=weights, rows_sha256=rows_sha256)
            store.finish(cell, temporary, _record(cell, rows, read_trained(store.training_folder(training)), facts))
    engine.wait()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    settings: Settings
    index: Index
    engine: Engine
    seconds: float
    weights: str
    rows_sha256: str


def _record(cell: Cell, rows: Rows, trained: Mapping[str, Any], facts: _Facts) -> Record:
    training, index, config = cell.training, facts.index, facts.settings.config
    guided = (
        training.settings.get("guidance", {}).get("layers") or config.guidance.layers or BACKBONES.get(training.backbone).info.guided_layers
    )
    expressive = (expression_ids(index.classes) > 0).tolist()
    return Record(
        key=cell.key,
        training_key=training.key,
        cell=CellName(
            method=cell.method, guidance=training.guidance, backbone=training.backbone, dataset=training.dataset.name, seed=training.seed
        ),
        variant=training.variant,
        protocol=training.settings["protocol"],
        method_options=dict(cell.method_options),
        training_options=dict(training.method_options),
        backbone_options=dict(training.backbone_options),
        settings=dict(training.settings),
        brought=dict(training.brought),
        evaluation=dict(cell.evaluation),
        config=config.model_dump(mode="json"),
        origins=dict(facts.settings.origins),
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
        attention_layer=guided[0],
        metrics=compute_metrics(rows, classes=index.classes, expressive=expressive),
        selection=dict(trained["best"]),
        epochs=trained["epochs"],
        weights_sha256=facts.weights,
        rows_sha256=facts.rows_sha256,
        code=code_facts(),
        hardware=hardware_facts(facts.engine.device, world_size=facts.engine.world_size),
        cost={
            "parameters": trained["parameters"],
            "training_seconds": trained["seconds"],
            "training_images_per_second": trained["images_per_second"],
            "training_peak_memory_bytes": trained["peak_memory_bytes"],
            "training_processes": trained["world_size"],
            "evaluation_seconds": facts.seconds,
            "evaluation_images_per_second": len(rows.keys) / facts.seconds,
        },
        seeds={"seed": training.seed, **{role: training.derived_seed(role) for role in ("init", "data", "step")}},
        finished=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def _fail(cells: tuple[Cell, ...], error: Exception, store: Store, engine: Engine) -> dict[str, str]:
    message = f"{type(error).__name__}: {error}"
    _log.error("%s failed: %s", ", ".join(cell.label for cell in cells), message)
    if engine.is_main:
        for cell in cells:
            store.fail(
                cell,
                {
                    "error": message,
                    "traceback": traceback.format_exception(error),
                    "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                },
            )
    return {cell.label: message for cell in cells}


class _Readers:
    """Opened splits, kept while consecutive trainings use the same dataset."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan = plan
        self._engine = engine
        self._dataset = ""
        self._open: dict[str, Reader] = {}

    def source(self, training: Training) -> Source:
        return self._plan.sources[training.dataset.name]

    def open(self, training: Training, split: str) -> Reader:
        if training.dataset.name != self._dataset:
            self._open.clear()  # frees the decoded pictures of the dataset before
            self._dataset = training.dataset.name
        if split not in self._open:
            config = self._plan.settings.config
            loader = config.loader
            self._open[split] = open_reader(
                self.source(training).folder,
                split,
                kind=loader.kind,
                workers=loader.workers,
                cache_bytes=int(loader.cache_gib * 2**30),
                verify=loader.verify and self._engine.rank == 0,
                balance=config.train.balance if split == "train" else "none",
            )
        return self._open[split]
