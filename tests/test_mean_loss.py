# SPDX-License-Identifier: Apache-2.0
"""Laws: a loss that would be another function when it is computed in parts is refused before anything starts."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.attempt import attempt
from distbelief.job import prepare
from distbelief.mean_loss import AS_A_MEAN, check_mean, divided, doubled, moved
from tests import problems

EXAMPLES, CLASSES = 60, 3
WEIGHTS = torch.tensor([1.0, 5.0, 20.0])


def sorted_points() -> TensorDataset:
    """Examples in the order of their classes: the first ones tell nothing of the others."""
    inputs, targets = problems.points(EXAMPLES).tensors
    order = targets.argsort(stable=True)
    return TensorDataset(inputs[order], targets[order])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, weight=WEIGHTS)


def weighted_mean(output: Tensor, target: Tensor) -> Tensor:
    """The same weights in a loss that is a mean over examples."""
    return (functional.cross_entropy(output, target, reduction="none") * WEIGHTS[target]).mean()


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, ignore_index=0)


def summed(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="sum")


def in_pairs(output: Tensor, target: Tensor) -> Tensor:
    output = functional.normalize(output, dim=1)
    return functional.cross_entropy(5 * output @ output.T, torch.arange(len(output)))


def job(**fields: Any) -> db.Job:
    given: dict[str, Any] = {
        "model": net, "data": sorted_points, "test": None, "loss": functional.cross_entropy,
        "algorithm": db.Sandblaster(max_iterations=2, micro_batch=20), "epochs": 1,
    }  # fmt: skip
    return problems.job(**(given | fields))


NO_MEANS = [weighted, ignoring, summed, in_pairs]


@pytest.mark.parametrize("loss", NO_MEANS)
def test_sandblaster_refuses_a_loss_that_depends_on_how_the_data_are_cut(loss: Any, tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match=r"the loss of 20 examples is .* it is not their mean") as caught:
        db.train(job(loss=loss, run=tmp_path / "run"), view=False)
    assert "or compute them at once, with Sandblaster(micro_batch=60)" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [weighted, ignoring, in_pairs])
def test_data_that_are_computed_at_once_may_have_such_a_loss(loss: Any, tmp_path: Path) -> None:
    algorithm = db.Sandblaster(max_iterations=15, micro_batch=EXAMPLES)
    result = db.train(job(loss=loss, algorithm=algorithm, run=tmp_path / "run"), view=False)
    inputs, targets = sorted_points().tensors
    with torch.no_grad():
        whole = float(loss(result.model(inputs), targets))
    assert result.summary.loss == pytest.approx(whole, rel=1e-4)


class Neighbours(nn.Module):
    """A graph of all examples, as full-batch models have it: there is no other number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(EXAMPLES).roll(1, 0))
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.graph @ x)  # type: ignore[no-any-return]


def test_a_model_of_all_examples_at_once_is_trained(tmp_path: Path) -> None:
    algorithm = db.Sandblaster(max_iterations=3, micro_batch=EXAMPLES)
    result = db.train(job(model=Neighbours, algorithm=algorithm, run=tmp_path / "run"), view=False)
    assert result.summary.batch is not None
    assert result.summary.batch.iterations == 3


def test_weights_in_a_mean_over_examples_are_taken(tmp_path: Path) -> None:
    result = db.train(job(loss=weighted_mean, run=tmp_path / "run"), view=False)
    inputs, targets = sorted_points().tensors
    with torch.no_grad():
        assert result.summary.loss == pytest.approx(float(weighted_mean(result.model(inputs), targets)), rel=1e-5)


STAGES = db.Plan.stages(2)


@pytest.mark.parametrize("algorithm", [db.Downpour(), db.Sandblaster(micro_batch=EXAMPLES)])
@pytest.mark.parametrize("loss", NO_MEANS)
def test_stages_refuse_a_loss_that_depends_on_how_a_mini_batch_is_cut(loss: Any, algorithm: Any) -> None:
    prepared, _ = prepare(job(loss=loss, algorithm=algorithm, cluster=db.Cluster(partitions=STAGES)))
    with pytest.raises(db.ConfigurationError, match="it is not their mean") as caught:
        attempt(prepared)
    assert "hint: use Plan.stages(2, microbatches=1), or a loss that is a mean over examples" in str(caught.value)


def drawing(output: Tensor, target: Tensor) -> Tensor:
    """Another subset of the classes in each call."""
    return functional.cross_entropy(functional.dropout(output), target)


def test_stages_take_a_loss_that_draws_of_which_nothing_can_be_told() -> None:
    prepared, _ = prepare(job(loss=drawing, algorithm=db.Downpour(), cluster=db.Cluster(partitions=STAGES)))
    attempt(prepared)


@pytest.mark.slow
def test_in_stages_that_take_mini_batches_whole_such_a_loss_is_that_of_the_uncut_model(tmp_path: Path) -> None:
    fields = {"loss": weighted, "algorithm": db.Downpour(update_rule=db.sgd(0.1), fetch="awaited"), "batch_size": 20}
    cut, uncut = (
        db.train(
            job(cluster=db.Cluster(replicas=1, partitions=partitions), run=tmp_path / str(number), **fields), view=False
        ).model.state_dict()
        for number, partitions in enumerate((db.Plan.stages(2, microbatches=1), 1))
    )
    assert all(torch.allclose(cut[name], uncut[name], rtol=1e-5, atol=1e-6) for name in uncut)


def ridge(x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    """Its second part is no sum over the portion, and zero where the search begins."""
    inputs, targets = portion
    return (inputs @ x - targets).square().sum() + 50 * x.square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_penalty_within_the_function_is_noticed_though_it_is_zero_at_the_start(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3000, 5, generator=generator, dtype=dtype)
    data = inputs, inputs @ torch.arange(1.0, 6.0, dtype=dtype)
    cluster = db.Cluster(replicas=1, engine="simulated")
    with pytest.raises(db.ConfigurationError, match="it is not their mean") as caught:
        db.minimize(ridge, torch.zeros(5, dtype=dtype), data=data, cluster=cluster)
    assert "a function of minimize is the sum over the examples of its portion" in str(caught.value)


def test_a_loss_of_one_example_that_raises_is_no_reason_to_refuse_it() -> None:
    def at_least_two(batch: Tensor) -> Tensor:
        if len(batch) < 2:
            raise ValueError("of one example there is no deviation")
        return batch.std()

    parts = divided(torch.arange(3.0), [0, 1, 3])
    assert parts is not None
    check_mean(at_least_two, torch.arange(3.0), parts, AS_A_MEAN)


def test_rounding_is_no_difference_and_what_is_not_finite_is_not_compared() -> None:
    for dtype, error in ((torch.float32, 5e-4), (torch.float64, 5e-7), (torch.bfloat16, 2e-2)):
        one = torch.ones((), dtype=dtype)
        check_mean(lambda batch, one=one, error=error: one * (1 + error * batch), 1, [(2, 0), (1, 0)], AS_A_MEAN)  # type: ignore[misc]
        with pytest.raises(db.ConfigurationError):
            check_mean(lambda batch, one=one, error=error: one * (1 + 9 * error * batch), 1, [(2, 0)], AS_A_MEAN)  # type: ignore[misc]
    check_mean(lambda batch: torch.tensor(float("nan")), 1, [(1, 0)], AS_A_MEAN)
    for odd in (float("nan"), float("inf")):
        with pytest.raises(db.ConfigurationError):
            check_mean(lambda batch, odd=odd: torch.tensor(batch or odd), 1.0, [(1, 1.0), (1, 0.0)], AS_A_MEAN)  # type: ignore[misc]


def test_mini_batches_of_any_structure_are_doubled_and_divided() -> None:
    batch = {"x": torch.arange(3), "more": (torch.ones(3, 2), [torch.zeros(3)])}
    twice, parts = doubled(batch), divided(batch, [0, 1, 3])
    assert twice["x"].tolist() == [0, 1, 2, 0, 1, 2]
    assert twice["more"][1][0].shape == (6,)
    assert parts is not None
    assert [(count, part["x"].tolist(), part["more"][0].shape[0]) for count, part in parts] == [
        (1, [0], 1),
        (2, [1, 2], 2),
    ]
    for odd in ({"x": torch.arange(3), "name": "three"}, (torch.tensor(1.0),), 5):
        assert doubled(odd) is None
        assert divided(odd, [0, 1]) is None


def test_parameters_that_were_moved_are_as_before_bit_for_bit_whatever_happened() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.tensor(0.1))]
    before = [parameter.detach().clone() for parameter in parameters]
    with contextlib.suppress(ZeroDivisionError), moved(parameters, 1.0):
        assert not any(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
