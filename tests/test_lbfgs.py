# SPDX-License-Identifier: Apache-2.0
"""Laws of the solver and of the sections' vectors together, against SciPy, torch, the textbook and closed forms."""

import copy
import dataclasses
import re
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from distbelief.basis import Basis
from distbelief.lbfgs import Command, Evaluate, Options, Solver, SolverState, Step, Stop
from distbelief.penalty import Penalty
from tests.functions import MINIMA, Problem
from tests.minimise import Sandblaster, one_bundle

EXACT = Options(history=10, max_iterations=5000, gtol=1e-8, ftol=0.0)


def scipy_counts(problem: Problem) -> tuple[int, int, float]:
    """(iterations, evaluations, value)."""

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        loss = problem.function(point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), gradient.numpy()

    options = {"maxcor": 10, "gtol": 1e-8, "ftol": 0.0, "maxiter": 5000, "maxfun": 20_000}
    found = minimize(value, problem.x.numpy(), jac=True, method="L-BFGS-B", options=options)
    return found.nit, found.nfev, float(found.fun)


def torch_counts(problem: Problem) -> tuple[int, int, float]:
    x = problem.x.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=5000, max_eval=20_000, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-8,
        tolerance_change=0.0,
    )  # fmt: skip
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer.state[x]["n_iter"], calls, problem.function(x).item()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("powell", "broyden 1000") else name for name in MINIMA],
)
def test_it_takes_no_more_iterations_and_evaluations_than_scipy_and_torch(name: str) -> None:
    problem = MINIMA[name]
    run = Sandblaster(one_bundle(problem.function), problem.x, EXACT)
    run.run()
    scipy, torch_ = scipy_counts(problem), torch_counts(problem)
    # Evaluations are what costs: within a tenth of the better one's. Iterations: of the one or the other.
    assert run.solver.evaluations <= 1.1 * min(scipy[1], torch_[1])
    assert run.solver.iteration <= 1.1 * max(scipy[0], torch_[0])
    assert run.solver.loss == pytest.approx(min(scipy[2], torch_[2]), rel=1e-8, abs=1e-10)
    if problem.minimum is not None:
        assert run.solver.loss == pytest.approx(problem.minimum, rel=1e-5, abs=1e-10)
    assert run.seals == run.solver.evaluations, "one round trip each"


def two_loop(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor, history: int) -> Tensor:
    """The textbook recursion (Nocedal, 1980) on whole vectors."""
    q, kept, alphas = gradient.clone(), pairs[-history:], []
    for s, y in reversed(kept):
        alphas.append(s @ q / (s @ y))
        q -= alphas[-1] * y
    if kept:
        s, y = kept[-1]
        q *= s @ y / (y @ y)
    for (s, y), alpha in zip(kept, reversed(alphas), strict=True):
        q += (alpha - y @ q / (s @ y)) * s
    return -q


@pytest.mark.parametrize(("history", "sections"), [(1, 1), (2, 3), (10, 1), (10, 7), (40, 2), (10, 50)])
def test_the_direction_is_that_of_the_two_loop_recursion(history: int, sections: int) -> None:
    problem = Problem(MINIMA["rosenbrock"].function, [-1.2, 1.0] * 20, 0.0)
    pairs: list[tuple[Tensor, Tensor]] = []
    last: list[Tensor] = []
    errors: list[float] = []

    def observe(run: Sandblaster, command: Command) -> None:
        if not isinstance(command, Evaluate | Stop) or not run.steps or (last and torch.equal(last[0], run.point)):
            return
        gradient, direction = (torch.cat([getattr(basis, name) for basis in run.bases]) for name in ("_g", "_d"))
        if last:
            s, y = run.point - last[0], gradient - last[1]
            if s @ y > 1e-12 * s.norm() * y.norm():
                pairs.append((s, y))
        last[:] = [run.point.clone(), gradient]
        expected = two_loop(pairs, gradient, history)
        errors.append(float((direction - expected).norm() / expected.norm()))

    options = dataclasses.replace(EXACT, history=history, max_iterations=60, gtol=1e-4)
    run = Sandblaster(one_bundle(problem.function), problem.x, options, sections=sections, observe=observe)
    run.run()
    assert len(errors) > 20
    assert max(errors) < 1e-9


@pytest.mark.parametrize("name", ["wood", "kowalik osborne", "beale"])
def test_a_search_that_is_written_down_and_read_again_goes_on_bit_for_bit(name: str) -> None:
    problem = MINIMA[name]
    plain = Sandblaster(one_bundle(problem.function), problem.x, EXACT, sections=2)
    plain.run()

    def interrupt(run: Sandblaster, command: Command) -> None:
        """Between any two questions: another solver and other sections take over."""
        if not isinstance(command, Evaluate) or run.solver.state.last is None:
            return
        state = msgspec.json.decode(msgspec.json.encode(run.solver.state), type=SolverState)
        run.solver = Solver(run.options, state)
        for place, (basis, x) in enumerate(zip(run.bases, run.x, strict=True)):
            fresh = Basis(x, run.options.history)
            fresh.load({vector: values.clone() for vector, values in basis.vectors().items()})
            run.bases[place] = fresh
        (again, asked) = run.solver.begin()
        assert isinstance(again, Step)
        assert asked == command
        for basis in run.bases:
            basis.step(again)

    disturbed = Sandblaster(one_bundle(problem.function), problem.x, EXACT, sections=2, observe=interrupt)
    disturbed.run()
    assert torch.equal(disturbed.point, plain.point)
    assert disturbed.seals == plain.seals


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
def test_the_scale_of_the_objective_changes_hardly_anything(scale: float) -> None:
    problem = MINIMA["wood"]
    plain = Sandblaster(one_bundle(problem.function), problem.x, EXACT)
    plain.run()
    options = dataclasses.replace(EXACT, gtol=1e-8 * scale)
    scaled = Sandblaster(one_bundle(lambda x: scale * problem.function(x)), problem.x, options)
    scaled.run()
    assert scaled.seals == pytest.approx(plain.seals, rel=0.2)
    torch.testing.assert_close(scaled.point, plain.point, rtol=1e-6, atol=1e-6)


def quadratic(x: Tensor) -> Tensor:
    weights = torch.logspace(0, 2, len(x), dtype=x.dtype)
    return (weights * (x - 1) ** 2).sum() / 2


def test_penalties_have_the_minimum_of_the_closed_form() -> None:
    start, weights = torch.zeros(20, dtype=torch.float64), torch.logspace(0, 2, 20, dtype=torch.float64)
    ridge = Sandblaster(one_bundle(quadratic), start, EXACT, penalty=Penalty(0, 0, l2=3.0))
    ridge.run()
    torch.testing.assert_close(ridge.point, weights / (weights + 3), rtol=1e-7, atol=1e-9)
    bending = dataclasses.replace(EXACT, search="backtracking")
    lasso = Sandblaster(one_bundle(quadratic), start, bending, penalty=Penalty(0, 0, l1=3.0))
    lasso.run()
    torch.testing.assert_close(lasso.point, (1 - 3 / weights).clamp(min=0), rtol=1e-6, atol=1e-8)
    bounded = Sandblaster(one_bundle(quadratic), start, bending, penalty=Penalty(0, 0, low=-1.0, high=0.5))
    bounded.run()
    torch.testing.assert_close(bounded.point, torch.full_like(start, 0.5), rtol=0, atol=0)


def test_in_float32_the_floor_of_the_gradient_is_reached_without_a_failed_search() -> None:
    start = torch.zeros(200)
    run = Sandblaster(one_bundle(quadratic), start, Options(gtol=1e-4, ftol=0.0, single=True))
    assert run.run().converged
    assert run.solver.gradient_norm <= 1e-4


@pytest.mark.parametrize("name", ["rosenbrock", "wood"])
def test_a_history_in_bfloat16_costs_at_most_half_as_many_evaluations_more(name: str) -> None:
    problem = MINIMA[name]
    plain = Sandblaster(one_bundle(problem.function), problem.x, EXACT)
    halved = Sandblaster(one_bundle(problem.function), problem.x, EXACT, history_dtype=torch.bfloat16)
    plain.run()
    halved.run()
    assert halved.seals <= 1.5 * plain.seals
    assert halved.solver.loss == pytest.approx(plain.solver.loss, abs=1e-10)


def test_vectors_that_a_section_lost_are_noticed_and_the_search_goes_on_without_them() -> None:
    problem, spoilt = MINIMA["rosenbrock"], []

    def lose(run: Sandblaster, command: Command) -> None:
        if run.solver.iteration == 10 and not spoilt:
            spoilt.append(True)
            run.bases[1]._pairs.zero_()
            run.bases[1]._d.normal_(generator=torch.Generator().manual_seed(0))

    run = Sandblaster(one_bundle(problem.function), problem.x, EXACT, observe=lose)
    stop = run.run()
    assert spoilt
    assert stop.converged
    assert run.solver.loss == pytest.approx(0.0, abs=1e-10)


def nan_beyond(limit: float, function: Any) -> Any:
    def guarded(x: Tensor) -> Tensor:
        value: Tensor = function(x)
        return value if float(x.detach().abs().max()) < limit else value * torch.nan

    return guarded


def test_trials_that_are_not_finite_shorten_the_step_and_end_in_words_where_that_does_not_help() -> None:
    problem = MINIMA["wood"]
    run = Sandblaster(one_bundle(nan_beyond(3.5, problem.function)), problem.x, EXACT)
    assert run.run().converged
    stuck = Sandblaster(one_bundle(only_at(problem)), problem.x, EXACT)
    assert re.search(r"not finite at \d+ of 20 trial points", stuck.run().reason)


def only_at(problem: Problem) -> Any:
    def guarded(x: Tensor) -> Tensor:
        value = problem.function(x)
        return value if torch.equal(x.detach(), problem.x) else value * torch.nan

    return guarded


def test_a_gradient_of_the_wrong_sign_is_called_so() -> None:
    problem = MINIMA["rosenbrock"]

    def wrong(x: Tensor, bundle: int) -> tuple[float, Tensor]:
        value, gradient = one_bundle(problem.function)(x, bundle)
        return value, -gradient

    assert "wrong sign" in Sandblaster(wrong, problem.x, EXACT).run().reason


def test_a_limit_that_was_raised_lets_the_search_go_on_as_if_there_had_been_none() -> None:
    problem = MINIMA["wood"]
    plain = Sandblaster(one_bundle(problem.function), problem.x, EXACT)
    plain.run()
    short = Sandblaster(one_bundle(problem.function), problem.x, dataclasses.replace(EXACT, max_iterations=20))
    assert short.run().reason == "the limit of 20 iterations was reached"
    solver = Solver(EXACT, copy.deepcopy(short.solver.state))
    assert isinstance(solver.resume()[-1], Evaluate)
    again = Solver(dataclasses.replace(EXACT, max_iterations=20), copy.deepcopy(short.solver.state))
    assert isinstance(again.resume()[-1], Stop)
    short.solver, short.options = solver, EXACT
    short.run()
    assert torch.equal(short.point, plain.point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16])
def test_a_section_holds_what_its_docstring_says(dtype: torch.dtype, history_dtype: torch.dtype | None) -> None:
    n, history = 40_000, 7
    basis = Basis(torch.zeros(n, dtype=dtype), history, history_dtype=history_dtype)
    held = sum(each.nbytes for name, each in vars(basis).items() if isinstance(each, Tensor) and name != "_work")
    pair = (history_dtype or dtype).itemsize
    assert held == n * (2 * history * pair + 3 * dtype.itemsize + 8)
