# SPDX-License-Identifier: Apache-2.0
"""Memory of this process for tensors that travel in bodies.

A buffer serves one call at a time, of whichever connection, and the next call takes the buffer that was used last. So
there are as many buffers as calls use at once, not as many as there are peers, and what a rush of calls needed is given
back after it. Large bodies are received one after another, as long as they come fast.
"""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

from distbelief.channel import frames
from distbelief.channel.connection import Connection
from distbelief.channel.frames import TensorReference
from distbelief.errors import ProtocolError

IDLE_SECONDS = 0.25
"""A buffer that was not needed for so long is given back."""
FAST_BYTES_PER_SECOND = 1e9
"""While a large body may be all there at this speed, no other one is begun. So the links of slow peers are used at the
same time, and what begins at all is no less than this."""
LARGE_BYTES = 1 << 20
"""Larger buffers are mapped by themselves. They begin with a page, into which the kernel copies up to twice as fast,
and they are given back to it, not to an allocator that would keep them."""

Key = tuple[int, int, str]
"""Place (as in `Signature.kinds`), length, dtype."""
_NOTHING = memoryview(b"")


@final
@dataclass(frozen=True, eq=False, slots=True)
class Buffer:
    """A tensor of a call, of shape (n,), and its memory, as far as that travels."""

    tensor: torch.Tensor
    memory: memoryview = _NOTHING


@final
class Staging:
    """The buffers of one process.

    `body_limit` bounds, in bytes, one tensor and all idle ones. `answering` tells whether calls of a connection are
    worked on, or their answers being sent.
    """

    def __init__(self, body_limit: int, answering: Callable[[Connection], bool]) -> None:
        self._body_limit, self._answering = body_limit, answering
        self._held: dict[Connection, dict[Key, Buffer]] = {}
        """What the latest call of a connection was given."""
        self._idle: list[tuple[float, Key, Buffer]] = []
        """(Since when, place and kind, buffer), the one used last is the last."""
        self._large: dict[Connection, float] = {}
        """Whose large body is being received, and until when others wait for it."""

    def must_wait(self, connection: Connection, body_bytes: int, others_wait: bool) -> bool:
        """Whether a body is not to be begun yet, since that of another connection is being received, or came first."""
        if body_bytes <= LARGE_BYTES:
            return False
        now = time.monotonic()
        self._large = {
            other: until
            for other, until in self._large.items()
            if other is not connection and other.receiving and until > now
        }
        return others_wait or bool(self._large)

    def begin(self, connection: Connection, body_bytes: int) -> None:
        """A call has come by `connection`, and so many bytes follow."""
        now = time.monotonic()
        if body_bytes > LARGE_BYTES:
            self._large[connection] = now + body_bytes / FAST_BYTES_PER_SECOND
        for other in list(self._held):
            if not (self._answering(other) or (other is not connection and other.receiving)):
                self.release(other)
        while self._idle and now - self._idle[0][0] >= IDLE_SECONDS:
            del self._idle[0]
        self._held[connection] = {}  # what an earlier call of it still uses ends with that

    def take(self, connection: Connection, place: int, reference: TensorReference) -> Buffer:
        """Memory for a tensor of the call that began last, the same for one read and one written at the same place.

        Raises ProtocolError when it is too large.
        """
        given, key = self._held[connection], (place, reference.length, reference.dtype)
        if (buffer := given.get(key)) is None:
            if frames.size_bytes(reference) > self._body_limit:
                raise ProtocolError(f"a peer announced a tensor out of bounds: {reference}")
            buffer = given[key] = self._free(key, reference)
        return buffer

    def _free(self, key: Key, reference: TensorReference) -> Buffer:
        for index in reversed(range(len(self._idle))):
            if self._idle[index][1] == key:
                return self._idle.pop(index)[-1]
        try:
            tensor = _buffer(frames.size_bytes(reference)).view(frames.DTYPES[reference.dtype])
        except (OSError, RuntimeError) as error:
            raise ProtocolError(f"no memory for a tensor that a peer announced: {reference}") from error
        return Buffer(tensor, frames.bytes_of(tensor))

    def release(self, connection: Connection) -> None:
        """What the latest call of a connection was given is not used any more, though it may still be answered."""
        now = time.monotonic()
        self._idle += [(now, *given) for given in self._held.pop(connection, {}).items()]
        while sum(len(buffer.memory) for *_, buffer in self._idle) > self._body_limit:
            del self._idle[0]

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self._held.pop(connection, None)
        self._large.pop(connection, None)


def _buffer(size_bytes: int) -> torch.Tensor:
    """New memory, uint8 of shape (size_bytes,). Raises OSError, RuntimeError."""
    if size_bytes <= LARGE_BYTES:
        return torch.empty(size_bytes, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=torch.uint8)
