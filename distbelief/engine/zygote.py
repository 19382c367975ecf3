# SPDX-License-Identifier: Apache-2.0
"""The process from which the roles of one host are forked.

It imports torch and the user's script once, unpickles the job once (so roles share the data set's memory until they
write to it), and forks a role in milliseconds. It never computes: no thread exists here when it forks. Its roles get a
SIGKILL from the kernel when it dies, and it ends when the coordinator's end of the control socket closes, however that
happened; so nothing outlives the coordinator.

Messages on the control socket are pickles between a parent and the child it started: (tag, ...) with a length prefix,
descriptors attached. Only these, and the job on its way to the hosts of a cluster, are pickled.
"""

import array
import atexit
import contextlib
import gc
import mmap
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, final

from distbelief.engine.forks import (
    begin_role,
    die_with_parent,
    end_group,
    flush,
    heed_no_terminations,
    name_process,
    open_files_anew,
)
from distbelief.engine.pickles import Unpickler, places
from distbelief.engine.trial import OwnerGone, refuse_cuda, refuse_threads, try_apart
from distbelief.errors import ChannelError, ConfigurationError, DistbeliefError, UserCodeError

LENGTH = struct.Struct("<Q")
LOST = b"\0"
"""Begins a role's last words when they are no traceback but the reason of a death."""
OVER = b"\1"
"""The last word of a role whose work is over."""
FORK_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 0.0)
"""After each try to fork a role that failed for lack of processes or descriptors, in seconds."""


def send(control: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message, blocking."""
    text = pickle.dumps(message)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    control.sendmsg([LENGTH.pack(len(text))], rights)
    control.sendall(text)


def receive(control: socket.socket) -> tuple[Any, list[int]]:
    """Receive one message, blocking. Raises EOFError when the other side is gone."""
    head, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, 4)
    while len(head) < LENGTH.size:
        more = control.recv(LENGTH.size - len(head)) if head else b""
        if not more:
            raise EOFError
        head += more
    text = bytearray(LENGTH.unpack(head)[0])
    view = memoryview(text)
    while len(view):
        count = control.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return pickle.loads(text), descriptors


def run_role(build: Callable[[], Callable[[], None]], report: int) -> None:
    """Run one role in a fresh fork; a traceback goes to the descriptor `report`. Does not return."""
    code = 0
    try:
        open_files_anew()
        build()()
        os.write(report, OVER)
    except ChannelError as error:
        # Not the user's doing: somebody this role needs is gone. It counts as a death and the role is replaced.
        code = 1
        with contextlib.suppress(OSError):
            os.write(report, LOST + _encoded(f"{type(error).__name__}: {error}")[:1000])
    except BaseException as error:
        code = 1
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            os.write(report, _encoded(text)[-60_000:])
    finally:  # a fork that went on would be a second zygote, which ends the roles of the first
        flush()
        os._exit(code)


def _encoded(text: str) -> bytes:
    """As UTF-8, though a name of a file in it may be no text."""
    return text.encode(errors="backslashreplace")


class Zygote:
    """Forks roles on request and reports how they ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, tuple[str, int, int, int]] = {}
        """pidfd -> (role, incarnation, pid, read end of its report pipe)."""
        self._shared: Any = None
        self._outbox = bytearray()
        """What the coordinator has not taken yet. It may be busy telling us something, so we never wait for it."""

    def serve(self) -> None:
        """Work until the coordinator is gone, then end every role."""
        try:
            while True:
                for key, events in self._selector.select():
                    if key.fileobj is not self._control:
                        self._bury(key.fd)
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._flush()
                    if events & selectors.EVENT_READ:
                        self._obey(*receive(self._control))
        except (EOFError, OSError):
            pass
        finally:
            for _, _, pid, _ in self._children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    end_group(pid)
                    os.waitpid(pid, 0)
            end_group(os.getpid())

    def _tell(self, *message: Any) -> None:
        text = pickle.dumps(message)
        self._outbox += LENGTH.pack(len(text)) + text
        self._flush()

    def _flush(self) -> None:
        try:
            del self._outbox[: self._control.send(self._outbox, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass  # later
        except OSError as error:
            raise EOFError from error  # the coordinator is gone, which is no reason to try again to fork
        self._selector.modify(self._control, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0))

    def _obey(self, message: tuple[Any, ...], descriptors: list[int]) -> None:
        tag = message[0]
        if tag == "load":
            self._load(message[1], message[2], descriptors)
        elif tag == "start":
            self._start(message[1], message[2], message[3], descriptors)
        elif tag == "signal":
            for role, _, pid, _ in self._children.values():
                if role == message[1]:
                    os.kill(pid, message[2])

    def _load(self, main: dict[str, Any], sizes: list[int], descriptors: list[int]) -> None:
        """Import the user's script, unpickle (prepare, arguments, attempt), keep what prepare returns for the forks."""
        # Only the end of the control socket tells that the coordinator is gone, and nobody looks at it meanwhile. The
        # thread that started us waits for the answer, so it cannot end before.
        die_with_parent(signal.SIGKILL)
        try:
            import multiprocessing.spawn

            multiprocessing.spawn.prepare(main)
            # A private mapping: roles share the pages, and a role that writes to its data set changes its own copy.
            arena = memoryview(mmap.mmap(descriptors[0], 0, access=mmap.ACCESS_COPY))
            payload, *buffers = (arena[start : start + size] for start, size in zip(places(sizes), sizes, strict=False))
            try:
                prepare, arguments, attempt = Unpickler.loads(payload, buffers)
            except AttributeError as error:
                raise ConfigurationError(
                    f"what the job is made of cannot be found by its name: {error}",
                    hint="define it above `if __name__`, where other processes find it when they import the file",
                ) from error
            except ImportError as error:
                raise ConfigurationError(
                    f"what the job is made of cannot be imported: {error}",
                    hint="keep the file that is trained, and what it imports, at the same path on every host, in a "
                    "shared folder, one image, or the working_dir of a Ray job; and install the same packages",
                ) from error
            self._shared, description = prepare(*arguments)
            refuse_cuda()
            refuse_threads()
            if attempt is not None:
                try_apart(lambda: attempt(self._shared), self._control)
            gc.collect()
            gc.freeze()
            answer: tuple[str, bytes, DistbeliefError | None] = ("loaded", pickle.dumps(description), None)
        except OwnerGone:
            raise EOFError from None
        except DistbeliefError as error:
            answer = ("loaded", b"", error)
        except BaseException as error:
            answer = ("loaded", b"", UserCodeError("".join(traceback.format_exception(error))))
        for descriptor in descriptors:
            os.close(descriptor)
        die_with_parent(0)
        send(self._control, answer)

    def _start(self, role: str, incarnation: int, payload: bytes, descriptors: list[int]) -> None:
        """Fork a role. Where the machine has no process or descriptor to spare, that may pass; else it is a death."""
        problem = ""
        for pause in FORK_PAUSES:
            try:
                self._fork(role, incarnation, payload, descriptors)
                break
            except OSError as error:
                problem = str(error)
                time.sleep(pause)
        else:
            self._tell("ended", role, incarnation, 1, f"{LOST.decode()}could not be started: {problem}")
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self, role: str, incarnation: int, payload: bytes, descriptors: list[int]) -> None:
        read_end, write_end = os.pipe()
        flush()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(read_end)
            os.close(write_end)
            raise
        if pid == 0:
            die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            begin_role()
            name_process(role)
            self._control.close()
            self._selector.close()
            for own in (read_end, *self._children, *(child[3] for child in self._children.values())):
                os.close(own)
            run_role(lambda: Unpickler.loads(payload, shared=self._shared)(descriptors), write_end)
        os.close(write_end)
        try:
            watch = os.pidfd_open(pid)
        except OSError:
            os.close(read_end)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._children[watch] = (role, incarnation, pid, read_end)
        self._selector.register(watch, selectors.EVENT_READ)
        self._tell("started", role, incarnation, pid)

    def _bury(self, watch: int) -> None:
        role, incarnation, pid, read_end = self._children.pop(watch)
        self._selector.unregister(watch)
        os.close(watch)
        end_group(pid)  # before the number may be another one's
        _, status = os.waitpid(pid, 0)
        os.set_blocking(read_end, False)
        try:
            said = os.read(read_end, 1 << 16)
        except BlockingIOError:
            said = b""
        os.close(read_end)
        code = os.waitstatus_to_exitcode(status)
        if code == 0 and said != OVER:
            said = LOST + b"something in it ended it, with exit code 0"
        self._tell("ended", role, incarnation, code, said.removeprefix(OVER).decode(errors="replace"))


def serve(control: socket.socket) -> None:
    """Be the zygote of the owner of `control`, in a process that has one thread."""
    import torch

    # A script may ask for torch.cuda.is_available() without spoiling CUDA for the forks: NVML needs no context.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # A fork copies no threads: nothing here may start any, so that roles can start their own.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who is started with it ignored cannot wait for a process
    heed_no_terminations()
    name_process("zygote")
    control.set_inheritable(False)
    Zygote(control).serve()


def main() -> None:
    """Entry point: the control socket's descriptor is the first argument."""
    serve(socket.socket(fileno=int(sys.argv[1])))
    atexit._run_exitfuncs()  # a script may have asked for it
    flush()
    os._exit(0)  # at once: the owner waits, and to take down an interpreter that has torch is a third of its whole life


@final
class Forked:
    """A zygote that was forked from this process before it had a thread or a socket of its own: it need not import."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.control.close()
            os.setsid()
            with contextlib.suppress(BaseException):
                serve(theirs)
            os._exit(0)
        theirs.close()
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """As subprocess.Popen.wait."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG if until is not None else 0)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("zygote", timeout or 0.0)
            else:
                time.sleep(0.002)
        return self.returncode

    def kill(self) -> None:
        """Kill -9, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
