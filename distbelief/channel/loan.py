# SPDX-License-Identifier: Apache-2.0
"""A role's own memory on its way to another host, sent as it is unless the role changes it first.

What has not left by then is put aside: copied to where it would have been copied without this, and sent from there.
"""

import socket
import threading
from collections.abc import Sequence
from typing import final

import torch

from distbelief.channel.frames import bytes_of
from distbelief.channel.secure import SecureLink


@final
class Loan:
    """Some bytes of a body: `own` is lent, `aside` is memory of the same length that nobody else uses meanwhile."""

    def __init__(self, own: memoryview, aside: memoryview) -> None:
        self._left, self._aside = own, aside
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
            self._left, self._aside = self._left[count:], self._aside[count:]

    def cut(self, start: int, stop: int) -> "Loan":
        """These bytes of it, before any have travelled; then it is the cuts that are sent."""
        part = Loan(self._left[start:stop], self._aside[start:stop])
        self._cuts.append(part)
        return part

    def end(self) -> None:
        """Put aside what has not left; the memory that was lent is not read any more."""
        for part in self._cuts:
            part.end()
        with self._lock:
            if not self._cuts:
                self._aside[:] = self._left
            self._left = self._aside


@final
class Lending:
    """What the role of this process has lent, and to whom."""

    def __init__(self) -> None:
        self._travelling: Sequence[torch.Tensor] = ()
        self._made: dict[int, tuple[torch.Tensor, Loan]] = {}
        """By which tensor (its id) of the call that is being answered: whose memory is sent instead."""
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
            self._made[id(out)] = own, Loan(bytes_of(own), bytes_of(out))
        else:
            out.copy_(own)

    def fill(self) -> None:
        """The call will be answered later: nothing is lent for it."""
        for _, loan in self._made.values():
            loan.end()
        self._made = {}

    def instead_of(self, out: torch.Tensor) -> Loan | None:
        """What is to be sent instead of a tensor of the call that is being answered."""
        return self._made[id(out)][1] if self._made and id(out) in self._made else None

    def grant(self, borrower: object) -> None:
        """It is sent to `borrower` from now on."""
        if self._made:
            self._loans = [loan for loan in self._loans if not loan[-1].over]
            self._loans += [(borrower, own, loan) for own, loan in self._made.values()]
            self._made = {}

    def end(self, own: torch.Tensor) -> None:
        """Before `own` is changed: put aside what of it has still to be sent."""
        if self._loans or self._made:
            for lent, loan in (*self._made.values(), *((lent, loan) for _, lent, loan in self._loans)):
                if lent is own:
                    loan.end()
            self._loans = [loan for loan in self._loans if loan[1] is not own]

    def forget(self, borrower: object) -> None:
        """Nothing is sent to `borrower` any more."""
        if self._loans:
            self._loans = [loan for loan in self._loans if loan[0] is not borrower]
