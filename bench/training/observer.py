"""What a run reports while it works. The command line draws it; a log line is the default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

_log = logging.getLogger("bench")


class Observer(Protocol):
    """Called on the main process only, except `note`."""

    def begin(self, label: str, *, steps: int, done: int) -> None:
        """Work of ``steps`` units begins, ``done`` of them made by an earlier start."""

    def advance(self, label: str, *, steps: int, note: str) -> None:
        """``steps`` more units are done."""

    def end(self, label: str) -> None:
        """The work is finished."""

    def epoch(self, label: str, record: Mapping[str, Any]) -> None:
        """An epoch is finished."""


class LogObserver:
    """One log line an epoch, for logs and for processes without a terminal."""

    def begin(self, label: str, *, steps: int, done: int) -> None:
        """See `Observer`."""
        _log.info("%s: %d steps%s", label, steps, f", {done} done before" if done else "")

    def advance(self, label: str, *, steps: int, note: str) -> None:
        """See `Observer`."""

    def end(self, label: str) -> None:
        """See `Observer`."""

    def epoch(self, label: str, record: Mapping[str, Any]) -> None:
        """See `Observer`."""
        _log.info(
            "%s: %s",
            label,
            ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()),
        )
