# SPDX-License-Identifier: Apache-2.0
"""A listener that kills a role of the local engine for real, at an event and not at a time: machines differ."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from distbelief.engine.local import LocalEngine
from distbelief.events import Event, Observation, Progress


class Killer:
    """Kill -9 of a role at the first event for which `when` holds while the role has a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, role: str, when: Callable[[Event], bool]) -> None:
        self.role, self.when, self.killed = role, when, 0
        """`killed` is the process id, once it was."""
        self._engines: list[LocalEngine] = []
        made = LocalEngine.__init__

        def note(engine: LocalEngine, *arguments: Any, **options: Any) -> None:
            made(engine, *arguments, **options)
            self._engines.append(engine)

        monkeypatch.setattr(LocalEngine, "__init__", note)

    def __call__(self, observation: Observation) -> None:
        if not self.killed and self.when(observation.event) and self.role in self._engines[0].processes:
            self.killed = self._engines[0].processes[self.role]
            os.kill(self.killed, signal.SIGKILL)


def settled(examples: int) -> Callable[[Event], bool]:
    """Whether so many examples are settled."""
    return lambda event: isinstance(event, Progress) and event.examples >= examples


def nth(kind: type[Event], number: int = 1) -> Callable[[Event], bool]:
    """Whether it is at least the event of this number of its kind, counted from 1."""
    heard = 0

    def reached(event: Event) -> bool:
        nonlocal heard
        heard += isinstance(event, kind)
        return heard >= number

    return reached
