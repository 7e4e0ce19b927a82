"""Runs in processes of their own: torchrun, kill -9, and the same figures whatever happens."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.evaluation.class_maps import read_average_maps
from bench.sweep.store import MAPS, read_cell_rows, read_records

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
        timeout=500,
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
    single_record, several = (json.loads(next((project / name).rglob("trained.json")).read_text()) for name in ("one", "many"))
    np.testing.assert_allclose(single_record["losses"], several["losses"], rtol=1e-5, atol=1e-6)
    assert several["process_counts"] == [processes]


@pytest.mark.dist
def test_two_processes_evaluate_the_same_weights_to_the_last_sample(project, run_bench):
    assert run_bench("run", *FEW, "--results", "one", cwd=project).returncode == 0
    shutil.copytree(project / "one" / "trainings", project / "two" / "trainings")
    torchrun(project, 2, *FEW, "--results", "two")
    (single_record, single_rows), (double_record, double_rows) = single(project / "one"), single(project / "two")
    assert single_record.weights_sha256 == double_record.weights_sha256
    assert single_record.data.keys_sha256 == double_record.data.keys_sha256
    assert double_record.hardware["processes"] == 2
    assert single_rows.keys == double_rows.keys  # 27 samples: 14 on one process, 13 on the other
    np.testing.assert_array_equal(single_rows.labels, double_rows.labels)
    np.testing.assert_allclose(single_rows.logits, double_rows.logits, atol=1e-5)
    np.testing.assert_allclose(single_rows.map_cosines_true, double_rows.map_cosines_true, atol=1e-5)
    assert single_record.metrics["cl"] == double_record.metrics["cl"]
    assert double_record.invariance["holds"]
    maps_one, maps_two = (read_average_maps(next((project / name).rglob(MAPS))) for name in ("one", "two"))
    np.testing.assert_array_equal(maps_one.count, maps_two.count)
    np.testing.assert_allclose(maps_one.map.astype(int), maps_two.map.astype(int), atol=1)
    np.testing.assert_allclose(maps_one.example_map.astype(int), maps_two.example_map.astype(int), atol=1)


@pytest.mark.dist
def test_a_batch_that_does_not_divide_over_the_processes_is_refused_before_anything_is_made(project):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bench", "run", *FEW, "--results", "none"],
        cwd=project,
        env={**os.environ, "WORLD_SIZE": "5", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "nearest that do are 10 or 15" in done.stderr
    assert not (project / "none").exists()


class Zygote:
    """See zygote.py."""

    def __init__(self, cwd):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("zygote.py"))],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, after_s=0.0, at_point=0):
        """Run the command line, and kill it after a time or at a point; returns exit code, points passed, seconds."""
        begun = time.monotonic()
        print(after_s, at_point, *arguments, file=self._process.stdin, flush=True)
        code, points = map(int, self._process.stdout.readline().split())
        return code, points, time.monotonic() - begun

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture
def zygote(project):
    made = Zygote(project)
    yield made
    made.close()


@pytest.mark.slow
def test_killed_at_any_time_and_started_again_it_ends_as_if_undisturbed(project, zygote):
    def results(name):
        (a, rows), folder = single(project / name), project / name
        left = [p for p in folder.rglob("*") if p.name.startswith(".") or p.name.endswith(".partial") or p.parent.name == "leases"]
        assert [p.name for p in left] in ([], ["clock"]), "nothing half-written remains"
        return a.weights_sha256, a.rows_sha256, a.metrics, a.epochs, list(rows.keys)

    command = ["run", *FEW, "--device", "cpu", "--set", "train.epochs=6", "--set", "train.checkpoint_minutes=0", "--results"]
    code, points, seconds = zygote.run(*command, "undisturbed")
    assert code == 0
    expected = results("undisturbed")
    dice, kills = random.Random(0), 0
    while kills < 12:
        if kills % 2:
            code, _, _ = zygote.run(*command, "killed", after_s=dice.uniform(0, seconds))
        else:  # inside a write: of a checkpoint, of the selected weights, of rows, record, marker
            code, _, _ = zygote.run(*command, "killed", at_point=dice.randint(1, points // 3))
        if code < 0:
            kills += 1
        else:
            assert code == 0
            assert results("killed") == expected
            shutil.rmtree(project / "killed")
    assert zygote.run(*command, "killed")[0] == 0
    assert results("killed") == expected
