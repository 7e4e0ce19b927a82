"""Two nodes: two network namespaces on this machine, joined by a cable (a veth pair), one agent in each, and a cut of the cable."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("processes", Path(__file__).parent / "processes.py")
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]
NODES = ("--launcher", "torchrun", "--nproc", "1", "--nnodes", "2", "--timeout", "10", "--rdzv-timeout", "120")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


class TwoHosts:
    """Names of the namespaces, and the cable between them."""

    def __init__(self) -> None:
        number = os.getpid() % 50_000
        self.hosts = (f"bench{number}a", f"bench{number}b")
        self.ends = (f"bv{number}a", f"bv{number}b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.endpoint = f"{self.addresses[0]}:29400"

    def lay(self) -> None:
        for host in self.hosts:
            ip("netns", "add", host)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for host, end, address in zip(self.hosts, self.ends, self.addresses, strict=True):
            ip("link", "set", end, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", end, "up")

    def cut(self) -> None:
        ip("-n", self.hosts[1], "link", "set", self.ends[1], "down")

    def heal(self) -> None:
        ip("-n", self.hosts[1], "link", "set", self.ends[1], "up")

    def remove(self) -> None:
        for host in self.hosts:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True, timeout=30)

    def start(self, project: Path, results: str):
        """The same command on both hosts. No address and no interface is told but the endpoint."""
        flags = (*processes.LONG, *NODES, "--rdzv-endpoint", self.endpoint, "--results", results)
        return [processes.start(*flags, cwd=project, prefix=("ip", "netns", "exec", host)) for host in self.hosts]


@pytest.fixture
def two_hosts():
    if shutil.which("ip") is None:
        pytest.skip("no ip command here")
    hosts = TwoHosts()
    try:
        try:
            hosts.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.remove()


@pytest.fixture
def one_host(project, run_bench):
    """The results of the same two processes on one node."""
    flags = (*processes.RUN[4:], *processes.LONG, "--launcher", "torchrun", "--nproc", "2", "--results", "one-host")
    done = run_bench(*flags, cwd=project)
    assert done.returncode == 0, done.stderr
    return project / "one-host"


def test_two_hosts_give_what_one_gives_and_a_cut_cable_changes_nothing(project, one_host, two_hosts):
    agents = two_hosts.start(project, "two-hosts")
    try:
        assert [agent.wait(500) for agent in agents] == [0, 0], processes.logs(project)
    finally:
        processes.end(*agents)
    processes.same_result(one_host, project / "two-hosts")
    assert processes.logs(project).count("Records: ") == 1, "one of the nodes prints"

    agents = two_hosts.start(project, "cut")
    try:
        processes.wait_for_step(project / "cut", 8, *agents)
        two_hosts.cut()
        time.sleep(20)  # longer than --timeout: the processes on both sides give up
        two_hosts.heal()
        assert [agent.wait(500) for agent in agents] == [0, 0], processes.logs(project)
    finally:
        processes.end(*agents)
    assert "starting the processes again" in processes.logs(project)
    processes.same_result(one_host, project / "cut")


@pytest.mark.parametrize("gone", [1, 0], ids=["the other", "that of the endpoint"])
def test_a_node_that_vanishes_leaves_a_clear_state_and_the_next_start_goes_on(project, one_host, two_hosts, gone):
    agents = two_hosts.start(project, "vanished")
    try:
        processes.wait_for_step(project / "vanished", 8, *agents)
        two_hosts.cut()
        agents[gone].kill()  # `ip netns exec` becomes the agent
        agents[gone].wait(30)
        # Nobody comes back within --rdzv-timeout: the node that is left ends, with the status that asks for another start.
        assert agents[1 - gone].wait(400) == 75, processes.logs(project)
        assert "lost the other nodes" in processes.logs(project)
        assert not list((project / "vanished").glob("leases/*.json"))
        two_hosts.heal()
        agents = two_hosts.start(project, "vanished")
        assert [agent.wait(500) for agent in agents] == [0, 0], processes.logs(project)
    finally:
        processes.end(*agents)
    processes.same_result(one_host, project / "vanished")
