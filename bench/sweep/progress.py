"""Progress of the current training: passed to the display and, every few seconds, to the lease, where ``bench status`` reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.runtime.observer import Observer, Work
from bench.sweep.lease import Lease

REPORT_SECONDS = 2.0
"""Least time between two reports to the lease."""


class LeaseObserver:
    """Passes everything on to another observer, and reports it to the lease.

    The report: ``state`` (``training`` or ``evaluating``), ``step`` of ``steps`` (samples, in an evaluation), ``rate`` in steps per second
    since this start; ``epoch``, ``loss`` and ``accuracy`` of the last finished epoch.
    """

    def __init__(self, observer: Observer, lease: Lease) -> None:
        self._observer = observer
        self._lease = lease
        self._progress: dict[str, Any] = {}
        self._begun = self._reported = time.monotonic()
        self._first = 0

    def begin(self, work: Work, *, steps: int, done: int) -> None:
        """See `Observer`."""
        self._observer.begin(work, steps=steps, done=done)
        self._begun, self._first = time.monotonic(), done
        # An evaluation follows its training and keeps the epoch and loss of it.
        self._progress |= {"state": work.phase, "step": done, "steps": steps, "rate": None}
        self._report()

    def advance(self, work: Work, *, steps: int, note: str) -> None:
        """See `Observer`."""
        self._observer.advance(work, steps=steps, note=note)
        self._progress["step"] += steps
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._report()

    def end(self, work: Work) -> None:
        """See `Observer`."""
        self._observer.end(work)

    def epoch(self, work: Work, record: Mapping[str, Any]) -> None:
        """See `Observer`."""
        self._observer.epoch(work, record)
        loss = record["classification"] + record["guidance"]
        self._progress |= {"epoch": record["epoch"], "loss": round(loss, 5), "accuracy": record.get("accuracy")}

    def _report(self) -> None:
        self._reported = now = time.monotonic()
        done = self._progress["step"] - self._first
        if done and now > self._begun:
            self._progress["rate"] = round(done / (now - self._begun), 3)
        self._lease.report(self._progress)
