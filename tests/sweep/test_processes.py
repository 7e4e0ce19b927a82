"""Runs in processes of their own: torchrun, kill -9, and the same figures whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from bench.sweep.store import read_cell_rows, read_records

FEW = ["--guidance", "au", "--seeds", "0"]


def torchrun(project, processes, *arguments):
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launcher, "-m", "bench", "run", "--device", "cpu", "--timeout", "90", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def single(folder):
    ((cell, record),) = read_records(folder)
    return record, read_cell_rows(cell)


@pytest.mark.dist
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_loss_curve_of_one_without_batch_statistics(project, run_bench, processes):
    assert run_bench("run", *FEW, "--results", "one", cwd=project).returncode == 0
    torchrun(project, processes, *FEW, "--results", "many")
    one, many = (json.loads(next((project / name).rglob("trained.json")).read_text()) for name in ("one", "many"))
    np.testing.assert_allclose(one["losses"], many["losses"], rtol=1e-5, atol=1e-6)
    assert many["world_size"] == processes


@pytest.mark.dist
def test_two_processes_evaluate_the_same_weights_to_the_last_sample(project, run_bench):
    assert run_bench("run", *FEW, "--results", "one", cwd=project).returncode == 0
    shutil.copytree(project / "one" / "trainings", project / "two" / "trainings")
    torchrun(project, 2, *FEW, "--results", "two")
    (one, rows_one), (two, rows_two) = single(project / "one"), single(project / "two")
    assert one.weights_sha256 == two.weights_sha256
    assert one.data.keys_sha256 == two.data.keys_sha256
    assert two.hardware["processes"] == 2
    assert rows_one.keys == rows_two.keys  # 27 samples: 14 on one process, 13 on the other
    np.testing.assert_array_equal(rows_one.labels, rows_two.labels)
    np.testing.assert_allclose(rows_one.logits, rows_two.logits, atol=1e-5)
    np.testing.assert_allclose(rows_one.map_cosines_true, rows_two.map_cosines_true, atol=1e-5)
    assert one.metrics["cl"] == two.metrics["cl"]


@pytest.mark.dist
def test_a_batch_that_does_not_divide_over_the_processes_is_refused_before_anything_is_made(project):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bench", "run", *FEW, "--results", "none"],
        cwd=project,
        env={**os.environ, "WORLD_SIZE": "5", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "nearest that do: 10 or 15" in done.stderr
    assert not (project / "none").exists()


@pytest.mark.slow
def test_killed_at_any_time_and_started_again_it_ends_as_if_undisturbed(project, run_bench):
    long = [*FEW, "--set", "train.epochs=40", "--set", "train.checkpoint_minutes=0"]
    assert run_bench("run", *long, "--results", "undisturbed", cwd=project).returncode == 0
    seconds = single(project / "undisturbed")[0].cost["training_seconds"]
    dice = random.Random(0)
    command = [sys.executable, "-P", "-m", "bench", "run", *long, "--results", "killed"]
    kills = 0
    while kills < 6:
        with subprocess.Popen(
            command, cwd=project, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            begun = time.monotonic()
            while process.poll() is None and not (project / "killed" / "trainings").exists() and time.monotonic() - begun < 60:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, seconds / 2))
            if process.poll() is not None:
                break
            process.kill()
        kills += 1
    assert kills, "not one kill hit the run"
    assert run_bench("run", *long, "--results", "killed", cwd=project).returncode == 0
    (a, rows_a), (b, rows_b) = single(project / "undisturbed"), single(project / "killed")
    assert (a.weights_sha256, a.rows_sha256, a.metrics, a.epochs) == (b.weights_sha256, b.rows_sha256, b.metrics, b.epochs)
    assert rows_a.keys == rows_b.keys
    assert not list((project / "killed").rglob(".*")), "nothing half-written remains"
