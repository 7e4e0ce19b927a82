"""Files that are whole or absent; hashes of files, moments and durations as text.

A temporary file in the same folder, opened with ``O_EXCL`` -> write -> fsync -> ``os.replace`` -> fsync of the folder. After a crash
at any instant the path holds the old bytes or the new ones, never a mixture; at worst a ``*.partial`` file is left beside it.

Accepted trade-offs: the file gets the mode that the umask gives, not the mode of the file it replaces; a path that is a symbolic link is
replaced by a plain file.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
"""How the names of unfinished files end."""
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that cannot flush a folder: cifs of older kernels, shares of virtual machines, some of FUSE."""


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


def temporary_folder(final: Path) -> Path:
    """Make an empty hidden folder beside ``final``, to be filled and then renamed to it; ``tempfile`` would make it for this user alone.

    Its name is ``.NAME-`` and random digits, and its mode and group are those that the umask and the parent give. The parent must exist.
    """
    folder = final.with_name(f".{final.name}-{secrets.token_hex(4)}")
    folder.mkdir()
    return folder


def follow_umask(path: Path) -> None:
    """Give a file the mode that the umask gives new files; for libraries that write theirs for this user alone, as safetensors does.

    The mode is that of a file made beside it: to ask for the umask is to change it, for all threads; and a folder may have its own rules.
    """
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    if stat.S_IMODE(path.stat().st_mode) != mode:  # where a mount decides the modes, no call may change them
        path.chmod(mode)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in ``folder`` survive a power cut, where its file system can: some refuse to, and have no other way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def timestamp() -> str:
    """The present moment in UTC, ISO 8601 with milliseconds. Timestamps sort as text, with those of whole seconds too."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def duration(seconds: float) -> str:
    """Seconds as text, to about a percent: ``4.2 s``, ``42 s``, ``3.1 min``, ``12.5 h``."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
