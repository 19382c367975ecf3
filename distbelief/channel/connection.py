# SPDX-License-Identifier: Apache-2.0
"""One non-blocking socket: frames in, frames out, and tensors straight from and into their own memory.

`receive` takes what has arrived, `flush` sends what fits; the endpoint calls them when the socket is ready. Nothing
here waits, but for a method that goes on while its answer is sent. Small frames cost one system call each way. Bodies
go by `recv_into` into memory that the owner names once the header is known, and by `sendmsg` from the tensors.
"""

import array
import itertools
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final

import torch

from distbelief.channel import frames
from distbelief.channel.authenticate import AcceptingSide, CallingSide
from distbelief.channel.codec import Part
from distbelief.channel.frames import Attach, Header, Kind, TensorReference
from distbelief.channel.memory import Block
from distbelief.channel.memory import find as find_block
from distbelief.channel.secure import SecureLink
from distbelief.errors import PeerLost, ProtocolError

_CHUNK = 1 << 16
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_LOW_WATER_BYTES = 1 << 19
_ROUNDS = 64
"""Receives per call of `receive`, so that one fast sender cannot starve the others."""

Destinations = Callable[["Connection", Header, int], Sequence[Part]]
Deliver = Callable[["Connection", Header], None]


@final
class Connection:
    """One peer, seen from this process."""

    def __init__(
        self, link: socket.socket, side: AcceptingSide | CallingSide, *,
        destinations: Destinations, deliver: Deliver, body_limit: int,
    ) -> None:  # fmt: skip
        link.setblocking(False)
        self.socket: socket.socket | SecureLink = link
        self.shares_memory = link.family == socket.AF_UNIX
        """Whether the peer is on this host and can map our memory."""
        self.connecting = False
        """Whether the socket is still connecting: nothing is sent before it has."""
        self.awaits_room = False
        """Whether the endpoint's selector watches for room in the socket."""
        self._side: AcceptingSide | CallingSide | None = side
        """The authentication under way; no frame is read or sent before it is over."""
        self.staging: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        """Memory for bodies of this peer, kept from call to call: (place, length, dtype) -> tensor."""
        self._destinations, self._deliver, self._body_limit = destinations, deliver, body_limit
        self._low_water_bytes = 1
        self._inbox = bytearray()
        self._header: Header | None = None
        self._body: deque[Part] = deque()
        self._outbox: deque[Part] = deque()
        self._descriptors: deque[tuple[int, Block]] = deque()
        self._sent_bytes = self._queued_bytes = 0
        self._attached: set[int] = set()
        self._peer_blocks: dict[int, Block] = {}
        self._arrived_descriptors: deque[int] = deque()
        self._views: dict[TensorReference, torch.Tensor] = {}
        self._proofs = bytearray(side.challenge if isinstance(side, AcceptingSide) else b"")

    # sending

    def reference(self, tensor: torch.Tensor, narrow: bool = False) -> TensorReference:
        """How to name a tensor to this peer; announces its block the first time.

        `narrow` lets a float32 tensor that must travel do so as bfloat16.
        """
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise TypeError(f"tensors travel as contiguous CPU memory; this one is on {tensor.device}, strided")
        name = frames.NAMES[tensor.dtype]
        found = find_block(tensor) if self.shares_memory else None
        if found is None:
            wire = "bfloat16" if narrow and not self.shares_memory and tensor.dtype is torch.float32 else ""
            return TensorReference(name, tensor.numel(), wire=wire)
        block, offset = found
        if block.identifier not in self._attached:
            self._attached.add(block.identifier)
            self._descriptors.append((self._queued_bytes, block))
            self.send(frames.encode(Attach(block.identifier)), [])
        return TensorReference(name, tensor.numel(), block.identifier, offset)

    def send(self, frame: bytes, body: Sequence[Part]) -> None:
        """Queue one frame and send what fits now. The body's memory must stay untouched until it is answered."""
        for part in (memoryview(frame), *body):
            if len(part):
                self._outbox.append(part)
                self._queued_bytes += len(part)
        self.flush()

    @property
    def sending(self) -> bool:
        """Whether something waits for room in the socket."""
        return not self.connecting and (bool(self._proofs) or bool(self._outbox and self._side is None))

    def flush(self) -> None:
        """Send what fits, and all that a method is filling; frames only to a peer that is proved. Raises PeerLost."""
        while self.sending:
            try:
                if self._proofs:
                    del self._proofs[: self.socket.send(self._proofs)]
                    continue
                sent = self._send_once()
            except BlockingIOError:
                first = self._outbox[0] if self._outbox else memoryview(b"")
                if isinstance(first, memoryview) or not first.grows:
                    return
                self._await_room(0.001)  # nothing else may be done before the method is through, which is soon
                continue
            except OSError as error:
                raise PeerLost(f"the peer is gone: {error.strerror or error}") from error
            self._sent_bytes += sent
            while sent:
                sent -= _advance(self._outbox, sent)

    def _send_once(self) -> int:
        first = self._outbox[0]
        if not isinstance(first, memoryview):
            return self.socket.send(first.piece())
        if not self._descriptors:
            return self.socket.sendmsg(list(_plain(itertools.islice(self._outbox, 16))))
        position, block = self._descriptors[0]
        if position > self._sent_bytes:
            # A descriptor must ride on the first byte of its own frame: send only what comes before it.
            return self.socket.send(first)
        assert isinstance(self.socket, socket.socket)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [block.descriptor]))]
        sent = self.socket.sendmsg([first], ancillary)
        self._descriptors.popleft()
        return sent

    def _await_room(self, seconds: float) -> None:
        watch = select.poll()
        watch.register(self.socket, select.POLLOUT)
        watch.poll(1000 * seconds)

    @property
    def proved(self) -> bool:
        """Whether the peer has shown that it knows the job's key."""
        return self._side is None

    @property
    def half_proved(self) -> bool:
        """Whether a caller has begun to prove himself and has not done so."""
        return isinstance(self._side, AcceptingSide) and bool(self._inbox)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self.socket.fileno() < 0

    def hung_up(self) -> bool:
        """Whether the peer has closed its end, though something it sent before may still be unread."""
        watch = select.poll()
        watch.register(self.socket, 0)  # a hang-up is reported without being asked for
        return bool(watch.poll(0))

    # receiving

    def receive(self) -> None:
        """Take what has arrived and deliver whole frames. Raises PeerLost, ProtocolError, AuthenticationError."""
        self._take()
        # In the midst of a long body, be woken for a good part of it, not for each packet.
        if self.shares_memory or not isinstance(self.socket, socket.socket):
            return
        low_water_bytes = max(1, min(_LOW_WATER_BYTES, sum(map(len, self._body))))
        if low_water_bytes != self._low_water_bytes:
            self._low_water_bytes = low_water_bytes
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water_bytes)

    def _take(self) -> None:
        for count in itertools.count(1):
            emptied = False
            try:
                if self._body:
                    first = self._body[0]
                    arrived = self.socket.recv_into(first if isinstance(first, memoryview) else first.piece())
                    _advance(self._body, arrived)
                else:
                    arrived = self._receive_chunk()
                    emptied = arrived < _CHUNK
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLost(f"the peer is gone: {error.strerror or error}") from error
            if arrived == 0:
                raise PeerLost("the peer is gone: it closed the connection")
            self._parse()
            if isinstance(self.socket, SecureLink) and self.socket.pending:
                continue  # no selector would tell of it
            if count >= _ROUNDS or (emptied and not self._body):
                return

    def _receive_chunk(self) -> int:
        if not self.shares_memory or not self.proved or not isinstance(self.socket, socket.socket):
            data = self.socket.recv(_CHUNK)  # descriptors of a stranger are not even taken
        else:
            data, ancillary, _, _ = self.socket.recvmsg(_CHUNK, _DESCRIPTOR_SPACE)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._arrived_descriptors.extend(array.array("i", content))
        self._inbox += data
        return len(data)

    def _parse(self) -> None:
        while self._header is not None or self._inbox:
            if self._side is not None:
                wanted = self._side.wanted_bytes
                if len(self._inbox) < wanted:
                    return
                reply, over = self._side.take(bytes(self._inbox[:wanted]))
                del self._inbox[:wanted]
                self._proofs += reply
                if over:
                    self._side = None
                self.flush()
                continue
            if self._header is None and not self._parse_header():
                return
            while self._body and self._inbox:
                first = self._body[0]
                space = first if isinstance(first, memoryview) else first.piece()
                arrived = self._inbox[: len(space)]
                space[: len(arrived)] = arrived
                del self._inbox[: len(arrived)]
                _advance(self._body, len(arrived))
            if self._body:
                return
            header, self._header = self._header, None
            if isinstance(header, Attach):
                self._attach(header.block)
            elif header is not None:
                self._deliver(self, header)

    def _parse_header(self) -> bool:
        prefix_bytes = frames.PREFIX.size
        if len(self._inbox) < prefix_bytes:
            return False
        kind, header_bytes, body_bytes = frames.decode_prefix(self._inbox[:prefix_bytes], self._body_limit)
        if len(self._inbox) < prefix_bytes + header_bytes:
            return False
        header = frames.decode_header(kind, self._inbox[prefix_bytes : prefix_bytes + header_bytes])
        del self._inbox[: prefix_bytes + header_bytes]
        self._header = header
        if kind is not Kind.ATTACH:
            self._body.extend(part for part in self._destinations(self, header, body_bytes) if len(part))
        elif body_bytes or not self.shares_memory:
            raise ProtocolError("a peer that does not share our memory offered a block")
        return True

    def _attach(self, identifier: int) -> None:
        if not self._arrived_descriptors:
            raise ProtocolError(f"shared-memory block {identifier} was announced without its descriptor")
        self._peer_blocks[identifier] = Block.attach(identifier, self._arrived_descriptors.popleft())

    # the peer's tensors

    def view(self, reference: TensorReference) -> torch.Tensor:
        """The peer's shared memory as a tensor of this process. Raises ProtocolError."""
        found = self._views.get(reference)
        if found is None:
            block = self._peer_blocks.get(reference.block)
            if block is None or reference.dtype not in frames.DTYPES:
                raise ProtocolError(f"a peer named memory that it has not shared: {reference}")
            found = block.tensor(reference.offset_bytes, reference.length, frames.DTYPES[reference.dtype])
            self._views[reference] = found
        return found

    def stage(self, place: int, reference: TensorReference) -> torch.Tensor:
        """Memory of this process for a tensor that travels in a body, the same for one read and one written.

        `place` as in `Signature.places`. Raises ProtocolError when it is too large.
        """
        if frames.size_bytes(reference) > self._body_limit:
            raise ProtocolError(f"a peer announced a tensor out of bounds: {reference}")
        dtype = frames.DTYPES[reference.dtype]
        key = (place, reference.length, dtype)
        if key not in self.staging:
            try:
                self.staging[key] = torch.empty(reference.length, dtype=dtype)
            except RuntimeError as error:
                raise ProtocolError(f"no memory for a tensor that a peer announced: {reference}") from error
        return self.staging[key]

    def bound_staging(self) -> None:
        """Before a call is staged: forget what earlier ones left when that is more than one call may take."""
        if sum(tensor.nbytes for tensor in self.staging.values()) > self._body_limit:
            self.staging = {}

    def close(self) -> None:
        """Close the socket and descriptors that were never mapped."""
        self.socket.close()
        while self._arrived_descriptors:
            os.close(self._arrived_descriptors.popleft())


def _plain(parts: Iterable[Part]) -> Iterator[memoryview]:
    for part in parts:
        if not isinstance(part, memoryview):
            return
        yield part


def _advance(parts: deque[Part], count: int) -> int:
    """So many bytes have travelled; the answer is how many of them were of the first part, which ends when whole."""
    first = parts[0]
    count = min(count, len(first))
    if isinstance(first, memoryview):
        parts[0] = first = first[count:]
    else:
        first.advance(count)
    if not len(first):
        parts.popleft()
    return count
