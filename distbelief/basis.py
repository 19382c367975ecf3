# SPDX-License-Identifier: Apache-2.0
"""The vectors of L-BFGS on one section of a parameter server shard: what the solver (lbfgs.py) never sees.

    x  parameters          g  gradient at x, with L2           S, Y  the pairs: steps, and what they changed of g
    d  direction           p  g as L1 and bounds reduce it     trial  x + t d, fitted to L1 and bounds

A section needs nothing of another one: what it measures is summed by the coordinator (`merge`, `add`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from distbelief.errors import CheckpointError
from distbelief.lbfgs import Step
from distbelief.penalty import Penalty
from distbelief.sealed import Sealed

CHUNK = 1 << 14
"""Entries whose float64 copies are alive at a time: they stay in the cache."""


@final
class Basis:
    """The vectors of one span; one call at a time.

    Memory: span x (2 history + 3) words with the parameters, and 8 bytes per entry to add gradients in float64; a
    history in bfloat16 takes 2 bytes per entry in 2 history of these words. Besides, (2 history + 3) x CHUNK float64
    to work in, whatever the span: 3 MB with 10 pairs. Dots are in float64, of what is stored.
    """

    def __init__(
        self, parameters: Tensor, history: int, penalties: Sequence[Penalty] = (),
        history_dtype: torch.dtype | None = None, *, overlapping: bool = False,
    ) -> None:  # fmt: skip
        """`overlapping`: batches change, so y is the change of the gradient of what two batches share: two more sums in
        float64 and a word per entry.

        `parameters`: a contiguous CPU tensor of shape (n,), owned by the section, changed in place by `step`.

        `penalties` are in ascending order; entries that they leave out have neither penalty nor bound.
        """
        n, dtype = parameters.numel(), parameters.dtype
        self._x = parameters
        self._g, self._d = (torch.zeros(n, dtype=dtype) for _ in range(2))
        self._pairs = torch.zeros(2, history, n, dtype=history_dtype or dtype)
        """S and Y, by slot: shape (2, history, n)."""
        self._total = torch.zeros(n, dtype=torch.float64)
        shared = n if overlapping else 0
        self._before, self._after = (torch.zeros(shared, dtype=torch.float64) for _ in range(2))
        """Sums over what the batch shares with the one before, and with the next one."""
        self._overlap = torch.zeros(shared, dtype=dtype)
        """The gradient at the present point of what the batch there shares with the next one."""
        self._counts = (1, 1)
        """Examples of the two sums of the sealed evaluation."""
        self._examples = 1
        """Of the sealed evaluation, whose gradient is the total divided by them."""
        self._work = torch.empty((2 * history + 3) * min(n, CHUNK), dtype=torch.float64)
        self._blocks = list(_blocks(n, penalties))
        self._used: tuple[int, ...] = ()
        self._raw_slope = 0.0

    def trial(self, t: float, out: Tensor) -> None:
        """Write the trial at `t` into the caller's buffer of shape (n,)."""
        for block, penalty in self._blocks:
            out[block] = self._trial(t, block, penalty)

    def open(self) -> None:
        """A new evaluation begins: nothing is added yet."""
        for total in (self._total, self._before, self._after):
            total.zero_()

    def add(self, gradient: Tensor, *, before: bool = False, after: bool = False) -> None:
        """Add the gradient of a sum of losses, shape (n,), which is only read.

        `before` and `after`: it is of examples that the batch shares with the one before, and with the next one.
        """
        self._total += gradient
        if before:
            self._before += gradient
        if after:
            self._after += gradient

    def seal(
        self, t: float, examples: int, pairs: Sequence[int], overlap: tuple[int, int] = (0, 0), *, whole: bool = False
    ) -> Sealed:  # fmt: skip
        """Every gradient of the evaluation at `t` is in, of `examples` examples together. Repeatable until `step`.

        `overlap`: how many of them the batch shares with the one before and the next one. `whole`: measure the inner
        products of the pairs, too.
        """
        self._examples = examples
        self._counts = max(1, overlap[0]), max(1, overlap[1])
        tops = 2 * _top(pairs)
        first = 0 if whole else tops
        rows = torch.zeros(tops + 3 - first, tops + 3, dtype=torch.float64)
        slope = decrease = square = absolute = largest_gradient = 0.0
        for block, penalty in self._blocks:
            x_trial = self._trial(t, block, penalty)
            g_trial = self._gradient(x_trial, block, penalty)
            if penalty.l2:
                square += penalty.l2 * _dot(x_trial, x_trial)
            if penalty.l1:
                absolute += penalty.l1 * float(x_trial.abs().sum(dtype=torch.float64))
            present = self._overlap if len(self._overlap) else self._g
            p, p_old = penalty.reduced(x_trial, g_trial), penalty.reduced(self._x[block], present[block])
            s, y = self._changes(t, x_trial, g_trial, block, penalty)
            basis = self._load(block, pairs, s, y, p)
            rows += basis[first:] @ basis.T
            slope += _dot(self._d[block], g_trial)
            decrease += _dot(p_old, basis[tops])
            largest_gradient = max(largest_gradient, float(p.abs().max()))
        order = _order(pairs, 3)
        ordered = (rows[order] if whole else rows)[:, order]
        return Sealed(
            rows=ordered.tolist(), slope=slope, raw_slope=self._raw_slope, decrease=decrease,
            largest_gradient=largest_gradient, square=square, absolute=absolute,
            finite=bool(rows.isfinite().all()),
        )  # fmt: skip

    def step(self, step: Step) -> None:
        """Move to the sealed trial and keep its pair, as the step says, and form the next direction."""
        order = _order(step.pairs, 1)
        weights = torch.zeros(2 * _top(step.pairs) + 1, dtype=torch.float64)
        weights[order] = torch.tensor(step.coefficients, dtype=torch.float64)
        self._raw_slope = 0.0
        for block, penalty in self._blocks:
            x, g, d = self._x[block], self._g[block], self._d[block]
            if step.commit:
                x_trial = self._trial(step.t, block, penalty)
                g_trial = self._gradient(x_trial, block, penalty)
                if step.slot is not None:
                    pair = self._changes(step.t, x_trial, g_trial, block, penalty)
                    self._pairs[0, step.slot, block], self._pairs[1, step.slot, block] = pair
                x.copy_(x_trial)
                g.copy_(g_trial)
                if len(self._overlap):
                    self._overlap[block] = self._mean(self._after, self._counts[1], x_trial, block, penalty)
            basis = self._load(block, step.pairs, penalty.reduced(x, g))
            raw = weights @ basis
            self._raw_slope += float(raw @ basis[-1])
            d.copy_(penalty.fitted(raw.to(d.dtype), x, g))
        self._used = step.pairs

    def gram(self, pairs: Sequence[int]) -> list[list[float]]:
        """The inner products of [s.., y.., p] at the present point: shape (2k+1, 2k+1)."""
        total = torch.zeros(2 * _top(pairs) + 1, 2 * _top(pairs) + 1, dtype=torch.float64)
        for block, penalty in self._blocks:
            basis = self._load(block, pairs, penalty.reduced(self._x[block], self._g[block]))
            total += basis @ basis.T
        order = _order(pairs, 1)
        matrix: list[list[float]] = total[order][:, order].tolist()
        return matrix

    def vectors(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the parameters, by name, each of shape (n,). Valid until the next call."""
        pairs = {f"{name}{slot}": self._pairs[half, slot] for half, name in enumerate("sy") for slot in self._used}
        return {"gradient": self._g, **({"overlap": self._overlap} if len(self._overlap) else {}), **pairs}

    def load(self, vectors: Mapping[str, Tensor]) -> None:
        """Go on from what `vectors` answered, perhaps on another cut; the tensors are copied, the parameters are there.

        The direction is formed again by a Step that commits nothing (`Solver.begin`). Raises CheckpointError.
        """
        known = {
            f"{name}{slot}": (half, slot) for half, name in enumerate("sy") for slot in range(self._pairs.shape[1])
        }
        single = {"gradient": self._g, "overlap": self._overlap}
        unknown = vectors.keys() - known.keys() - single.keys()
        if unknown:
            raise CheckpointError(
                f"the checkpoint's vectors {', '.join(sorted(unknown))} are none of an L-BFGS history of "
                f"{self._pairs.shape[1]} pairs; resume with the algorithm and the history that wrote it"
            )
        self._pairs.zero_()
        self._g.zero_()
        for name, values in vectors.items():
            (single[name] if name in single else self._pairs[known[name]]).copy_(values)
        self._used = tuple(sorted({known[name][1] for name in vectors if name not in single}))

    def _trial(self, t: float, block: slice, penalty: Penalty) -> Tensor:
        x = self._x[block]
        return penalty.projected(x + t * self._d[block], x, self._g[block])

    def _gradient(self, x_trial: Tensor, block: slice, penalty: Penalty) -> Tensor:
        """That of loss and L2 at the sealed trial."""
        return self._mean(self._total, self._examples, x_trial, block, penalty)

    def _mean(self, total: Tensor, examples: int, x_trial: Tensor, block: slice, penalty: Penalty) -> Tensor:
        mean = (total[block] / examples).to(x_trial.dtype)
        return mean.add_(x_trial, alpha=penalty.l2) if penalty.l2 else mean

    def _changes(
        self, t: float, x_trial: Tensor, g_trial: Tensor, block: slice, penalty: Penalty
    ) -> tuple[Tensor, Tensor]:
        """s and y of the trial, as the history keeps them."""
        present = self._g[block]
        if len(self._overlap):
            g_trial = self._mean(self._before, self._counts[0], x_trial, block, penalty)
            present = self._overlap[block]
        s = x_trial - self._x[block] if penalty.bends else t * self._d[block]
        return s.to(self._pairs.dtype), (g_trial - present).to(self._pairs.dtype)

    def _load(self, block: slice, pairs: Sequence[int], *rest: Tensor) -> Tensor:
        """Rows of float64: S and Y up to the last slot in use, then `rest`. Valid until the next call."""
        top, length = _top(pairs), block.stop - block.start
        rows = self._work[: (2 * top + len(rest)) * length].view(-1, length)
        rows[: 2 * top].view(2, top, length).copy_(self._pairs[:, :top, block])
        for row, vector in zip(rows[2 * top :], rest, strict=True):
            row.copy_(vector)
        return rows


def _top(pairs: Sequence[int]) -> int:
    """Slots to load: all up to the last one in use, which are one piece of memory per block."""
    return max(pairs, default=-1) + 1


def _order(pairs: Sequence[int], rest: int) -> list[int]:
    """Where the rows of `_load` are in the order [s.., y.., rest]."""
    top = _top(pairs)
    return [*pairs, *(top + slot for slot in pairs), *range(2 * top, 2 * top + rest)]


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _blocks(n: int, penalties: Sequence[Penalty]) -> Iterator[tuple[slice, Penalty]]:
    """Cut [0, n) so that every block is short and has one penalty."""
    whole, at = [], 0
    for penalty in penalties:
        whole += [Penalty(at, penalty.start), penalty]
        at = penalty.stop
    for penalty in [*whole, Penalty(at, n)]:
        for start in range(penalty.start, penalty.stop, CHUNK):
            yield slice(start, min(start + CHUNK, penalty.stop)), penalty
