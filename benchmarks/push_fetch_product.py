# SPDX-License-Identifier: Apache-2.0
"""The product's rows: a real shard and its caller, each a role with a process and a core of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.processes import keep_to_core, timed
from distbelief import adagrad
from distbelief.channel.base import Out, Promise, exported
from distbelief.cluster import TransportName, available_cores
from distbelief.engine.base import COORDINATOR, Home
from distbelief.engine.local import LocalEngine
from distbelief.parameter_server import ParameterServer, ParameterServerShard, shard_name
from distbelief.parameters import Layout, Piece, Span
from distbelief.section import Stamp

CALLER, ECHO = "caller", "echo"
ORDER_SECONDS = 3600.0
"""The caller waits for an order at most so long."""
Call = Callable[[], object]
Measure = Callable[[int], float]
"""Seconds of each of so many calls."""


class Orders:
    """What the benchmark's own process answers: how many calls are to be measured, and what was."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._ordered, self._measured = engine.promise(), engine.promise()

    @exported
    def next(self) -> Promise[int]:
        """So many calls, as soon as they are ordered."""
        return self._ordered

    @exported
    def measured(self, seconds: float) -> None:
        """Each of them took so long."""
        self._ordered, done, self._measured = self._engine.promise(), self._measured, self._engine.promise()
        done.keep(seconds)

    def measure(self, calls: int) -> float:
        """Order so many calls, and wait until they are measured. Raises RuntimeError when a process dies."""
        done = self._measured
        self._ordered.keep(calls)
        while not done.wait(1.0):
            if deaths := self._engine.deaths():
                raise RuntimeError(f"{deaths[0].role} died: {deaths[0].reason}")
        seconds: float = done.result()
        return seconds


class Caller:
    """A role that does nothing but calls, as a replica's process does: it answers none."""

    def __init__(self, home: Home, begin: Callable[[Home, int], Call], parameters: int) -> None:
        """`begin` makes what is called."""
        torch.set_num_threads(1)
        self._home, self._begin, self._parameters = home, begin, parameters

    def run(self) -> None:
        """Make the calls that are ordered."""
        call = self._begin(self._home, self._parameters)
        orders = self._home.find(COORDINATOR, Orders, ORDER_SECONDS)
        while True:
            calls = orders.call(Orders.next).result()
            orders.call(Orders.measured, timed(call, calls)).result()


class Echo:
    """A role that takes a tensor and gives one back, and does nothing else."""

    def __init__(self, home: Home) -> None:
        torch.set_num_threads(1)
        keep_to_core(-1)

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


def _echoes(home: Home, parameters: int) -> Call:
    keep_to_core(0)
    role = home.find(ECHO, Echo)
    there, back = (home.allocate(parameters, torch.float32) for _ in range(2))
    return lambda: role.call(Echo.exchange, there, back).result()


@contextmanager
def product(parameters: int, transport: TransportName, own_cores: bool = True) -> Iterator[Measure]:
    """Each call is one push and one fetch of all parameters, answered by the shard.

    `own_cores` as in jobs that leave a core to each process; without, both sleep at once when they wait.
    """
    span, layout = whole(parameters)
    with _engine(shard_name(0), transport, own_cores) as engine:
        engine.start(shard_name(0), 0, ParameterServerShard, span, layout, adagrad(0.01))
        yield _caller(engine, Pushes, parameters)


@contextmanager
def echo(parameters: int, transport: TransportName) -> Iterator[Measure]:
    """Each call moves one tensor there and one back, as a push and the fetch behind it do, without an optimizer.

    Either side keeps to a core of its own, as the ends of the bare socket do.
    """
    with _engine(ECHO, transport) as engine:
        engine.start(ECHO, 0, Echo)
        yield _caller(engine, _echoes, parameters)


@contextmanager
def _engine(answering: str, transport: TransportName, own_cores: bool = True) -> Iterator[LocalEngine]:
    owners = [answering, CALLER] if own_cores and available_cores() > 1 else []
    engine = LocalEngine([answering], transport=transport, own_cores=owners)
    try:
        engine.load(_nothing)
        yield engine
    finally:
        engine.close()


def _caller(engine: LocalEngine, begin: Callable[[Home, int], Call], parameters: int) -> Measure:
    orders = Orders(engine)
    engine.answer(orders)
    engine.start(CALLER, 0, Caller, begin, parameters)
    return orders.measure


def _nothing() -> tuple[None, None]:
    return None, None
