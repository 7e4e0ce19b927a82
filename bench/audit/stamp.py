"""``VERIFIED.json`` beside a record: somebody has loaded its weights, evaluated them again, and found the rows.

The stamp is a word of who wrote it, no proof: it says of which record, of which weights, when and by which code. It holds for that very
record; one that was changed afterwards has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.io import file_sha256, timestamp, write_json_atomic
from bench.sweep.record import code_facts
from bench.sweep.store import RECORD

STAMP = "VERIFIED.json"
MOST_BYTES = 1 << 16
"""Of a stamp: a larger file is none."""


def write_stamp(folder: Path, *, weights_sha256: str, largest_difference: float) -> None:
    """Note that the rows of a finished cell were found again.

    Args:
        folder: the cell's.
        weights_sha256: of the weights that were evaluated.
        largest_difference: between the recorded rows and the new ones, see `bench.audit.rerun`.
    """
    code = code_facts()
    changed = {True: "", False: " with changes", None: ", changes unknown"}[code.clean if code.commit else True]
    content = {
        "record_sha256": file_sha256(folder / RECORD),
        "weights_sha256": weights_sha256,
        "when": timestamp(),
        "by": f"bench {code.version}" + (f", commit {code.commit}{changed}" if code.commit else ""),
        "largest_difference": largest_difference,
    }
    write_json_atomic(folder / STAMP, content)


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """The stamp of a cell's folder; None if there is none, or what is there is not one."""
    path = folder / STAMP
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def is_verified(folder: Path) -> bool:
    """Whether a cell's folder carries the stamp of exactly the record that lies in it."""
    stamp = read_stamp(folder)
    return stamp is not None and (folder / RECORD).is_file() and stamp.get("record_sha256") == file_sha256(folder / RECORD)
