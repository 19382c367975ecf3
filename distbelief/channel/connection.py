# SPDX-License-Identifier: Apache-2.0
"""One non-blocking socket: frames in, frames out, and tensors straight from and into their own memory.

`receive` takes what has arrived, `flush` sends what fits; the endpoint calls them when the socket is ready. Nothing
here waits. Small frames cost one system call each way. Bodies go into memory that the owner names once the header is
known, and from the tensors; of large ones to another host every other piece goes by a second stream.
"""

import array
import itertools
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch

from distbelief.channel import codec, frames, links
from distbelief.channel.authenticate import AcceptingSide, CallingSide
from distbelief.channel.codec import Part
from distbelief.channel.frames import Answer, Attach, Call, Header, Kind, TensorReference
from distbelief.channel.memory import Block
from distbelief.channel.memory import find as find_block
from distbelief.channel.second_stream import SecondStream, deal
from distbelief.channel.secure import SecureLink
from distbelief.channel.watch import READABLE, WRITABLE
from distbelief.errors import PeerLost, ProtocolError

_CHUNK = 1 << 13
"""What of a body comes with its header is copied once more; the rest is received where it belongs."""
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_WIDENED = (Call, Answer)
_ROUNDS = 64
"""Receives per call of `receive`, so that one fast sender cannot starve the others."""

Destinations = Callable[["Connection", Header, int], Sequence[Part] | None]
"""Where a body belongs; None where it is not to be begun yet."""
Deliver = Callable[["Connection", Header], None]


@final
class Connection:
    """One peer, seen from this process."""

    def __init__(
        self, link: socket.socket, side: AcceptingSide | CallingSide, *,
        destinations: Destinations, deliver: Deliver, permit: Callable[[], None], body_limit: int,
    ) -> None:  # fmt: skip
        link.setblocking(False)
        self.socket: socket.socket | SecureLink = link
        self.shares_memory = link.family == socket.AF_UNIX
        """Whether the peer is on this host and can map our memory."""
        self.connecting = False
        """Whether the socket is still connecting: nothing is sent before it has."""
        self.descriptor = link.fileno()
        """The socket's, also under TLS, and when it is closed."""
        self.watched = 0
        """What the endpoint watches the socket for."""
        self.identity = b""
        """By what both ends know this connection, once the peer is proved."""
        self.second: SecondStream | None = None
        """By which every other piece of a large body goes, once there is one."""
        self._hang_up: select.poll | None = None
        """Tells whether the peer has hung up; made when that is first asked."""
        self.closed = False
        """Whether it has ended, at least as a connection: another one may have the socket, as its second stream."""
        self._side: AcceptingSide | CallingSide | None = side
        """The authentication under way; no frame is read or sent before it is over."""
        self._destinations, self._deliver, self._body_limit = destinations, deliver, body_limit
        self._permit = permit
        self._low_water_bytes = 1
        self._inbox = bytearray()
        self._header: Header | None = None
        self._announced_bytes: int | None = None
        """Length of a body that has not been begun: it waits until the owner says `go_on`."""
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

    def reference(self, tensor: torch.Tensor, narrow: bool) -> TensorReference:
        """How to name a tensor to this peer; announces its block the first time.

        `narrow` lets a float32 tensor that must travel do so as bfloat16.
        """
        if not (tensor.is_contiguous() and tensor.is_cpu):
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

    def send(self, frame: bytes, body: Sequence[Part], *, wide: bool = False) -> None:
        """Queue one frame and send what fits now. The body's memory must stay untouched until it is answered.

        `wide` as its header says.
        """
        if wide:
            assert self.second is not None
            body, beside = deal(body)
            self.second.send(beside)
        for part in (memoryview(frame), *body):
            if length := len(part):
                self._outbox.append(part)
                self._queued_bytes += length
        self.flush()

    @property
    def sending(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._proofs or (self._outbox and self._side is None)) and not self.connecting

    @property
    def reading(self) -> bool:
        """Whether memory of this process is still being sent."""
        return bool(self._outbox and self.sending) or (self.second is not None and self.second.sending)

    @property
    def awaited(self) -> int:
        """What the endpoint is to watch the socket for."""
        wanted = 0 if self._pauses else READABLE
        return wanted | WRITABLE if self.sending else wanted

    def flush(self) -> None:
        """Send what fits; frames only to a peer that is proved. Raises PeerLost."""
        if self.connecting:
            return
        try:
            while self._proofs:
                del self._proofs[: self.socket.send(self._proofs)]
            while self._outbox and self._side is None:
                self._sent_bytes += self._send_once()
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerLost(f"the peer is gone: {error.strerror or error}") from error

    def _send_once(self) -> int:
        self._permit()
        first = self._outbox[0]
        if not self._descriptors or not isinstance(first, memoryview):
            return links.send_some(self.socket, self._outbox)
        position, block = self._descriptors[0]
        if position > self._sent_bytes:
            # A descriptor must ride on the first byte of its own frame: send only what comes before it.
            sent = self.socket.send(first)
        else:
            assert isinstance(self.socket, socket.socket)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [block.descriptor]))]
            sent = self.socket.sendmsg([first], ancillary)
            self._descriptors.popleft()
        codec.advance(self._outbox, sent)
        return sent

    @property
    def proved(self) -> bool:
        """Whether the peer has shown that it knows the job's key."""
        return self._side is None

    @property
    def half_proved(self) -> bool:
        """Whether a caller has begun to prove himself and has not done so."""
        return isinstance(self._side, AcceptingSide) and bool(self._inbox)

    def give_away(self) -> socket.socket | SecureLink:
        """The socket, for another connection; nothing is read from it here any more. Raises ProtocolError."""
        if self._inbox or self._outbox:
            raise ProtocolError("a peer offered a connection as a second stream on which more is said")
        self.closed = True
        return self.socket

    def hung_up(self) -> bool:
        """Whether the peer has closed its end, though something it sent before may still be unread."""
        if self._hang_up is None:
            self._hang_up = select.poll()
            self._hang_up.register(self.socket, 0)  # a hang-up is reported without being asked for
        return bool(self._hang_up.poll(0))

    # receiving

    def receive(self) -> None:
        """Take what has arrived, up to the end of a body at most, and deliver whole frames.

        Raises PeerLost, ProtocolError, AuthenticationError.
        """
        self._take()
        wakes = bool(self._body) or self._low_water_bytes > 1
        if wakes and not (self.shares_memory or self.closed) and isinstance(self.socket, socket.socket):
            self._low_water_bytes = links.wake_for(self.socket, sum(map(len, self._body)), self._low_water_bytes)

    def go_on(self) -> None:
        """The second stream has all that it was to receive, or has broken; or a body that had to wait may begin.

        Raises as `receive` does.
        """
        if self.second is not None and self.second.error is not None:
            raise PeerLost(f"the peer is gone: {self.second.error}")
        self._parse()
        if not self.closed:
            self.receive()

    @property
    def receiving(self) -> bool:
        """Whether a frame has come in part, and its body has been begun."""
        return self._header is not None and self._announced_bytes is None

    @property
    def _pauses(self) -> bool:
        """Whether nothing is to be read now."""
        if self._header is None:
            return False
        return self._announced_bytes is not None or self._body_is_beside

    @property
    def _body_is_beside(self) -> bool:
        """Whether all of a frame is here but what the second stream is receiving: no other frame may be begun."""
        return self._header is not None and not self._body and self.second is not None and self.second.receiving

    def _take(self) -> None:
        for count in itertools.count(1):
            if self._pauses:
                return
            more = False  # after the end of a body whatever follows is left to the next call
            try:
                if self._body:
                    arrived = links.receive_some(self.socket, self._body)
                else:
                    arrived = self._receive_chunk()
                    more = arrived == _CHUNK
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLost(f"the peer is gone: {error.strerror or error}") from error
            if arrived == 0:
                raise PeerLost("the peer is gone: it closed the connection")
            self._parse()
            if self.closed:
                return
            if isinstance(self.socket, SecureLink) and self.socket.pending:
                continue  # no epoll would tell of it
            if count >= _ROUNDS or not (more or self._body):
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
                    self.identity, self._side = self._side.challenge, None
                self.flush()
                continue
            if self._header is None and not self._parse_header():
                return
            if self._announced_bytes is not None and not self._begin_body(self._announced_bytes):
                return
            while self._body and self._inbox:
                first = self._body[0]
                space = first if isinstance(first, memoryview) else first.piece()
                arrived = self._inbox[: len(space)]
                space[: len(arrived)] = arrived
                del self._inbox[: len(arrived)]
                codec.advance(self._body, len(arrived))
            if self._body or self._body_is_beside:
                return
            header, self._header = self._header, None
            if isinstance(header, Attach):
                self._attach(header.block)
            elif header is not None:
                self._deliver(self, header)
                if self.closed:
                    return

    def _parse_header(self) -> bool:
        prefix_bytes = frames.PREFIX.size
        if len(self._inbox) < prefix_bytes:
            return False
        kind, header_bytes, body_bytes = frames.decode_prefix(self._inbox, self._body_limit)
        if len(self._inbox) < prefix_bytes + header_bytes:
            return False
        header = frames.decode_header(kind, self._inbox[prefix_bytes : prefix_bytes + header_bytes])
        del self._inbox[: prefix_bytes + header_bytes]
        self._header = header
        if kind is not Kind.ATTACH:
            self._announced_bytes = body_bytes
        elif body_bytes or not self.shares_memory:
            raise ProtocolError("a peer that does not share our memory offered a block")
        return True

    def _begin_body(self, body_bytes: int) -> bool:
        header = self._header
        assert header is not None
        parts = self._destinations(self, header, body_bytes)
        if parts is None:
            return False
        self._announced_bytes = None
        if isinstance(header, _WIDENED) and header.wide:
            if self.second is None:
                raise ProtocolError("a peer sends by a second stream, and there is none")
            parts, beside = deal(parts)
            self.second.receive(beside)
        if parts:
            self._body.extend(part for part in parts if len(part))
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

    def close(self) -> None:
        """Close the socket and descriptors that were never mapped."""
        self.closed = True
        if self.second is not None:
            self.second.close()
        self.socket.close()
        while self._arrived_descriptors:
            os.close(self._arrived_descriptors.popleft())
