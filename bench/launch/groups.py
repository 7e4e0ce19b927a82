"""Several runs of one plan side by side on one node, each on its own devices. Leases see to it that each training is done once."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.launch.report import Report, child_environment, read_report, threads
from bench.runtime.interruption import REQUEUE, StopRequest

POLL_S = 0.1


def run_groups(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    nproc: int,
    max_restarts: int,
    emit: Callable[[str], None],
    stop: StopRequest,
) -> Report:
    """Start one run a group, pass on requests to stop, wait for all, start again what dies.

    Args:
        command: of each group, the same for all.
        environments: one a group: what it has on top of this process's.
        nproc: processes of a group.
        max_restarts: of each group.
        emit: is given every line that a group prints, with ``[group 0]`` before it.
        stop: requests to stop are noted here by handlers that the caller has installed.

    Returns:
        All reports in one; of several statuses the gravest: 1 failed, then 75 to be gone on with, then 0.
    """
    shared = threads(nproc * len(environments))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        groups = [
            _Group(
                number,
                command,
                {**environment, **shared, **child_environment(Path(folder) / f"{number}.json")},
                Path(folder) / f"{number}.json",
                emit,
                max_restarts,
            )
            for number, environment in enumerate(environments)
        ]
        try:
            asked = False
            while any([group.running(may_restart=stop.reason is None) for group in groups]):  # all are looked at  # noqa: C419
                if stop.reason is not None and not asked:
                    asked = True
                    for group in groups:
                        group.send(signal.Signals[stop.reason])
                time.sleep(POLL_S)
        finally:
            for group in groups:
                group.end()
        reports = [group.report() for group in groups]
    statuses = {report.status for report in reports}
    return Report(
        status=next(iter([status for status in (2, 1, REQUEUE) if status in statuses]), 0),
        failed={label: error for report in reports for label, error in report.failed.items()},
        left={label: holder for report in reports for label, holder in report.left.items()},
        message="; ".join(f"group {number}: {report.message}" for number, report in enumerate(reports) if report.message),
    )


class _Group:
    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        path: Path,
        emit: Callable[[str], None],
        restarts: int,
    ) -> None:
        self._number = number
        self._command = command
        self._environment = {**os.environ, **environment}
        self._path = path
        self._emit = emit
        self._restarts = restarts
        self._reader: threading.Thread | None = None
        self._sent: signal.Signals | None = None
        self._process = self._start()

    def running(self, *, may_restart: bool) -> bool:
        """Whether it is at work; started again if it has died without a word and that may be."""
        code = self._process.poll()
        if code is None:
            return True
        if self._path.is_file() or code == 2 or not self._restarts or not may_restart:  # 2: the request cannot be carried out
            return False
        self._restarts -= 1
        self._emit(f"[group {self._number}] died ({_death(code)}), started again")
        self._finish_reading()
        self._process = self._start()
        return True

    def send(self, number: signal.Signals) -> None:
        """Pass a signal on to the group's first process, which passes it on in turn."""
        if self._process.poll() is None:
            self._sent = number
            self._process.send_signal(number)

    def end(self) -> None:
        """See that nothing of it runs on."""
        if self._process.poll() is None:
            self._process.terminate()  # it saves, and ends what it has started
            self._process.wait()
        self._finish_reading()

    def report(self) -> Report:
        """What it has told, or what its death tells."""
        ended = read_report(self._path)
        code = self._process.returncode
        if ended is None and self._sent is not None and code == -self._sent:  # asked to stop before it could listen: nothing was begun
            return Report(status=REQUEUE)
        return ended or Report(status=2 if code == 2 else 1, message=f"died ({_death(code)})")

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # noqa: S603 - our own command
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._emit(f"[group {self._number}] {line.rstrip()}")

    def _finish_reading(self) -> None:
        if self._reader is not None:
            self._reader.join(timeout=5)  # a process of the group that lives on would keep the pipe open


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"
