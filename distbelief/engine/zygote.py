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
import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import pickle
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from distbelief.engine.pickles import Unpickler, places
from distbelief.errors import ChannelError, ConfigurationError, DistbeliefError, UserCodeError

LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1
LOST = b"\0"
"""Begins a role's last words when they are no traceback but the reason of a death."""
OVER = b"\1"
"""The last word of a role whose work is over."""


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


def die_with_parent(number: int) -> None:
    """Get this signal from the kernel when the thread that started this process ends; 0 for none."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def name_process(role: str) -> None:
    """Let `ps -o comm` and `top` name this process after what it is, of which they show 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"db:{role}")


def open_files_anew() -> None:
    """Give this fork a place of its own in each file that is open for reading.

    A fork shares it with its parent and with all others: of data sets that keep a file open, one would move the place
    at which another one reads. Files that are written stay shared, so that nobody writes over what others have written.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was that of the folder, or may not be opened any more
            descriptor = int(name)
            only_read = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) == 0
            if descriptor > 2 and only_read and stat.S_ISREG(os.fstat(descriptor).st_mode):
                place = os.lseek(descriptor, 0, os.SEEK_CUR)
                own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
                os.lseek(own, place, os.SEEK_SET)
                os.dup2(own, descriptor, inheritable=os.get_inheritable(descriptor))
                os.close(own)


def flush() -> None:
    """Write out what was printed, which forks would print again; there may be nothing to print to."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


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
            os.write(report, LOST + f"{type(error).__name__}: {error}".encode()[:1000])
    except BaseException as error:
        code = 1
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            os.write(report, text.encode()[-60_000:])
    flush()
    os._exit(code)


def _refuse_cuda() -> None:
    """Raise ConfigurationError when this process uses CUDA, which no fork of it could then use."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigurationError(
            "the script, or the function that builds the data or the model, has used CUDA before the job began",
            hint="build them on the CPU, replicas move what they need; torch.random.fork_rng() uses CUDA, too, without "
            "devices=[]",
        )


def _refuse_threads() -> None:
    """Raise ConfigurationError when a pool of threads has been started here: forks would wait for it, and have none."""
    gc.collect()  # a pool that nobody holds any more ends its threads
    until = time.monotonic() + 1.0
    for thread in (started := [each for each in threading.enumerate()[1:] if not each.daemon]):
        thread.join(max(0.0, until - time.monotonic()))
    if left := [thread.name for thread in started if thread.is_alive()]:
        raise ConfigurationError(
            f"the script, or a function that builds the data or the model, has started threads: {', '.join(left[:3])}",
            hint="start them when the data set is first asked in a process: roles are forked, and have no threads then",
        )


def try_apart(attempt: Callable[[], object]) -> None:
    """Do it in a fork that ends with it, and raise what it raised.

    A backward pass on a machine with accelerators starts threads, after which no fork could make another.
    """
    read_end, write_end = os.pipe()
    flush()
    pid = os.fork()
    if pid == 0:
        die_with_parent(signal.SIGKILL)
        error: DistbeliefError | None = None
        try:
            open_files_anew()
            attempt()
        except DistbeliefError as raised:
            error = raised
        except BaseException as raised:
            error = UserCodeError("".join(traceback.format_exception(raised)))
        with os.fdopen(write_end, "wb") as told:
            told.write(pickle.dumps(error))
        flush()
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as heard:
        text = heard.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        ended = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise UserCodeError(f"the process that tried one mini-batch was {ended}, before anything was trained")
    failure: DistbeliefError | None = pickle.loads(text)
    if failure is not None:
        raise failure


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
                    os.waitpid(pid, 0)

    def _tell(self, *message: Any) -> None:
        text = pickle.dumps(message)
        self._outbox += LENGTH.pack(len(text)) + text
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._outbox[: self._control.send(self._outbox, socket.MSG_DONTWAIT)]
        self._selector.modify(self._control, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0))

    def _obey(self, message: tuple[Any, ...], descriptors: list[int]) -> None:
        tag = message[0]
        if tag == "load":
            self._load(message[1], message[2], descriptors)
        elif tag == "start":
            self._fork(message[1], message[2], message[3], descriptors)
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
                    hint="define it in a file, not in a notebook or a session, and not below `if __name__`",
                ) from error
            except ImportError as error:
                raise ConfigurationError(
                    f"what the job is made of cannot be imported: {error}",
                    hint="keep the file that is trained, and what it imports, at the same path on every host, in a "
                    "shared folder, one image, or the working_dir of a Ray job; and install the same packages",
                ) from error
            self._shared, description = prepare(*arguments)
            _refuse_cuda()
            _refuse_threads()
            if attempt is not None:
                try_apart(lambda: attempt(self._shared))
            gc.collect()
            gc.freeze()
            answer: tuple[str, bytes, DistbeliefError | None] = ("loaded", pickle.dumps(description), None)
        except DistbeliefError as error:
            answer = ("loaded", b"", error)
        except BaseException as error:
            answer = ("loaded", b"", UserCodeError("".join(traceback.format_exception(error))))
        for descriptor in descriptors:
            os.close(descriptor)
        die_with_parent(0)
        send(self._control, answer)

    def _fork(self, role: str, incarnation: int, payload: bytes, descriptors: list[int]) -> None:
        read_end, write_end = os.pipe()
        flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            name_process(role)
            self._control.close()
            self._selector.close()
            for own in (read_end, *self._children, *(child[3] for child in self._children.values())):
                os.close(own)
            run_role(lambda: Unpickler.loads(payload, shared=self._shared)(descriptors), write_end)
        os.close(write_end)
        for descriptor in descriptors:
            os.close(descriptor)
        watch = os.pidfd_open(pid)
        self._children[watch] = (role, incarnation, pid, read_end)
        self._selector.register(watch, selectors.EVENT_READ)
        self._tell("started", role, incarnation, pid)

    def _bury(self, watch: int) -> None:
        role, incarnation, pid, read_end = self._children.pop(watch)
        self._selector.unregister(watch)
        os.close(watch)
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
    name_process("zygote")
    control.set_inheritable(False)
    Zygote(control).serve()


def main() -> None:
    """Entry point: the control socket's descriptor is the first argument."""
    serve(socket.socket(fileno=int(sys.argv[1])))


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
