# SPDX-License-Identifier: Apache-2.0
"""The history of L-BFGS as inner products: the direction without a single vector (reference: Chen et al., 2014).

The basis is s_1..s_k, y_1..y_k (pairs from the oldest to the newest) and p, the reduced gradient. Its Gram matrix is
all that the two-loop recursion needs; the answer is the coefficients of the direction in that basis.
"""

import math
from typing import Self, final

import msgspec
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@final
class History(msgspec.Struct, frozen=True):
    """Which pairs there are, and the inner products of the basis. A value: what changes it answers a new one."""

    pairs: tuple[int, ...] = ()
    """The slots in which the sections keep the pairs, oldest first."""
    products: bytes = bytes(8)
    """The Gram matrix, (2k+1) x (2k+1) float64 over [s.., y.., p] in rows: as bytes it is written down in no time."""

    @property
    def gram(self) -> Matrix:
        """The matrix, read only."""
        size = 2 * len(self.pairs) + 1
        return np.frombuffer(self.products).reshape(size, size)

    def accept(self, rows: list[list[float]], capacity: int, curvature: float) -> tuple[Self, int | None]:
        """After a trial was accepted: the history with its pair and its p, and the slot for the pair.

        rows: s, y and p of the trial against [s.., y.., s, y, p], shape (3, 2k+3), or those of all of them, shape
        (2k+3, 2k+3). The pair is kept, in place of the oldest one when there are `capacity` of them, if
        s.y > curvature |s| |y|; otherwise the slot is None.
        """
        k, measured = len(self.pairs), np.array(rows)
        full = np.zeros((2 * k + 3, 2 * k + 3))
        full[: 2 * k, : 2 * k] = self.gram[: 2 * k, : 2 * k]
        first = len(full) - len(measured)
        full[first:, :], full[:, first:] = measured, measured.T
        s, y, p = 2 * k, 2 * k + 1, 2 * k + 2
        if not full[s, y] > curvature * math.sqrt(full[s, s]) * math.sqrt(full[y, y]):
            return self._of(self.pairs, full, [*range(2 * k), p]), None
        oldest = 1 if k == capacity else 0
        slot = self.pairs[0] if oldest else next(slot for slot in range(capacity) if slot not in self.pairs)
        kept = range(oldest, k)
        basis = [*kept, s, *(k + pair for pair in kept), y, p]
        return self._of((*self.pairs[oldest:], slot), full, basis), slot

    def refreshed(self, gram: list[list[float]]) -> Self:
        """The same pairs with their inner products measured again, shape (2k+1, 2k+1)."""
        return type(self)(self.pairs, np.array(gram).tobytes())

    def forgotten(self) -> Self:
        """Without pairs: the direction becomes that of steepest descent."""
        return type(self)((), self.gram[-1:, -1:].tobytes())

    def _of(self, pairs: tuple[int, ...], full: Matrix, basis: list[int]) -> Self:
        return type(self)(pairs, full[np.ix_(basis, basis)].tobytes())

    @property
    def gradient_norm(self) -> float:
        """|p|_2."""
        return math.sqrt(max(0.0, float(self.gram[-1, -1])))

    @property
    def curved(self) -> bool:
        """Whether s.y > 0 for each pair, without which there is no direction."""
        k, gram = len(self.pairs), self.gram
        return all(gram[i, k + i] > 0 for i in range(k))

    def direction(self) -> tuple[tuple[float, ...], float]:
        """The coefficients of -H p over [s.., y.., p], and its slope: the derivative of the loss along it.

        c = 0; c[p] = -1
        for i newest..oldest:  a[i] = (G[s_i] c) / G[s_i, y_i];  c[y_i] -= a[i]
        c *= G[s_k, y_k] / G[y_k, y_k]
        for i oldest..newest:  c[s_i] += a[i] - (G[y_i] c) / G[s_i, y_i]
        """
        gram, k = self.gram, len(self.pairs)
        c, alpha = np.zeros(2 * k + 1), np.zeros(k)
        c[2 * k] = -1.0
        for i in reversed(range(k)):
            alpha[i] = gram[i] @ c / gram[i, k + i]
            c[k + i] -= alpha[i]
        if k:
            c *= gram[k - 1, 2 * k - 1] / gram[2 * k - 1, 2 * k - 1]
        for i in range(k):
            c[i] += alpha[i] - gram[k + i] @ c / gram[i, k + i]
        return tuple(c.tolist()), float(gram[2 * k] @ c)
