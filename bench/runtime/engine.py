"""The engine: processes, devices, precision and trackers, all Accelerate's. One engine serves a whole run.

Only model and optimiser go through ``Accelerator.prepare``: loaders and schedules do not survive it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.config import ConfigError, TrainConfig
from bench.extras import install_command
from bench.matrix import Training
from bench.runtime.environment import forget_leftovers
from bench.runtime.interruption import EverywhereError, HaltError, LeaseLostError, StoppedError, StopRequest
from bench.runtime.lost_peers import give_up_on_lost_peers
from bench.runtime.strategy import DDPStrategy, Strategy

T = TypeVar("T")

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
PROCESS_WIDE = ("engine", "zero_stage", "precision", "sync_batchnorm", "deterministic")
"""Keys of ``[train]`` that one engine serves all its trainings with."""
LONGEST_SILENCE_S = 900
"""Of the store where the processes meet, before it counts as lost; about the kernel's own patience."""


class Engine:
    """A thin face of `accelerate.Accelerator` with the few collectives a sweep needs."""

    def __init__(
        self,
        *,
        train: TrainConfig | None = None,
        device: Literal["auto", "cpu"] = "auto",
        trackers: tuple[str, ...] = (),
        tracking_folder: Path | None = None,
        timeout_s: int = 1800,
        stop: StopRequest | None = None,
    ) -> None:
        """Join the world that torchrun, ``accelerate launch`` or srun describe in the environment, or be alone.

        Args:
            train: the settings of the run, of which those named in `PROCESS_WIDE` count here; None = the defaults.
            device: ``cpu`` keeps off accelerators that are there.
            trackers: names of Accelerate trackers, ``tensorboard`` or ``wandb``.
            tracking_folder: where trackers write.
            timeout_s: seconds after which a lost process makes the others fail.
            stop: where a request to stop this process is noted, see `bench.runtime.interruption.StopRequest`.

        Raises:
            ValueError: what this machine does not have: an accelerator for fp16 or SyncBatchNorm, DeepSpeed, a tracker.
        """
        train = train or TrainConfig()
        cpu = device == "cpu" or not torch.accelerator.is_available()
        if train.precision == "fp16" and cpu:
            raise ConfigError("train.precision = 'fp16' needs a GPU; on this machine use --set train.precision=no (or bf16)")
        if train.sync_batchnorm and cpu:
            raise ConfigError("train.sync_batchnorm = true needs GPUs; on this machine use --set train.sync_batchnorm=false")
        if train.deterministic and not cpu:
            _fix_cublas()
        forget_leftovers()
        options: dict[str, Any] = {
            "cpu": cpu,
            "precision": train.precision,
            "log_with": list(trackers) or None,
            "project_dir": str(tracking_folder) if tracking_folder else None,
            "kwargs_handlers": [InitProcessGroupKwargs(timeout=dt.timedelta(seconds=timeout_s))],
        }
        self._strategy = _deepspeed(train.zero_stage, options) if train.engine == "deepspeed" else DDPStrategy(**options)
        self._accelerator = self._strategy.accelerator
        if self.world_size > 1 and "MASTER_PORT" in os.environ:
            give_up_on_lost_peers(int(os.environ["MASTER_PORT"]), seconds=min(timeout_s, LONGEST_SILENCE_S))
        # PyTorch's default for convolutions is True, and the environment can switch on the other: an evaluation is in float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._train = train
        self._trackers = trackers
        if trackers and not self._accelerator.log_with:
            # Accelerate knows further trackers, for which we have no extra.
            command = install_command(trackers[0]) if trackers[0] in ("tensorboard", "wandb") else f"pip install {trackers[0]}"
            raise ValueError(f"--track {','.join(trackers)}: the package is not installed; try: {command}")

        self.stop = stop or StopRequest()
        """Looked at between batches of an evaluation, and by all processes together between steps of a training."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return bool(self._accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self._accelerator.device)

    @property
    def strategy(self) -> Strategy:
        """What backward and step of a training go through."""
        return self._strategy

    def prepare(self, module: nn.Module, optimiser: Optimizer, config: TrainConfig) -> tuple[nn.Module, Optimizer]:
        """Move to the device, wrap for several processes and for the switches of ``config``."""
        for key in PROCESS_WIDE:  # `check_engine` has refused it in the plan
            assert getattr(config, key) == getattr(self._train, key), key
        if config.sync_batchnorm and self.world_size > 1:
            from timm.layers.norm_act import convert_sync_batchnorm  # knows timm's own layers too

            module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        if config.channels_last:
            module = module.to(memory_format=torch.channels_last)
        return self._strategy.prepare(module, optimiser, config)

    def release(self) -> None:
        """Forget what `prepare` was given, so that the next training starts clean."""
        self._accelerator.free_memory()

    def scaler_state(self) -> dict[str, Any]:
        """State of the fp16 loss scaler, empty without one."""
        scaler = self._accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `scaler_state` gave."""
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(dict(state))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes; the argument is left alone."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in rank order, on all of them (JSON-like objects of our own making)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(N, ...) of each process -> (processes x N, ...), in rank order, on all of them. N is the same everywhere."""
        if self.world_size == 1:
            return rows
        gathered: Tensor = self._accelerator.gather(rows)
        return gathered

    def from_main(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether it is so on some process; all get the same answer."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work without collectives, at whose end all processes meet; where it fails on one of them, it fails on all.

        With one process an exception passes as it is.

        Raises:
            EverywhereError: it failed on some process; with its text.
            HaltError: some process was asked to stop, or has lost the lease.
        """
        if self.world_size == 1:
            yield
            return
        local: BaseException | None = None
        try:
            yield
        except (Exception, HaltError) as error:  # noqa: BLE001 - raised again below, on all processes
            local = error
        errors = self.gather(None if local is None else (type(local).__name__, str(local)))
        wrong = {rank: what for rank, what in enumerate(errors) if what is not None}
        for halt in (LeaseLostError, StoppedError):
            for name, text in wrong.values():
                if name == halt.__name__:
                    raise halt(text) from local
        if wrong:
            rank, (name, text) = next(iter(wrong.items()))
            everyone = len(set(errors)) == 1
            raise EverywhereError(f"{name}: {text}" if everyone else f"process {rank}: {name}: {text}") from local

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers: running statistics drift apart in training."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()

    def start_tracking(self, name: str, config: Mapping[str, Any]) -> None:
        """Begin a tracked training (a no-op without trackers)."""
        if self._trackers:
            self._accelerator.init_trackers(
                name.replace("/", "_"), config={k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
            )

    def track(self, values: Mapping[str, float], *, step: int) -> None:
        """Log values to the trackers (a no-op without)."""
        if self._trackers:
            self._accelerator.log(dict(values), step=step)

    def stop_tracking(self) -> None:
        """Finish the trackers of this training."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._strategy.close()


def check_engine(trainings: Iterable[Training], train: TrainConfig) -> None:
    """Refuse what one engine cannot do for all trainings of a run, and an engine that is not installed.

    Raises:
        ConfigError: with what to say instead.
    """
    if train.engine == "deepspeed":
        from bench.runtime.deepspeed_strategy import check_installed

        check_installed()
    for training in trainings:
        for key in PROCESS_WIDE:
            wanted, ours = training.settings["train"][key], getattr(train, key)
            if wanted != ours:
                source = training.brought.get(f"train.{key}", "an entry")
                raise ConfigError(
                    f"{training.label}: {source} brings train.{key} = {wanted!r}, and this run has {ours!r} for all its trainings; "
                    f"say which it shall be: --set train.{key}={wanted}"
                )


def _deepspeed(zero_stage: int, options: dict[str, Any]) -> Strategy:
    from bench.runtime.deepspeed_strategy import DeepSpeedStrategy

    return DeepSpeedStrategy(zero_stage=zero_stage, **options)


def _fix_cublas() -> None:
    """CuBLAS reads how it may split its work when CUDA starts."""
    if CUBLAS not in os.environ and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(f"train.deterministic = true: CUDA has started without {CUBLAS}; start again with {CUBLAS}=:4096:8")
    os.environ.setdefault(CUBLAS, ":4096:8")
