"""Initial weights of a backbone: random, published, or from a file. Never a silent fall-back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load_weights(net: nn.Module, weights: str, *, timm_name: str | None) -> None:
    """Fill ``net`` in place.

    Args:
        net: the network, without classifier.
        weights: ``random`` (leave as initialised), ``imagenet`` (timm's published weights of ``timm_name``), or a path
            of a ``.safetensors``, ``.pth`` or ``.pt`` file of tensors; classifier weights in it are ignored.
        timm_name: timm model name with its pretrained tag; None where no published weights exist.

    Raises:
        FileNotFoundError: the file is not there, or the published weights cannot be downloaded.
        ValueError: the file's tensors do not fit; every missing, unknown and misshapen name is listed.
    """
    if weights == "random":
        return
    if weights == "imagenet":
        if timm_name is None:
            raise ValueError("weights = 'imagenet': no published weights for this network; use 'random' or the path of a file")
        state = _published(timm_name)
    else:
        state = _read(Path(weights))
    classifier = timm.models.get_pretrained_cfg_value(timm_name, "classifier") if timm_name else None
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or ["fc", "head"]))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    _check_fit(net, state, source=weights)
    net.load_state_dict(state)


def _published(timm_name: str) -> dict[str, Tensor]:
    try:
        donor: nn.Module = timm.create_model(timm_name, pretrained=True)
    except Exception as error:
        cfg = timm.get_pretrained_cfg(timm_name)
        raise FileNotFoundError(
            f"the published weights {timm_name} cannot be downloaded ({type(error).__name__}). Download {cfg.url or cfg.hf_hub_id} "
            f"where you have a network, and give the file: --set backbones.NAME.weights=/path/to/file (or train from 'random')"
        ) from error
    return dict(donor.state_dict())


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights = {str(path)!r}: no such file, and not one of 'random', 'imagenet'")
    if path.suffix == ".safetensors":
        return load_file(path)
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights = {str(path)!r}: expected a dictionary of tensors")
    return content


def _check_fit(net: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    wanted = net.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - state.keys() if not name.endswith("num_batches_tracked")]
    problems += [f"unknown {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights {source!r} do not fit the network: {shown}")
