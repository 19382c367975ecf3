# SPDX-License-Identifier: Apache-2.0
"""Push and fetch between two hosts: this product's shard over its own channel, a bare socket, and Ray's object store.

Each way has two sides, one in each host. A side is a baseline of a companion (benchmarks/processes.py); the calling one
yields `measure(parameters, calls)`, seconds per push+fetch, the serving one a function that says that it still serves.
"""

import functools
import importlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import timed
from benchmarks.push_fetch_peers import (
    TIMEOUT_SECONDS,
    bytes_of,
    check_arrived,
    client,
    measure_ray,
    prepare,
    receive_into,
)
from benchmarks.push_fetch_product import Echo, Pushes, whole
from benchmarks.throughput_peers import Loop, acoustic_model, synthetic_frames
from distbelief import adagrad
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.peer import at
from distbelief.engine.base import Home
from distbelief.engine.home import ProcessHome
from distbelief.parameter_server import ParameterServerShard, shard_name

Measure = Callable[[int, int], float]
Serves = Callable[[], float]

BARE_PORT, SHARD_PORT, ECHO_PORT, DDP_PORT = 9000, 9001, 9002, 9003
BUFFER_BYTES = 1 << 20
"""Of the bare socket, as the product's channel has it: the kernel's own choice is slower here."""
KEY = b"of these two hosts alone, secret"


def _served() -> float:
    return 0.0


# a bare socket


@contextmanager
def bare_far(address: str, port: int = BARE_PORT) -> Iterator[Serves]:
    """Receives n floats, and sends n floats back when it has them all, as often as it is told."""
    server = socket.create_server((address, port))
    threading.Thread(target=_bare_far, args=(server,), daemon=True).start()
    yield _served


def _prepare(line: socket.socket) -> None:
    prepare(line)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        line.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _bare_far(server: socket.socket) -> None:
    line, _ = server.accept()
    _prepare(line)
    line.settimeout(None)
    while True:
        order = bytearray(8)
        receive_into(line, memoryview(order))
        floats = client(int.from_bytes(order, "big"))
        receive_into(line, bytes_of(floats[1]))
        line.sendall(bytes_of(floats[0]))


@contextmanager
def bare_near(address: str, port: int = BARE_PORT) -> Iterator[Measure]:
    """One stream, no optimizer."""
    with socket.create_connection((address, port), TIMEOUT_SECONDS) as line:
        _prepare(line)

        def measure(parameters: int, calls: int) -> float:
            gradient, buffer = client(parameters)
            buffer[0] = buffer[-1] = 0.0
            order, out, into = parameters.to_bytes(8, "big"), bytes_of(gradient), bytes_of(buffer)

            def there_and_back() -> None:
                line.sendall(order)
                line.sendall(out)
                receive_into(line, into)

            seconds = timed(there_and_back, calls)
            check_arrived(-buffer)
            return seconds

        yield measure


# the product


PORTS = {shard_name(0): SHARD_PORT, "echo": ECHO_PORT}


def _home(name: str, address: str, far: str, *listeners: socket.socket) -> tuple[ProcessHome, Endpoint]:
    """A role's process that knows where the roles of the `far` host answer."""
    endpoint = Endpoint(KEY, listeners=listeners)
    return ProcessHome(name, 0, endpoint, lambda role: at((far, PORTS[role])), address=address), endpoint


@contextmanager
def product_far(address: str, parameters: int) -> Iterator[Serves]:
    """A parameter server shard of so many parameters, and a role that only moves bytes."""
    span, layout = whole(parameters)
    roles: dict[str, Callable[[Home], object]] = {
        shard_name(0): lambda home: ParameterServerShard(home, span, layout, adagrad(0.01)),
        "echo": Echo,
    }
    for name, make in roles.items():
        home, endpoint = _home(name, address, address, socket.create_server((address, PORTS[name])))
        endpoint.answer_with(make(home))
        threading.Thread(target=_poll, args=(endpoint,), daemon=True).start()
    yield _served


def _poll(endpoint: Endpoint) -> None:
    torch.set_num_threads(1)
    while True:
        endpoint.poll(60.0)


@contextmanager
def product_near(address: str, far: str, parameters: int) -> Iterator[Measure]:
    """Pushes and fetches as a replica does."""
    home, _ = _home("replica/0", address, far)
    pushes = Pushes(home, parameters)

    def measure(parameters: int, calls: int) -> float:
        return timed(pushes, calls)

    yield measure


@contextmanager
def echo_near(address: str, far: str, parameters: int) -> Iterator[Measure]:
    """The same bytes over the same channel without an optimizer: one tensor there, then one back, in one call."""
    home, _ = _home("replica/0", address, far)
    role = home.find("echo", Echo)
    there, back = (home.allocate(parameters, torch.float32).normal_() for _ in range(2))

    def there_and_back() -> None:
        role.call(Echo.exchange, there, back).result()

    def measure(parameters: int, calls: int) -> float:
        return timed(there_and_back, calls)

    yield measure


# Ray


def ray_settings(token: str) -> dict[str, str]:
    """The environment of every process of Ray's."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_worker_niceness": "0",
    }


@contextmanager
def ray_near(address: str, port: int, token: str) -> Iterator[Measure]:
    """A Ray actor in the other host and the object stores of both."""
    os.environ |= ray_settings(token)
    library: Any = importlib.import_module("ray")
    try:
        library.init(address=f"{address}:{port}", _node_ip_address=address, log_to_driver=False, logging_level="ERROR")
        yield functools.partial(measure_ray, library, {}, {"host1": 1.0})
    finally:
        library.shutdown()


# DistributedDataParallel


@contextmanager
def data_parallel(head: str, rank: int, hosts: int) -> Iterator[Callable[[int, int, str], float]]:
    """One process of `hosts` that train the acoustic model together.

    Yields `measure(batch_size, steps, hook)` on the first of them, seconds per step with so many examples in each; the
    others do as it says. `hook` is "float32", or "float16" to send gradients so.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", init_method=f"tcp://{head}:{DDP_PORT}", rank=rank, world_size=hosts)
    frames = synthetic_frames(20_000)
    loops: dict[str, Loop] = {}

    def measure(batch_size: int, steps: int, hook: str) -> float:
        dist.broadcast(torch.tensor([batch_size, steps, _HOOKS.index(hook)]), 0)
        return run(batch_size, steps, hook)

    def run(batch_size: int, steps: int, hook: str) -> float:
        if hook not in loops:
            model = DistributedDataParallel(acoustic_model(), gradient_as_bucket_view=True)
            if hook == "float16":
                model.register_comm_hook(None, default_hooks.fp16_compress_hook)  # type: ignore[no-untyped-call]
            loops[hook] = Loop(model, frames)
            loops[hook].step(batch_size)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            loops[hook].step(batch_size)
        dist.barrier()
        return (time.perf_counter() - start) / steps

    def obey() -> None:
        torch.set_num_threads(1)
        order = torch.zeros(3, dtype=torch.int64)
        while True:
            dist.broadcast(order, 0)
            batch_size, steps, hook = order.tolist()
            run(batch_size, steps, _HOOKS[hook])

    if rank:
        threading.Thread(target=obey, daemon=True).start()
    yield measure


_HOOKS = ("float32", "float16")
