# SPDX-License-Identifier: Apache-2.0
"""How a Sandblaster job gets on, for the terminal: what is where Downpour has epochs, pushes and staleness."""

from collections.abc import Iterator
from typing import Protocol

from distbelief.events import BatchProgress, Iterated
from distbelief.report.words import count, duration, number, rate


class Known(Protocol):
    """What the terminal knows of the run."""

    @property
    def iterated(self) -> Iterated | None:
        """The last step."""

    @property
    def remaining_seconds(self) -> float | None:
        """To the limit of iterations."""


def batch_parts(view: Known, batch: BatchProgress) -> list[str]:
    """One line of a log, in parts."""
    parts = [
        f"iteration {batch.iteration:,} of at most {batch.max_iterations:,}",
        f"loss {'-' if batch.loss is None else f'{batch.loss:.6g}'}",
        f"gradient {_gradient(batch)}",
        count(batch.evaluations, "evaluation"),
        f"{rate(batch.examples_per_second)} examples/s",
    ]
    if view.remaining_seconds:
        parts.append(f"at most {duration(view.remaining_seconds)} left")
    return parts


def batch_rows(view: Known, batch: BatchProgress) -> Iterator[tuple[str, str, str]]:
    """(name, value, about it) for the live view."""
    step = view.iterated
    about = "" if step is None else f"; the last step was t = {number(step.t)}, of length {number(step.length)}"
    yield "loss", "-" if batch.loss is None else f"{batch.loss:.6g}", "of the whole batch, with penalties"
    yield "gradient", _gradient(batch), f"its largest entry{about}"
    yield "evaluations", f"{batch.evaluations:,}", f"of the whole batch; {rate(batch.examples_per_second)} examples/s"
    portions = f"of {batch.portions:,} done; {batch.backed_up:,} copies of slow ones so far"
    yield "portions", f"{batch.portions_done:,}", portions


def _gradient(batch: BatchProgress) -> str:
    return "-" if batch.gradient is None else f"{batch.gradient:.2e}"
