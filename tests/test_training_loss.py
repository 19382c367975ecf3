# SPDX-License-Identifier: Apache-2.0
"""The laws of the watch over the training loss: what counts as a rise, and what does not."""

import functools
import random
from collections.abc import Callable, Iterable

import pytest
import torch

from distbelief.events import LossRose
from distbelief.training_loss import WINDOW_MINI_BATCHES, Losses, Trend

BATCH = 32
SETTLED = 1000


def reported(losses: Iterable[float], examples: int = BATCH) -> Losses:
    """The sums over mini-batches of so many examples with these mean losses."""
    total = Losses()
    for loss in losses:
        total = total.plus(Losses(1, examples, loss * examples, loss * loss * examples))
    return total


def window(mean: float, spread: float = 0.1) -> Losses:
    """A window of mini-batches that differ by `spread` around a mean."""
    return reported([mean - spread, mean + spread] * (WINDOW_MINI_BATCHES // 2))


def told(trend: Trend, means: Iterable[float], at_work: int = 4) -> list[LossRose | None]:
    return [trend.rise(window(mean), at_work, SETTLED) for mean in means]


def rose(lowest: float, loss: float, replicas: int) -> LossRose:
    """To so many digits."""
    return LossRose(lowest=pytest.approx(lowest), loss=pytest.approx(loss), replicas=replicas, examples=SETTLED)


def test_the_mean_weighs_examples_and_its_error_is_that_of_the_mean_of_mini_batches() -> None:
    losses = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 3
    sums = reported(losses.tolist())
    assert (sums.mini_batches, sums.examples) == (50, 50 * BATCH)
    assert sums.mean == pytest.approx(float(losses.mean()), abs=1e-5)
    assert sums.error == pytest.approx(float(losses.std(correction=0)) / 50**0.5, rel=1e-4)
    assert reported([1.0], examples=30).plus(reported([5.0], examples=10)).mean == 2.0


def test_a_rise_of_more_than_half_of_what_was_won_is_told_once() -> None:
    assert told(Trend(0), [2.0, 1.0, 1.45, 1.5]) == [None] * 4
    found = told(Trend(0), [2.0, 1.0, 1.55, 1.0, 1.9])
    assert found[:2] == [None, None]
    assert found[2] == rose(1.0, 1.55, 4)
    assert found[3:] == [None, None]


def test_a_rise_is_judged_alike_whatever_the_losses_are_shifted_and_scaled_by() -> None:
    for change in (lambda loss: loss - 5.0, lambda loss: 1e-6 * loss, lambda loss: 1e6 * loss - 3e6):
        assert _told_at(change, [2.0, 1.0, 1.45]) is None
        assert _told_at(change, [2.0, 1.0, 1.45, 1.55]) == 3


def _told_at(change: Callable[[float], float], means: list[float]) -> int | None:
    trend = Trend(0)
    for position, mean in enumerate(means):
        around = reported(change(mean + spread) for spread in (-0.1, 0.1) for _ in range(WINDOW_MINI_BATCHES // 2))
        if trend.rise(around, 2, SETTLED) is not None:
            return position
    return None


def test_where_one_replica_trains_no_rise_is_told_and_one_that_lasts_is_told_when_others_have_joined() -> None:
    trend = Trend(0)
    assert told(trend, [2.0, 1.0, 3.0], at_work=1) == [None] * 3
    assert told(trend, [3.0]) == [rose(1.0, 3.0, 4)]


def test_a_rise_is_laid_to_the_most_replicas_since_the_lowest_though_some_have_left() -> None:
    trend = Trend(0)
    told(trend, [2.0], at_work=16)
    told(trend, [1.0], at_work=4)
    assert trend.rise(window(3.0, spread=3.0), 8, SETTLED) is None  # it may be chance
    assert trend.rise(reported([3.0]), 2, SETTLED) is None
    assert trend.rise(window(3.0), 1, SETTLED) == rose(1.0, 3.0, 8)


@pytest.mark.parametrize("loss", [0.1, -0.1, 1e-9 / 3, 1e12 / 7])
def test_what_rounding_does_to_a_loss_that_stays_the_same_is_no_rise(loss: float) -> None:
    draws = random.Random(0)
    trend = Trend(0)
    for _ in range(1000):
        mini_batches = [reported([loss], draws.choice([1, 7, BATCH])) for _ in range(draws.randrange(1, 60))]
        assert trend.rise(functools.reduce(Losses.plus, mini_batches), 4, SETTLED) is None


@pytest.mark.parametrize("heavy", [False, True])
def test_what_chance_does_to_a_loss_that_stays_the_same_is_no_rise(heavy: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        draws = torch.rand(100, WINDOW_MINI_BATCHES, generator=generator)
        losses = draws**-0.3 if heavy else draws
        trend = Trend(0)
        assert [trend.rise(reported(each), 16, SETTLED) for each in losses.tolist()] == [None] * 100


def test_a_window_is_a_hundredth_of_the_job_and_at_least_thirty_mini_batches_however_they_are_reported() -> None:
    def windows(total_examples: int, mini_batches: int) -> int | None:
        trend = Trend(total_examples)
        for _ in range(mini_batches):
            trend.rise(reported([1.0]), 2, SETTLED)
        return next((one for one in range(1, 1000) if trend.rise(reported([9.0]), 2, SETTLED)), None)

    assert windows(0, 30) == 30
    assert windows(100 * BATCH * 50, 50) == 50
    assert windows(0, 29) == 31  # the first window has one of the high ones


def test_losses_that_are_not_finite_are_passed_over() -> None:
    trend = Trend(0)
    assert told(trend, [2.0, float("nan"), 1.0, float("inf"), 1.45]) == [None] * 5
    assert told(trend, [1.55]) == [rose(1.0, 1.55, 4)]
