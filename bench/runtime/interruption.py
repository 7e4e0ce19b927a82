"""Ends before the end: somebody asked, the right to work was lost, or a process failed. What is raised, and by whom.

Several processes must leave a training at the same point or one of them waits for ever in a collective. So a signal is only noted; all
processes look at the notes at the same step, and raise the same.
"""

from __future__ import annotations

import _thread
import ctypes
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
"""Signals within so many seconds are one request: a launcher passes on what the whole process group got as well, and the kernel tells of
the death of a parent once for each of its threads."""


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
        self._changing = threading.Lock()  # never taken by a handler, which may interrupt its holder
        self._caught = False

    def note(self, number: int) -> None:
        """Take a signal for a request; to be called by its handler. `SAME_REQUEST_S` after the first, the next one ends the process.

        Python calls a handler when the code at hand returns to it, which a wait for another process or a device does late. So when a signal
        is noted does not tell when it came, and the second of two that came together must not count for more because it is noted late.
        """
        if self.reason is None:
            self.reason = signal.Signals(number).name
            _thread.start_new_thread(self._end_by_the_next, ())  # `threading` takes locks that the code at hand may hold

    def check(self) -> None:
        """Raise if there is a request.

        Raises:
            StoppedError: naming the signal.
        """
        if self.reason is not None:
            raise StoppedError(f"stopped by {self.reason}")

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let `SIGNALS` be noted here, for the work at hand to be finished and saved. A second request ends the process at once.

        Signals can only be caught in the main thread; elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _: FrameType | None) -> None:
            self.note(number)

        self._caught = True
        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            with self._changing:
                self._caught = False
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _end_by_the_next(self) -> None:
        time.sleep(SAME_REQUEST_S)
        with self._changing:
            if self._caught:
                for number in SIGNALS:  # `signal.signal` is for the main thread alone, which may be busy with what shall be ended
                    ctypes.CDLL(None).signal(int(number), None)
