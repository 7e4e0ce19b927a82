"""The engine: processes, devices, precision and trackers, all Accelerate's. One engine serves a whole run.

Only model and optimiser go through ``Accelerator.prepare``: loaders and schedules do not survive it (FIELD.md C1, C7).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")


class Engine:
    """A thin face of `accelerate.Accelerator` with the few collectives a sweep needs."""

    def __init__(
        self,
        *,
        precision: Literal["no", "bf16", "fp16"] = "no",
        device: Literal["auto", "cpu"] = "auto",
        trackers: tuple[str, ...] = (),
        tracking_folder: Path | None = None,
        timeout_s: int = 1800,
    ) -> None:
        """Join the world that torchrun, ``accelerate launch`` or srun describe in the environment, or be alone.

        Args:
            precision: of autocast in training; evaluation is always float32.
            device: ``cpu`` keeps off accelerators that are there.
            trackers: names of Accelerate trackers, ``tensorboard`` or ``wandb``.
            tracking_folder: where trackers write.
            timeout_s: seconds after which a lost process makes the others fail.

        Raises:
            ValueError: fp16 without an accelerator, or a tracker whose package is not installed.
        """
        cpu = device == "cpu" or not torch.accelerator.is_available()
        if precision == "fp16" and cpu:
            raise ValueError("train.precision = 'fp16' needs a GPU; on this machine use --set train.precision=no (or bf16)")
        self._accelerator = Accelerator(
            mixed_precision=precision,
            cpu=cpu,
            log_with=list(trackers) or None,
            project_dir=str(tracking_folder) if tracking_folder else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=dt.timedelta(seconds=timeout_s))],
        )
        self._trackers = trackers
        if trackers and not self._accelerator.log_with:
            raise ValueError(f"--track {','.join(trackers)}: the package is not installed; try: pip install 'bench[{trackers[0]}]'")

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

    def prepare(self, module: nn.Module, optimiser: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Move to the device, wrap for DDP and mixed precision."""
        prepared: tuple[nn.Module, Optimizer] = self._accelerator.prepare(module, optimiser)
        return prepared

    def release(self) -> None:
        """Forget what `prepare` was given, so that the next training starts clean."""
        self._accelerator.free_memory()

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients are exchanged only in the last micro-batch of a step."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward, through the loss scaler where there is one."""
        self._accelerator.backward(loss)

    def unscale(self, optimiser: Optimizer) -> None:
        """Undo the loss scale before gradients are looked at."""
        self._accelerator.unscale_gradients(optimiser)

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

    def from_main(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers: running statistics drift apart in training (FIELD.md C4)."""
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


def world_size() -> int:
    """Number of processes the launcher's environment describes, known before any of them meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))
