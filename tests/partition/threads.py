# SPDX-License-Identifier: Apache-2.0
"""Partitions as threads: a whole replica inside one test, over the loopback interface."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from distbelief.partition.group import Group

T = TypeVar("T")

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def side_by_side(count: int, run: Callable[[int], object]) -> None:
    """Run so many at once, each in a thread of its own; raises the first error if one of them does."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def together(partitions: int, work: Callable[[Group], T], deadline_seconds: float = 20.0) -> list[T]:
    """What `work` returns on every partition; the first error if one of them raises."""
    store, results = dist.HashStore(), {}
    # Who has nothing to say to the others would be gone before the last of them has finished meeting it.
    met = threading.Barrier(partitions, timeout=deadline_seconds)

    def run(index: int) -> None:
        group = None
        try:
            group = Group(store, index, partitions, deadline_seconds=deadline_seconds)
            met.wait()
            results[index] = work(group)
        finally:
            if group is not None:
                group.close()

    side_by_side(partitions, run)
    return [results[index] for index in range(partitions)]
