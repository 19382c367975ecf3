# SPDX-License-Identifier: Apache-2.0
"""Keepers as plain processes, for tests: several hosts of different names on this machine, or one in each namespace."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distbelief.engine.host import Host, Invitation
from distbelief.engine.listener import LOOPBACK

PROGRAM = "import keepers, sys; keepers.keep(sys.argv[1], sys.argv[2])"

Begin = Callable[[int, list[str]], "subprocess.Popen[bytes]"]
"""(number of a host, arguments of the interpreter) -> a process of that host, with a pipe as its standard input."""


def keep(host: str, address: str) -> None:
    """Be the keeper of a host; the invitation comes by standard input."""
    invitation: Invitation = pickle.loads(sys.stdin.buffer.read())
    Host(host, address, invitation).serve()


def here(number: int, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """A process of this machine, in a group of its own."""
    folders = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip


class Subprocesses:
    """So many hosts; the roles go to one after another by the number at the end of their names."""

    def __init__(
        self, hosts: int = 2, *, addresses: Sequence[str] = (), own: str = LOOPBACK, begin: Begin = here
    ) -> None:
        self.host, self.address = "driver", own
        self.names = [f"host{number}" for number in range(hosts)]
        self._addresses = addresses or [LOOPBACK] * hosts
        self._begin = begin
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, invitation: Invitation) -> Sequence[str]:
        for number, (name, address) in enumerate(zip(self.names, self._addresses, strict=True)):
            process = self._begin(number, ["-c", PROGRAM, name, address])
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(invitation))
            process.stdin.close()
            self.processes[name] = process
        return self.names

    def complaints(self) -> dict[str, str]:
        return {
            name: f"its keeper ended with exit code {process.poll()}"
            for name, process in self.processes.items() if process.poll() is not None
        }  # fmt: skip

    def choose(self, role: str, hosts: Sequence[str]) -> str:
        number = role.rpartition("/")[2]
        return hosts[int(number) % len(hosts) if number.isdigit() else 0]

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
