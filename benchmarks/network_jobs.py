# SPDX-License-Identifier: Apache-2.0
"""Whole jobs on hosts that are namespaces of this machine, one process for each of their roles.

The keepers are started without Ray: it would find the hosts and start the keepers, and nothing else of a job.
"""

import contextlib
import dataclasses
import functools
import importlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from benchmarks.throughput_peers import acoustic_model, synthetic_frames
from benchmarks.throughput_product import Stopwatch
from distbelief.channel.wire import Wire
from distbelief.cluster import WireDtype
from distbelief.engine import keeper
from distbelief.engine.host import Invitation
from distbelief.engine.hosts import HostsEngine
from distbelief.events import Evaluated, Observation
from distbelief.parameter_server import shard_name
from examples import speech
from tests.hosts import Hosts

FRAMES = 20_000
RATE = 0.01


class Keepers:
    """A keeper in every host but the last, where the coordinator is. `places` says on which host a role lives."""

    def __init__(self, hosts: Hosts, places: Mapping[str, int]) -> None:
        self.host, self.address = "coordinator", hosts.addresses[-1]
        self._hosts, self._places = hosts, places
        self._processes: dict[str, subprocess.Popen[Any]] = {}

    def begin(self, invitation: Invitation) -> Sequence[str]:
        """Start them."""
        for number, address in enumerate(self._hosts.addresses[:-1]):
            spawn = functools.partial(self._hosts.popen, number)
            self._processes[f"host{number}"] = keeper.begin(f"host{number}", address, invitation, spawn)
        return list(self._processes)

    def preparing(self) -> Sequence[str]:
        """None: a process is there at once."""
        return ()

    def complaints(self) -> dict[str, str]:
        """Those that ended."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: f"its keeper ended with exit code {code}" for name, code in codes.items() if code is not None}

    def choose(self, role: str, hosts: Sequence[str]) -> str:
        """As laid down."""
        return f"host{self._places[role]}"

    def devices(self, role: str) -> str | None:
        """All that its host has."""
        return None

    def end(self) -> None:
        """They end by themselves; the hosts' end would end them otherwise."""
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)


@contextlib.contextmanager
def _on(hosts: Hosts, places: Mapping[str, int], dtype: WireDtype) -> Iterator[None]:
    """Jobs that are trained meanwhile live on these hosts."""

    def engine(job: db.Job, faults: db.Faults | None, costs: object) -> HostsEngine:
        shards = [shard_name(index) for index in range(job.cluster.shards)]
        return HostsEngine(shards, Keepers(hosts, places), faults=faults, wire=Wire(dtype=dtype))

    train = importlib.import_module("distbelief.train")
    with mock.patch.object(train, "engine_of", engine), hosts.inside(len(hosts.addresses) - 1):
        yield


def some_frames() -> TensorDataset:
    """The speech set's shape, built where the replicas are forked."""
    return TensorDataset(*synthetic_frames(FRAMES))


@dataclasses.dataclass(frozen=True)
class Prolonged:
    """The loss of a mini-batch, after `seconds` in which neither cores nor channel are used."""

    seconds: float

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Of (inputs, targets)."""
        time.sleep(self.seconds)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def examples_per_second(
    hosts: Hosts, replicas: Sequence[int], algorithm: db.Downpour, dtype: WireDtype, pause: float, seconds: float
) -> float:
    """Of replicas on these hosts together, with a shard on the last but one; each mini-batch takes `pause` s longer."""
    stopwatch = Stopwatch(seconds)
    names = [f"replica/{index}" for index in range(len(replicas))]
    places = {**dict(zip(names, replicas, strict=True)), shard_name(0): len(hosts.addresses) - 2}
    with tempfile.TemporaryDirectory() as folder, _on(hosts, places, dtype):
        job = db.Job(
            model=acoustic_model, step=Prolonged(pause), data=some_frames, algorithm=algorithm,
            cluster=db.Cluster(replicas=len(replicas), shards=1, threads_per_replica=1),
            epochs=1000, batch_size=32, checkpoint_seconds=1e6, run=Path(folder) / "run",
        )  # fmt: skip
        db.train(job, listeners=[stopwatch], view=False)
    return stopwatch.rate()


class Finish:
    """Listens to a job, and ends it when its frame accuracy is reached."""

    def __init__(self, accuracy: float) -> None:
        """Stop at the first evaluation with so much."""
        self._accuracy = accuracy
        self.seconds: float | None = None
        self.examples = 0
        self.best = 0.0

    def __call__(self, observation: Observation) -> None:
        """Look at an evaluation."""
        event = observation.event
        if not isinstance(event, Evaluated) or self.seconds is not None:
            return
        reached = event.metrics["frame_accuracy"] or 0.0
        self.best, self.examples = max(self.best, reached), event.examples
        if reached >= self._accuracy:
            self.seconds = observation.seconds
            raise StopIteration("the accuracy is reached")


def speech_seconds(
    hosts: Hosts, data: str, accuracy: float, algorithm: db.Downpour, dtype: WireDtype, *, epochs: int, seed: int = 0
) -> Finish:
    """Train the speech example, a replica and a shard on every host but the last two, until the accuracy is reached."""
    count = len(hosts.addresses) - 2
    places = {f"{kind}/{index}": index for kind in ("replica", "shard") for index in range(count)}
    finish = Finish(accuracy)
    with tempfile.TemporaryDirectory() as folder, _on(hosts, places | {"evaluator": count}, dtype):
        job = dataclasses.replace(
            speech.job(data), algorithm=algorithm, epochs=epochs, batch_size=32, seed=seed,
            cluster=db.Cluster(replicas=count, shards=count, threads_per_replica=1),
            evaluate_every=10_000, checkpoint_seconds=1e6, run=Path(folder) / "run",
        )  # fmt: skip
        db.train(job, listeners=[finish], view=False)
    return finish


def plain_steps(data: str, accuracy: float, batch_size: int, *, epochs: int, seed: int = 0) -> int | None:
    """Steps of Adagrad on one process until the accuracy is reached; None when it is not.

    DistributedDataParallel takes the same steps, with a part of each mini-batch on every host.
    """
    job = speech.job(data)
    train, test = job.data(), job.test()
    torch.manual_seed(seed)
    model = job.model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE, fused=True)
    steps, every = 0, max(1, 10_000 // batch_size)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(batch_size):
            inputs, targets = train[batch]
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
            if steps % every == 0:
                with torch.no_grad():
                    if speech.evaluate(model, test)["frame_accuracy"] >= accuracy:
                        return steps
    return None
