"""Ends before the end: somebody asked, the right to work was lost, or a process failed. What is raised, and by whom.

Several processes must leave a training at the same point or one of them waits for ever in a collective. So a signal is only noted; all
processes look at the notes at the same step, and raise the same.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

REQUEUE = 75
"""Exit status of a run that was asked to stop and wants to be started again: EX_TEMPFAIL of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Requests to stop: of the cluster before the end of a time limit or a preemption, and of a person at the keyboard."""
SAME_REQUEST_S = 2.0
"""Signals within so many seconds are one request: a launcher passes on what the whole process group got as well."""


class HaltError(BaseException):
    """Work ends here without anything being wrong with it. No `Exception`: the nets for failures must not catch it."""


class StoppedError(HaltError):
    """Somebody asked this run to stop, and it has."""


class LeaseLostError(HaltError):
    """Another process has taken this training over."""


class EverywhereError(RuntimeError):
    """An error that all processes raise at the same point: they are still in step and can go on with other work."""


class BrokenWorldError(RuntimeError):
    """An error on some of several processes: the others wait for what will not come. All must leave."""


class Hold(Protocol):
    """The right to work on a training, as the training sees it."""

    @property
    def lost(self) -> bool:
        """Whether it is known to be gone. Costs nothing."""

    def confirm(self) -> None:
        """Called before anything is written.

        Raises:
            LeaseLostError: it is gone.
        """


class Unshared:
    """The `Hold` of work that nobody else can have: of other ranks than the main one, and outside of sweeps."""

    lost = False

    def confirm(self) -> None:
        """See `Hold`."""


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def check(self) -> None:
        """Raise if there is a request.

        Raises:
            StoppedError: naming the signal.
        """
        if self.reason is not None:
            raise StoppedError(f"stopped by {self.reason}")


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Let `SIGNALS` be noted in ``stop``, for the work at hand to be finished and saved. A second signal does what it always does.

    Signals can only be caught in the main thread; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal noted
        if stop.reason is None:
            stop.reason, noted = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - noted > SAME_REQUEST_S:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
