# SPDX-License-Identifier: Apache-2.0
"""Laws of the solver: what it reaches and at what cost, beside others; what it says of bad input; that it goes on."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from functions import MINIMA, Problem
from minimise import Objective, Sandblaster, one_bundle
from scipy.optimize import minimize
from torch import Tensor

from distbelief.lbfgs import Command, Gram, Options, Solver, SolverState, Step, Stop
from distbelief.penalty import Penalty

torch.manual_seed(0)
INPUTS = torch.randn(200, 30, dtype=torch.float64)
LABELS = (INPUTS @ torch.randn(30, dtype=torch.float64) + torch.randn(200) > 0).double()
ZERO = torch.zeros(30, dtype=torch.float64)


def logistic(x: Tensor) -> Tensor:
    """The mean loss of logistic regression, without penalty."""
    return torch.nn.functional.binary_cross_entropy_with_logits(INPUTS.to(x.dtype) @ x, LABELS.to(x.dtype))


def damped(x: Tensor) -> Tensor:
    return logistic(x) + 5e-4 * x @ x


def tight(**chosen: Any) -> Options:
    """Only the gradient ends the job."""
    return Options(**{"gtol": 1e-8, "ftol": 0.0, "max_iterations": 3000, **chosen})


def minimised(function: Callable[[Tensor], Tensor], start: Tensor, **chosen: Any) -> tuple[Sandblaster, Stop]:
    run = Sandblaster(one_bundle(function), start, tight(**chosen))
    return run, run.run()


# beside others


def of_torch(problem: Problem) -> tuple[float, int, int]:
    x, calls = problem.x.requires_grad_(True), 0
    optimizer = torch.optim.LBFGS(
        [x], max_iter=3000, max_eval=10**6, tolerance_grad=1e-8, tolerance_change=0, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        value = problem.function(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)
    return problem.function(x.detach()).item(), optimizer.state[x]["n_iter"], calls


def of_scipy(
    function: Callable[[Tensor], Tensor], start: Tensor, bounds: tuple[float, float] | None = None
) -> tuple[float, int, int, Tensor]:
    objective = one_bundle(function)

    def both(x: "np.ndarray[Any, np.dtype[np.float64]]") -> tuple[float, "np.ndarray[Any, np.dtype[np.float64]]"]:
        value, gradient = objective(torch.from_numpy(x), 0)
        return value, gradient.numpy()

    found = minimize(
        both, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds and [bounds] * len(start),
        options={"maxcor": 10, "ftol": 0, "gtol": 1e-8, "maxiter": 3000, "maxfun": 10**6},
    )  # fmt: skip
    return found.fun, found.nit, found.nfev, torch.from_numpy(found.x)


@pytest.mark.parametrize("name", MINIMA)
def test_iterations_and_evaluations_are_within_a_tenth_of_the_nearer_of_scipy_and_torch_or_below_both(
    name: str,
) -> None:
    problem = MINIMA[name]
    run, stop = minimised(problem.function, problem.x)
    others = of_torch(problem), of_scipy(problem.function, problem.x)[:3]
    best = min(value for value, _, _ in others)
    assert stop.converged, stop.reason
    assert "largest gradient" in stop.reason
    assert run.solver.loss == pytest.approx(best, rel=1e-8, abs=1e-8)
    if problem.minimum is not None:
        assert run.solver.loss == pytest.approx(problem.minimum, rel=1e-4, abs=1e-8)
    assert run.seals == run.solver.evaluations, "one round trip for each"
    for own, counts in (
        (run.solver.iteration, [iterations for _, iterations, _ in others]),
        (run.solver.evaluations, [evaluations for _, _, evaluations in others]),
    ):
        assert own < min(counts) or min(abs(own - count) / count for count in counts) <= 0.1, counts


class Always(msgspec.Struct, tag="MoreThuente"):
    """In place of a search: the first trial is accepted, whatever it gives."""

    t: float
    decreased: bool = False

    def next(self, loss: float, slope: float) -> str:
        return "accept"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_iterates_of_a_fixed_step_are_those_of_torch(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(solver: Solver) -> list[Command]:
        # torch takes the step min(1, 1/|g|_1) first and lr afterwards.
        first = min(1.0, 1.0 / gradients[-1].abs().sum().item())
        solver.state.search = Always(1.0 if solver.state.history.pairs else first)  # type: ignore[assignment]
        return solver._evaluate(solver.state.search.t)  # type: ignore[union-attr]

    def slow(x: Tensor) -> Tensor:
        # Scales from 1 to 10, and times 1000: after 40 iterations the pairs still pass torch's s.y > 1e-10.
        return 1000 * damped(x * torch.linspace(1, 10, len(x), dtype=x.dtype))

    gradients: list[Tensor] = []
    plain = one_bundle(slow)

    def recorded(x: Tensor, bundle: int) -> tuple[float, Tensor]:
        loss, gradient = plain(x, bundle)
        gradients.append(gradient)
        return loss, gradient

    monkeypatch.setattr(Solver, "_search", search)
    start = ZERO.to(dtype)
    points: list[Tensor] = []
    options = Options(gtol=0.0, ftol=-math.inf, max_iterations=40)
    run = Sandblaster(recorded, start, options, observe=lambda run, _: points.append(run.point))
    run.run()
    x = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([x], lr=1.0, max_iter=1, history_size=10, tolerance_grad=0, tolerance_change=0)
    worst = 0.0
    for point in [*points[2:], run.point]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = slow(x)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)
        worst = max(worst, (point - x.detach()).abs().max().item())
    assert len(points) == 41
    assert worst <= tolerance
    assert all(run.solver.state.history.gram[i][10 + i] > 1e-10 for i in range(10))
