# SPDX-License-Identifier: Apache-2.0
"""A role's own memory on its way to another host, sent as it is unless the role changes it first.

What has not left by then is put aside: copied to memory of its own, and sent from there.
"""

import mmap
import socket
import threading
from collections.abc import Sequence
from typing import final

import torch

from distbelief.channel.frames import bytes_of
from distbelief.channel.secure import SecureLink


@final
class Loan:
    """Some bytes of a body, which the role lends."""

    def __init__(self, own: memoryview) -> None:
        self._left = own
        self._cuts: list[Loan] = []
        self._lock = threading.Lock()
        """Held while the memory is read: a second stream sends in a thread of its own."""

    def __len__(self) -> int:
        """Bytes that have still to travel."""
        return len(self._left)

    @property
    def over(self) -> bool:
        """Whether all has been sent, in one piece or in several."""
        return all(part.over for part in self._cuts) if self._cuts else not self._left

    def piece(self) -> memoryview:
        """What has still to travel."""
        return self._left

    def send_by(self, link: socket.socket | SecureLink) -> int:
        """Send some bytes; how many. Raises OSError."""
        with self._lock:
            return link.send(self._left)

    def advance(self, count: int) -> None:
        """So many bytes have travelled."""
        with self._lock:
            self._left = self._left[count:]

    def cut(self, start: int, stop: int) -> "Loan":
        """These bytes of it, before any have travelled; then it is the cuts that are sent."""
        part = Loan(self._left[start:stop])
        self._cuts.append(part)
        return part

    def end(self) -> None:
        """Put aside what has not left; the memory that was lent is not read any more. Raises OSError."""
        parts = self._cuts or [self]
        room_bytes = sum(map(len, parts))  # a second stream may send some of it meanwhile
        if not room_bytes:
            return
        aside = memoryview(mmap.mmap(-1, room_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for part in parts:
            with part._lock:
                kept, aside = aside[: len(part._left)], aside[len(part._left) :]
                kept[:] = part._left
                part._left = kept


@final
class Lending:
    """What the role of this process has lent, and to whom."""

    def __init__(self) -> None:
        self._travelling: Sequence[torch.Tensor] = ()
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor, Loan]] = {}
        """By the id of a tensor of the call that is being answered: it, and whose memory is sent instead."""
        self._loans: list[tuple[object, torch.Tensor, Loan]] = []

    def allow(self, travelling: Sequence[torch.Tensor]) -> None:
        """Another call is answered: these of its tensors will be sent back as they are."""
        self._travelling, self._made = travelling, {}

    def close(self) -> None:
        """The method has returned: from now on `lend` copies."""
        self._travelling = ()

    def lend(self, out: torch.Tensor, own: torch.Tensor) -> None:
        """Fill `out` with `own`; where `out` would only be sent, that is sent instead. Both of one shape (n,)."""
        alike = (out.shape, out.dtype) == (own.shape, own.dtype) and own.is_contiguous()
        if alike and any(tensor is out for tensor in self._travelling):
            self._made[id(out)] = out, own, Loan(bytes_of(own))
        else:
            out.copy_(own)

    def fill(self) -> None:
        """The call will be answered later: nothing is lent for it."""
        for out, own, _ in self._made.values():
            out.copy_(own)
        self._made = {}

    def instead_of(self, out: torch.Tensor) -> Loan | None:
        """What is to be sent instead of a tensor of the call that is being answered."""
        return self._made[id(out)][-1] if self._made and id(out) in self._made else None

    def grant(self, borrower: object) -> None:
        """It is sent to `borrower` from now on."""
        if self._made:
            self._loans = [loan for loan in self._loans if not loan[-1].over]
            self._loans += [(borrower, own, loan) for _, own, loan in self._made.values()]
            self._made = {}

    def end(self, own: torch.Tensor) -> None:
        """Before `own` is changed: put aside what of it has still to be sent."""
        for out, lent, _ in list(self._made.values()):
            if lent is own:
                out.copy_(own)
                del self._made[id(out)]
        if self._loans:
            for _, lent, loan in self._loans:
                if lent is own:
                    loan.end()
            self._loans = [loan for loan in self._loans if loan[1] is not own]

    def forget(self, borrower: object) -> None:
        """Nothing is sent to `borrower` any more."""
        if self._loans:
            self._loans = [loan for loan in self._loans if loan[0] is not borrower]
