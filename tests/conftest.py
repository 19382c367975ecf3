# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: no test leaves a process, a descriptor, a thread or shared memory behind; and a small town of
endpoints.

Every process that a test starts, and every process that those start, inherits a mark in its environment; so what
outlives a test is found even when its parent is gone, and what other people run on this machine is not counted.
"""

import contextlib
import gc
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distbelief.channel.base import Future
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Address

TOKEN = secrets.token_hex(8)
MARK = f"DISTBELIEF_TESTS={TOKEN}"
PATIENCE_SECONDS = 3.0
"""Ending takes a moment: a killed process until it is reaped, a thread until it has returned."""

RAY = "ray" in sys.modules

Settle = Callable[[], object]


def pytest_configure() -> None:
    """Mark this session. Not on import: roles import test modules, and this one with them."""
    os.environ["DISTBELIEF_TESTS"] = TOKEN
    torch.set_num_threads(1)  # in tiny operations more only wait for each other, and longer beside other tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs in the background ignore it


def marked_processes() -> list[str]:
    """The processes, other than this one, that descend from this session: "pid command"."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(f"{folder.name} {(folder / 'comm').read_text().strip()}")
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
    return found


def children() -> list[str]:
    """The children of this process, those included that ended and were not waited for: "pid command"."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread or the child ended meanwhile
            for pid in (task / "children").read_text().split():
                found.append(f"{pid} {Path('/proc', pid, 'comm').read_text().strip()}")
    return found


def children_of(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children_of(child)]
    return found


def descriptors() -> list[str]:
    """What this process has open, apart from devices, the kernel's own files and installed packages' (fonts).

    Nothing where the tests run on a Ray of this very process, which keeps what it has opened.
    """
    if RAY:
        return []
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor that lists the folder
        if not target.startswith(("/dev/", "/proc", "/sys/")) and "/site-packages/" not in target:
            found.append(target)
    return found


def socket_names() -> list[str]:
    """The abstract Unix sockets named after the product that this process holds."""
    own = {target[len("socket:[") : -1] for target in descriptors() if target.startswith("socket:[")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [line[7] for line in lines if len(line) > 7 and "distbelief" in line[7] and line[6] in own]


def shared_memory() -> list[str]:
    """Files in /dev/shm, unless a process that is not of this session has them mapped."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return [f"/dev/shm/{name}" for name in names]


def of_others(path: str) -> bool:
    """Whether a process that does not descend from this session maps the file."""
    ours = {line.split()[0] for line in marked_processes()} | {str(os.getpid())}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name not in ours:
            try:
                if path in (folder / "maps").read_text():
                    return True
            except OSError:
                continue
    return False


def threads() -> list[str]:
    """The product's threads in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("distbelief-")]


def traces() -> Counter[str]:
    """Everything that the product could leave behind, as it is now."""
    return Counter(
        [f"process {process}" for process in marked_processes()]
        + [f"child {process}" for process in children()]
        + [f"descriptor {target}" for target in descriptors()]
        + [f"socket {name}" for name in socket_names()]
        + [f"shared memory {path}" for path in shared_memory()]
        + [f"thread {name}" for name in threads()]
    )


def left_behind(before: Counter[str], settle: list[Settle], patience_seconds: float = PATIENCE_SECONDS) -> list[str]:
    """What is there now and was not before, after some patience."""
    until = time.monotonic() + patience_seconds
    while more := traces() - before:
        if time.monotonic() > until:
            return sorted(
                trace for trace in more
                if not trace.startswith("shared memory ") or not of_others(trace.removeprefix("shared memory "))
            )  # fmt: skip
        gc.collect()
        for action in settle:
            action()
        time.sleep(0.02)
    return []


@pytest.fixture
def settle() -> list[Settle]:
    """Actions to repeat while the leak check waits, such as polling an engine that outlives the test."""
    return []


@pytest.fixture
def leaks(settle: list[Settle]) -> Callable[[], list[str]]:
    """Asks what has been left behind since the test began, with little patience."""
    before = traces()
    return lambda: left_behind(before, settle, 0.3)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(settle: list[Settle]) -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor, a thread or shared memory behind."""
    before = traces()
    yield
    left = left_behind(before, settle)
    if left:
        pytest.fail("left behind: " + ", ".join(left), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_at_the_end() -> Iterator[None]:
    """Fail the session when an engine that tests shared leaves something behind."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # what CUDA opens for good
    before = traces()
    yield
    left = [trace for trace in left_behind(before, []) if not trace.startswith("descriptor /")]
    if left:
        pytest.fail("left behind by the whole session: " + ", ".join(left), pytrace=False)


WIDE_BYTES = 4 << 20


@pytest.fixture
def smaller_wide_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of WIDE_BYTES use a second stream already, so that tests need less memory."""
    monkeypatch.setattr("distbelief.channel.endpoint.WIDE_BYTES", WIDE_BYTES)


class Town:
    """Endpoints of this process that call each other; the test itself lets each of them work, so nothing is a race."""

    key = b"the job's key, which is secret.."

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.endpoints: list[Endpoint] = []

    def listen(self) -> socket.socket:
        """A listening socket of the town's transport."""
        if self.transport == "tcp":
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.bind(("127.0.0.1", 0))
        else:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0distbelief-test-{secrets.token_hex(8)}")
        listener.listen(1024)
        return listener

    def address(self, listener: socket.socket) -> Address:
        """Where to call it."""
        name = listener.getsockname()
        return name.decode() if isinstance(name, bytes) else name

    def endpoint(self, role: object = None, *listeners: socket.socket, **options: Any) -> Endpoint:
        """An endpoint with the town's key."""
        made = Endpoint(options.pop("key", self.key), role=role, listeners=listeners, **options)
        self.endpoints.append(made)
        return made

    def serve(self, role: object, **options: Any) -> Address:
        """An endpoint that answers for `role`; the answer is its address."""
        listener = self.listen()
        self.endpoint(role, listener, **options)
        return self.address(listener)

    def peer(self, address: Address, deadline_seconds: float = 20.0, **options: Any) -> Peer[Any]:
        """Somebody who calls the address, from an endpoint of his own."""
        return Peer(self.endpoint(**options), at(address), deadline_seconds)

    def work(self, rounds: int = 1) -> None:
        """Let everybody work off what has arrived."""
        for _ in range(rounds):
            for endpoint in self.endpoints:
                endpoint.poll(0.0)

    def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Let everybody work until the condition holds."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "it did not happen"
            self.work()

    def answer(self, future: Future[Any]) -> Any:
        """The answer to a call between endpoints of this town."""
        self.until(future.done, 30.0)
        return future.result()

    def staged(self) -> list[torch.Tensor]:
        """The staging buffers of the endpoint that was made first."""
        staging = self.endpoints[0].desk._staging
        given = [buffer for call in staging._held.values() for buffer in call.values()]
        return [buffer.tensor for buffer in (*given, *(idle for *_, idle in staging._idle))]

    def close(self) -> None:
        """Close every endpoint."""
        for endpoint in self.endpoints:
            endpoint.close()
        self.endpoints.clear()


@pytest.fixture(params=["shared_memory", "tcp"])
def town(request: pytest.FixtureRequest) -> Iterator[Town]:
    """A town per transport."""
    made = Town(request.param)
    yield made
    made.close()
