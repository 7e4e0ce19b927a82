"""A training that breaks the processes twice at the same place is not tried a third time by the same run: the others get their turn.

Where several processes work together and one of them fails, all have to leave, and torch elastic starts them again. That is right when a
process was killed, and would never end when it is the training that kills.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN = "BENCH_RUN"
"""Names the run of an agent, over all starts of its processes and all nodes. Without two underscores it is no setting."""
MOST = 2
"""Attempts at the same place."""


def noted(known: Mapping[str, Any] | None, checkpoint: Path | None) -> dict[str, Any]:
    """What to write into a failure file: how often this run has failed since the newest checkpoint. Empty without an agent.

    Args:
        known: the failure file as it is.
        checkpoint: the newest of the training.
    """
    if RUN not in os.environ:
        return {}
    here = {"run": os.environ[RUN], "checkpoint": checkpoint.name if checkpoint else None}
    again = known is not None and all(known.get(key) == value for key, value in here.items())
    return {**here, "attempts": known["attempts"] + 1 if known is not None and again else 1}


def given_up(failure: Mapping[str, Any]) -> bool:
    """Whether this very run has tried often enough; another run tries again."""
    return RUN in os.environ and failure.get("run") == os.environ[RUN] and failure["attempts"] >= MOST
