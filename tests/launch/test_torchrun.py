"""``--launcher torchrun``: processes under torch elastic, killed, stopped, failing, and what is left in the end."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bench.launch.report import REPORT, Report, deliver, read_report, threads
from bench.launch.torchrun import interface_of, is_local, local_address
from bench.runtime.interruption import REQUEUE
from bench.sweep.attempts import MOST
from bench.sweep.store import read_records

spec = importlib.util.spec_from_file_location("processes", Path(__file__).parent / "processes.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
TWO = ("--launcher", "torchrun", "--nproc", "2", "--timeout", "60")
BROKEN = """
import os

from bench.method import METHODS
from bench.methods.cam import CAM


@METHODS.register("broken", title="Broken", paper="-", year=2020, doi="-", kind="trained", in_all=False)
class Broken(CAM):
    def loss(self, output, batch):
        if len(batch) == 2:  # the trial of the plan
            return super().loss(output, batch)
        raise RuntimeError("this method cannot be trained")


@METHODS.register("odd", title="Odd", paper="-", year=2020, doi="-", kind="trained", in_all=False)
class Odd(CAM):
    def loss(self, output, batch):
        if os.environ.get("RANK") == "1" and len(batch) > 2:
            raise RuntimeError("only here")
        return super().loss(output, batch)
"""


def test_the_address_on_the_way_to_this_machine_is_its_own():
    assert local_address(("127.0.0.1", 0)) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"


def test_an_endpoint_is_hosted_where_its_address_is():
    assert is_local("localhost")
    assert not is_local("192.0.2.1")  # reserved for documentation: nobody has it
    assert not is_local("no.such.host.invalid")


def test_a_report_tells_once_a_node(tmp_path, monkeypatch):
    report = Report(status=1, failed={"cell": "why"}, message="m", rank=2)
    monkeypatch.setenv(REPORT, str(tmp_path / "report.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    deliver(report)
    assert read_report(tmp_path / "report.json") is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    deliver(report)
    assert read_report(tmp_path / "report.json") == report


def test_processes_share_the_cores_unless_the_user_has_said():
    assert int(threads(1, {})["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    assert threads(10_000, {}) == {"OMP_NUM_THREADS": "1"}
    assert threads(2, {"OMP_NUM_THREADS": "7"}) == {}


@pytest.mark.dist
def test_two_processes_of_torchrun_leave_the_record_of_one(project, run_bench):
    single = run_bench(*processes.RUN[4:], "--launcher", "inline", "--results", "one", cwd=project)
    double = run_bench(*processes.RUN[4:], *TWO, "--results", "two", cwd=project)
    assert (single.returncode, double.returncode) == (0, 0), single.stderr + double.stderr
    assert "1 cells done, 0 were done before, 0 failed; 1 trainings" in double.stdout
    (a, rows_a), (b, rows_b) = processes.single(project / "one"), processes.single(project / "two")
    assert (a.key, a.data, a.settings, a.seeds) == (b.key, b.data, b.settings, b.seeds)
    assert b.hardware["processes"] == 2
    curves = [json.loads(next((project / name).rglob("trained.json")).read_text())["losses"] for name in ("one", "two")]
    np.testing.assert_allclose(*curves, rtol=1e-5, atol=1e-6)
    assert rows_a.keys == rows_b.keys
    np.testing.assert_allclose(rows_a.logits, rows_b.logits, atol=1e-4)
    again = run_bench(*processes.RUN[4:], *TWO, "--results", "two", cwd=project)
    assert "0 cells done, 1 were done before" in again.stdout


_undisturbed: list[Path] = []


@pytest.fixture
def undisturbed(project, run_bench, tmp_path_factory):
    """Results of two processes that nobody disturbs; made once for all tests."""
    if not _undisturbed:
        results = tmp_path_factory.mktemp("undisturbed") / "results"
        done = run_bench(*processes.RUN[4:], *processes.LONG, *TWO, "--results", results, cwd=project)
        assert done.returncode == 0, done.stderr
        _undisturbed.append(results)
    return _undisturbed[0]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_of_two_killed_they_start_again_and_end_as_if_undisturbed(project, undisturbed):
    agent = processes.start(*processes.LONG, *TWO, "--results", "killed", cwd=project)
    try:
        processes.wait_for_step(project / "killed", 8, agent)
        workers = processes.children(agent.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert agent.wait(500) == 0, processes.logs(project)
    finally:
        processes.end(agent)
    assert len(workers) == 2
    assert "starting the processes again" in processes.logs(project)
    processes.same_result(undisturbed, project / "killed")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_all_processes_save_and_the_next_start_goes_on(project, undisturbed, number):
    arguments = (*processes.LONG, *TWO, "--results", "stopped")
    agent = processes.start(*arguments, cwd=project)
    try:
        processes.wait_for_step(project / "stopped", 8, agent)
        agent.send_signal(number)
        assert agent.wait(300) == REQUEUE, processes.logs(project)
        assert f"stopped by {number.name}" in processes.logs(project)
        assert not list((project / "stopped").glob("leases/*.json"))
        agent = processes.start(*arguments, cwd=project)
        assert agent.wait(500) == 0, processes.logs(project)
    finally:
        processes.end(agent)
    processes.same_result(undisturbed, project / "stopped")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_agent_that_is_killed_takes_its_processes_along(project):
    agent = processes.start(*processes.LONG, *TWO, "--results", "orphans", cwd=project)
    try:
        processes.wait_for_step(project / "orphans", 8, agent)
        workers = processes.children(agent.pid)
        agent.kill()
        until = time.monotonic() + 120
        while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < until:
            time.sleep(0.1)
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    finally:
        processes.end(agent)
    assert not list((project / "orphans").glob("leases/*.json"))


@pytest.mark.dist
def test_a_cell_that_fails_stops_neither_the_others_nor_the_processes(project, run_bench):
    (project / "broken.py").write_text(BROKEN)
    flags = ("--plugin", "broken.py", "--methods", "broken,cam", *TWO, "--results", "r")
    done = run_bench(*processes.RUN[4:], *flags, cwd=project)
    assert done.returncode == 1, done.stderr
    assert "starting the processes again" not in done.stderr
    assert [record.cell.method for _, record in read_records(project / "r")] == ["cam"]
    (failure,) = (project / "r" / "failures").rglob("*.json")
    assert "this method cannot be trained" in json.loads(failure.read_text())["error"]
    assert "failed synthetic/mini/broken/au/seed0: RuntimeError: this method cannot be trained" in done.stdout


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_that_breaks_one_process_again_and_again_is_given_up_and_the_others_are_done(project, run_bench):
    (project / "broken.py").write_text(BROKEN)
    flags = ("--plugin", "broken.py", "--methods", "odd,cam", *TWO, "--max-restarts", "1", "--results", "r")
    done = run_bench(*processes.RUN[4:], *flags, cwd=project)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("starting the processes again") == MOST
    assert [record.cell.method for _, record in read_records(project / "r")] == ["cam"]
    (failure,) = (project / "r" / "failures").rglob("*.json")
    assert "only here" in json.loads(failure.read_text())["error"]


@pytest.mark.dist
def test_nodes_that_do_not_come_say_so_with_what_to_look_at(project, run_bench):
    flags = ("--launcher", "torchrun", "--nnodes", "2", "--rdzv-endpoint", "127.0.1.1:29455", "--rdzv-timeout", "3", "--results", "r")
    done = run_bench(*processes.RUN[4:], *flags, cwd=project)
    assert done.returncode == 2
    assert "2 nodes did not come together at 127.0.1.1:29455 within 3 s" in done.stderr
    assert "--rdzv-timeout" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.dist
def test_a_batch_that_does_not_divide_is_refused_before_a_process_is_started(project, run_bench):
    done = run_bench(*processes.RUN[4:], "--launcher", "torchrun", "--nproc", "5", "--results", "none", cwd=project)
    assert done.returncode == 2
    assert "nearest that do are 10 or 15" in done.stderr
    assert not (project / "none").exists()


@pytest.mark.dist
def test_groups_share_the_trainings_and_do_each_once(project, run_bench):
    flags = ("run", "--seeds", "0-1", "--device", "cpu", "--nproc", "2", "--procs-per-training", "1", "--results", "r")
    done = run_bench(*flags, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "4 cells done, 0 were done before, 0 failed; 4 trainings" in done.stdout
    assert done.stdout.count("Records: ") == 1
    assert {line[:9] for line in done.stderr.splitlines() if line.startswith("[")} == {"[group 0]", "[group 1]"}
    begun = [
        event["label"] for event in map(json.loads, (project / "r" / "events.jsonl").read_text().splitlines()) if event["event"] == "begin"
    ]
    assert len(begun) == len(set(begun)) == 4
    alone = run_bench("run", "--seeds", "0-1", "--device", "cpu", "--results", "alone", cwd=project)
    assert alone.returncode == 0
    both = [{record.key: record.rows_sha256 for _, record in read_records(project / name)} for name in ("r", "alone")]
    assert both[0] == both[1]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_group_that_dies_is_started_again(project):
    flags = (*processes.LONG, "--nproc", "2", "--procs-per-training", "1", "--seeds", "0-1", "--results", "r")
    parent = processes.start(*flags, cwd=project)
    try:
        processes.wait_for_step(project / "r", 4, parent)
        os.kill(processes.children(parent.pid)[0], signal.SIGKILL)
        assert parent.wait(500) == 0, processes.logs(project)
    finally:
        processes.end(parent)
    assert "died (SIGKILL), started again" in processes.logs(project)
    assert len(list(read_records(project / "r"))) == 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_groups_asked_to_stop_all_save(project):
    flags = (*processes.LONG, "--nproc", "2", "--procs-per-training", "1", "--seeds", "0-1", "--results", "r")
    parent = processes.start(*flags, cwd=project)
    try:
        processes.wait_for_step(project / "r", 4, parent)
        parent.terminate()
        assert parent.wait(300) == REQUEUE, processes.logs(project)
    finally:
        processes.end(parent)
    assert not list((project / "r").glob("leases/*.json"))
    assert not list(read_records(project / "r"))
