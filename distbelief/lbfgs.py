# SPDX-License-Identifier: Apache-2.0
"""Sandblaster L-BFGS as pure decisions (paper, section 4.2): told what was measured, the solver answers what to do.

It never sees a vector. The sections of the parameter server shards keep them (basis.py), and one answer of each per
evaluation, `Sealed`, has every inner product that the next direction needs if the trial is accepted:

    solver = Solver(options);  commands = solver.begin()
    each command in turn:
        Step(...)     every section moves to the trial, or not, and forms the next direction
        Evaluate(t)   replicas compute at x + t d, every section seals;  commands = solver.tell(loss, merge(answers))
        Gram(pairs)   every section measures its inner products;         commands = solver.told_gram(add(matrices))
        Stop(reason)  the end

`state` is plain data. A solver that is given it, with sections that have carried out every Step before it was taken
(and need their d no more: it is formed again), goes on exactly where the other was, in the middle of a search too.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import msgspec

from distbelief.history import History
from distbelief.line_search import EXTRAPOLATE_MOST, Backtracking, MoreThuente
from distbelief.sealed import Sealed

SMALL_DECREASES = 3
"""Iterations in a row with a small decrease that end the job; one alone may be chance."""
MOST_PASSED_OVER = 10
"""Batches in a row that may lead to no step, where they change."""
SEARCHED_LENGTH, UNSCALED_GROWTH = 0.08, 9.0
"""Of the first trial, when nothing is known of a step's length: short, and each further trial may be ten times as long.

torch.optim.LBFGS begins with |g|_2 / |g|_1, SciPy with 1. With 0.07 to 0.09 the problems of the tests take about as
many evaluations as with either, and the speech model's full batches fewer (docs/decisions/0016).
"""
HALVED_LENGTH = 1.0
"""The same for a search that never takes a longer step than its first."""
SMALL_LOSS = 1e-6
"""What differs by less, relative to this, differs by the rounding of what it is made of."""
REFRESH = 5
"""The inner products are measured anew every so many times `history` iterations, against rounding."""


class Evaluate(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Loss and gradient at the trial x + t d are wanted."""

    t: float
    pairs: tuple[int, ...]
    """For the seal."""
    whole: bool = False
    """Likewise: whether the inner products of the pairs are measured again."""


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Move to the sealed trial if `commit`, keep its pair in `slot` if there is one, and form the next direction."""

    commit: bool
    t: float
    slot: int | None
    pairs: tuple[int, ...]
    """After the step, oldest first."""
    coefficients: tuple[float, ...]
    """Of the direction, over [s.., y.., p]."""


class Gram(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The inner products of [s.., y.., p] are wanted."""

    pairs: tuple[int, ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is nothing more to do."""

    reason: str
    converged: bool
    """Whether it ended where it was meant to: gradient, decrease or target."""


Command = Evaluate | Step | Gram | Stop


@dataclass(frozen=True)
class Options:
    """What the user may choose. Losses are means over all examples, and tolerances are on that scale."""

    history: int = 10
    """Pairs to keep, at least 1."""
    max_iterations: int = 1000
    max_evaluations: int = 10_000
    gtol: float = 1e-5
    """Stop when no entry of the reduced gradient is larger."""
    ftol: float | None = None
    """Stop when three decreases in a row are at most ftol max(|loss before|, |loss|, 1). None: 1e-9, float32 1e-7."""
    target: float | None = None
    """Stop when the loss, penalties included, is no higher."""
    single: bool = False
    """Whether the parameters have no more than the 24 bits of float32."""
    search: Literal["wolfe", "backtracking", "overlapping"] = "wolfe"
    """`backtracking`: with L1 or bounds paths bend, and only a search by losses alone is right. `overlapping`: batches
    change, and only losses of the examples that two batches share can be compared; nothing converges."""

    @property
    def smallest_decrease(self) -> float:
        """The relative decrease that counts as none."""
        return (1e-7 if self.single else 1e-9) if self.ftol is None else self.ftol


class SolverState(msgspec.Struct):
    """All that the solver knows; plain data of a few kB."""

    asked: Evaluate | Gram | Stop
    """What it waits for."""
    last: Step | None = None
    """The last step, whose direction is the present one."""
    evaluations: int = 0
    iteration: int = 0
    loss: float = 0.0
    """Penalties included, at the last accepted point."""
    largest_gradient: float = 0.0
    length: float = 1.0
    """|s|_2 of the last accepted step; the first trial along a steepest descent is as long."""
    slope: float = 0.0
    """Predicted derivative of the loss along the direction, at the last accepted point."""
    history: History = History()
    search: MoreThuente | Backtracking | None = None
    """None before the first point is accepted, and when the best trial of a failed search is computed again."""
    shared_loss: float = 0.0
    """Where batches change: at the last accepted point, of what its batch shares with the next one."""
    passed_over: int = 0
    """Where batches change: how many in a row led to no step."""
    small_decreases: int = 0
    doubts: int = 0
    """Remedies tried since the last accepted point: 1, inner products measured anew; 2, history dropped."""


@final
class Solver:
    """Decides every step of one minimisation; see the head of this file for how it is used."""

    def __init__(self, options: Options, state: SolverState | None = None) -> None:
        self.options = options
        first = SEARCHED_LENGTH if options.search == "wolfe" else HALVED_LENGTH
        self.state = state or SolverState(asked=Evaluate(0.0, ()), length=first)
        self._after = 0.0
        """The loss, of what was told last, with which the next trial is compared."""
        self._doubted = False
        """Whether the last accepted point is computed again, to see if data and loss are still the same."""

    @property
    def iteration(self) -> int:
        """Accepted steps."""
        return self.state.iteration

    @property
    def evaluations(self) -> int:
        """Evaluations told."""
        return self.state.evaluations

    @property
    def loss(self) -> float:
        """At the last accepted point, penalties included; NaN before there is one, and while it is doubted."""
        return self.state.loss if self.state.last and not self._doubted else math.nan

    @property
    def gradient_norm(self) -> float:
        """The largest entry of the reduced gradient there; NaN likewise."""
        return self.state.largest_gradient if self.state.last and not self._doubted else math.nan

    @property
    def stopped(self) -> Stop | None:
        """The end, where it has come."""
        return self.state.asked if isinstance(self.state.asked, Stop) and not self._doubted else None

    @property
    def begins(self) -> bool:
        """Whether no point of this search is known to be accepted."""
        return self._doubted or self.state.last is None

    def begin(self) -> list[Command]:
        """What to do first, and after a restore or a loss: form the direction again, then what was asked.

        Before the first point is accepted the direction is zero.
        """
        return [self.again(), Evaluate(0.0, self.state.history.pairs) if self._doubted else self.state.asked]

    def again(self) -> Step:
        """The step that forms the present direction again, and moves nothing."""
        last = self.state.last or Step(False, 0.0, None, (), (0.0,))
        return msgspec.structs.replace(last, commit=False, slot=None)

    def tell(self, loss: float, sealed: Sealed, shared: tuple[float, float] | None = None) -> list[Command]:
        """What an evaluation gave: the mean loss over all examples, penalties not included, and the merged answer.

        Where batches change, `shared` is the mean loss over what this one shares with the one before and the next one.
        """
        state, asked = self.state, self.state.asked
        if self._doubted:
            return self._confirm(loss + sealed.penalty if sealed.finite else math.nan)
        if not isinstance(asked, Evaluate):
            raise ValueError(f"an evaluation was told, but {asked} was asked")
        state.evaluations += 1
        loss += sealed.penalty
        compared = loss if shared is None else shared[0] + sealed.penalty
        self._after = loss if shared is None else shared[1] + sealed.penalty
        finite = sealed.finite and math.isfinite(loss)
        if state.last is None:
            return self._first(loss, sealed) if finite else self._stop(_not_finite_at_start(loss))
        if not self._predicted(sealed):
            return self._remedy("the direction in the sections is not the one that was ordered")
        if state.search is None:
            if finite:
                return self._accept(asked.t, loss, sealed)
            if self.options.search == "overlapping":
                return self._stop("the loss of a batch is not finite")
            return self._drop("the loss is not the same when computed twice")
        measure = sealed.slope if self.options.search == "wolfe" else sealed.decrease
        outcome = state.search.next(compared if finite else math.nan, measure)
        if outcome == "accept":
            return self._accept(asked.t, loss, sealed)
        if outcome == "try":
            return self._evaluate(state.search.t)
        if not state.search.decreased:
            if self.options.search == "overlapping":
                return self._pass_over()
            return self._drop(f"the line search failed: {state.search.failure}")
        best, state.search = state.search.t, None
        return self._accept(best, loss, sealed) if best == asked.t else self._evaluate(best)

    def tell_not_finite(self) -> list[Command]:
        """The loss of some examples, or its gradient, is not finite at the trial; nothing was measured."""
        return self.tell(math.nan, Sealed([], 0.0, self.state.slope, 0.0, 0.0, 0.0, 0.0, False))

    def resume(self) -> list[Command]:
        """As `begin`, but compute the point again, begin anew where its loss differs, go on after a raised limit."""
        self._doubted = self.state.last is not None and self.options.search != "overlapping"
        if not self._doubted:
            self._go_on()
        return self.begin()

    def _confirm(self, loss: float) -> list[Command]:
        self._doubted, before = False, self.state
        before.evaluations += 1
        relative = 1e-4 if self.options.single else 1e-8
        if math.isfinite(loss) and abs(loss - before.loss) <= relative * max(abs(loss), abs(before.loss), SMALL_LOSS):
            self._go_on()
        else:
            self.state = Solver(self.options).state
            self.state.evaluations = before.evaluations
        return self.begin()

    def _go_on(self) -> None:
        """Where the reason to stop is gone, such as a limit that has been raised."""
        if isinstance(self.state.asked, Stop) and self.state.last is not None and not self._finished():
            self._search()

    def told_gram(self, gram: list[list[float]]) -> list[Command]:
        """What a Gram gave: the sum over all sections, shape (2k+1, 2k+1)."""
        state = self.state
        if not isinstance(state.asked, Gram):
            raise ValueError(f"inner products were told, but {state.asked} was asked")
        state.history = state.history.refreshed(gram)
        if not state.history.curved:
            return self._drop("the pairs in the sections are not the ones that were kept")
        step = self._turn(Step(False, 0.0, None, state.history.pairs, ()))
        return [step, *self._search()] if self._descends() else self._drop(_no_descent(state.slope))

    def _first(self, loss: float, sealed: Sealed) -> list[Command]:
        state = self.state
        state.history, _ = state.history.accept(sealed.rows, self.options.history, math.inf)
        state.loss, state.largest_gradient = loss, sealed.largest_gradient
        state.shared_loss = self._after
        step = self._turn(Step(True, 0.0, None, (), ()))
        return [step, *(self._finished() or self._search())]

    def _accept(self, t: float, loss: float, sealed: Sealed) -> list[Command]:
        state, options = self.state, self.options
        curvature = 1e-7 if options.single else 1e-12
        squared_length = sealed.rows[-3][-3]
        state.history, slot = state.history.accept(sealed.rows, options.history, curvature)
        small = state.loss - loss <= options.smallest_decrease * max(abs(state.loss), abs(loss), 1.0)
        state.small_decreases = state.small_decreases + 1 if small else 0
        state.loss, state.largest_gradient = loss, sealed.largest_gradient
        if t:
            state.length, state.passed_over = math.sqrt(squared_length), 0
        state.shared_loss = self._after
        state.iteration += 1
        state.doubts = 0
        step = self._turn(Step(True, t, slot, state.history.pairs, ()))
        if stop := self._finished():
            return [step, *stop]
        if not (self._flat() or (self._descends() and state.history.curved)):
            return [step, self._measure()]
        return [step, *self._search()]

    def _turn(self, step: Step) -> Step:
        """The step with the direction that the history gives."""
        coefficients, self.state.slope = self.state.history.direction()
        self.state.last = msgspec.structs.replace(step, coefficients=coefficients)
        return self.state.last

    def _search(self) -> list[Command]:
        """Begin a search along the direction."""
        state, single = self.state, self.options.single
        if not self._descends():
            return self._pass_over() if self._flat() else self._stop(_no_descent(state.slope))
        t = 1.0 if state.history.pairs else state.length / state.history.gradient_norm
        if self.options.search != "wolfe":
            state.search = Backtracking(state.shared_loss, t, rounding=1e-7 if single else 1e-15)
        else:
            resolution = 1e-7 if single else 1e-14
            growth = EXTRAPOLATE_MOST if state.history.pairs else UNSCALED_GROWTH
            state.search = MoreThuente.begin(state.loss, state.slope, t, resolution=resolution, growth=growth)
        return self._evaluate(t)

    def _evaluate(self, t: float) -> list[Command]:
        if self.state.evaluations >= self.options.max_evaluations:
            return self._stop(f"the limit of {self.options.max_evaluations} evaluations was reached")
        refresh = self.state.iteration > 0 and self.state.iteration % (REFRESH * self.options.history) == 0
        self.state.asked = Evaluate(t, self.state.history.pairs, refresh)
        return [self.state.asked]

    def _measure(self) -> Gram:
        self.state.doubts = 1
        self.state.asked = Gram(self.state.history.pairs)
        return self.state.asked

    def _remedy(self, problem: str) -> list[Command]:
        """The inner products cannot be right: measure them anew, then drop the history, then give up."""
        return self._drop(problem) if self.state.doubts else [self._measure()]

    def _pass_over(self) -> list[Command]:
        """Where batches change: stay, and go on with the next one, which may be less unlucky."""
        state = self.state
        state.passed_over += 1
        if state.passed_over == MOST_PASSED_OVER:
            return self._stop(
                f"in {MOST_PASSED_OVER} batches in a row no step lowered the loss of what each shares with the one "
                "before: a larger batch, or more overlap, may go further"
            )
        state.search = None
        return self._evaluate(0.0)

    def _drop(self, problem: str) -> list[Command]:
        """Steepest descent once; where that was the direction already, the end."""
        state = self.state
        if state.doubts >= 2 or not state.history.pairs:
            return self._stop(problem)
        state.doubts = 2
        state.history = state.history.forgotten()
        step = self._turn(Step(False, 0.0, None, (), ()))
        return [step, *self._search()]

    def _flat(self) -> bool:
        """Where batches change: this one's gradient is zero, which says nothing of the others."""
        return self.options.search == "overlapping" and self.state.largest_gradient == 0.0

    def _descends(self) -> bool:
        return -math.inf < self.state.slope < 0

    def _predicted(self, sealed: Sealed) -> bool:
        slope = self.state.slope
        return abs(sealed.raw_slope - slope) <= (1e-3 if self.options.single else 1e-6) * abs(slope)

    def _finished(self) -> list[Command]:
        """A Stop if a point that was just accepted is the last one."""
        state, options = self.state, self.options
        # Losses of overlapping batches cannot be compared, so nothing tells whether a search over them has converged.
        if options.search != "overlapping" and (stop := self._converged()):
            return stop
        if state.iteration >= options.max_iterations:
            return self._stop(f"the limit of {options.max_iterations} iterations was reached")
        return []

    def _converged(self) -> list[Command]:
        state, options = self.state, self.options
        if state.largest_gradient <= options.gtol:
            return self._stop(f"the largest gradient, {state.largest_gradient:.1e}, is within {options.gtol:g}", True)
        if options.target is not None and state.loss <= options.target:
            return self._stop(f"the loss, {state.loss:.6g}, has reached the target {options.target:g}", True)
        if state.small_decreases >= SMALL_DECREASES:
            relative = options.smallest_decrease
            limit = "nothing, so it is at the limit of its precision"
            what = f"no more than {relative:g} max(|loss|, 1)" if relative else limit
            return self._stop(f"{SMALL_DECREASES} iterations in a row lowered the loss by {what}", relative > 0)
        return []

    def _stop(self, reason: str, converged: bool = False) -> list[Command]:
        self.state.asked = Stop(reason, converged)
        return [self.state.asked]


def _not_finite_at_start(loss: float) -> str:
    return f"the loss ({loss}) or its gradient is not finite at the starting point"


def _no_descent(slope: float) -> str:
    return f"the gradient is zero to working precision (slope {slope:.1e})"
