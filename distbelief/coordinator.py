# SPDX-License-Identifier: Apache-2.0
"""The coordinator: starts roles, watches them, replaces the lost, hands out leases, takes checkpoints, reports.

It lives in the user's process and knows no algorithm: what a replica does with a lease is its own affair. Everything
here happens in one thread. Exported methods answer replicas at once and only note what is to be done; `run` does it.

The file is longer than others because it is one class: what replicas ask, and the supervision that their questions
feed, share the same records. Decisions without I/O are apart: portions.py, progress.py.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar, final

import torch

from distbelief import checkpoint, events
from distbelief.channel.base import Future, Out, exported
from distbelief.checkpoint import Manifest
from distbelief.engine.base import Death, Engine
from distbelief.errors import (
    ChannelError,
    DeadlineExceeded,
    DistbeliefError,
    Fenced,
    PeerLost,
    TrainingFailed,
    UserCodeError,
)
from distbelief.parameter_server import All, Insistent, ParameterServer, ParameterServerShard, ShardStatus
from distbelief.parameters import Span
from distbelief.portions import Failures, Leases
from distbelief.progress import Meter
from distbelief.roster import Granted, Refusal, ReplicaRecord, Report, RoleSpec, Settings, replica_name

T = TypeVar("T")

TICK_SECONDS = 0.05
PROGRESS_SECONDS = 0.5
LEAVE_SECONDS = 30.0
FIRST_WORD_SECONDS = 600.0
EVALUATION_SECONDS = 600.0
"""The last evaluation is given up when it takes longer than this and than twenty times the slowest before it."""


@final
class Coordinator:
    """The center of one job. Its exported methods are what replicas and the evaluator may ask of it."""

    def __init__(
        self, engine: Engine, settings: Settings, leases: Leases, buffers: torch.Tensor,
        manifest: Callable[..., Manifest], emit: Callable[[events.AnyEvent], None], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.engine, self.settings, self.leases, self.emit = engine, settings, leases, emit
        self.interrupted: str | None = None
        """Set from outside (a signal handler) to make the job stop cleanly with this reason."""
        self._manifest = manifest
        self._initial_buffers = buffers
        now = engine.now()
        self._replicas = [ReplicaRecord(settings.incarnation, now) for _ in settings.replicas]
        self._incarnations = {spec.name: settings.incarnation for spec in self._specs()}
        self._shards = [engine.find(spec.name, ParameterServerShard) for spec in settings.shards]
        self._meter = Meter(now, leases.settled_examples)
        self._refused_examples = self._refused_pushes = 0
        self._statuses: dict[int, ShardStatus] = {}
        self._asked: All[ShardStatus] | None = None
        self._asked_at = 0.0
        self._errands: list[Callable[[], bool]] = []
        self._failures = Failures(limit=max(8, 3 * len(self._specs())))
        self._lost_updates: dict[int, int] = {}
        """Shard -> pushes known to have been applied to it that its restarts have lost."""
        self._failure: DistbeliefError | None = None
        self._dead: list[Death] = []
        self._released = self._allowed()
        self._epoch = leases.epoch
        self._evaluation_due = leases.settled_examples + settings.evaluate_examples
        self._evaluation: int | None = None
        self._evaluated: int | None = None
        self._slowest_evaluation = 0.0
        self._evaluation_left = settings.evaluator is None
        self._stopping = False
        self._checkpoint_at = now + settings.checkpoint_seconds
        spans: list[Span] = [spec.arguments[0] for spec in settings.shards]
        self._spans, self._final = spans, engine.allocate(spans[-1].stop, dtype)

    def _specs(self) -> list[RoleSpec]:
        own = self.settings
        return [*own.shards, *own.replicas, *([own.evaluator] if own.evaluator else [])]

    # what replicas may ask

    @exported
    def lease(self, replica: int, incarnation: int, settled: tuple[tuple[int, int], ...]) -> Granted:
        """Examples to work on; `settled` as in a Report. Raises Fenced for an incarnation that was replaced."""
        self._hear(replica, incarnation)
        self._settle(replica, settled)
        if self._stopping or self.leases.finished:
            return Granted(None, True)
        if replica >= self._allowed():
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
    def take_buffers(self, replica: int, values: torch.Tensor) -> None:
        """A replica's BatchNorm statistics and counters, float64 of shape (b,)."""
        self._replicas[replica].buffers = values.clone()

    @exported
    def mean_buffers(self, values: Out) -> None:
        """The mean of the live replicas' buffers, float64 of shape (b,)."""
        values.copy_(self.buffers())

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

    def start(self, initial: torch.Tensor | None, restore: tuple[Path, Manifest] | None) -> None:
        """Start every role; the shards take the initial vector, shape (n,), or a checkpoint's."""
        for spec in self._specs():
            self._start(spec)
        if restore is not None:
            folder, manifest = restore
            self._wait(All(self.engine, [shard.call(ParameterServerShard.restore, str(folder), manifest.shards)
                            for shard in self._shards]))  # fmt: skip
            return
        assert initial is not None
        self._wait(All(self.engine, [shard.call(ParameterServerShard.initialise, initial[span.start : span.stop])
                        for shard, span in zip(self._shards, self._spans, strict=True)]))  # fmt: skip
        if not self.checkpoint():
            raise TrainingFailed(f"the first checkpoint could not be written below {self.settings.run}")

    def run(self) -> str:
        """Watch over the job until it is finished; returns the reason why it ended. Raises what ended it badly."""
        while not (self.leases.finished or self._stopping):
            self._tick()
            if self.engine.now() >= self._checkpoint_at:
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
                        self._end(replica_name(index), record.incarnation, "did not leave in time")
                until = math.inf
        if not self._evaluation_left:
            if self._evaluation is None and self._evaluated != self.leases.settled_examples:
                self._evaluation = self.leases.settled_examples
            until = self.engine.now() + max(EVALUATION_SECONDS, 20 * self._slowest_evaluation)
            while self._evaluation is not None and self.engine.now() < until:
                self._tick()
            self._evaluation_left = True
        answers = [Insistent(self.engine, partial(shard.call, ParameterServerShard.status)) for shard in self._shards]
        self._statuses.update(enumerate(self._wait(All(self.engine, answers))))
        self.checkpoint()
        server = ParameterServer(self.engine, self._spans, -1)
        self._wait(server.fetch(self._final))

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
            self._incarnations[death.role] += 1
            kind, _, index = death.role.partition("/")
            if kind == "replica":
                self._lose_replica(int(index), death)
            elif kind == "shard":
                self._restore_shard(int(index))
            else:
                assert self.settings.evaluator is not None
                self._start(self.settings.evaluator)

    def _lose_replica(self, index: int, death: Death) -> None:
        """Fence the dead incarnation on all shards, take its leases back, start the next incarnation."""
        record = self._replicas[index]
        record.buffers, record.alive = None, False

        def fenced(applied: list[dict[int, int]]) -> None:
            loss = self.leases.lose(index, applied)
            self.emit(
                events.LeasesReturned(replica=index, leases=loss.leases, examples=loss.examples, repeated=loss.repeated)
            )
            self._after_settling()
            record.incarnation, record.heard = self._incarnations[death.role], self.engine.now()
            record.left, record.slowest_seconds = self._stopping, 0.0
            if not record.left:
                record.alive = True
                self._start(self.settings.replicas[index])

        answers = [
            Insistent(self.engine, partial(shard.call, ParameterServerShard.fence, index, death.incarnation))
            for shard in self._shards
        ]
        self._later(All(self.engine, answers), fenced)

    def _restore_shard(self, index: int) -> None:
        """Start the shard again and give it the newest checkpoint; replicas wait for it and push again."""
        known = self._statuses.get(index)
        self._start(self.settings.shards[index])
        shard = self._shards[index]
        folder, manifest = checkpoint.newest(self.settings.run, self._reject)

        def restored(version: int) -> None:
            for replica, record in enumerate(self._replicas):
                if record.incarnation > self.settings.incarnation:
                    shard.call(ParameterServerShard.fence, replica, record.incarnation - 1)
            lost = known.version - version if known is not None else 0
            self._lost_updates[index] = self._lost_updates.get(index, 0) + max(0, lost)
            self.emit(events.ShardRestored(shard=index, version=version))

        # A shard that has its parameters does not take them again, so asking twice undoes nothing.
        call = partial(shard.call, ParameterServerShard.restore, str(folder), manifest.shards)
        self._later(Insistent(self.engine, call), restored)

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
                self._end(replica_name(index), record.incarnation, f"not heard of for {limit:.0f} s")

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
        self.emit(self._meter.progress(now, self.leases, self.pushes, self.staleness, alive))

    def _ask_statuses(self) -> None:
        """Ask the shards for their counters; what they answer is used the next time."""
        if self._asked is None or self._asked.done():
            self._asked_at = self.engine.now()
            calls = [partial(shard.call, ParameterServerShard.status) for shard in self._shards]
            self._asked = All(self.engine, [Insistent(self.engine, call) for call in calls])
            self._later(self._asked, lambda answers: self._statuses.update(enumerate(answers)))

    @property
    def pushes(self) -> int:
        """Pushes applied by the shard that has applied most."""
        return max((status.version for status in self._statuses.values()), default=0)

    @property
    def staleness(self) -> dict[int, int]:
        """Staleness -> pushes, over all shards."""
        counts: dict[int, int] = {}
        for status in self._statuses.values():
            for staleness, count in status.staleness.items():
                counts[staleness] = counts.get(staleness, 0) + count
        return counts

    def finished(self, reason: str, resume: str, export: str) -> events.JobFinished:
        """The last event of the run."""
        seen = self.leases.settled_examples
        return events.JobFinished(
            reason=reason, seen=seen, repeated=self.leases.repeated, missing=self.leases.total_examples - seen,
            refused=self._refused_examples,
            lost_updates=sum(
                max(status.lost_updates, self._lost_updates.get(index, 0)) for index, status in self._statuses.items()
            ),
            pushes=self.pushes, staleness=self.staleness, resume_command=resume, export_command=export,
        )  # fmt: skip

    def parameters(self) -> torch.Tensor:
        """The shards' parameters after `run`, shape (n,)."""
        return self._final

    def buffers(self) -> torch.Tensor:
        """The mean of the live replicas' buffers; the initial ones before any has reported."""
        reported = [record.buffers for record in self._replicas if record.buffers is not None]
        return torch.stack(reported).mean(0) if reported else self._initial_buffers

    # checkpoints

    def checkpoint(self) -> bool:
        """Write a checkpoint; when that fails, report it and keep the previous one. Returns whether it was written."""
        started = self.engine.now()
        state, settled = self.leases.state(), self.leases.settled_examples
        folder: Path | None = None
        try:
            folder = checkpoint.next_folder(self.settings.run)
            answers = [
                shard.call(ParameterServerShard.snapshot, str(folder / f"shard-{index}.safetensors"))
                for index, shard in enumerate(self._shards)
            ]
            files = self._wait(All(self.engine, answers))
            incarnation = max(self._incarnations.values()) + 1
            manifest = self._manifest(leases=state, shards=files, examples=settled, incarnation=incarnation)
            checkpoint.commit(folder, manifest, self.buffers())
            checkpoint.keep_newest(self.settings.run, self.settings.keep_checkpoints)
        except (OSError, ChannelError) as error:
            if folder is not None:
                checkpoint.discard(folder)
            where = folder or self.settings.run / "checkpoints"
            self.emit(events.CheckpointFailed(path=str(where), reason=str(error).strip().splitlines()[-1]))
            return False
        finally:
            self._checkpoint_at = self.engine.now() + self.settings.checkpoint_seconds
        seconds = self.engine.now() - started
        self.emit(events.CheckpointWritten(path=str(folder), examples=settled, checkpoint_seconds=seconds))
        return True

    def _reject(self, folder: Path, reason: str) -> None:
        self.emit(events.CheckpointRejected(path=str(folder), reason=reason))
