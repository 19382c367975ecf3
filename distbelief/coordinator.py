# SPDX-License-Identifier: Apache-2.0
"""The coordinator: starts roles, watches them, replaces the lost, takes checkpoints, has the model evaluated.

It lives in the user's process, in one thread, and knows no algorithm: downpour_coordinator.py and
sandblaster_coordinator.py are this class with what replicas work on, and what their loss means, filled in. Exported
methods answer at once and only note what is to be done; `run` does it.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, final

import torch

from distbelief import events
from distbelief.buffers import SentBuffers
from distbelief.channel.base import Future, Out, exported
from distbelief.checkpoint import Manifest
from distbelief.checkpoint_writer import ROOM_HINT, CheckpointWriter, Writing
from distbelief.engine.base import COORDINATOR, Engine
from distbelief.engine.insistent import All, Insistent
from distbelief.errors import DeadlineExceeded, Fenced, PeerLost, TrainingFailed
from distbelief.evaluations import Evaluations
from distbelief.files import AnyPath
from distbelief.incarnations import Incarnations
from distbelief.parameter_server import ParameterServerShard
from distbelief.progress import Counters
from distbelief.roster import PATIENCE, ReplicaRecord, RoleSpec, Settings, awaited_offers, silent_replicas
from distbelief.section import ShardStatus
from distbelief.shard_file import ShardFile

T = TypeVar("T")

TICK_SECONDS = 0.05
PROGRESS_SECONDS = 0.5
LEAVE_SECONDS = 30.0
FIRST_CHECKPOINT_TRIES = 3
"""A shard may die while it is written; a full disk stays full."""


class Coordinator(ABC):
    """The center of one job. Its exported methods are what replicas and the evaluator may ask of it."""

    def __init__(
        self, engine: Engine, settings: Settings, buffers: Sequence[torch.Tensor], manifest: Callable[..., Manifest],
        emit: Callable[[events.AnyEvent], None],
    ) -> None:  # fmt: skip
        self.engine, self.settings, self.emit = engine, settings, emit
        self.interrupted: str | None = None
        """Set from outside (a signal handler) to make the job stop cleanly with this reason."""
        self._buffers = SentBuffers(buffers, len(settings.replicas))
        self._meetings: dict[str, bytes] = {}
        """What partitions tell each other to form a replica: by their replica, its incarnation, and a key of theirs."""
        self.begun = False
        """Whether there is a checkpoint that a shard can come back from; no example is handed out before."""
        now = engine.now()
        self.replicas = [ReplicaRecord(settings.incarnation, now) for _ in settings.replicas]
        self.incarnations = Incarnations(engine, settings.roles, settings.incarnation, emit)
        patience = settings.shard_silence_seconds
        self.shards = [engine.find(spec.name, ParameterServerShard, patience) for spec in settings.shards]
        self.writer = CheckpointWriter(engine, settings, self.shards, manifest, emit, self.wait)
        self.counters = Counters()
        self._asked: All[ShardStatus] | None = None
        self._asked_at = self._progress_at = self._looked_at = now
        self._held_up_seconds = 0.0  # for so long replicas have had to wait for shards, and could say nothing
        self._errands: list[Callable[[], bool]] = []
        self.restoring: list[int] = []
        """Shards that are being given a checkpoint, one entry a death; until then none is begun and none is removed."""
        self.stopping = False
        self.failure: Exception | None = None  # ends the job at the next tick
        self._evaluations = Evaluations(settings.evaluate_examples, wanted=bool(settings.evaluator))

    # what an algorithm answers

    @property
    @abstractmethod
    def examples(self) -> int:
        """Examples whose gradients have been applied, over the whole job."""

    @property
    def at_work(self) -> int:
        """How many replicas, the first ones, may be given work at the moment; all, where nothing else is said."""
        return len(self.replicas)

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """What a manifest says of the work done; asked before the shards write."""

    @abstractmethod
    def is_own(self, manifest: Manifest) -> bool:
        """Whether the checkpoint was written by this algorithm; another one's holds parameters only."""

    @abstractmethod
    def lose_replica(self, index: int, incarnation: int) -> None:
        """A replica died; what it was working on goes to others, and `replace_replica` is called for it."""

    @abstractmethod
    def shard_restored(self, index: int) -> None:
        """A shard that died has the parameters and vectors of the newest checkpoint."""

    @abstractmethod
    def tell_progress(self, now: float, alive: int) -> None:
        """Emit how the job gets on; about twice a second."""

    @abstractmethod
    def run(self) -> str:
        """Watch over the job until it is finished; returns the reason why it ended. Raises what ended it badly."""

    @abstractmethod
    def go_on(self) -> tuple[str, str]:
        """How the job could go on from here: (an option of the command line, or nothing; the job as an expression)."""

    @abstractmethod
    def finished(self, reason: str, resume: str, export: str) -> events.AnyEvent:
        """The last event of the run."""

    # what replicas may ask

    @exported
    def take_buffers(self, replica: int, partition: int, values: torch.Tensor) -> None:
        """The BatchNorm statistics and counters of one partition of a replica, float64 of shape (b,)."""
        self._buffers.take(replica, partition, values)

    @exported
    def mean_buffers(self, partition: int, values: Out) -> None:
        """The mean of the buffers of replicas at work, float64 of shape (b,)."""
        values.copy_(self.buffers()[partition])

    @exported
    def wants_parameters(self, replica: int) -> bool:
        """Whether this replica should give the shards its initial parameters: the first one, until the job begins."""
        return replica == 0 and not self.begun

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
        return self._evaluations.next(self.examples)

    @exported
    def evaluated(self, examples: int, loss: float | None, metrics: dict[str, float], seconds: float) -> None:
        """What the evaluator measured."""
        self.emit(self._evaluations.finished(examples, loss, metrics, seconds, self.examples))

    # the activity

    @final
    def start(self, restore: tuple[AnyPath, Manifest] | None) -> None:
        """Start every role; the shards take the first replica's initial parameters, or a checkpoint's."""
        self.begun = restore is not None
        self._evaluations.begin(self.examples, at_once=self.settings.evaluate_at_once)
        self.incarnations.start(self.settings.roles)
        if restore is not None:
            self.restore(*restore)
            return
        failed = 0
        while not self.begun:
            self.tick()
            if all(section.ready for status in self.ask_statuses() for section in status.sections):
                self.begun = self.checkpoint()
                failed += not self.begun
            if failed == FIRST_CHECKPOINT_TRIES:
                raise TrainingFailed(f"the first checkpoint could not be written: {self.writer.problem}\n{ROOM_HINT}")

    @final
    def restore(self, folder: AnyPath, manifest: Manifest) -> None:
        """Give every shard this checkpoint."""
        own = self.is_own(manifest)
        self.counters.go_on(manifest.lost_updates if own else 0)
        self.wait(self.ask_shards(ParameterServerShard.restore, str(folder), manifest.shards, {}, own, None))

    @final
    def ask_shards(self, method: Callable[..., Any], *arguments: Any) -> All[Any]:
        """Start asking every shard; one that dies meanwhile is asked again."""
        engine, shards = self.engine, self.shards
        return All(engine, [Insistent(engine, partial(shard.call, method, *arguments)) for shard in shards])

    @final
    def ask_statuses(self) -> list[ShardStatus]:
        """What every shard says of itself; one that died or hangs is found meanwhile, and its next life says it."""
        self.counters.update(statuses := self.wait(self.ask_shards(ParameterServerShard.status)))
        return statuses

    @final
    def tick(self, until: Future[Any] | None = None) -> None:
        """One round: see who died, go on with what waits, report, let calls be answered; shorter if `until` is done."""
        now = self.engine.now()
        self._bury_the_dead()
        self._end_the_silent(now)
        self._errands = [errand for errand in self._errands if not errand()]  # also those that one appends
        if self.failure is not None:
            raise self.failure
        if self.interrupted and not self.stopping:
            self.stopping = True
            self.emit(events.JobStopping(reason=self.interrupted))
        self.progress(PROGRESS_SECONDS)
        if until is None:
            self.engine.sleep(TICK_SECONDS)
        else:
            until.wait(TICK_SECONDS)

    @final
    def wait(self, answer: Future[T]) -> T:
        """An answer, watching over everything else meanwhile."""
        while not answer.done():
            self.tick(answer)
        return answer.result()

    @final
    def later(self, answer: Future[T], then: Callable[[T], None]) -> None:
        """When the answer has come, act on it; a role that died instead is dealt with as a death."""

        def errand() -> bool:
            if not answer.done():
                return False
            with contextlib.suppress(PeerLost, DeadlineExceeded):
                then(answer.result())
            return True

        self._errands.append(errand)

    @final
    def wind_down(self, *, keep: bool = False) -> None:
        """Let replicas push what they hold and leave, and evaluate once more; `keep` writes a checkpoint in between."""
        self.stopping = True
        lives = [status.incarnation for status in self.ask_statuses()]  # their versions tell what is lost later
        slow = max(LEAVE_SECONDS, *(PATIENCE * record.slowest_seconds for record in self.replicas))
        until = self.engine.now() - self._held_up_seconds + slow
        while not all(record.left for record in self.replicas):
            self.tick()
            if self.engine.now() - self._held_up_seconds > until:
                for index, record in enumerate(self.replicas):
                    if not record.left:
                        self.incarnations.end(self.settings.leaders[index], record.incarnation, "did not leave in time")
                until = math.inf
        while keep and not self.checkpoint():
            before, lives = lives, [status.incarnation for status in self.ask_statuses()]
            keep = lives != before  # once more where a shard was lost, not where the disk is full
        self._evaluations.begin_last(self.examples)
        while self._evaluations.awaited(self.engine.now()):
            self.tick()
        self._evaluations.end()
        self.ask_statuses()
        self.counters.refused(COORDINATOR, self.engine.incarnation, self.engine.strangers)

    # life and death

    def _bury_the_dead(self) -> None:
        for death in self.incarnations.deaths(self.examples):
            kind, *index = death.role.split("/")
            if kind == "replica":
                self._give_up(self.settings.replicas[int(index[0])])
                self._buffers.lose(int(index[0]), self.at_work)
                self.replicas[int(index[0])].alive = False
                self.lose_replica(int(index[0]), death.incarnation)
            elif kind == "shard":
                self.incarnations.give_up([self.settings.shards[int(index[0])]])
                self._restore_shard(int(index[0]))
            else:
                self._give_up(self.settings.evaluator)
                self.incarnations.start(self.settings.evaluator)

    def _give_up(self, members: Sequence[RoleSpec]) -> None:
        """End what is left of a replica that lost a partition; those that saw it go are ending already."""
        self.incarnations.give_up(members)
        if len(members) > 1:
            gone = members[0].name.removesuffix("0")
            self._meetings = {key: value for key, value in self._meetings.items() if not key.startswith(gone)}

    @final
    def replace_replica(self, index: int) -> None:
        """Start a lost replica's next incarnation; in a job that is to stop, only if the shards may wait for it."""
        record = self.replicas[index]
        record.incarnation, record.heard = self.incarnations.of(self.settings.leaders[index]), self.engine.now()
        record.left, record.slowest_seconds = self.stopping and self.begun, 0.0
        if not record.left:
            record.alive = True
            self.incarnations.start(self.settings.replicas[index])

    def _restore_shard(self, index: int) -> None:
        """Start the shard again and give it the newest checkpoint, which is looked for beside the coordinator."""
        self.incarnations.start([self.settings.shards[index]])
        if not self.begun:
            return  # the first replica gives it the initial parameters
        shard = self.shards[index]
        self.restoring.append(index)

        def look() -> bool:
            if self.writer.folder is not None and all(record.left for record in self.replicas):
                return False  # what the checkpoint under way may hold of the shard, nobody else has any more
            self.later(self.engine.background(self.writer.look), found)
            return True

        def found(newest: tuple[AnyPath, Manifest, list[events.CheckpointRejected]]) -> None:
            (place, manifest, damaged), offers = newest, self.settings.offers
            for event in damaged:
                self.emit(event)

            def restore() -> Future[list[int]]:
                replaced, own = self.incarnations.replaced(self.settings.leaders), self.is_own(manifest)
                awaited = awaited_offers(self.replicas[: self.at_work]) if offers else None
                return shard.call(ParameterServerShard.restore, str(place), manifest.shards, replaced, own, awaited)

            def restored(versions: list[int]) -> None:
                self.restoring.remove(index)
                if index in self.restoring:
                    return  # it has died again meanwhile, and is given a checkpoint once more
                self.counters.restored(index, versions)
                self._evaluations.spoilt()
                self.emit(events.ShardRestored(shard=index, version=max(versions), offers=offers))
                self.shard_restored(index)

            # Asking twice undoes nothing: Downpour's sections keep what they have, Sandblaster awaits the last answer.
            self.later(Insistent(self.engine, restore), restored)

        self._errands.append(look)

    def _end_the_silent(self, now: float) -> None:
        """Give up roles that hang: a shard first, since replicas that wait for it are silent too."""
        limit, elapsed, self._looked_at = self.settings.shard_silence_seconds, now - self._looked_at, now
        self._asked_at += elapsed if elapsed > self.settings.silence_seconds / 2 else 0.0  # all may have stood still
        silent = now - self._asked_at if self._asked is not None and not self._asked.done() else 0.0
        if self.restoring or max(silent, elapsed) > self.settings.silence_seconds / 2:
            self._held_up_seconds += elapsed
            for record in self.replicas:
                record.heard += elapsed
        if silent > limit and self._asked is not None:
            self._asked_at = now
            for name in [self.settings.shards[index].name for index in self._asked.outstanding()]:
                self.incarnations.end(name, self.incarnations.of(name), f"not heard of for {limit:.0f} s")
        for index, incarnation, limit in silent_replicas(self.replicas, now, self.settings.silence_seconds):
            self.incarnations.end(self.settings.leaders[index], incarnation, f"not heard of for {limit:.0f} s")

    @final
    def hear(self, replica: int, incarnation: int) -> ReplicaRecord:
        """A replica says something. Raises Fenced for an incarnation that was replaced."""
        record = self.replicas[replica]
        if incarnation != record.incarnation:
            raise Fenced(f"replica {replica} incarnation {incarnation} has been replaced by {record.incarnation}")
        record.heard = self.engine.now()
        return record

    # progress

    @final
    def progress(self, seconds: float) -> None:
        """Report, unless the last report is younger than `seconds` or no time has passed."""
        now = self.engine.now()
        if now > self._progress_at and now - self._progress_at >= seconds:
            self._progress_at = now
            if self._asked is None or self._asked.done():  # what the shards answer is used the next time
                self._asked, self._asked_at = self.ask_shards(ParameterServerShard.status), now
                self.later(self._asked, self.counters.update)
            self.tell_progress(now, sum(record.alive and not record.left for record in self.replicas))

    @final
    def buffers(self) -> list[torch.Tensor]:
        """Per partition, the mean of the buffers of replicas at work."""
        return self._buffers.mean(self.at_work)

    # checkpoints

    @final
    def checkpoint(self) -> bool:
        """Write a checkpoint; when that fails, report it and keep the previous one. Returns whether it was written."""
        while self.restoring:
            self.tick()
        if (writing := self.begin_checkpoint()) is None or self.complete_checkpoint(writing) is None:
            return False
        while self.restoring:
            self.tick()
        self.writer.keep_newest()
        return True

    @final
    def begin_checkpoint(self, slots: Sequence[int] = (), *, durable: bool = True, version: int = 0) -> Writing | None:
        """Have the shards write; None when there is no place for it. Arguments as in their `snapshot`."""
        return self.writer.begin(lambda: (self.work(), self.examples), slots, durable=durable, version=version)

    @final
    def complete_checkpoint(self, writing: Writing, kept: Sequence[tuple[AnyPath, ShardFile]] = ()) -> Manifest | None:
        """When the shards have written, make a checkpoint of it and of these files of earlier ones; None on failure."""
        while not writing.answers.done():
            self.tick(writing.answers)
        return self.writer.complete(writing, kept, self.incarnations.next, self.buffers())
