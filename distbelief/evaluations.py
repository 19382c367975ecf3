# SPDX-License-Identifier: Apache-2.0
"""When the model is evaluated during a job: every so many examples, once at the end, one at a time."""

import math

from distbelief import events

LAST_SECONDS = 600.0
"""An evaluation at the end is given up when it takes longer than this and than twenty times the slowest before it."""


class Evaluations:
    """Decides at which count of applied examples the evaluator evaluates next."""

    def __init__(self, every: int, *, wanted: bool) -> None:
        """One each `every` examples; without an evaluator, `wanted=False`, none is awaited."""
        self._every, self._wanted = every, wanted
        self._due = every
        self._current: int | None = None
        self._newest: int | None = None
        """Examples at the last one that is finished."""
        self._last: int | None = None
        """Examples at which training ended."""
        self._slowest_seconds = 0.0
        self._until: float | None = None
        """When the one under way is given up, once training is over."""

    def begin(self, examples: int, *, at_once: bool = False) -> None:
        """The job goes on from so many examples; `at_once` has the model evaluated as it is then, too."""
        self._due += examples
        self._current = examples if at_once and self._wanted else None

    def next(self, examples: int) -> tuple[int | None, bool]:
        """(examples at which to evaluate now, or None; whether there will be no more)."""
        if self._current is None and self._due <= examples:
            self._current = examples
        return self._current, not self._wanted

    def finished(
        self, at: int, loss: float | None, metrics: dict[str, float], seconds: float, examples: int
    ) -> events.Evaluated:
        """What was measured of the parameters `at` so many examples, when by now there are `examples`."""
        self._current = None if self._last == at else self._last
        self._newest, self._until = at, None
        self._slowest_seconds = max(self._slowest_seconds, seconds)
        self._due = max(self._due, examples + self._every - examples % self._every)
        told = {name: events.finite(value) for name, value in metrics.items()}
        if loss is not None and not math.isfinite(loss):
            loss, told["loss"] = None, None
        return events.Evaluated(examples=at, loss=loss, metrics=told, evaluation_seconds=seconds)

    def spoilt(self) -> None:
        """A shard went back to other parameters: what was measured last may not be of those that there are now."""
        self._newest = None

    def begin_last(self, examples: int) -> None:
        """Training is over: evaluate what it led to, unless that is done."""
        if self._wanted and self._newest != examples:
            self._last = examples  # behind one that is under way, which may have read what was there before
            if self._current is None:
                self._current = examples

    def awaited(self, now: float) -> bool:
        """Whether one has been asked for that is not finished, and training has not been over for too long."""
        if self._current is None:
            return False
        if self._until is None:
            self._until = now + max(LAST_SECONDS, 20 * self._slowest_seconds)
        return now < self._until

    def end(self) -> None:
        """The evaluator may leave."""
        self._wanted = False
