# SPDX-License-Identifier: Apache-2.0
"""What L2, L1 and bounds make of parameters and gradients, entry by entry (OWL-QN: Andrew and Gao, 2007).

Everything here is elementwise, so it needs no other section: x is the point, g the gradient of loss and L2 there, p the
reduced gradient (the subgradient of smallest norm, or g without what an active bound blocks).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalty:
    """The penalty l2/2 x.x + l1 |x|_1 and the bounds of the entries [start, stop) of a section. Not L1 with bounds."""

    start: int
    stop: int
    l2: float = 0.0
    l1: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def bounded(self) -> bool:
        """Whether there is a bound."""
        return self.low > -math.inf or self.high < math.inf

    @property
    def bends(self) -> bool:
        """Whether the path of the trials is no straight line."""
        return self.l1 > 0 or self.bounded

    def reduced(self, x: Tensor, g: Tensor) -> Tensor:
        """p; g itself where nothing bends."""
        if self.l1:
            at_zero = torch.sign(g) * (g.abs() - self.l1).clamp_(min=0)
            return torch.where(x != 0, g + self.l1 * torch.sign(x), at_zero)
        return torch.where(self._blocked(x, g), 0.0, g) if self.bounded else g

    def fitted(self, d: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """The direction, zero where it does not go down (L1) or where an active bound blocks."""
        if self.l1:
            return torch.where(d * self.reduced(x, g) < 0, d, 0.0)
        return torch.where(self._blocked(x, g), 0.0, d) if self.bounded else d

    def projected(self, trial: Tensor, x: Tensor, g: Tensor) -> Tensor:
        """The trial, kept in the orthant of x, or of -p where x is zero, and within the bounds."""
        if self.l1:
            orthant = torch.where(x != 0, torch.sign(x), -torch.sign(self.reduced(x, g)))
            return torch.where(torch.sign(trial) == orthant, trial, 0.0)
        return trial.clamp(self.low, self.high) if self.bounded else trial

    def _blocked(self, x: Tensor, g: Tensor) -> Tensor:
        return ((x <= self.low) & (g > 0)) | ((x >= self.high) & (g < 0))
