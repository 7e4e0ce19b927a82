"""Run a plan: train what is not trained, evaluate once per training, write records, go on after failures.

Several runs may work on one results folder at once: see `bench.sweep.lease`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
import traceback
from collections.abc import Mapping
from typing import Any, Literal

from bench.au.maps import expression_ids
from bench.backbone import BACKBONES
from bench.config import Settings
from bench.data.batch import Reader
from bench.data.index import Index, hash_keys
from bench.data.readers import open_reader
from bench.evaluation.evaluator import Evaluated, Unusable, accuracy, count_macs, evaluate
from bench.evaluation.measures import choice_of
from bench.evaluation.metrics import compute_metrics
from bench.io import timestamp
from bench.matrix import Cell, Planned, Training
from bench.method import Classifier
from bench.prepare.preparation import preparation_of
from bench.runtime.agreement import same_everywhere
from bench.runtime.engine import Engine
from bench.runtime.interruption import BrokenWorldError, EverywhereError, LeaseLostError, StoppedError
from bench.runtime.observer import Observer, Work
from bench.sweep.attempts import given_up, noted
from bench.sweep.datasets import Source
from bench.sweep.estimate import order
from bench.sweep.events import Event, EventLog
from bench.sweep.lease import Holder, Lease, Leases
from bench.sweep.plan import Plan
from bench.sweep.progress import LeaseObserver
from bench.sweep.record import CellName, CodeFacts, DataFacts, ProcessFacts, Record, code_facts, foreign_entries, hardware_facts
from bench.sweep.store import Hashes, Store
from bench.training.build import build_reader
from bench.training.checkpoint import hash_weights
from bench.training.trainer import load_trained, read_trained, train

_log = logging.getLogger(__name__)


_PLACES = ("results", "data")
"""Keys of ``[run]`` that no record needs."""
WAIT_SECONDS = 2.0
"""Between looks at trainings that another run is working on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    ran: tuple[Cell, ...]
    skipped: tuple[Cell, ...]
    """Finished before this run began."""
    failed: Mapping[str, str]
    """Cell label -> error."""
    trained: int
    seconds: float
    elsewhere: tuple[Cell, ...] = ()
    """Finished by other runs on the same results folder, meanwhile."""
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> who works on it; only if not to be waited for."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """What a look at one training gave. Crosses process borders."""

    kind: Literal["ours", "done", "held", "failed"]
    missing: tuple[str, ...] = ()
    """Keys of the cells to do."""
    fresh: bool = False
    """Still to be trained."""
    resumes: bool = False
    holder: str = ""
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> error, where another run has failed meanwhile."""


def run_plan(plan: Plan, *, engine: Engine, observer: Observer, wait: bool = True) -> Outcome:
    """Do what is missing. Every dataset of the plan must be prepared.

    A training or read-out that fails is recorded with its error, and the others go on. A training that another run holds the lease of is
    put aside and looked at again in the end: it is done by then, or its holder has died and it is taken over.

    Args:
        plan: what to do.
        engine: processes and device.
        observer: told of progress on the main process.
        wait: for what others are still working on in the end; else leave it to them.

    Raises:
        StoppedError: asked to stop; the training at hand is saved, its lease given up.
        BrokenWorldError: with several processes, an error on some of them; it is recorded.
    """
    return _Sweep(plan, engine, observer).run(wait=wait)


class UnusableMapsError(EverywhereError):
    """A read-out whose maps hold NaN or infinite values: counted over all processes, so all of them raise it."""


class _Sweep:
    def __init__(self, plan: Plan, engine: Engine, observer: Observer) -> None:
        self.plan = plan
        self.engine = engine
        self.observer = observer
        self.settings = plan.settings
        self.store = Store(self.settings.config.run.results)
        self.events = EventLog(self.store.root)
        sweep = self.settings.config.sweep
        self.leases = Leases(self.store.root / "leases", heartbeat_s=sweep.lease_heartbeat_s, stale_s=sweep.lease_stale_s)
        self.readers = _Readers(plan, engine)
        # Now: at the end of a training the files may be other ones than those that trained it.
        self.code = code_facts().model_copy(update={"entries": foreign_entries(plan.matrix.cells)})
        self.ran: list[Cell] = []
        self.elsewhere: list[Cell] = []
        self.failed: dict[str, str] = {}
        self.trained = 0
        self._failed_times = 0
        self._lease: Lease | None = None
        """Of the training at hand, on the main process."""

    def run(self, *, wait: bool) -> Outcome:
        started = time.monotonic()
        if self.engine.is_main:
            try:
                self.leases.clear()
            except OSError as error:
                _log.warning("leases of runs that have died cannot be removed: %s", error)
        # One view of what is missing, and of what comes first: long ones, as far as past records tell.
        first = order(self.plan) if self.engine.is_main else ()
        to_do = self.engine.from_main([[cell.key for cell in planned.cells] for planned in first])
        wanted = {key for keys in to_do for key in keys}
        pending = [Planned(t, tuple(c for c in cells if c.key in wanted)) for t, cells in self.plan.matrix.trainings]
        pending = [planned for planned in pending if planned.cells]
        place = {key: number for number, keys in enumerate(to_do) for key in keys}
        pending.sort(key=lambda planned: place[planned.cells[0].key])
        # A failure that is another one later was met by another run meanwhile, and is not tried again at once.
        self._failures = {cell.key: self.store.read_failure(cell) for planned in pending for cell in planned.cells}
        holders: dict[str, str] = {}
        told: dict[str, str] = {}
        while True:
            aside: list[Planned] = []
            for planned in pending:
                if self.engine.any(self.engine.stop.reason is not None):
                    raise StoppedError(f"stopped by {self.engine.stop.reason or 'a request to another process'}")
                holder = self._take(planned)
                if holder is not None:
                    aside.append(planned)
                    holders[planned.training.key] = holder
            pending = aside
            if not pending or not wait:
                break
            now = {planned.training.label: holders[planned.training.key] for planned in pending}
            if now != told and self.engine.is_main:
                for label, holder in now.items():
                    if told.get(label) != holder:
                        _log.info("waiting for %s, which %s works on", label, holder)
            told = now
            if self.engine.is_main:
                time.sleep(WAIT_SECONDS)
        return Outcome(
            ran=tuple(self.ran),
            skipped=tuple(cell for cell in self.plan.matrix.cells if cell.key not in wanted),
            failed=self.failed,
            trained=self.trained,
            seconds=time.monotonic() - started,
            elsewhere=tuple(self.elsewhere),
            left={cell.label: holders[planned.training.key] for planned in pending for cell in planned.cells},
        )

    def _take(self, planned: Planned) -> str | None:
        """Do one training and its cells if nobody else does; returns who does, if somebody does."""
        training = planned.training
        try:
            with self.engine.together():
                claim = self._claim(planned) if self.engine.is_main else None
        except Exception as error:  # noqa: BLE001 - a disk that is full or cannot be written
            self.failed |= self._fail(planned.cells, error)
            return None
        claim = self.engine.from_main(claim)
        assert claim is not None
        missing = tuple(cell for cell in planned.cells if cell.key in claim.missing)
        self.elsewhere += [cell for cell in planned.cells if cell not in missing and cell.label not in claim.errors]
        self.failed |= claim.errors
        if claim.kind == "held":
            return claim.holder
        if claim.kind != "ours":
            return None
        event: Event = "evaluate" if not claim.fresh else "resume" if claim.resumes else "begin"
        self._event(event, training)
        try:
            errors = self._run_training(Planned(training, missing), fresh=claim.fresh)
        except StoppedError as error:
            self._event("interrupt", training, reason=str(error))
            raise
        except LeaseLostError as error:
            self._event("lost", training, reason=str(error))
            _log.error("%s", error)
            self._release()
            return "the run that took it over"
        except Exception as error:
            self._event("fail", training, reason=_describe(error))
            raise
        else:
            if errors:
                self._event("fail", training, reason=next(iter(errors.values())))
            else:
                self._event("end", training)
        finally:
            if self.engine.is_main:
                for work in (Work(training.label, "training"), Work(training.label, "evaluating")):
                    self.observer.end(work)
            self._release()
        self.trained += claim.fresh and len(errors) < len(missing)
        self.ran += [cell for cell in missing if cell.label not in errors]
        self.failed |= errors
        return None

    def _claim(self, planned: Planned) -> _Claim:
        """Look what is still to do, take the lease, and look again: it may just have been finished. On the main process."""
        if not any(not self.store.is_done(cell) for cell in planned.cells):
            return _Claim("done")
        training = planned.training
        held = self.leases.claim(training.key[:16], label=training.label, world_size=self.engine.world_size)
        if isinstance(held, Holder):
            return _Claim("held", missing=tuple(cell.key for cell in planned.cells), holder=held.name)
        self._lease = held
        try:
            missing = [cell for cell in planned.cells if not self.store.is_done(cell)]
            errors = {}
            for cell in missing:
                failure = self.store.read_failure(cell)
                if failure is not None and (failure != self._failures[cell.key] or given_up(failure)):
                    errors[cell.label] = f"{failure['error']} (on {failure.get('where', 'another host')})"
            missing = [cell for cell in missing if cell.label not in errors]
            if not missing:
                self._release()
                return _Claim("failed" if errors else "done", errors=errors)
            self.store.tidy(planned)
            return _Claim(
                "ours",
                missing=tuple(cell.key for cell in missing),
                fresh=not self.store.is_trained(training),
                resumes=self.store.newest_checkpoint(training) is not None,
                errors=errors,
            )
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _event(self, event: Event, training: Training, **facts: Any) -> None:
        if self.engine.is_main:
            self.events.write(event, training.key[:16], label=training.label, processes=self.engine.world_size, **facts)

    def _run_training(self, planned: Planned, *, fresh: bool) -> dict[str, str]:
        """Train if ``fresh``, and evaluate; returns cell label -> error of those that failed.

        Raises:
            HaltError: asked to stop, or the lease is lost.
            BrokenWorldError: see `run_plan`.
        """
        training, cells = planned
        engine, store, config = self.engine, self.store, self.settings.config
        observer: Observer = LeaseObserver(self.observer, self._lease) if self._lease is not None else self.observer
        try:
            source = self.readers.source(training)
            assert source.index is not None
            folder = store.training_folder(training)
            if fresh:
                with engine.together():
                    selection = self.readers.open(training, "test" if training.settings["protocol"] == "test-selected" else "val")
                    reader = self.readers.open(training, "train")

                def select(classifier: Classifier) -> float:
                    size = training.settings["images"]["size"]
                    return accuracy(classifier, selection, size=size, batch_size=config.evaluation.batch_size, engine=engine)

                train(
                    training,
                    folder=folder,
                    reader=reader,
                    select=select,
                    engine=engine,
                    observer=observer,
                    checkpoint_minutes=config.train.checkpoint_minutes,
                    hold=self._lease,
                    preparation=preparation_of(source.index),
                )
            with engine.together():
                classifier = load_trained(training, folder, num_classes=len(source.index.classes)).to(engine.device)
                trained = read_trained(folder)
                test = self.readers.open(training, "test")
                weights = hash_weights(classifier)
                macs = count_macs(classifier, size=training.settings["images"]["size"], device=engine.device)
            groups = [cells]
            errors: dict[str, str] = {}
            while groups:
                group = groups.pop(0)
                try:
                    results, seconds = self._evaluate(training, group, classifier, source.index, test, observer)
                except Exception as error:
                    if engine.world_size > 1 and not isinstance(error, EverywhereError):
                        raise
                    if len(group) > 1:  # one read-out is at fault: find out which, and keep the others
                        groups += [(cell,) for cell in group]
                    else:
                        errors |= self._fail(group, error)
                    continue
                facts = _Facts(
                    settings=self.settings,
                    code=self.code,
                    index=source.index,
                    engine=engine,
                    seconds=seconds,
                    cells=len(group),
                    macs=macs,
                    weights=weights,
                    trained=trained,
                )
                for cell in group:
                    result = results[cell.method]
                    if isinstance(result, Unusable):
                        errors |= self._fail((cell,), UnusableMapsError(result.reason))
                        continue
                    try:
                        self._write(cell, result, facts)
                    except Exception as error:  # noqa: BLE001 - a full disk, most likely
                        errors |= self._fail((cell,), error)
            return errors
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in one cell, the others go on
            failed = self._fail(cells, error)
            engine.release()
            return failed

    def _evaluate(
        self, training: Training, cells: tuple[Cell, ...], classifier: Classifier, index: Index, reader: Reader, observer: Observer
    ) -> tuple[dict[str, Evaluated | Unusable], float]:
        """Results by method, and the seconds it took."""
        started = time.monotonic()
        config = self.settings.config.evaluation
        results = evaluate(
            classifier,
            {cell.method: build_reader(cell) for cell in cells},
            reader,
            size=training.settings["images"]["size"],
            batch_size=config.batch_size,
            au_variant=config.au_maps,
            attention_layer=_attention_layer(training, self.settings, classifier),
            keys_sha256=index.splits["test"].keys_sha256,
            engine=self.engine,
            observer=observer,
            label=training.label,
            measures=choice_of(cells[0]),
        )
        return results, time.monotonic() - started

    def _write(self, cell: Cell, result: Evaluated, facts: _Facts) -> None:
        with self.engine.together():
            if self.engine.is_main:
                assert self._lease is not None
                self._lease.confirm()
                self.store.write(cell, result.rows, result.maps, lambda hashes: _record(cell, result, facts, hashes=hashes))

    def _fail(self, cells: tuple[Cell, ...], error: Exception) -> dict[str, str]:
        """Record why cells failed; cell label -> error. Lets go of what the failed work held in memory.

        Raises:
            LeaseLostError: the lease is gone: it is another's training now, and not failed.
            BrokenWorldError: the processes are out of step.
        """
        message = _describe(error)
        failure = {
            "error": message,
            "traceback": traceback.format_exception(error),
            "when": timestamp(),
            "where": f"{socket.gethostname()}:{os.getpid()}",
            "process": self.engine.rank,
        }
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed work
        _log.error("%s failed: %s", ", ".join(cell.label for cell in cells), message)
        self._failed_times += 1
        in_step = isinstance(error, EverywhereError) or same_everywhere(message, name=f"{cells[0].key}/{self._failed_times}")
        if self.engine.world_size > 1 and not in_step:
            self._record_broken(cells, failure)
            raise BrokenWorldError(f"{cells[0].training.label}: {message}") from error
        with self.engine.together():
            if self.engine.is_main:
                if self._lease is not None:
                    self._lease.confirm()
                for cell in cells:
                    self._record_failure(cell, failure)
        return {cell.label: message for cell in cells}

    def _record_failure(self, cell: Cell, failure: dict[str, Any]) -> None:
        try:
            self.store.fail(cell, failure)
        except OSError as error:  # the full disk may be why it failed
            _log.error("the failure of %s cannot be recorded: %s", cell.label, error)

    def _record_broken(self, cells: tuple[Cell, ...], failure: dict[str, Any]) -> None:
        """Where the trouble began is a matter of time: the others see no more than that a process is gone, and see it later."""
        if self.engine.is_main:
            time.sleep(1)
        for cell in cells:
            known = self.store.read_failure(cell)
            if known is None or known == self._failures[cell.key]:
                self._record_failure(cell, failure | noted(known, self.store.newest_checkpoint(cell.training)))


def _describe(error: BaseException) -> str:
    """Type, text, and the notes that say at which step."""
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    settings: Settings
    code: CodeFacts
    index: Index
    engine: Engine
    seconds: float
    """Of the evaluation: one pass for several cells of the training."""
    cells: int
    """That this pass served."""
    macs: int
    weights: str
    """sha256."""
    trained: Mapping[str, Any]
    """`read_trained`."""


def _attention_layer(training: Training, settings: Settings, classifier: Classifier) -> int:
    """The (first) guided layer, or the one guidance would take; what is configured may be meant for another backbone of the run."""
    configured = [layer for layer in settings.config.guidance.layers if layer in classifier.backbone.channels]
    guided = training.settings.get("guidance", {}).get("layers") or configured
    return int((guided or BACKBONES.get(training.backbone).info.guided_layers)[0])


def _record(cell: Cell, result: Evaluated, facts: _Facts, *, hashes: Hashes) -> Record:
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
        # Where things lie on this machine decides nothing and is nobody else's business.
        config=config.model_dump(mode="json", exclude={"run": set(_PLACES)}),
        origins={key: origin.text for key, origin in facts.settings.origins.items() if key not in {f"run.{name}" for name in _PLACES}},
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
        cost={
            "parameters": trained["parameters"],
            "macs": facts.macs,
            "training_seconds": trained["seconds"],
            "training_images_per_second": trained["images_per_second"],
            "training_peak_memory_bytes": trained["peak_memory_bytes"],
            "training_processes": trained["process_counts"][-1],
            "evaluation_seconds": facts.seconds,
            "evaluation_cells": facts.cells,
            "evaluation_images_per_second": len(rows.keys) / facts.seconds,
            "evaluation_peak_memory_bytes": result.peak_memory_bytes,
            "map_seconds_per_image": result.map_seconds_per_image,
        },
        seeds={"seed": training.seed, **{role: training.derived_seed(role) for role in ("init", "data", "step")}},
        finished=timestamp(),
    )


class _Readers:
    """Opened splits, kept while consecutive trainings use the same data."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan = plan
        self._engine = engine
        self._fingerprint = ""
        self._open: dict[str, Reader] = {}
        self._sources = {source.index.fingerprint: source for source in plan.sources.values() if source.index is not None}

    def source(self, training: Training) -> Source:
        return self._sources[training.dataset.fingerprint]

    def open(self, training: Training, split: str) -> Reader:
        if training.dataset.fingerprint != self._fingerprint:
            self._open.clear()  # frees the decoded pictures of the dataset before
            self._fingerprint = training.dataset.fingerprint
        if split not in self._open:
            config = self._plan.settings.config
            loader = config.loader
            self._open[split] = open_reader(
                self.source(training).folder,
                split,
                workers=loader.workers,
                cache_bytes=int(loader.cache_gib * 2**30),
                verify=loader.verify and self._engine.rank == 0,
                balance=config.train.balance if split == "train" else "none",
            )
        return self._open[split]
