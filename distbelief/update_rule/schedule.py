# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: a factor on the rate as a function of the examples that the shard has applied.

Examples, not pushes: the schedule then means the same for any number of replicas, any batch size and any n_push.
Any picklable function from examples to a factor is a schedule; these are the usual ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from distbelief.errors import ConfigurationError

Schedule = Callable[[int], float]
"""Examples applied so far -> what the rate is multiplied by."""
TRIED = 100
"""Numbers of examples for which a schedule is asked before a job starts."""


@final
@dataclass(frozen=True)
class Decay:
    """From 1 down to `end` over the first `to_examples` examples, constant afterwards."""

    to_examples: int
    end: float
    shape: Literal["linear", "cosine"]

    def __post_init__(self) -> None:
        _at_least_one(self.to_examples)

    def __call__(self, examples: int) -> float:
        """The factor after `examples` examples."""
        done = min(1.0, examples / self.to_examples)
        left = 1.0 - done if self.shape == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        return self.end + (1.0 - self.end) * left


@final
@dataclass(frozen=True)
class Warmup:
    """From `start` up to 1 over the first `to_examples` examples; multiplied by `then` all along."""

    to_examples: int
    start: float
    then: Schedule | None

    def __post_init__(self) -> None:
        _at_least_one(self.to_examples)

    def __call__(self, examples: int) -> float:
        """The factor after `examples` examples."""
        rise = self.start + (1.0 - self.start) * min(1.0, examples / self.to_examples)
        return rise if self.then is None else rise * self.then(examples)


def linear_decay(to_examples: int, end: float = 0.0) -> Schedule:
    """The rate falls on a straight line to `end` times itself at `to_examples` examples and stays there."""
    return Decay(to_examples, end, "linear")


def cosine_decay(to_examples: int, end: float = 0.0) -> Schedule:
    """The rate falls on half a cosine wave to `end` times itself at `to_examples` examples and stays there."""
    return Decay(to_examples, end, "cosine")


def warmup(to_examples: int, start: float = 0.1, then: Schedule | None = None) -> Schedule:
    """The rate rises from `start` times itself to itself over `to_examples` examples; `then` multiplies it."""
    return Warmup(to_examples, start, then)


def name_of(schedule: Schedule) -> str:
    """A schedule in the repr of a rule: a function by its name."""
    return str(getattr(schedule, "__name__", repr(schedule)))


def factor_of(schedule: Schedule | None, examples: int) -> float:
    """What the rate is multiplied by after `examples` examples, whatever kind of number the schedule answers."""
    return 1.0 if schedule is None else float(schedule(examples))


def check_schedule(schedule: Schedule | None, examples: int) -> None:
    """Raise ConfigurationError when `schedule` does not answer usable factors all along a job of so many examples."""
    if schedule is None:
        return
    zero: int | None = None  # from there on
    for applied in sorted({examples * part // TRIED for part in range(TRIED)} | {examples - 1}):
        try:
            factor = factor_of(schedule, applied)
        except Exception as error:
            raise ConfigurationError(
                f"schedule({applied}) of {schedule!r} failed: {type(error).__name__}: {error}",
                hint="a schedule takes the number of examples applied and answers a factor, such as 1.0",
            ) from error
        if not (math.isfinite(factor) and factor >= 0):
            raise ConfigurationError(
                f"schedule({applied}) of {schedule!r} is {factor}; the rate cannot be multiplied by that",
                hint=f"answer a finite factor of 0 or more for each of the {examples:,} examples of the job",
            )
        zero = None if factor else applied if zero is None else zero
    if zero is not None and 2 * zero <= examples:
        raise ConfigurationError(
            f"the schedule {name_of(schedule)} is 0 from example {zero:,} on, so nothing is learnt from the other "
            f"{examples - zero:,} of the job",
            hint=f"a schedule counts examples, not mini-batches: let it fall over all {examples:,}, or end above 0",
        )


def _at_least_one(to_examples: int) -> None:
    if to_examples < 1:
        raise ConfigurationError(
            f"to_examples={to_examples} leaves no examples to change the rate over", hint="use 1 or more"
        )
