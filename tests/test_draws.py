# SPDX-License-Identifier: Apache-2.0
"""Laws of what a job and the program around it share: random numbers, and what torch is set to."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import distbelief as db
from distbelief.events import EpochFinished, Observation
from tests import problems

REAL = db.Cluster(replicas=2, shards=2)


def draw() -> tuple[float, float, float]:
    """One random number of each kind."""
    return float(torch.rand(())), numpy.random.random(), random.random()


class Projected(nn.Module):
    """A classifier of random features, which nobody trains."""

    def __init__(self, numbers: Callable[[int], list[float]]) -> None:
        super().__init__()
        drawn = torch.tensor(numbers(problems.FEATURES * 40)).view(problems.FEATURES, 40)
        self.features = nn.Parameter(drawn, requires_grad=False)
        self.out = nn.Linear(40, problems.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cos(x @ self.features))


def loss(model: nn.Module) -> Tensor:
    """On the test set."""
    inputs, targets = problems.points(200, 1).tensors
    return nn.functional.cross_entropy(model(inputs), targets)


def of_numpy() -> nn.Module:
    return Projected(lambda count: numpy.random.standard_normal(count).astype(numpy.float32).tolist())


def of_python() -> nn.Module:
    return Projected(lambda count: [random.gauss(0.0, 1.0) for _ in range(count)])


@pytest.mark.parametrize("model", [of_numpy, of_python])
def test_a_model_built_of_numpys_or_pythons_random_numbers_is_the_one_that_was_trained(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    trained = db.train(problems.job(run=tmp_path / "run", model=model, cluster=REAL), view=False)
    assert float(loss(trained.model).detach()) == pytest.approx(trained.test["loss"], abs=1e-6)


def test_what_the_program_draws_while_a_job_runs_is_not_drawn_again_after_it(tmp_path: Path) -> None:
    drawn = []

    def hear(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished):
            drawn.append(draw())

    db.train(problems.job(run=tmp_path / "run", cluster=REAL), listeners=[hear], view=False)
    drawn.append(draw())
    assert len({kind for numbers in drawn for kind in numbers}) == 3 * len(drawn) == 9


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
@pytest.mark.parametrize("cluster", [REAL, db.Cluster(replicas=2, shards=2, engine="simulated")])
def test_a_result_is_an_ordinary_module_whatever_torch_is_set_to_around_the_call(
    around: Callable[[], contextlib.AbstractContextManager[None]], cluster: db.Cluster, tmp_path: Path
) -> None:
    with around():
        trained = db.train(problems.job(run=tmp_path / "run", cluster=cluster), view=False)
    assert float(loss(trained.model).detach()) == pytest.approx(trained.test["loss"], abs=1e-6)
    loss(trained.model).backward()
    assert all(parameter.grad is not None for parameter in trained.model.parameters())
