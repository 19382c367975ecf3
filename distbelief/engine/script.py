# SPDX-License-Identifier: Apache-2.0
"""Deaths and silences by script, for engines whose roles are processes: which signal is due to whom."""

import signal
from collections.abc import Collection
from typing import final

from distbelief.engine.base import Faults


@final
class Script:
    """What is left of a script of faults; its clock begins with the first role."""

    def __init__(self, faults: Faults) -> None:
        self._started: float | None = None
        self._left = sorted(
            [(seconds, role, signal.SIGKILL) for seconds, role in faults.kill]
            + [(start, role, signal.SIGSTOP) for start, _, role in faults.hang]
            + [(until, role, signal.SIGCONT) for _, until, role in faults.hang]
        )

    def begin(self, now: float) -> None:
        """The first role is started at this time; later ones change nothing."""
        self._started = now if self._started is None else self._started

    def due(self, now: float, living: Collection[str]) -> list[tuple[str, int]]:
        """(role, signal) for everything whose time has come, in order; a role that does not live yet is waited for."""
        found: list[tuple[str, int]] = []
        while self._started is not None and self._left:
            seconds, role, number = self._left[0]
            if now - self._started < seconds or role not in living:
                break
            found.append((role, number))
            del self._left[0]
        return found
