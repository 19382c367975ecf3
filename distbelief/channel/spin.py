# SPDX-License-Identifier: Apache-2.0
"""Waiting again and again for what mostly comes at once.

A process that sleeps is woken 10 to 100 us later, the more on a virtual machine, with caches that others have used.
Whoever has a core of its own looks for a moment before it sleeps (spin, then park), as long as that has paid: each of
its last waits would have ended within the moment.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar, final

T = TypeVar("T")
SPIN_SECONDS = 0.0003
"""What is looked for at most: a few times what sleeping costs."""
SHORT_WAITS = 4
"""So many waits in a row must have been short."""


@final
class Spin:
    """What one process has learned about its waits; `own_core` says that no other one needs its core meanwhile."""

    def __init__(self, own_core: bool) -> None:
        self._own_core = own_core
        self._short_waits = 0

    def wait(self, look: Callable[[float], T], seconds: float) -> T:
        """What `look` finds, which is told how many seconds it may sleep and finds something false when it is late."""
        if not self._own_core or seconds <= 0.0:
            return look(seconds)
        began = time.perf_counter()
        if self._short_waits >= SHORT_WAITS:
            while time.perf_counter() - began < min(seconds, SPIN_SECONDS):
                if found := look(0.0):
                    return found
                os.sched_yield()
        found = look(seconds)
        self._short_waits = self._short_waits + 1 if time.perf_counter() - began < SPIN_SECONDS else 0
        return found
