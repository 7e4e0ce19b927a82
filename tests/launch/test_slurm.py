"""Jobs through submitit: what sbatch gets, what is refused, and runs on this machine, with and without an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

submitit = pytest.importorskip("submitit")

from bench.config import ConfigError, SlurmConfig, load_settings  # noqa: E402
from bench.launch import slurm  # noqa: E402
from bench.sweep.plan import make_plan, only_trainings  # noqa: E402
from bench.sweep.store import read_records  # noqa: E402

SHAPE = slurm.Shape(nodes=2, processes=4, gpus=4)


def text(shape=SHAPE, jobs=1, **settings):
    return slurm.submission_text(SlurmConfig(**settings), shape, results=Path("/shared/results"), jobs=jobs)


@pytest.mark.parametrize(
    "line",
    ["nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "signal=USR2@45", "requeue", "partition=gpu", "mem=65536M", "qos=long"],
)
def test_the_submission_asks_for_what_the_settings_say(line):
    lines = text(minutes=90, signal_seconds=45, partition="gpu", mem_gb=64, qos="long").splitlines()
    assert f"#SBATCH --{line}" in lines


def test_several_jobs_are_one_array_of_which_so_many_run_at_once():
    assert "#SBATCH --array=0-21%4\n" in text(jobs=22, parallel=4)


def test_options_that_have_no_setting_go_through_extra():
    lines = text(extra={"reservation": "faces", "exclusive": True, "no_kill": False}).splitlines()
    assert {"#SBATCH --reservation=faces", "#SBATCH --exclusive"} <= set(lines)
    assert not any("kill" in line for line in lines)


def test_without_gpus_none_are_asked_for():
    assert "gpus" not in text(slurm.Shape(nodes=1, processes=2, gpus=0))


def test_the_job_starts_without_the_working_directory_on_the_import_path():
    assert " -P -u -m submitit.core._submit /shared/results/slurm" in text()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("slurm.partiton=gpu", "Did you mean 'partition'"),
        ("slurm.extra.nodes=3", "is set by --nnodes"),
        ("slurm.extra.gpus_per_node=3", "is set by slurm.gpus_per_node"),
        ("slurm.minutes=2", "signal_seconds = 120 leaves no time"),
        ("slurm.cluster=pbs", "slurm.cluster = 'pbs'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(assignment, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(sets=[assignment], environ={})


@pytest.mark.parametrize(
    ("sets", "nodes", "processes", "message"),
    [
        (["slurm.gpus_per_node=2"], 1, 4, "use --nproc 2"),
        (["slurm.cluster=local"], 2, 1, "--nnodes 2 needs a cluster"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(sets, nodes, processes, message):
    with pytest.raises(ConfigError, match=message):
        slurm.job_shape(load_settings(sets=sets, environ={}), nodes=nodes, processes=processes, device="auto")


@pytest.mark.parametrize(
    ("sets", "processes", "device", "expected"),
    [
        ([], None, "auto", (1, 1)),
        ([], 4, "auto", (4, 4)),
        (["slurm.gpus_per_node=8"], None, "auto", (8, 8)),
        ([], 4, "cpu", (4, 0)),
        (["slurm.gpus_per_node=0"], 4, "auto", (4, 0)),
    ],
)
def test_a_process_gets_a_gpu_unless_there_shall_be_none(sets, processes, device, expected):
    shape = slurm.job_shape(load_settings(sets=sets, environ={}), nodes=1, processes=processes, device=device)
    assert (shape.processes, shape.gpus) == expected


def test_no_setting_of_slurm_changes_a_key(project, monkeypatch):
    monkeypatch.chdir(project)
    keys = [
        [planned.training.key for planned in make_plan(load_settings(sets=sets, environ={})).matrix.trainings]
        for sets in ([], ["slurm.partition=gpu", "slurm.minutes=600"])
    ]
    assert keys[0] == keys[1]


def job_environment(**values):
    given = {"num_tasks": 8, "num_nodes": 2, "global_rank": 5, "local_rank": 1, "hostnames": ["n3", "n4"], "raw_job_id": "4711"}
    return SimpleNamespace(**{**given, **values})


def test_each_process_learns_its_rank_and_where_the_first_node_listens():
    variables = slurm.rank_variables(job_environment())
    assert {**variables, "MASTER_PORT": ""} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n3",
        "MASTER_PORT": "",
    }


def test_jobs_of_one_sweep_meet_at_different_ports():
    ports = {slurm.rank_variables(job_environment(raw_job_id=str(number)))["MASTER_PORT"] for number in range(9000, 9400)}
    assert len(ports) == 400


def test_only_leaves_the_trainings_it_names_and_refuses_unknown_ones(project, monkeypatch):
    monkeypatch.chdir(project)
    settings = load_settings(environ={})
    matrix = make_plan(settings).matrix
    first, second = (planned.training.key for planned in matrix.trainings)
    assert [planned.training.key for planned in only_trainings(matrix, [second[:10]]).trainings] == [second]
    with pytest.raises(ConfigError, match="no such training"):
        only_trainings(matrix, [first, "0123456789"])


def test_the_dry_run_shows_the_submission_and_makes_nothing(project, bench_here):
    done = bench_here("run", "--launcher", "slurm", "--dry-run", "--device", "cpu", "--set", "slurm.account=faces", cwd=project)
    assert done.returncode == 0
    assert "#SBATCH --account=faces" in done.stdout
    assert "2 jobs as one array" in done.stdout
    assert "bench run --device cpu --launcher inline --only " in done.stdout
    assert not (project / "results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no sbatch, srun, scontrol here"),
        (["--procs-per-training", "1"], "--procs-per-training has no meaning"),
        (["--only", "abc"], "--only abc: the plan has no such training"),
        (["--nproc", "5"], "nearest that do are 10 or 15"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(words, message, project, bench_here, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    done = bench_here("run", "--launcher", "slurm", *words, cwd=project)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (project / "results").exists()


def test_without_submitit_the_command_that_installs_it_is_told(project, bench_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    done = bench_here("run", "--launcher", "slurm", cwd=project)
    assert done.returncode == 2
    assert "pip install 'submitit>=" in done.stderr


FAKES = {
    # Keeps what it was given, and answers as sbatch does. Runs nothing.
    "sbatch": 'number=$((100 + $(ls "$STATE" | grep -c sbatch))); cp "$1" "$STATE/sbatch-$number"; echo "Submitted batch job $number"',
    "srun": "exit 1",
    "scontrol": "exit 1",
    "sacct": 'cat "$STATE/states"',
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster of which only the commands exist; returns a function that sets what sacct says."""
    folder, state = tmp_path / "bin", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    for name, script in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(state))
    watcher = submitit.SlurmJob.watcher
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(watcher)(delay_s=1))

    def states(**by_number):
        submitit.SlurmJob.watcher.clear()
        rows = [f"{number.removeprefix('n')}|{value}|node1" for number, value in by_number.items()]
        (state / "states").write_text("\n".join(["JobID|State|NodeList", *rows]) + "\n")

    states()
    return states


def test_a_training_whose_job_has_not_ended_is_not_submitted_twice(project, bench_here, cluster):
    command = ("run", "--launcher", "slurm", "--device", "cpu")
    first = bench_here(*command, cwd=project)
    assert first.returncode == 0, first.stderr
    assert "job 100_0: synthetic/mini/cam/none/seed0" in first.stdout
    assert "job 100_1: synthetic/mini/cam/au/seed0" in first.stdout
    cluster(n100_0="RUNNING", n100_1="CANCELLED by 1000")
    second = bench_here(*command, cwd=project)
    assert "job 100_0 (running) is there already" in second.stdout
    assert "job 101: synthetic/mini/cam/au/seed0" in second.stdout
    cluster(n100_0="PENDING", n101="PENDING")
    third = bench_here(*command, cwd=project)
    assert "submitted" not in third.stdout


def test_a_job_that_sacct_does_not_know_counts_as_there_and_the_way_out_is_told(project, bench_here, cluster):
    command = ("run", "--launcher", "slurm", "--device", "cpu", "--guidance", "au")
    assert "job 100: " in bench_here(*command, cwd=project).stdout
    again = bench_here(*command, cwd=project)
    assert "job 100 (unknown) is there already" in again.stdout
    assert f"remove {Path('results/slurm/jobs.json')}" in again.stdout


def test_a_job_of_another_time_refuses_to_train_something_else(project, bench_here):
    done = bench_here("run", "--device", "cpu", "--set", "train.epochs=3", "--only", "0" * 64, cwd=project)
    assert done.returncode == 2
    assert "settings or data have changed" in done.stderr


# ---- on this machine ----

LOCAL = ["run", "--launcher", "slurm", "--device", "cpu", "--set", "slurm.cluster=local", "--results", "runs"]
ACCIDENTS = {"cost", "code", "finished"}
"""Times; and the code, which others may be editing while this runs."""


def facts(folder):
    return {record.cell: record.model_dump(exclude=ACCIDENTS) for _, record in read_records(folder)}


@pytest.mark.dist
def test_jobs_on_this_machine_give_the_records_of_an_inline_run(project, run_bench):
    done = run_bench("run", "--device", "cpu", "--results", "runs", cwd=project)
    assert done.returncode == 0, done.stderr
    (project / "runs").rename(project / "inline")
    done = run_bench(*LOCAL, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 jobs ended; 2 cells done, 0 missing" in done.stdout
    assert len(facts(project / "inline")) == 2
    assert facts(project / "inline") == facts(project / "runs")


@pytest.mark.dist
def test_a_training_that_fails_fails_the_command_and_says_where_to_look(project, run_bench):
    done = run_bench(*LOCAL, "--guidance", "none", "--set", "train.lr=1e30", "--set", "train.optimizer=sgd", cwd=project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "missing synthetic/mini/cam/none/seed0" in done.stdout
    assert "ended with status 1" in next((project / "runs" / "slurm").glob("*_0_log.err")).read_text()


def wait_for_checkpoint(project):
    deadline = time.monotonic() + 200
    while not list(project.glob("runs/trainings/*/checkpoints/0*")) and time.monotonic() < deadline:
        time.sleep(0.05)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid):
    return [pid, *(below for child in children(pid) for below in descendants(child))]


@pytest.mark.dist
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_by_the_cluster_it_is_requeued_and_ends_in_the_same_weights(processes, project, run_bench):
    command = [*LOCAL, "--guidance", "au", "--nproc", str(processes), "--set", "train.epochs=30", "--set", "slurm.minutes=30"]
    done = run_bench(*command, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    (project / "runs").rename(project / "undisturbed")
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "bench", *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as submitter:
        wait_for_checkpoint(project)
        (controller,) = children(submitter.pid)
        tasks = children(controller)
        assert len(tasks) == processes
        for task in tasks:  # as Slurm does: every process of the job, not only those that listen
            for process in descendants(task):
                os.kill(process, signal.SIGUSR2)
        output, _ = submitter.communicate(timeout=500)
    assert submitter.returncode == 0, output
    log = next((project / "runs" / "slurm").glob("*_0_log.err")).read_text()
    log += next((project / "runs" / "slurm").glob("*_0_log.out")).read_text()
    assert "Requeued job" in log
    events = [json.loads(line)["event"] for line in (project / "runs" / "events.jsonl").read_text().splitlines()]
    assert events.count("interrupt") == 1
    assert "resume" in events
    (_, before), (_, after) = *read_records(project / "undisturbed"), *read_records(project / "runs")
    assert (before.weights_sha256, before.rows_sha256, before.epochs) == (after.weights_sha256, after.rows_sha256, after.epochs)


@pytest.mark.dist
def test_when_the_submitting_process_is_ended_so_are_its_jobs_and_nothing_is_lost(project, run_bench):
    command = [*LOCAL, "--guidance", "au", "--set", "train.epochs=100"]
    in_the_background_of_a_script = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash"]  # there SIGINT is ignored
    with subprocess.Popen(
        [*in_the_background_of_a_script, sys.executable, "-P", "-m", "bench", *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    ) as submitter:
        wait_for_checkpoint(project)
        everyone = descendants(submitter.pid)
        submitter.terminate()
        assert submitter.wait(timeout=200) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in everyone) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in everyone)
    assert run_bench(*command, cwd=project).returncode == 0
    events = [json.loads(line)["event"] for line in (project / "runs" / "events.jsonl").read_text().splitlines()]
    assert "resume" in events


WORKING = {
    # Starts what it was given, again for as long as it asks for it.
    "sbatch": """
export SLURM_JOB_ID=4711 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=0
cp "$1" "$STATE/script"
( while bash "$STATE/script"; [ -e "$STATE/requeue" ]; do rm "$STATE/requeue"; done ) > "$STATE/batch.log" 2>&1 < /dev/null &
echo "Submitted batch job 4711"
""",
    # srun --unbuffered --output FILE --error FILE PROGRAM ...
    "srun": 'exec "${@:6}" >> "${3//%[jt]/4711}" 2>> "${5//%[jt]/4711}"',
    "scontrol": '[ "$*" = "requeue 4711" ] && touch "$STATE/requeue"',
    "sacct": "printf 'JobID|State|NodeList\\n4711|RUNNING|node1\\n'",
}


@pytest.mark.dist
def test_the_submitted_script_runs_is_interrupted_and_requeues_itself_by_slurms_own_commands(project, tmp_path, run_bench):
    folder, state = tmp_path / "bin", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    for name, script in WORKING.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    asked = ["run", "--launcher", "slurm", "--wait", "--device", "cpu", "--results", "runs"]
    command = [*asked, "--guidance", "au", "--set", "train.epochs=100"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "bench", *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder}:{os.environ['PATH']}", "STATE": str(state)},
        stdout=subprocess.PIPE,
        text=True,
    ) as submitter:
        wait_for_checkpoint(project)
        (lease,) = (project / "runs" / "leases").glob("*.json")
        run = json.loads(lease.read_text())["pid"]
        (job,) = (int(line.split()[1]) for line in Path(f"/proc/{run}/status").read_text().splitlines() if line.startswith("PPid"))
        for process in (job, run):
            os.kill(process, signal.SIGUSR2)
        output, _ = submitter.communicate(timeout=500)
    assert submitter.returncode == 0, output
    assert "job 4711: synthetic/mini/cam/au/seed0" in output
    assert json.loads((project / "runs/slurm/jobs.json").read_text()).popitem()[1]["job"] == "4711"
    events = [json.loads(line)["event"] for line in (project / "runs" / "events.jsonl").read_text().splitlines()]
    assert "interrupt" in events
    assert "resume" in events
