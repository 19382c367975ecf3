# SPDX-License-Identifier: Apache-2.0
"""Laws of what interrupts the solver: a restore anywhere, sections that lost vectors, limits that are raised."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from distbelief.lbfgs import Command, Evaluate, Gram, Options, Solver, SolverState, Step, Stop
from distbelief.penalty import Penalty
from distbelief.sealed import Sealed, add
from tests.functions import MINIMA
from tests.minimise import Sandblaster, one_bundle

WOOD = MINIMA["wood"]
TIGHT = Options(gtol=1e-8, ftol=-math.inf)
Saved = tuple[bytes, Tensor, dict[str, Tensor]]


def wood(options: Options, observe: Callable[[Sandblaster, Command], None] = lambda run, command: None) -> Sandblaster:
    return Sandblaster(one_bundle(WOOD.function), WOOD.x, options, observe=observe)


def save(run: Sandblaster) -> Saved:
    """The state as JSON, the point, and the vectors of all sections."""
    parts = [basis.vectors() for basis in run.bases]
    vectors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return msgspec.json.encode(run.solver.state), run.point, vectors


def restore(saved: Saved, like: Sandblaster, sections: int) -> Sandblaster:
    """Another run, cut differently, that goes on from what was saved."""
    state, point, vectors = saved
    run = Sandblaster(
        like.objective, point, like.options, sections, penalty=like.penalty,
        state=msgspec.json.decode(state, type=SolverState),
    )  # fmt: skip
    for basis, span in zip(run.bases, run.spans, strict=True):
        basis.load({name: vector[span.start : span.stop] for name, vector in vectors.items()})
    return run


@pytest.mark.parametrize("penalty", [None, Penalty(0, 0, l1=0.5), Penalty(0, 0, l2=0.1, low=-2.0, high=0.9)])
def test_a_restore_before_any_evaluation_goes_on_bit_for_bit_also_in_the_middle_of_a_search(
    penalty: Penalty | None,
) -> None:
    saved: list[Saved] = []
    search: Literal["wolfe", "backtracking"] = "backtracking" if penalty is not None and penalty.bends else "wolfe"
    options = replace(TIGHT, search=search, max_iterations=25, history=3)
    run = Sandblaster(
        one_bundle(WOOD.function), WOOD.x, options, penalty=penalty, observe=lambda run, _: saved.append(save(run))
    )
    stop = run.run()
    searches = [msgspec.json.decode(state, type=SolverState).search for state, _, _ in saved]
    assert any(search is not None and search.trials > 0 for search in searches), "some are in the middle of a search"
    for one in saved:
        again = restore(one, run, 3)
        assert again.run() == stop
        assert torch.equal(again.point, run.point)
        assert msgspec.json.encode(again.solver.state) == msgspec.json.encode(run.solver.state)


def damaged(damage: Callable[[Sandblaster], None], times: int) -> tuple[Sandblaster, Stop, list[str]]:
    """A run whose sections are damaged before so many evaluations from iteration 20 on; what was asked then."""
    asked: list[str] = []

    def observe(run: Sandblaster, command: Command) -> None:
        if run.solver.iteration >= 20:
            asked.append(type(command).__name__ if run.solver.state.history.pairs else "Evaluate without pairs")
            if isinstance(command, Evaluate) and asked.count("Evaluate") <= times:
                damage(run)

    run = wood(TIGHT, observe)
    return run, run.run(), asked


def lose_direction(run: Sandblaster) -> None:
    """As a section that was restored and was not given its step again."""
    run.bases[1].step(Step(False, 0.0, None, (), (0.0,)))


def lose_pairs(run: Sandblaster) -> None:
    """The section has its gradient, but its steps are those of other slots; its direction is formed of them."""
    basis, slots = run.bases[1], run.solver.state.history.pairs
    vectors = {name: vector.clone() for name, vector in basis.vectors().items()}
    for slot, other in zip(slots, slots[1:] + slots[:1], strict=True):
        vectors[f"s{slot}"] = -1e3 * basis.vectors()[f"s{other}"].clone()
    basis.load(vectors)
    assert run.solver.state.last is not None
    basis.step(msgspec.structs.replace(run.solver.state.last, commit=False, slot=None))


def test_a_lost_direction_is_noticed_and_formed_again_with_inner_products_measured_anew() -> None:
    whole, _, _ = damaged(lose_direction, 0)
    run, stop, asked = damaged(lose_direction, 1)
    assert asked[:3] == ["Evaluate", "Gram", "Evaluate"]
    assert stop.converged
    assert run.solver.loss == pytest.approx(whole.solver.loss, abs=1e-12)
    assert run.solver.evaluations <= 1.2 * whole.solver.evaluations


def test_directions_that_are_lost_again_and_again_cost_no_history_where_a_point_was_accepted_in_between() -> None:
    lost: list[int] = []

    def now_and_then(run: Sandblaster, command: Command) -> None:
        if isinstance(command, Evaluate) and run.solver.iteration in (20, 25) and run.solver.iteration not in lost:
            lost.append(run.solver.iteration)
            lose_direction(run)
        if len(lost) == 2:
            assert run.solver.state.history.pairs

    run = wood(TIGHT, now_and_then)
    assert run.run().converged
    assert (lost, run.grams) == ([20, 25], 2)


def test_pairs_that_are_mixed_up_are_noticed_and_the_history_is_dropped() -> None:
    run, stop, asked = damaged(lose_pairs, 1)
    assert asked[:3] == ["Evaluate", "Gram", "Evaluate without pairs"]
    assert stop.converged
    assert run.solver.loss < 1e-12


def test_a_section_that_loses_its_direction_every_time_ends_the_run_and_is_named() -> None:
    def always(run: Sandblaster, command: Command) -> None:
        if run.solver.iteration >= 20 and isinstance(command, Evaluate):
            lose_direction(run)

    run = wood(TIGHT, always)
    before = run.run()
    assert before == Stop("the direction in the sections is not the one that was ordered", False)
    assert (run.solver.iteration, run.grams) == (20, 1)
    assert run.solver.evaluations <= 30


def test_rounding_in_the_inner_products_of_the_pairs_is_gone_after_five_histories_without_a_question_more() -> None:
    every, began, after = 5 * TIGHT.history, [], []

    def disturb(run: Sandblaster, command: Command) -> None:
        state = run.solver.state
        pairs = len(state.history.pairs)
        if isinstance(command, Evaluate) and state.iteration == every and not began:
            began.append(command.whole)
            gram = state.history.gram.copy()
            gram[: 2 * pairs, : 2 * pairs] *= 1 + 1e-3
            state.history = type(state.history)(state.history.pairs, gram.tobytes())
        elif isinstance(command, Evaluate) and state.iteration > every and not after:
            measured = add([basis.gram(state.history.pairs) for basis in run.bases])
            after.append(abs(state.history.gram - np.array(measured)).max() / abs(np.array(measured)).max())

    run = wood(TIGHT, disturb)
    assert run.run().converged
    assert (began, run.grams) == ([True], 0)
    assert after[0] < 1e-12


@pytest.mark.parametrize(
    ("limits", "raised", "reason"),
    [
        ({"max_iterations": 30}, {"max_iterations": 1000}, "the limit of 30 iterations"),
        ({"gtol": 1.0}, {"gtol": 1e-8}, "is within 1"),
        ({"target": 1.0}, {"target": None}, "has reached the target 1"),
    ],
)
def test_with_a_limit_that_was_raised_a_run_goes_on_as_if_it_had_not_stopped(
    limits: dict[str, float], raised: dict[str, float], reason: str
) -> None:
    whole = wood(TIGHT)
    whole.run()
    run = wood(replace(TIGHT, **limits))
    stop = run.run()
    assert reason in stop.reason
    run.solver = Solver(run.options, run.solver.state)
    assert run.run(resume=True) == stop, "the reason is still there"
    run.solver = Solver(replace(TIGHT, **raised), run.solver.state)
    assert run.run(resume=True).converged
    assert torch.equal(run.point, whole.point)
    assert run.solver.evaluations == whole.solver.evaluations + 2, "each start computes the point once"


def test_with_more_evaluations_a_run_goes_on_from_its_last_accepted_point() -> None:
    run = wood(replace(TIGHT, max_evaluations=40))
    assert run.run().reason == "the limit of 40 evaluations was reached"
    assert run.solver.evaluations == 40
    reached = run.solver.loss
    run.solver = Solver(TIGHT, run.solver.state)
    assert run.run(resume=True).converged
    assert run.solver.loss < reached


def test_an_evaluation_given_up_as_not_finite_is_one_that_was_measured_as_nan() -> None:
    plain = one_bundle(WOOD.function)

    def measured(x: Tensor, bundle: int) -> tuple[float, Tensor]:
        loss, gradient = plain(x, bundle)
        return (loss if (one.seals + 1) % 7 else math.nan), gradient

    def given_up(asked: Evaluate) -> list[Command]:
        if (other.seals + 1) % 7:
            return evaluate(asked)
        other.seals += 1
        return other.solver.tell_not_finite()

    one, other = Sandblaster(measured, WOOD.x, TIGHT), wood(TIGHT)
    evaluate = other.evaluate
    other.evaluate = given_up  # type: ignore[method-assign]
    assert one.run() == other.run()
    assert torch.equal(one.point, other.point)
    assert one.solver.state == other.solver.state
    assert one.solver.state.largest_gradient <= 1e-8


@pytest.mark.parametrize(
    ("single", "before", "now", "penalty", "finite", "same"),
    [
        (False, 2.0, 2.0 * (1 + 1e-9), 0.0, True, True), (False, 2.0, 2.0 * (1 + 1e-7), 0.0, True, False),
        (True, 2.0, 2.0 * (1 + 1e-5), 0.0, True, True), (True, 2.0, 2.0 * (1 + 1e-3), 0.0, True, False),
        (False, 1e-20, 3e-20, 0.0, True, True), (False, 2.0, math.nan, 0.0, True, False),
        (False, 2.0, 1.5, 0.5, True, True), (False, 2.0, 2.0, 0.0, False, False),
    ],
)  # fmt: skip
def test_a_search_goes_on_where_its_loss_differs_by_rounding_and_else_begins_anew_and_counts_on(
    single: bool, before: float, now: float, penalty: float, finite: bool, same: bool
) -> None:
    run = wood(replace(TIGHT, max_iterations=3))
    run.run()
    solver = Solver(replace(TIGHT, max_iterations=5, single=single), run.solver.state)
    solver.state.loss, evaluations = before, solver.evaluations
    assert solver.resume()[-1] == Evaluate(0.0, solver.state.history.pairs)
    assert (math.isnan(solver.loss), math.isnan(solver.gradient_norm), solver.begins) == (True, True, True)
    assert solver.stopped is None
    solver.tell(now, Sealed([], 0.0, 0.0, 0.0, 0.0, 0.0, penalty, finite))
    assert solver.iteration == (3 if same else 0)
    assert solver.evaluations == evaluations + 1
    assert solver.begins == (not same)


class Failed:
    """A search that has found a lower loss than where it began, at `t`, and goes no further."""

    decreased = True

    def __init__(self, t: float) -> None:
        self.t = t

    def next(self, loss: float, measure: float) -> str:
        return "fail"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_of_a_search_that_fails_the_best_trial_is_taken_and_computed_again_only_if_it_is_not_the_last(
    share: float,
) -> None:
    run = wood(replace(TIGHT, max_iterations=3))
    run.run()
    solver = Solver(replace(TIGHT, max_iterations=5), run.solver.state)
    solver.resume()
    state = solver.state
    asked = solver.tell(state.loss, Sealed([], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True))[-1]
    assert isinstance(asked, Evaluate)
    best, size = share * asked.t, 2 * len(state.history.pairs) + 3
    state.search = Failed(best)  # type: ignore[assignment]
    sealed = Sealed([[0.0] * size] * 3, 0.0, state.slope, 0.0, 1.0, 0.0, 0.0, True)
    commands = solver.tell(state.loss, sealed)
    if best != asked.t:
        assert isinstance(commands[-1], Evaluate)
        assert (commands[-1].t, state.search) == (best, None)
        commands = solver.tell(state.loss, sealed)
    assert isinstance(commands[0], Step)
    assert (commands[0].commit, commands[0].t, solver.iteration) == (True, best, 4)


def test_a_start_whose_gradient_is_not_finite_is_none_though_its_loss_is() -> None:
    solver = Solver(TIGHT)
    solver.begin()
    (stop,) = solver.tell(1.0, Sealed([[math.inf] * 3] * 3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False))
    assert isinstance(stop, Stop)
    assert "or its gradient is not finite at the starting point" in stop.reason


def test_answers_to_what_was_not_asked_are_refused() -> None:
    with pytest.raises(ValueError, match="inner products were told, but Evaluate"):
        Solver(TIGHT).told_gram([[0.0]])
    solver = Solver(TIGHT, SolverState(asked=Gram(())))
    with pytest.raises(ValueError, match="an evaluation was told, but Gram"):
        solver.tell_not_finite()
