# SPDX-License-Identifier: Apache-2.0
"""Sockets before and below frames: beginning to connect, what the kernel is told, and whether the other host lives."""

import errno
import os
import socket
import struct
from collections import deque

from distbelief.channel.codec import Part, advance
from distbelief.channel.place import Address
from distbelief.channel.secure import SecureLink
from distbelief.errors import PeerLost

BUFFER_BYTES = 1 << 20
LEAST_WAKE_BYTES, MOST_WAKE_BYTES = 1 << 17, 1 << 19
PROBE_SECONDS = 1
"""How long a TCP connection is quiet before its kernel asks the other one whether it is there."""
_UNDER_WAY = (0, errno.EINPROGRESS)
_TCP_INFO = struct.Struct("=8B13I")
_RETRANSMITS, _PROBES, _BACKOFF, _DATA_RECEIVED, _ACKNOWLEDGED = 2, 3, 4, 19, 20


def family_of(host: str) -> socket.AddressFamily:
    """Of sockets of this address: IPv6's have colons."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def dial(address: Address) -> socket.socket:
    """A socket that is connecting or connected already; never waits. Raises PeerLost when it cannot even begin."""
    try:
        link = socket.socket(socket.AF_UNIX if isinstance(address, str) else family_of(address[0]), socket.SOCK_STREAM)
    except OSError as error:  # no descriptor to spare
        raise unreachable(address, str(error)) from error
    link.setblocking(False)
    try:
        number = link.connect_ex(address)
    except OSError as error:  # a name that resolves to nothing
        link.close()
        raise unreachable(address, str(error)) from error
    if number not in _UNDER_WAY:
        link.close()
        raise unreachable(address, _reason(number))
    return link


def unreachable(address: Address, reason: str) -> PeerLost:
    """The error of a connection that was not made."""
    return PeerLost(f"nothing answers at {address!r}: {reason}")


def _reason(number: int) -> str:
    if number == errno.EAGAIN:
        return "as many callers wait there as it lets wait"
    return os.strerror(number)


def failure(link: socket.socket) -> str:
    """Why the connection that `link` was making was not made; "" when it was."""
    number = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return _reason(number) if number else ""


def tune(link: socket.socket) -> None:
    """Tell the kernel what this connection is for."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        link.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    if link.family != socket.AF_UNIX:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)


_PARTS = 16
"""How many parts of a body one system call takes at most."""


def send_some(link: socket.socket | SecureLink, parts: deque[Part]) -> int:
    """Send some bytes, of which the first parts are freed; how many. Raises OSError."""
    first = parts[0]
    if not isinstance(first, memoryview):
        sent = first.send_by(link)
    else:
        sent = link.send(first) if len(parts) == 1 else link.sendmsg(_plain(parts))
    advance(parts, sent)
    return sent


def receive_some(link: socket.socket | SecureLink, parts: deque[Part]) -> int:
    """Receive some bytes into the first parts, which end when whole; how many, none at the end. Raises OSError."""
    first = parts[0]
    if isinstance(first, memoryview) and isinstance(link, socket.socket):
        # One part at a time would leave each call with the rest of one: a third slower over an open link.
        arrived: int = link.recvmsg_into(_plain(parts))[0]
    else:
        arrived = link.recv_into(first if isinstance(first, memoryview) else first.piece())
    advance(parts, arrived)
    return arrived


def _plain(parts: deque[Part]) -> list[memoryview]:
    plain = []
    for index in range(min(_PARTS, len(parts))):  # by index: another thread may append meanwhile
        part = parts[index]
        if not isinstance(part, memoryview):
            break
        plain.append(part)
    return plain


def wake_for(link: socket.socket, awaited_bytes: int, before: int) -> int:
    """In the midst of a long body, be woken for a good part of it, not for each packet.

    For a quarter of what is awaited, so that a body of a few hundred kilobytes is copied here while the other side is
    still copying its end. The answer is for how many bytes, so far `before`.
    """
    good_part = min(max(awaited_bytes // 4, LEAST_WAKE_BYTES), MOST_WAKE_BYTES)
    wanted = max(1, min(good_part, awaited_bytes))
    if wanted != before:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
    return wanted


def is_silent(link: socket.socket | SecureLink, seconds: float) -> bool:
    """Whether the other host's kernel has left something unanswered and said nothing for so long.

    A process there that computes, or is stopped, is not silence: its kernel acknowledges for it. This is why it is not
    left to TCP_USER_TIMEOUT, which also ends connections to a peer that does not read for a while.
    """
    told: tuple[int, ...] = _TCP_INFO.unpack(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    # To a peer that does not read, probes go at growing intervals, and its kernel may leave an early one unanswered.
    unanswered = told[_RETRANSMITS] > 0 or told[_PROBES] > (1 if told[_BACKOFF] else 0)
    return unanswered and min(told[_DATA_RECEIVED], told[_ACKNOWLEDGED]) > 1000 * seconds
