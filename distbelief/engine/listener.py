# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: made before a role is, and handed to it, so that an address outlives who answers there."""

import secrets
import socket
from typing import Any

LOOPBACK = "127.0.0.1"


def listen(role: str) -> socket.socket:
    """An abstract Unix socket with the role in its name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0distbelief-{secrets.token_hex(8)}-{role}")
    listener.listen(1024)
    return listener


def listen_over_tcp(address: str = LOOPBACK) -> socket.socket:
    """A TCP socket of this address only, at any free port. Raises OSError when it is no address of this host."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
    except OSError:
        listener.close()
        raise
    listener.listen(1024)
    return listener


def name_of(listener: socket.socket) -> Any:
    """Where to call it: the name of a Unix socket, or (address, port)."""
    name = listener.getsockname()
    return name.decode() if isinstance(name, bytes) else tuple(name)
