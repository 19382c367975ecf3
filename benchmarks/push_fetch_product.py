# SPDX-License-Identifier: Apache-2.0
"""The product's rows: a real shard in a process of its own, the caller in this one, as replicas call it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from distbelief import adagrad
from distbelief.channel.base import Out, exported
from distbelief.cluster import TransportName
from distbelief.engine.base import Home
from distbelief.engine.local import LocalEngine
from distbelief.parameter_server import ParameterServer, ParameterServerShard, shard_name
from distbelief.parameters import Layout, Piece, Span
from distbelief.section import Stamp


class Echo:
    """A role that takes a tensor and gives one back, and does nothing else."""

    def __init__(self, home: Home) -> None:
        torch.set_num_threads(1)

    @exported
    def exchange(self, values: torch.Tensor, back: Out) -> None:
        """Receive, and send what lies in the buffer for the answer."""


def whole(parameters: int) -> tuple[Span, Layout]:
    """All parameters in one shard, and their layout."""
    span = Span(0, parameters)
    return span, Layout((Piece("all", (parameters,), span),), torch.float32)


class Pushes:
    """Pushes a gradient of all parameters to a shard, and fetches what it has made of it, as a replica does."""

    def __init__(self, home: Home, parameters: int) -> None:
        """Give the shard its first values."""
        span, _ = whole(parameters)
        self._gradient, self._fetched = (home.allocate(parameters, torch.float32) for _ in range(2))
        self._gradient.normal_()
        shard = home.find(shard_name(0), ParameterServerShard)
        shard.call(ParameterServerShard.initialise, 0, self._fetched).result()
        self._server = ParameterServer(home, [span], span, 0)
        self._sequence, self._version = 0, 0

    def __call__(self) -> None:
        """One push and one fetch."""
        self._sequence += 1
        stamp = Stamp(0, 0, self._sequence, self._version, 32, ((0, self._sequence),))
        self._version = self._server.exchange([stamp], self._gradient, self._fetched).result()[0]


@contextmanager
def product(parameters: int, transport: TransportName) -> Iterator[Callable[[], None]]:
    """Each call is one push and one fetch of all parameters, answered by the shard."""
    engine = LocalEngine([shard_name(0)], transport=transport)
    try:
        engine.load(_nothing)
        span, layout = whole(parameters)
        engine.start(shard_name(0), 0, ParameterServerShard, span, layout, adagrad(0.01))
        yield Pushes(engine, parameters)
    finally:
        engine.close()


@contextmanager
def echo(parameters: int, transport: TransportName) -> Iterator[Callable[[], None]]:
    """Each call moves one tensor there and one back, as a push and the fetch behind it do, without an optimizer."""
    engine = LocalEngine(["echo"], transport=transport)
    try:
        engine.load(_nothing)
        engine.start("echo", 0, Echo)
        role = engine.find("echo", Echo)
        there, back = (engine.allocate(parameters, torch.float32) for _ in range(2))

        def there_and_back() -> None:
            role.call(Echo.exchange, there, back).result()

        yield there_and_back
    finally:
        engine.close()


def _nothing() -> tuple[None, None]:
    return None, None
