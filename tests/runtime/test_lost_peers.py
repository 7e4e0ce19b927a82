"""A connection to a node that has vanished fails in the time it was given."""

from __future__ import annotations

import os
import socket

import pytest

from bench.runtime.lost_peers import give_up_on_lost_peers

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        yield client, server.getsockname()[1]


def test_connections_to_the_port_are_told_and_no_others(connection):
    client, port = connection
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as stranger:
        assert give_up_on_lost_peers(port, seconds=7) == 1
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
        assert stranger.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_no_descriptor_is_left_open_and_the_connection_lives(connection):
    client, port = connection
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - names are enough
    give_up_on_lost_peers(port, seconds=7)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    assert client.send(b"still here") == 10
