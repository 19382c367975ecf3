# SPDX-License-Identifier: Apache-2.0
"""What Sandblaster refuses, before anything starts, in the user's numbers."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.events import RoleStarted
from tests.test_sandblaster import CLASSES, FEATURES, job, net, of_kind, points, trained


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history": 0}, r"history=0.*at least 1"),
        ({"max_iterations": 0}, r"max_iterations=0"),
        ({"max_evaluations": -1}, r"max_evaluations=-1"),
        ({"l1": -0.1}, r"l1=-0\.1.*0 or positive"),
        ({"l2": float("nan")}, r"l2=nan"),
        ({"gtol": -1.0}, r"gtol=-1\.0"),
        ({"gtol": math.inf}, r"gtol=inf"),
        ({"ftol": -1.0}, r"ftol=-1\.0"),
        ({"ftol": float("nan")}, r"ftol=nan"),
        ({"ftol": math.inf}, r"ftol=inf"),
        ({"target": float("nan")}, r"target=nan"),
        ({"micro_batch": 0}, r"micro_batch=0"),
        ({"bounds": (0.0,)}, r"bounds=\(0\.0,\)\) is no pair of numbers\nhint: give \(lowest, highest\)"),
        ({"bounds": [(0.0, 1.0), (0.0, 2.0)]}, r"bounds=\[.*\]\) is no pair of numbers\nhint: "),
        ({"bounds": ("0", 1.0)}, r"bounds=\('0', 1\.0\)\) is no pair of numbers\nhint: "),
        ({"bounds": 5.0}, r"bounds=5\.0\) is no pair"),
        ({"bounds": 0.0}, r"bounds=0\.0\) is no pair"),
        ({"bounds": ()}, r"bounds=\(\)\) is no pair"),
        ({"bounds": torch.zeros(2)}, r"bounds=tensor\(\[0\., 0\.\]\)\) is no pair"),
        ({"bounds": (1.0, -1.0)}, r"bounds=\(1\.0, -1\.0\).*nothing between"),
        ({"bounds": (1.0, 1.0)}, r"bounds=\(1\.0, 1\.0\).*nothing between"),
        ({"l1": 0.1, "bounds": (0.0, None)}, r"l1=0\.1, bounds=\(0\.0, None\).*no rule for both"),
    ],
)
def test_a_value_that_cannot_work_is_refused_when_it_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(db.ConfigurationError, match=message):
        db.Sandblaster(**fields)


@pytest.mark.parametrize("fields", [{"ftol": 0.0}, {"gtol": 0.0}, {"batch": 16, "overlap": 0.5}, {"micro_batch": 1}])
def test_a_value_at_the_edge_of_what_can_work_is_taken(fields: dict[str, Any]) -> None:
    assert vars(db.Sandblaster(**fields)).items() >= fields.items()


@pytest.mark.parametrize(
    ("dtype", "fields", "bends", "searched"),
    [
        (torch.float64, {}, False, ("wolfe", 1e-9)),
        (torch.float32, {}, False, ("wolfe", 1e-7)),
        (torch.float64, {"l1": 0.1}, True, ("backtracking", 1e-9)),
        (torch.float32, {"batch": 64}, False, ("overlapping", 1e-7)),
        (torch.float32, {"ftol": 0.0}, False, ("wolfe", 0.0)),
    ],
)
def test_the_search_is_one_for_its_objective_and_allows_for_the_rounding_of_the_parameters(
    dtype: torch.dtype, fields: dict[str, Any], bends: bool, searched: tuple[str, float]
) -> None:
    options = db.Sandblaster(**fields).options(dtype, bends)
    assert (options.search, options.smallest_decrease) == searched


def test_searches_of_different_objectives_or_batches_are_told_apart() -> None:
    each: list[dict[str, Any]] = [
        {}, {"l1": 0.1}, {"l2": 0.1}, {"bounds": (0.0, None)}, {"batch": 64}, {"batch": 32},
        {"batch": 64, "overlap": 0.5},
    ]  # fmt: skip
    assert len({db.Sandblaster(**fields).work(640, 16, 2, 0).objective for fields in each}) == len(each)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).double()


def normalising() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()


class Noisy(nn.Module):
    """Adds noise that no layer announces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def summed(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="sum")


def unknown_option(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"weight_decay": 0.1}


def bounded_weights(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"low": 0.0} if name == "0.weight" else {}


def rewarded_weights(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"l2": -1.0} if name == "0.weight" else {}


def empty_interval(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"low": 0.4, "high": 0.3} if name == "0.weight" else {}


def no_number(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    return {"low": None} if name == "0.weight" else {}


def nothing() -> TensorDataset:
    return TensorDataset(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": dropping}, r"layer 1 \(Dropout\) drops states at random"),
        ({"model": normalising}, r"layer 1 \(BatchNorm1d\) uses the statistics of each mini-batch"),
        ({"model": Noisy}, r"the same examples differs by .* from call to call"),
        ({"model": Counting}, r"changes the buffer calls"),
        ({"loss": summed}, r"loss of .* examples .* not their mean"),
        ({"loss": summed, "cluster": {"engine": "local", "partitions": 2}}, r"loss of .* examples .* not their mean"),
        ({"groups": unknown_option}, r"0\.weight weight_decay, which Sandblaster has not"),
        ({"algorithm": {"bounds": (0.0, 1.0)}}, r"\d+ of the 20 .* of 0\.weight lie outside its bounds, 0 to 1"),
        ({"groups": rewarded_weights}, r"gives 0\.weight l2=-1\.0\nhint: give numbers: l2 and l1 of 0 or more"),
        ({"groups": empty_interval}, r"gives 0\.weight high=0\.3, low=0\.4\nhint: .* low that is not above high"),
        ({"groups": no_number}, r"gives 0\.weight low=None\nhint: give numbers"),
        ({"groups": bounded_weights, "algorithm": {"l1": 0.1}}, r"0\.weight has l1=0\.1 and bounds"),
        ({"data": nothing}, r"data, which has 0|empty"),
        ({"cluster": {"shards": 40}}, r"cannot cut 39 parameters into 40 shards"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_any_role_starts(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match=message):
        trained(job(tmp_path / "run", **fields))
    assert not list(tmp_path.glob("run/checkpoints/*"))


class Remembering(nn.Module):
    """Keeps a buffer that nothing has filled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES).double()
        self.register_buffer("last", torch.full((3,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_buffer_of_nan_that_computing_leaves_alone_is_no_obstacle(tmp_path: Path) -> None:
    result, _ = trained(job(tmp_path / "run", model=Remembering, algorithm={"max_iterations": 2}))
    assert result.model.state_dict()["last"].isnan().all()


class Product(nn.Module):
    """A linear layer for sparse examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FEATURES, CLASSES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x, self.weight) if x.is_sparse else x @ self.weight


def sparse_points() -> TensorDataset:
    inputs, targets = points().tensors
    return TensorDataset(inputs.to_sparse(), targets)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_sparse_examples_lead_where_the_same_ones_lead_that_are_dense(micro_batch: int | None, tmp_path: Path) -> None:
    algorithm = {"micro_batch": micro_batch, "max_iterations": 3}
    ends = [
        trained(job(tmp_path / data.__name__, model=Product, data=data, algorithm=algorithm))[0].model.state_dict()[
            "weight"
        ]
        for data in (points, sparse_points)
    ]
    assert torch.allclose(*ends)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is multiplied."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.factor * gradient, None


def wrong(factor: float, output: Tensor, target: Tensor) -> Tensor:
    return Scaled.apply(nn.functional.cross_entropy(output, target), factor)


@pytest.mark.parametrize("factor", [-1.0, 0.1, 50.0])
def test_a_gradient_that_does_not_belong_to_the_loss_is_refused(factor: float, tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match=r"along its gradient the loss changes by .* do not belong"):
        trained(job(tmp_path / "run", loss=functools.partial(wrong, factor)))


def frozen_statistics() -> nn.Module:
    model = normalising()
    model.eval()
    return model


def test_layers_that_the_user_has_put_into_eval_mode_stay_in_it(tmp_path: Path) -> None:
    result, heard = trained(job(tmp_path / "run", model=frozen_statistics))
    assert of_kind(heard, RoleStarted)
    assert torch.equal(result.model.state_dict()["1.num_batches_tracked"], torch.tensor(0))


def test_bounds_hold_and_parameters_of_one_dimension_are_not_penalised(tmp_path: Path) -> None:
    bounded, _ = trained(
        job(
            tmp_path / "bounded", groups=bounded_weights, model=functools.partial(positive, net),
            algorithm={"max_iterations": 40},
        )
    )  # fmt: skip
    weight = bounded.model.state_dict()["0.weight"]
    assert float(weight.min()) == 0.0
    assert float(bounded.model.state_dict()["2.weight"].min()) < 0
    sparse, _ = trained(job(tmp_path / "sparse", algorithm={"max_iterations": 100, "l1": 0.3}))
    state = sparse.model.state_dict()
    assert not state["0.weight"].any()
    assert state["2.bias"].all()


def positive(build: Any) -> nn.Module:
    model: nn.Module = build()
    with torch.no_grad():
        model.get_parameter("0.weight").abs_()
    return model


def test_a_run_does_not_go_on_with_other_data_or_a_shorter_history(tmp_path: Path) -> None:
    first = job(tmp_path / "run", algorithm={"max_iterations": 8})
    trained(first)
    before = {path: path.read_bytes() for path in first.run.rglob("*") if path.is_file()}
    more = dataclasses.replace(first.algorithm, max_iterations=20)
    with pytest.raises(db.CheckpointError, match="a batch of 60 examples, the job has 59"):
        trained(dataclasses.replace(first, algorithm=more, data=fewer), resume=tmp_path / "run")
    with pytest.raises(db.CheckpointError, match=r"history of \d+ pairs, the job keeps 2"):
        trained(dataclasses.replace(first, algorithm=dataclasses.replace(more, history=2)), resume=tmp_path / "run")
    assert {path: path.read_bytes() for path in first.run.rglob("*") if path.is_file()} == before


def test_the_penalties_are_told_with_the_algorithm(tmp_path: Path) -> None:
    algorithm = {"max_iterations": 1, "history": 3, "l1": 0.125, "l2": 0.25}
    result, _ = trained(job(tmp_path / "run", algorithm=algorithm))
    assert result.summary.algorithm == "Sandblaster L-BFGS, 3 pairs, l1 0.125, l2 0.25"


def test_a_history_that_a_refused_resume_names_is_the_shortest_that_goes_on(tmp_path: Path) -> None:
    first = job(tmp_path / "run", algorithm={"max_iterations": 6})
    trained(first)
    with pytest.raises(db.CheckpointError) as refused:
        trained(with_history(first, 2), resume=tmp_path / "run")
    named = re.search(
        r"history of (\d+) pairs.*\nhint: resume with Sandblaster\(history=\1\) or more", str(refused.value)
    )
    assert named
    with pytest.raises(db.CheckpointError, match=named[0][:20]):
        trained(with_history(first, int(named[1]) - 1), resume=tmp_path / "run")
    result, _ = trained(with_history(first, int(named[1])), resume=tmp_path / "run")
    assert result.summary.batch.iterations == 8


def with_history(first: db.Job, history: int) -> db.Job:
    return dataclasses.replace(first, algorithm=dataclasses.replace(first.algorithm, max_iterations=8, history=history))


def fewer() -> TensorDataset:
    inputs, targets = points().tensors
    return TensorDataset(inputs[:59], targets[:59])
