# SPDX-License-Identifier: Apache-2.0
"""Training losses as replicas report them, and whether training gives back what it has won.

A rate that one replica bears may be too high for many: their gradients are older, and taking turns they add momentum to
whatever the update rule has (Mitliagkas et al., 2016). The job then ends like any other, with a model that has learnt
less; so the loss itself is watched.
"""

import math
from typing import NamedTuple, final

import msgspec

WINDOW_MINI_BATCHES = 30
WINDOW_SHARE = 0.01
"""Means are taken over this share of the job's examples, and no fewer mini-batches than the above."""
GIVEN_BACK = 0.25
"""A rise counts from this share of what was won, the difference between the first mean and the lowest."""
STANDARD_ERRORS = 8.0
"""And from so many standard errors: of a hundred means the lowest and the highest may be 5 apart by chance."""


class Losses(msgspec.Struct, array_like=True, frozen=True):
    """Sums over the mean losses of some mini-batches."""

    mini_batches: int = 0
    examples: int = 0
    sum: float = 0.0
    """Of loss times examples."""
    squares: float = 0.0
    """Of loss squared times examples."""

    def plus(self, other: "Losses") -> "Losses":
        """These and other mini-batches."""
        return Losses(
            self.mini_batches + other.mini_batches, self.examples + other.examples,
            self.sum + other.sum, self.squares + other.squares,
        )  # fmt: skip

    @property
    def mean(self) -> float:
        """Per example."""
        return self.sum / self.examples

    @property
    def error(self) -> float:
        """The standard error of the mean, from the differences between mini-batches."""
        return math.sqrt(max(0.0, self.squares / self.examples - self.mean**2) / self.mini_batches)


class Rise(NamedTuple):
    """What has become of the loss."""

    lowest: float
    """The lowest mean of a window so far."""
    loss: float
    """The mean of the latest window."""
    replicas: int
    """The most that were at work in it."""


@final
class Trend:
    """Compares the mean of each window of training losses with the lowest before it; `total_examples` of the job."""

    def __init__(self, total_examples: int) -> None:
        self._least_examples = WINDOW_SHARE * total_examples
        self._window, self._at_work = Losses(), 0
        self._first: Losses | None = None
        self._lowest: Losses | None = None
        self._told = False

    def rise(self, losses: Losses, at_work: int) -> Rise | None:
        """Take in what a replica reports while so many are at work; a rise is told once."""
        self._window, self._at_work = self._window.plus(losses), max(self._at_work, at_work)
        window, most = self._window, self._at_work
        if window.mini_batches < WINDOW_MINI_BATCHES or window.examples < self._least_examples:
            return None
        self._window, self._at_work = Losses(), 0
        if not math.isfinite(window.squares):
            return None
        if self._first is None or self._lowest is None:
            self._first = self._lowest = window
        risen, won = window.mean - self._lowest.mean, self._first.mean - self._lowest.mean
        if risen < 0:
            self._lowest = window
        chance = STANDARD_ERRORS * math.hypot(window.error, self._lowest.error)
        if self._told or most == 1 or risen <= max(GIVEN_BACK * won, chance):
            return None
        self._told = True
        return Rise(self._lowest.mean, window.mean, most)
