"""Lines of JSON over TCP between the processes of a job."""

from __future__ import annotations

import json
import socket
from typing import Any

MOST_BYTES = 2**16
# The kernel asks a silent machine after 5 s whether it is there, and gives up after 15 s more.
KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Wire:
    """One end of a connection, whose messages are small dictionaries."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._received = b""

    def fileno(self) -> int:
        """For select."""
        return self._connection.fileno()

    def send(self, **message: Any) -> bool:
        """Whether the message went on its way."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived, at least a part of one; ``None`` when no more will come."""
        try:
            data = self._connection.recv(MOST_BYTES)
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > MOST_BYTES:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def listener() -> socket.socket:
    """A socket at a free port of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:  # the kernel knows IPv6, but it is switched off
            pass
    return socket.create_server(("", 0))
