"""DeepSpeed (ZeRO 0, 1, 2) through Accelerate. DeepSpeed is imported when the strategy is made, never before."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.config import ConfigError, TrainConfig
from bench.extras import install_command
from bench.runtime.strategy import Strategy

BUCKET = 50_000_000
"""Elements a collective moves at once. Accelerate's "auto" wants a hidden size, which these networks do not have."""


def check_installed() -> None:
    """Refuse DeepSpeed where it, or what Accelerate needs for it, is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    for package in ("deepspeed", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.engine = 'deepspeed': the package {package} is not installed; {install_command('deepspeed')}, or use --engine ddp"
            )


class DeepSpeedStrategy(Strategy):
    """ZeRO in float32, or under our own bfloat16 autocast, which is DDP's: parameters and optimiser state stay float32."""

    def __init__(self, *, cpu: bool, precision: str, zero_stage: int, kwargs_handlers: list[Any], **options: Any) -> None:
        """Join the world, or be one of its own: DeepSpeed wants a process group even for one process.

        Raises:
            ConfigError: it is not installed, or CPUs are asked for on a machine with accelerators.
        """
        check_installed()
        if cpu and torch.accelerator.is_available():
            raise ConfigError("--device cpu: DeepSpeed takes the GPU that is there; hide it (CUDA_VISIBLE_DEVICES=) or use --engine ddp")
        self._environment = _alone()
        os.environ.update(self._environment)
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        from accelerate.utils import DeepSpeedPlugin

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._config = _deepspeed_config(zero_stage)
        # Not cpu=True: Accelerate would then leave DeepSpeed out without a word; gloo by name, or every rank were 0.
        for handler in kwargs_handlers:
            if cpu and hasattr(handler, "backend"):
                handler.backend = "gloo"
        plugin = DeepSpeedPlugin(hf_ds_config=self._config, zero3_init_flag=False)
        self.accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=kwargs_handlers, **options)
        self._precision = precision
        self._engine: Any = None
        self._numbered: list[nn.Parameter] = []

    def prepare(self, module: nn.Module, optimiser: Optimizer, config: TrainConfig) -> tuple[nn.Module, Optimizer]:
        """See `Strategy`."""
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size // (self.accelerator.num_processes * config.accumulate)
        settings["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps = config.accumulate
        settings["gradient_clipping"] = float(config.clip_norm)  # clip_grad_norm_ does nothing under DeepSpeed; 0 = off
        self._numbered = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        if self._precision == "bf16":
            # Inside the engine, which switches off any autocast around it; the losses leave it in float32.
            autocast = torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)
            module.forward = autocast(module.forward)
        self._engine, wrapped = self.accelerator.prepare(module.to(self.accelerator.device), optimiser)
        return self._engine, wrapped

    @contextlib.contextmanager
    def micro_batch(self, module: nn.Module, *, last: bool) -> Iterator[None]:  # noqa: ARG002 - `backward` tells DeepSpeed
        """See `Strategy`."""
        yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward; in the ``last`` micro-batch DeepSpeed exchanges the gradients meanwhile. The loss is a share already."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, module: nn.Module, optimiser: Optimizer, *, clip_norm: float) -> None:  # noqa: ARG002 - DeepSpeed has them all
        """Step and forget the gradients, with the ``clip_norm`` that `prepare` was given."""
        self._engine.step()

    def optimiser_state(self, optimiser: Optimizer) -> dict[str, Tensor]:
        """Whole parameters' state, put together from the parts that ZeRO keeps on each process: no trace of the world size."""
        zero = _zero(optimiser)
        if zero is None:
            return _by_number(self._numbered, lambda parameter: _base(optimiser).state.get(parameter, {}))
        return _by_number(self._numbered, lambda parameter: _gather(zero, parameter))

    def load_optimiser_state(self, optimiser: Optimizer, flat: Mapping[str, Tensor]) -> None:
        """Give each process its part of every state, and the weights it steps (a copy of its own in ZeRO) the module's values."""
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            number, slot = name.split(".", 1)
            slots.setdefault(int(number), {})[slot] = tensor
        zero = _zero(optimiser)
        for place, parameter in enumerate(self._numbered):
            for slot, value in slots.get(place, {}).items():
                if zero is None:
                    on_device = value if slot == "step" else value.to(parameter.device)
                    _base(optimiser).state[parameter][slot] = on_device.clone()
                else:
                    _scatter(zero, parameter, slot, value)
        if zero is not None:
            zero.refresh_fp32_params()

    def close(self) -> None:
        """Take back the environment of a world of one."""
        for name in self._environment:
            os.environ.pop(name, None)


def _deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """Everything in numbers. The batch is filled in by `DeepSpeedStrategy.prepare`."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "overlap_comm": False,
            "round_robin_gradients": False,
        },
    }


def _alone() -> dict[str, str]:
    """What a launcher would have put into the environment for a single process; empty under a launcher."""
    if "LOCAL_RANK" in os.environ:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: value for name, value in world.items() if name not in os.environ}


def _base(optimiser: Any) -> Optimizer:
    """The torch optimiser under the wrappers of Accelerate and DeepSpeed."""
    zero = _zero(optimiser)
    base: Optimizer = zero.optimizer if zero is not None else optimiser.optimizer
    return base


def _zero(optimiser: Any) -> Any:
    """DeepSpeed's ZeRO optimiser, None in stage 0."""
    inner = optimiser.optimizer
    return inner if hasattr(inner, "single_partition_of_fp32_groups") else None


def _by_number(parameters: list[nn.Parameter], state: Any) -> dict[str, Tensor]:
    return {
        f"{number}.{slot}": torch.as_tensor(value)
        for number, parameter in enumerate(parameters)
        for slot, value in state(parameter).items()
        if value is not None
    }


def _partition(zero: Any, parameter: nn.Parameter) -> Tensor:
    """The flat float32 weights that this process steps, of the group the parameter is in."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        if any(member is parameter for member in group):
            partition: Tensor = flat
            return partition
    raise AssertionError("a parameter of the optimiser is in no group of ZeRO")


def _gather(zero: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    flat = _partition(zero, parameter)
    whole: dict[str, Tensor] = {}
    for slot, value in zero.optimizer.state.get(flat, {}).items():
        if value is None or value.shape != flat.shape:  # AdamW counts its steps in a scalar, equal everywhere
            if value is not None:
                whole[slot] = value.clone()
            continue
        full = torch.zeros(parameter.numel(), device=flat.device, dtype=flat.dtype)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001 - what DeepSpeed's universal checkpoints read
        if mapping is not None:
            ours, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            full.narrow(0, ours.start, ours.numel).copy_(value.narrow(0, here.start, here.numel))
        # Every element is on one process and 0 on the others; added as integers no bit of a float changes, not even of -0.0.
        dist.all_reduce(full.view(torch.int32))
        whole[slot] = full.view_as(parameter)
    return whole


def _scatter(zero: Any, parameter: nn.Parameter, slot: str, value: Tensor) -> None:
    flat = _partition(zero, parameter)
    state = zero.optimizer.state[flat]
    if value.shape != parameter.shape or slot == "step":
        state[slot] = value.clone()
        return
    if slot not in state:
        state[slot] = torch.zeros_like(flat, requires_grad=False)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # noqa: SLF001
    if mapping is not None:
        ours, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        part = value.to(flat.device).reshape(-1).narrow(0, ours.start, ours.numel)
        state[slot].narrow(0, here.start, here.numel).copy_(part)
