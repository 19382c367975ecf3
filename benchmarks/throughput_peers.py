# SPDX-License-Identifier: Apache-2.0
"""The speech model trained by a plain loop and by DistributedDataParallel, and the synthetic frames all methods use.

Every process has one torch thread, gathers its mini-batches from frames in memory and applies fused Adagrad. A baseline
yields `measure(batch_size, seconds, ...)`, examples per second of all its processes together.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import forked

FRAMES, INPUTS, WIDTH, LAYERS, CLASSES = 112_912, 440, 512, 4, 10
RATE = 0.01
WARM_STEPS = 5
TIMEOUT_SECONDS = 60


def acoustic_model() -> nn.Module:
    """The paper's acoustic model: 440 inputs, four layers of 512 sigmoids, ten classes; 1.0 million parameters."""
    widths = [INPUTS, *[WIDTH] * LAYERS]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight, gain=4)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def synthetic_frames(frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Random data in the shape of the speech set, always equal: float32 (frames, 440) and int64 classes (frames,)."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(frames, INPUTS, generator=generator),
        torch.randint(CLASSES, (frames,), generator=generator),
    )


def prepare_forks() -> None:
    """Import what torch imports with the first optimizer, once and not in each process that is forked."""
    importlib.import_module("torch._dynamo")


class Loop:
    """The ordinary training loop, one mini-batch at a time."""

    def __init__(self, model: nn.Module, frames: tuple[Tensor, Tensor]) -> None:
        """Train `model` on (inputs, targets) in the order of a permutation."""
        self.model = model
        self._inputs, self._targets = frames
        self.optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE, fused=True)
        self._order = torch.randperm(len(self._targets))
        self._next = 0

    def step(self, batch_size: int) -> None:
        """Gather the next mini-batch, compute its gradient, apply it."""
        if self._next + batch_size > len(self._order):
            self._order, self._next = torch.randperm(len(self._order)), 0
        batch = self._order[self._next : self._next + batch_size]
        self._next += batch_size
        loss = nn.functional.cross_entropy(self.model(self._inputs[batch]), self._targets[batch])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


@contextmanager
def plain(frames: int = FRAMES) -> Iterator[Callable[[int, float], float]]:
    """One process, the loop that every PyTorch user writes. Yields `measure(batch_size, seconds)`."""
    loop = Loop(acoustic_model(), synthetic_frames(frames))

    def measure(batch_size: int, seconds: float) -> float:
        for _ in range(WARM_STEPS):
            loop.step(batch_size)
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            loop.step(batch_size)
            steps += 1
        return steps * batch_size / elapsed

    yield measure


@contextmanager
def two_plain(frames: int = FRAMES) -> Iterator[Callable[[int, float], float]]:
    """The same loop in two processes that share nothing but the machine: what two replicas could reach at most.

    Yields `measure(batch_size, seconds)`.
    """
    prepare_forks()
    with forked(_second_plain, frames) as second, plain(frames) as measure_here:

        def measure(batch_size: int, seconds: float) -> float:
            second.send((batch_size, seconds))
            here = measure_here(batch_size, seconds)
            there: Any = second.recv()
            return here + float(there)

        yield measure


def _second_plain(frames: int, orders: Any) -> None:
    with plain(frames) as measure:
        while (order := orders.recv()) is not None:
            orders.send(measure(*order))


@contextmanager
def data_parallel(frames: int = FRAMES) -> Iterator[Callable[[int, float, float], float]]:
    """DistributedDataParallel on two gloo processes, `batch_size` examples in each.

    Yields `measure(batch_size, seconds, slowdown)`: the second process takes `slowdown` times as long to compute.
    """
    prepare_forks()
    data = synthetic_frames(frames)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder, forked(_second_process, folder, data) as second:
        loop = _join(folder, 0, data)

        def run(batch_size: int, steps: int, slowdown: float) -> float:
            second.send((batch_size, steps, slowdown))
            return _run(loop, batch_size, steps, 1.0)

        def measure(batch_size: int, seconds: float, slowdown: float) -> float:
            run(batch_size, WARM_STEPS, 1.0)
            steps = max(1, round(seconds / run(batch_size, WARM_STEPS, slowdown) * WARM_STEPS))
            return 2 * batch_size * steps / run(batch_size, steps, slowdown)

        yield measure
        dist.destroy_process_group()


def _join(folder: str, rank: int, data: tuple[Tensor, Tensor]) -> Loop:
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'gloo'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    return Loop(DistributedDataParallel(acoustic_model(), gradient_as_bucket_view=True), data)


def _second_process(folder: str, data: tuple[Tensor, Tensor], orders: Any) -> None:
    loop = _join(folder, 1, data)
    while (order := orders.recv()) is not None:
        batch_size, steps, slowdown = order
        _run(loop, batch_size, steps, slowdown)


def _run(loop: Loop, batch_size: int, steps: int, slowdown: float) -> float:
    """Seconds for `steps`, from the moment both processes are there to the moment both are done."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        # The thread's processor time is what it computed: waiting for the other process's gradient is not slowed.
        computed = time.thread_time()
        loop.step(batch_size)
        if slowdown > 1:
            time.sleep((slowdown - 1) * (time.thread_time() - computed))
    dist.barrier()
    return time.perf_counter() - start
