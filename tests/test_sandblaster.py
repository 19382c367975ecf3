# SPDX-License-Identifier: Apache-2.0
"""Laws of Sandblaster L-BFGS on whole jobs: exactly once, whatever dies, is late, is copied or comes twice."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief import checkpoint, shard_file
from distbelief.events import EvaluationLost, Iterated, Observation, RoleLost
from distbelief.parameters import Span
from tests import problems

FEATURES, CLASSES = 5, 3
EXAMPLES = 60


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(CLASSES, (EXAMPLES,), generator=generator))


def job(run: Path, **fields: Any) -> db.Job:
    algorithm = {"max_iterations": 5, "micro_batch": 7, "gtol": 0.0} | fields.pop("algorithm", {})
    cluster = {"replicas": 3, "shards": 2, "engine": "simulated"} | fields.pop("cluster", {})
    given: dict[str, Any] = {
        "model": net, "data": points, "loss": nn.functional.cross_entropy, "run": run,
        "algorithm": db.Sandblaster(**algorithm), "cluster": db.Cluster(**cluster),
    }  # fmt: skip
    return db.Job(**(given | fields))


def trained(job: db.Job, **options: Any) -> tuple[db.Result, list[Observation]]:
    heard: list[Observation] = []
    return db.train(job, view=False, listeners=[heard.append], **options), heard


def of_kind(heard: list[Observation], kind: type[Any]) -> list[Any]:
    return [one.event for one in heard if isinstance(one.event, kind)]


def gradient_at_the_end(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters and the gradient that the shards ended with, on the line."""
    folder, manifest = checkpoint.newest(run, lambda path, reason: None)
    vectors = shard_file.read_span(folder, manifest.shards, Span(0, manifest.layout.layout.length))
    return vectors["parameters"], vectors["gradient"]


def gradient_in_one_process(flat: torch.Tensor) -> torch.Tensor:
    model = net()
    nn.utils.vector_to_parameters(flat, model.parameters())
    inputs, targets = points().tensors
    nn.functional.cross_entropy(model(inputs), targets).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


SCHEDULES = 150
GROUP = 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SCHEDULES, GROUP))
def test_the_sharded_gradient_is_that_of_one_process_under_any_schedule(first: int, tmp_path: Path) -> None:
    """Deaths of replicas and shards, slow replicas, copies and any order of arrival, drawn from a seed."""
    lost = copies = late = 0
    for seed in range(first, first + GROUP):
        chance = random.Random(seed)
        replicas, shards = chance.randint(1, 4), chance.randint(1, 4)
        roles = [f"replica/{i}" for i in range(replicas)] + [f"shard/{i}" for i in range(shards)]
        kill = tuple((0.2 + 0.3 * chance.random(), chance.choice(roles)) for _ in range(chance.randint(0, 3)))
        slow = {f"replica/{i}": 1 + 6 * chance.random() for i in range(replicas) if chance.random() < 0.4}
        result, heard = trained(
            job(
                tmp_path / str(seed), seed=seed, cluster={"replicas": replicas, "shards": shards},
                algorithm={"max_iterations": chance.randint(1, 4), "micro_batch": chance.randint(1, 20)},
            ),
            faults=db.Faults(kill=kill, slow=slow),
            costs=db.Costs(jitter=1.0, example_seconds=4e-4, start_seconds=0.1),
        )  # fmt: skip
        parameters, gradient = gradient_at_the_end(tmp_path / str(seed))
        expected = gradient_in_one_process(parameters)
        assert float((gradient - expected).norm()) <= 1e-12 * float(expected.norm()), seed
        assert result.summary.reason.startswith("the limit of"), seed
        lost += len(of_kind(heard, RoleLost))
        late += len(of_kind(heard, EvaluationLost))
        copies += max([event.backed_up for event in of_kind(heard, Iterated)])
    assert min(lost, copies, late) > 0


def test_any_number_of_shards_and_replicas_takes_the_steps_of_one_process(tmp_path: Path) -> None:
    paths = []
    for number, (replicas, shards) in enumerate([(1, 1), (1, 3), (4, 1), (3, 7), (2, 39)]):
        _, heard = trained(
            job(
                tmp_path / str(number), cluster={"replicas": replicas, "shards": shards},
                algorithm={"max_iterations": 12},
            )
        )  # fmt: skip
        paths.append([(event.loss, event.t) for event in of_kind(heard, Iterated)])
    assert len(paths[0]) == 12
    for path in paths[1:]:
        torch.testing.assert_close(torch.tensor(path), torch.tensor(paths[0]), rtol=1e-6, atol=1e-9)


def test_without_penalties_it_ends_where_torch_lbfgs_does_after_as_many_evaluations(tmp_path: Path) -> None:
    """The same loss as torch.optim.LBFGS (strong Wolfe) after as many evaluations, within a few of them."""
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": 30}))
    model, (inputs, targets) = problems.fresh_model(job(tmp_path)), points().tensors
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=30, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=0.0,
        tolerance_change=0.0,
    )  # fmt: skip
    losses: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    ours = of_kind(heard, Iterated)[-1]
    assert ours.loss <= min(losses) * 1.02
    assert ours.evaluations <= 1.2 * len(losses)


@pytest.mark.parametrize("order", range(3))
def test_deterministic_results_are_equal_bit_for_bit_whatever_the_replicas(order: int, tmp_path: Path) -> None:
    algorithm = {"max_iterations": 12, "deterministic": True, "micro_batch": 3}
    reference, _ = trained(job(tmp_path / "one", cluster={"replicas": 1}, algorithm=algorithm))
    other, heard = trained(
        job(tmp_path / "many", cluster={"replicas": 2 + order}, algorithm=algorithm),
        faults=db.Faults(kill=((0.25, f"replica/{order}"),), slow={"replica/0": 3.0 + order}),
        costs=db.Costs(jitter=1.0),
    )
    assert of_kind(heard, RoleLost)
    assert problems.same_parameters(reference.model, other.model)
