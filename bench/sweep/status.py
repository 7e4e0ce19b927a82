"""The state of every cell, from the files of the results folder. Reads only: nothing is made or touched."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from bench.config import SweepConfig
from bench.io import duration
from bench.matrix import Cell, Matrix, Training
from bench.sweep.lease import Holder, read_leases
from bench.sweep.store import Store

State = Literal["done", "running", "failed", "interrupted", "waiting"]
STATES: tuple[State, ...] = get_args(State)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CellStatus:
    """The state of a cell. Fields that do not apply are None."""

    dataset: str
    backbone: str
    method: str
    guidance: str
    seed: int
    key: str
    training: str
    """Key of its training. Cells of one training are worked on together."""
    state: State
    where: str | None = None
    """``host:pid`` of the run that works on it."""
    since: str | None = None
    """Begin of the work, or time of the failure: UTC, ISO 8601."""
    phase: str | None = None
    """``training`` or ``evaluating``."""
    step: int | None = None
    steps: int | None = None
    """Steps of the training; samples, if evaluating."""
    rate: float | None = None
    """Steps per second."""
    epoch: int | None = None
    loss: float | None = None
    """Of the last finished epoch."""
    silent_seconds: float | None = None
    """Since the last sign of life."""
    reason: str | None = None
    """Why it failed: the first line."""

    @property
    def label(self) -> str:
        """As `bench.matrix.Cell.label`."""
        return f"{self.dataset}/{self.backbone}/{self.method}/{self.guidance}/seed{self.seed}"


def survey(matrix: Matrix, root: Path, *, config: SweepConfig) -> list[CellStatus]:
    """The state of every cell of a matrix in the results folder ``root``, which need not exist."""
    store = Store(root)
    return [status for training, cells in matrix.trainings for status in _statuses(store, training, cells, config)]


def count_states(statuses: Sequence[CellStatus]) -> dict[State, int]:
    """Number of cells in each state, all states named."""
    counts = Counter(status.state for status in statuses)
    return {state: counts[state] for state in STATES}


def _statuses(store: Store, training: Training, cells: Sequence[Cell], config: SweepConfig) -> Iterator[CellStatus]:
    holders = list(read_leases(store.root / "leases", training.key[:16]))
    holder = holders[-1] if holders else None
    silent = None if holder is None else max(0.0, time.time() - holder.renewed)
    alive = holder is not None and silent is not None and not holder.gone and silent <= config.lease_stale_s
    checkpoint = store.newest_checkpoint(training)
    begun = _time(checkpoint) if checkpoint is not None else None
    for cell in cells:
        failure = store.read_failure(cell)
        failed_at = _time(store.failure_file(cell)) if failure is not None else None
        facts: dict[str, Any] = {}
        state: State
        if store.is_done(cell):
            state = "done"
        elif alive and holder is not None:
            state, facts = "running", _running(holder, silent)
        elif failure is not None and failed_at is not None and (begun is None or begun <= failed_at):
            state = "failed"
            facts = {"since": failure.get("when"), "where": failure.get("where"), "reason": (failure["error"].splitlines() or [""])[0]}
        elif checkpoint is not None or (holder is not None and not store.is_trained(training)):
            state = "interrupted"
            facts = {"step": int(checkpoint.name) if checkpoint is not None else 0, "steps": total_steps(training)}
        else:
            state = "waiting"
        yield CellStatus(
            dataset=training.dataset.shown,
            backbone=training.backbone,
            method=cell.method,
            guidance=training.guidance,
            seed=training.seed,
            key=cell.key,
            training=training.key,
            state=state,
            **facts,
        )


def _running(holder: Holder, silent: float | None) -> dict[str, Any]:
    progress = holder.progress
    return {
        "where": holder.name,
        "since": holder.since or None,
        "phase": progress.get("state"),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "rate": progress.get("rate"),
        "epoch": progress.get("epoch"),
        "loss": progress.get("loss"),
        "silent_seconds": silent,
    }


def total_steps(training: Training) -> int:
    """Steps of the whole training."""
    settings = training.settings["train"]
    return int(settings["epochs"] * (training.dataset.samples["train"] // settings["batch_size"]))


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def elapsed(since: str) -> str:
    """Time since an ISO 8601 moment, see `bench.io.duration`."""
    return duration((dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(since)).total_seconds())
