# SPDX-License-Identifier: Apache-2.0
"""Keepers as plain processes, for tests: several hosts of different names on this machine, or one in each namespace."""

import contextlib
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distbelief.engine import keeper
from distbelief.engine.host import Invitation
from distbelief.engine.listener import LOOPBACK

Spawn = Callable[..., "subprocess.Popen[Any]"]
"""(number of a host, then as subprocess.Popen) -> a process of that host."""


def here(number: int, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """A process of this machine."""
    return subprocess.Popen(arguments, **options)


class Subprocesses:
    """So many hosts; the roles go to one after another by the number at the end of their names."""

    def __init__(
        self, hosts: int = 2, *, addresses: Sequence[str] = (), own: str = LOOPBACK, spawn: Spawn = here
    ) -> None:
        self.host, self.address = "driver", own
        self.names = [f"host{number}" for number in range(hosts)]
        self._addresses = addresses or [LOOPBACK] * hosts
        self._spawn = spawn
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, invitation: Invitation) -> Sequence[str]:
        for number, (name, address) in enumerate(zip(self.names, self._addresses, strict=True)):
            process = keeper.begin(name, address, invitation, partial(self._spawn, number))
            self.processes[name] = process
        return self.names

    def preparing(self) -> Sequence[str]:
        """None: a process is there at once."""
        return ()

    def complaints(self) -> dict[str, str]:
        return {
            name: f"its keeper ended with exit code {process.poll()}"
            for name, process in self.processes.items() if process.poll() is not None
        }  # fmt: skip

    def choose(self, role: str, hosts: Sequence[str]) -> str:
        number = role.rpartition("/")[2]
        return hosts[int(number) % len(hosts) if number.isdigit() else 0]

    def devices(self, role: str) -> None:
        """All there are."""

    def end(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            process.kill()
            process.wait()
        self.processes.clear()


def wait_for(engine: Any, condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Let the engine work until the condition holds."""
    limit = engine.now() + seconds
    while not condition():
        assert engine.now() < limit, "it did not happen"
        engine.sleep(0.01)
