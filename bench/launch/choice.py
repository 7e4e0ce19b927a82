"""How ``bench run`` starts processes: decided from its flags, the environment and the devices of this node, before any process starts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bench.launch.request import Processes
from bench.launch.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How processes are started."""

    kind: Literal["here", "join", "torchrun", "groups"]
    """``here``: this process alone. ``join``: this process is one of a world. ``torchrun``: this one starts and watches ``nproc``
    processes. ``groups``: this one starts ``groups`` runs, each over ``nproc`` processes."""
    nproc: int = 1
    """Processes of a training on this node."""
    nnodes: int = 1
    groups: int = 1
    endpoint: tuple[str, int] = ("localhost", 0)
    """Host and port where the nodes meet; 0 = any free port."""
    world: World | None = None

    @property
    def world_size(self) -> int:
        """Processes that work on one training together."""
        return self.world.size if self.world else self.nproc * self.nnodes


def choose(processes: Processes, *, devices: int, world: World | None, slurm_tasks_here: int = 1) -> Launch:
    """Decide how to start.

    Args:
        processes: what the flags ask for.
        devices: accelerators of this node that may be used; 0 = the CPU.
        world: the one this process was started in.
        slurm_tasks_here: tasks that srun has started on each node.

    Raises:
        ValueError: flags that cannot be, or contradict the environment.
    """
    spawns = (
        processes.nproc is not None
        or processes.nnodes > 1
        or processes.procs_per_training is not None
        or processes.rdzv_endpoint is not None
    )
    if world is not None and (processes.launcher == "auto" or world.by == "torchrun"):
        if spawns or processes.launcher == "torchrun":
            raise ValueError(
                f"this process is already number {world.rank} of {world.size} that {world.by} has started: leave --launcher, --nproc, "
                f"--nnodes, --rdzv-endpoint and --procs-per-training to {world.by}"
            )
        if processes.launcher == "inline" and world.size > 1:
            raise ValueError(
                f"--launcher inline: this process is number {world.rank} of {world.size} that {world.by} has started; use auto"
            )
        return Launch(kind="join", world=world)
    if processes.launcher == "inline":
        if spawns:
            raise ValueError("--launcher inline is one process on one node: drop --nproc, --nnodes, ..., or use --launcher torchrun")
        return Launch(kind="here")
    if slurm_tasks_here > 1:
        raise ValueError(
            f"--launcher torchrun starts the processes of a node itself, but srun has started {slurm_tasks_here} tasks on each: "
            f"use srun --ntasks-per-node=1, or --launcher auto, which joins the tasks of srun"
        )
    nproc = processes.nproc or devices or 1
    if devices and nproc > devices:
        raise ValueError(f"--nproc {nproc}: this node has {devices} accelerators; use --nproc {devices}, or --device cpu")
    if processes.procs_per_training is not None:
        if processes.nnodes > 1 or processes.rdzv_endpoint is not None:
            raise ValueError(
                "--procs-per-training runs several trainings beside each other within a node, --nnodes one training over several: drop one "
                "of them. Nodes that share a results folder need no meeting point: start the same command without --nnodes on each"
            )
        return _groups(processes.procs_per_training, nproc)
    endpoint = _endpoint(processes)
    if processes.launcher == "auto" and nproc * processes.nnodes == 1:
        return Launch(kind="here")
    return Launch(kind="torchrun", nproc=nproc, nnodes=processes.nnodes, endpoint=endpoint)


def _groups(each: int, nproc: int) -> Launch:
    if nproc % each:
        fitting = ", ".join(str(number) for number in range(1, nproc + 1) if nproc % number == 0)
        raise ValueError(f"--procs-per-training {each} does not divide the {nproc} processes of this node; these do: {fitting}")
    if nproc == each:
        return Launch(kind="torchrun" if each > 1 else "here", nproc=each)
    return Launch(kind="groups", nproc=each, groups=nproc // each)


def _endpoint(processes: Processes) -> tuple[str, int]:
    if processes.rdzv_endpoint is None:
        if processes.nnodes > 1:
            raise ValueError(
                f"--nnodes {processes.nnodes} needs --rdzv-endpoint HOST:PORT, the same on every node: one of them and a free port of it, "
                f"for example --rdzv-endpoint node1:29400"
            )
        return "localhost", 0
    host, colon, port = processes.rdzv_endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--rdzv-endpoint {processes.rdzv_endpoint}: write HOST:PORT with a port of 1 to 65535, for example node1:29400")
    if processes.nnodes > 1 and host in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(f"--rdzv-endpoint {processes.rdzv_endpoint}: {host} is another machine on every node; name one of the nodes")
    return host, int(port)
