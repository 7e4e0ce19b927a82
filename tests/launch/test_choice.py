"""From flags, environment and devices to how processes are started."""

from __future__ import annotations

import pytest

from bench.launch.choice import choose
from bench.launch.request import Processes
from bench.launch.world import World

TORCHRUN = World(rank=1, size=4, by="torchrun")
SRUN = World(rank=1, size=4, by="srun")


def launch(*, devices=0, world=None, slurm_tasks_here=1, **flags):
    return choose(Processes(**flags), devices=devices, world=world, slurm_tasks_here=slurm_tasks_here)


@pytest.mark.parametrize(
    ("flags", "devices", "kind", "nproc", "groups", "world_size"),
    [
        ({}, 0, "here", 1, 1, 1),
        ({}, 1, "here", 1, 1, 1),
        ({}, 4, "torchrun", 4, 1, 4),
        ({"launcher": "inline"}, 4, "here", 1, 1, 1),
        ({"launcher": "torchrun"}, 0, "torchrun", 1, 1, 1),
        ({"nproc": 2}, 0, "torchrun", 2, 1, 2),
        ({"nproc": 2}, 4, "torchrun", 2, 1, 2),
        ({"procs_per_training": 2}, 8, "groups", 2, 4, 2),
        ({"procs_per_training": 1}, 8, "groups", 1, 8, 1),
        ({"procs_per_training": 8}, 8, "torchrun", 8, 1, 8),
        ({"procs_per_training": 1}, 0, "here", 1, 1, 1),
        ({"nnodes": 2, "rdzv_endpoint": "node1:29400"}, 4, "torchrun", 4, 1, 8),
        ({"nnodes": 2, "rdzv_endpoint": "node1:29400"}, 0, "torchrun", 1, 1, 2),
    ],
)
def test_a_launch_follows_flags_and_devices(flags, devices, kind, nproc, groups, world_size):
    chosen = launch(devices=devices, **flags)
    assert (chosen.kind, chosen.nproc, chosen.groups, chosen.world_size) == (kind, nproc, groups, world_size)


@pytest.mark.parametrize("world", [TORCHRUN, SRUN])
def test_a_world_that_is_there_is_joined(world):
    assert (launch(devices=8, world=world).kind, launch(world=world).world_size) == ("join", 4)


def test_one_task_a_node_of_srun_may_start_the_processes_of_its_node():
    chosen = launch(world=SRUN, devices=8, launcher="torchrun", nnodes=4, rdzv_endpoint="node1:29400")
    assert (chosen.kind, chosen.world_size) == ("torchrun", 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"launcher": "torchrn"}, "use one of auto, inline, torchrun"),
        ({"nproc": 0}, "--nproc 0: must be 1 or more"),
        ({"max_restarts": -1}, "--max-restarts -1: must be 0 or more"),
        ({"launcher": "inline", "nproc": 2}, "--launcher inline is one process"),
        ({"nproc": 4, "devices": 2}, "this node has 2 accelerators"),
        ({"nproc": 6, "procs_per_training": 4}, "these do: 1, 2, 3, 6"),
        ({"nproc": 4, "procs_per_training": 2, "nnodes": 2, "rdzv_endpoint": "a:1"}, "without --nnodes on each"),
        ({"nnodes": 2}, "needs --rdzv-endpoint"),
        ({"nnodes": 2, "rdzv_endpoint": "node1"}, "write HOST:PORT"),
        ({"nnodes": 2, "rdzv_endpoint": "node1:99999"}, "port of 1 to 65535"),
        ({"nnodes": 2, "rdzv_endpoint": "localhost:29400"}, "another machine on every node"),
        ({"world": TORCHRUN, "nproc": 2}, "number 1 of 4 that torchrun has started"),
        ({"world": TORCHRUN, "launcher": "torchrun"}, "leave --launcher"),
        ({"world": TORCHRUN, "launcher": "inline"}, "use auto"),
        ({"world": SRUN, "launcher": "torchrun", "slurm_tasks_here": 2}, "--ntasks-per-node=1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(given, message):
    with pytest.raises(ValueError, match=message):
        launch(**given)


def test_an_address_of_six_groups_may_be_the_endpoint():
    assert launch(nnodes=2, rdzv_endpoint="[fd00::1]:29400").endpoint == ("fd00::1", 29400)
