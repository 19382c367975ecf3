# SPDX-License-Identifier: Apache-2.0
"""Companions: processes in which the methods we compare with live, asked for one measurement at a time.

A baseline is a context manager that yields a function. A companion enters it in a fresh interpreter and calls that
function whenever it is asked, so a baseline that crashes or hangs costs its own row only. Whatever a companion
started ends with it.
"""

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch

from benchmarks.table import one_line

Answer = Callable[..., float]
Baseline = Callable[..., AbstractContextManager[Answer]]

START_SECONDS = 60.0
END_SECONDS = 15.0
PR_SET_PDEATHSIG = 1


class CompanionFailed(Exception):
    """A baseline raised, died or gave no answer; the message says which."""


class Companion:
    """One process that holds an entered baseline. Use it as a context manager, or call `close`.

    Between questions the process and what it forked are stopped (SIGSTOP), so that a method whose threads spin while
    they wait, as TensorPipe's do, takes no time from the others.
    """

    def __init__(
        self, baseline: Baseline, *, pauses: bool = True, entering: Sequence[str] = (), **arguments: int | str
    ) -> None:
        """Start the process; `arguments` go to `baseline`, a function at the top of an importable module.

        `pauses=False` is for a baseline that watches its own processes and would take a stopped one for dead.
        `entering` is a command that runs another one elsewhere, such as in a host.
        """
        ours, theirs = socket.socketpair()
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process and is closed with it
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        with theirs:
            self._process = subprocess.Popen(
                [
                    *entering,
                    sys.executable,
                    "-m",
                    __name__,
                    str(theirs.fileno()),
                    baseline.__module__,
                    baseline.__name__,
                    json.dumps(arguments),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._messages,
                stderr=self._messages,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._pauses = pauses
        self._ready = self._hung = False

    def __enter__(self) -> "Companion":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, *request: int | float | str, deadline_seconds: float = 60.0) -> float:
        """Call the function the baseline yielded with `request`.

        Raises CompanionFailed when it raised, when the process ended, or after `deadline_seconds`; the companion is of
        no further use then.
        """
        self.wait_until_ready()
        self._signal(signal.SIGCONT)
        try:
            self._connection.send(request)
        except OSError:
            raise CompanionFailed(self._last_words()) from None
        return self._receive(deadline_seconds)

    def wait_until_ready(self) -> None:
        """Wait for the baseline to be entered. Raises CompanionFailed like `ask`."""
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True

    def _signal(self, number: signal.Signals) -> None:
        if self._pauses:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _receive(self, deadline_seconds: float) -> float:
        try:
            if not self._connection.poll(deadline_seconds):
                self._hung = True
                raise CompanionFailed(f"no answer in {deadline_seconds:.0f} s")
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            raise CompanionFailed(self._last_words()) from None
        if kind == "failed":
            raise CompanionFailed(content)
        self._signal(signal.SIGSTOP)
        return float(content)

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return f"process ended with {self._process.poll()}" + (f": {lines[-1][:200]}" if lines else "")

    @property
    def returncode(self) -> int | None:
        """How the process ended; None while it lives."""
        return self._process.poll()

    def descendants(self) -> dict[int, str | None]:
        """The living processes that the companion started, directly or not: their ids and when they began."""
        return descendants(self._process.pid)

    def close(self) -> None:
        """Let the process end by itself, then end whatever of it and its descendants is left, and reap it."""
        if self._connection.closed:
            return
        descendants = self.descendants()
        self._connection.close()
        self._signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._hung else END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid, started in descendants.items():
            if alive(pid, started):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._messages.close()


@contextmanager
def forked(target: Callable[..., None], *arguments: object) -> Iterator["Connection[object, object]"]:
    """Fork a process that runs `target(*arguments, connection)`; yields the other end and ends the process at the end.

    For companions only, which fork before they have started a thread.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_forked, args=(ours, target, *arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(END_SECONDS)
        process.kill()
        process.join()
        ours.close()


def _run_forked(other_end: "Connection[object, object]", target: Callable[..., None], *arguments: object) -> None:
    other_end.close()
    _end_with_parent()
    target(*arguments)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _started(pid: int) -> str | None:
    """When the process began, in the kernel's ticks: tells it from another one that got the same number later."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    return None


def alive(pid: int, started: str | None) -> bool:
    """Whether the process of this number that began then is still there, and no mere entry of a dead one."""
    return _started(pid) == started is not None


def descendants(pid: int) -> dict[int, str | None]:
    """The living processes that a process started, directly or not: their ids and when they began."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        children = parents.get(pending.pop(), [])
        found += children
        pending += children
    return {child: _started(child) for child in found}


def keep_to_core(index: int) -> None:
    """Let this process run on one of its cores only."""
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[index]])


def timed(call: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls, after one that does not count: the first finds cold caches."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _companion(file_descriptor: str, module: str, name: str, arguments: str) -> None:
    _end_with_parent()
    torch.set_num_threads(1)
    # What a companion starts must not hold its line open.
    os.set_inheritable(int(file_descriptor), False)
    connection: Connection[tuple[str, object], tuple[object, ...]] = Connection(int(file_descriptor))
    baseline: Baseline = getattr(importlib.import_module(module), name)
    gc.freeze()  # or Python looks for garbage in all of torch before it ends
    try:
        with baseline(**json.loads(arguments)) as answer:
            connection.send(("ready", 0.0))
            while True:
                try:
                    request = connection.recv()
                except EOFError:
                    return
                try:
                    connection.send(("answer", answer(*request)))
                except Exception as error:
                    # Before leaving the baseline, which may take its time to end what failed.
                    connection.send(("failed", one_line(error)))
                    return
    except Exception as error:
        with suppress(OSError):
            connection.send(("failed", one_line(error)))


if __name__ == "__main__":
    _companion(*sys.argv[1:])
