"""What fails ends cleanly: the cell says why and at which step, the others go on, nothing half-written remains."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from bench.config import load_settings
from bench.data.index import load_index
from bench.runtime.engine import Engine
from bench.runtime.observer import LogObserver
from bench.sweep import events, store
from bench.sweep.datasets import resolve_dataset
from bench.sweep.events import read_events
from bench.sweep.lease import Leases, read_leases
from bench.sweep.plan import make_plan
from bench.sweep.run import run_plan
from bench.sweep.store import Store, read_records
from bench.training import checkpoint, trainer

AU = "synthetic/mini/cam/au/seed0"


@pytest.fixture
def results(project):
    return project / "results"


def failures(results):
    return [json.loads(path.read_text()) for path in results.glob("failures/**/*.json")]


def half_written(results):
    return [p for p in results.rglob("*") if p.name.startswith(".") or p.name.endswith(".partial")] + list(read_leases(results / "leases"))


@pytest.fixture
def at_step(monkeypatch):
    """Let something happen before a step of the training with guidance."""

    def arrange(number, happen):
        real = trainer._Trainer._step

        def step(self, raw):
            if self.training.guidance == "au" and len(self.progress.losses) + len(self._pending) + 1 == number:
                happen()
            return real(self, raw)

        monkeypatch.setattr(trainer._Trainer, "_step", step)

    return arrange


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory, tried 2 GiB"), MemoryError("no room")])
def test_out_of_memory_is_told_with_its_step_and_the_others_go_on(go, results, at_step, error):
    at_step(6, raising(error))
    outcome = go()
    assert outcome.failed == {AU: f"{type(error).__name__}: {error}; after step 5 of 8, in epoch 2"}
    assert [cell.training.guidance for cell in outcome.ran] == ["none"]
    (failure,) = failures(results)
    assert failure["error"] == outcome.failed[AU]
    assert failure["where"].endswith(f":{os.getpid()}")
    assert not half_written(results)
    assert [event["event"] for event in read_events(results)] == ["begin", "end", "begin", "fail"]


def test_the_tracker_of_a_training_that_fails_is_closed_before_the_next_begins(go, at_step, monkeypatch):
    calls = []
    monkeypatch.setattr(Engine, "start_tracking", lambda _self, name, _config: calls.append(f"start {name}"))
    monkeypatch.setattr(Engine, "stop_tracking", lambda _self: calls.append("stop"))
    at_step(2, raising(RuntimeError("no")))
    outcome = go(run__guidance=["au", "none"])
    assert list(outcome.failed) == [AU]
    assert calls == [f"start {AU}", "stop", f"start {AU.replace('/au/', '/none/')}", "stop"]


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(go, results, monkeypatch):
    real, saved = checkpoint.save_file, []

    def save_file(tensors, path):
        saved.append(path)
        if len(saved) == 8:  # two files a checkpoint, and one of the selected weights before the last
            path.write_bytes(b"cut")
            raise NO_SPACE
        return real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    outcome = go(run__guidance=["none"], train__epochs=4, train__select_every=4)
    ((_, reason),) = outcome.failed.items()
    assert "No space left on device" in reason
    assert "after step 16 of 16" in reason
    left = sorted(path.name for path in results.glob("trainings/*/checkpoints/*"))
    assert left == ["00000008", "00000012"]
    assert not half_written(results)
    monkeypatch.undo()
    monkeypatch.chdir(results.parent)
    assert not go(run__guidance=["none"], train__epochs=4, train__select_every=4).failed


@pytest.mark.parametrize("what", ["write_rows", "write_average_maps", "write_bytes_atomic", "file_sha256", "fsync_folder"])
def test_a_disk_that_is_full_at_a_record_leaves_nothing_of_it_and_the_others_go_on(go, results, monkeypatch, what):
    real = getattr(store, what)

    def write(path, *args):
        if "au" in str(path):
            raise NO_SPACE
        return real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(store, what, write)
        outcome = go()
    assert list(outcome.failed) == [AU]
    assert "No space left on device" in outcome.failed[AU]
    assert len(list(read_records(results))) == 1
    assert not list(results.glob("cells/*/*/*/au/*"))
    assert not half_written(results)
    assert (len(go().ran), len(list(read_records(results)))) == (1, 2)


def test_a_marker_that_cannot_be_written_leaves_no_cell(go, results, monkeypatch):
    real = store.write_bytes_atomic

    def write(path, data):
        if path.name == store.DONE:
            raise NO_SPACE
        return real(path, data)

    monkeypatch.setattr(store, "write_bytes_atomic", write)
    assert len(go(run__guidance=["none"]).failed) == 1
    assert not list(results.glob("cells/*/*/*/*/*"))


def test_a_failure_that_cannot_be_recorded_still_does_not_stop_the_others(go, results, at_step, monkeypatch):
    at_step(2, raising(RuntimeError("broken")))
    monkeypatch.setattr(Store, "fail", raising(NO_SPACE))
    outcome = go(run__guidance=["au", "none"])
    assert list(outcome.failed) == [AU]
    assert len(outcome.ran) == 1


def test_a_lease_that_cannot_be_made_fails_its_cells_alone(go, results, monkeypatch):
    real = Leases.claim

    def claim(self, key, *, label, world_size):
        if "/au/" in label:
            raise NO_SPACE
        return real(self, key, label=label, world_size=world_size)

    monkeypatch.setattr(Leases, "claim", claim)
    outcome = go()
    assert (list(outcome.failed), len(outcome.ran)) == ([AU], 1)


def test_a_log_of_events_that_cannot_be_written_does_not_stop_the_run(go, results):
    (results / events.EVENTS_NAME).mkdir(parents=True)
    assert len(go(run__guidance=["none"]).ran) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_damaged_in_the_middle_of_a_training_is_told_with_the_step(go, results, project, data_root, at_step, workers):
    source = resolve_dataset(load_settings(environ={}), "synthetic").folder
    folder = project / "own" / source.name
    if not source.is_dir():
        go(run__guidance=["none"], run__results=project / "other")
    shutil.copytree(source, folder)
    index = load_index(folder)

    def damage():
        (shard,) = index.splits["train"].shards
        with (folder / shard.name).open("r+b") as file:
            for member in shard.members:
                file.seek(member.jpg_offset)
                file.write(bytes(64))

    at_step(5, damage)  # the reader has checked the shard when it opened it
    outcome = go(run__data=project / "own", loader__cache_gib=0.0, loader__workers=workers)
    assert [cell.training.guidance for cell in outcome.ran] == ["none"]
    assert "train-000000.tar" in outcome.failed[AU]
    assert "not that of the index" in outcome.failed[AU]
    assert "of 8, in epoch 2" in outcome.failed[AU]
    assert not half_written(results)


def plan_and_run(*, wait):
    settings = load_settings(environ={})
    engine = Engine(train=settings.config.train, device="cpu")
    return run_plan(make_plan(settings), engine=engine, observer=LogObserver(), wait=wait)


def test_a_lost_lease_ends_the_training_before_anything_more_is_written(go, results, at_step, project):
    go(run__guidance=["none"])
    thief = Leases(results / "leases", heartbeat_s=600, stale_s=1200)
    taken = []

    def take_over():
        if taken:
            return
        (holder,) = read_leases(results / "leases")
        holder.path.unlink()
        taken.append(thief.claim(holder.path.name.split(".")[0], label="another run", world_size=1))

    at_step(6, take_over)
    outcome = plan_and_run(wait=False)
    assert (outcome.failed, list(outcome.left)) == ({}, [AU])
    assert not failures(results)
    assert [path.name for path in results.glob("trainings/*/checkpoints/*")] == ["00000004"]
    assert [event["event"] for event in read_events(results)][2:] == ["begin", "lost"]
    taken[0].confirm()
    taken[0].release()
    assert len(plan_and_run(wait=True).ran) == 1


PLUGIN = """
import os
import torch
from bench.method import METHODS
from bench.methods.cam import CAM

@METHODS.register("rank-test", title="Rank", kind="trained")
class Rank(CAM):
    calls = 0
    def mix(self, batch):
        Rank.calls += len(batch) > 2  # not in the trial of the plan
        if os.environ.get("RANK") == "1" and Rank.calls == 6:
            raise RuntimeError("only here")
        return batch

@METHODS.register("nan-test", title="NaN", kind="trained")
class NaN(CAM):
    def loss(self, output, batch):
        return super().loss(output, batch) * (float("nan") if len(batch) > 2 else 1)
"""


def torchrun(project, *arguments):
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launcher, "-m", "bench", "run", "--device", "cpu", "--timeout", "60", "--seeds", "0", "--guidance", "none", *arguments]
    return subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.dist
def test_what_fails_on_one_of_two_processes_ends_both_with_its_reason(project, results):
    (project / "odd.py").write_text(PLUGIN)
    done = torchrun(project, "--methods", "rank-test", "--plugin", "odd.py")
    assert done.returncode == 1, done.stderr
    (failure,) = failures(results)
    assert "only here" in failure["error"], failure["error"] + done.stderr
    assert "after step 5 of 8" in failure["error"]
    assert failure["process"] == 1


@pytest.mark.dist
def test_what_fails_on_both_of_two_processes_lets_them_go_on(project, results):
    (project / "odd.py").write_text(PLUGIN)
    done = torchrun(project, "--methods", "nan-test,cam", "--plugin", "odd.py")
    assert done.returncode == 1, done.stderr
    ((_, record),) = read_records(results)
    assert record.cell.method == "cam"
    assert record.hardware["processes"] == 2
    (failure,) = failures(results)
    assert "not finite at step 1" in failure["error"]


@pytest.mark.slow
def test_on_a_disk_that_is_really_full_the_cells_fail_and_with_room_they_are_done(project, run_bench):
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(project)], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    assert run_bench("run", "--seeds", "0", "--results", "undisturbed", cwd=project).returncode == 0
    script = f"""
mkdir disk && mount -t tmpfs -o size=300k tmpfs disk || exit 99
{sys.executable} -P -m bench run --seeds 0 --results disk/r; echo "first $?"
find disk/r -name '*.partial' -o -name '.?*' -o -path '*/leases/*.json'
mount -o remount,size=100m disk || exit 99
{sys.executable} -P -m bench run --seeds 0 --results disk/r > second.log; echo "second $?"
cp -r disk/r kept
"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert "first 1" in lines, done.stdout + done.stderr
    assert "No space left on device" in done.stdout
    assert lines[lines.index("first 1") + 1 :] == ["second 0"]  # and nothing half-written between
    whole, disk = ({r.key: (r.weights_sha256, r.rows_sha256) for _, r in read_records(project / name)} for name in ("undisturbed", "kept"))
    assert whole == disk
