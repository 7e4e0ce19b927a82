"""Leases decide which of several runs on one results folder works on a training. There is no daemon and no flock; leases are safe on NFS.

A lease is a file, ``<results>/leases/<key>.<n>.json``. It is made with ``O_EXCL``, so only one process can make it. The file names its
holder; the holder's progress is its last field, and is rewritten in place. A heartbeat renews the time of the file through the open
descriptor, so a holder never touches the lease of another process, whatever happens to the name.

A lease is stale when it was not renewed for ``stale_s`` seconds. It is stale at once when its process is known to have ended: the lease is
of the same machine (boot and process namespace), and no process has its id and start time. The age of a lease is measured against a file
that is touched in the same folder, so only the clock of the file server counts.

A run takes over a stale lease ``n`` by making lease ``n + 1``; ``O_EXCL`` lets one of several takers succeed. The taker then reads the
folder again. If it sees a lease that it has not judged, or a lease that was renewed since, it removes its own lease and tries later.
Otherwise it removes the stale lease. A holder that slept (a suspended laptop) finds its lease gone before it writes anything, and stops.

Known limit: a holder that sleeps for longer than ``stale_s`` exactly between its last look and its write still writes that one file. The
file is whole, and equal to the file that the new holder writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.io import timestamp
from bench.runtime.interruption import LeaseLostError

CLOCK_NAME = "clock"
"""The file that is touched to ask the file server for the time."""
_PROGRESS_BYTES = 512
_NAME = re.compile(r"(?P<key>[^.]+)\.(?P<generation>\d+)\.json")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A lease as it was read. If its making was interrupted, only ``path`` and ``renewed`` are known."""

    path: Path
    generation: int
    renewed: float
    """Seconds since the epoch, by the file server's clock."""
    token: str = ""
    host: str = "?"
    machine: str = ""
    pid: int = 0
    started: int = 0
    world_size: int = 1
    since: str = ""
    """UTC, ISO 8601, by the holder's clock."""
    label: str = ""
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """``host:pid``."""
        return f"{self.host}:{self.pid or '?'}"

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended. False where that cannot be known."""
        return bool(self.machine) and self.machine == machine_id() and process_start(self.pid) != self.started


class Lease:
    """A lease that this process holds. A thread renews it until `release`."""

    def __init__(self, path: Path, descriptor: int, token: str, *, progress_at: int, heartbeat_s: float) -> None:
        self.path = path
        self._descriptor = descriptor
        self._token = token
        self._progress_at = progress_at
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_s,), name=f"lease {path.name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the lease was gone when it was last read."""
        return self._lost

    def confirm(self) -> None:
        """Renew the lease, and check that it is still there.

        Raises:
            LeaseLostError: another process has taken over.
        """
        try:
            os.utime(self._descriptor)
            self._lost = self._lost or _token(self.path) != self._token
        except OSError as error:
            raise LeaseLostError(
                f"the lease {self.path} cannot be renewed: {error}. This run writes nothing more for the training"
            ) from error
        if self._lost:
            raise LeaseLostError(
                f"the lease {self.path} is gone. Another run has taken this training over, because this run gave no sign of life "
                f"(suspended, or cut off from the file server?), or somebody has removed the file. This run writes nothing more for it"
            )

    def report(self, progress: Mapping[str, Any]) -> None:
        """Write progress into the lease file, in place.

        Args:
            progress: a few short values; more than half a kilobyte of JSON is not written.
        """
        data = json.dumps(progress).encode()
        if len(data) <= _PROGRESS_BYTES and not self._released.is_set():
            with contextlib.suppress(OSError):  # a display, not a result
                os.pwrite(self._descriptor, data.ljust(_PROGRESS_BYTES), self._progress_at)

    def release(self) -> None:
        """Give the lease up. The lease of another process is never removed."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # what cannot be removed becomes stale
            if _token(self.path) == self._token:
                self.path.unlink()
        os.close(self._descriptor)

    def _beat(self, heartbeat_s: float) -> None:
        while not self._released.wait(heartbeat_s):
            try:
                os.utime(self._descriptor)
                if _token(self.path) != self._token:
                    self._lost = True
                    return
            except OSError as error:
                _log.warning("the lease %s could not be renewed: %s", self.path, error)


class Leases:
    """The leases of one results folder."""

    def __init__(self, folder: Path, *, heartbeat_s: float, stale_s: float) -> None:
        self.folder = folder
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s

    def claim(self, key: str, *, label: str, world_size: int) -> Lease | Holder:
        """Take the lease of ``key``, or return its holder if that is alive. A stale lease is taken over.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            stale = list(read_leases(self.folder, key))
            living = [holder for holder in stale if not self.is_stale(holder)]
            if living:
                return living[-1]
            generation = max((holder.generation for holder in stale), default=0) + 1
            made = self._make(self.folder / f"{key}.{generation}.json", label=label, world_size=world_size)
            if made is None:
                continue  # another process was faster: read again
            judged = {(holder.path, holder.token, holder.renewed) for holder in stale}
            rivals = [holder for holder in read_leases(self.folder, key) if holder.path != made.path]
            if any((holder.path, holder.token, holder.renewed) not in judged for holder in rivals):
                made.release()
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - so that two processes that met do not meet again
                continue
            for holder in rivals:
                _log.info("took over the lease of %s from %s, which has gone silent", holder.label or key, holder.name)
                holder.path.unlink(missing_ok=True)
            return made

    def clear(self) -> None:
        """Remove stale leases. Their work may be finished: a process can die between the end of its work and the release."""
        for holder in list(read_leases(self.folder)):
            if self.is_stale(holder):
                claimed = self.claim(lease_key(holder.path), label=holder.label, world_size=1)
                if isinstance(claimed, Lease):
                    claimed.release()

    def is_stale(self, holder: Holder) -> bool:
        """Whether the holder of a lease has ended or gone silent. Touches the clock file if the age has to be known."""
        return holder.gone or (self._now() - holder.renewed > self._stale_s)

    def _now(self) -> float:
        path = self.folder / CLOCK_NAME
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def _make(self, path: Path, *, label: str, world_size: int) -> Lease | None:
        token = secrets.token_hex(8)
        identity = {
            "token": token,
            "host": socket.gethostname(),
            "machine": machine_id(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()) or 0,
            "world_size": world_size,
            "since": timestamp(),
            "label": label,
        }
        # The progress is the last value, with room behind it, so that it can be rewritten in place and the file stays JSON.
        head = json.dumps(identity, indent=1).removesuffix("\n}").encode() + b',\n "progress":\n'
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return None
        try:
            os.write(descriptor, head + b"{}".ljust(_PROGRESS_BYTES) + b"\n}\n")
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return Lease(path, descriptor, token, progress_at=len(head), heartbeat_s=self._heartbeat_s)


def read_leases(folder: Path, key: str | None = None) -> Iterator[Holder]:
    """The leases in a folder, or those of ``key``, oldest generation first. Changes nothing."""
    leases = []
    for path in folder.glob(f"{key or '*'}.*.json"):
        match = _NAME.fullmatch(path.name)
        if match:
            leases.append((match["key"], int(match["generation"]), path))
    for _, generation, path in sorted(leases):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            yield _read(path, generation)


def lease_key(path: Path) -> str:
    """The key of the lease in a file."""
    return path.name.split(".")[0]


def _read(path: Path, generation: int) -> Holder:
    with path.open("rb") as file:  # NFS asks the server when a file is opened
        renewed = os.fstat(file.fileno()).st_mtime
        text = file.read().decode(errors="replace")
    head, _, tail = text.partition(' "progress":\n')
    try:
        identity = json.loads(head.rstrip().removesuffix(",") + "}")
    except ValueError:
        return Holder(path=path, generation=generation, renewed=renewed)  # its making was interrupted
    try:
        progress = json.loads(tail.rstrip().removesuffix("}"))
    except ValueError:
        progress = {}  # it was being rewritten
    return Holder(path=path, generation=generation, renewed=renewed, progress=progress, **identity)


def _token(path: Path) -> str | None:
    try:
        return _read(path, 0).token
    except FileNotFoundError:
        return None


def machine_id() -> str:
    """The boot and the process namespace of this process: equal for processes that can see each other. Empty without /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: a later process of the same id has a later start. None without such a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in brackets, may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
