# SPDX-License-Identifier: Apache-2.0
"""One zygote and the roles that it forks, as the process sees them that owns it: a coordinator, or a host's keeper."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from distbelief.channel.endpoint import Endpoint
from distbelief.engine import zygote
from distbelief.engine.base import Death
from distbelief.engine.forks import end_group
from distbelief.engine.zygote import Forked
from distbelief.errors import DistbeliefError, TrainingFailed

STOP_SECONDS = 10.0


def program(module: str) -> str:
    """Python's text of a process that runs the `main` of a module of this package, this copy of it if it is there."""
    # What is imported lives on: to look through it for garbage, then or later, takes as long as a fifth of the start.
    # With -P no file of the working folder is taken for a module of Python's, so the package is found where it is.
    here = str(Path(__file__).parents[2])
    return f"""
import gc, importlib.machinery, importlib.util, sys
gc.disable()
sys.path.append({here!r})
if found := importlib.machinery.PathFinder.find_spec("distbelief", [{here!r}]):
    sys.modules["distbelief"] = package = importlib.util.module_from_spec(found)
    found.loader.exec_module(package)
from {module} import main
gc.freeze()
gc.enable()
main()
"""


@dataclass(frozen=True)
class Loaded:
    """What came of loading the job: a description of it, pickled, or why it could not be loaded."""

    description: bytes
    failure: DistbeliefError | None


@final
class Nursery:
    """Starts, signals and buries roles; never waits for the zygote. `endpoint` hears of it when it is polled.

    `changed` is called whenever a role was started or has ended. `first` is a zygote that is there already.
    """

    def __init__(
        self, endpoint: Endpoint, changed: Callable[[], None] = lambda: None, first: Forked | None = None
    ) -> None:
        self._endpoint, self._changed, self._first = endpoint, changed, first
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._control: socket.socket | None = None
        self._main: dict[str, Any] = {}
        self._sizes: list[int] = []
        self._arena: int | None = None
        self._queue: list[tuple[Any, tuple[int, ...]]] = []
        """What the zygote is told when it has loaded the job: it does not listen before."""
        self.loaded: Loaded | None = None
        """The outcome of the latest loading, once it is known."""
        self.alive: dict[str, int] = {}
        """Role -> incarnation."""
        self._stopped: set[tuple[str, int]] = set()
        self._deaths: list[Death] = []
        self.processes: dict[str, int] = {}
        """Process id of each live role, and of the zygote."""

    def load(self, main: dict[str, Any], sizes: list[int], arena: int) -> None:
        """Begin to load a job; `arena` is the descriptor of its memory, which is ours from now on.

        `main` says which script to import, `sizes` how the arena is divided, see `pickles.pack`.
        """
        if self._arena is not None:
            os.close(self._arena)
        self._main, self._sizes, self._arena = main, sizes, arena
        self._boot()

    def _boot(self) -> None:
        assert self._arena is not None
        self.close_zygote()
        first, self._first = self._first, None
        if first is not None:
            self._process, ours = first, first.control
        else:
            ours, theirs = socket.socketpair()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program("distbelief.engine.zygote"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=environment,
            )  # fmt: skip
            theirs.close()
        self._control, self.loaded, self._queue = ours, None, []
        self.processes["zygote"] = self._process.pid
        self._endpoint.watch(ours, self._hear)
        zygote.send(ours, ("load", self._main, self._sizes), (self._arena,))

    def start(self, name: str, incarnation: int, payload: bytes, descriptors: tuple[int, ...]) -> None:
        """Fork a role; `payload` is its pickled birth. The descriptors stay open until the role is forked or lost."""
        if self._control is None:
            self._boot()
        self.alive[name] = incarnation
        self._tell(("start", name, incarnation, payload), descriptors)

    def stop(self, name: str) -> None:
        """Kill a role; not a death."""
        if name in self.alive:
            self._stopped.add((name, self.alive.pop(name)))
            self.processes.pop(name, None)
            self.signal(name, signal.SIGKILL)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a role."""
        self._tell(("signal", name, number), ())

    def deaths(self) -> list[Death]:
        """The roles that ended by themselves since last asked."""
        deaths, self._deaths = self._deaths, []
        return deaths

    def _tell(self, message: Any, descriptors: tuple[int, ...]) -> None:
        if self.loaded is None:
            self._queue.append((message, descriptors))
        elif self._control is not None:
            with contextlib.suppress(OSError):
                zygote.send(self._control, message, descriptors)

    def _hear(self) -> None:
        assert self._control is not None
        try:
            message, _ = zygote.receive(self._control)
        except (EOFError, OSError):
            self._lose_zygote()
            return
        match message:
            case ("loaded", description, failure):
                self.loaded = Loaded(description, failure)
                queue, self._queue = self._queue, []
                if failure is not None:  # an earlier zygote may have loaded it
                    self._lose_roles("the job could not be loaded again", str(failure))
                    queue = []
                for told, descriptors in queue:
                    self._tell(told, descriptors)
            case ("started", role, incarnation, pid):
                if self.alive.get(role) == incarnation:
                    self.processes[role] = pid
            case ("ended", role, incarnation, code, failure):
                self._bury(role, incarnation, code, failure)
        self._changed()

    def _bury(self, role: str, incarnation: int, code: int, failure: str) -> None:
        if (role, incarnation) in self._stopped:
            self._stopped.discard((role, incarnation))
            return
        if self.alive.get(role) == incarnation:
            del self.alive[role]
            self.processes.pop(role, None)
        if code == 0 and not failure:
            return
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if failure.startswith(zygote.LOST.decode()):
            reason, failure = failure[len(zygote.LOST) :], ""
        self._deaths.append(Death(role, incarnation, reason, failure or None))

    def _lose_zygote(self) -> None:
        assert self._process is not None
        self.close_zygote()
        if self.loaded is None:
            code = self._process.returncode
            self.loaded = Loaded(
                b"", TrainingFailed(f"the process that starts roles ended while it loaded the job (exit code {code})")
            )
        self._lose_roles("the process that starts roles was killed")
        self._changed()

    def _lose_roles(self, reason: str, failure: str | None = None) -> None:
        self._deaths += [Death(role, incarnation, reason, failure) for role, incarnation in self.alive.items()]
        self.alive.clear()

    def close_zygote(self, seconds: float = 0.0) -> None:
        """End the zygote and with it every role; it has so long to do it in order."""
        if self._control is not None:
            self._endpoint.unwatch(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for number in self.processes.values():  # if it was killed, the kernel has ended the roles, and nothing else
            end_group(number)
        self.processes.clear()

    def close(self) -> None:
        """End everything and give back the job's memory."""
        if self._first is not None:
            self._first.control.close()
            self._process, self._first = self._first, None
        self.close_zygote(STOP_SECONDS)
        if self._arena is not None:
            os.close(self._arena)
            self._arena = None
