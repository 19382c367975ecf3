# SPDX-License-Identifier: Apache-2.0
"""One mini-batch is tried in a fork before any role is, and what forks could not do is refused."""

import contextlib
import gc
import math
import os
import pickle
import select
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable

from distbelief.engine.forks import begin_role, die_with_parent, end_group, flush, open_files_anew
from distbelief.errors import ConfigurationError, DistbeliefError, TrainingFailed, UserCodeError

LONG_SECONDS = 20.0
"""A trial that takes longer is told of: it may never end."""


class OwnerGone(Exception):
    """Who started this process has ended, or closed its end."""


def refuse_cuda() -> None:
    """Raise ConfigurationError when this process uses CUDA, which no fork of it could then use."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigurationError(
            "the script, or the function that builds the data or the model, has used CUDA before the job began",
            hint="build them on the CPU, replicas move what they need; torch.random.fork_rng() uses CUDA, too, without "
            "devices=[]",
        )


def refuse_threads() -> None:
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


def try_apart(attempt: Callable[[], object], owner: socket.socket) -> None:
    """Do it in a fork that ends with it, and raise what it raised; OwnerGone when the `owner` of this process is.

    A backward pass on a machine with accelerators starts threads, after which no fork could make another.
    """
    flush()
    try:
        read_end, write_end = os.pipe()
        pid = os.fork()
    except OSError as error:
        raise TrainingFailed(f"no process could be started: {error}\nhint: look at ulimit -u and -n") from error
    if pid == 0:
        die_with_parent(signal.SIGKILL)
        begin_role()
        outcome: DistbeliefError | None = None
        try:
            open_files_anew()
            attempt()
        except DistbeliefError as raised:
            outcome = raised
        except BaseException as raised:
            outcome = UserCodeError("".join(traceback.format_exception(raised)))
        code = 1
        try:  # whatever was raised, such as what no encoding has: this fork does not go on as its parent
            with os.fdopen(write_end, "wb") as told:
                told.write(pickle.dumps(outcome))
            flush()
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    try:
        text = _last_words(pid, read_end, owner)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        end_group(pid)
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code or not text:
        ended = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise UserCodeError(f"the process that tried one mini-batch was {ended}, before anything was trained")
    failure: DistbeliefError | None = pickle.loads(text)
    if failure is not None:
        raise failure


def _last_words(pid: int, read_end: int, owner: socket.socket) -> bytes:
    """What the process wrote until it ended; a pool that it started may hold the other end of the pipe for longer."""
    os.set_blocking(read_end, False)
    text, until = bytearray(), time.monotonic() + LONG_SECONDS
    watch = os.pidfd_open(pid)
    try:
        while True:
            ready, _, _ = select.select([read_end, watch, owner.fileno()], [], [], 1.0)
            with contextlib.suppress(BlockingIOError):
                while more := os.read(read_end, 1 << 16):
                    text += more
            if watch in ready:
                return bytes(text)
            if owner.fileno() in ready and not owner.recv(1, socket.MSG_PEEK):
                raise OwnerGone
            if time.monotonic() > until:
                until = math.inf
                _warn_of_a_long_trial()
    finally:
        os.close(watch)


def _warn_of_a_long_trial() -> None:
    text = f"trying one mini-batch has taken {LONG_SECONDS:g} s"
    if (native := len(os.listdir("/proc/self/task")) - threading.active_count()) > 0:
        text += (
            f", and {native} threads of libraries run in the process from which it was forked. Forks do not have them, "
            "so libraries such as polars wait for ever there: use them first when the data set is asked for an example"
        )
    warnings.warn(text, RuntimeWarning, stacklevel=2)
