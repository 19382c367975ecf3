# SPDX-License-Identifier: Apache-2.0
"""Mailboxes: parcels between two processes of one host, through shared memory, with a socket as the bell.

Either process has a ring of shared memory that it writes and the other reads. What was written and what was taken is
told over a socket, as totals; so nobody polls memory, the kernel orders what either sees, and the end of a process is
the end of its socket. Nothing runs beside the two processes: whoever waits moves what can be moved. A parcel larger
than the ring passes through it piece by piece.
"""

import contextlib
import datetime
import functools
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, final

import torch

from distbelief.channel.memory import Block
from distbelief.channel.spin import Spin
from distbelief.errors import DeadlineExceeded, PeerLost

RING_BYTES = 1 << 18
"""Two of them are held for each peer; what partitions exchange for one layer mostly fits."""
_TOTALS = struct.Struct("=QQ")
_HELLO = struct.Struct("=I")
_CREDENTIALS = struct.Struct("=iII")


def meet(store: Any, index: int, size: int, seconds: float) -> "dict[int, Mailbox]":
    """Mailboxes to all others of `size` processes that share `store`; none unless all of them are on this host.

    `store` is a torch.distributed.Store of these processes alone. Raises DeadlineExceeded when one does not come, and
    PeerLost when one goes at once or is another user's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as opened:
        listener.bind("")  # the kernel chooses a name, which is of no file
        listener.listen(size)
        store.set_timeout(datetime.timedelta(seconds=seconds))
        store.set(f"mailbox/{index}", f"{_here()} {listener.getsockname().hex()}")
        told = [bytes(store.get(f"mailbox/{other}")).decode().split() for other in range(size)]
        if len({host for host, _ in told}) > 1:
            return {}
        found = {}
        try:
            for other in range(index + 1, size):
                link = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                link.settimeout(seconds)
                link.connect(bytes.fromhex(told[other][1]))
                found[other] = _introduce(link, index)[1]
            listener.settimeout(seconds)
            while len(found) < size - 1:
                link = opened.enter_context(listener.accept()[0])
                link.settimeout(seconds)
                other, mailbox = _introduce(link, index)
                found[other] = mailbox
        except TimeoutError as error:
            raise DeadlineExceeded(f"not all of {size} processes came within {seconds:g} s") from error
        except OSError as error:
            raise PeerLost(f"one of {size} processes left while they met: {error}") from error
        opened.pop_all()
    return found


def _here() -> str:
    """This host, as far as it shares memory and names of sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def _introduce(link: socket.socket, index: int) -> "tuple[int, Mailbox]":
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
        raise PeerLost("a process of another user came instead of a partition")
    own = Block.create(RING_BYTES)
    socket.send_fds(link, [_HELLO.pack(index)], [own.descriptor])
    hello, descriptors, _, _ = socket.recv_fds(link, _HELLO.size, 1)
    if len(hello) != _HELLO.size or len(descriptors) != 1:
        raise PeerLost("a partition left while it was met")
    (other,) = _HELLO.unpack(hello)
    return other, Mailbox(link, own, Block.attach(own.identifier, descriptors[0]))


@final
class Mailbox:
    """One peer of this host. Parcels arrive in the order in which they were sent."""

    def __init__(self, link: socket.socket, own: Block, peers: Block) -> None:
        link.setblocking(False)
        self._link = link
        self._out, self._in = (block.tensor(0, RING_BYTES, torch.uint8) for block in (own, peers))
        self._sending: deque[torch.Tensor] = deque()
        self._receiving: deque[torch.Tensor] = deque()
        self._written = self._taken = 0
        """Bytes, all told, by this process; and by the other, as far as it has said:"""
        self._peer_written = self._peer_taken = 0
        self._untold = False

    def send(self, parcel: torch.Tensor) -> None:
        """Begin to send a contiguous CPU tensor, which is left alone until `settle`. Raises PeerLost."""
        if parcel.numel():
            self._sending.append(_bytes(parcel))
            self.move()

    def receive(self, arrival: torch.Tensor) -> None:
        """Fill this contiguous CPU tensor, which is left alone until `settle`, with the next parcel."""
        if arrival.numel():
            self._receiving.append(_bytes(arrival))

    @property
    def settled(self) -> bool:
        """Whether all has been sent and has arrived."""
        return not (self._sending or self._receiving or self._untold)

    def move(self) -> bool:
        """Move what can be moved now; whether that was anything. Raises PeerLost."""
        ended = self._hear()  # and what it said before is still taken
        before = self._written, self._taken
        while self._sending and (room := RING_BYTES - (self._written - self._peer_taken)):
            self._written += _copy(self._out, self._written, self._sending, room, outward=True)
        while self._receiving and (there := self._peer_written - self._taken):
            self._taken += _copy(self._in, self._taken, self._receiving, there, outward=False)
        moved = before != (self._written, self._taken)
        self._untold |= moved
        if self._untold and not ended:
            ended = self._tell()
        if ended:
            self._untold = False
            if not self.settled:
                raise PeerLost("it closed the connection")
        return moved

    def _hear(self) -> bool:
        """Take in what the other says; whether it has ended."""
        while True:
            try:
                told = self._link.recv(_TOTALS.size)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                continue  # it left something unread; what it had told before is behind this error
            except OSError:
                return True  # this side has been closed
            if len(told) != _TOTALS.size:
                return True
            self._peer_written, self._peer_taken = _TOTALS.unpack(told)

    def _tell(self) -> bool:
        """Say how far this process is; whether the other has ended."""
        try:
            self._link.send(_TOTALS.pack(self._written, self._taken))
        except BlockingIOError:
            return False  # totals that are told later tell these, too
        except OSError:
            return True
        self._untold = False
        return False

    def watch(self, poll: "select.poll") -> None:
        """Let `poll` return when there is anything to hear, or room for what is untold."""
        poll.register(self._link, select.POLLIN | (select.POLLOUT if self._untold else 0))

    def close(self) -> None:
        """Leave. Who waits for this process learns of it at once."""
        self._link.close()


def settle(mailboxes: Collection[Mailbox], seconds: float, spin: Spin) -> None:
    """Return when all parcels of these have been sent and have arrived. Raises PeerLost, DeadlineExceeded."""
    until = time.monotonic() + seconds
    while unsettled := [mailbox for mailbox in mailboxes if not mailbox.settled]:
        moved = [mailbox.move() for mailbox in unsettled]
        if any(moved):
            continue
        left = until - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"nothing came within {seconds:g} s")
        spin.wait(functools.partial(_rings, unsettled), left)


def _rings(mailboxes: Collection[Mailbox], seconds: float) -> bool:
    """Whether there is anything to hear of any of these, or soon."""
    bells = select.poll()
    for mailbox in mailboxes:
        mailbox.watch(bells)
    return bool(bells.poll(1000 * seconds))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _copy(ring: torch.Tensor, total: int, parcels: deque[torch.Tensor], most: int, *, outward: bool) -> int:
    """Copy a piece of the first parcel, at most so many bytes, into the ring or out of it; answers how many."""
    parcel, place = parcels[0], total % RING_BYTES
    count = min(len(parcel), most, RING_BYTES - place)
    piece, rest = parcel[:count], parcel[count:]
    if outward:
        ring[place : place + count] = piece
    else:
        piece.copy_(ring[place : place + count])
    if len(rest):
        parcels[0] = rest
    else:
        parcels.popleft()
    return count
