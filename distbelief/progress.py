# SPDX-License-Identifier: Apache-2.0
"""How a job gets on: sums since the last progress event, turned into rates. Told what happened; no clock of its own."""

from typing import final

from distbelief.events import Progress, staleness_quantile
from distbelief.portions import Leases


@final
class Meter:
    """Counts between two progress events; `now` is in the engine's seconds."""

    def __init__(self, now: float, examples: int) -> None:
        self._since, self._examples, self._pushes = now, examples, 0
        self._loss_sum, self._loss_examples = 0.0, 0

    def count(self, loss_sum: float, examples: int) -> None:
        """Take in the training loss of some examples, summed over them."""
        self._loss_sum += loss_sum
        self._loss_examples += examples

    def due(self, now: float, seconds: float) -> bool:
        """Whether the last progress event is at least so old, and any time has passed at all."""
        return now > self._since and now - self._since >= seconds

    def progress(self, now: float, leases: Leases, pushes: int, staleness: dict[int, int], alive: int) -> Progress:
        """The event of this moment; counting starts anew."""
        elapsed, examples = now - self._since, leases.settled_examples
        event = Progress(
            epoch=min(leases.epoch, leases.epochs - 1),
            examples=examples,
            total_examples=leases.total_examples,
            loss=self._loss_sum / self._loss_examples if self._loss_examples else None,
            examples_per_second=(examples - self._examples) / elapsed,
            pushes_per_second=(pushes - self._pushes) / elapsed,
            pushes=pushes,
            staleness_median=staleness_quantile(staleness, 0.5),
            staleness_p95=staleness_quantile(staleness, 0.95),
            replicas_alive=alive,
        )
        self._since, self._examples, self._pushes = now, examples, pushes
        self._loss_sum, self._loss_examples = 0.0, 0
        return event
