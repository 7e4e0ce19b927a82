"""The world of processes that somebody else has started around this one: torchrun, ``accelerate launch`` or srun.

torchrun and ``accelerate launch`` describe it as PyTorch wants it: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``. srun has names of its own, from which these are made.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, MutableMapping

FIRST_PORT, PORTS = 15000, 15000
"""Range of the ports that are made from Slurm job ids: below the ephemeral ports of Linux, which start at 32768."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Several processes that work on each training together, seen from one of them."""

    rank: int
    size: int
    by: str
    """Who started it: ``torchrun`` (or anything that speaks as it does) or ``srun``."""


def joined_world(environ: MutableMapping[str, str] = os.environ) -> World | None:
    """The world that the environment describes, or None where this process was started by hand.

    What is left over of a world of one process, without an address to meet at, is none.

    Raises:
        ValueError: variables that are missing or contradict each other.
    """
    if environ.get("RANK") == "0" and environ.get("WORLD_SIZE") == "1" and not environ.get("MASTER_ADDR"):
        return slurm_world(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _torch_world(environ)
    return slurm_world(environ)


def join(world: World, environ: MutableMapping[str, str] = os.environ, *, devices: int = 0) -> None:
    """Make the environment what PyTorch reads.

    Args:
        world: what `joined_world` gave for this environment.
        environ: changed in place, for a world of srun.
        devices: accelerators that this process sees: with one device per task, as srun can bind them, each task's is number 0.

    Raises:
        ValueError: a variable that PyTorch needs is missing, or a list of hosts that cannot be read.
    """
    if world.by == "srun":
        local = int(environ.get("SLURM_LOCALID", "0"))
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = environ.get("MASTER_ADDR") or next(expand_hosts(hosts), "")
        if not address:
            raise ValueError("started by srun, but SLURM_STEP_NODELIST names no host; set MASTER_ADDR to the first host of the job")
        job, step = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_STEP_ID", "0"))
        environ["RANK"], environ["WORLD_SIZE"] = str(world.rank), str(world.size)
        environ["LOCAL_RANK"] = str(local % devices if devices else local)
        environ["MASTER_ADDR"] = address
        environ.setdefault("MASTER_PORT", str(FIRST_PORT + (31 * job + step) % PORTS))
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if world.size > 1 and not environ.get(name)]
    if missing:
        raise ValueError(
            f"RANK={world.rank} and WORLD_SIZE={world.size} are set, but {', '.join(missing)} not: start with torchrun or accelerate "
            f"launch, which set all of them, or unset RANK and WORLD_SIZE to work alone"
        )


def check_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """``OMP_NUM_THREADS`` as all who read it understand it: empty means not set.

    Raises:
        ValueError: it is no number of threads.
    """
    text = environ.get("OMP_NUM_THREADS")
    if text is None:
        return
    if not text.strip():
        del environ["OMP_NUM_THREADS"]
    elif not text.strip().isdigit() or int(text) < 1:
        first = re.match(r"\s*([1-9]\d*)", text)
        raise ValueError(
            f"OMP_NUM_THREADS={text!r} in the environment is not a number of threads; write OMP_NUM_THREADS={first[1] if first else 1}"
        )


def slurm_world(environ: MutableMapping[str, str] = os.environ) -> World | None:
    """The tasks of the job step that srun started this process in; None outside of steps and in those of one task.

    Raises:
        ValueError: a task number that cannot be.
    """
    if "SLURM_STEP_ID" not in environ:  # a batch script is no step, though SLURM_NTASKS is there
        return None
    size = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", default=1)
    return _checked(World(rank=_number(environ, "SLURM_PROCID", default=0), size=size, by="srun"), "SLURM_PROCID") if size > 1 else None


def slurm_tasks_here(environ: MutableMapping[str, str] = os.environ) -> int:
    """Tasks of this job step on each node (the most of all nodes); 1 outside of Slurm. ``SLURM_STEP_TASKS_PER_NODE`` reads ``2(x3),1``."""
    if "SLURM_STEP_ID" not in environ:
        return 1
    return max((int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))), default=1)


def expand_hosts(text: str) -> Iterator[str]:
    """Hosts of a Slurm node list, in order: ``node[08-10,12],gpu1`` -> node08, node09, node10, node12, gpu1.

    Raises:
        ValueError: not of that form.
    """
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*(?:\]|$))+", text):
        yield from _expand(part.strip())


def _expand(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    ranges, closing, tail = rest.partition("]")
    if not closing or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", ranges):
        raise ValueError(f"the node list {part!r} of Slurm cannot be read; set MASTER_ADDR to the first host of the job")
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for end in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{end}"


def _torch_world(environ: MutableMapping[str, str]) -> World:
    absent = [name for name in ("RANK", "WORLD_SIZE") if not environ.get(name)]
    if absent:
        present = "WORLD_SIZE" if absent[0] == "RANK" else "RANK"
        raise ValueError(
            f"{present}={environ.get(present)} is set, but {absent[0]} is not: half a world. Start with torchrun or accelerate launch, "
            f"which set both, or unset {present} to work alone"
        )
    return _checked(World(rank=_number(environ, "RANK"), size=_number(environ, "WORLD_SIZE"), by="torchrun"), "RANK")


def _number(environ: MutableMapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def _checked(world: World, name: str) -> World:
    if not 0 <= world.rank < world.size:
        raise ValueError(
            f"{name}={world.rank} in the environment, but there are {world.size} processes: ranks go from 0 to {world.size - 1}"
        )
    return world
