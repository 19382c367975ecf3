# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a tensor look in the body of a frame: as in memory, or float32 as bfloat16 (half the bytes).

Narrowing rounds to nearest, ties to even: the relative error of a normal number is at most 2^-8, zeros, infinities and
NaN stay what they are, and what lies beyond the largest bfloat16 becomes infinite. Widening is exact. Both are done a
piece at a time that stays in the processor's cache, while the kernel carries the piece before it. So is what a method
fills: its first numbers travel while it works on the next.
"""

from typing import Any, final

import torch

from distbelief.channel import frames
from distbelief.channel.filling import Filling
from distbelief.channel.frames import TensorReference

PIECE = 1 << 18
"""Numbers that are converted at a time."""


@final
class Narrowed:
    """The memory of a contiguous float32 tensor as it travels in bfloat16; `incoming` when the bytes are received.

    One that is sent may still be `filling`.
    """

    def __init__(self, tensor: torch.Tensor, *, incoming: bool, filling: Filling[Any] | None = None) -> None:
        self._left, self._incoming, self._filling = tensor.view(-1), incoming, filling
        self._length = tensor.numel()
        self._scratch = torch.empty(min(PIECE, tensor.numel()), dtype=torch.bfloat16)
        self._memory = frames.bytes_of(self._scratch)
        self._piece = memoryview(b"")
        self._left_bytes = 2 * tensor.numel()

    def __len__(self) -> int:
        """Bytes that have still to travel."""
        return self._left_bytes

    def piece(self) -> memoryview:
        """The next bytes to send, or where the next bytes are to be received."""
        if not self._piece:
            count = min(len(self._scratch), len(self._left))
            if not self._incoming:
                if self._filling is not None:
                    self._filling.fill(self._length - len(self._left) + count)
                self._scratch[:count].copy_(self._left[:count])
                self._left = self._left[count:]
            self._piece = self._memory[: 2 * count]
        return self._piece

    def advance(self, count: int) -> None:
        """So many bytes of the piece have travelled."""
        self._piece = self._piece[count:]
        self._left_bytes -= count
        if self._incoming and not self._piece:
            numbers = self._scratch[: len(self._left)]
            self._left[: len(numbers)].copy_(numbers)
            self._left = self._left[len(numbers) :]

    @property
    def grows(self) -> bool:
        """Whether it is still being filled."""
        return self._filling is not None and not self._filling.over


@final
class Filled:
    """The memory of a contiguous tensor that is sent while it is being filled."""

    def __init__(self, tensor: torch.Tensor, filling: Filling[Any]) -> None:
        self._filling, self._number_bytes = filling, tensor.element_size()
        self._memory = frames.bytes_of(tensor)
        self._sent_bytes = 0

    def __len__(self) -> int:
        """Bytes that have still to travel."""
        return len(self._memory) - self._sent_bytes

    def piece(self) -> memoryview:
        """The next bytes to send."""
        self._filling.fill(self._sent_bytes // self._number_bytes + 1)
        return self._memory[self._sent_bytes : self._filling.filled * self._number_bytes]

    def advance(self, count: int) -> None:
        """So many bytes of the piece have travelled."""
        self._sent_bytes += count

    @property
    def grows(self) -> bool:
        """Whether it is still being filled."""
        return not self._filling.over


Part = memoryview | Narrowed | Filled
"""Some bytes of a body; all but plain memory are made a piece at a time."""


def outgoing(tensor: torch.Tensor, reference: TensorReference, filling: Filling[Any] | None = None) -> Part:
    """The tensor's part of a body that is sent, perhaps while it is filled."""
    if reference.wire:
        return Narrowed(tensor, incoming=False, filling=filling)
    return frames.bytes_of(tensor) if filling is None else Filled(tensor, filling)


def incoming(tensor: torch.Tensor, reference: TensorReference) -> Part:
    """The tensor's part of a body that is received."""
    return Narrowed(tensor, incoming=True) if reference.wire else frames.bytes_of(tensor)
