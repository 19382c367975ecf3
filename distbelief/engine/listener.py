# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: made before a role is, and handed to it, so that an address outlives who answers there."""

import contextlib
import fcntl
import secrets
import socket
import struct
from pathlib import Path
from typing import Any

from distbelief.channel.links import family_of

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


def listen(role: str) -> socket.socket:
    """An abstract Unix socket with the role in its name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0distbelief-{secrets.token_hex(8)}-{role}")
    listener.listen(1024)
    return listener


def listen_over_tcp(address: str = LOOPBACK) -> socket.socket:
    """A TCP socket of this address only, at any free port. Raises OSError when it is no address of this host."""
    listener = socket.socket(family_of(address), socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
    except OSError:
        listener.close()
        raise
    listener.listen(1024)
    return listener


def interface_of(address: str) -> str:
    """The name of the network interface that has this address; "" when it is none of this host's."""
    if family_of(address) == socket.AF_INET6:
        packed = socket.inet_pton(socket.AF_INET6, address).hex()
        table = Path("/proc/net/if_inet6")  # a kernel may have none
        lines = (line.split() for line in (table.read_text().splitlines() if table.exists() else []))
        return next((fields[-1] for fields in lines if fields[0] == packed), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def name_of(listener: socket.socket) -> Any:
    """Where to call it: the name of a Unix socket, or (address, port)."""
    name = listener.getsockname()
    return name.decode() if isinstance(name, bytes) else tuple(name[:2])
