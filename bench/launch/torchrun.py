"""Processes on one or several nodes under torch elastic: this process becomes the agent of its node.

PyTorch's own `elastic_launch` would do but for four things, for which its agent is extended here:

- a request to stop (SIGTERM, SIGUSR1, Ctrl-C) is passed on, and the processes are given the time that saving takes: PyTorch's kills
  them after 30 seconds, and on the other nodes starts them again;
- nodes may start in any order: PyTorch's fails where the one that is the meeting point is not there within a minute;
- the address by which a node is reached is the one that leads to the meeting point, not what its host name resolves to (on many
  machines 127.0.1.1);
- a start after a crash gets a new store: keys that an earlier attempt has left behind would be read as news.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from bench.launch.report import Report, child_environment, read_report, threads
from bench.runtime.interruption import REQUEUE, SIGNALS, StoppedError, StopRequest
from bench.runtime.lost_peers import give_up_on_lost_peers
from bench.sweep.attempts import RUN

READ_TIMEOUT_S = 60
"""For one question to the store where the nodes meet; also PyTorch's default."""
EXIT_BARRIER_S = 60
"""That agents wait for each other in the end, so that the one with the store does not leave first."""
_TORCH_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """What to start."""

    command: Sequence[str]
    """Program and arguments of every process."""
    nproc: int
    nnodes: int
    endpoint: tuple[str, int]
    run_id: str
    """The same on all nodes of this run, and on no others that meet at this endpoint."""
    max_restarts: int
    rdzv_timeout_s: int
    """For all nodes to come together, in the beginning and after a crash."""


def run_elastic(elastic: Elastic, *, stop: StopRequest, progress: Callable[[], object]) -> Report:
    """Start the processes, watch over them, start them again when one dies.

    Args:
        elastic: what to start.
        stop: requests to stop are noted here by handlers that the caller has installed.
        progress: something that is another value when the work has got on. Only crashes without progress between count as restarts.

    Returns:
        What the processes reported; status 75 if they ended before the end and the same command goes on; 1 if they kept dying.

    Raises:
        ConnectionError: the nodes did not come together.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "report.json"
        with _environment(_environment_of(elastic, path)):
            report = _run(elastic, stop, progress)
        ended = read_report(path)
    if report is not None:
        return report
    if stop.reason is not None and (ended is None or ended.status != 0):
        return Report(status=REQUEUE, message=f"stopped by {stop.reason}", failed=ended.failed if ended else {})
    return ended or Report(status=REQUEUE, message="another node has ended this run")


def _run(elastic: Elastic, stop: StopRequest, progress: Callable[[], object]) -> Report | None:
    """A report of what only the agent knows, or None where the processes have come to their own end."""
    agent = None
    try:
        handler = _meeting_point(elastic, stop)
        spec = WorkerSpec(
            role="bench",
            local_world_size=elastic.nproc,
            entrypoint=elastic.command[0],
            args=tuple(elastic.command[1:]),
            rdzv_handler=handler,
            max_restarts=elastic.max_restarts,
            monitor_interval=0.1,
            local_addr=local_address(elastic.endpoint),
        )
        agent = _Agent(spec, stop, progress)
        try:
            result = agent.run()
        except RendezvousError:
            raise  # nobody is there to be told
        except BaseException:
            _quietly_shut_down(handler)
            raise
        _quietly_shut_down(handler)
    except StoppedError as error:
        return Report(status=REQUEUE, message=str(error))
    except RendezvousError as error:
        where = f"{elastic.endpoint[0]}:{elastic.endpoint[1]}"
        if agent is None or not agent.met:
            raise ConnectionError(
                f"{elastic.nnodes} nodes did not come together at {where} within {elastic.rdzv_timeout_s} s ({_one_line(error)}). Start "
                f"the same command on each of them (here --rdzv-id is {elastic.run_id}), see that {where} can be reached, or give "
                f"them longer with --rdzv-timeout"
            ) from error
        return Report(status=REQUEUE, message=f"lost the other nodes: they did not come together again at {where} ({_one_line(error)})")
    if result is not None and result.is_failed():
        deaths = ", ".join(f"process {rank}: {_death(failure.exitcode)}" for rank, failure in sorted(result.failures.items()))
        return Report(status=1, message=f"the processes died {elastic.max_restarts + 1} times without getting on, the last time {deaths}")
    return None


class _Agent(LocalElasticAgent):
    """PyTorch's agent, with the differences that the head of this file tells."""

    def __init__(self, spec: WorkerSpec, stop: StopRequest, progress: Callable[[], object]) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=os.devnull), exit_barrier_timeout=EXIT_BARRIER_S)
        self.met = False
        """Whether the nodes have come together at least once."""
        self._stop = stop
        self._progress = progress
        self._reached = progress()
        self._token = secrets.token_hex(8)
        self._asked: set[int] = set()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self.met:
            _log.warning("starting the processes again, from the last checkpoint; waiting for all nodes")
        with _stoppable(self._stop):
            super()._rendezvous(worker_group)
            group: Any = worker_group  # PyTorch's annotations say that its store and rank are None
            if group.group_rank == 0:
                group.store.set(RUN, self._token)
            self._token = os.environ[RUN] = group.store.get(RUN).decode()  # one name for this run on all nodes, whoever is first next time
        self.met = True

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._stop.check()
        before = {number: signal.getsignal(number) for number in _TORCH_SIGNALS}
        try:
            started: dict[int, Any] = super()._start_workers(worker_group)
            return started
        finally:
            for number, handler in before.items():  # PyTorch has put its own there, which kill
                signal.signal(number, handler)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._stop.reason is not None:
            for worker in worker_group.workers:
                if worker.id not in self._asked:
                    self._asked.add(worker.id)
                    _send(worker.id, signal.Signals[self._stop.reason])
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._stop.check()  # not to be started again
            reached = self._progress()
            if reached != self._reached:
                self._reached, self._remaining_restarts = reached, worker_group.spec.max_restarts
        return result


def _meeting_point(elastic: Elastic, stop: StopRequest) -> RendezvousHandler:
    """Host the store where the nodes meet, if the endpoint is an address of this node, or find it."""
    host, port = elastic.endpoint
    deadline = time.monotonic() + elastic.rdzv_timeout_s
    hosts = [True, False] if is_local(host) else [False]  # two on one machine: the second finds the port taken
    while True:
        for is_host in hosts:
            left = max(1, int(min(READ_TIMEOUT_S, deadline - time.monotonic())))
            parameters = RendezvousParameters(
                backend="c10d",
                endpoint=f"{host}:{port}",
                run_id=elastic.run_id,
                min_nodes=elastic.nnodes,
                max_nodes=elastic.nnodes,
                local_addr=local_address(elastic.endpoint),
                is_host=is_host,
                timeout=elastic.rdzv_timeout_s,
                join_timeout=elastic.rdzv_timeout_s,
                read_timeout=left,
            )
            with _stoppable(stop):
                try:
                    handler = get_rendezvous_handler(parameters)
                    give_up_on_lost_peers(port, seconds=READ_TIMEOUT_S)
                    return handler
                except RendezvousConnectionError:
                    if not is_host and time.monotonic() > deadline:
                        raise
        time.sleep(0.5)


def is_local(host: str) -> bool:
    """Whether a host name or address is of this machine: one can listen there."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
            return True
        except OSError:
            continue
    return False


def local_address(endpoint: tuple[str, int]) -> str | None:
    """This machine's address on the way to the endpoint, None where there is no way. Nothing is sent."""
    host, port = endpoint
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address; None where that cannot be known."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, name.encode().ljust(256, b"\0"))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _environment_of(elastic: Elastic, path: Path) -> dict[str, str]:
    extra = {**child_environment(path), **threads(elastic.nproc), RUN: ""}  # the agents agree on that when they meet
    # A store of its own for every start: with the agent's, a start after a crash finds what the one before has left.
    extra["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if elastic.nnodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo takes the interface of the host name's address, which need not lead to the others. NCCL looks for itself.
        address = local_address(elastic.endpoint)
        name = interface_of(address) if address else None
        if name is not None:
            extra["GLOO_SOCKET_IFNAME"] = name
    return extra


@contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _stoppable(stop: StopRequest) -> Iterator[None]:
    """While nodes wait for each other there is nothing to save: a request to stop ends the waiting."""

    def leave(number: int, _: FrameType | None) -> None:
        stop.note(number)
        stop.check()

    stop.check()  # or the handlers put back below would take the place of the default that a second request meets
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        stop.check()
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def _quietly_shut_down(handler: RendezvousHandler) -> None:
    """Tell the other nodes that nobody is to be waited for here."""
    try:
        handler.shutdown()
    except Exception as error:  # noqa: BLE001 - the store is gone with the node that had it
        _log.debug("the meeting point is gone: %s", error)


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
