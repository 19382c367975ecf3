# SPDX-License-Identifier: Apache-2.0
"""The same push and fetch by other means, and the floor.

Every method does what Downpour asks of a shard: the client's gradient reaches another process, that process applies one
fused Adagrad step to its parameters, and the new parameters end in a buffer of the client's. Each is written the
way its authors advise. A baseline yields `measure(parameters, calls)`, seconds per push+fetch.
"""

import functools
import importlib
import os
import secrets
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.processes import forked, keep_to_core, timed

Measure = Callable[[int, int], float]

TIMEOUT_SECONDS = 20
LOOPBACK = "127.0.0.1"


class Shard:
    """What every server holds: parameters and Adagrad's state, float32 of shape (parameters,) each."""

    def __init__(self, parameters: int) -> None:
        """Allocate and touch the memory of `parameters` floats, their gradient and their rule state."""
        self.parameters = torch.zeros(parameters, requires_grad=True)
        self.parameters.grad = torch.zeros(parameters)
        self.optimizer = torch.optim.Adagrad([self.parameters], lr=0.01, fused=True)
        self.optimizer.step()

    @property
    def gradient(self) -> torch.Tensor:
        """The buffer a push is received into."""
        assert self.parameters.grad is not None
        return self.parameters.grad

    def apply(self, gradient: torch.Tensor) -> torch.Tensor:
        """One step with `gradient`, read in place; the new parameters, not copied."""
        self.parameters.grad = gradient
        self.optimizer.step()
        return self.parameters.detach()


def client_gradient(parameters: int) -> torch.Tensor:
    """The gradient a client pushes: float32 of shape (parameters,), neither zero nor denormal."""
    return torch.full((parameters,), 1e-3)


@functools.lru_cache(maxsize=1)
def client(parameters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The client's gradient and the buffer it fetches into, kept from one block of calls to the next."""
    return client_gradient(parameters), torch.zeros(parameters)


def check_arrived(buffer: torch.Tensor) -> None:
    """A method that does not do its work is no comparison: raises RuntimeError unless parameters came back changed."""
    first, last = buffer[0].item(), buffer[-1].item()
    if first != last or not first < 0:
        raise RuntimeError(f"the fetched parameters begin with {first} and end with {last}; both must be one negative")


class Floor:
    """What no transport can avoid: one fused optimizer pass and one memcpy over n, in one process."""

    def __init__(self, parameters: int) -> None:
        """Allocate a shard, a gradient and the client's buffer of `parameters` floats."""
        self._shard = Shard(parameters)
        self._gradient = client_gradient(parameters)
        self._buffer = torch.zeros(parameters)

    def __call__(self) -> None:
        """One step and one copy."""
        self._buffer.copy_(self._shard.apply(self._gradient))


@contextmanager
def gloo() -> Iterator[Measure]:
    """torch.distributed send/recv between two gloo processes, into preallocated buffers."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder, forked(_gloo_shard, folder) as shard:
        _join_gloo(folder, 0)

        def measure(parameters: int, calls: int) -> float:
            gradient, buffer = client(parameters)
            buffer[0] = buffer[-1] = 0.0

            def push_fetch() -> None:
                dist.send(gradient, 1)
                dist.recv(buffer, 1)

            shard.send((parameters, calls + 1))
            seconds = timed(push_fetch, calls)
            check_arrived(buffer)
            return seconds

        yield measure
        dist.destroy_process_group()


def _join_gloo(folder: str, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'gloo'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )


def _gloo_shard(folder: str, orders: Any) -> None:
    _join_gloo(folder, 1)
    shard = Shard(1)
    while (order := orders.recv()) is not None:
        parameters, rounds = order
        if len(shard.gradient) != parameters:
            shard = Shard(parameters)
        for _ in range(rounds):
            dist.recv(shard.gradient, 0)
            dist.send(shard.apply(shard.gradient), 0)


@contextmanager
def rpc() -> Iterator[Measure]:
    """torch.distributed.rpc over TensorPipe: one call that carries the gradient and returns the parameters."""
    from torch.distributed import rpc as torch_rpc

    with tempfile.TemporaryDirectory() as folder, forked(_rpc_shard, folder):
        join_rpc(folder, "client", 0)

        def measure(parameters: int, calls: int) -> float:
            gradient, buffer = client(parameters)
            buffer[0] = buffer[-1] = 0.0

            def push_fetch() -> None:
                # An answer arrives in memory of its own; there is no way to name the buffer.
                buffer.copy_(rpc_push_fetch(gradient))

            seconds = timed(push_fetch, calls)
            check_arrived(buffer)
            return seconds

        yield measure
        torch_rpc.shutdown()


def rpc_push_fetch(gradient: torch.Tensor) -> torch.Tensor:
    """Have the shard apply `gradient`; its parameters, in new memory. Raises RuntimeError when it is gone."""
    from torch.distributed import rpc as torch_rpc

    parameters: torch.Tensor = torch_rpc.rpc_sync("shard", _rpc_apply, args=(gradient,))
    return parameters


def join_rpc(folder: str, name: str, rank: int) -> None:
    """Take part as "client" (0) or "shard" (1), who meet in `folder`."""
    from torch.distributed import rpc as torch_rpc

    options = torch_rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{Path(folder) / 'rpc'}", rpc_timeout=TIMEOUT_SECONDS
    )
    torch_rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)  # type: ignore[no-untyped-call]


def _rpc_shard(folder: str, orders: Any) -> None:
    from torch.distributed import rpc as torch_rpc

    join_rpc(folder, "shard", 1)
    torch_rpc.shutdown()


@functools.lru_cache(maxsize=1)
def _rpc_parameters(parameters: int) -> Shard:
    return Shard(parameters)


def _rpc_apply(gradient: torch.Tensor) -> torch.Tensor:
    return _rpc_parameters(len(gradient)).apply(gradient)


@contextmanager
def ray(object_store_bytes: int) -> Iterator[Measure]:
    """A Ray actor and the Ray object store: numpy arrays, read in place where they lie in the store."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    library: Any = importlib.import_module("ray")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            library.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=folder,
            )
            yield functools.partial(measure_ray, library, {}, {})
        finally:
            library.shutdown()


def measure_ray(
    library: Any, actors: dict[int, Any], resources: dict[str, float], parameters: int, calls: int
) -> float:
    """Seconds per push+fetch to the one of `actors` for so many parameters, which is started where `resources` are."""
    if parameters not in actors:
        actors.clear()
        actors[parameters] = library.remote(num_cpus=1, resources=resources)(RayShard).remote(parameters)
    actor = actors[parameters]
    gradient, buffer = (tensor.numpy() for tensor in client(parameters))
    buffer[0] = buffer[-1] = 0.0

    def push_fetch() -> None:
        # Ray puts arguments and answers above 100 kB into its store and sends smaller ones with the call.
        np.copyto(buffer, library.get(actor.push_fetch.remote(gradient), timeout=TIMEOUT_SECONDS))

    seconds = timed(push_fetch, calls)
    check_arrived(torch.from_numpy(buffer))
    return seconds


class RayShard:
    """The actor."""

    def __init__(self, parameters: int) -> None:
        """Hold `parameters` floats, with one torch thread like everybody else."""
        torch.set_num_threads(1)
        # The store's memory is read-only, which torch warns of; the step only reads it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._shard = Shard(parameters)

    def push_fetch(self, gradient: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[Any]]":
        """Apply `gradient`, of shape (parameters,); returns the new parameters."""
        return self._shard.apply(torch.from_numpy(gradient)).numpy()


@contextmanager
def bare_socket(anywhere: bool = False) -> Iterator[Measure]:
    """No optimizer: n floats over TCP loopback to a process that has them all before it sends n floats back.

    Either end keeps to a core of its own, as processes do that work at the same time. `anywhere` leaves it to the
    kernel, which sometimes lets the two share a core: they never work at the same time, and small messages then stay in
    one cache.
    """
    with socket.create_server((LOOPBACK, 0)) as server, forked(_bare_shard, server, anywhere) as shard:
        if not anywhere:
            keep_to_core(0)
        server.settimeout(TIMEOUT_SECONDS)
        line, _ = server.accept()
        with line:
            prepare(line)

            def measure(parameters: int, calls: int) -> float:
                gradient, buffer = client(parameters)
                buffer[0] = buffer[-1] = 0.0
                out, into = bytes_of(gradient), bytes_of(buffer)

                def echo() -> None:
                    line.sendall(out)
                    receive_into(line, into)

                shard.send((parameters, calls + 1))
                seconds = timed(echo, calls)
                check_arrived(-buffer)
                return seconds

            yield measure


def _bare_shard(server: socket.socket, anywhere: bool, orders: Any) -> None:
    if not anywhere:
        keep_to_core(-1)
    with socket.create_connection(server.getsockname()) as line:
        server.close()
        prepare(line)
        while (order := orders.recv()) is not None:
            parameters, rounds = order
            out, into = (bytes_of(tensor) for tensor in client(parameters))
            for _ in range(rounds):
                receive_into(line, into)
                line.sendall(out)


def prepare(line: socket.socket) -> None:
    """What both ends of a bare connection are set to."""
    line.settimeout(TIMEOUT_SECONDS)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.numpy().data.cast("B")


def receive_into(line: socket.socket, into: memoryview) -> None:
    """Fill `into` from `line`. Raises ConnectionError when the other side ends first."""
    received = 0
    while received < len(into):
        count = line.recv_into(into[received:])
        if not count:
            raise ConnectionError(f"the other side ended after {received} of {len(into)} bytes")
        received += count
