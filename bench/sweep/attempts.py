"""A run gives a training up that breaks its processes twice at the same place, and goes on with the next training.

If one of several processes fails, all have to end, and torch elastic starts them again. That is right for a process that was killed. It
would never end for a training that kills its processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN = "BENCH_RUN"
"""Environment variable that names a run, over all starts of its processes and all nodes. Without two underscores it is no setting."""
MOST = 2
"""Attempts at the same checkpoint."""


def noted(known: Mapping[str, Any] | None, checkpoint: Path | None) -> dict[str, Any]:
    """How often this run has failed since the newest checkpoint, for the failure file. Empty without `RUN`.

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
    """Whether this run has tried `MOST` times. A later run tries again."""
    return RUN in os.environ and failure.get("run") == os.environ[RUN] and failure["attempts"] >= MOST
