# SPDX-License-Identifier: Apache-2.0
"""What a replica counts between two reports to the coordinator."""

from typing import final

import torch

from distbelief.roster import Refusal, Report
from distbelief.training_loss import Losses


@final
class Tally:
    """What a replica has to report since its last report."""

    def __init__(self, now: float) -> None:
        self.sent = self.buffers_sent = now
        self.buffers_took = 0.0
        self.settled: list[tuple[int, int]] = []
        self.refused: list[Refusal] = []
        self.mini_batches_ever = 0
        self._losses: list[tuple[torch.Tensor, int]] = []
        self._slowest = 0.0
        self.mini_batch_seconds = 0.0
        """What the latest mini-batch took."""

    def count(self, loss: torch.Tensor, examples: int, seconds: float) -> None:
        """Count one mini-batch; the loss stays on its device, so counting does not wait for it."""
        self._losses.append((loss, examples))
        self._slowest = max(self._slowest, seconds)
        self.mini_batch_seconds = seconds
        self.mini_batches_ever += 1

    def take(self, replica: int, incarnation: int, now: float) -> Report:
        """The report, leaving nothing."""
        losses = [(float(loss), examples) for loss, examples in self._losses]
        sums = Losses(
            len(losses),
            sum(examples for _, examples in losses),
            sum(loss * examples for loss, examples in losses),
            sum(loss * loss * examples for loss, examples in losses),
        )
        report = Report(replica, incarnation, tuple(self.settled), sums, self._slowest, tuple(self.refused))
        self.settled, self.refused, self._losses = [], [], []
        self.sent = now
        return report
