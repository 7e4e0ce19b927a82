"""Which world a process was started in, read from environments as torchrun and srun leave them."""

from __future__ import annotations

import pytest

from bench.launch.world import FIRST_PORT, PORTS, World, check_threads, expand_hosts, join, joined_world, slurm_tasks_here

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[01-09]",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_started_by_hand_there_is_no_world():
    assert joined_world({}) is None


def test_the_world_of_torchrun_is_read():
    assert joined_world(dict(TORCHRUN)) == World(rank=1, size=2, by="torchrun")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks go from 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({**SRUN, "SLURM_PROCID": "4"}, "ranks go from 0 to 3"),
    ],
)
def test_a_world_that_cannot_be_is_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        joined_world(environ)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused_before_processes_wait_for_each_other(name):
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=name):
        join(World(rank=1, size=2, by="torchrun"), environ)


def test_tasks_of_srun_become_a_world_of_pytorch():
    environ = dict(SRUN)
    world = joined_world(environ)
    assert world == World(rank=3, size=4, by="srun")
    join(world, environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("3", "4", "1")
    assert environ["MASTER_ADDR"] == "gpu07"  # of the step, not of the job
    assert FIRST_PORT <= int(environ["MASTER_PORT"]) < FIRST_PORT + PORTS


def test_all_tasks_of_a_step_agree_on_the_port_and_other_jobs_do_not():
    ports = []
    for change in ({"SLURM_PROCID": "0"}, {"SLURM_PROCID": "3"}, {"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}):
        environ = {**SRUN, **change}
        join(joined_world(environ), environ)
        ports.append(environ["MASTER_PORT"])
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3


def test_a_task_that_sees_one_device_only_uses_that():
    environ = dict(SRUN)
    join(joined_world(environ), environ, devices=1)
    assert environ["LOCAL_RANK"] == "0"


def test_an_address_of_ones_own_wins():
    environ = {**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"}
    join(joined_world(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.1.1.1", "1234")


def test_the_batch_script_of_a_job_with_many_tasks_is_alone():
    assert joined_world({key: value for key, value in SRUN.items() if "STEP" not in key}) is None


def test_a_step_of_one_task_is_alone():
    assert joined_world({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_torchrun_inside_of_a_step_is_the_world_that_counts():
    assert joined_world({**SRUN, **TORCHRUN}) == World(rank=1, size=2, by="torchrun")


@pytest.mark.parametrize(("text", "tasks"), [("1", 1), ("2(x2)", 2), ("1,4(x3)", 4), ("8,2", 8)])
def test_tasks_on_a_node_are_read(text, tasks):
    assert slurm_tasks_here({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": text}) == tasks


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("host[1-3,7]", ["host1", "host2", "host3", "host7"]),
        ("node[08-10,12],gpu1", ["node08", "node09", "node10", "node12", "gpu1"]),
        ("r[1-2]n[3-4]-ib", ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]),
        ("", []),
    ],
)
def test_node_lists_are_expanded_in_order(text, hosts):
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize("text", ["node[1-", "node[a-b]", "node[]"])
def test_a_node_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        list(expand_hosts(text))


def test_what_is_left_of_a_world_of_one_process_is_no_world():
    assert joined_world({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) is None
    assert joined_world({"LOCAL_RANK": "0"}) is None
    assert joined_world({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}) is not None


@pytest.mark.parametrize(("given", "kept"), [({"OMP_NUM_THREADS": ""}, {}), ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3"}), ({}, {})])
def test_an_empty_number_of_threads_is_none(given, kept):
    check_threads(given)
    assert given == kept


@pytest.mark.parametrize(("text", "instead"), [("2,1", "2"), ("0", "1"), ("many", "1")])
def test_a_number_of_threads_that_is_none_is_refused_before_a_process_is_started(text, instead):
    with pytest.raises(ValueError, match=f"not a number of threads; write OMP_NUM_THREADS={instead}"):
        check_threads({"OMP_NUM_THREADS": text})
