# SPDX-License-Identifier: Apache-2.0
"""The stages of one replica at work: micro-batches forward and backward through torch.distributed.pipelining.

    stage 0    1 2 3 . . 1 4 2 . 3 . 4
    stage 1    . 1 2 . 1 3 2 4 3 . 4           forward 1, 2, ...: a micro-batch; then its way back
    stage 2    . . 1 1 2 2 3 3 4 4

All partitions of a replica call the same method with the same mini-batch at the same time. They talk over the default
process group, which is the replica's own: form it before, and destroy it when one is lost.
"""

from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from distbelief.errors import DeadlineExceeded, PeerLost
from distbelief.partition.stages import Stage, StagePlan

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of (output, target), a mean over examples."""


def preload() -> None:
    """Import torch's schedules, which takes a second: once, before processes are forked that need them."""
    import torch.distributed.pipelining  # noqa: F401


@final
class Pipeline:
    """One partition of a replica whose model is cut into stages."""

    def __init__(self, plan: StagePlan, partition: int, stage: Stage, device: torch.device) -> None:
        self._plan, self._partition, self._stage, self._device = plan, partition, stage, device
        self._first, self._last = partition == 0, partition == plan.out
        self._schedules: dict[tuple[Any, ...], Any] = {}
        """One for each shape of a mini-batch: a schedule's buffers have one size."""
        self._loss: Loss
        """Of the mini-batch at work."""

    def step(self, x: Tensor, target: Tensor, loss: Loss) -> Tensor | None:
        """Compute the gradient of a mini-batch, added to `.grad` of the stage's parameters; the loss on the last one.

        Gradients come in as many parts as there are micro-batches, each divided by their number, so that hooks on them
        see parts of the mean. Raises PeerLost, DeadlineExceeded.
        """
        count = self._plan.micro_batches(x.shape[0])
        self._loss = loss
        losses: list[Tensor] = []
        self._run(x, count, training=True, target=target if self._last else None, losses=losses)
        return torch.stack([each.detach() for each in losses]).sum() if self._last else None

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor | None:
        """The output for a mini-batch in evaluation, on the last partition. Raises PeerLost, DeadlineExceeded."""
        training = self._stage.training
        self._stage.eval()
        try:
            output: Tensor | None = self._run(x, self._plan.micro_batches(x.shape[0]), training=False)
        finally:
            self._stage.train(training)
        return output

    def _run(self, x: Tensor, count: int, *, training: bool, **options: Any) -> Any:
        key = (training, x.dtype, *x.shape)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(x, count, training=training)
        # Schedules of torch 2.11 refuse what is strided otherwise than planned.
        given = (x.to(self._device).contiguous(),) if self._first else ()
        try:
            return self._schedules[key].step(*given, return_outputs=not training, **options)
        except RuntimeError as error:
            told = _said_by_gloo(error)
            if told is None:
                raise
            late = "timed out" in told.lower()
            kind, what = (DeadlineExceeded, "did not answer in time") if late else (PeerLost, "was lost")
            here = f"partition {self._partition} of {self._plan.partitions}"
            raise kind(f"a partition of this replica {what}, says {here}: {told}") from error

    def _schedule(self, x: Tensor, count: int, *, training: bool) -> Any:
        """Shapes are given: found by the schedule itself, they cost BatchNorm a run on memory of any content."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        micro = torch.empty((x.shape[0] // count, *x.shape[1:]), dtype=x.dtype, device="meta")
        entering, leaving = self._plan.boundaries(micro)[self._partition : self._partition + 2]
        stage = PipelineStage(
            self._stage, self._partition, self._plan.partitions, self._device,
            input_args=entering.requires_grad_(training and not self._first),
            output_args=leaving.requires_grad_(training),
        )  # fmt: skip
        if not training:
            return ScheduleGPipe(stage, count)
        kind = Schedule1F1B if count >= self._plan.partitions else ScheduleGPipe
        # Micro-batches have equally many examples, so each has the same part in the mean.
        return kind(stage, count, loss_fn=lambda output, part: self._loss(output, part) / count, scale_grads=False)


def _said_by_gloo(error: BaseException) -> str | None:
    """What the process group said, when it is behind the error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or "gloo" in str(seen):
            return str(seen)
        seen = seen.__cause__
    return None
