"""Accelerators of this node: how many, who else computes on them, and how they are dealt out to groups of processes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
_log = logging.getLogger(__name__)


class User(NamedTuple):
    """A process that computes on a device."""

    device: str
    """As `visible` names it."""
    pid: int
    name: str


def count() -> int:
    """Accelerators that PyTorch sees, 0 without any."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def visible(number: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the first ``number`` devices, as ``CUDA_VISIBLE_DEVICES`` would have them: its own entries, or indices."""
    given = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    return (given or [str(index) for index in range(number)])[:number]


def cut(devices: Sequence[str], *, groups: int, environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Environment of each group: its own slice of the devices, in order. Nothing to set where there are none (CPU)."""
    if not devices:
        return [{} for _ in range(groups)]
    each = len(devices) // groups
    slices = [{VISIBLE: ",".join(devices[first * each : (first + 1) * each])} for first in range(groups)]
    # CUDA counts the fastest device first, nvidia-smi by place on the bus. Where all devices are dealt out either will do,
    # if it is the same for the check of who is busy.
    order = {} if VISIBLE in environ or "CUDA_DEVICE_ORDER" in environ else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return [{**part, **order} for part in slices]


def busy(devices: Sequence[str]) -> list[User]:
    """Other processes that compute on these devices, according to ``nvidia-smi``. Unknown (none) where there is no nvidia-smi."""
    if not devices:
        return []
    if shutil.which("nvidia-smi") is None:
        _log.warning("there is no nvidia-smi: whether others compute on the devices cannot be known")
        return []
    gpus = {uuid: index for index, uuid in _query("gpu", "index,uuid", 2)}
    users = []
    for uuid, pid, name in _query("compute-apps", "gpu_uuid,pid,process_name", 3):
        device = next((d for d in devices if d in (uuid, gpus.get(uuid))), None)
        if device is not None and pid.isdigit() and int(pid) != os.getpid():
            users.append(User(device, int(pid), name))
    return users


def check_free(devices: Sequence[str]) -> None:
    """Refuse devices that others compute on.

    Raises:
        ValueError: naming device, process id and program.
    """
    users = busy(devices)
    if users:
        listed = "; ".join(f"device {user.device}: {user.name} (pid {user.pid})" for user in users)
        free = [device for device in devices if device not in {user.device for user in users}]
        way = f"Leave them out with {VISIBLE}={','.join(free)}" if free else "Wait for it"
        raise ValueError(f"others compute here: {listed}. {way}, or go ahead with --share-devices")


def _query(what: str, fields: str, width: int) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - constant words
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("nvidia-smi fails (%s): whether others compute on the devices cannot be known", error)
        return []
    rows = [[part.strip() for part in line.split(",", width - 1)] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == width]
