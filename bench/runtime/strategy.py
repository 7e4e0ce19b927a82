"""How a training is wrapped and stepped: the part of the engine in which DDP and DeepSpeed differ."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.config import ConfigError, TrainConfig


class Strategy(ABC):
    """Wraps module and optimiser, runs backward and step, and gives the optimiser's state by the numbers of whole parameters."""

    accelerator: Accelerator

    @abstractmethod
    def prepare(self, module: nn.Module, optimiser: Optimizer, config: TrainConfig) -> tuple[nn.Module, Optimizer]:
        """Move to the device and wrap. The weights of ``module`` stay where they are for reading and saving."""

    @abstractmethod
    def micro_batch(self, module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; gradients need to be exchanged in the ``last`` of a step only."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch's share of the loss."""

    @abstractmethod
    def step(self, module: nn.Module, optimiser: Optimizer, *, clip_norm: float) -> None:
        """Take the step with gradients of a norm of at most ``clip_norm`` (0 = any), and forget them."""

    @abstractmethod
    def optimiser_state(self, optimiser: Optimizer) -> dict[str, Tensor]:
        """`flatten_optimiser` of whole parameters. Collective: call it on all processes."""

    @abstractmethod
    def load_optimiser_state(self, optimiser: Optimizer, flat: Mapping[str, Tensor]) -> None:
        """Put back what `optimiser_state` gave; the module has its weights back already."""

    def close(self) -> None:  # noqa: B027 - most have nothing to undo
        """Undo what making the strategy changed in this process."""


class DDPStrategy(Strategy):
    """`torch.nn.parallel.DistributedDataParallel`, autocast and loss scaling, as Accelerate applies them; one process: no wrapper."""

    def __init__(self, *, cpu: bool, precision: str, **options: Any) -> None:
        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu, **options)

    def prepare(self, module: nn.Module, optimiser: Optimizer, config: TrainConfig) -> tuple[nn.Module, Optimizer]:
        """See `Strategy`."""
        prepared: tuple[nn.Module, Optimizer] = self.accelerator.prepare(module, optimiser)
        if config.compile:
            # In place and outermost: the classifier inside, which is evaluated, read out and saved, stays as it is.
            prepared[0].compile()
        return prepared

    @contextlib.contextmanager
    def micro_batch(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - `micro_batch` has seen to it
        """See `Strategy`."""
        self.accelerator.backward(loss)

    def step(self, module: nn.Module, optimiser: Optimizer, *, clip_norm: float) -> None:
        """See `Strategy`."""
        if clip_norm:
            self.accelerator.unscale_gradients(optimiser)
            clip_gradients(module, clip_norm)
        optimiser.step()
        optimiser.zero_grad()

    def optimiser_state(self, optimiser: Optimizer) -> dict[str, Tensor]:
        """See `Strategy`."""
        return flatten_optimiser(optimiser)

    def load_optimiser_state(self, optimiser: Optimizer, flat: Mapping[str, Tensor]) -> None:
        """See `Strategy`."""
        restore_optimiser(optimiser, flat)


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """The process-wide switches of a training, restored afterwards: what is evaluated in between is in exact float32.

    Raises:
        ConfigError: an operation without a deterministic form, with ``train.deterministic``.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    # Not torch.set_float32_matmul_precision: its "high" reaches the CPU too, where some machines then compute in bfloat16.
    cuda.allow_tf32 = cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if config.deterministic and "deterministic" in str(error):
            raise ConfigError(
                f"train.deterministic = true: this training uses an operation that has no deterministic form on this device; "
                f"use --set train.deterministic=false. PyTorch says: {str(error).splitlines()[0]}"
            ) from error
        raise
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before[:3]
        torch.use_deterministic_algorithms(before[3])


def flatten_optimiser(optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, ``<parameter number>.<slot>``. Groups are rebuilt from the configuration."""
    state = optimiser.state_dict()["state"]
    return {
        f"{number}.{slot}": torch.as_tensor(value) for number, slots in state.items() for slot, value in slots.items() if value is not None
    }


def restore_optimiser(optimiser: Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_optimiser` took."""
    whole = optimiser.state_dict()
    whole["state"] = {}
    for name, tensor in flat.items():
        number, slot = name.split(".", 1)
        whole["state"].setdefault(int(number), {})[slot] = tensor
    optimiser.load_state_dict(whole)


def clip_gradients(module: nn.Module, largest: float) -> None:
    """Scale the gradient down to a norm of at most ``largest``; 0 = leave it."""
    if largest > 0:
        torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
