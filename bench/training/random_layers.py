"""Dropout and stochastic depth by `bench.draws`, in the place of a network's own layers of these kinds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from bench.draws import sample_kept, site_of


class KeyedDropout(nn.Module):
    """Zeroes places of its input in training and scales up what is left; which places is a function of (seed, epoch, step, sample).

    N. Srivastava et al., "Dropout" (JMLR 2014); whole channels: J. Tompson et al. (CVPR 2015); whole samples: stochastic depth,
    G. Huang et al. (ECCV 2016).
    """

    def __init__(self, *, rate: float, site: int, dims: int | None, scaled: bool = True) -> None:
        """Keep the figures.

        Args:
            rate: probability of dropping.
            site: of `bench.draws.site_of`.
            dims: leading dimensions of the input that are dropped each by itself: 1 samples, 2 channels; None = every element.
            scaled: whether what is kept is divided by 1 - rate.
        """
        super().__init__()
        self.rate = rate
        self.site = site
        self.dims = dims
        self.scaled = scaled

    def forward(self, values: Tensor) -> Tensor:
        """Drop in training; (B, ...) -> (B, ...)."""
        if not self.training:
            return values
        shape = values.shape[: self.dims]
        kept = sample_kept(self.site, rows=shape[0], count=shape[1:].numel(), rate=self.rate)
        if kept is None:  # outside of a step: as any dropout
            kept = torch.rand(shape, device=values.device) >= self.rate
        kept = kept.reshape(shape + (1,) * (values.dim() - len(shape)))
        scale = 1 / (1 - self.rate) if self.scaled and self.rate < 1 else 1.0
        return values * (kept.to(values.dtype) * scale)

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"rate={self.rate}, dims={self.dims}"


_DIMS: dict[type[nn.Module], int | None] = {nn.Dropout: None, nn.Dropout1d: 2, nn.Dropout2d: 2, nn.Dropout3d: 2}


def key_random_layers(network: nn.Module) -> None:
    """Replace the dropout layers and stochastic depth of a network, in place. They have no parameters, so no name of a weight shifts.

    What draws in another way, by a function inside of a layer, is left alone: `GeneratorWatch` sees it.
    """
    for name, module in list(network.named_modules()):
        keyed = _keyed(module, site=site_of(name))
        if keyed is not None:
            network.set_submodule(name, keyed.train(module.training))


def _keyed(module: nn.Module, *, site: int) -> KeyedDropout | None:
    if isinstance(module, DropPath):
        return KeyedDropout(rate=module.drop_prob, site=site, dims=1, scaled=module.scale_by_keep) if module.drop_prob else None
    if type(module) in _DIMS and (rate := float(getattr(module, "p"))):  # noqa: B009 - the types know no attribute of their own
        return KeyedDropout(rate=rate, site=site, dims=_DIMS[type(module)])
    return None


class GeneratorWatch:
    """Whether somebody has drawn from torch's own generators since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._state()

    def drawn(self) -> bool:
        """True if so."""
        return any(not torch.equal(a, b) for a, b in zip(self._before, self._state(), strict=True))

    def _state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


def batch_statistics(network: nn.Module) -> bool:
    """Whether a layer of the network normalises in training by statistics of what its own process holds of a batch."""
    return any(isinstance(module, _BATCH_NORMS) and module.training for module in network.modules())


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOO_FEW = re.compile(r"Expected more than 1 value per channel when training, got input size .*?(\d+), (\d+)")


@contextlib.contextmanager
def enough_for_batch_norm(network: nn.Module, *, samples: int) -> Iterator[None]:
    """Say in the words of the settings that a batch norm has one value a channel, and so no spread to divide by.

    It depends on the sides of the maps, too: a single sample will do where a map has more than one place.

    Args:
        network: what runs in this context; names its layers in the message.
        samples: that this process gives the network at once.

    Raises:
        ValueError: names the setting and the layers that may be meant, in place of torch's error.
    """
    try:
        yield
    except ValueError as error:
        match = _TOO_FEW.search(str(error))
        if match is None:
            raise
        width = int(match[2])
        norms = [name for name, module in network.named_modules() if isinstance(module, _BATCH_NORMS) and module.num_features == width]
        shown = ", ".join(norms[:3]) + (f" and {len(norms) - 3} more" if len(norms) > 3 else "")
        raise ValueError(
            f"train.batch_size gives a process {samples} sample{'s' if samples != 1 else ''} at once, and batch norm ({shown}) needs more "
            f"than one value a channel: raise train.batch_size to twice the number of processes times train.accumulate, or images.size"
        ) from error
