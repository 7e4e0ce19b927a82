"""The deterministic weights and pictures behind the golden figures: every tensor follows from its name.

See tests/golden/README.md. The rule: a standard normal array from a generator seeded with CRC-32 of salt and name, scaled
by what the tensor is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

SALT = "fixture-E:"


def tensor_for(name: str, shape: tuple[int, ...], *, gain: float) -> Tensor:
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith(("input_layer.2.weight", "res_layer.2.weight")):  # PReLU
        return torch.full(shape, 0.25)
    z = np.random.default_rng(zlib.crc32((SALT + name).encode())).standard_normal(shape)
    if last == "cls_token" or last.endswith("pos_embed"):
        value = 0.02 * z
    elif last == "running_var":
        value = 1 + 0.2 * abs(z)
    elif last in ("bias", "running_mean"):
        value = 0.1 * z
    elif len(shape) >= 2:
        value = gain * math.sqrt(2 / math.prod(shape[1:])) * z
    else:
        value = 1 + 0.1 * z
    return torch.from_numpy(np.asarray(value).astype(np.float32))


def fill(module: nn.Module, published_name: Callable[[str], str], *, gain: float) -> None:
    """Fill every tensor of the module's state dict under the name the published code has for it."""
    state = module.state_dict()
    module.load_state_dict({name: tensor_for(published_name(name), tuple(value.shape), gain=gain) for name, value in state.items()})


def pictures(tag: str, *, count: int, size: int) -> Tensor:
    generator = np.random.default_rng(zlib.crc32((SALT + tag).encode()))
    low = generator.standard_normal((count, 3, 8, 8))
    noise = generator.standard_normal((count, 3, size, size))
    grown = low.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
    return torch.from_numpy((grown + 0.5 * noise).astype(np.float32))
