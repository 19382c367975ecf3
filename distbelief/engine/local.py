# SPDX-License-Identifier: Apache-2.0
"""The embedded engine: every role is a process of this machine, forked from one zygote.

The coordinator lives in the user's process and polls; a role's process polls whenever the role waits. Listening
sockets are made here and handed to roles, so an address outlives the process that answers at it: a call to a role that
is being replaced waits in the socket's backlog. Unix sockets use the abstract namespace, TCP the loopback address;
neither leaves a file.
"""

import contextlib
import functools
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import current_process, spawn
from typing import Any, Literal, TypeVar

import torch

from distbelief.channel import memory
from distbelief.channel.authenticate import new_key
from distbelief.channel.base import Future, Promise, Remote, exported_methods
from distbelief.channel.endpoint import Address, Endpoint
from distbelief.channel.futures import BackgroundWork, Kept
from distbelief.channel.peer import Peer
from distbelief.engine import zygote
from distbelief.engine.base import COORDINATOR, Death, Faults
from distbelief.engine.pickles import Pickler
from distbelief.errors import ConfigurationError, DistbeliefError, TrainingFailed

R = TypeVar("R")
T = TypeVar("T")

Transport = Literal["shared_memory", "tcp"]
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Wiring:
    """What every process of one job knows."""

    key: bytes
    addresses: dict[str, Address]
    body_limit: int
    faults: Faults


class LocalHome:
    """A role's process, as the role sees it."""

    def __init__(self, name: str, incarnation: int, wiring: Wiring, endpoint: Endpoint) -> None:
        self.name, self.incarnation = name, incarnation
        self._wiring, self._endpoint = wiring, endpoint
        self._slowness = wiring.faults.slow.get(name, 1.0)
        self._second: ThreadPoolExecutor | None = None
        """Does background work; begun when there is any."""

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait and answer calls meanwhile."""
        until = time.monotonic() + seconds
        self._endpoint.take_in(max(0.0, seconds))
        while (left := until - time.monotonic()) > 0:
            self._endpoint.take_in(left)

    def find(self, role: str, kind: type[R], deadline_seconds: float = 60.0) -> Remote[R]:
        """A reference to another role."""
        return Peer(self._endpoint, self._wiring.addresses[role], deadline_seconds)

    def spend(self, examples: int, started: float) -> None:
        """Real computing has taken its time already; a role slowed by script waits."""
        if self._slowness > 1.0:
            self.sleep((self._slowness - 1.0) * (time.monotonic() - started))

    def background(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the role's second thread: one work after another, in the order given."""
        if self._second is None:
            self._second = ThreadPoolExecutor(1, "distbelief-background", lambda: torch.set_num_threads(1))
        return BackgroundWork(work, self._endpoint, self._second.submit)

    def promise(self) -> Promise[Any]:
        """A future that this role completes itself."""
        return Kept(self._endpoint)

    def allocate(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that other processes can map."""
        return memory.allocate(length, dtype)


def _birth(
    name: str, incarnation: int, wiring: Wiring, factory: Callable[..., Any], arguments: tuple[Any, ...],
    descriptors: list[int],
) -> Callable[[], None]:  # fmt: skip
    """What a fork does first: build the role on the listener it was given, and return the role's life."""
    listener = socket.socket(fileno=descriptors[0]) if descriptors else None
    endpoint = Endpoint(wiring.key, listener=listener, body_limit=wiring.body_limit)
    role = factory(LocalHome(name, incarnation, wiring, endpoint), *arguments)
    endpoint.answer_with(role)
    over_tcp = not isinstance(wiring.addresses[COORDINATOR], str)
    if over_tcp and not exported_methods(type(role)):
        endpoint.background()

    def serve() -> None:
        while True:
            endpoint.poll(60.0)

    life: Callable[[], None] = getattr(role, "run", serve)
    return life


class LocalEngine(LocalHome):
    """Starts, watches and ends the processes of one job.

    `listening` names the roles that answer calls. `body_limit` bounds the bytes of one frame.
    """

    def __init__(
        self,
        listening: Sequence[str],
        *,
        transport: Transport = "shared_memory",
        body_limit: int = 1 << 40,
        faults: Faults | None = None,
    ) -> None:
        self._listeners = {name: _listen(name, transport) for name in (COORDINATOR, *listening)}
        addresses = {name: _address(listener) for name, listener in self._listeners.items()}
        wiring = Wiring(new_key(), addresses, body_limit, faults or Faults())
        super().__init__(
            COORDINATOR, 0, wiring, Endpoint(wiring.key, listener=self._listeners[COORDINATOR], body_limit=body_limit)
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._load: tuple[Any, ...] = ()
        self._arena: list[int] = []
        self._alive: dict[str, int] = {}
        self._stopped: set[tuple[str, int]] = set()
        self._deaths: list[Death] = []
        self._started: float | None = None
        self._script = sorted(
            [(seconds, role, signal.SIGKILL) for seconds, role in wiring.faults.kill]
            + [(start, role, signal.SIGSTOP) for start, _, role in wiring.faults.hang]
            + [(until, role, signal.SIGCONT) for _, until, role in wiring.faults.hang]
        )
        self.processes: dict[str, int] = {}
        """Process id of each live role, and of the zygote."""

    def answer(self, role: object) -> None:
        """Let `role` answer calls to the coordinator."""
        self._endpoint.answer_with(role)

    def load(
        self, prepare: Callable[..., tuple[Any, T]], *arguments: Any, attempt: Callable[[Any], object] | None = None
    ) -> T:
        """Pickle the job into a new zygote and prepare it there."""
        if current_process().name == zygote.NAME:
            raise ConfigurationError(
                "other processes import the program, and importing it starts training again",
                hint='put what trains below `if __name__ == "__main__":`',
            )
        buffers: list[pickle.PickleBuffer] = []
        try:
            payload = Pickler.dumps((prepare, arguments, attempt), buffers=buffers)
        except Exception as error:
            raise ConfigurationError(
                f"the job cannot be handed to other processes: {error}",
                hint="define model, loss, metrics and step at the top level of a file (no lambda, no inner function), "
                "and give data as a function that builds the data set",
            ) from error
        self._arena = [_arena(buffers)] if buffers else []
        main = spawn.get_preparation_data(zygote.NAME)
        del main["authkey"]  # multiprocessing's own, which it refuses to pickle; our roles do not use it
        script = main.get("init_main_from_path")
        if script is not None and not os.path.isfile(script):
            raise ConfigurationError(
                f"the program is not in a file ({script}), so other processes cannot import it",
                hint="save it in a file and run that",
            )
        self._load = ("load", main, payload, [buffer.raw().nbytes for buffer in buffers])
        description, failure = self._boot()
        if failure is not None:
            self.close()
            raise failure
        result: T = pickle.loads(description)
        return result

    def _boot(self) -> tuple[bytes, DistbeliefError | None]:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from distbelief.engine.zygote import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, env=environment,
        )  # fmt: skip
        theirs.close()
        self._control = ours
        self.processes["zygote"] = self._process.pid
        self._endpoint.watch(ours, self._hear_zygote)
        zygote.send(ours, self._load, tuple(self._arena))
        try:
            (_, description, failure), _ = zygote.receive(ours)
        except (EOFError, OSError) as error:
            raise TrainingFailed(
                f"the process that starts roles ended while it loaded the job (exit code {self._process.wait()})"
            ) from error
        return description, failure

    def start(self, name: str, incarnation: int, factory: Callable[..., Any], *arguments: Any) -> None:
        """Fork a process for the role."""
        if self._control is None:
            _, failure = self._boot()
            if failure is not None:
                raise failure
        assert self._control is not None
        birth = functools.partial(_birth, name, incarnation, self._wiring, factory, arguments)
        listener = self._listeners.get(name)
        self._started = time.monotonic() if self._started is None else self._started
        self._alive[name] = incarnation
        with contextlib.suppress(OSError):
            zygote.send(
                self._control,
                ("start", name, incarnation, Pickler.dumps(birth)),
                (listener.fileno(),) if listener is not None else (),
            )

    def stop(self, name: str) -> None:
        """Kill the role's process; not a death."""
        if name in self._alive and self._control is not None:
            self._stopped.add((name, self._alive.pop(name)))
            self.processes.pop(name, None)
            with contextlib.suppress(OSError):
                zygote.send(self._control, ("kill", name))

    def deaths(self) -> list[Death]:
        """Roles that ended since last asked; also where scripted kills happen."""
        elapsed = 0.0 if self._started is None else time.monotonic() - self._started
        while self._script and elapsed >= self._script[0][0] and self._script[0][1] in self.processes:
            _, role, number = self._script.pop(0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[role], number)
        deaths, self._deaths = self._deaths, []
        return deaths

    def _hear_zygote(self) -> None:
        assert self._control is not None
        try:
            message, _ = zygote.receive(self._control)
        except (EOFError, OSError):
            self._lose_zygote()
            return
        if message[0] == "started":
            _, role, incarnation, pid = message
            if self._alive.get(role) == incarnation:
                self.processes[role] = pid
        elif message[0] == "ended":
            _, role, incarnation, code, failure = message
            self._bury(role, incarnation, code, failure)

    def _bury(self, role: str, incarnation: int, code: int, failure: str) -> None:
        if (role, incarnation) in self._stopped:
            self._stopped.discard((role, incarnation))
            return
        if self._alive.get(role) == incarnation:
            del self._alive[role]
            self.processes.pop(role, None)
        if code == 0:
            return
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if failure.startswith(zygote.LOST.decode()):
            reason, failure = failure[len(zygote.LOST) :], ""
        self._deaths.append(Death(role, incarnation, reason, failure or None))

    def _lose_zygote(self) -> None:
        assert self._control is not None
        assert self._process is not None
        self._endpoint.unwatch(self._control)
        self._control.close()
        self._control = None
        self._process.kill()
        self._process.wait()
        self.processes.clear()
        for role, incarnation in self._alive.items():
            self._deaths.append(Death(role, incarnation, "the process that starts roles was killed"))
        self._alive.clear()

    def close(self) -> None:
        """End every process and close every socket."""
        if self._control is not None:
            self._endpoint.unwatch(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self.processes.clear()
        if self._second is not None:
            self._second.shutdown(wait=False, cancel_futures=True)
            self._second = None
        self._endpoint.close()
        for listener in self._listeners.values():
            listener.close()
        for descriptor in self._arena:
            os.close(descriptor)
        self._arena = []


def _listen(role: str, transport: Transport) -> socket.socket:
    if transport == "tcp":
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", 0))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0distbelief-{secrets.token_hex(8)}-{role}")
    listener.listen(1024)
    return listener


def _address(listener: socket.socket) -> Address:
    name = listener.getsockname()
    return name.decode() if isinstance(name, bytes) else tuple(name)


def _arena(buffers: list[pickle.PickleBuffer]) -> int:
    """All buffers one after another, 64-byte aligned, in anonymous memory; returns its descriptor."""
    descriptor = os.memfd_create("distbelief-job")
    offset = 0
    for buffer in buffers:
        view = buffer.raw()
        written = 0
        while written < view.nbytes:
            written += os.pwrite(descriptor, view[written : written + (1 << 30)], offset + written)
        offset += (view.nbytes + 63) & ~63
    os.ftruncate(descriptor, max(offset, 64))
    return descriptor
