# SPDX-License-Identifier: Apache-2.0
"""The same numbers for TensorBoard, an optional extra: `pip install 'distbelief[tensorboard]'`.

The step of every scalar is the number of examples settled, so that runs with different numbers of replicas compare.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from distbelief.events import BatchProgress, Evaluated, Iterated, JobFinished, JobStarted, Observation, Progress
from distbelief.report.words import values_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard_files(folder: Path) -> "TensorBoardFiles | None":
    """A listener that writes TensorBoard files into `folder`, or None where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return None
    return TensorBoardFiles(folder)


class TensorBoardFiles:
    """A listener that writes scalars as they come and, at the end, the histogram of staleness.

    TensorBoard's own thread writes the file; an event costs a few microseconds. It never raises: when the file cannot
    be written, it warns once, and nothing more is. Build it with `tensorboard_files`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._writer: SummaryWriter | None = None
        self._broken = False
        self._examples = 0

    def __call__(self, observation: Observation) -> None:
        """Write what the event has of numbers; JobFinished closes the file."""
        if self._broken:
            return
        try:
            self._write(observation)
        except Exception as problem:
            # TensorBoard hands on whatever its thread met (a full disk, a vanished folder) at the next call;
            # training goes on without it
            self._give_up(problem)

    def close(self) -> None:
        """Write out what is pending and end TensorBoard's thread. May be called again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as problem:
                self._give_up(problem)

    def _give_up(self, problem: Exception) -> None:
        if not self._broken:
            self._broken = True
            warnings.warn(f"{self._folder}: {problem}; TensorBoard is told no more", RuntimeWarning, stacklevel=3)

    def _write(self, observation: Observation) -> None:
        match observation.event:
            case JobStarted() as event:
                self._start(event)
            case Progress() as event:
                self._examples = event.examples
                if event.loss is not None:
                    self._scalar("loss", event.loss)
                self._scalar("examples_per_second", event.examples_per_second)
                self._scalar("pushes_per_second", event.pushes_per_second)
                self._scalar("staleness/median", event.staleness_median)
                self._scalar("staleness/p95", event.staleness_p95)
                self._scalar("replicas_alive", event.replicas_alive)
            case Iterated() as event:
                self._examples = event.examples
                self._scalar("loss", event.loss)
                self._scalar("gradient", event.gradient)
                self._scalar("step/t", event.t)
                self._scalar("step/length", event.length)
                self._scalar("evaluations", event.evaluations)
            case BatchProgress() as event:
                self._examples = event.examples
                self._scalar("examples_per_second", event.examples_per_second)
                self._scalar("portions_backed_up", event.backed_up)
                self._scalar("replicas_alive", event.replicas_alive)
            case Evaluated() as event:
                self._examples = event.examples
                for name, value in values_of(event).items():
                    self._scalar(f"test/{name}", value)
            case JobFinished() as event:
                if event.staleness:
                    self._histogram(event.staleness)
                self.close()

    def _start(self, event: JobStarted) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._examples = event.resumed_examples
        # what an earlier start wrote beyond the checkpoint, perhaps the very first, was undone: TensorBoard hides it
        self._writer = SummaryWriter(str(self._folder), purge_step=event.resumed_examples + 1)

    def _scalar(self, tag: str, value: float) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, self._examples)

    def _histogram(self, counts: dict[int, int]) -> None:
        if self._writer is None:
            return
        # a bucket for each staleness up to the largest, with its upper edge half way to the next
        largest = max(counts)
        self._writer.add_histogram_raw(
            "staleness",
            min=min(counts),
            max=largest,
            num=sum(counts.values()),
            sum=sum(staleness * pushes for staleness, pushes in counts.items()),
            sum_squares=sum(staleness**2 * pushes for staleness, pushes in counts.items()),
            bucket_limits=[staleness + 0.5 for staleness in range(largest + 1)],
            bucket_counts=[counts.get(staleness, 0) for staleness in range(largest + 1)],
            global_step=self._examples,
        )
