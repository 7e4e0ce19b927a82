"""Leases: of several runs on one results folder, which one works on a training. No daemon, no flock; safe on NFS.

``<results>/leases/<key>.<n>.json`` is made with ``O_EXCL``, so only one process can make it. Who it is stands in it; how it gets on
stands at its end and is rewritten in place. A heartbeat renews the time of the file, through the open descriptor: whatever has happened
to the name, a holder never touches a lease but its own.

A lease is stale when it was not renewed for ``stale_s``, or at once when its process is known to be gone: same machine (boot and process
namespace), and no process of that id and start. Age is the time of the lease against the time of a file touched just now in the same
folder: only the clock of the file server counts, the clocks of the hosts may differ.

A stale lease ``n`` is taken over by making ``n + 1``: of several takers ``O_EXCL`` lets one succeed. It looks again afterwards. If there
is a lease that it has not judged, or one that was renewed since, it takes its own back and tries later; otherwise it removes the stale
one. A holder that slept (a suspended laptop) finds its lease gone before it writes anything, and stops.

Accepted trade-off: a holder that sleeps for longer than ``stale_s`` exactly between looking and writing still writes that one file. It is
whole, and equal to what the new holder writes.
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
    """A lease as it was read. Only ``path`` and ``renewed`` are known of one whose making was cut short."""

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
        """Whether its process is known to have ended; False also where that cannot be known."""
        return bool(self.machine) and self.machine == machine_id() and process_start(self.pid) != self.started


class Lease:
    """A lease that this process holds. Renewed by a thread until `release`."""

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
        """Whether the last look found it gone."""
        return self._lost

    def confirm(self) -> None:
        """Renew, and look whether it is still there.

        Raises:
            LeaseLostError: another process has taken over.
        """
        try:
            os.utime(self._descriptor)
            self._lost = self._lost or _token(self.path) != self._token
        except OSError as error:
            raise LeaseLostError(f"the lease {self.path} cannot be looked after ({error}); nothing more is written") from error
        if self._lost:
            raise LeaseLostError(
                f"the lease {self.path} is gone: another run has taken this training over, because there was no sign of life from here "
                f"(suspended? cut off from the file server?), or somebody has removed it. Nothing more is written from here"
            )

    def report(self, progress: Mapping[str, Any]) -> None:
        """Write how the work gets on into the lease, in place; `progress` is a handful of short values."""
        data = json.dumps(progress).encode()
        if len(data) <= _PROGRESS_BYTES and not self._released.is_set():
            with contextlib.suppress(OSError):  # a display, not a result
                os.pwrite(self._descriptor, data.ljust(_PROGRESS_BYTES), self._progress_at)

    def release(self) -> None:
        """Give it up. Another's lease is never removed."""
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
        """Take the lease of ``key``, from nobody or from a stale holder; where somebody lives, tell who.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            there = list(read_leases(self.folder, key))
            living = [holder for holder in there if not self.is_stale(holder)]
            if living:
                return living[-1]
            generation = max((holder.generation for holder in there), default=0) + 1
            made = self._make(self.folder / f"{key}.{generation}.json", label=label, world_size=world_size)
            if made is None:
                continue  # somebody was faster: look again
            judged = {(holder.path, holder.token, holder.renewed) for holder in there}
            others = [holder for holder in read_leases(self.folder, key) if holder.path != made.path]
            if any((holder.path, holder.token, holder.renewed) not in judged for holder in others):
                made.release()
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - so that two that met do not meet again
                continue
            for holder in others:
                _log.info("took over the lease of %s from %s, which has gone silent", holder.label or key, holder.name)
                holder.path.unlink(missing_ok=True)
            return made

    def clear(self) -> None:
        """Remove the leases that nobody looks after, of work that may be finished: a process can die between its end and its release."""
        for holder in list(read_leases(self.folder)):
            if self.is_stale(holder):
                claimed = self.claim(lease_key(holder.path), label=holder.label, world_size=1)
                if isinstance(claimed, Lease):
                    claimed.release()

    def is_stale(self, holder: Holder) -> bool:
        """Whether nobody looks after a lease any more. Touches the clock file where that is needed to know."""
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
        # The progress is the last value, with room behind it: it can be rewritten in place and the whole stays JSON.
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
    """The leases in a folder, or those of one key, oldest generation first. Changes nothing."""
    found = []
    for path in folder.glob(f"{key or '*'}.*.json"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((match["key"], int(match["generation"]), path))
    for _, generation, path in sorted(found):
        with contextlib.suppress(FileNotFoundError):  # released while we look
            yield _read(path, generation)


def lease_key(path: Path) -> str:
    """What the lease in a file is of."""
    return path.name.split(".")[0]


def _read(path: Path, generation: int) -> Holder:
    with path.open("rb") as file:  # opening anew is what makes NFS ask the server
        renewed = os.fstat(file.fileno()).st_mtime
        text = file.read().decode(errors="replace")
    head, _, tail = text.partition(' "progress":\n')
    try:
        identity = json.loads(head.rstrip().removesuffix(",") + "}")
    except ValueError:
        return Holder(path=path, generation=generation, renewed=renewed)  # its making was cut short
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
    """What processes have in common that can see each other: the boot and the process namespace. Empty where there is no /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, which tells it from a later one of the same id; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in brackets, may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
