# SPDX-License-Identifier: Apache-2.0
"""Training losses as replicas report them, and whether training gives back what it has won.

A rate that one replica bears may be too high for many: their gradients are older, and taking turns they add momentum to
whatever the update rule has (Mitliagkas et al., 2016). The job then ends like any other, with a model that has learnt
less; so the loss itself is watched.
"""

import math
from typing import final

import msgspec

from distbelief.events import LossRose

WINDOW_MINI_BATCHES = 30
WINDOW_SHARE = 0.01
"""Means are taken over this share of the job's examples, and no fewer mini-batches than the above."""
GIVEN_BACK = 0.5
"""A rise counts from this share of what was won, the difference between the first mean and the lowest: less is often
won again, such as what is lost when the number of replicas doubles or the rate is raised."""
STANDARD_ERRORS = 8.0
"""And from so many standard errors: of a hundred means the lowest and the highest may be 5 apart by chance."""
RESOLUTION = 1e-6
"""Losses are rounded to float32 or less: what differs by a smaller share of their size is taken to differ by this."""


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
        variance = self.squares / self.examples - self.mean**2
        return math.sqrt(max((RESOLUTION * self.mean) ** 2, variance) / self.mini_batches)


@final
class Trend:
    """Compares the mean of each window of training losses with the lowest before it; `total_examples` of the job."""

    def __init__(self, total_examples: int) -> None:
        self._least_examples = WINDOW_SHARE * total_examples
        self._window = Losses()
        self._first: Losses | None = None
        self._lowest: Losses | None = None
        self._at_work = 0
        """The most since the lowest."""
        self._told = False

    def rise(self, losses: Losses, at_work: int, examples: int) -> LossRose | None:
        """Take in what a replica reports while so many are at work, with `examples` settled; a rise is told once."""
        self._window, self._at_work = self._window.plus(losses), max(self._at_work, at_work)
        window = self._window
        if window.mini_batches < WINDOW_MINI_BATCHES or window.examples < self._least_examples:
            return None
        self._window = Losses()
        if not math.isfinite(window.squares):
            return None
        if self._first is None:
            self._first = window
        if self._lowest is None or window.mean < self._lowest.mean:
            self._lowest, self._at_work = window, 0
        risen, won = window.mean - self._lowest.mean, self._first.mean - self._lowest.mean
        chance = STANDARD_ERRORS * math.hypot(window.error, self._lowest.error)
        if self._told or self._at_work <= 1 or risen <= max(GIVEN_BACK * won, chance):
            return None
        self._told = True
        return LossRose(lowest=self._lowest.mean, loss=window.mean, replicas=self._at_work, examples=examples)
