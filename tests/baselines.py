# SPDX-License-Identifier: Apache-2.0
"""Baselines that try what a companion does; in a module of little, which the companion imports."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.processes import forked


@contextmanager
def odd() -> Iterator[Callable[[int], float]]:
    """A baseline that answers odd numbers, refuses 2, hangs on 4 and dies on 6."""

    def answer(number: int) -> float:
        if number == 2:
            raise ValueError("two is even")
        if number == 4:
            time.sleep(60)
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(number)

    yield answer


@contextmanager
def with_a_child() -> Iterator[Callable[[], float]]:
    """A baseline that forks a process and answers that process's id."""
    with forked(_report_pid) as child:
        pid: Any = child.recv()
        yield lambda: float(pid)


def _report_pid(connection) -> None:  # type: ignore[no-untyped-def]
    connection.send(os.getpid())
    while connection.recv() is not None:
        pass
