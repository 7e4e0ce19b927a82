"""Train one `Training`: resume if there is something to resume, select on the protocol's split, leave the selected weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.au.maps import expression_ids
from bench.config import AugmentConfig, TrainConfig
from bench.data.batch import RawBatch, Reader
from bench.data.transforms import train_batch
from bench.draws import drawing
from bench.io import write_json_atomic
from bench.matrix import Training, digest
from bench.method import Batch, Classifier, Method
from bench.prepare.preparation import Preparation
from bench.runtime.engine import Engine
from bench.runtime.interruption import EverywhereError, Hold, LeaseLostError, StoppedError, Unshared
from bench.runtime.observer import Observer, Work
from bench.runtime.strategy import numerics
from bench.training.build import build_classifier, build_method, head_parameters
from bench.training.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    check_checkpoint,
    keep_only,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    set_aside,
)
from bench.training.ema import WeightAverage
from bench.training.optimiser import build_optimiser, learning_rate, set_learning_rate
from bench.training.random_layers import GeneratorWatch, batch_statistics, enough_for_batch_norm
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from bench.weights import without_loading

TRAINED = "trained.json"
"""Written last: a training's folder that holds it is finished."""
CHECK_EVERY = 50
"""Steps between looks at the loss (one wait for the device each)."""
HEED_SECONDS = 1.0
"""Time between looks of several processes at each other's requests to stop; alone, a process looks after every step."""

BATCH_STATISTICS = "batch statistics"
OWN_DRAWS = "random numbers of each process"
"""What may make weights depend on the number of processes, in words for tables."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Progress:
    """All that a checkpoint holds besides tensors. Randomness needs no state: it is a function of (seed, epoch, step, key)."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    """See `peak_memory`."""
    process_counts: list[int] = dataclasses.field(default_factory=list)
    """Numbers of processes that the training ran in, in the order of their first use."""
    process_dependent: list[str] = dataclasses.field(default_factory=list)
    """What makes the weights depend on how a batch is spread over processes, in words; empty: nothing but rounding does."""
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    """One (classification, guidance) a step since the first."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] | None = None
    """``epoch``, ``accuracy`` on the selection split, and ``folder`` below ``best/``."""


class DivergedError(EverywhereError):
    """The loss became NaN or infinite. It is summed over all processes before it is looked at."""


def train(
    training: Training,
    *,
    folder: Path,
    reader: Reader,
    select: Callable[[Classifier], float],
    engine: Engine,
    observer: Observer,
    checkpoint_minutes: float,
    hold: Hold | None = None,
    preparation: Preparation | None = None,
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
        hold: the main process's right to work in ``folder``; None where nobody else can.
        preparation: how the pictures were prepared, for those who bring pictures of their own later. No part of the training's key.

    Returns:
        The content of ``trained.json``.

    Raises:
        DivergedError: NaN or infinite loss, with the step.
        StoppedError: the run was asked to stop; the last finished step is in a checkpoint.
        LeaseLostError: somebody else works on this training now; nothing was written since.
        EverywhereError: with several processes, what went wrong on one of them outside of a step. Other errors leave the processes out
            of step, and carry a note that tells the step.
        ValueError: the guidance names a layer the network does not have.
    """
    return _Trainer(
        training,
        folder=folder,
        reader=reader,
        select=select,
        engine=engine,
        observer=observer,
        checkpoint_minutes=checkpoint_minutes,
        hold=hold or Unshared(),
        preparation=preparation,
    ).run()


def load_trained(training: Training, folder: Path, *, num_classes: int) -> Classifier:
    """The classifier with its selected weights, in eval mode, on the CPU.

    Raises:
        bench.training.checkpoint.DamagedCheckpointError: a file is missing or altered.
    """
    best = load_checkpoint(selected_weights(folder))
    with without_loading():
        classifier = build_classifier(training, num_classes=num_classes)
    classifier.load_state_dict(best.model)
    return classifier.eval()


def selected_weights(folder: Path) -> Path:
    """The folder of a finished training's selected weights.

    Raises:
        FileNotFoundError, ValueError: see `read_trained`.
    """
    return Path(folder / "best" / read_trained(folder)["best"]["folder"])


def read_trained(folder: Path) -> dict[str, Any]:
    """Content of ``trained.json``.

    Raises:
        FileNotFoundError: the training has not come to its end.
        ValueError: the file is damaged; the message names it.
    """
    path = folder / TRAINED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; bench run trains it again") from error
    if not isinstance(content, dict) or not {"training", "best"} <= content.keys():
        raise ValueError(f"{path} is damaged: it does not say what was trained; bench run trains it again")
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
        hold: Hold,
        preparation: Preparation | None,
    ) -> None:
        self.training = training
        self.preparation = preparation
        self.hold = hold
        self.folder = folder
        self.reader = reader
        self.select = select
        self.engine = engine
        self.observer = observer
        self.work = Work(training.label, "training")
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

        with engine.together():
            self.method = build_method(training)
            self.classifier = build_classifier(training, num_classes=len(reader.classes))
        term = GuidanceTerm(weight=self.guidance["weight"], layers=tuple(self.guidance["layers"])) if self.guidance else None
        task = TrainingTask(self.classifier, self.method, term)
        optimiser = build_optimiser(self.classifier.backbone, head_parameters(self.classifier), self.config)
        self.average = WeightAverage(self.classifier, decay=self.config.ema) if self.config.ema else None
        self.module, self.optimiser = engine.prepare(task, optimiser, self.config)
        if self.average:
            self.average.module.to(engine.device)
        self._pending: list[Tensor] = []
        self._bests: list[str | None] = []
        """Folders below ``best/`` that the last two checkpoints name."""
        self._unheeded, self._heed_every = 0, 1
        self._unwatched = True

    def run(self) -> dict[str, Any]:
        self._resume()
        total = self.config.epochs * self.steps_per_epoch
        if self.engine.is_main:
            self.observer.begin(self.work, steps=total, done=len(self.progress.losses))
        self.engine.start_tracking(self.training.label, {"training": self.training.key, **self.training.settings["train"]})
        self._clock = self._last_checkpoint = self._heeded = time.monotonic()
        try:
            reset_peak_memory(self.engine.device)
            while self.progress.epoch < self.config.epochs:
                self._epoch()
        except DivergedError:
            raise
        except Exception as error:
            if self.engine.world_size == 1 and self.engine.stop.reason is not None:
                # What stops this process may have reached the loader's workers too, whose end is an error at any point of a step.
                raise StoppedError(f"{self.training.label}: stopped by {self.engine.stop.reason}; the last checkpoint is kept") from error
            done = self.progress.epoch * self.steps_per_epoch + self.progress.step
            error.add_note(f"after step {done} of {total}, in epoch {self.progress.epoch + 1}")
            raise
        finally:
            self.engine.stop_tracking()  # a tracker that is left open takes the figures of the training that follows
        self.engine.release()
        if self.engine.is_main:
            self.observer.end(self.work)
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
            with numerics(self.config):
                self._pending.append(self._step(raw.to(self.engine.device)))
            progress.step += 1
            if self.engine.is_main:
                self.observer.advance(self.work, steps=1, note="")
            if progress.step % CHECK_EVERY == 0 and progress.step < self.steps_per_epoch:
                self._collect_losses()
                if self.engine.from_main(time.monotonic() - self._last_checkpoint > self.checkpoint_seconds):
                    self._checkpoint()
            self._heed()
        self._collect_losses()
        self._end_epoch()

    def _heed(self) -> None:
        """Stop if somebody has asked for it, with the last step saved, or if the lease is gone.

        Several processes decide together, by one small sum about every `HEED_SECONDS`, so that none goes on without the others.
        """
        self._unheeded += 1
        if self._unheeded < self._heed_every:
            return
        stop, lost = self.engine.stop.reason is not None, self.hold.lost
        if self.engine.world_size > 1:
            now = time.monotonic()
            sums = self.engine.sum(torch.tensor([float(stop), float(lost), now - self._heeded], device=self.engine.device))
            stopping, losing, seconds = sums.tolist()
            stop, lost = stopping > 0, losing > 0
            # The same figures, hence the same number of steps to the next look, on all processes.
            steps_per_second = self._unheeded * self.engine.world_size / max(seconds, 1e-6)
            self._heed_every = max(1, min(CHECK_EVERY, int(steps_per_second * HEED_SECONDS)))
            self._unheeded, self._heeded = 0, now
        if lost:
            raise LeaseLostError(f"{self.training.label}: another run has taken this training over; nothing more is written from here")
        if stop:
            self._collect_losses()
            self._stop()

    def _stop(self) -> None:
        self._checkpoint()
        done, total = len(self.progress.losses), self.config.epochs * self.steps_per_epoch
        reason = self.engine.stop.reason or "a request to another process"
        raise StoppedError(f"{self.training.label}: stopped by {reason} after step {done} of {total}, which is saved")

    def _step(self, raw: RawBatch) -> Tensor:
        """One optimiser step over the global batch; returns (classification, guidance) of this process's share."""
        config, step = self.config, self.progress.epoch * self.steps_per_epoch + self.progress.step
        set_learning_rate(self.optimiser, learning_rate(config, step=step, steps_per_epoch=self.steps_per_epoch))
        # For what draws from torch's own generator and not from `bench.draws`: so that a resumed run draws the same.
        torch.manual_seed(int(digest([self.step_seed, step, self.engine.rank])[:15], 16))
        batches = self._mix([self._batch(part) for part in raw.chunks(config.accumulate)])
        share = torch.zeros((), device=self.engine.device)
        if self.guidance:
            valid = self.engine.sum(torch.stack([batch.au_valid.sum() for batch in batches]).sum())
            share = guided_share(valid, parts=self.engine.world_size * config.accumulate)
        losses = torch.zeros(2, device=self.engine.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with (
                drawing(seed=self.step_seed, step=step, samples=batch.seeds),
                self.engine.strategy.micro_batch(self.module, last=last),
                enough_for_batch_norm(self.classifier, samples=len(batch.images)),
            ):
                watch = GeneratorWatch(self.engine.device) if self._unwatched else None
                result = self.module(batch, share)
                if watch is not None:
                    self._note_processes(drawn=watch.drawn())
                self.engine.strategy.backward(result["loss"] / config.accumulate, last=last)
            losses += torch.stack([result["classification"], result["guidance"]]) / config.accumulate
        self.engine.strategy.step(self.module, self.optimiser, clip_norm=config.clip_norm)
        if self.average:
            self.average.update(self.classifier)
        return losses

    def _batch(self, raw: RawBatch) -> Batch:
        return train_batch(
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

    def _mix(self, batches: list[Batch]) -> list[Batch]:
        """This process's micro-batches, after the method has mixed those of all processes."""
        if type(self.method).mix is not Method.mix:
            columns = {field.name: [getattr(batch, field.name) for batch in batches] for field in dataclasses.fields(Batch)}
            whole = Batch(**{name: self.engine.gather_rows(torch.cat(parts)) for name, parts in columns.items()})
            batches = self.method.mix(whole).chunks(self.engine.world_size)[self.engine.rank].chunks(len(batches))
        if self.config.channels_last:
            batches = [dataclasses.replace(b, images=b.images.contiguous(memory_format=torch.channels_last)) for b in batches]
        return batches

    def _note_processes(self, *, drawn: bool) -> None:
        """Note in how many processes this goes on, and what of the network depends on that; once a start."""
        self._unwatched = False
        progress, count = self.progress, self.engine.world_size
        progress.process_counts += [count] if count not in progress.process_counts else []
        causes = {BATCH_STATISTICS: batch_statistics(self.classifier), OWN_DRAWS: drawn}
        progress.process_dependent += [cause for cause, holds in causes.items() if holds and cause not in progress.process_dependent]

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
        epoch = progress.epoch + 1
        steps = self.steps_per_epoch
        recent = torch.tensor(progress.losses[-steps:], dtype=torch.float64).mean(dim=0)
        record: dict[str, Any] = {
            "epoch": epoch,
            "lr": learning_rate(self.config, step=epoch * steps - 1, steps_per_epoch=steps),
            "classification": float(recent[0]),
            "guidance": float(recent[1]),
        }
        if epoch % self.config.select_every == 0 or epoch == self.config.epochs:
            selected = self.average.module if self.average else self.classifier
            self.engine.share_buffers(selected)
            try:
                accuracy = self.select(selected)
            except StoppedError:
                self._stop()  # all steps of the epoch are done: the next start begins with this selection
                raise
            record["accuracy"] = accuracy
            if progress.best is None or accuracy > progress.best["accuracy"]:
                best = {"epoch": epoch, "accuracy": accuracy, "folder": f"{epoch:08d}"}
                with self.engine.together():
                    if self.engine.is_main:
                        self.hold.confirm()
                        state = {"training": self.training.key, "epoch": epoch, "accuracy": accuracy}
                        save_checkpoint(self.folder / "best", step=epoch, tensors={"model": selected.state_dict()}, state=state, keep=None)
                progress.best = best
        progress.epoch, progress.step = epoch, 0
        progress.epochs.append(record)
        self.engine.track({k: v for k, v in record.items() if k != "epoch"}, step=epoch)
        if self.engine.is_main:
            self.observer.epoch(self.work, record)
        self._checkpoint()

    def _checkpoint(self) -> None:
        now = time.monotonic()
        peak = peak_memory(self.engine.device)
        self.progress.peak_memory_bytes = None if peak is None else max(peak, self.progress.peak_memory_bytes or 0)
        self.progress.seconds += now - self._clock
        self._clock = self._last_checkpoint = now
        optimiser = self.engine.strategy.optimiser_state(self.optimiser)  # of all processes, where each has a part
        best = self.progress.best
        self._bests = [*self._bests[-1:], best["folder"] if best else None]
        with self.engine.together():
            if self.engine.is_main:
                self.hold.confirm()
                save_checkpoint(
                    self.folder / "checkpoints",
                    step=len(self.progress.losses),
                    tensors={
                        "model": self.classifier.state_dict(),
                        "optimiser": optimiser,
                        **({"average": self.average.module.state_dict()} if self.average else {}),
                    },
                    state={"training": self.training.key, "scaler": self.engine.scaler_state(), **dataclasses.asdict(self.progress)},
                    keep=2,
                )
                # By name and not by age: an earlier try may have left later epochs, and the checkpoint before this one needs its own best.
                keep_only(self.folder / "best", {name for name in self._bests if name is not None})

    def _resume(self) -> None:
        with self.engine.together():
            newest = self._look_for_checkpoint() if self.engine.is_main else None
        name = self.engine.from_main(newest.folder.name if newest else None)
        if name is None:
            return
        with self.engine.together():
            checkpoint = newest or load_checkpoint(self.folder / "checkpoints" / name)
            state = checkpoint.state
            if state["training"] != self.training.key:
                raise ValueError(f"{checkpoint.folder} belongs to another training ({state['training'][:10]}); move it away")
            self.classifier.load_state_dict(checkpoint.model)
            if self.average:
                self.average.module.load_state_dict(checkpoint.average)
            self.engine.strategy.load_optimiser_state(self.optimiser, checkpoint.optimiser)
        self.engine.load_scaler_state(state["scaler"])
        self.progress = _Progress(**{field.name: state[field.name] for field in dataclasses.fields(_Progress) if field.name in state})
        best = self.progress.best
        self._bests = [best["folder"] if best else None]
        _log.info("%s: resumed at step %d", self.training.label, len(self.progress.losses))

    def _look_for_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that can be gone on from. Where there is none, nothing of an earlier try stays in ``best/``."""
        self.hold.confirm()
        checkpoints, best = self.folder / "checkpoints", self.folder / "best"
        checkpoint = load_latest(checkpoints, check=self._check_best)
        if checkpoint is None and best.is_dir():
            checkpoints.mkdir(exist_ok=True)
            place = set_aside(best, into=checkpoints)
            _log.warning("%s: begins anew; the best weights of before are kept as %s until it ends", self.training.label, place)
        return checkpoint

    def _check_best(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of this training whose best weights are lost: a training that goes on from it may end without any."""
        best = checkpoint.state["best"]
        if best is None or checkpoint.state["training"] != self.training.key:
            return
        try:
            check_checkpoint(self.folder / "best" / best["folder"])
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"checkpoint {checkpoint.folder} is of no use without its best weights: {error}") from error

    def _finish(self) -> dict[str, Any]:
        progress = self.progress
        assert progress.best is not None
        steps = len(progress.losses)
        samples = steps * self.config.batch_size
        trained = {
            "training": self.training.key,
            "label": self.training.label,
            "identity": self.training.identity,
            "dataset": {"name": self.training.dataset.name, "entry": self.training.dataset.entry},
            "classes": list(self.reader.classes),
            **({"preparation": self.preparation.model_dump(mode="json")} if self.preparation else {}),
            "best": progress.best,
            "epochs": progress.epochs,
            "losses": progress.losses,
            "samples_per_epoch": self.steps_per_epoch * self.config.batch_size,
            "remainder": len(self.reader.keys) - self.steps_per_epoch * self.config.batch_size,
            "parameters": sum(p.numel() for p in self.classifier.parameters()),
            "seconds": progress.seconds,
            "images_per_second": samples / progress.seconds,
            "peak_memory_bytes": progress.peak_memory_bytes,
            "process_counts": progress.process_counts,
            "process_dependent": progress.process_dependent,
        }
        with self.engine.together():
            if self.engine.is_main:
                self.hold.confirm()
                write_json_atomic(self.folder / TRAINED, trained)
                shutil.rmtree(self.folder / "checkpoints")
        return trained


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew: here begins work that is to be measured by itself."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of the device in use since `reset_peak_memory`.

    None on a CPU: the system knows the most that a process has held since its start, whatever it did before, and no more.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
