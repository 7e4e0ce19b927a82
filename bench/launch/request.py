"""What one ``bench run`` asks for. The command line makes it once, everything below reads it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bench.config import Settings
    from bench.sweep.plan import Plan

LAUNCHERS = ("auto", "inline", "torchrun", "slurm")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """How processes are to be started. None: not asked for."""

    launcher: str = "auto"
    """One of `LAUNCHERS`."""
    nproc: int | None = None
    """Processes on this node."""
    nnodes: int = 1
    procs_per_training: int | None = None
    """Processes of one training, where several trainings run side by side on a node."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where the nodes meet."""
    rdzv_id: str | None = None
    """Name of the run for the nodes."""
    rdzv_timeout: int = 600
    """Seconds for all nodes to come together."""
    max_restarts: int = 3
    """Times that processes are restarted after a crash."""
    share_devices: bool = False
    """Whether to use devices on which other programs compute."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            ValueError: naming the flag and the least value.
        """
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"--launcher {self.launcher}: use one of {', '.join(LAUNCHERS)}")
        for name, least in (("nproc", 1), ("nnodes", 1), ("procs_per_training", 1), ("max_restarts", 0), ("rdzv_timeout", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {least} or more")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """One ``bench run``."""

    settings: Settings
    plugins: tuple[str, ...] = ()
    """Modules or files that register entries."""
    only: tuple[str, ...] = ()
    """Keys of trainings, or beginnings of keys; empty = all trainings."""
    device: Literal["auto", "cpu"] = "auto"
    trackers: tuple[str, ...] = ()
    """Names of Accelerate's trackers."""
    timeout_s: int = 1800
    """Seconds after which the processes give a lost process up."""
    wait: bool | None = None
    """Whether to wait at the end for trainings of other runs, and for Slurm jobs; None = for other runs, not for jobs."""
    processes: Processes = Processes()
    command: tuple[str, ...] = ()
    """This command for a child process: program, verb, and every flag that was given, without those of `Processes`, ``only``, ``wait``."""

    def child_command(self) -> list[str]:
        """The command of a process that works on the same request."""
        only = ["--only", ",".join(self.only)] if self.only else []
        wait = [] if self.wait is None else ["--wait" if self.wait else "--no-wait"]
        return [*self.command, *only, *wait]

    def plan(self, *, world_size: int, trial: bool = True) -> Plan:
        """See `bench.sweep.plan.make_plan`."""
        # Imported here: it takes seconds, in which a request to stop must already be heard.
        from bench.sweep.plan import make_plan

        return make_plan(self.settings, world_size=world_size, only=self.only, trial=trial)
