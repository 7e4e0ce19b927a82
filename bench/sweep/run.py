"""Carry out a plan: train what is not trained, evaluate once per training, write records, go on after failures.

Several runs may work on one results folder at a time, see `bench.sweep.lease`.
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

from bench.data.batch import Reader
from bench.data.index import Index
from bench.data.readers import open_reader
from bench.evaluation.evaluator import Evaluated, Unusable, accuracy, count_macs, evaluate
from bench.evaluation.measures import choice_of
from bench.io import timestamp
from bench.matrix import Cell, Planned, Training
from bench.method import Classifier
from bench.prepare.preparation import preparation_of
from bench.runtime.agreement import same_everywhere
from bench.runtime.engine import Engine
from bench.runtime.interruption import BrokenWorldError, EverywhereError, LeaseLostError, StoppedError
from bench.runtime.observer import Observer, Work
from bench.sweep.attempts import given_up, noted
from bench.sweep.estimate import order
from bench.sweep.events import Event, EventLog
from bench.sweep.lease import Holder, Lease, Leases
from bench.sweep.plan import Plan
from bench.sweep.progress import LeaseObserver
from bench.sweep.record import code_facts, foreign_entries
from bench.sweep.result import RunFacts, attention_layer, compose_record
from bench.sweep.store import Store
from bench.training.build import build_reader
from bench.training.checkpoint import hash_weights
from bench.training.trainer import load_trained, read_trained, train

_log = logging.getLogger(__name__)


WAIT_SECONDS = 2.0
"""Time between two looks at trainings that another run works on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the cells of a run."""

    ran: tuple[Cell, ...]
    """Finished by this run."""
    skipped: tuple[Cell, ...]
    """Finished before this run began."""
    failed: Mapping[str, str]
    """Cell label -> error."""
    trained: int
    """Number of trainings that this run finished."""
    seconds: float
    elsewhere: tuple[Cell, ...] = ()
    """Finished meanwhile by other runs on the same results folder."""
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> run that works on it; only where this run does not wait."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """What the main process finds when it tries to take a training; sent to the other processes."""

    kind: Literal["taken", "done", "held", "failed"]
    missing: tuple[str, ...] = ()
    """Keys of the cells to do."""
    fresh: bool = False
    """Whether the training is still to be trained."""
    resumes: bool = False
    """Whether there is a checkpoint."""
    holder: str = ""
    """The run that works on the training."""
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> error of cells that another run has failed in meanwhile."""


def run_plan(plan: Plan, *, engine: Engine, observer: Observer, wait: bool = True) -> Outcome:
    """Do what is missing. Every dataset of the plan must be prepared.

    A training or read-out that fails is recorded with its error, and the run goes on. If another run holds the lease of a training, the
    training is looked at again at the end: by then it is done, or its holder has died and this run takes it over.

    Args:
        plan: what to do.
        engine: processes and device.
        observer: receives progress on the main process.
        wait: whether to wait at the end for trainings that other runs work on.

    Raises:
        StoppedError: a request to stop; the current training is saved and its lease given up.
        BrokenWorldError: with several processes, an error on some of them; it is recorded.
    """
    return _Sweep(plan, engine, observer).run(wait=wait)


class UnusableMapsError(EverywhereError):
    """The maps of a read-out hold NaN or infinite values. They are counted over all processes, so all of them raise it."""


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
        # Read now: when a training ends, the files may differ from those that trained it.
        self.code = code_facts().model_copy(update={"entries": foreign_entries(plan.matrix.cells)})
        self.ran: list[Cell] = []
        self.elsewhere: list[Cell] = []
        self.failed: dict[str, str] = {}
        self.trained = 0
        self._failed_times = 0
        self._lease: Lease | None = None
        """Lease of the current training, on the main process."""

    def run(self, *, wait: bool) -> Outcome:
        started = time.monotonic()
        if self.engine.is_main:
            try:
                self.leases.clear()
            except OSError as error:
                _log.warning("leases of runs that have died cannot be removed: %s", error)
        # All processes take the main process's view of what is missing, and of the order.
        ordered = order(self.plan) if self.engine.is_main else ()
        to_do = self.engine.from_main([[cell.key for cell in planned.cells] for planned in ordered])
        wanted = {key for keys in to_do for key in keys}
        pending = [Planned(t, tuple(c for c in cells if c.key in wanted)) for t, cells in self.plan.matrix.trainings]
        pending = [planned for planned in pending if planned.cells]
        place = {key: number for number, keys in enumerate(to_do) for key in keys}
        pending.sort(key=lambda planned: place[planned.cells[0].key])
        # A failure that changes later comes from another run, and is not tried again at once.
        self._failures = {cell.key: self.store.read_failure(cell) for planned in pending for cell in planned.cells}
        holders: dict[str, str] = {}
        announced: dict[str, str] = {}
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
            holding = {planned.training.label: holders[planned.training.key] for planned in pending}
            if self.engine.is_main:
                for label, holder in holding.items():
                    if announced.get(label) != holder:
                        _log.info("waiting for %s, which %s works on", label, holder)
                time.sleep(WAIT_SECONDS)
            announced = holding
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
        """Do a training and its cells, unless another run works on it: then return the name of that run."""
        training = planned.training
        try:
            with self.engine.together():
                claim = self._claim(planned) if self.engine.is_main else None
        except Exception as error:  # noqa: BLE001 - a disk that is full or read-only
            self.failed |= self._fail(planned.cells, error)
            return None
        claim = self.engine.from_main(claim)
        assert claim is not None
        missing = tuple(cell for cell in planned.cells if cell.key in claim.missing)
        self.elsewhere += [cell for cell in planned.cells if cell not in missing and cell.label not in claim.errors]
        self.failed |= claim.errors
        if claim.kind == "held":
            return claim.holder
        if claim.kind != "taken":
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
        """See what is still to do, take the lease, and see again: the training may just have been finished. Runs on the main process."""
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
                "taken",
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
        """Train if ``fresh``, and evaluate; returns cell label -> error of the cells that failed.

        Raises:
            HaltError: a request to stop, or the lease is lost.
            BrokenWorldError: see `run_plan`.
        """
        observer: Observer = LeaseObserver(self.observer, self._lease) if self._lease is not None else self.observer
        try:
            if fresh:
                self._train(planned.training, observer)
            return self._evaluate_cells(planned, observer)
        except Exception as error:  # noqa: BLE001 - a cell that fails, for whatever reason, does not stop the next one
            failed = self._fail(planned.cells, error)
            self.engine.release()
            return failed

    def _train(self, training: Training, observer: Observer) -> None:
        config, size = self.settings.config, training.settings["images"]["size"]
        with self.engine.together():
            selection = self.readers.open(training, "test" if training.settings["protocol"] == "test-selected" else "val")
            reader = self.readers.open(training, "train")

        def select(classifier: Classifier) -> float:
            return accuracy(classifier, selection, size=size, batch_size=config.evaluation.batch_size, engine=self.engine)

        train(
            training,
            folder=self.store.training_folder(training),
            reader=reader,
            select=select,
            engine=self.engine,
            observer=observer,
            checkpoint_minutes=config.train.checkpoint_minutes,
            hold=self._lease,
            preparation=preparation_of(self.readers.index(training)),
        )

    def _evaluate_cells(self, planned: Planned, observer: Observer) -> dict[str, str]:
        """Evaluate the cells in one pass and write their records. If a read-out fails, each cell gets a pass of its own."""
        training, cells = planned
        engine, folder, index = self.engine, self.store.training_folder(planned.training), self.readers.index(planned.training)
        with engine.together():
            classifier = load_trained(training, folder, num_classes=len(index.classes)).to(engine.device)
            trained = read_trained(folder)
            test = self.readers.open(training, "test")
            weights = hash_weights(classifier)
            macs = count_macs(classifier, size=training.settings["images"]["size"], device=engine.device)
        groups = [cells]
        errors: dict[str, str] = {}
        while groups:
            group = groups.pop(0)
            try:
                results, seconds = self._evaluate(training, group, classifier, index, test, observer)
            except Exception as error:
                if engine.world_size > 1 and not isinstance(error, EverywhereError):
                    raise
                if len(group) > 1:  # one read-out is at fault; the passes of single cells say which
                    groups += [(cell,) for cell in group]
                else:
                    errors |= self._fail(group, error)
                continue
            facts = RunFacts(
                settings=self.settings,
                code=self.code,
                index=index,
                engine=engine,
                seconds=seconds,
                cells=len(group),
                macs=macs,
                weights=weights,
                trained=trained,
            )
            for cell in group:
                errors |= self._write(cell, results[cell.method], facts)
        return errors

    def _evaluate(
        self, training: Training, cells: tuple[Cell, ...], classifier: Classifier, index: Index, reader: Reader, observer: Observer
    ) -> tuple[dict[str, Evaluated | Unusable], float]:
        """Results by method, and the seconds of the pass."""
        started = time.monotonic()
        config = self.settings.config.evaluation
        results = evaluate(
            classifier,
            {cell.method: build_reader(cell) for cell in cells},
            reader,
            size=training.settings["images"]["size"],
            batch_size=config.batch_size,
            au_variant=config.au_maps,
            attention_layer=attention_layer(training, self.settings, classifier),
            keys_sha256=index.splits["test"].keys_sha256,
            engine=self.engine,
            observer=observer,
            label=training.label,
            measures=choice_of(cells[0]),
        )
        return results, time.monotonic() - started

    def _write(self, cell: Cell, result: Evaluated | Unusable, facts: RunFacts) -> dict[str, str]:
        """Write the record of a cell; cell label -> error if that fails."""
        if isinstance(result, Unusable):
            return self._fail((cell,), UnusableMapsError(result.reason))
        try:
            with self.engine.together():
                if self.engine.is_main:
                    assert self._lease is not None
                    self._lease.confirm()
                    self.store.write(cell, result.rows, result.maps, lambda hashes: compose_record(cell, result, facts, hashes=hashes))
        except Exception as error:  # noqa: BLE001 - a full disk, most likely
            return self._fail((cell,), error)
        return {}

    def _fail(self, cells: tuple[Cell, ...], error: Exception) -> dict[str, str]:
        """Record why cells failed, and free the memory of the failed work; returns cell label -> error.

        Raises:
            LeaseLostError: the lease is gone; the training belongs to another run now and has not failed.
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
        traceback.clear_frames(error.__traceback__)  # the frames hold the tensors of the failed work
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
        except OSError as error:  # a full disk may be the reason of the failure itself
            _log.error("the failure of %s cannot be recorded: %s", cell.label, error)

    def _record_broken(self, cells: tuple[Cell, ...], failure: dict[str, Any]) -> None:
        """Record the failure of the process that failed first. The other processes only see, later, that a process is gone."""
        if self.engine.is_main:
            time.sleep(1)
        for cell in cells:
            known = self.store.read_failure(cell)
            if known is None or known == self._failures[cell.key]:
                self._record_failure(cell, failure | noted(known, self.store.newest_checkpoint(cell.training)))


def _describe(error: BaseException) -> str:
    """Type and text of an error, and its notes, which name the step."""
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


class _Readers:
    """Open splits, kept while consecutive trainings use the same data."""

    def __init__(self, plan: Plan, engine: Engine) -> None:
        self._plan = plan
        self._engine = engine
        self._fingerprint = ""
        self._open: dict[str, Reader] = {}
        self._sources = {source.index.fingerprint: source for source in plan.sources.values() if source.index is not None}

    def index(self, training: Training) -> Index:
        index = self._sources[training.dataset.fingerprint].index
        assert index is not None
        return index

    def open(self, training: Training, split: str) -> Reader:
        if training.dataset.fingerprint != self._fingerprint:
            self._open.clear()  # frees the decoded pictures of the previous dataset
            self._fingerprint = training.dataset.fingerprint
        if split not in self._open:
            config = self._plan.settings.config
            loader = config.loader
            self._open[split] = open_reader(
                self._sources[training.dataset.fingerprint].folder,
                split,
                workers=loader.workers,
                cache_bytes=int(loader.cache_gib * 2**30),
                verify=loader.verify and self._engine.rank == 0,
                balance=config.train.balance if split == "train" else "none",
            )
        return self._open[split]
