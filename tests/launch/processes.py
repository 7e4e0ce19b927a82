"""Watching processes that a test has started, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.sweep.store import read_cell_rows, read_records

RUN = (sys.executable, "-P", "-m", "bench", "run", "--guidance", "au", "--seeds", "0", "--device", "cpu")
LONG = ("--set", "train.epochs=20", "--set", "train.checkpoint_minutes=0")


def start(*arguments, cwd, prefix=()):
    """The command line in the background; its output goes to files beside the results."""
    log = cwd / f"{len(list(cwd.glob('*.log')))}.log"
    with log.open("w") as file:
        return subprocess.Popen(
            [*prefix, *RUN, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def logs(cwd):
    return "\n".join(path.read_text() for path in sorted(cwd.glob("*.log")))


def end(*processes):
    """No process that a test has started outlives it: agents end their workers when they are asked to, workers when the agent dies."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def wait_for_step(results: Path, step: int, *processes, seconds=300) -> None:
    """Until a checkpoint of that step or a later one is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(int(path.name) >= step for path in results.glob("trainings/*/checkpoints/[0-9]*")):
            return
        assert all(process.poll() is None for process in processes), f"ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step} within {seconds} s")


def children(pid: int) -> list[int]:
    """Process ids of the children."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            pids.append(int(stat.parent.name))
    return sorted(pids)


def single(results: Path):
    """The only record of a results folder, and its rows."""
    ((cell, record),) = read_records(results)
    return record, read_cell_rows(cell)


def same_result(first: Path, second: Path) -> None:
    """Both hold the same record, up to times, hosts and the number of processes."""
    (a, _), (b, _) = single(first), single(second)
    assert (a.key, a.weights_sha256, a.rows_sha256, a.metrics, a.epochs) == (b.key, b.weights_sha256, b.rows_sha256, b.metrics, b.epochs)
    left = [path for path in second.rglob("*") if path.name.startswith(".") or (path.parent.name in ("leases", "failures") and path.suffix)]
    assert not left, "something half-done remains"
