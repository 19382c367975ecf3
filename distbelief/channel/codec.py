# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a tensor look in the body of a frame: as in memory, or float32 as bfloat16 (half the bytes).

Narrowing rounds to nearest, ties to even: the relative error of a normal number is at most 2^-8, zeros, infinities and
NaN stay what they are, and what lies beyond the largest bfloat16 becomes infinite. Widening is exact. Both are done a
piece at a time that stays in the processor's cache, while the kernel carries the piece before it.
"""

import socket
from collections import deque
from typing import final

import torch

from distbelief.channel import frames
from distbelief.channel.frames import TensorReference
from distbelief.channel.loan import Loan
from distbelief.channel.secure import SecureLink

PIECE = 1 << 18
"""Numbers that are converted at a time."""
_NOTHING = torch.empty(0, dtype=torch.bfloat16)


@final
class Narrowed:
    """The memory of a contiguous float32 tensor as it travels in bfloat16; `incoming` when the bytes are received."""

    def __init__(self, tensor: torch.Tensor, *, incoming: bool) -> None:
        self._left, self._incoming = tensor.view(-1), incoming
        self._scratch = _NOTHING
        self._piece = memoryview(b"")
        self._left_bytes = 2 * tensor.numel()

    def __len__(self) -> int:
        """Bytes that have still to travel."""
        return self._left_bytes

    def piece(self) -> memoryview:
        """The next bytes to send, or where the next bytes are to be received."""
        if not self._piece:
            count = min(PIECE, len(self._left))
            if self._scratch is _NOTHING:
                self._scratch = torch.empty(count, dtype=torch.bfloat16)
            if not self._incoming:
                self._scratch[:count].copy_(self._left[:count])
                self._left = self._left[count:]
            self._piece = frames.bytes_of(self._scratch)[: 2 * count]
        return self._piece

    def send_by(self, link: socket.socket | SecureLink) -> int:
        """Send some bytes; how many. Raises OSError."""
        return link.send(self.piece())

    def advance(self, count: int) -> None:
        """So many bytes of the piece have travelled."""
        self._piece = self._piece[count:]
        self._left_bytes -= count
        if self._incoming and not self._piece:
            numbers = self._scratch[: len(self._left)]
            self._left[: len(numbers)].copy_(numbers)
            self._left = self._left[len(numbers) :]

    def cut(self, start: int, stop: int) -> "Narrowed":
        """These bytes of it, before any have travelled; both even."""
        return Narrowed(self._left[start // 2 : stop // 2], incoming=self._incoming)


Part = memoryview | Narrowed | Loan
"""Some bytes of a body."""


def outgoing(tensor: torch.Tensor, reference: TensorReference) -> Part:
    """The tensor's part of a body that is sent."""
    return Narrowed(tensor, incoming=False) if reference.wire else frames.bytes_of(tensor)


def incoming(tensor: torch.Tensor, reference: TensorReference) -> Part:
    """The tensor's part of a body that is received."""
    return Narrowed(tensor, incoming=True) if reference.wire else frames.bytes_of(tensor)


def cut(part: Part, start: int, stop: int) -> Part:
    """The bytes of a part from `start` to `stop`, both multiples of what a number takes as it travels."""
    return part[start:stop] if isinstance(part, memoryview) else part.cut(start, stop)


def advance(parts: deque[Part], count: int) -> None:
    """So many bytes of the first parts have travelled; those that are whole end."""
    while count:
        first = parts[0]
        length = len(first)
        if count < length and isinstance(first, memoryview):
            parts[0] = first[count:]
            return
        if not isinstance(first, memoryview):
            first.advance(min(count, length))
        if count < length:
            return
        parts.popleft()
        count -= length
