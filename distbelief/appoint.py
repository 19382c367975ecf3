# SPDX-License-Identifier: Apache-2.0
"""The coordinator of a job: that of its algorithm, at the beginning or where a checkpoint was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from distbelief import checkpoint, events, shard_file
from distbelief.batch_section import Keeping
from distbelief.checkpoint import Manifest, Search
from distbelief.coordinator import Coordinator
from distbelief.downpour import Downpour
from distbelief.downpour_coordinator import DownpourCoordinator
from distbelief.engine.base import Engine
from distbelief.engine.pickles import SHARED
from distbelief.errors import CheckpointError, ConfigurationError, DistbeliefError
from distbelief.events import AnyEvent
from distbelief.files import AnyPath
from distbelief.job import Facts, Job
from distbelief.lbfgs import Solver
from distbelief.leases import Leases, Release, lease_size
from distbelief.parameter_server import ParameterServerShard, shard_name
from distbelief.parameters import Span
from distbelief.report.words import count
from distbelief.roles import evaluator_role, replica_role
from distbelief.roster import EVALUATOR, RoleSpec, Settings, member_name, replica_name, shard_silence_seconds
from distbelief.sandblaster import Sandblaster
from distbelief.sandblaster_coordinator import SandblasterCoordinator
from distbelief.tasks import Work
from distbelief.uncut import Uncut
from distbelief.update_rule import UpdateRule

PASSES_PER_EVALUATION = 10
"""Passes of Sandblaster over the data between two looks at the test set, where the user has not said."""
Restore = tuple[AnyPath, Manifest] | None
"""The checkpoint to begin with, if any."""


def appoint(
    job: Job, engine: Engine, facts: Facts, run: Path, spans: list[Span], model: Uncut, restore: Restore,
    emit: Callable[[AnyEvent], None],
) -> Coordinator:  # fmt: skip
    """The coordinator, with nothing started; `restore` has been checked."""
    algorithm = job.algorithm
    keeping: UpdateRule | Keeping
    if isinstance(algorithm, Sandblaster):
        keeping, refusals, passes, offers = algorithm.keeping, 0, PASSES_PER_EVALUATION, False
    else:
        keeping, refusals, passes = algorithm.update_rule, algorithm.refusals, 1
        offers = algorithm.local_rate is None and job.cluster.wire == "float32"
    partitions, silence_seconds = job.cluster.plan.partitions, job.cluster.silence_seconds
    settings = Settings(
        run=run,
        replicas=[
            [
                RoleSpec(member_name(replica_name(i), k, partitions), replica_role, (SHARED, i, k, spans))
                for k in range(partitions)
            ]
            for i in range(job.cluster.replicas)
        ],
        shards=[
            RoleSpec(shard_name(i), ParameterServerShard, (span, facts.layout, keeping)) for i, span in enumerate(spans)
        ],
        evaluator=[
            RoleSpec(member_name(EVALUATOR, k, partitions), evaluator_role, (SHARED, k, spans))
            for k in range(partitions if facts.test_examples else 0)
        ],
        checkpoint_seconds=job.checkpoint_seconds,
        keep_checkpoints=job.keep_checkpoints,
        evaluate_examples=job.evaluate_every or facts.examples * passes,
        evaluate_at_once=job.evaluate is not None,  # a function of the user's, which nothing has tried yet
        offers=offers,
        silence_seconds=silence_seconds,
        shard_silence_seconds=shard_silence_seconds(silence_seconds, spans, facts.layout.dtype),
        refusals=refusals,
        incarnation=0 if restore is None else restore[1].incarnation,
    )
    buffers = model.buffers if restore is None else checkpoint.read_buffers(*restore)
    manifest = checkpoint.manifests(model.module, facts.layout, facts.buffers, rule=repr(keeping), seed=job.seed)
    if isinstance(algorithm, Sandblaster):
        work = _work(job, algorithm, facts)
        solver = _solver(algorithm, facts, restore, work.objective)
        if (before := _search(restore, work.objective)) is not None:
            work = replace(work, computed=before.computed, round_trips=before.round_trips)
            work.portions.backed_up = before.backed_up
        return SandblasterCoordinator(engine, settings, buffers, manifest, emit, solver, work)
    leases = _leases(job, algorithm, facts, restore)
    release = Release.planned(
        leases.total_examples, job.batch_size, job.cluster.replicas, algorithm.warmstart, algorithm.cooldown
    )
    return DownpourCoordinator(engine, settings, buffers, manifest, emit, leases, release)


def check_resume(job: Job, facts: Facts, folder: AnyPath, manifest: Manifest) -> None:
    """Raise CheckpointError or ConfigurationError for a job that cannot go on from this checkpoint."""
    if isinstance(job.algorithm, Sandblaster):
        _solver(job.algorithm, facts, (folder, manifest), _work(job, job.algorithm, facts).objective)
        return
    before = manifest.leases
    if before is None:
        return
    if before.examples_per_epoch != facts.examples or manifest.seed != job.seed:
        raise CheckpointError(
            f"{folder} was trained on {before.examples_per_epoch} examples with seed {manifest.seed}, "
            f"the job has {facts.examples} with seed {job.seed}; examples would be lost or repeated\n"
            "hint: resume with the same data and seed"
        )
    _check_rule(job.algorithm.update_rule, facts, folder, manifest)
    leases = _leases(job, job.algorithm, facts, (folder, manifest))
    if leases.finished or leases.begun > job.epochs:
        state = f"has {count(leases.begun, 'epoch')} behind it" if leases.finished else f"is in epoch {leases.begun}"
        raise ConfigurationError(
            f"{folder} {state}, the job asks for {job.epochs}",
            hint=f"give more epochs, for example --epochs {leases.begun * 2}",
        )


def _check_rule(rule: UpdateRule, facts: Facts, folder: AnyPath, manifest: Manifest) -> None:
    """Let the rule take the state of the first parameter. Raises CheckpointError when it is another rule's."""
    one = Span(0, 1)
    vectors = shard_file.read_span(folder, manifest.shards, one)
    start = vectors.pop("parameters", torch.zeros(1, dtype=facts.layout.dtype))
    scalars = shard_file.read_state(folder / manifest.shards[0].name).scalars
    bound = rule.bind(start, facts.layout.segments(one), one)
    try:
        bound.load(vectors, scalars)
    except DistbeliefError:
        raise
    except Exception as error:  # of a rule of the user's
        raise CheckpointError(
            f"{rule!r} does not take the state that {folder} has, {sorted([*vectors, *scalars])}: {error!r}\n"
            "hint: resume with the rule of the checkpoint"
        ) from error


def _work(job: Job, algorithm: Sandblaster, facts: Facts) -> Work:
    return algorithm.work(facts.examples, job.batch_size, job.cluster.replicas, job.seed)


def _leases(job: Job, downpour: Downpour, facts: Facts, restore: Restore) -> Leases:
    """All examples of the job, or those that a checkpoint of Downpour has not behind it."""
    if restore is None or restore[1].leases is None:
        size = lease_size(facts.examples, job.batch_size, job.cluster.replicas, downpour.n_push)
        return Leases(facts.examples, size, job.epochs)
    folder, manifest, before = *restore, restore[1].leases
    return Leases.resumed(before, job.epochs, checkpoint.read_replica_positions(folder, manifest))


def _search(restore: Restore, objective: str) -> Search | None:
    """Where the search for a minimum of this objective was, if the checkpoint is of one."""
    before = None if restore is None else restore[1].search
    return before if before is not None and before.objective == objective else None


def _solver(algorithm: Sandblaster, facts: Facts, restore: Restore, objective: str) -> Solver:
    """A search from its beginning, or where a checkpoint of the same objective was in it."""
    line = Span(0, facts.layout.length)
    bends = any(penalty.bends for penalty in algorithm.keeping.penalties(facts.layout.segments(line), line))
    options = algorithm.options(facts.layout.dtype, bends)
    before = _search(restore, objective)
    if restore is None or before is None:
        return Solver(options)
    folder, _ = restore
    if (examples := before.examples) != facts.examples:
        raise CheckpointError(
            f"{folder} is of a batch of {examples} examples, the job has {facts.examples}; the gradients before and "
            "after would not belong together\nhint: resume with the same data"
        )
    pairs = before.solver.history.pairs
    if pairs and max(pairs) >= options.history:
        raise CheckpointError(
            f"{folder} has a history of {max(pairs) + 1} pairs, the job keeps {options.history}\n"
            f"hint: resume with Sandblaster(history={max(pairs) + 1}) or more"
        )
    return Solver(options, before.solver)


def started(
    job: Job, facts: Facts, run: Path, spans: list[Span], coordinator: Coordinator, resume: str, export: str
) -> events.JobStarted:  # fmt: skip
    """The first event of this start; `resume` and `export` are the commands for the run."""
    lengths, algorithm = [len(span) for span in spans], job.algorithm
    epochs, iterations = (0, algorithm.max_iterations) if isinstance(algorithm, Sandblaster) else (job.epochs, 0)
    leases = coordinator.leases if isinstance(coordinator, DownpourCoordinator) else None
    return events.JobStarted(
        run=str(run), replicas=job.cluster.replicas, shards=len(spans), parameters=facts.layout.length,
        examples_per_epoch=facts.examples, epochs=epochs, batch_size=job.batch_size, seed=job.seed,
        algorithm=_described(algorithm), shard_balance=max(lengths) / (sum(lengths) / len(lengths)),
        resumed_examples=coordinator.examples, resumed_repeated=leases.repeated if leases else 0,
        resumed_refused=leases.refused if leases else 0, iterations=iterations,
        resume_command=resume, export_command=export, virtual=job.cluster.engine == "simulated",
    )  # fmt: skip


def _described(algorithm: Downpour | Sandblaster) -> str:
    if isinstance(algorithm, Sandblaster):
        named, besides = f"Sandblaster L-BFGS, {algorithm.history} pairs", {"l1": algorithm.l1, "l2": algorithm.l2}
    else:
        named, besides = f"Downpour, {algorithm.update_rule!r}", {"momentum": algorithm.momentum}
    return named + "".join(f", {name} {value:g}" for name, value in besides.items() if value)
