# SPDX-License-Identifier: Apache-2.0
"""Small models and data that the tests train: importable, so that replicas in other processes find them by name."""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import distbelief as db
from distbelief.data_shard import epoch_order

FEATURES, CLASSES = 12, 3
EXAMPLES = Path(__file__).parents[1] / "examples"
UNHURRIED_SECONDS = 0.05


def classifier() -> nn.Module:
    """Two layers, 12-16-3."""
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def normalised_classifier() -> nn.Module:
    """With BatchNorm."""
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))


def points(examples: int, seed: int = 0) -> TensorDataset:
    """A linearly separable problem."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, FEATURES, generator=generator)
    directions = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(inputs, (inputs @ directions).argmax(1))


class Unhurried(Dataset[Any]):
    """The points, each mini-batch of which takes a while until there is a file of this name.

    So a job is not over before a test has seen what it waits for, however fast the machine is.
    """

    def __init__(self, examples: int, go: Path) -> None:
        self.points, self.go = points(examples), go

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, indices: list[int]) -> Any:
        if not self.go.exists():
            time.sleep(UNHURRIED_SECONDS)
        return tuple(tensor[indices] for tensor in self.points.tensors)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of right answers."""
    return (output.argmax(1) == target).float().mean()


def job(**fields: Any) -> db.Job:
    """A job on the points; keyword arguments replace fields."""
    given: dict[str, Any] = {
        "model": classifier,
        "loss": nn.functional.cross_entropy,
        "data": functools.partial(points, 640),
        "test": functools.partial(points, 200, 1),
        "metrics": {"accuracy": accuracy},
        "algorithm": db.Downpour(update_rule=db.adagrad(0.1)),
        "cluster": db.Cluster(replicas=2, shards=2, engine="simulated"),
        "epochs": 2,
        "batch_size": 16,
    }
    untested = {"metrics": {}} if fields.get("test", points) is None else {}
    return db.Job(**(given | untested | fields))


def plain_loop(job: db.Job, optimizer: torch.optim.Optimizer, model: nn.Module, *, n_push: int = 1) -> nn.Module:
    """What every PyTorch user would write: the reference for one replica. Gradients of n_push batches are averaged."""
    data = job.data()
    pending = 0
    for epoch in range(job.epochs):
        order = epoch_order(len(data), job.seed, epoch)
        for indices in order.split(job.batch_size):
            loss = job.objective(model, tuple(tensor[indices] for tensor in data.tensors))
            loss.backward()
            pending += 1
            if pending == n_push:
                _step(optimizer, pending)
                pending = 0
    if pending:
        _step(optimizer, pending)
    return model


def _step(optimizer: torch.optim.Optimizer, pending: int) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if pending > 1:
                parameter.grad.div_(pending)
    optimizer.step()
    optimizer.zero_grad()


def fresh_model(job: db.Job) -> nn.Module:
    """The model with the initial values of the job."""
    torch.manual_seed(job.seed)
    return job.model()


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """The script examples/NAME.py as a module, on one thread: in tiny operations more only wait for each other."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
