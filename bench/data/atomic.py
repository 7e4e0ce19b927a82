"""Files that are whole or absent.

A temporary file in the same folder, opened with ``O_EXCL`` -> write -> fsync -> ``os.replace`` -> fsync of the folder. After a crash
at any instant the path holds the old bytes or the new ones, never a mixture; at worst a ``*.partial`` file is left beside it.

Accepted trade-offs: the file gets the mode that the umask gives, not the mode of the file it replaces; a path that is a symbolic link is
replaced by a plain file.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
"""How the names of unfinished files end."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """Open a new file, readable and writable, that takes the name ``path`` when the block ends without an exception.

    On an exception ``path`` stays as it was and the temporary file is removed. The parent folder must exist.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; ``path`` is untouched.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: all of it or nothing."""
    with atomic_file(path) as file:
        file.write(data)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write ``obj`` as indented UTF-8 JSON, keys in the order given, with a final newline.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have; say null.
        TypeError: a value is none of JSON's types.
    """
    write_bytes_atomic(path, (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
