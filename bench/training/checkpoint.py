"""Checkpoints: safetensors for tensors, JSON for the rest, never a pickle; a checkpoint is whole or it is not there.

Layout of a training's folder::

    checkpoints/00000420/{model,optimiser}.safetensors, state.json   the last two; state.json holds the hashes of the others;
                                                                     with train.ema there is average.safetensors too
    checkpoints/aside-.../                                           what a start has passed over; gone when the training ends
    best/00000400/model.safetensors, state.json                      the selected weights, of now and of both checkpoints

A folder is written under a temporary name, every file flushed to disk, then renamed: what has its final name is complete.

The numbers are steps (of the best weights: epochs). They tell which is newer within one course of a training. So what a start passes over
gets another name, and what is written later never has to compete with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.io import file_sha256, follow_umask, fsync_folder, temporary_folder

SCHEMA = 1
ASIDE = "aside-"
"""How the names of folders begin that were passed over."""
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


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int | None
) -> Path:
    """Write ``folder/<step>``, and then drop all checkpoints but this one and those before it.

    Args:
        folder: where the training's checkpoints live.
        step: names the checkpoint.
        tensors: file stem -> name -> tensor.
        state: JSON-able; ``files`` and ``schema_version`` are added.
        keep: how many to retain, this one among them; older ones go only once this one is whole. None drops none: see `keep_only`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{step:08d}"
    temporary = temporary_folder(final)
    try:
        hashes = {}
        for stem, content in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}, path)
            follow_umask(path)
            hashes[path.name] = file_sha256(path)
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
    if keep is not None:
        # A higher number is of a course that was given up: what was just written is the newest.
        before = [path for path in _newest_first(folder) if int(path.name) < step]
        keep_only(folder, {final.name, *(path.name for path in before[: keep - 1])})
    return final


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Drop all checkpoints of a folder but those of these names."""
    for path in _newest_first(folder):
        if path.name not in names:
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, whose name is the number of steps done; whether it is whole shows when it is loaded."""
    return next(iter(_newest_first(folder)), None)


def load_latest(folder: Path, *, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
    """Read the newest whole checkpoint; None if there is none. Damaged ones are named in a warning and set aside, see `set_aside`.

    Args:
        folder: where the training's checkpoints live.
        check: looks at what else a checkpoint needs, and raises `DamagedCheckpointError` where that is not there.

    Raises:
        OSError: a file is there and cannot be read, which is no damage: nothing is set aside.
    """
    for leftover in folder.glob(".*-*") if folder.is_dir() else ():
        shutil.rmtree(leftover)  # a write that was cut off
    for candidate in _newest_first(folder):
        try:
            checkpoint = load_checkpoint(candidate)
            if check:
                check(checkpoint)
        except DamagedCheckpointError as error:
            _log.warning("%s; going back to the one before it. It is kept as %s", error, set_aside(candidate, into=folder))
        else:
            return checkpoint
    return None


def set_aside(path: Path, *, into: Path) -> Path:
    """Move a folder into ``into``, which must exist, under a name that no checkpoint has; returns where it is now."""
    place = into / f"{ASIDE}{path.name}"
    while place.exists():
        place = place.with_name(f"{place.name}-again")
    path.rename(place)
    fsync_folder(into)
    return place


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint, checking every hash.

    Raises:
        DamagedCheckpointError: naming the file.
        OSError: a file is there and cannot be read.
    """
    state = check_checkpoint(folder)
    tensors = {Path(name).stem: load_file(folder / name) for name in state["files"]}
    model, optimiser, average = (tensors.get(stem, {}) for stem in ("model", "optimiser", "average"))
    return Checkpoint(folder=folder, model=model, optimiser=optimiser, average=average, state=state)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its hash; returns the content of its state.json.

    Raises:
        DamagedCheckpointError: naming the file.
        OSError: a file is there and cannot be read.
    """
    damaged = f"checkpoint {folder} is damaged"
    try:
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            files = dict(state["files"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedCheckpointError(f"{damaged}: state.json is missing") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{damaged}: state.json: {error}") from error
        if state.get("schema_version") != SCHEMA:
            raise DamagedCheckpointError(f"checkpoint {folder} has schema version {state.get('schema_version')}, this bench reads {SCHEMA}")
        for name, expected in files.items():
            try:
                sha256 = file_sha256(folder / name)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise DamagedCheckpointError(f"{damaged}: {name} is missing") from error
            if sha256 != expected:
                raise DamagedCheckpointError(f"{damaged}: {name} has another sha256")
    except PermissionError as error:
        raise PermissionError(
            f"checkpoint {folder} cannot be read: {error.strerror}: {error.filename}. "
            f"Who owns it can share it with the group: chmod -R g+rwX {folder.parent.parent}"
        ) from error
    return state


def hash_weights(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of all weights: equal exactly when the weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    try:
        paths = list(folder.iterdir())  # not `glob`, to which a folder that cannot be read is empty
    except FileNotFoundError:
        return []
    return sorted((path for path in paths if path.name.isdecimal() and path.is_dir()), key=lambda path: int(path.name), reverse=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
