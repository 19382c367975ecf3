# SPDX-License-Identifier: Apache-2.0
"""The coordinator: starts roles, watches them, replaces the lost, hands out leases, takes checkpoints, reports.

It lives in the user's process and knows no algorithm: what a replica does with a lease is its own affair. Everything
here happens in one thread. Exported methods answer replicas at once and only note what is to be done; `run` does it.

The file is longer than others because it is one class: what replicas ask, and the supervision that their questions
feed, share the same records. Decisions without I/O are apart: portions.py, progress.py.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

import torch

from distbelief import checkpoint, events
from distbelief.channel.base import Future, Out, exported
from distbelief.checkpoint import Manifest
from distbelief.engine.base import Death, Engine
from distbelief.engine.insistent import All, Insistent
from distbelief.errors import (
    ChannelError,
    DeadlineExceeded,
    DistbeliefError,
    Fenced,
    NotReady,
    PeerLost,
    TrainingFailed,
    UserCodeError,
)
from distbelief.parameter_server import ParameterServer, ParameterServerShard
from distbelief.parameters import Span
from distbelief.portions import Failures, Leases
from distbelief.progress import Counters, Meter
from distbelief.roster import Granted, Refusal, ReplicaRecord, Report, RoleSpec, Settings
from distbelief.section import SectionStatus

T = TypeVar("T")

TICK_SECONDS = 0.05
PROGRESS_SECONDS = 0.5
LEAVE_SECONDS = 30.0
FIRST_WORD_SECONDS = 600.0
FIRST_CHECKPOINT_TRIES = 3
"""A shard may die while it is written; a full disk stays full."""
EVALUATION_SECONDS = 600.0
"""The last evaluation is given up when it takes longer than this and than twenty times the slowest before it."""


@final
class Coordinator:
    """The center of one job. Its exported methods are what replicas and the evaluator may ask of it."""

    def __init__(
        self, engine: Engine, settings: Settings, leases: Leases, buffers: Sequence[torch.Tensor],
        manifest: Callable[..., Manifest], emit: Callable[[events.AnyEvent], None],
    ) -> None:  # fmt: skip
        self.engine, self.settings, self.leases, self.emit = engine, settings, leases, emit
        self.interrupted: str | None = None
        """Set from outside (a signal handler) to make the job stop cleanly with this reason."""
        self._manifest = manifest
        self._initial_buffers = list(buffers)
        """Per partition."""
        self._meetings: dict[str, bytes] = {}
        """What partitions tell each other to form a replica: by their replica, its incarnation, and a key of theirs."""
        self._begun = False
        """Whether there is a checkpoint that a shard can come back from; no example is handed out before."""
        now = engine.now()
        self._replicas = [ReplicaRecord(settings.incarnation, now) for _ in settings.replicas]
        self._incarnations = {spec.name: settings.incarnation for spec in self._specs()}
        self._shards = [engine.find(spec.name, ParameterServerShard) for spec in settings.shards]
        self._meter = Meter(now, leases.settled_examples)
        self._refused_examples = self._refused_pushes = 0
        self.counters = Counters()
        self._asked: All[list[SectionStatus]] | None = None
        self._asked_at = 0.0
        self._errands: list[Callable[[], bool]] = []
        self._restoring: set[int] = set()
        """Shards that are being given a checkpoint; until they have it, none is begun and none is removed."""
        self._writing: Path | None = None
        """The checkpoint under way."""
        self._failures = Failures(limit=max(8, 3 * len(self._specs())))
        self._failure: DistbeliefError | None = None
        self._dead: list[Death] = []
        self._released = self._allowed()
        self._epoch = leases.epoch
        self._evaluation_due = leases.settled_examples + settings.evaluate_examples
        self._evaluation: int | None = None
        self._evaluated: int | None = None
        self._slowest_evaluation = 0.0
        self._evaluation_left = not settings.evaluator
        self._stopping = False
        self._checkpoint_at = now + settings.checkpoint_seconds

    def _specs(self) -> list[RoleSpec]:
        own = self.settings
        return [*own.shards, *(member for replica in own.replicas for member in replica), *own.evaluator]

    # what replicas may ask

    @exported
    def lease(self, replica: int, incarnation: int, settled: tuple[tuple[int, int], ...]) -> Granted:
        """Examples to work on; `settled` as in a Report. Raises Fenced for an incarnation that was replaced."""
        self._hear(replica, incarnation)
        self._settle(replica, settled)
        if self._stopping or self.leases.finished:
            return Granted(None, True)
        if replica >= self._allowed() or not self._begun:
            return Granted(None, False)
        return Granted(self.leases.next(replica), False)

    @exported
    def report(self, report: Report) -> bool:
        """Take a replica's report; the answer is whether it should stop. Raises Fenced."""
        record = self._hear(report.replica, report.incarnation)
        record.slowest_seconds = max(record.slowest_seconds, report.slowest_seconds)
        self._meter.count(report.loss_sum, report.examples)
        for refusal in report.refused:
            self._refuse(report.replica, refusal)
        self._settle(report.replica, report.settled)
        return self._stopping

    @exported
    def leave(self, replica: int, incarnation: int) -> None:
        """A replica ends cleanly; what it had not settled goes back."""
        self._hear(replica, incarnation).left = True
        self.leases.give_back(replica)

    @exported
    def take_buffers(self, replica: int, partition: int, values: torch.Tensor) -> None:
        """The BatchNorm statistics and counters of one partition of a replica, float64 of shape (b,)."""
        self._replicas[replica].buffers[partition] = values.clone()

    @exported
    def mean_buffers(self, partition: int, values: Out) -> None:
        """The mean of the live replicas' buffers, float64 of shape (b,)."""
        values.copy_(self.buffers()[partition])

    @exported
    def wants_parameters(self, replica: int) -> bool:
        """Whether this replica should give the shards its initial parameters: the first one, until the job begins."""
        return replica == 0 and not self._begun

    @exported
    def keep(self, meeting: str, key: str, value: bytes) -> None:
        """Remember what a partition says to those that it meets."""
        self._meetings[f"{meeting}/{key}"] = value

    @exported
    def look(self, meeting: str, key: str) -> bytes | None:
        """What was said at a meeting, if anything."""
        return self._meetings.get(f"{meeting}/{key}")

    # what the evaluator may ask

    @exported
    def next_evaluation(self) -> tuple[int | None, bool]:
        """(examples at which to evaluate now, or None; whether there will be no more)."""
        if self._evaluation is None and self._evaluation_due <= self.leases.settled_examples:
            self._evaluation = self.leases.settled_examples
        return self._evaluation, self._evaluation_left

    @exported
    def evaluated(self, examples: int, loss: float | None, metrics: dict[str, float], seconds: float) -> None:
        """What the evaluator measured."""
        self._evaluation, self._evaluated = None, examples
        self._slowest_evaluation = max(self._slowest_evaluation, seconds)
        self._evaluation_due = max(self._evaluation_due, self.leases.settled_examples) + (
            self.settings.evaluate_examples - self.leases.settled_examples % self.settings.evaluate_examples
        )
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        loss = loss if loss is not None and math.isfinite(loss) else None
        self.emit(events.Evaluated(examples=examples, loss=loss, metrics=finite, evaluation_seconds=seconds))

    # the activity

    def start(self, restore: tuple[Path, Manifest] | None) -> None:
        """Start every role; the shards take the first replica's initial parameters, or a checkpoint's."""
        self._begun = restore is not None
        for spec in self._specs():
            self._start(spec)
        if restore is not None:
            folder, manifest = restore
            self._wait(All(self.engine, [shard.call(ParameterServerShard.restore, str(folder), manifest.shards, {})
                            for shard in self._shards]))  # fmt: skip
            return
        failed = 0
        while not self._begun:
            self._tick()
            if all(section.ready for sections in self._wait(self._status()) for section in sections):
                self._begun = self.checkpoint()
                failed += not self._begun
            if failed == FIRST_CHECKPOINT_TRIES:
                raise TrainingFailed(f"the first checkpoint could not be written below {self.settings.run}")

    def run(self) -> str:
        """Watch over the job until it is finished; returns the reason why it ended. Raises what ended it badly."""
        while not (self.leases.finished or self._stopping):
            self._tick()
            if self.engine.now() >= self._checkpoint_at and not self._restoring:
                self.checkpoint()
        if self.interrupted:
            self.emit(events.JobStopping(reason=self.interrupted))
        self._wind_down()
        self._progress(0.0)
        return self.interrupted or "all epochs finished"

    def _tick(self) -> None:
        """One round: see who died, go on with what waits for an answer, report, and let calls be answered."""
        now = self.engine.now()
        self._bury_the_dead()
        self._end_the_silent(now)
        # An errand that leads to another appends it to this very list, so it has its turn too.
        self._errands = [errand for errand in self._errands if not errand()]
        if self._failure is not None:
            raise self._failure
        if self.interrupted:
            self._stopping = True
        self._progress(PROGRESS_SECONDS)
        self.engine.sleep(TICK_SECONDS)

    def _wait(self, answer: Future[T]) -> T:
        """An answer, watching over everything else meanwhile."""
        while not answer.done():
            self._tick()
        return answer.result()

    def _later(self, answer: Future[T], then: Callable[[T], None]) -> None:
        """When the answer has come, act on it; a role that died instead is dealt with as a death."""

        def errand() -> bool:
            if not answer.done():
                return False
            with contextlib.suppress(PeerLost, DeadlineExceeded):
                then(answer.result())
            return True

        self._errands.append(errand)

    def _wind_down(self) -> None:
        """Let replicas push what they hold and leave, evaluate once more, take the last checkpoint."""
        self._stopping = True
        until = self.engine.now() + max(LEAVE_SECONDS, *(20 * record.slowest_seconds for record in self._replicas))
        while not all(record.left for record in self._replicas):
            self._tick()
            if self.engine.now() > until:
                for index, record in enumerate(self._replicas):
                    if not record.left:
                        self._end(self._leader(index), record.incarnation, "did not leave in time")
                until = math.inf
        if not self._evaluation_left:
            if self._evaluation is None and self._evaluated != self.leases.settled_examples:
                self._evaluation = self.leases.settled_examples
            until = self.engine.now() + max(EVALUATION_SECONDS, 20 * self._slowest_evaluation)
            while self._evaluation is not None and self.engine.now() < until:
                self._tick()
            self._evaluation_left = True
        self.counters.update(self._wait(self._status()))
        self.checkpoint()

    def fetch(self, into: torch.Tensor, spans: Sequence[Span]) -> None:
        """The parameters after `run`, shape (n,), of a replica of one process, from shards of these spans."""
        self._wait(ParameterServer(self.engine, spans, Span(0, len(into)), -1).fetch(into))

    # life and death

    def _start(self, spec: RoleSpec) -> None:
        incarnation = self._incarnations[spec.name]
        self.engine.start(spec.name, incarnation, spec.factory, *spec.arguments)
        self.emit(events.RoleStarted(role=spec.name, incarnation=incarnation))

    def _end(self, role: str, incarnation: int, reason: str) -> None:
        """End a role that is given up, and treat it as dead."""
        self.engine.stop(role)
        self._dead.append(Death(role, incarnation, reason))

    def _bury_the_dead(self) -> None:
        self._dead.extend(self.engine.deaths())
        while self._dead:
            death = self._dead.pop(0)
            if death.incarnation != self._incarnations[death.role]:
                continue
            if death.failure is not None:
                raise UserCodeError(f"{death.failure}\n{death.role} raised the exception above; the job was stopped")
            self.emit(events.RoleLost(role=death.role, incarnation=death.incarnation, reason=death.reason))
            if self._failures.died(self.leases.settled_examples):
                raise TrainingFailed(
                    f"{self._failures.limit + 1} roles died without an example being finished in between; the last was "
                    f"{death.role} ({death.reason}).\nhint: look for lack of memory (dmesg), then resume the run"
                )
            kind, *index = death.role.split("/")
            if kind == "replica":
                self._give_up(self.settings.replicas[int(index[0])])
                self._lose_replica(int(index[0]), death.incarnation)
            elif kind == "shard":
                self._incarnations[death.role] += 1
                self._restore_shard(int(index[0]))
            else:
                self._give_up(self.settings.evaluator)
                for member in self.settings.evaluator:
                    self._start(member)

    def _give_up(self, members: Sequence[RoleSpec]) -> None:
        """End what is left of a replica that lost a partition; those that saw it go are ending already."""
        for member in members:
            self.engine.stop(member.name)
            self._incarnations[member.name] += 1
        if len(members) > 1:
            gone = members[0].name.removesuffix("0")
            self._meetings = {key: value for key, value in self._meetings.items() if not key.startswith(gone)}

    def _leader(self, replica: int) -> str:
        return self.settings.replicas[replica][-1].name

    def _lose_replica(self, index: int, incarnation: int) -> None:
        """Fence the dead incarnation on all shards, take its leases back, start the next incarnation."""
        record = self._replicas[index]
        record.buffers, record.alive = {}, False

        def fenced(applied: list[list[dict[int, int]]]) -> None:
            loss = self.leases.lose(index, [section for shard in applied for section in shard])
            self.emit(
                events.LeasesReturned(replica=index, leases=loss.leases, examples=loss.examples, repeated=loss.repeated)
            )
            self._after_settling()
            record.incarnation, record.heard = self._incarnations[self._leader(index)], self.engine.now()
            record.left, record.slowest_seconds = self._stopping, 0.0
            if not record.left:
                record.alive = True
                for member in self.settings.replicas[index]:
                    self._start(member)

        if not self._begun:
            fenced([])  # nothing has been handed out, and the shards may be waiting for this very replica
            return
        answers = [
            Insistent(self.engine, partial(shard.call, ParameterServerShard.fence, index, incarnation))
            for shard in self._shards
        ]
        self._later(All(self.engine, answers), fenced)

    def _restore_shard(self, index: int) -> None:
        """Start the shard again and give it the newest checkpoint; replicas wait for it and push again.

        Which one is the newest that is whole shows when all of it has been read; that happens beside the coordinator.
        """
        self._start(self.settings.shards[index])
        if not self._begun:
            return  # the first replica gives it the initial parameters
        shard = self._shards[index]
        self._restoring.add(index)
        damaged: list[events.CheckpointRejected] = []

        def reject(folder: Path, reason: str) -> None:
            if folder != self._writing:
                damaged.append(events.CheckpointRejected(path=str(folder), reason=reason))

        def found(newest: tuple[Path, Manifest]) -> None:
            for event in damaged:
                self.emit(event)
            folder, files = str(newest[0]), newest[1].shards

            def restore() -> Future[list[int]]:
                return shard.call(ParameterServerShard.restore, folder, files, self._replaced())

            # A shard that has its parameters does not take them again, so asking twice undoes nothing.
            self._later(Insistent(self.engine, restore), restored)

        def restored(versions: list[int]) -> None:
            self._restoring.discard(index)
            self.counters.restored(index, versions)
            self.emit(events.ShardRestored(shard=index, version=max(versions)))

        self._later(self.engine.background(partial(checkpoint.newest, self.settings.run, reject)), found)

    def _replaced(self) -> dict[int, int]:
        """Replica -> its newest incarnation that is given up, for those that died at least once."""
        newest = {index: self._incarnations[self._leader(index)] - 1 for index in range(len(self._replicas))}
        return {index: incarnation for index, incarnation in newest.items() if incarnation >= self.settings.incarnation}

    def _end_the_silent(self, now: float) -> None:
        """Give up roles that hang: a shard first, since replicas that wait for it are silent too."""
        if self._asked is not None and not self._asked.done() and now - self._asked_at > self.settings.silence_seconds:
            self._asked_at = now
            for index in self._asked.outstanding():
                name = self.settings.shards[index].name
                self._end(name, self._incarnations[name], f"not heard of for {self.settings.silence_seconds:.0f} s")
            for record in self._replicas:
                record.heard = now
        for index, record in enumerate(self._replicas):
            # Before its first word a replica builds its model, which may take longer than any mini-batch.
            patience = 20 * record.slowest_seconds if record.slowest_seconds else FIRST_WORD_SECONDS
            limit = max(self.settings.silence_seconds, patience)
            if not record.left and now - record.heard > limit:
                record.heard = now
                self._end(self._leader(index), record.incarnation, f"not heard of for {limit:.0f} s")

    def _hear(self, replica: int, incarnation: int) -> ReplicaRecord:
        record = self._replicas[replica]
        if incarnation != record.incarnation:
            raise Fenced(f"replica {replica} incarnation {incarnation} has been replaced by {record.incarnation}")
        record.heard = self.engine.now()
        return record

    def _refuse(self, replica: int, refusal: Refusal) -> None:
        self._refused_examples += refusal.examples
        self._refused_pushes += 1
        self.emit(
            events.PushRefused(replica=replica, step=refusal.step, examples=refusal.examples, reason=refusal.reason)
        )
        if self._refused_pushes > self.settings.refusals and self._failure is None:
            self._failure = TrainingFailed(
                f"{self._refused_pushes} pushes were refused, the limit is {self.settings.refusals}; the last by "
                f"replica {replica} at its step {refusal.step}: {refusal.reason}\n"
                "hint: lower the learning rate, set Downpour(clip_norm=...), or check the data for NaN"
            )

    # progress

    def _allowed(self) -> int:
        leases = self.leases
        return self.settings.stages.released(leases.settled_examples, leases.examples_to_come, len(self._replicas))

    def _settle(self, replica: int, settled: tuple[tuple[int, int], ...]) -> None:
        for identifier, position in settled:
            self.leases.settle(replica, identifier, position)
        if settled:
            self._after_settling()

    def _after_settling(self) -> None:
        settled = self.leases.settled_examples
        released = self._allowed()
        if released > self._released:
            self._released = released
            self.emit(events.ReplicasReleased(replicas=released, examples=settled))
        while self._epoch < self.leases.epoch:
            seen = self.leases.examples_per_epoch
            self.emit(events.EpochFinished(epoch=self._epoch, seen=seen, repeated=self.leases.repeated))
            self._epoch += 1

    def _progress(self, seconds: float) -> None:
        """Report, unless the last report is younger than `seconds`."""
        now = self.engine.now()
        if not self._meter.due(now, seconds):
            return
        self._ask_statuses()
        alive = sum(record.alive and not record.left for record in self._replicas)
        self.emit(self._meter.progress(now, self.leases, self.counters, alive))

    def _ask_statuses(self) -> None:
        """Ask the shards for their counters; what they answer is used the next time."""
        if self._asked is None or self._asked.done():
            self._asked_at = self.engine.now()
            self._asked = self._status()
            self._later(self._asked, self.counters.update)

    def _status(self) -> All[list[SectionStatus]]:
        """Every shard's counters."""
        calls = [partial(shard.call, ParameterServerShard.status) for shard in self._shards]
        return All(self.engine, [Insistent(self.engine, call) for call in calls])

    def finished(self, reason: str, resume: str, export: str) -> events.JobFinished:
        """The last event of the run."""
        seen = self.leases.settled_examples
        return events.JobFinished(
            reason=reason, seen=seen, repeated=self.leases.repeated, missing=self.leases.total_examples - seen,
            refused=self._refused_examples, lost_updates=self.counters.lost_updates, pushes=self.counters.pushes,
            mini_batches=self.counters.mini_batches, staleness=self.counters.staleness,
            resume_command=resume, export_command=export,
        )  # fmt: skip

    def buffers(self) -> list[torch.Tensor]:
        """Per partition, the mean of the live replicas' buffers; before any has reported, the initial ones."""
        reported = [
            [record.buffers[partition] for record in self._replicas if partition in record.buffers]
            for partition in range(len(self._initial_buffers))
        ]
        means = [torch.stack(some).mean(0) if some else None for some in reported]
        return [first if mean is None else mean for mean, first in zip(means, self._initial_buffers, strict=True)]

    # checkpoints

    def checkpoint(self) -> bool:
        """Write a checkpoint; when that fails, report it and keep the previous one. Returns whether it was written."""
        started = self.engine.now()
        state, settled = self.leases.state(), self.leases.settled_examples
        folder: Path | None = None
        try:
            folder = self._writing = checkpoint.next_folder(self.settings.run)
            answers = [
                shard.call(ParameterServerShard.snapshot, str(folder / f"shard-{index}"))
                for index, shard in enumerate(self._shards)
            ]
            sections: list[Any] = self._wait(All(self.engine, answers))
            files = [file for section in sections for file in section]
            incarnation = max(self._incarnations.values()) + 1
            manifest = self._manifest(leases=state, shards=files, examples=settled, incarnation=incarnation)
            checkpoint.commit(folder, manifest, self.buffers())
            if not self._restoring:
                checkpoint.keep_newest(self.settings.run, self.settings.keep_checkpoints)
        except (OSError, ChannelError, NotReady) as error:
            if folder is not None:
                checkpoint.discard(folder)
            where = folder or self.settings.run / "checkpoints"
            self.emit(events.CheckpointFailed(path=str(where), reason=str(error).strip().splitlines()[-1]))
            return False
        finally:
            self._writing = None
            self._checkpoint_at = self.engine.now() + self.settings.checkpoint_seconds
        seconds = self.engine.now() - started
        self.emit(events.CheckpointWritten(path=str(folder), examples=settled, checkpoint_seconds=seconds))
        return True
