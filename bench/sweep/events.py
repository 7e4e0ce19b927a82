"""``<results>/events.jsonl`` says what happened to each training, when and where. All runs on the folder append to it, one line an event.

A line is written by one ``write`` to a file opened with ``O_APPEND``, and is shorter than 4 kB. So lines of several processes do not mix on
a local file system. Over NFS, lines that are written at the same time may overwrite each other: the log is for people, and results never
depend on it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bench.io import timestamp

EVENTS_NAME = "events.jsonl"
_TEXT = 250
"""Longest text of a value, in characters. Escaped as JSON it can be twelve times as long."""

Event = Literal["begin", "resume", "evaluate", "end", "fail", "interrupt", "lost"]
_log = logging.getLogger(__name__)


class EventLog:
    """The log of one results folder."""

    def __init__(self, root: Path) -> None:
        self._path = root / EVENTS_NAME

    def write(self, event: Event, training: str, *, label: str, **facts: Any) -> None:
        """Append a line. If the log cannot be written (a full disk), a warning says so and the run goes on."""
        line = {
            "event": event,
            "training": training,
            "label": label,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "when": timestamp(),
            **{key: value[:_TEXT] if isinstance(value, str) else value for key, value in facts.items()},
        }
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, json.dumps(line).encode() + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)


def read_events(root: Path) -> Iterator[dict[str, Any]]:
    """The events of a results folder, as far as their lines are whole."""
    path = root / EVENTS_NAME
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue
