"""``bench status``: what became of every cell, without touching anything."""

from __future__ import annotations

import json
import signal

import pytest

from bench.sweep import run as run_module
from bench.sweep.lease import Leases
from bench.training import trainer


@pytest.fixture
def results(project):
    return project / "results"


@pytest.fixture
def look(bench_here, project):
    """Guidance -> the cell's status."""

    def run(*flags):
        done = bench_here("status", "--json", *flags, cwd=project)
        assert done.returncode == 0, done.stderr
        content = json.loads(done.stdout)
        assert sum(content["totals"].values()) == len(content["cells"])
        return {cell["guidance"]: cell for cell in content["cells"]}

    return run


def test_before_a_run_all_is_waiting_and_nothing_is_made(look, project):
    before = sorted(project.iterdir())
    assert {cell["state"] for cell in look().values()} == {"waiting"}
    assert sorted(project.iterdir()) == before


def test_finished_cells_are_done_and_looking_touches_nothing(look, go, results):
    go(run__guidance=["none"])
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    cells = look()
    assert (cells["none"]["state"], cells["au"]["state"]) == ("done", "waiting")
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


def test_a_failed_cell_says_why(look, go, monkeypatch):
    monkeypatch.setattr(run_module, "train", lambda *_, **__: 1 / 0)
    go(run__guidance=["au"])
    cell = look()["au"]
    assert (cell["state"], cell["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert cell["since"]


def test_an_interrupted_training_says_at_which_step(look, bench_here, project, monkeypatch):
    real = trainer._Trainer._step

    def step(self, raw):
        if self.progress.epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, raw)

    monkeypatch.setattr(trainer._Trainer, "_step", step)
    assert bench_here("run", "--guidance", "au", "--device", "cpu", cwd=project).returncode == 75
    cell = look()["au"]
    assert (cell["state"], cell["step"], cell["steps"]) == ("interrupted", 5, 8)


def test_a_running_training_says_where_and_how_far(look, go, monkeypatch):
    seen = []
    real = trainer._Trainer._end_epoch

    def end_epoch(self):
        real(self)
        seen.append(look()["none"])

    monkeypatch.setattr("bench.sweep.progress.REPORT_SECONDS", 0.0)
    monkeypatch.setattr(trainer._Trainer, "_end_epoch", end_epoch)
    go(run__guidance=["none"])
    first, last = seen
    assert (first["state"], first["phase"], first["step"], first["steps"]) == ("running", "training", 4, 8)
    assert last["step"] == 8
    assert last["loss"] > 0
    assert ":" in first["where"]
    assert first["silent_seconds"] < 60


def test_a_training_whose_holder_is_gone_is_interrupted(look, results, run_python, project, bench_here):
    key = look()["au"]["training"][:16]
    code = f"""
import os
from pathlib import Path
from bench.sweep.lease import Leases
Leases(Path({str(results / "leases")!r}), heartbeat_s=600, stale_s=1200).claim({key!r}, label="dies", world_size=1)
os._exit(0)
"""
    run_python(code)
    cells = look()
    assert (cells["au"]["state"], cells["au"]["step"]) == ("interrupted", 0)
    assert cells["none"]["state"] == "waiting"


def test_the_table_names_states_and_totals(bench_here, go, project, results):
    go(run__guidance=["none"])
    held = Leases(results / "leases", heartbeat_s=600, stale_s=1200).claim(
        json.loads(bench_here("status", "--json", "--guidance", "au", cwd=project).stdout)["cells"][0]["training"][:16],
        label="x",
        world_size=1,
    )
    done = bench_here("status", cwd=project)
    held.release()
    assert "2 cells of 2 trainings: 1 done, 1 running" in done.stdout
    assert "last sign of life" in done.stdout


def test_watching_draws_until_ctrl_c(bench_here, project, monkeypatch):
    from bench.cli import status

    looks = []

    def sleep(_):
        looks.append(None)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    done = bench_here("status", "--watch", cwd=project)
    assert (done.returncode, len(looks)) == (0, 3)
    assert "2 waiting" in done.stdout


def test_watching_and_json_exclude_each_other(bench_here, project):
    assert bench_here("status", "--watch", "--json", cwd=project).returncode == 2
