"""What a run reports while it works. The command line draws it; a log line is the default."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal, Protocol

_log = logging.getLogger("bench")


Phase = Literal["preparing", "training", "evaluating"]


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What an observer follows: one phase of a training, or the preparation of a dataset."""

    label: str
    """Of the training; or the dataset's name."""
    phase: Phase

    def __str__(self) -> str:
        """For people."""
        match self.phase:
            case "preparing":
                return f"prepare {self.label}"
            case "training":
                return self.label
            case "evaluating":
                return f"{self.label} evaluation"


class Observer(Protocol):
    """Called on the main process only, except `note`."""

    def begin(self, work: Work, *, steps: int, done: int) -> None:
        """Work of ``steps`` units begins, ``done`` of them made by an earlier start."""

    def advance(self, work: Work, *, steps: int, note: str) -> None:
        """``steps`` more units are done."""

    def end(self, work: Work) -> None:
        """The work is finished."""

    def epoch(self, work: Work, record: Mapping[str, Any]) -> None:
        """An epoch is finished."""


class LogObserver:
    """One log line an epoch, for logs and for processes without a terminal."""

    def begin(self, work: Work, *, steps: int, done: int) -> None:
        """See `Observer`."""
        _log.info("%s: %d steps%s", work, steps, f", {done} done before" if done else "")

    def advance(self, work: Work, *, steps: int, note: str) -> None:
        """See `Observer`."""

    def end(self, work: Work) -> None:
        """See `Observer`."""

    def epoch(self, work: Work, record: Mapping[str, Any]) -> None:
        """See `Observer`."""
        _log.info(
            "%s: %s",
            work,
            ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()),
        )
