# SPDX-License-Identifier: Apache-2.0
"""What the sections of the shards answer when an evaluation is complete: inner products, and no vector."""

from collections.abc import Sequence

import msgspec


class Sealed(msgspec.Struct, frozen=True, array_like=True):
    """What one section answers when an evaluation is complete; s = x(t) - x, y = g(t) - g, p the reduced gradient."""

    rows: list[list[float]]
    """s, y and p of the trial against [s.., y.., s, y, p], in the order of `pairs`: shape (3, 2k+3).

    Where all was to be measured, so is every vector before them: shape (2k+3, 2k+3).
    """
    slope: float
    """d . g(t), the derivative of the loss by t."""
    raw_slope: float
    """d . p when d was formed, before it was fitted to L1 or bounds."""
    decrease: float
    """p . s with the p of the present point."""
    largest_gradient: float
    """|p|_inf at the trial."""
    square: float
    """Sum of l2 x^2 at the trial."""
    absolute: float
    """Sum of l1 |x| at the trial."""
    finite: bool
    """Whether all of the gradient is."""

    @property
    def penalty(self) -> float:
        """What is added to the loss at the trial."""
        return self.square / 2 + self.absolute


def merge(answers: Sequence[Sealed]) -> Sealed:
    """The answer of all sections together: sums, and maxima of the largest."""
    return Sealed(
        rows=add([answer.rows for answer in answers]),
        slope=sum(answer.slope for answer in answers),
        raw_slope=sum(answer.raw_slope for answer in answers),
        decrease=sum(answer.decrease for answer in answers),
        largest_gradient=max(answer.largest_gradient for answer in answers),
        square=sum(answer.square for answer in answers),
        absolute=sum(answer.absolute for answer in answers),
        finite=all(answer.finite for answer in answers),
    )


def add(matrices: Sequence[list[list[float]]]) -> list[list[float]]:
    """The inner products of all sections together: the sum, entry by entry."""
    return [[sum(entries) for entries in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
