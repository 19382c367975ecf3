# SPDX-License-Identifier: Apache-2.0
"""Laws of `minimize`, against SciPy, closed forms and scikit-learn."""

import dataclasses
import functools
import math
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor
from torch.utils.data import Dataset

import distbelief as db
from distbelief import cli
from distbelief.report import read_summary

SIMULATED = db.Cluster(replicas=2, shards=2, engine="simulated")
PRECISE = db.Sandblaster(gtol=1e-9, ftol=0.0, max_iterations=500, micro_batch=16)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def squares(x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = portion
    return (inputs @ x - targets).square().sum() / 2


def named_squares(x: dict[str, Tensor], portion: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = portion
    return (inputs @ x["slope"] + x["offset"] - targets).square().sum() / 2


def regression(examples: int = 100, features: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    return inputs, inputs @ torch.arange(features).double() + torch.randn(examples, generator=generator).double()


def test_a_function_without_data_is_minimised_as_scipy_does() -> None:
    start = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)
    found = db.minimize(rosenbrock, start, algorithm=PRECISE, cluster=db.Cluster(replicas=1, engine="simulated"))

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        loss = rosenbrock(point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), gradient.numpy()

    reference = scipy_minimize(value, start.numpy(), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 0.0})
    assert found.value == pytest.approx(reference.fun, abs=1e-12)
    torch.testing.assert_close(found.parameters, torch.from_numpy(reference.x), rtol=1e-6, atol=1e-8)
    assert found.converged
    assert found.gradient_norm <= 1e-9
    assert found.iterations <= 1.25 * reference.nit
    assert torch.equal(start, torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)), "the start is copied"


def far_from_zero(x: Tensor) -> Tensor:
    return 1e6 + rosenbrock(x)


def test_without_ftol_the_limit_of_precision_is_no_convergence() -> None:
    """As SciPy has it; a decrease of nothing is none that ftol=0.0 asked for."""
    algorithm, one = dataclasses.replace(PRECISE, gtol=1e-12), db.Cluster(replicas=1, engine="simulated")
    found = db.minimize(far_from_zero, torch.full((4,), 1.5, dtype=torch.float64), algorithm=algorithm, cluster=one)
    assert not found.converged
    assert "precision" in found.reason


@pytest.mark.parametrize("l2", [0.0, 3.0])
def test_a_sum_over_data_with_l2_is_ridge_regression(l2: float) -> None:
    inputs, targets = regression()
    algorithm = db.Sandblaster(gtol=1e-8, ftol=0.0, l2=l2, micro_batch=16)
    found = db.minimize(
        squares, torch.zeros(8, dtype=torch.float64), data=(inputs, targets), algorithm=algorithm, cluster=SIMULATED
    )
    exact = torch.linalg.solve(inputs.T @ inputs + l2 * torch.eye(8), inputs.T @ targets)
    torch.testing.assert_close(found.parameters, exact, rtol=1e-8, atol=1e-8)
    value = squares(exact, (inputs, targets)) + l2 / 2 * exact.square().sum()
    assert found.value == pytest.approx(float(value), rel=1e-10)


def test_l1_leaves_the_zeros_and_the_optimum_of_the_lasso() -> None:
    inputs, targets = regression()
    l1 = 60.0
    found = db.minimize(
        squares, torch.zeros(8, dtype=torch.float64), data=(inputs, targets),
        algorithm=db.Sandblaster(gtol=1e-7, ftol=0.0, l1=l1, micro_batch=16), cluster=SIMULATED,
    )  # fmt: skip
    x = torch.zeros(8, dtype=torch.float64)
    step = 1 / float(torch.linalg.matrix_norm(inputs, 2)) ** 2
    for _ in range(5000):  # proximal gradient
        x = x - step * (inputs.T @ (inputs @ x - targets))
        x = x.sign() * (x.abs() - step * l1).clamp(min=0)
    torch.testing.assert_close(found.parameters, x, rtol=1e-6, atol=1e-8)
    assert int((x == 0).sum()) > 0
    assert torch.equal(found.parameters == 0, x == 0)


def test_bounds_are_those_of_scipy() -> None:
    inputs, targets = regression()
    found = db.minimize(
        squares, torch.ones(8, dtype=torch.float64), data=(inputs, targets),
        algorithm=db.Sandblaster(gtol=1e-7, ftol=0.0, bounds=(0.5, 4.0), micro_batch=16), cluster=SIMULATED,
    )  # fmt: skip
    a, b = inputs.numpy(), targets.numpy()
    reference = scipy_minimize(
        lambda x: (0.5 * ((a @ x - b) ** 2).sum(), a.T @ (a @ x - b)), np.ones(8), jac=True, method="L-BFGS-B",
        bounds=[(0.5, 4.0)] * 8, options={"gtol": 1e-9, "ftol": 0.0},
    )  # fmt: skip
    torch.testing.assert_close(found.parameters, torch.from_numpy(reference.x), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_named_parameters_come_back_by_name_from_real_processes(tmp_path: Path) -> None:
    inputs, targets = regression()
    start = {"slope": torch.zeros(8, dtype=torch.float64), "offset": torch.zeros((), dtype=torch.float64)}
    found = db.minimize(
        named_squares, start, data=(inputs, targets), algorithm=PRECISE, cluster=db.Cluster(replicas=2, shards=2),
        run=tmp_path / "run",
    )  # fmt: skip
    design = torch.cat([inputs, torch.ones(100, 1)], 1)
    exact = torch.linalg.lstsq(design, targets[:, None]).solution[:, 0]
    assert found.parameters.keys() == start.keys()
    torch.testing.assert_close(found.parameters["slope"], exact[:8], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.parameters["offset"], exact[8], rtol=1e-7, atol=1e-8)
    assert (tmp_path / "run" / "summary.json").exists()


def test_tensors_of_different_lengths_and_empty_data_are_refused() -> None:
    with pytest.raises(db.ConfigurationError, match="tensors of 3 and 4 examples"):
        db.minimize(squares, torch.zeros(2), data=(torch.zeros(4, 2), torch.zeros(3)))
    with pytest.raises(db.ConfigurationError, match="empty"):
        db.minimize(squares, torch.zeros(2), data=(torch.zeros(0, 2), torch.zeros(0)))


def mean_of_squares(x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    return squares(x, portion) / len(portion[0])


def test_a_function_that_is_no_sum_over_the_portion_is_refused() -> None:
    with pytest.raises(db.ConfigurationError, match="it is not their mean"):
        db.minimize(
            mean_of_squares, torch.ones(8, dtype=torch.float64), data=regression(), cluster=SIMULATED,
            algorithm=PRECISE,
        )  # fmt: skip


def test_what_is_no_sum_or_no_starting_point_is_refused_in_words_of_minimize() -> None:
    data = (torch.randn(64, 3), torch.randn(64))
    for function, start, said in (
        (residuals, torch.zeros(3), r"the function returned \[64\], not a scalar\nhint: return the sum"),
        (residuals, [0.0, 0.0, 0.0], r"minimize\(parameters=...\) is a list\nhint: "),
        (residuals, torch.zeros(3, dtype=torch.int64), "the starting point of minimize is of torch.int64\nhint: "),
        (residuals, {"a": 1.0}, "the starting point a is of float\nhint: "),
    ):
        with pytest.raises(db.ConfigurationError, match=said):
            db.minimize(function, start, data=data)  # type: ignore[arg-type]
    with pytest.raises(db.ConfigurationError, match=r"minimize\(algorithm=...\) is a Downpour"):
        db.minimize(residuals, torch.zeros(3), data=data, algorithm=db.Downpour())  # type: ignore[arg-type]


def residuals(x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    return (portion[0] @ x - portion[1]).square()


def test_the_scale_of_the_data_does_not_change_the_point() -> None:
    found = [
        db.minimize(
            functools.partial(scaled_squares, scale), torch.zeros(8, dtype=torch.float64), data=regression(),
            algorithm=db.Sandblaster(gtol=1e-9 * scale, ftol=0.0, micro_batch=16), cluster=SIMULATED,
        ).parameters
        for scale in (1.0, 1e-6, 1e6)
    ]  # fmt: skip
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-8)


def scaled_squares(scale: float, x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    return scale * squares(x, portion)


@pytest.mark.parametrize(("fields", "said"), [({"gtol": 1e-3}, "within 0.001"), ({"target": 60.0}, "target 60")])
def test_the_reason_speaks_of_the_sum_that_is_minimised(fields: dict[str, float], said: str) -> None:
    """Not of its mean over the examples, of which the caller knows nothing."""
    found = db.minimize(
        squares, torch.zeros(8, dtype=torch.float64), data=regression(), cluster=SIMULATED,
        algorithm=db.Sandblaster(**{"gtol": 0.0, "ftol": 0.0, "micro_batch": 16} | fields),
    )  # fmt: skip
    assert found.converged
    assert found.reason.endswith(said)
    assert (f"{found.gradient_norm:.1e}" if "gtol" in fields else f"{found.value:.6g}") in found.reason


def quartics(x: Tensor, portion: Tensor) -> Tensor:
    return (x - portion).pow(4).sum()


def test_a_decrease_is_measured_by_the_sum_however_many_examples_it_is_of() -> None:
    """As in SciPy: what is small beside the number of examples alone is no reason to stop."""
    start, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2000, 2, dtype=torch.float64)
    found = db.minimize(quartics, start, data=ones, algorithm=db.Sandblaster(gtol=0.0), cluster=SIMULATED)
    assert "no more than 1e-09 max(|loss|, 1)" in found.reason
    assert found.value < 1e-8


def helical_valley(x: Tensor) -> Tensor:
    turns = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return 100 * ((x[2] - 10 * turns) ** 2 + (x[:2].norm() - 1) ** 2) + x[2] ** 2


def distance(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, -x).sum() + x.square().sum()


@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [(helical_valley, [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]), (distance, [0.0, 0.0], [0.0, 0.0])],
)
def test_a_start_on_a_kink_is_no_gradient_that_does_not_belong_to_the_loss(
    function: Any, start: list[float], minimum: list[float]
) -> None:
    """More, Garbow and Hillstrom begin where the angle jumps: the gradient is that of one side."""
    found = db.minimize(function, torch.tensor(start, dtype=torch.float64), algorithm=PRECISE, cluster=SIMULATED)
    torch.testing.assert_close(found.parameters, torch.tensor(minimum, dtype=torch.float64), atol=1e-6, rtol=0)


def test_messages_name_parameters_as_they_were_given() -> None:
    two = torch.zeros(2, dtype=torch.float64)
    for start, name in ((two, "x"), ({"slope": two}, "slope")):
        with pytest.raises(db.ConfigurationError, match=f"initial values of {name} lie outside its bounds, 1 to 2"):
            db.minimize(rosenbrock, start, algorithm=db.Sandblaster(bounds=(1.0, 2.0)), cluster=SIMULATED)


def line(x: dict[str, Tensor], portion: tuple[Tensor, Tensor]) -> Tensor:
    slope, intercept = x.values()
    return (slope * portion[0] + intercept - portion[1]).square().sum()


def test_parameters_in_a_dict_keep_their_order_and_have_names_without_dots() -> None:
    places = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    start = {"slope": zero, "intercept": zero}
    found = db.minimize(line, start, data=(places, 3.0 * places - 7.0), cluster=SIMULATED)
    assert list(found.parameters) == ["slope", "intercept"]
    assert found.parameters["slope"].item() == pytest.approx(3.0, abs=1e-4)
    assert found.parameters["intercept"].item() == pytest.approx(-7.0, abs=1e-4)
    with pytest.raises(db.ConfigurationError, match=r"has a key 'a\.b'\nhint: name parameters"):
        db.minimize(line, {"a.b": zero}, data=places)


def test_the_random_numbers_of_the_caller_go_on_as_they_would_have() -> None:
    drawn = []
    for trains in (False, True):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if trains:
            db.minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), cluster=SIMULATED)
        drawn.append((torch.rand(2).tolist(), np.random.random(), random.random()))
    assert drawn[0] == drawn[1]


def hanging(x: Tensor, portion: tuple[Tensor, Tensor]) -> Tensor:
    time.sleep(0.3)
    return squares(x, portion)


def test_a_run_that_was_interrupted_goes_on_by_resume(tmp_path: Path) -> None:
    short = dataclasses.replace(PRECISE, max_iterations=3)
    data, start = regression(), torch.zeros(8, dtype=torch.float64)
    first = db.minimize(squares, start, data=data, cluster=SIMULATED, algorithm=short, run=tmp_path / "run")
    again = db.minimize(squares, start, data=data, cluster=SIMULATED, algorithm=PRECISE, resume=tmp_path / "run")
    whole = db.minimize(squares, start, data=data, cluster=SIMULATED, algorithm=PRECISE)
    assert (first.iterations, first.converged, again.converged) == (3, False, True)
    assert again.iterations == whole.iterations
    torch.testing.assert_close(again.parameters, whole.parameters, rtol=1e-9, atol=1e-11)
    offered = read_summary(tmp_path / "run" / "summary.json").resume_command
    assert offered == f"distbelief.minimize(..., resume='{tmp_path / 'run'}')"


def test_what_a_run_offers_is_the_call_that_goes_on_and_one_that_is_not_kept_offers_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data, start = regression(), torch.zeros(8, dtype=torch.float64)
    db.minimize(squares, start, data=data, cluster=SIMULATED, algorithm=PRECISE, run=run, view=True)
    assert f"resume with   distbelief.minimize(..., resume='{run}')" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli._command(["resume", str(run)])
    assert f"hint: call distbelief.minimize(..., resume='{run}')" in capsys.readouterr().err
    db.minimize(squares, start, data=data, cluster=SIMULATED, algorithm=PRECISE, view=True)
    assert "resume with   not possible: no checkpoint is kept" in capsys.readouterr().out
    with pytest.raises(db.ConfigurationError, match="names two folders"):
        db.minimize(squares, start, data=data, run=run, resume=run)


@pytest.mark.slow
def test_interrupted_before_anything_is_known_it_returns_where_it_began(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = torch.ones(8, dtype=torch.float64)

    def once_started() -> None:
        until = time.monotonic() + 100
        while time.monotonic() < until:
            if (run / "events.jsonl").exists() and "JobStarted" in (run / "events.jsonl").read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=once_started)
    thread.start()
    found = db.minimize(hanging, start, data=regression(), cluster=db.Cluster(replicas=1), algorithm=PRECISE, run=run)
    thread.join()
    assert (found.reason, found.converged, found.iterations) == ("stopped by SIGINT", False, 0)
    assert math.isnan(found.value)
    assert math.isnan(found.gradient_norm)
    assert torch.equal(found.parameters, start)


def overflowing(x: Tensor) -> Tensor:
    return 1e300 * x.square().sum()


def test_a_start_whose_gradient_overflows_is_returned_with_the_reason() -> None:
    found = db.minimize(overflowing, torch.ones(3, dtype=torch.float64), cluster=SIMULATED)
    assert "not finite at the starting point" in found.reason
    assert math.isnan(found.value)


class Named(Dataset[dict[str, Tensor]]):
    """Examples that are dicts."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = regression()
        return {"inputs": inputs[index], "targets": targets[index]}


def squares_of_dicts(x: Tensor, portion: dict[str, Tensor]) -> Tensor:
    return squares(x, (portion["inputs"], portion["targets"]))


def test_portions_may_be_dicts() -> None:
    start = torch.zeros(8, dtype=torch.float64)
    found = db.minimize(squares_of_dicts, start, data=Named(), cluster=SIMULATED, algorithm=PRECISE)
    whole = db.minimize(squares, start, data=regression(), cluster=SIMULATED, algorithm=PRECISE)
    assert (found.reason, found.iterations) == (whole.reason, whole.iterations)
    torch.testing.assert_close(found.parameters, whole.parameters, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"parameters": {"keys": torch.zeros(2)}},
            r"has a key 'keys'\nhint: name parameters by strings without dots, and",
        ),
        ({"parameters": {"training": torch.zeros(2)}}, r"has a key 'training'"),
        ({"parameters": {"": torch.zeros(2)}}, r"has a key ''"),
        ({"parameters": {}}, r"minimize\(parameters=...\) is empty"),
        ({"parameters": torch.zeros(0)}, r"minimize\(parameters=...\) is empty"),
        (
            {"parameters": {"a": torch.zeros(2), "b": torch.zeros(2).double()}},
            r"has tensors of torch.float32 and torch.float64\nhint: give all of them one dtype",
        ),
        ({"data": (np.zeros((4, 2)),)}, r"is a tuple of ndarray\nhint: give a tensor, such as torch.from_numpy"),
        ({"data": {"a": torch.zeros(4)}}, r"minimize\(data=...\) is a dict of tensors"),
        ({"data": torch.tensor(3.0)}, r"minimize\(data=...\) is a Tensor of single numbers"),
        ({"cluster": db.Cluster(partitions=2)}, r"has 2 partitions, and a function cannot be cut"),
    ],
)
def test_what_cannot_be_minimised_is_refused_in_its_own_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(db.ConfigurationError, match=message):
        db.minimize(squares, **({"parameters": torch.zeros(2), "data": regression(10, 2)} | fields))


def of_words(x: Tensor, portion: list[str]) -> Tensor:
    return x.square().sum() * len(portion)


def test_a_portion_that_does_not_tell_its_number_of_examples_is_refused() -> None:
    with pytest.raises(
        db.DistbeliefError, match=r"a portion of minimize\(data=...\) is \(str, str\), in which no tensor"
    ):
        db.minimize(of_words, torch.ones(2), data=["one", "two"], cluster=SIMULATED)


def of_numbers(x: Tensor, portion: Tensor) -> Tensor:
    return (x - portion.unsqueeze(1)).square().sum()


def test_a_list_of_numbers_is_a_data_set() -> None:
    found = db.minimize(of_numbers, torch.zeros(2).double(), data=list(np.arange(5.0)), cluster=SIMULATED)
    assert found.parameters.tolist() == pytest.approx([2.0, 2.0])


class Numbers(list[float]):
    """A data set that can be called, too."""

    def __call__(self) -> list[float]:
        return [100.0]


@pytest.mark.parametrize("data", [lambda: [1.0, 3.0], Numbers([1.0, 3.0])])
def test_data_are_a_data_set_or_the_function_that_makes_it(data: Any) -> None:
    found = db.minimize(of_numbers, torch.zeros(2).double(), data=data, cluster=SIMULATED)
    assert found.parameters.tolist() == pytest.approx([2.0, 2.0])


def test_groups_free_a_parameter_of_a_penalty_and_a_start_may_be_the_result_of_a_computation() -> None:
    begin = 2 * torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = db.minimize(
        lambda x: ((x["free"] - 1).square() + (x["held"] - 1).square()).sum() / 2, {"free": begin, "held": begin},
        algorithm=db.Sandblaster(l2=1.0, gtol=1e-9), cluster=SIMULATED,
        groups=lambda name, parameter: {"l2": 0.0} if name == "free" else {},
    )  # fmt: skip
    assert {name: float(value) for name, value in found.parameters.items()} == pytest.approx({"free": 1.0, "held": 0.5})


def surprise(x: Tensor, portion: Tensor) -> Tensor:
    """Defined for x > 0 only, and raises elsewhere."""
    return -torch.distributions.Normal(0.0, x[0]).log_prob(portion).sum()


def test_a_function_that_raises_somewhere_else_than_where_it_begins_is_minimised() -> None:
    data = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    algorithm = db.Sandblaster(micro_batch=20, gtol=1e-8)
    found = db.minimize(surprise, torch.full((4,), 0.05).double(), data=data, cluster=SIMULATED, algorithm=algorithm)
    assert float(found.parameters[0]) == pytest.approx(float(data.square().mean().sqrt()), rel=1e-5)
