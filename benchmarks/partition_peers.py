# SPDX-License-Identifier: Apache-2.0
"""The models of the partition benchmark, and what we compare with: one process, tensor parallelism, pipelining.

Every process has one torch thread. A baseline yields `measure(steps)`, seconds per mini-batch, forward and backward.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.processes import forked, timed
from distbelief.layers import LocallyConnected2d
from distbelief.partition.balance import fairest

INPUTS, LAYERS, STATES = 440, 4, 8192
"""Of the paper's acoustic model."""
LOCAL = "locally connected"
TIMEOUT_SECONDS = 60
MICRO_BATCHES = 4

Step = Callable[[], object]


def locally_connected() -> nn.Sequential:
    """Two locally connected layers of 16 maps over 64 x 64 and 32 x 32 places, pooling, two small linear layers."""
    return nn.Sequential(
        LocallyConnected2d(3, 16, 64, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2),
        LocallyConnected2d(16, 16, 32, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(16 * 15 * 15, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def speech(width: int, states: int = STATES) -> nn.Sequential:
    """The paper's acoustic model with hidden layers of `width` units; with 2560 it has 42 million parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([INPUTS, *[width] * LAYERS]):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(width, states))


def build(name: str) -> nn.Sequential:
    """The model that a table calls so: LOCAL, or "speech 2048"."""
    return locally_connected() if name == LOCAL else speech(int(name.split()[1]))


def mini_batch(name: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Noise of the model's shape, the same in all processes."""
    generator = torch.Generator().manual_seed(1)
    shape, classes = ((3, 64, 64), 10) if name == LOCAL else ((INPUTS,), STATES)
    return (
        torch.randn(batch_size, *shape, generator=generator),
        torch.randint(classes, (batch_size,), generator=generator),
    )


@contextmanager
def one_process(model: str, batch_size: int) -> Iterator[Callable[[int], float]]:
    """The uncut model."""
    yield lambda steps: timed(_plain_step(build(model), mini_batch(model, batch_size)), steps)


@contextmanager
def tensor_parallel(model: str, batch_size: int, partitions: int) -> Iterator[Callable[[int], float]]:
    """parallelize_module: linear layers by columns and by rows in turn, the last one by columns and gathered."""
    with _together(_tensor_parallel_step, model, batch_size, partitions) as measure:
        yield measure


@contextmanager
def pipelining(model: str, batch_size: int, partitions: int) -> Iterator[Callable[[int], float]]:
    """torch.distributed.pipelining: stages of about equally many parameters, 1F1B."""
    with _together(_pipeline_step, model, batch_size, partitions) as measure:
        yield measure


@contextmanager
def _together(
    make: Callable[[str, int, int, int], Step], model: str, batch_size: int, partitions: int
) -> Iterator[Callable[[int], float]]:
    """This process and forked ones, each with its part of the default process group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        others = [
            opened.enter_context(forked(_follow, make, folder, model, batch_size, index, partitions))
            for index in range(1, partitions)
        ]
        step = _join(make, folder, model, batch_size, 0, partitions)

        def measure(steps: int) -> float:
            for other in others:
                other.send(steps)
            return _timed_together(step, steps)

        yield measure
        dist.destroy_process_group()


def _follow(
    make: Callable[[str, int, int, int], Step], folder: str, model: str, batch_size: int, index: int, partitions: int,
    orders: Any,
) -> None:  # fmt: skip
    step = _join(make, folder, model, batch_size, index, partitions)
    while (steps := orders.recv()) is not None:
        _timed_together(step, steps)


def _join(
    make: Callable[[str, int, int, int], Step], folder: str, model: str, batch_size: int, index: int, partitions: int
) -> Step:
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'gloo'}", rank=index, world_size=partitions,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )  # fmt: skip
    torch.manual_seed(0)
    return make(model, batch_size, index, partitions)


def _timed_together(step: Step, steps: int) -> float:
    """Seconds per step, from the moment all processes are there to the moment all are done."""
    step()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / steps


def _plain_step(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]

    return step


def _tensor_parallel_step(model: str, batch_size: int, index: int, partitions: int) -> Step:
    module = build(model)
    linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    plan = {name: RowwiseParallel() if place % 2 else ColwiseParallel() for place, name in enumerate(linear)}
    plan[linear[-1]] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(module, init_device_mesh("cpu", (partitions,)), plan)
    return _plain_step(module, mini_batch(model, batch_size))


def _pipeline_step(model: str, batch_size: int, index: int, partitions: int) -> Step:
    layers, (inputs, targets) = list(build(model)), mini_batch(model, batch_size)
    edges = _edges(layers, partitions)
    micro = inputs[: batch_size // MICRO_BATCHES]
    with torch.no_grad():
        boundaries = [micro]
        for start, stop in pairwise(edges):
            boundaries.append(nn.Sequential(*layers[start:stop])(boundaries[-1]))
    entering, leaving = (boundaries[index + at].to("meta").requires_grad_(index + at > 0) for at in (0, 1))
    own = nn.Sequential(*layers[edges[index] : edges[index + 1]])
    stage = PipelineStage(own, index, partitions, torch.device("cpu"), input_args=entering, output_args=leaving)
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy)

    def step() -> None:
        own.zero_grad(set_to_none=True)
        given = (inputs,) if index == 0 else ()
        schedule.step(*given, target=targets if index == partitions - 1 else None, losses=[])

    return step


def _edges(layers: Sequence[nn.Module], partitions: int) -> list[int]:
    """A weight of these models is used once for each example: the work of a layer goes with its parameters."""
    weights = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return fairest(weights, partitions)
