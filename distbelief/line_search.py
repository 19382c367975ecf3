# SPDX-License-Identifier: Apache-2.0
"""How far to go along a direction: searches that are told what a trial step gave and answer what to do next.

A search is plain data, so it can be written down between any two trials and go on elsewhere. `next` takes what was
measured at the step `t` and answers whether to try another one, to accept it, or that the search has failed; `t` is
then the step to try, the accepted one, or the best one seen (0.0: none lowered the loss).
"""

import math
from typing import Literal, Self, final

import msgspec

MAX_TRIALS = 20
EXTRAPOLATE_LEAST, EXTRAPOLATE_MOST = 1.1, 4.0
"""A step that is too short grows by at least and at most so many times what was added to it last."""
SHRINK = 0.66
"""The bracket must shrink at least to this fraction in two trials."""
ROUNDINGS = 10
"""A loss is the sum of many: it is trusted to so many times the resolution."""

Outcome = Literal["try", "accept", "fail"]


class Point(msgspec.Struct, array_like=True, frozen=True):
    """What was measured at one step along the direction."""

    t: float
    loss: float
    slope: float
    """The derivative of the loss by `t`."""

    def tilted(self, slope: float) -> "Point":
        """The same point of the function from which a line of this slope through the origin is taken away."""
        return Point(self.t, self.loss - slope * self.t, self.slope - slope)


@final
class MoreThuente(msgspec.Struct, tag=True):
    """The search of More and Thuente (1994) for a step that satisfies the strong Wolfe conditions.

        loss(t) <= loss(0) + c1 t slope(0)   and   |slope(t)| <= c2 |slope(0)|

    Where the loss has lost its digits, the approximate conditions of Hager and Zhang (2005) are enough:

        loss(t) <= loss(0) + eps |loss(0)|   and   (2 c1 - 1) slope(0) >= slope(t) >= c2 slope(0)

    and the next trial comes from the slopes alone. A trial that is not finite shortens the step, and that far is never
    gone again.
    """

    start: Point
    best: Point
    """The end of the interval with the lowest loss."""
    other: Point
    t: float
    low: float
    high: float
    c1: float = 1e-4
    c2: float = 0.9
    eps: float = 1e-6
    """0.0 turns the approximate conditions off."""
    growth: float = EXTRAPOLATE_MOST
    """In place of EXTRAPOLATE_MOST."""
    resolution: float = 1e-14
    """Relative difference of steps below which they are the same; losses may be off by some times as much."""
    trials: int = 0
    modified: bool = True
    """First stage: no trial has met the first condition with a slope that is not negative."""
    bracketed: bool = False
    width: float = 1e20
    width_before: float = 2e20
    barrier: float | None = None
    """The shortest step that was not finite."""
    not_finite: int = 0
    """Trials that were not finite."""
    rise: Point | None = None
    """The shortest trial with a loss that is clearly higher than at the start."""

    @classmethod
    def begin(
        cls, loss: float, slope: float, t: float, *, c1: float = 1e-4, c2: float = 0.9, eps: float = 1e-6,
        resolution: float = 1e-14, growth: float = EXTRAPOLATE_MOST,
    ) -> Self:  # fmt: skip
        """A search from a point with this loss and slope (negative), whose first trial is `t` (positive)."""
        start = Point(0.0, loss, slope)
        high = (1 + growth) * t
        return cls(start, start, start, t, 0.0, high, c1=c1, c2=c2, eps=eps, resolution=resolution, growth=growth)

    def next(self, loss: float, slope: float) -> Outcome:
        """Told the loss and the slope at `t`."""
        self.trials += 1
        trial, start = self._believed(Point(self.t, loss, slope)), self.start
        if not (math.isfinite(loss) and math.isfinite(slope)):
            return self._shorten()
        slack = self.eps * abs(start.loss)
        if loss > start.loss + slack and (self.rise is None or trial.t < self.rise.t):
            self.rise = trial
        loss = trial.loss
        bound = start.loss + self.c1 * trial.t * start.slope
        if loss <= bound and abs(slope) <= -self.c2 * start.slope:
            return "accept"
        shallow = (2 * self.c1 - 1) * start.slope >= slope >= self.c2 * start.slope
        if self.eps and shallow and loss <= start.loss + slack:
            return "accept"
        if self._exhausted(trial.t):
            self.t = self.best.t
            return "fail"
        if self.modified and loss <= bound and slope >= 0:
            self.modified = False
        # In the first stage a trial that is lower than the best, but not low enough, is judged by loss - c1 t slope(0).
        tilt = self.c1 * start.slope if self.modified and bound < loss <= self.best.loss else 0.0
        t = self._narrow(trial, tilt)
        if self.bracketed:
            gap = abs(self.other.t - self.best.t)
            if gap >= SHRINK * self.width_before:
                t = self.best.t + (self.other.t - self.best.t) / 2
            self.width_before, self.width = self.width, gap
            self.low, self.high = sorted((self.best.t, self.other.t))
        else:
            self.low = t + EXTRAPOLATE_LEAST * (t - self.best.t)
            self.high = t + self.growth * (t - self.best.t)
        t = max(0.0, t)
        self.t = self.best.t if self._exhausted(t) else t
        return self._again()

    def _believed(self, trial: Point) -> Point:
        """The trial; where its loss differs from that at the start by rounding, with what the slopes say instead."""
        best = self.best
        loss = best.loss + (trial.t - best.t) * (trial.slope + best.slope) / 2
        changes = abs(trial.loss - self.start.loss), abs(loss - self.start.loss)
        return Point(trial.t, loss, trial.slope) if self.eps and max(changes) <= self._rounding else trial

    @property
    def _rounding(self) -> float:
        return ROUNDINGS * self.resolution * abs(self.start.loss)

    def _shorten(self) -> Outcome:
        self.not_finite += 1
        if self.t > self.best.t:
            self.barrier = self.t  # nearer than the one before it, which no trial has reached since
        self.t = self.best.t + (self.t - self.best.t) / 10
        return self._again()

    def _again(self) -> Outcome:
        if self.barrier is not None and self.best.t < self.barrier <= self.t:
            self.t = (self.best.t + self.barrier) / 2
        if self.trials >= MAX_TRIALS or self.t <= 0:
            self.t = self.best.t
            return "fail"
        return "try"

    def _exhausted(self, t: float) -> bool:
        outside = t <= self.low or t >= self.high
        return self.bracketed and (outside or self.high - self.low <= self.resolution * self.high)

    def _narrow(self, trial: Point, tilt: float) -> float:
        """Take the trial into the interval; the answer is the next one."""
        best, other, new = self.best.tilted(tilt), self.other.tilted(tilt), trial.tilted(tilt)
        turned = new.slope * math.copysign(1.0, best.slope) < 0
        if new.loss > best.loss:
            t, brackets = _after_rise(best, new), True
        elif turned:
            t, brackets = _farther(new.t, _cubic(new, best), _secant(new, best)), True
        elif abs(new.slope) < abs(best.slope):
            t, brackets = self._flattening(best, other, new), False
        else:
            t, brackets = self._steepening(best, other, new), False
        self.bracketed = self.bracketed or brackets
        if new.loss > best.loss:
            self.other = trial
        else:
            self.other = self.best if turned else self.other
            self.best = trial
        return t if math.isfinite(t) else (self.best.t + self.other.t) / 2

    def _flattening(self, best: Point, other: Point, new: Point) -> float:
        # Lower, slope of the same sign and smaller: the cubic counts only where it has its minimum beyond the trial.
        forward = new.t > best.t
        edge = self.high if forward else self.low
        (minimiser, fraction, root), secant = _cubic_terms(new, best), _secant(new, best)
        cubic = minimiser if fraction < 0 and root != 0 else edge
        if not self.bracketed:
            return max(self.low, min(self.high, _farther(new.t, cubic, secant)))
        t = cubic if abs(cubic - new.t) < abs(secant - new.t) else secant
        limit = new.t + SHRINK * (other.t - new.t)
        return min(limit, t) if forward else max(limit, t)

    def _steepening(self, best: Point, other: Point, new: Point) -> float:
        if self.bracketed:
            return _cubic(new, other)
        return self.high if new.t > best.t else self.low

    @property
    def decreased(self) -> bool:
        """Whether the best step lowers the loss by more than rounding."""
        return self.best.loss < self.start.loss - self._rounding

    @property
    def failure(self) -> str:
        """A sentence: why the search failed."""
        rise, start = self.rise, self.start
        if self.not_finite == self.trials:
            return _never_finite(self.trials)
        # Slopes that are alike at both ends say that the step is short enough for them to be believed.
        if rise is not None and rise.slope < start.slope / 2:
            promised = rise.t * (start.slope + rise.slope) / 2
            return _contradiction(rise.t, rise.loss - start.loss, promised)
        if self.not_finite:
            return (
                f"the loss or the gradient was not finite at {self.not_finite} of {self.trials} trial points, and at "
                "the others, which were nearer, it was not lower"
            )
        return _no_decrease(self.trials)


@final
class Backtracking(msgspec.Struct, tag=True):
    """Halves the step until the loss has decreased enough; for paths that bend, as with L1 or bounds.

    loss(t) <= loss(0) + 1e-4 p.(x(t) - x(0)),  p the reduced gradient at x(0)
    """

    loss: float
    """At the start, penalties included."""
    t: float
    rounding: float = 0.0
    """Relative error of a loss, which is forgiven."""
    trials: int = 0
    not_finite: int = 0
    rise: Point | None = None
    """The latest trial that was not low enough: step, loss, and p.s in place of the slope."""

    def next(self, loss: float, decrease: float) -> Outcome:
        """Told the loss at `t`, and p.s: what the loss would change by if it were linear."""
        self.trials += 1
        if not (math.isfinite(loss) and math.isfinite(decrease)):
            self.not_finite += 1
        elif decrease < 0 and loss <= self.loss + 1e-4 * decrease + self.rounding * abs(self.loss):
            return "accept"
        else:
            self.rise = Point(self.t, loss, decrease)
        self.t /= 2
        if self.trials >= MAX_TRIALS:
            self.t = 0.0
            return "fail"
        return "try"

    @property
    def decreased(self) -> bool:
        """No trial of a search that failed is taken."""
        return False

    @property
    def failure(self) -> str:
        """A sentence: why the search failed."""
        rise = self.rise
        if rise is None:
            return _never_finite(self.trials)
        change, measurable = rise.loss - self.loss, self.rounding * abs(self.loss)
        if rise.slope < -measurable and change > 10 * measurable:
            return _contradiction(rise.t, change, rise.slope)
        return _no_decrease(self.trials)


def _never_finite(trials: int) -> str:
    return f"the loss or the gradient was not finite at any of {trials} trial points, however short the step"


def _contradiction(t: float, change: float, promised: float) -> str:
    return (
        f"at a step of {t:.1e} the loss changed by {change:+.1e} where its gradient promises {promised:+.1e}: they do "
        "not belong together (a wrong sign, another scale, or a loss that is not the same when computed twice)"
    )


def _no_decrease(trials: int) -> str:
    return f"none of {trials} steps lowered the loss measurably, so it is at the limit of its precision"


def _cubic_terms(a: Point, b: Point) -> tuple[float, float, float]:
    """Of the cubic through two points: where its minimum is, as a step and as a fraction of the way, and its root."""
    theta = 3 * (a.loss - b.loss) / (b.t - a.t) + a.slope + b.slope
    scale = max(abs(theta), abs(a.slope), abs(b.slope))
    if not 0 < scale < math.inf:
        return math.nan, math.nan, 0.0
    root = scale * math.sqrt(max(0.0, (theta / scale) ** 2 - (a.slope / scale) * (b.slope / scale)))
    root = root if b.t > a.t else -root
    below = 2 * root - a.slope + b.slope
    fraction = (root - a.slope + theta) / below if below else math.nan
    return a.t + fraction * (b.t - a.t), fraction, root


def _cubic(a: Point, b: Point) -> float:
    return _cubic_terms(a, b)[0]


def _secant(a: Point, b: Point) -> float:
    """Where the line through the two slopes is zero."""
    return a.t + a.slope / (a.slope - b.slope) * (b.t - a.t)


def _after_rise(best: Point, new: Point) -> float:
    """Between the two: the cubic's minimum, or half way to it from that of the parabola, which is more careful."""
    cubic = _cubic(best, new)
    mean = (best.loss - new.loss) / (new.t - best.t)
    parabola = best.t + best.slope / (mean + best.slope) / 2 * (new.t - best.t)
    return cubic if abs(cubic - best.t) < abs(parabola - best.t) else cubic + (parabola - cubic) / 2


def _farther(t: float, one: float, other: float) -> float:
    return one if abs(one - t) > abs(other - t) else other
