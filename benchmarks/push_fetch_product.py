# SPDX-License-Identifier: Apache-2.0
"""The product's rows: a real shard in a process of its own, the caller in this one, as replicas call it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from distbelief import adagrad
from distbelief.channel.base import Out, exported
from distbelief.engine.base import Home
from distbelief.engine.local import LocalEngine
from distbelief.parameter_server import ParameterServer, ParameterServerShard, shard_name
from distbelief.parameters import Layout, Piece, Span
from distbelief.section import Stamp

Transport = Literal["shared_memory", "tcp"]


class Echo:
    """A role that takes a tensor and gives one back, and does nothing else."""

    def __init__(self, home: Home) -> None:
        torch.set_num_threads(1)

    @exported
    def take(self, values: torch.Tensor) -> None:
        """Receive."""

    @exported
    def give(self, values: Out) -> None:
        """Send back what lies in the buffer."""


@contextmanager
def product(parameters: int, transport: Transport) -> Iterator[Callable[[], None]]:
    """Each call is one push and one fetch of all parameters, answered by the shard."""
    engine = LocalEngine([shard_name(0)], transport=transport)
    try:
        engine.load(_nothing)
        span = Span(0, parameters)
        layout = Layout((Piece("all", (parameters,), span),), torch.float32)
        engine.start(shard_name(0), 0, ParameterServerShard, span, layout, adagrad(0.01))
        shard = engine.find(shard_name(0), ParameterServerShard)
        gradient, fetched = (engine.allocate(parameters, torch.float32) for _ in range(2))
        gradient.normal_()
        shard.call(ParameterServerShard.initialise, 0, fetched).result()
        server = ParameterServer(engine, [span], span, 0)
        sequence, version = 0, 0

        def push_and_fetch() -> None:
            nonlocal sequence, version
            sequence += 1
            stamp = Stamp(0, 0, sequence, version, 32, ((0, sequence),))
            version = server.exchange([stamp], gradient, fetched).result()[0]

        yield push_and_fetch
    finally:
        engine.close()


@contextmanager
def echo(parameters: int, transport: Transport) -> Iterator[Callable[[], None]]:
    """Each call moves one tensor there and one back, without an optimizer."""
    engine = LocalEngine(["echo"], transport=transport)
    try:
        engine.load(_nothing)
        engine.start("echo", 0, Echo)
        role = engine.find("echo", Echo)
        there, back = (engine.allocate(parameters, torch.float32) for _ in range(2))

        def there_and_back() -> None:
            role.call(Echo.take, there).result()
            role.call(Echo.give, back).result()

        yield there_and_back
    finally:
        engine.close()


def _nothing() -> tuple[None, None]:
    return None, None
