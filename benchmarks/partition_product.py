# SPDX-License-Identifier: Apache-2.0
"""The product's rows: a model cut by units over real processes with one thread each, which talk over loopback.

Yields `answer(question, steps)`: "seconds" per mini-batch, forward and backward, or elements that cross boundaries in
one, as the plan has them ("predicted") and as the partitions count them ("counted"), of all partitions together.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.partition_peers import build, mini_batch
from benchmarks.processes import forked
from distbelief.cluster import available_cores
from distbelief.partition.group import Group, Site
from distbelief.partition.materialise import record
from distbelief.partition.units import units


class Partition:
    """One partition with its own process."""

    def __init__(self, folder: str, model: str, batch_size: int, index: int, partitions: int) -> None:
        """Plan the model, meet the others, make the share."""
        self._batch = mini_batch(model, batch_size)
        recorded = record(partial(build, model), seed=0)
        plan = units(recorded.module, self._batch[0], partitions)
        store = dist.FileStore(str(Path(folder) / "store"), partitions)
        self._group = Group(store, index, partitions, Site(own_core=partitions < available_cores()))
        pieces = {piece.name: (piece.full_shape, piece.box) for piece in plan.pieces(index)}
        self._share = plan.share(index, dict(recorded.values(pieces)), self._group)
        self._out = index == plan.out
        numbers = plan.numbers[index]
        self.predicted = batch_size * (numbers.elements_out + numbers.elements_in)
        """Elements that it sends for a mini-batch: states forward, and the gradients of what arrived back."""

    def step(self) -> None:
        """Forward and backward."""
        self._share.zero_grad(set_to_none=True)
        output = self._share(self._batch[0])
        loss = nn.functional.cross_entropy(output, self._batch[1]) if self._out else output.sum()
        loss.backward()

    def answer(self, question: str, steps: int) -> float:
        """What the partitions are asked, all of them at once."""
        if question == "predicted":
            return self.predicted
        before = self._group.elements_sent
        self.step()
        if question == "counted":
            return self._group.elements_sent - before
        self._group.any(False)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._group.any(False)  # as far as all of them are
        return (time.perf_counter() - start) / steps

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


@contextmanager
def by_units(model: str, batch_size: int, partitions: int) -> Iterator[Callable[[str, int], float]]:
    """The first partition in this process, the others in forked ones."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        others = [
            opened.enter_context(forked(_follow, folder, model, batch_size, index, partitions))
            for index in range(1, partitions)
        ]
        own = Partition(folder, model, batch_size, 0, partitions)

        def answer(question: str, steps: int) -> float:
            for other in others:
                other.send((question, steps))
            first = own.answer(question, steps)
            answers: list[Any] = [other.recv() for other in others]
            return first if question == "seconds" else first + sum(answers)

        yield answer
        own.close()


def _follow(folder: str, model: str, batch_size: int, index: int, partitions: int, orders: Any) -> None:
    torch.set_num_threads(1)
    own = Partition(folder, model, batch_size, index, partitions)
    while (order := orders.recv()) is not None:
        orders.send(own.answer(*order))
    own.close()
