# SPDX-License-Identifier: Apache-2.0
"""Downpour's coordinator: hands out leases of examples, settles them, and releases replicas in stages (section 4.1)."""

from collections.abc import Callable, Sequence
from typing import Any, final

import msgspec
import torch

from distbelief import events
from distbelief.channel.base import exported
from distbelief.checkpoint import Manifest
from distbelief.coordinator import Coordinator
from distbelief.engine.base import Engine
from distbelief.errors import TrainingFailed
from distbelief.leases import Leases, Release
from distbelief.parameter_server import ParameterServerShard
from distbelief.progress import Meter
from distbelief.roster import Granted, Refusal, Report, Settings
from distbelief.training_loss import Trend


@final
class DownpourCoordinator(Coordinator):
    """The center of a Downpour job; `leases` is the ledger of its examples."""

    def __init__(
        self, engine: Engine, settings: Settings, buffers: Sequence[torch.Tensor], manifest: Callable[..., Manifest],
        emit: Callable[[events.AnyEvent], None], leases: Leases, release: Release,
    ) -> None:  # fmt: skip
        super().__init__(engine, settings, buffers, manifest, emit)
        self.leases, self._release = leases, release
        self._meter = Meter(engine.now(), leases.settled_examples)
        self._trend = Trend(leases.total_examples)
        self._refused_pushes = 0
        self._released = self.at_work
        self._epoch, self._repeated_before = leases.epoch, leases.repeated

    # what replicas may ask

    @exported
    def lease(self, replica: int, incarnation: int, settled: tuple[tuple[int, int], ...]) -> Granted:
        """Examples to work on; `settled` as in a Report. Raises Fenced for an incarnation that was replaced."""
        self.hear(replica, incarnation)
        self._settle(replica, settled)
        if self.stopping or self.leases.finished:
            return Granted(None, True)
        if replica >= self.at_work or not self.begun:
            return Granted(None, False)
        return Granted(self.leases.next(replica), False)

    @exported
    def report(self, report: Report) -> bool:
        """Take a replica's report; the answer is whether it should stop. Raises Fenced."""
        record = self.hear(report.replica, report.incarnation)
        record.slowest_seconds = max(record.slowest_seconds, report.slowest_seconds)
        self._meter.count(report.losses)
        if (rise := self._trend.rise(report.losses, self.at_work, self.examples)) is not None:
            self.emit(rise)
        for refusal in report.refused:
            self._refuse(report.replica, refusal)
        self._settle(report.replica, report.settled)
        return self.stopping

    @exported
    def leave(self, replica: int, incarnation: int) -> None:
        """A replica ends cleanly; what it had not settled goes back."""
        self.hear(replica, incarnation).left = True
        self.leases.give_back(replica)

    # what the coordinator asks

    @property
    def examples(self) -> int:
        """Examples settled so far."""
        return self.leases.settled_examples

    @property
    def at_work(self) -> int:
        """Few at the beginning and at the end (`Release`)."""
        leases = self.leases
        return self._release.released(leases.settled_examples, leases.examples_to_come, len(self.replicas))

    def work(self) -> dict[str, Any]:
        """The leases, noted before the shards write: what is settled now is in all of them."""
        alive = {index: record.incarnation for index, record in enumerate(self.replicas)}
        leases = msgspec.structs.replace(self.leases.state(), alive=alive)
        return {"leases": leases, "lost_updates": self.counters.lost_updates}

    def is_own(self, manifest: Manifest) -> bool:
        """Whether it has leases."""
        return manifest.leases is not None

    def run(self) -> str:
        """Watch over the job until every example is settled."""
        while not (self.leases.finished or self.stopping):
            self.tick()
            if self.engine.now() >= self.writer.due:
                self.checkpoint()
        self.wind_down(keep=True)
        self.progress(0.0)
        return "all epochs finished" if self.leases.finished else self.interrupted or "stopped"

    def lose_replica(self, index: int, incarnation: int) -> None:
        """Fence the dead incarnation on all shards, take its leases back, start the next incarnation."""

        def fenced(applied: list[list[dict[int, int]]]) -> None:
            loss = self.leases.lose(index, [section for shard in applied for section in shard])
            self.emit(
                events.LeasesReturned(replica=index, leases=loss.leases, examples=loss.examples, repeated=loss.repeated)
            )
            self._after_settling()
            self.replace_replica(index)

        if not self.begun:
            fenced([])  # nothing has been handed out, and the shards may be waiting for this very replica
            return
        self.later(self.ask_shards(ParameterServerShard.fence, index, incarnation), fenced)

    def shard_restored(self, index: int) -> None:
        """Replicas push again what the shard has not acknowledged; what it had, and lost, is counted."""

    def tell_progress(self, now: float, alive: int) -> None:
        """Emit the examples, rates and staleness of this moment."""
        self.emit(self._meter.progress(now, self.leases, self.counters, alive))

    def go_on(self) -> tuple[str, str]:
        """With more epochs, once these are behind it."""
        epochs = 2 * self.leases.epochs
        if not self.leases.finished:
            return "", "job"
        return f"--epochs {epochs}", f"dataclasses.replace(job, epochs={epochs})"

    def finished(self, reason: str, resume: str, export: str) -> events.JobFinished:
        """The last event of the run, with the audit of the data."""
        seen = self.leases.settled_examples
        return events.JobFinished(
            reason=reason, seen=seen, repeated=self.leases.repeated, missing=self.leases.total_examples - seen,
            refused=self.leases.refused, lost_updates=self.counters.lost_updates, pushes=self.counters.pushes,
            mini_batches=self.counters.mini_batches, staleness=self.counters.staleness,
            resume_command=resume, export_command=export, strangers=self.counters.strangers,
        )  # fmt: skip

    # decisions

    def _refuse(self, replica: int, refusal: Refusal) -> None:
        self.leases.refused += refusal.examples
        self._refused_pushes += 1
        self.emit(
            events.PushRefused(replica=replica, step=refusal.step, examples=refusal.examples, reason=refusal.reason)
        )
        if self._refused_pushes > self.settings.refusals and self.failure is None:
            self.failure = TrainingFailed(
                f"{self._refused_pushes} pushes were refused, the limit is {self.settings.refusals}; the last by "
                f"replica {replica} at its step {refusal.step}: {refusal.reason}\n"
                "hint: lower the learning rate, set Downpour(clip_norm=...), or check the data for NaN"
            )

    def _settle(self, replica: int, settled: tuple[tuple[int, int], ...]) -> None:
        for identifier, position in settled:
            self.leases.settle(replica, identifier, position)
        if settled:
            self._after_settling()

    def _after_settling(self) -> None:
        settled = self.leases.settled_examples
        released = self.at_work
        if released > self._released:
            self._released = released
            self.emit(events.ReplicasReleased(replicas=released, examples=settled))
        while self._epoch < self.leases.epoch:
            seen, repeated = self.leases.examples_per_epoch, self.leases.repeated
            again = repeated - self._repeated_before
            self.emit(events.EpochFinished(epoch=self._epoch, seen=seen, repeated=again))
            self._epoch, self._repeated_before = self._epoch + 1, repeated
