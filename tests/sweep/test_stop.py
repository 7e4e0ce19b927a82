"""Asked to stop: what is at hand is finished and saved, the status asks for another start, and the end is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from bench.runtime.interruption import REQUEUE
from bench.runtime.observer import LogObserver
from bench.sweep import run as run_module
from bench.sweep.events import read_events
from bench.sweep.lease import read_leases
from bench.sweep.store import read_records
from bench.training import trainer

ONE = ("--guidance", "au", "--seeds", "0", "--device", "cpu")


def hashes(results):
    return [(record.weights_sha256, record.rows_sha256) for _, record in read_records(results) if record.cell.guidance == "au"]


@pytest.fixture
def undisturbed(finished):
    return hashes(finished)


@pytest.fixture
def stopped_at_step(monkeypatch):
    """Send a signal to this very process in the middle of a step."""

    def arrange(number, signal_number):
        real, calls = trainer._Trainer._step, 0

        def step(self, raw):
            nonlocal calls
            calls += 1
            if calls == number:
                signal.raise_signal(signal_number)
            return real(self, raw)

        monkeypatch.setattr(trainer._Trainer, "_step", step)

    return arrange


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_the_step_be_finished_and_saved(bench_here, project, stopped_at_step, signal_number):
    stopped_at_step(3, signal_number)
    done = bench_here("run", *ONE, "--results", "r", cwd=project)
    assert done.returncode == REQUEUE == 75
    assert f"stopped by {signal.Signals(signal_number).name} after step 3 of 8" in done.stderr
    assert [path.name for path in (project / "r").glob("trainings/*/checkpoints/*")] == ["00000003"]
    assert not list(read_leases(project / "r" / "leases"))
    assert [event["event"] for event in read_events(project / "r")] == ["begin", "interrupt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("step", [1, 4, 6, 8])  # 4 and 8: the last of an epoch
def test_stopped_at_any_step_and_started_again_it_ends_as_if_undisturbed(bench_here, project, stopped_at_step, undisturbed, step):
    stopped_at_step(step, signal.SIGTERM)
    assert bench_here("run", *ONE, "--results", "r", cwd=project).returncode == REQUEUE
    assert bench_here("run", *ONE, "--results", "r", cwd=project).returncode == 0
    assert hashes(project / "r") == undisturbed
    assert [event["event"] for event in read_events(project / "r")] == ["begin", "interrupt", "resume", "end"]


def test_stopped_in_the_selection_of_the_checkpoint_no_step_is_lost(bench_here, project, monkeypatch, undisturbed):
    real = run_module.accuracy

    def accuracy(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "accuracy", accuracy)
        done = bench_here("run", *ONE, "--results", "r", cwd=project)
    assert done.returncode == REQUEUE
    assert "after step 4 of 8" in done.stderr
    assert bench_here("run", *ONE, "--results", "r", cwd=project).returncode == 0
    assert hashes(project / "r") == undisturbed


def test_stopped_in_the_evaluation_there_is_no_result_and_nothing_is_trained_again(bench_here, project, monkeypatch, undisturbed):
    real = run_module.evaluate

    def evaluate(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", evaluate)
        assert bench_here("run", *ONE, "--results", "r", cwd=project).returncode == REQUEUE
    assert hashes(project / "r") == []
    assert not list((project / "r").rglob("cells/**/*.parquet"))
    done = bench_here("run", *ONE, "--results", "r", cwd=project)
    assert (done.returncode, hashes(project / "r")) == (0, undisturbed)
    assert "0 trainings" in done.stdout


def test_stopped_while_a_dataset_is_prepared_the_next_start_goes_on(bench_here, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LogObserver, "advance", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        done = bench_here("run", *ONE, "--results", "r", "--data", "own", cwd=project)
    assert done.returncode == REQUEUE, done.stderr
    assert not list((project / "own").rglob("index.json"))
    assert not list((project / "own").rglob("*.partial"))
    assert bench_here("run", *ONE, "--results", "r", "--data", "own", cwd=project).returncode == 0


def run_code(code):
    head = """
import hashlib, os, signal, threading, time
from bench.runtime import interruption
interruption.SAME_REQUEST_S = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started all this in the background
stop = interruption.StopRequest()
"""
    done = subprocess.run([sys.executable, "-P", "-c", head + code], capture_output=True, text=True, timeout=300, check=False, cwd="/")
    return done.returncode, done.stdout, done.stderr


def test_a_second_signal_stops_at_once():
    code = """
with stop.on_signals():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # the launcher passes on what the whole group got: no second request
    assert stop.reason == "SIGTERM"
    time.sleep(0.3)
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""
    status, out, errors = run_code(code)
    assert (status, out) == (-signal.SIGTERM, ""), errors


def test_a_signal_of_the_same_request_that_is_heard_late_is_no_second_one():
    code = """
with stop.on_signals():
    signal.raise_signal(signal.SIGTERM)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # no handler is called in between, as in a collective that waits for its others
    assert time.monotonic() - begun > 0.3
    print("still here")
"""
    assert run_code(code)[:2] == (0, "still here\n")


def test_handlers_are_those_of_before_when_nothing_is_left_to_save():
    code = """
with stop.on_signals():
    signal.raise_signal(signal.SIGINT)
time.sleep(0.3)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("asked by the keyboard")
"""
    assert run_code(code)[:2] == (0, "asked by the keyboard\n")


def started(project, *command):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *map(str, command)],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_training(process, results):
    """Until a training is begun or resumed: before that there is nothing to save, and a start of Python has its own handlers."""
    begun, before = time.monotonic(), len(list(read_events(results)))
    while process.poll() is None and len(list(read_events(results))) == before and time.monotonic() - begun < 300:
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_gets_sigterm_at_any_time_goes_on_bit_for_bit(project, run_bench):
    long = [*ONE, "--set", "train.epochs=60", "--set", "loader.workers=1", "--set", "loader.cache_gib=0"]
    assert run_bench("run", *long, "--results", "undisturbed", cwd=project).returncode == 0
    dice, codes = random.Random(5), []
    while not codes or codes[-1] == REQUEUE:
        with started(project, "bench", "run", *long, "--results", "r") as process:
            if len(codes) < 3:
                wait_for_training(process, project / "r")
                time.sleep(dice.uniform(0.3, 3))
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=300)
            codes.append(process.returncode)
            assert codes[-1] in (0, REQUEUE), errors
    assert REQUEUE in codes, "not one signal hit the run"
    assert hashes(project / "r") == hashes(project / "undisturbed")
    assert not list((project / "r").rglob(".*"))


@pytest.mark.dist
def test_two_processes_stop_at_the_same_step_and_go_on(project):
    launcher = ["torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launcher, "-m", "bench", "run", *ONE, "--timeout", 90, "--set", "train.epochs=200", "--set", "train.select_every=200"]
    with started(project, *command, "--results", "r") as process:
        wait_for_training(process, project / "r")
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert "which is saved" in errors
    assert [event["event"] for event in read_events(project / "r")] == ["begin", "interrupt"], errors
    assert len(list((project / "r").glob("trainings/*/checkpoints/*"))) >= 1
    assert not list(read_leases(project / "r" / "leases"))
    with started(project, *command, "--results", "r") as process:
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert [event["event"] for event in read_events(project / "r")][2:] == ["resume", "end"]
    assert len(hashes(project / "r")) == 1
