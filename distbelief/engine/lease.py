# SPDX-License-Identifier: Apache-2.0
"""Until when the roles of a host may speak: a page of memory that the host's keeper writes and its roles read.

A host that has not heard the coordinator for a while counts as lost, and its roles are started elsewhere. Whatever
happened to it, a cut cable or a stopped process, its roles must not go on when it comes back: each looks at the page
before it sends anything or a further part of it, and ends there when the time is over. What the kernel had taken by
then may still arrive, as over a slow line; shards refuse it by its incarnation.
"""

import os
import signal
import time
from typing import final

from distbelief.channel.memory import Block

_BYTES = 4096
_UNTIL, _MOVES = 0, 1


@final
class Lease:
    """The page, in the keeper's process or in a role's."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._numbers = memoryview(block).cast("d")

    @classmethod
    def create(cls) -> "Lease":
        """A new page, on which the time is over."""
        return cls(Block.create(_BYTES))

    @classmethod
    def attach(cls, descriptor: int) -> "Lease":
        """The page behind a descriptor, which belongs to the lease from now on."""
        return cls(Block.attach(0, descriptor))

    @property
    def descriptor(self) -> int:
        """What other processes attach."""
        return self._block.descriptor

    def renew(self, until: float, moves: int) -> None:
        """The host may speak until this time of the monotonic clock; so many roles have changed their place so far."""
        self._numbers[_MOVES] = moves
        self._numbers[_UNTIL] = until

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._numbers[_UNTIL]

    @property
    def moves(self) -> int:
        """How many roles have changed their place, as far as is known on this host."""
        return int(self._numbers[_MOVES])

    def obey(self) -> None:
        """End this process, as kill -9 would, when the time is over."""
        if self.over:
            os.kill(os.getpid(), signal.SIGKILL)
