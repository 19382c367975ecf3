# SPDX-License-Identifier: Apache-2.0
"""Laws of the solver: what it reaches and at what cost, beside others; what it says of bad input."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from distbelief.history import History
from distbelief.lbfgs import Command, Options, Solver, Stop
from distbelief.penalty import Penalty
from tests.functions import MINIMA, Problem
from tests.minimise import Objective, Sandblaster, one_bundle

torch.manual_seed(0)
INPUTS = torch.randn(200, 30, dtype=torch.float64)
LABELS = (INPUTS @ torch.randn(30, dtype=torch.float64) + torch.randn(200) > 0).double()
FLOOR = 1e-6
"""Of a gradient in float32: some roundings of its largest terms."""
ZERO = torch.zeros(30, dtype=torch.float64)


def logistic(x: Tensor) -> Tensor:
    """The mean loss of logistic regression, without penalty."""
    return torch.nn.functional.binary_cross_entropy_with_logits(INPUTS.to(x.dtype) @ x, LABELS.to(x.dtype))


def damped(x: Tensor) -> Tensor:
    return logistic(x) + 5e-4 * x @ x


def tight(**chosen: Any) -> Options:
    """Only the gradient ends the job."""
    return Options(**{"gtol": 1e-8, "ftol": -math.inf, "max_iterations": 3000, **chosen})


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
    assert (run.seals, run.grams) == (run.solver.evaluations, 0), "one round trip for each, and no other"
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
        # Scales from 1 to 6, and times 1000: after 40 iterations the pairs still pass torch's s.y > 1e-10.
        weights = x * torch.linspace(1, 6, len(x), dtype=x.dtype)
        return 1000 * (logistic(weights) + 5e-3 * weights @ weights)

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


# penalties and bounds


def penalised(penalty: Penalty, sections: int = 3, **chosen: Any) -> tuple[Sandblaster, Stop]:
    run = Sandblaster(
        one_bundle(logistic),
        ZERO,
        tight(search="backtracking" if penalty.bends else "wolfe", **chosen),
        sections,
        penalty=penalty,
    )
    return run, run.run()


def test_l1_is_the_optimum_of_proximal_gradients_with_the_same_zeros() -> None:
    weight = 0.03
    run, stop = penalised(Penalty(0, 0, l1=weight), sections=4)
    objective = one_bundle(logistic)
    step = 4 * len(INPUTS) / float(torch.linalg.matrix_norm(INPUTS, 2) ** 2)
    x, ahead, momentum = ZERO, ZERO, 1.0
    for _ in range(1000):
        v = ahead - step * objective(ahead, 0)[1]
        new = v.sign() * (v.abs() - step * weight).clamp(min=0)
        following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        ahead, x, momentum = new + (momentum - 1) / following * (new - x), new, following
    assert stop.converged, stop.reason
    assert 5 < int((x == 0).sum()) < 25
    assert torch.equal(run.point == 0, x == 0)
    torch.testing.assert_close(run.point, x, rtol=1e-6, atol=1e-6)
    assert run.solver.loss == pytest.approx(objective(x, 0)[0] + weight * x.abs().sum().item(), rel=1e-12)
    assert run.solver.evaluations <= 40


def test_bounds_give_the_optimum_of_scipy_at_about_its_cost() -> None:
    low, high = -0.3, 0.4
    run, stop = penalised(Penalty(0, 0, low=low, high=high), sections=4)
    value, _, evaluations, x = of_scipy(logistic, ZERO, (low, high))
    active = (x <= low) | (x >= high)
    assert stop.converged, stop.reason
    assert 5 < int(active.sum()) < 25
    assert torch.equal((run.point <= low) | (run.point >= high), active)
    assert run.solver.loss == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(run.point, x, rtol=1e-6, atol=1e-6)
    assert run.solver.evaluations <= 1.2 * evaluations


def test_l2_is_ridge_regression_in_closed_form() -> None:
    def squares(x: Tensor) -> Tensor:
        return (INPUTS @ x - LABELS).square().mean() / 2

    run = Sandblaster(one_bundle(squares), ZERO, tight(), penalty=Penalty(0, 0, l2=0.7))
    assert run.run().converged
    left = INPUTS.T @ INPUTS / len(INPUTS) + 0.7 * torch.eye(len(ZERO))
    ridge = torch.linalg.solve(left, INPUTS.T @ LABELS / len(INPUTS))
    torch.testing.assert_close(run.point, ridge, rtol=1e-7, atol=1e-8)
    assert run.solver.loss == pytest.approx((squares(ridge) + 0.35 * ridge @ ridge).item(), rel=1e-12)


# scales and precisions


@pytest.mark.parametrize("name", ["rosenbrock", "powell", "wood", "kowalik osborne"])
def test_the_scale_of_the_loss_changes_the_evaluations_by_no_more_than_a_fifth(name: str) -> None:
    problem = MINIMA[name]
    plain, _ = minimised(problem.function, problem.x)
    for scale in (1e-9, 1e-4, 1e4, 1e9):

        def scaled(x: Tensor, scale: float = scale) -> Tensor:
            return scale * problem.function(x)

        run, stop = minimised(scaled, problem.x, gtol=1e-8 * scale)
        assert stop.converged, stop.reason
        assert run.solver.evaluations == pytest.approx(plain.solver.evaluations, rel=0.2)


def test_a_pair_is_kept_where_the_product_of_the_squared_lengths_has_no_number() -> None:
    s, y, p = [1e200, 9e199, 0.0], [9e199, 1e200, 0.0], [0.0, 0.0, 1.0]
    history, slot = History().accept([s, y, p], 10, 1e-12)
    assert slot == 0
    assert history.curved


@pytest.mark.parametrize("name", ["rosenbrock", "powell", "wood", "kowalik osborne"])
def test_a_history_in_bfloat16_takes_at_most_half_more_evaluations(name: str) -> None:
    problem = MINIMA[name]
    plain, _ = minimised(problem.function, problem.x)
    run = Sandblaster(one_bundle(problem.function), problem.x, tight(), history_dtype=torch.bfloat16)
    assert run.run().converged
    assert run.solver.loss == pytest.approx(plain.solver.loss, rel=1e-6, abs=1e-10)
    assert run.solver.evaluations <= 1.5 * plain.solver.evaluations


@pytest.mark.parametrize("function", [damped, MINIMA["beale"].function])
def test_float32_reaches_the_floor_of_its_gradient_and_no_search_fails(function: Callable[[Tensor], Tensor]) -> None:
    start = ZERO if function is damped else MINIMA["beale"].x
    double, _ = minimised(function, start)
    run, stop = minimised(function, start.float(), gtol=FLOOR, single=True)
    assert stop.converged, stop.reason
    # Judged in float64, to which the gradient of the last point adds its own rounding.
    assert one_bundle(function)(run.point.double(), 0)[1].abs().max().item() <= 2 * FLOOR
    assert run.solver.evaluations <= 1.5 * double.solver.evaluations
    assert all(step.commit for step in run.steps[1:]), "no history was dropped"


# bad input


def spoilt(how: Callable[[int, Tensor, float, Tensor], tuple[float, Tensor]]) -> Objective:
    """The damped logistic regression with the results of its calls, numbered from 1, made wrong."""
    plain, calls = one_bundle(damped), 0

    def objective(x: Tensor, bundle: int) -> tuple[float, Tensor]:
        nonlocal calls
        calls += 1
        return how(calls, x, *plain(x, bundle))

    return objective


NAN = math.nan


def test_a_loss_that_is_nan_for_some_trials_only_shortens_the_steps() -> None:
    run = Sandblaster(spoilt(lambda call, x, loss, g: (NAN, g) if call in (2, 3, 7) else (loss, g)), ZERO, tight())
    plain, _ = minimised(damped, ZERO)
    stop = run.run()
    assert stop.converged, stop.reason
    assert run.solver.loss == pytest.approx(plain.solver.loss, rel=1e-10)
    assert run.solver.evaluations <= 2 * plain.solver.evaluations


@pytest.mark.parametrize("penalty", [None, Penalty(0, 0, l1=0.01)])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_stays_nan_ends_with_that_reason_at_the_last_good_point(
    broken: str, penalty: Penalty | None
) -> None:
    def never(call: int, x: Tensor, loss: float, g: Tensor) -> tuple[float, Tensor]:
        return (loss, g) if call <= 6 else (NAN, g) if broken == "loss" else (loss, g.where(g != g[4], NAN))

    steps: list[tuple[int, Tensor]] = []
    run = Sandblaster(
        spoilt(never), ZERO, tight(search="wolfe" if penalty is None else "backtracking"), penalty=penalty,
        observe=lambda run, _: steps.append((run.solver.iteration, run.point)),
    )  # fmt: skip
    stop = run.run()
    assert (stop.converged, "not finite at any of 20 trial points" in stop.reason) == (False, True)
    last, point = steps[-1]
    assert last == run.solver.iteration
    assert torch.equal(run.point, point)
    assert run.solver.evaluations == 6 + 2 * 20, "twenty along the direction, twenty along steepest descent"
    assert run.point.isfinite().all()


def test_decreases_of_a_loss_far_below_one_are_small_by_their_size_not_by_their_share() -> None:
    small = one_bundle(lambda x: 1e-12 * MINIMA["wood"].function(x))
    run = Sandblaster(small, MINIMA["wood"].x, Options(gtol=0.0))
    assert run.run().reason == "3 iterations in a row lowered the loss by no more than 1e-09 max(|loss|, 1)"
    assert run.solver.loss > 1e-12


def test_a_start_that_is_not_finite_ends_at_once() -> None:
    run = Sandblaster(spoilt(lambda call, x, loss, g: (math.inf, g)), ZERO, tight())
    assert run.run() == Stop("the loss (inf) or its gradient is not finite at the starting point", False)
    assert run.solver.evaluations == 1


WRONG: dict[str, Callable[[int, Tensor, float, Tensor], tuple[float, Tensor]]] = {
    "sign": lambda call, x, loss, g: (loss, -g),
    "sign of most entries": lambda call, x, loss, g: (loss, torch.cat([g[:5], -g[5:]])),
    "another function": lambda call, x, loss, g: (loss, g + 0.5),
    "a loss that changes": lambda call, x, loss, g: (loss + 0.1 * math.sin(13 * call), g),
}


@pytest.mark.parametrize("search", ["wolfe", "backtracking"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_gradient_that_does_not_belong_to_the_loss_is_named_as_that(wrong: str, search: str) -> None:
    stop = Sandblaster(spoilt(WRONG[wrong]), ZERO, tight(search=search)).run()
    assert not stop.converged
    assert "they do not belong together (a wrong sign, another scale, or a loss that is not the same" in stop.reason
