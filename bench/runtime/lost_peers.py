"""Notice that a node has vanished: without its power or cable, nothing closes its connections.

A store of PyTorch's that times out while it waits tells its server so and then waits for an answer, without a limit (seen in torch 2.15,
`TCPStore.wait` and `get`). If the server's host is gone, the kernel gives up after about a quarter of an hour. It can be told to sooner.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

_OPEN = Path("/proc/self/fd")


def give_up_on_lost_peers(port: int, *, seconds: int) -> int:
    """Let this process's connections to a port fail when the other side has acknowledged nothing for so long.

    Args:
        port: of the server, a store's.
        seconds: until a connection on which nothing is acknowledged counts as broken.

    Returns:
        How many connections were told; 0 on systems without ``/proc`` or ``TCP_USER_TIMEOUT``, where the kernel's own patience counts.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT") or not _OPEN.is_dir():
        return 0
    sockets = 0
    for entry in list(_OPEN.iterdir()):
        connection = _socket(int(entry.name))
        if connection is None:
            continue
        with connection, suppress(OSError):  # not connected, or closed meanwhile
            if connection.type == socket.SOCK_STREAM and connection.getpeername()[1] == port:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
                # Where nothing is under way, ask: an unanswered question ends the connection in the same time.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 2))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 6))
                sockets += 1
    return sockets


def _socket(number: int) -> socket.socket | None:
    """The socket behind a file descriptor, by a descriptor of its own; None if it is something else."""
    try:
        own = os.dup(number)
    except OSError:  # closed meanwhile
        return None
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        return None
