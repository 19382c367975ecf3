# SPDX-License-Identifier: Apache-2.0
"""Sandblaster's coordinator: hands out bundles, has the shards seal and step, never sees a vector (paper, section 4.2).

    solver says          replicas                         shards
    Evaluate(t)    ->    trial, compute, contribute  ->   seal: every inner product that the next direction needs
    Step(...)      ->                                     move, keep the pair, next direction; nobody waits for it
    Stop(reason)   ->    leave

Each step that moves is written down by the shards while the next evaluation is under way, so the death of a shard costs
at most that evaluation: the shard comes back at the same point, and the trial is computed again. A step that did not
reach a shard shows by its number: then all go back to the point that was written down before it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import msgspec
import torch

from distbelief import checkpoint, events
from distbelief.batch_section import Extent, Mark
from distbelief.bundles import Bundle
from distbelief.channel.base import Promise, exported
from distbelief.checkpoint import Manifest, Search
from distbelief.checkpoint_writer import Writing
from distbelief.coordinator import Coordinator
from distbelief.engine.base import Engine
from distbelief.engine.insistent import All
from distbelief.errors import DeadlineExceeded, NotReady, PeerLost, TrainingFailed
from distbelief.events import finite
from distbelief.files import AnyPath
from distbelief.lbfgs import Command, Evaluate, Gram, Solver, Step, Stop
from distbelief.parameter_server import ParameterServerShard
from distbelief.roster import Settings
from distbelief.sealed import add, merge
from distbelief.section import SectionStatus
from distbelief.shard_file import ShardFile
from distbelief.tasks import Done, Task, Work

IDLE_SECONDS = 1.0
"""A replica for which there is nothing is told so after this time, and asks again: so it is heard of."""


class Setback(Exception):
    """A shard or a step was lost: what the shards have of the evaluation is not complete."""


@final
class SandblasterCoordinator(Coordinator):
    """The center of a Sandblaster job."""

    def __init__(
        self, engine: Engine, settings: Settings, buffers: Sequence[torch.Tensor], manifest: Callable[..., Manifest],
        emit: Callable[[events.AnyEvent], None], solver: Solver, work: Work,
    ) -> None:  # fmt: skip
        super().__init__(engine, settings, buffers, manifest, emit)
        self.solver, self.portions, self._batches, self._objective = solver, work.portions, work.batches, work.objective
        self.round_trips = work.round_trips
        """Times that all shards were asked something and waited for."""
        self._waiting: dict[int, tuple[Promise[Task], float]] = {}
        """Replicas that have asked for a task, and since when."""
        self._task: Task | None = None
        """The trial that replicas compute now."""
        self._moment: Promise[None] = engine.promise()
        """Kept when the evaluation is complete, or cannot be."""
        self._number = 0
        """Of the evaluation under way."""
        self._spoilt: Bundle | None = None
        """A bundle of this evaluation whose loss is not finite."""
        self._version = self._moved = self._begun = 0
        """The number of the last step, and of the last one that moved the point: now, and before this start."""
        self._stepping: All[None] | None = None
        """The last step, until every shard has carried it out."""
        self._set_back: set[int] = set()
        """Shards that were restored since all were last known to be at one point."""
        self._writing_down: Writing | None = None
        self._unsaved: set[int] = set()
        """Slots of the history that no checkpoint holds as they are."""
        self._files: dict[int, list[tuple[AnyPath, ShardFile]]] = {}
        """Slot -> where the newest checkpoint has its pairs."""
        self._passing: list[tuple[AnyPath, Manifest]] = []
        """Checkpoints that are not durable, oldest first; the newest of them is kept."""
        self._computed = work.computed
        """Examples whose gradients were added up, over all evaluations."""
        self._rate = (engine.now(), work.computed)
        self._errands.append(self._offer)

    # what replicas may ask

    @exported
    def next_task(self, replica: int, incarnation: int) -> Promise[Task]:
        """What to do next; answered when there is something. Raises Fenced."""
        self.hear(replica, incarnation)
        promise: Promise[Task] = self.engine.promise()
        self._waiting[replica] = promise, self.engine.now()
        self._offer()
        return promise

    @exported
    def finish(self, replica: int, incarnation: int, done: Done) -> None:
        """A contribution is with every shard. Raises Fenced."""
        record = self.hear(replica, incarnation)
        record.slowest_seconds = max(record.slowest_seconds, done.seconds)
        if self._task is None or done.evaluation != self._number:
            return
        if not math.isfinite(done.loss_sum):
            self._spoilt = self.portions.bundles[done.bundle]
        else:
            self.portions.finish(replica, done.bundle, done.loss_sum, self.engine.now())
        if self._spoilt is not None or self.portions.complete:
            self._moment.keep(None)
        self._offer()

    @exported
    def leave(self, replica: int, incarnation: int) -> None:
        """A replica ends cleanly."""
        self.hear(replica, incarnation).left = True

    # what the coordinator asks

    @property
    def examples(self) -> int:
        """Examples whose gradients were added up, over all evaluations."""
        return self._computed

    def work(self) -> dict[str, Any]:
        """The solver, as it is after the last step."""
        state = self.solver.state  # all of it is values but itself and the search
        state = msgspec.structs.replace(state, search=copy.copy(state.search))
        counts = self._computed, self.round_trips, self.portions.backed_up
        return {"search": Search(state, self._moved, self.portions.bundles[-1].stop, self._objective, *counts)}

    def is_own(self, manifest: Manifest) -> bool:
        """Whether it is of the same objective."""
        return manifest.search is not None and manifest.search.objective == self._objective

    def lose_replica(self, index: int, incarnation: int) -> None:
        """What it had in hand goes to others; its contributions so far stay."""
        self._waiting.pop(index, None)
        blamed = self.portions.lose(index)
        if blamed is not None and self.failure is None:
            self.failure = TrainingFailed(
                f"one replica after another died computing examples {blamed.start} to {blamed.stop - 1}\n"
                "hint: look for lack of memory (dmesg), and at these examples; then resume the run"
            )
        self.replace_replica(index)

    def shard_restored(self, index: int) -> None:
        """What it had of the evaluation is lost; at which point it is, its version tells."""
        self._set_back.add(index)

    def tell_progress(self, now: float, alive: int) -> None:
        """Emit how far the evaluation is."""
        (since, before), solver, portions = self._rate, self.solver, self.portions
        examples = self._computed + (portions.examples_done if self._task is not None else 0)
        self._rate = now, examples
        self.emit(
            events.BatchProgress(
                iteration=solver.iteration, max_iterations=solver.options.max_iterations,
                evaluations=solver.evaluations, loss=finite(solver.loss), gradient=finite(solver.gradient_norm),
                portions_done=portions.done, portions=len(portions.batch.bundles), backed_up=portions.backed_up,
                examples=examples, examples_per_second=max(0, examples - before) / max(now - since, 1e-9),
                replicas_alive=alive,
            )
        )  # fmt: skip

    # the activity

    def run(self) -> str:
        """Carry out what the solver says until it stops."""
        versions = [section.version for section in self._sections()]
        self._moved, self._begun, self._version = min(versions), min(versions), max(versions)
        self._unsaved = set(self.solver.state.history.pairs)
        commands = self.solver.resume()
        while not self.stopping:
            try:
                command, *commands = commands
                match command:
                    case Evaluate():
                        commands = self._evaluate(command)
                    case Step():
                        self._step(command)
                    case Gram(pairs):
                        commands = self.solver.told_gram(add(self._ask(ParameterServerShard.gram, pairs)))
                    case Stop():
                        self._gather()
                        if self.solver.stopped:
                            break
                        commands = self.solver.begin()
            except Setback as setback:
                if not self.stopping:
                    self.emit(events.EvaluationLost(evaluation=self.solver.evaluations + 1, reason=str(setback)))
                    self._gather()
                commands = self.solver.begin()
        self._end()
        self.progress(0.0)
        return stopped.reason if (stopped := self.solver.stopped) else self.interrupted or "stopped"

    def _end(self) -> None:
        """Keep the point, so that whoever dies from here on comes back at it, and let replicas go."""
        self._gather()
        self._unsaved.update(self.solver.state.history.pairs)
        self._write_down(durable=True)
        self._gather()
        self._step(self.solver.again())  # replicas may be waiting for a step that a shard has forgotten
        self.wind_down()
        self._gather()

    def _open(self, trial: Evaluate) -> None:
        """Hand out the bundles of a batch."""
        self.portions.begin(self._batches.batch(0 if self.solver.state.last is None else self.solver.iteration + 1))
        self._number += 1
        self._spoilt, self._moment = None, self.engine.promise()
        self._task = Task(None, Mark(self._number, 0), self._version, trial.t)
        self._offer()

    def _evaluate(self, trial: Evaluate) -> list[Command]:
        """Have loss and gradient at the trial computed, once per bundle, and ask what the next direction needs."""
        self._open(trial)
        try:
            self._finish_writing()  # while replicas compute
            while not self._moment.done():
                self._watch(self._moment)
        finally:
            self._task = None
        self._check()
        if self._spoilt is not None:
            if self.solver.begins:
                raise TrainingFailed(
                    f"the loss of examples {self._spoilt.start} to {self._spoilt.stop - 1}, or its gradient, is NaN or "
                    "infinite at the starting point\nhint: check these examples and the parameters it begins with"
                )
            return self.solver.tell_not_finite()
        portions, batch = self.portions, self.portions.batch
        extent = Extent(len(batch.bundles), portions.examples, *map(portions.examples_at, (batch.before, batch.after)))
        sealed = merge(self._ask(ParameterServerShard.seal, self._number, trial, extent))
        self._computed += extent.examples
        before, state, shared = self.solver.iteration, self.solver.state, None
        if batch.after:  # the first batch has none before it, and nothing is compared with it
            shared = portions.mean_loss(batch.before or batch.after), portions.mean_loss(batch.after)
        commands = self.solver.tell(portions.mean_loss(), sealed, shared)
        if self.solver.state is not state:
            now = finite(portions.mean_loss() + sealed.penalty)
            self.emit(events.SearchBegun(loss=now, loss_before=state.loss))
        elif self.solver.iteration > before:
            self._tell_iteration(trial.t)
        return commands

    def _step(self, step: Step) -> None:
        """Order a step; replicas that come sooner than it wait at the shards."""
        self._version += 1
        calls = [shard.call(ParameterServerShard.step, self._version, self._number, step) for shard in self.shards]
        self._stepping = All(self.engine, calls)
        if step.commit:
            self._moved = self._version
            self._unsaved |= set() if step.slot is None else {step.slot}
            self._write_down(durable=self.engine.now() >= self.writer.due)

    def _ask(self, method: Any, *arguments: Any) -> list[Any]:
        """One round trip: every section's answer. Raises Setback."""
        self.round_trips += 1
        answers = All(self.engine, [shard.call(method, *arguments) for shard in self.shards])
        try:
            while not answers.done():
                self._watch(answers)
            self._check()
            return [section for sections in answers.result() for section in sections]
        except (PeerLost, DeadlineExceeded, NotReady) as error:
            raise Setback(str(error)) from error

    def _watch(self, until: Any) -> None:
        """A tick of waiting for an evaluation. Raises Setback when it cannot be completed."""
        self.tick(until)
        self._check()

    def _check(self) -> None:
        """Raises Setback when a shard was lost, or may not have carried out the last step, or the job is to stop."""
        if self.stopping:
            raise Setback("the job is to stop")
        if lost := self._set_back.union(self.restoring):
            raise Setback(f"shard {min(lost)} was lost")
        if self._stepping is not None and self._stepping.done():
            try:
                self._stepping.result()
            except (PeerLost, DeadlineExceeded, NotReady) as error:
                raise Setback(f"a step was lost: {error}") from error

    def _offer(self) -> bool:
        """Answer replicas that wait, as far as there is anything to say. An errand that is never over."""
        now = self.engine.now()
        for replica, (promise, since) in list(self._waiting.items()):
            task: Task | None = None
            if self.stopping:
                task = Task(over=True)
            elif self._task is not None and (bundle := self.portions.next(replica, now)) is not None:
                mark = Mark(self._number, *self.portions.batch.place(bundle.index))
                task = msgspec.structs.replace(self._task, bundle=bundle, mark=mark)
            elif now - since > IDLE_SECONDS:
                task = Task()
            if task is not None:
                del self._waiting[replica]
                promise.keep(task)
        return False

    # what survives a shard

    def _write_down(self, *, durable: bool) -> None:
        """Have the shards write the point, and the pairs that no checkpoint has yet."""
        self._writing_down = self.begin_checkpoint(sorted(self._unsaved), durable=durable, version=self._moved)

    def _finish_writing(self) -> None:
        """Make a checkpoint of what the shards have written since the last step."""
        writing, self._writing_down = self._writing_down, None
        if writing is None:
            return
        slots = writing.work["search"].solver.history.pairs
        kept = [file for slot in slots if slot not in self._unsaved for file in self._files.get(slot, [])]
        manifest = self.complete_checkpoint(writing, list(dict.fromkeys(kept)))
        if manifest is None:
            return
        inherited = {checkpoint.shared(*one).name for one in kept}
        fresh = [(writing.folder, file) for file in manifest.shards if file.partial and file.name not in inherited]
        for slot in slots:
            self._files[slot] = (
                fresh
                if slot in self._unsaved
                else [(writing.folder, checkpoint.shared(*one)) for one in self._files[slot]]
            )
        self._unsaved.clear()
        before, now = self._passing, [] if writing.durable else [(writing.folder, manifest)]
        self._passing = [*before, *now] if self.restoring else now
        for passed in before if not self.restoring else ():
            self.writer.discard(*passed)
        if writing.durable and not self.restoring:
            self.writer.keep_newest()

    def _gather(self) -> None:
        """Wait until all shards are at the present point; if one has not made the step there, all go back before it."""
        self._stepping = None
        self._finish_writing()
        while not self._at_one_point():
            self.tick()

    def _at_one_point(self) -> bool:
        """Whether all shards are at the present point now."""
        self._set_back.clear()
        sections = self._sections()
        if self.restoring or self._set_back or not all(section.ready for section in sections):
            return False
        if all(section.version >= self._moved for section in sections):
            return True
        folder, manifest = self.writer.newest()
        search = manifest.search if self.is_own(manifest) else None
        self.solver = Solver(self.solver.options, None if search is None else search.solver)
        self._moved = 0 if search is None else search.version
        if self._moved <= self._begun:
            self.solver.resume()  # it is of before this start, and what was found since is not in it
        self._unsaved = set(self.solver.state.history.pairs)
        self.restore(folder, manifest)
        return False

    def _sections(self) -> list[SectionStatus]:
        """What the shards say of their sections."""
        return [section for status in self.ask_statuses() for section in status.sections]

    def _tell_iteration(self, t: float) -> None:
        solver = self.solver
        self.emit(
            events.Iterated(
                iteration=solver.iteration, loss=solver.loss, gradient=solver.gradient_norm, t=t,
                length=solver.state.length if t else 0.0, evaluations=solver.evaluations, examples=self._computed,
                backed_up=self.portions.backed_up,
            )
        )  # fmt: skip

    def go_on(self) -> tuple[str, str]:
        """With more of what it was limited by, once that is behind it."""
        solver, options = self.solver, self.solver.options
        done = {"max_iterations": solver.iteration, "max_evaluations": solver.evaluations}
        more = {name: 2 * limit for name, count in done.items() if count >= (limit := getattr(options, name))}
        if not more:
            return "", "job"
        fields = ", ".join(f"{name}={limit}" for name, limit in more.items())
        algorithm = f"dataclasses.replace(job.algorithm, {fields})"
        words = " ".join(f"--algorithm.{name.replace('_', '-')} {limit}" for name, limit in more.items())
        return words, f"dataclasses.replace(job, algorithm={algorithm})"

    def finished(self, reason: str, resume: str, export: str) -> events.JobFinished:
        """The last event of the run."""
        return events.JobFinished(
            reason=reason, seen=self._computed, repeated=0, missing=0, refused=0, lost_updates=0,
            pushes=self.counters.mini_batches, staleness={}, resume_command=resume, export_command=export,
            iterations=self.solver.iteration, evaluations=self.solver.evaluations, round_trips=self.round_trips,
            converged=self.solver.stopped is not None and self.solver.stopped.converged,
            loss=finite(self.solver.loss), gradient=finite(self.solver.gradient_norm),
            strangers=self.counters.strangers,
        )  # fmt: skip
