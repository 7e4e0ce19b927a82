"""Checkpoints: safetensors for tensors, JSON for the rest, never a pickle; a checkpoint is whole or it is not there.

Layout of a training's folder::

    checkpoints/00000420/{model,optimiser}.safetensors, state.json   the last two; state.json holds the hashes of the others;
                                                                     with train.ema there is average.safetensors too
    best/00000400/model.safetensors, state.json                      the selected weights

A folder is written under a temporary name, every file flushed to disk, then renamed: what has its final name is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.data.atomic import fsync_folder

SCHEMA = 1
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What `load_latest` found."""

    folder: Path
    model: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    average: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are missing, or do not have the hashes its state.json promises."""


def save_checkpoint(folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> Path:
    """Write ``folder/<step>`` and then drop all but the newest ``keep`` checkpoints.

    Args:
        folder: where the training's checkpoints live.
        step: names the checkpoint.
        tensors: file stem -> name -> tensor.
        state: JSON-able; ``files`` and ``schema_version`` are added.
        keep: how many to retain; older ones go only once the new one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{step:08d}"
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=folder))
    try:
        hashes = {}
        for stem, content in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}, path)
            hashes[path.name] = hash_file(path)
            _sync_file(path)
        path = temporary / "state.json"
        path.write_text(json.dumps({**state, "schema_version": SCHEMA, "files": hashes}), encoding="utf-8")
        _sync_file(path)
        fsync_folder(temporary)
        if final.exists():  # the same step again, after a restart that found it damaged
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint; damaged ones are named in a warning and passed over. None if there is none."""
    for leftover in folder.glob(".*-*") if folder.is_dir() else ():
        shutil.rmtree(leftover)  # a write that was cut off
    for candidate in _newest_first(folder):
        try:
            return load_checkpoint(candidate)
        except DamagedCheckpointError as error:
            _log.warning("%s; going back to the one before it", error)
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, checking every hash.

    Raises:
        DamagedCheckpointError: naming the file.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files: dict[str, str] = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: state.json: {error}") from error
    if state.get("schema_version") != SCHEMA:
        raise DamagedCheckpointError(f"checkpoint {folder} has schema version {state.get('schema_version')}, this bench reads {SCHEMA}")
    tensors = {}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or hash_file(path) != expected:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: {name} {'has another sha256' if path.is_file() else 'is missing'}"
            )
        tensors[path.stem] = load_file(path)
    model, optimiser, average = (tensors.get(stem, {}) for stem in ("model", "optimiser", "average"))
    return Checkpoint(folder=folder, model=model, optimiser=optimiser, average=average, state=state)


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


def hash_weights(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all weights: equal exactly when the weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("[0-9]*") if p.is_dir()), reverse=True) if folder.is_dir() else []


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
