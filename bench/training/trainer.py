"""Train one `Training`: resume if there is something to resume, select on the protocol's split, leave the selected weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.au.maps import expression_ids
from bench.config import AugmentConfig, TrainConfig
from bench.data.atomic import write_json_atomic
from bench.data.batch import RawBatch, Reader
from bench.data.transforms import train_batch
from bench.matrix import Training, digest
from bench.method import Batch, Classifier
from bench.training.build import build_classifier, build_method, head_parameters
from bench.training.checkpoint import flatten_optimiser, load_checkpoint, load_latest, restore_optimiser, save_checkpoint
from bench.training.engine import Engine
from bench.training.observer import Observer
from bench.training.optimiser import build_optimiser, clip_gradients, learning_rate, set_learning_rate
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from bench.weights import without_loading

CHECK_EVERY = 50
"""Steps between looks at the loss (one wait for the device each)."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Progress:
    """All that a checkpoint holds besides tensors. Randomness needs no state: it is a function of (seed, epoch, step, key)."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    """One (classification, guidance) a step since the first."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] | None = None
    """``epoch``, ``accuracy`` on the selection split, and ``folder`` below ``best/``."""


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


def train(
    training: Training,
    *,
    folder: Path,
    reader: Reader,
    select: Callable[[Classifier], float],
    engine: Engine,
    observer: Observer,
    checkpoint_minutes: float,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in ``folder`` if there is one.

    Args:
        training: what to train.
        folder: of this training alone; holds ``checkpoints/``, ``best/`` and, at the end, ``trained.json``.
        reader: the training split.
        select: accuracy of a classifier on the selection split; called on all processes.
        engine: processes and device.
        observer: told of progress on the main process.
        checkpoint_minutes: longest time between checkpoints.

    Returns:
        The content of ``trained.json``.

    Raises:
        DivergedError: NaN or infinite loss, with the step.
        ValueError: the guidance names a layer the network does not have.
    """
    return _Trainer(
        training, folder=folder, reader=reader, select=select, engine=engine, observer=observer, checkpoint_minutes=checkpoint_minutes
    ).run()


def load_trained(training: Training, folder: Path, *, num_classes: int) -> Classifier:
    """The classifier with its selected weights, in eval mode, on the CPU.

    Raises:
        bench.training.checkpoint.DamagedCheckpointError: a file is missing or altered.
    """
    best = load_checkpoint(folder / "best" / read_trained(folder)["best"]["folder"])
    with without_loading():
        classifier = build_classifier(training, num_classes=num_classes)
    classifier.load_state_dict(best.model)
    return classifier.eval()


def read_trained(folder: Path) -> dict[str, Any]:
    """Content of ``trained.json``."""
    content: dict[str, Any] = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
    return content


class _Trainer:
    def __init__(
        self,
        training: Training,
        *,
        folder: Path,
        reader: Reader,
        select: Callable[[Classifier], float],
        engine: Engine,
        observer: Observer,
        checkpoint_minutes: float,
    ) -> None:
        self.training = training
        self.folder = folder
        self.reader = reader
        self.select = select
        self.engine = engine
        self.observer = observer
        self.checkpoint_seconds = 60 * checkpoint_minutes
        settings = training.settings
        self.config = TrainConfig.model_validate(settings["train"])
        self.augment = AugmentConfig.model_validate(settings["augment"])
        self.size: int = settings["images"]["size"]
        self.guidance: Mapping[str, Any] | None = settings.get("guidance")
        self.expressions = expression_ids(reader.classes).to(engine.device)
        self.steps_per_epoch = len(reader.keys) // self.config.batch_size
        self.data_seed = training.derived_seed("data")
        self.step_seed = training.derived_seed("step")
        self.progress = _Progress()

        self.method = build_method(training)
        self.classifier = build_classifier(training, num_classes=len(reader.classes))
        term = GuidanceTerm(weight=self.guidance["weight"], layers=tuple(self.guidance["layers"])) if self.guidance else None
        task = TrainingTask(self.classifier, self.method, term)
        optimiser = build_optimiser(self.classifier.backbone, head_parameters(self.classifier), self.config)
        self.module, self.optimiser = engine.prepare(task, optimiser)
        self._pending: list[Tensor] = []

    def run(self) -> dict[str, Any]:
        self._resume()
        total = self.config.epochs * self.steps_per_epoch
        label = self.training.label
        if self.engine.is_main:
            self.observer.begin(label, steps=total, done=len(self.progress.losses))
        self.engine.start_tracking(label, {"training": self.training.key, **self.training.settings["train"]})
        self._clock = self._last_checkpoint = time.monotonic()
        while self.progress.epoch < self.config.epochs:
            self._epoch()
        self.engine.stop_tracking()
        self.engine.release()
        if self.engine.is_main:
            self.observer.end(label)
        return self._finish()

    def _epoch(self) -> None:
        progress = self.progress
        self.module.train()
        batches = self.reader.train_steps(
            seed=self.data_seed,
            epoch=progress.epoch,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            batch_size=self.config.batch_size,
            start_step=progress.step,
        )
        for raw in batches:
            self._pending.append(self._step(raw.to(self.engine.device)))
            progress.step += 1
            if self.engine.is_main:
                self.observer.advance(self.training.label, steps=1, note="")
            if progress.step % CHECK_EVERY == 0 and progress.step < self.steps_per_epoch:
                self._collect_losses()
                if self.engine.from_main(time.monotonic() - self._last_checkpoint > self.checkpoint_seconds):
                    self._checkpoint()
        self._collect_losses()
        self._end_epoch()

    def _step(self, raw: RawBatch) -> Tensor:
        """One optimiser step over the global batch; returns (classification, guidance) of this process's share."""
        config, step = self.config, self.progress.epoch * self.steps_per_epoch + self.progress.step
        set_learning_rate(self.optimiser, learning_rate(config, step=step, steps_per_epoch=self.steps_per_epoch))
        # Dropout and its kin draw from torch's own generator: seeded by the step, so that a resumed run draws the same.
        torch.manual_seed(int(digest([self.step_seed, step, self.engine.rank])[:15], 16))
        batches = [self._batch(part) for part in raw.chunks(config.accumulate)]
        share = torch.zeros((), device=self.engine.device)
        if self.guidance:
            valid = self.engine.sum(torch.stack([batch.au_valid.sum() for batch in batches]).sum())
            share = guided_share(valid, parts=self.engine.world_size * config.accumulate)
        losses = torch.zeros(2, device=self.engine.device)
        for number, batch in enumerate(batches, start=1):
            with self.engine.accumulating(self.module, last=number == len(batches)):
                result = self.module(batch, share)
                self.engine.backward(result["loss"] / config.accumulate)
            losses += torch.stack([result["classification"], result["guidance"]]) / config.accumulate
        if config.clip_norm:
            self.engine.unscale(self.optimiser)
            clip_gradients(self.module, config.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return losses

    def _batch(self, raw: RawBatch) -> Batch:
        batch = train_batch(
            raw,
            seed=self.data_seed,
            epoch=self.progress.epoch,
            size=self.size,
            grid=self.guidance["grid"] if self.guidance else 28,
            augment=self.augment,
            expressions=self.expressions,
            au_variant=self.guidance["au_maps"] if self.guidance else "symmetric",
            mean=self.classifier.backbone.mean,
            std=self.classifier.backbone.std,
            with_au_maps=self.guidance is not None,
        )
        return self.method.mix(batch)

    def _collect_losses(self) -> None:
        """Average the losses of the steps since the last call over all processes; refuse to go on after NaN."""
        if not self._pending:
            return
        first = len(self.progress.losses)
        mean = self.engine.sum(torch.stack(self._pending)) / self.engine.world_size
        self._pending.clear()
        self.progress.losses.extend(mean.tolist())
        bad = (~mean.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise DivergedError(
                f"{self.training.label}: the loss is not finite at step {first + int(bad[0]) + 1}; "
                f"try a smaller train.lr or train.clip_norm = 1"
            )

    def _end_epoch(self) -> None:
        progress = self.progress
        progress.epoch, progress.step = progress.epoch + 1, 0
        steps = self.steps_per_epoch
        recent = torch.tensor(progress.losses[-steps:], dtype=torch.float64).mean(dim=0)
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "lr": learning_rate(self.config, step=progress.epoch * steps - 1, steps_per_epoch=steps),
            "classification": float(recent[0]),
            "guidance": float(recent[1]),
        }
        if progress.epoch % self.config.select_every == 0 or progress.epoch == self.config.epochs:
            self.engine.share_buffers(self.classifier)
            accuracy = self.select(self.classifier)
            record["accuracy"] = accuracy
            if progress.best is None or accuracy > progress.best["accuracy"]:
                progress.best = {"epoch": progress.epoch, "accuracy": accuracy, "folder": f"{progress.epoch:08d}"}
                if self.engine.is_main:
                    state = {"training": self.training.key, "epoch": progress.epoch, "accuracy": accuracy}
                    # Three, so that the checkpoint before the last still finds the best of its time.
                    save_checkpoint(
                        self.folder / "best", step=progress.epoch, tensors={"model": self.classifier.state_dict()}, state=state, keep=3
                    )
        progress.epochs.append(record)
        self.engine.track({k: v for k, v in record.items() if k != "epoch"}, step=progress.epoch)
        if self.engine.is_main:
            self.observer.epoch(self.training.label, record)
        self._checkpoint()

    def _checkpoint(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = self._last_checkpoint = now
        if self.engine.is_main:
            save_checkpoint(
                self.folder / "checkpoints",
                step=len(self.progress.losses),
                tensors={"model": self.classifier.state_dict(), "optimiser": flatten_optimiser(self.optimiser)},
                state={"training": self.training.key, "scaler": self.engine.scaler_state(), **dataclasses.asdict(self.progress)},
                keep=2,
            )
        self.engine.wait()

    def _resume(self) -> None:
        found = load_latest(self.folder / "checkpoints") if self.engine.is_main else None
        name = self.engine.from_main(found.folder.name if found else None)
        if name is None:
            return
        checkpoint = found or load_checkpoint(self.folder / "checkpoints" / name)
        state = checkpoint.state
        if state["training"] != self.training.key:
            raise ValueError(f"{checkpoint.folder} belongs to another training ({state['training'][:10]}); move it away")
        self.classifier.load_state_dict(checkpoint.model)
        restore_optimiser(self.optimiser, checkpoint.optimiser)
        self.engine.load_scaler_state(state["scaler"])
        self.progress = _Progress(**{field.name: state[field.name] for field in dataclasses.fields(_Progress)})
        _log.info("%s: resumed at step %d", self.training.label, len(self.progress.losses))

    def _finish(self) -> dict[str, Any]:
        progress = self.progress
        assert progress.best is not None
        steps = len(progress.losses)
        samples = steps * self.config.batch_size
        trained = {
            "training": self.training.key,
            "label": self.training.label,
            "best": progress.best,
            "epochs": progress.epochs,
            "losses": progress.losses,
            "samples_per_epoch": self.steps_per_epoch * self.config.batch_size,
            "remainder": len(self.reader.keys) - self.steps_per_epoch * self.config.batch_size,
            "parameters": sum(p.numel() for p in self.classifier.parameters()),
            "seconds": progress.seconds,
            "images_per_second": samples / progress.seconds,
            "peak_memory_bytes": peak_memory(self.engine.device),
            "world_size": self.engine.world_size,
        }
        if self.engine.is_main:
            write_json_atomic(self.folder / "trained.json", trained)
            shutil.rmtree(self.folder / "checkpoints")
        self.engine.wait()
        return trained


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device where it is an accelerator, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
