"""What a run started by another run tells it: a small file, named by an environment variable.

The exit status cannot: torch elastic takes every status but 0 for a crash and starts the processes again, and a cell that failed is none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.io import write_json_atomic

REPORT = "BENCH_REPORT"
"""Names the file. Without two underscores it is no setting, see `bench.config.load_settings`."""
PARENT = "BENCH_PARENT"
"""Process id of who wants the report."""
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a run ended."""

    status: int
    """The exit status it would have had."""
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> error."""
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cell label -> who works on it, where that was not waited for."""
    message: str = ""
    """Why it ended before the end, if it did."""
    rank: int = 0
    """Number of the process that tells."""


def wanted() -> bool:
    """Whether another run has started this one, and prints and decides."""
    return REPORT in os.environ


def deliver(report: Report) -> None:
    """Tell who has started this run: once a node, by its first process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_json_atomic(Path(os.environ[REPORT]), dataclasses.asdict(report))


def read_report(path: Path) -> Report | None:
    """What a run has told; None if it has not come so far."""
    return Report(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def end_with_parent() -> None:
    """Have this process asked to stop (SIGTERM: it saves) when the run that has started it is killed. Linux; elsewhere it works on."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # killed before that
        os.kill(os.getpid(), signal.SIGTERM)


def child_environment(path: Path) -> dict[str, str]:
    """What a child's environment needs on top, so that it reports to ``path``."""
    return {REPORT: str(path), PARENT: str(os.getpid()), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def threads(processes: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``OMP_NUM_THREADS`` for processes that share the cores of this node, unless it is set already: each taking all slows all down."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // processes))}
