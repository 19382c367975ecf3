# SPDX-License-Identifier: Apache-2.0
"""Laws of the line searches: published numbers of trials, the Wolfe conditions, what is not finite, plain data."""

import math
from collections.abc import Callable

import msgspec
import pytest
from functions import ALONG, Along
from hypothesis import given
from hypothesis import strategies as some

from distbelief.line_search import MAX_TRIALS, Backtracking, MoreThuente, Outcome

Search = MoreThuente | Backtracking


def follow(search: Search, measure: Along, *, restore: bool = False) -> tuple[Outcome, Search, list[float]]:
    """Search to the end; the trials, and the search as it ended. `restore` reads it from JSON after every call."""
    outcome: Outcome = "try"
    trials = []
    while outcome == "try":
        trials.append(search.t)
        outcome = search.next(*measure(search.t))
        if restore:
            search = msgspec.json.decode(msgspec.json.encode(search), type=Search)
    return outcome, search, trials


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("number", range(6))
def test_the_six_functions_take_the_published_trials_also_when_restored_after_each(number: int, first: int) -> None:
    along, c1, c2, published = ALONG[number]
    t = (1e-3, 0.1, 10.0, 1e3)[first]
    loss, slope = along(0.0)
    outcome, search, trials = follow(MoreThuente.begin(loss, slope, t, c1=c1, c2=c2, eps=0.0), along)
    again = follow(MoreThuente.begin(loss, slope, t, c1=c1, c2=c2, eps=0.0), along, restore=True)
    assert outcome == "accept"
    assert len(trials) == published[first]
    assert again == (outcome, search, trials)
    reached, flatness = along(search.t)
    assert reached <= loss + c1 * search.t * slope
    assert abs(flatness) <= c2 * abs(slope)


@given(some.lists(some.floats(-3, 3), min_size=3, max_size=3), some.floats(1e-3, 1e3))
def test_on_a_quartic_an_accepted_step_meets_the_wolfe_conditions(coefficients: list[float], t: float) -> None:
    a, b, c = coefficients

    def quartic(t: float) -> tuple[float, float]:
        return -t + a * t**2 + b * t**3 + (0.1 + abs(c)) * t**4, -1 + 2 * a * t + 3 * b * t**2 + 4 * (
            0.1 + abs(c)
        ) * t**3

    outcome, search, trials = follow(MoreThuente.begin(0.0, -1.0, t, eps=0.0), quartic)
    loss, slope = quartic(search.t)
    assert outcome == "accept"
    assert len(trials) <= MAX_TRIALS
    assert loss <= -1e-4 * search.t
    assert abs(slope) <= 0.9


@pytest.mark.parametrize("wall", [3e-4, 0.011, 0.3, 0.99])
def test_a_trial_that_is_not_finite_shortens_the_step_and_that_far_is_never_gone_again(wall: float) -> None:
    def walled(t: float) -> tuple[float, float]:
        # Falls ever more steeply towards the wall, so that the search wants to go on.
        return (math.nan, math.nan) if t >= wall else (-t - (t / wall) ** 2 * wall, -1 - 2 * t / wall)

    _, search, trials = follow(MoreThuente.begin(0.0, -1.0, 1.0), walled)
    beyond = [number for number, t in enumerate(trials) if t >= wall]
    assert beyond
    assert all(later < trials[number] for number in beyond for later in trials[number + 1 :])
    assert search.decreased
    assert 0 < search.best.t < wall


@pytest.mark.parametrize("search", [MoreThuente.begin(1.0, -1.0, 1.0), Backtracking(1.0, 1.0)])
def test_a_loss_that_is_never_finite_fails_after_twenty_trials_and_says_so(search: Search) -> None:
    outcome, ended, trials = follow(search, lambda t: (math.inf, 0.0))
    assert (outcome, ended.t, len(trials)) == ("fail", 0.0, MAX_TRIALS)
    assert trials == sorted(trials, reverse=True)
    assert "not finite at any of 20 trial points" in ended.failure


def rounded(t: float) -> tuple[float, float]:
    """A parabola whose loss has lost its digits: minimum at 1, where it differs from the start by 1e-8 of the loss."""
    exact = 1.0 + 1e-8 * ((t - 1) ** 2 - 1)
    return round(exact * 2**23) / 2**23, 2e-8 * (t - 1)


def test_where_the_loss_has_lost_its_digits_the_slopes_decide() -> None:
    loss, slope = rounded(0.0)
    outcome, search, trials = follow(MoreThuente.begin(loss, slope, 1.0), rounded)
    assert (outcome, search.t, len(trials)) == ("accept", 1.0, 1)
    strict, _, trials = follow(MoreThuente.begin(loss, slope, 1.0, eps=0.0), rounded)
    assert strict == "fail"
    assert len(trials) > 1


def test_no_trial_is_made_where_the_search_began() -> None:
    search, outcome = MoreThuente.begin(1.0, -1.0, 1.0), "try"
    while outcome == "try":
        assert search.t > 0
        outcome = search.next(2.0, 1.0)  # wherever one goes
    assert (outcome, search.t, search.decreased) == ("fail", 0.0, False)


def test_a_gradient_of_the_wrong_sign_fails_and_is_named() -> None:
    outcome, search, trials = follow(MoreThuente.begin(1.0, -2.0, 1.0), lambda t: ((1 + t) ** 2, -2 * (1 + t)))
    assert (outcome, search.decreased) == ("fail", False)
    assert len(trials) <= MAX_TRIALS
    assert "do not belong together (a wrong sign" in search.failure


@pytest.mark.parametrize("search", [MoreThuente.begin(1.0, -1.0, 1.0), Backtracking(1.0, 1.0)])
def test_a_lower_loss_whose_gradient_is_not_finite_shortens_the_step_too(search: Search) -> None:
    assert search.next(0.5, math.nan) == "try"
    assert (search.not_finite, search.decreased) == (1, False)
    assert search.t < 1.0


@pytest.mark.parametrize(("slope", "blamed"), [(-0.6, True), (-0.4, False)])
def test_a_rise_is_laid_to_the_gradient_where_that_is_alike_at_both_ends(slope: float, blamed: bool) -> None:
    """Else the step may be too long for what it promises."""
    outcome, search, _ = follow(MoreThuente.begin(1.0, -1.0, 1.0), lambda t: (2.0, slope))
    assert outcome == "fail"
    assert ("do not belong together" in search.failure) == blamed


def test_a_search_that_met_what_is_not_finite_and_no_lower_loss_says_both() -> None:
    wall = lambda t: (2.0, 1.0) if t < 0.3 else (math.nan, math.nan)  # noqa: E731
    _, search, trials = follow(MoreThuente.begin(1.0, -1.0, 1.0), wall)
    assert f"not finite at 1 of {len(trials)} trial points, and at the others" in search.failure


def test_a_loss_that_cannot_be_lowered_any_more_is_not_blamed_on_the_gradient() -> None:
    _, search, _ = follow(MoreThuente.begin(1.0, -1e-12, 1.0), lambda t: (1.0 if t < 1e-6 else 1.0 + 1e-13, -1e-12))
    assert not search.decreased
    assert "limit of its precision" in search.failure


def descent(function: Callable[[float], float]) -> Along:
    """For backtracking: the loss, and what it would change by if it were linear with slope -1."""
    return lambda t: (function(t), -t)


def test_backtracking_halves_until_the_loss_has_decreased_enough() -> None:
    along = descent(lambda t: 3.0 - t + 5 * t**2)
    for restore in (False, True):
        outcome, _, trials = follow(Backtracking(3.0, 1.0), along, restore=restore)
        assert outcome == "accept"
        assert trials == [1.0, 0.5, 0.25, 0.125]


def test_backtracking_shortens_what_is_not_finite_and_names_a_gradient_of_the_wrong_sign() -> None:
    along = descent(lambda t: math.nan if t > 0.3 else 3.0 - t)
    assert follow(Backtracking(3.0, 1.0), along)[2] == [1.0, 0.5, 0.25]
    outcome, search, trials = follow(Backtracking(3.0, 1.0), descent(lambda t: 3.0 + t))
    assert (outcome, search.t, len(trials)) == ("fail", 0.0, MAX_TRIALS)
    assert "a wrong sign" in search.failure


def test_backtracking_never_accepts_a_step_that_goes_nowhere() -> None:
    assert follow(Backtracking(3.0, 1.0), lambda t: (3.0, 0.0))[0] == "fail"


def test_backtracking_does_not_blame_the_gradient_for_what_it_promises_below_the_rounding_of_the_loss() -> None:
    search = Backtracking(2.4, 1.0, rounding=1e-15)
    while search.next(2.4 + 2.9e-12, -6.8e-18 * search.t) != "fail":
        pass
    assert "limit of its precision" in search.failure
    search = Backtracking(2.4, 1.0, rounding=1e-15)
    while search.next(2.4 + 0.1 * search.t, -0.1 * search.t) != "fail":
        pass
    assert "do not belong together" in search.failure


def test_backtracking_forgives_the_rounding_of_a_loss_and_blames_the_gradient_for_more_than_ten_of_it() -> None:
    rounding = 1e-7
    assert Backtracking(1.0, 1.0, rounding).next(1.0 + 0.9 * rounding, -1e-9) == "accept"
    assert Backtracking(1.0, 1.0).next(1.0 + 0.9 * rounding, -1e-9) == "try"
    for risen, blamed in ((5.0, False), (20.0, True)):
        _, search, _ = follow(Backtracking(1.0, 1.0, rounding), lambda t, risen=risen: (1.0 + risen * rounding, -1e-6))
        assert ("do not belong together" in search.failure) == blamed
