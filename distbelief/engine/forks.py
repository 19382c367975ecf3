# SPDX-License-Identifier: Apache-2.0
"""What a fork of the zygote does first, and what is done about the processes that user code starts in it."""

import contextlib
import ctypes
import fcntl
import os
import signal
import stat
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


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


def heed_no_terminations() -> None:
    """Let only the coordinator heed SIGTERM, which service managers send to each process of a job.

    It is ignored by a handler and not by SIG_IGN, which programs that are started here would inherit.
    """
    signal.signal(signal.SIGTERM, _ignore)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _ignore(number: int, frame: object) -> None:
    """Go on."""


def begin_role() -> None:
    """In a fork that is to be a role, or the trial of one: lead a group of processes, and go on when they are ended."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _ignore)


def end_group(leader: int) -> None:
    """End the processes that user code started in the role that this one was, such as a pool's.

    With SIGTERM, so that those which give back shared memory when others have ended can do that.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGTERM)
