"""How long trainings take, estimated from finished trainings of the same kind; and how a sweep packs them onto groups of processes.

An estimate is arithmetic on records: the device seconds (time x processes) a picture took, as the median over the trainings of the kind,
times the pictures to come, over the processes to come. It assumes that processes share the work evenly, and that a picture costs the same
at every batch size. A training without a record of its kind has no estimate.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.config import TrainConfig
from bench.matrix import Planned, Training, digest
from bench.method import METHODS
from bench.sweep.plan import Plan
from bench.sweep.record import Record, device_name, hardware_facts, parse_record
from bench.sweep.store import RECORD, Store, list_cells

COSTLY = ("engine", "zero_stage", "precision", "tf32", "channels_last", "compile", "sync_batchnorm", "ema", "deterministic", "accumulate")
"""Settings of ``train`` that change what a step costs. The remaining settings change the number of steps, or nothing."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The time of a training and of the evaluation of its cells."""

    training_seconds: float
    """0 if the training is finished."""
    evaluation_seconds: float
    trainings: int
    """Number of finished trainings that the figures come from."""

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.training_seconds + self.evaluation_seconds


@dataclasses.dataclass(slots=True)
class _Kind:
    """Device seconds per picture, of finished trainings that cost the same."""

    training: dict[str, float] = dataclasses.field(default_factory=dict)
    """Training key -> seconds: each training counts once, whatever the number of its cells."""
    evaluation: dict[tuple[Any, ...], list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    """`_reading` -> seconds. A pass over the test split serves several methods; each method gets the cost of the whole pass."""


class History:
    """What finished trainings cost."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = defaultdict(_Kind)
        self._keys: dict[str, set[str]] = defaultdict(set)
        self._types: dict[str, str] = {}
        for record in records:
            kind = _kind_of_record(record)
            if kind is None:
                continue
            device, cost = device_name(record.hardware), record.cost
            entry = self._kinds[device, kind]
            entry.training[record.training_key] = cost["training_processes"] / cost["training_images_per_second"]
            reading = _reading(record.cell.method, record.evaluation)
            entry.evaluation[reading].append(record.hardware["processes"] / cost["evaluation_images_per_second"])
            self._keys[device].add(record.training_key)
            self._types[device] = record.hardware["device"]

    @property
    def devices(self) -> Mapping[str, int]:
        """Device name -> number of trainings, the most frequent device first."""
        return dict(Counter({device: len(keys) for device, keys in sorted(self._keys.items())}).most_common())

    def is_gpu(self, device: str) -> bool:
        """Whether a device of the records is an accelerator."""
        return self._types[device] != "cpu"

    def estimate(self, planned: Planned, *, device: str, processes: int, trained: bool) -> Estimate | None:
        """Estimate a training and the evaluation of its cells. None without a record of its kind, or of the evaluation of a method.

        Args:
            planned: the training, with the cells that are missing.
            device: name, as in ``hardware`` of the records.
            processes: number of processes that share the training.
            trained: whether only the evaluation is missing.
        """
        training, cells = planned
        kind = self._kinds.get((device, _kind_of_training(training)))
        readings = [_reading(cell.method, cell.evaluation) for cell in cells]
        if kind is None or not all(reading in kind.evaluation for reading in readings):
            return None
        train, epochs = TrainConfig.model_validate(training.settings["train"]), training.settings["train"]["epochs"]
        pictures = epochs * (training.dataset.samples["train"] // train.batch_size) * train.batch_size
        slowest = max((statistics.median(kind.evaluation[reading]) for reading in readings), default=0.0)
        return Estimate(
            training_seconds=0.0 if trained else statistics.median(kind.training.values()) * pictures / processes,
            evaluation_seconds=slowest * training.dataset.samples["test"] / processes,
            trainings=len(kind.training),
        )


def read_history(results: Path) -> History:
    """What the finished cells of a results folder cost. A record that cannot be read is left out with a warning."""
    records = []
    for folder in list_cells(results / "cells"):
        try:
            records.append(parse_record((folder / RECORD).read_bytes()))
        except (OSError, ValueError) as error:
            _log.warning("%s is not readable and left out of estimates: %s", folder / RECORD, str(error).splitlines()[0])
    return History(records)


def estimates(plan: Plan, history: History, *, device: str, processes: int) -> list[tuple[Planned, Estimate | None]]:
    """An estimate for each training still to do, in the order of the plan."""
    store = Store(plan.settings.config.run.results)
    return [
        (planned, history.estimate(planned, device=device, processes=processes, trained=store.is_trained(planned.training)))
        for planned in plan.to_do
    ]


def order(plan: Plan) -> list[Planned]:
    """The trainings still to do, in the order in which groups of processes should take them: see `longest_first`.

    Only ratios matter, so the figures of the most frequent device serve. The function reads the records: of several processes one calls it
    and sends the result to the rest.
    """
    history = read_history(plan.settings.config.run.results)
    device = next(iter(history.devices), "")
    pairs = estimates(plan, history, device=device, processes=1)
    return [pairs[place][0] for place in longest_first([estimate.seconds if estimate else None for _, estimate in pairs])]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the trainings still to do take, as far as records say."""

    device: str
    """Device of the figures, as records name it."""
    gpu: bool
    """Whether the device is an accelerator."""
    processes: int
    """Processes of each training."""
    groups: int
    """Trainings at a time."""
    estimates: Mapping[str, Estimate | None]
    """Training key -> estimate."""
    group: Mapping[str, int]
    """Training key -> number of the group that does it, from 0. Only trainings with an estimate."""
    wall_seconds: float
    """Time until the last training with an estimate ends."""

    @property
    def known(self) -> list[Estimate]:
        """The estimates that are not None."""
        return [estimate for estimate in self.estimates.values() if estimate is not None]

    @property
    def seconds(self) -> float:
        """Time of all trainings one after another."""
        return sum(estimate.seconds for estimate in self.known)

    @property
    def device_hours(self) -> float:
        """Time x processes."""
        return self.seconds * self.processes / 3600


def forecast(plan: Plan, history: History, *, device: str, processes: int, groups: int) -> Forecast:
    """Estimate the trainings still to do, and pack those with an estimate onto groups of processes, longest first.

    Args:
        plan: what to do.
        history: finished trainings.
        device: a key of ``history.devices``.
        processes: processes of each training.
        groups: trainings at a time.
    """
    known = {planned.training.key: e for planned, e in estimates(plan, history, device=device, processes=processes)}
    seconds = {key: estimate.seconds for key, estimate in known.items() if estimate is not None}
    keys = list(seconds)
    keys = [keys[place] for place in longest_first(list(seconds.values()))]
    chosen, wall = schedule([seconds[key] for key in keys], groups=groups)
    return Forecast(
        device=device,
        gpu=history.is_gpu(device),
        processes=processes,
        groups=groups,
        estimates=known,
        group=dict(zip(keys, chosen, strict=True)),
        wall_seconds=wall,
    )


def this_device() -> str:
    """Name of the device this machine computes on, as its records have it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device_name(hardware_facts(accelerator or torch.device("cpu"), world_size=1))


def longest_first(seconds: Sequence[float | None]) -> list[int]:
    """Positions of trainings in the order to begin them: first those of unknown length, in the given order, then the longest.

    A long training that begins late makes all groups wait for it, and a training of unknown length may be long.
    """
    return sorted(range(len(seconds)), key=lambda place: -(float("inf") if seconds[place] is None else seconds[place] or 0.0))


def schedule(seconds: Sequence[float], *, groups: int) -> tuple[list[int], float]:
    """Give each training in turn to the group that is free first.

    Graham's list scheduling; with the longest first the wall time is at most 4/3 of the best (Graham, SIAM J. Appl. Math. 1969).

    Returns:
        The group of each training, and the wall time until the last has ended.
    """
    free = [(0.0, group) for group in range(groups)]
    chosen = []
    for duration in seconds:
        begin, group = heapq.heappop(free)
        chosen.append(group)
        heapq.heappush(free, (begin + duration, group))
    return chosen, max(end for end, _ in free)


def _reading(method: str, evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of an evaluation that decides its cost: the method, and the optional measures with their number of samples."""
    measures = tuple(evaluation.get("measures", ()))
    return (method, measures, evaluation.get("measure_samples", 0) if measures else 0)


def _kind_of_training(training: Training) -> str:
    return _kind(
        trains_as=training.trains_as,
        options=training.method_options,
        variant=training.variant,
        guidance=training.guidance,
        backbone=training.backbone,
        backbone_options=training.backbone_options,
        settings=training.settings,
    )


def _kind_of_record(record: Record) -> str | None:
    if record.cell.method not in METHODS:
        return None  # of a plugin that is not loaded
    return _kind(
        trains_as=METHODS.get(record.cell.method).info.trains_as or record.cell.method,
        options=record.training_options,
        variant=record.variant,
        guidance=record.cell.guidance,
        backbone=record.cell.backbone,
        backbone_options=record.backbone_options,
        settings=record.settings,
    )


def _kind(*, settings: Mapping[str, Any], **identity: Any) -> str:
    train = TrainConfig().model_dump(mode="json") | settings["train"]  # a record from before a setting existed had its default
    layers = settings.get("guidance", {}).get("layers")
    return digest({**identity, "layers": layers, "size": settings["images"]["size"], "train": {name: train[name] for name in COSTLY}})
