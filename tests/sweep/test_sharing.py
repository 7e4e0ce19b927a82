"""Several runs on one results folder: each training is done by one of them, and all end with the whole table."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from bench.config import load_settings
from bench.prepare import pack
from bench.runtime.observer import LogObserver
from bench.sweep import run as run_module
from bench.sweep.datasets import prepare_missing
from bench.sweep.events import read_events
from bench.sweep.lease import Leases, read_leases
from bench.sweep.plan import make_plan
from bench.sweep.store import Store, read_records
from bench.training import trainer


@pytest.fixture
def results(project):
    return project / "results"


@pytest.fixture
def held(bench_here, project, results, monkeypatch):
    """The lease of the training without guidance, held by somebody who lives."""
    monkeypatch.chdir(project)
    prepare_missing(make_plan(load_settings(environ={})).sources.values(), observer=LogObserver(), plugins=())  # keys depend on the data
    content = json.loads(bench_here("status", "--json", "--guidance", "none", cwd=project).stdout)
    lease = Leases(results / "leases", heartbeat_s=600, stale_s=1200).claim(content["cells"][0]["training"][:16], label="x", world_size=1)
    yield lease
    lease.release()


def test_what_another_run_works_on_is_left_to_it_if_so_wanted(bench_here, project, results, held):
    done = bench_here("run", "--device", "cpu", "--no-wait", cwd=project)
    assert done.returncode == 0, done.stderr
    assert f"left synthetic/mini/cam/none/seed0: {os.uname().nodename}:{os.getpid()} works on it" in done.stdout
    assert [record.cell.guidance for _, record in read_records(results)] == ["au"]


def test_what_another_run_gives_up_is_taken_over_in_the_end(go, results, held, monkeypatch):
    monkeypatch.setattr(run_module, "WAIT_SECONDS", 0.05)
    real, order = trainer._Trainer.run, []

    def run(self):
        order.append(self.training.guidance)
        return real(self)

    monkeypatch.setattr(trainer._Trainer, "run", run)
    giving_up = threading.Thread(target=lambda: (time.sleep(3), held.release()))
    giving_up.start()
    outcome = go(run__guidance=["none", "au"])
    giving_up.join()
    assert order == ["au", "none"]
    assert len(outcome.ran) == 2


def test_what_another_run_has_failed_meanwhile_is_not_tried_again_at_once(go, results, held, monkeypatch):
    monkeypatch.setattr(run_module, "WAIT_SECONDS", 0.05)

    def wait_over(_):
        for cell in cells:
            Store(results).fail(cell, {"error": "RuntimeError: broken there", "where": "elsewhere:1"})
        held.release()

    cells = []
    real = run_module._Sweep.run

    def run(self, *, wait):
        cells.extend(cell for cell in self.plan.matrix.cells if cell.training.guidance == "none")
        return real(self, wait=wait)

    monkeypatch.setattr(run_module._Sweep, "run", run)
    monkeypatch.setattr(run_module.time, "sleep", wait_over)
    outcome = go(run__guidance=["none"])
    assert outcome.failed == {"synthetic/mini/cam/none/seed0": "RuntimeError: broken there (on elsewhere:1)"}
    assert outcome.trained == 0


def test_a_dataset_that_another_run_prepares_is_waited_for(go, project, monkeypatch):
    from bench.sweep import datasets

    monkeypatch.setattr(datasets, "BUSY_SECONDS", 0.05)
    real, busy = pack._sole_writer, []

    def sole_writer(out):
        if len(busy) < 3:
            busy.append(out)
            raise pack.BusyError(f"another process is preparing {out} right now. Wait for it")
        return real(out)

    monkeypatch.setattr(pack, "_sole_writer", sole_writer)
    assert len(go(run__guidance=["none"], run__data=project / "own").ran) == 1
    assert len(busy) == 3


@pytest.mark.dist
@pytest.mark.parametrize("runs", [2, 3])
def test_runs_started_at_once_share_the_work_and_end_with_the_whole_table(project, results, runs):
    command = [sys.executable, "-P", "-m", "bench", "run", "--seeds", "0,1", "--device", "cpu", "--data", "own"]
    command += ["--set", "train.epochs=6"]
    processes = [
        subprocess.Popen(
            command,
            cwd=project,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(runs)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * runs, outputs
    assert len(list(read_records(results))) == 4
    events = list(read_events(results))
    count = collections.Counter((event["training"], event["event"]) for event in events)
    trainings = {event["training"] for event in events}
    assert len(trainings) == 4
    assert count == {(training, event): 1 for training in trainings for event in ("begin", "end")}
    assert len({event["pid"] for event in events}) > 1, "they did not share"
    for text in outputs:
        assert "done by other runs meanwhile" in text
        assert "0 failed" in text
    assert not list(read_leases(results / "leases"))
    assert not [path for path in results.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]
