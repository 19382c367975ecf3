# SPDX-License-Identifier: Apache-2.0
"""What a run came to: a pure fold over its events, the content of `summary.json` and of the last lines printed.

A run that was killed has no JobFinished; its summary is made of what had been observed until then. A run that was
resumed has several JobStarted; the fold goes on over them, with one clock, and with what the checkpoint had counted:
the rest was undone. What a JobFinished says about data and pushes is said about the whole job.
"""

import functools
import shlex
import textwrap
from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from distbelief.events import (
    BatchProgress,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointWritten,
    Evaluated,
    EvaluationLost,
    Iterated,
    JobFinished,
    JobStarted,
    LeasesReturned,
    LossRose,
    Observation,
    Progress,
    PushRefused,
    RoleLost,
    ShardRestored,
    finite,
    staleness_quantile,
)
from distbelief.report.words import count, duration, number, sentence, values_of

KILLED = "killed: no end was recorded"
"""The reason of a run whose events stop without a JobFinished."""
RUNNING = "still running"
"""The reason of one that somebody is training."""

FAULTS = (RoleLost, ShardRestored, EvaluationLost, LossRose, CheckpointFailed, CheckpointRejected)
"""What went wrong and was survived: listed in the summary, marked in the plots."""

FAULTS_PRINTED = 20
LINE = 66
"""Columns beside the labels."""
UNCUT = ("run", "export with", "resume with")


class Examples(msgspec.Struct, frozen=True):
    """The audit of the data: how many of the planned examples were counted."""

    seen: int = 0
    repeated: int = 0
    missing: int = 0
    """Planned and not counted; resuming repeats what was counted since the last checkpoint, too."""
    planned: int = 0
    """Examples per epoch times epochs."""


class Staleness(msgspec.Struct, frozen=True):
    """Versions between the fetch and the apply of a push, over all shards."""

    median: float = 0.0
    p95: float = 0.0


class Checkpoints(msgspec.Struct, frozen=True):
    """How many were written, how many could not be, and how many were damaged when read."""

    written: int = 0
    failed: int = 0
    rejected: int = 0
    last_failed: bool = False
    """Whether the one that was to hold the latest state could not be written."""
    examples: int | None = None
    """Counted in the newest one."""


class Fault(msgspec.Struct, frozen=True):
    """Something that went wrong and was survived, or came back."""

    seconds: float
    type: str
    """The name of the event, one of FAULTS."""
    text: str


class Batch(msgspec.Struct, frozen=True):
    """What Sandblaster came to."""

    max_iterations: int
    iterations: int = 0
    evaluations: int = 0
    round_trips: int = 0
    """Times that the coordinator asked all shards for something and waited; known at the end."""
    backed_up: int = 0
    """Copies of slow portions that were handed out."""
    gradient: float | None = None
    """The largest entry of the gradient at the last point, as penalties and bounds reduce it."""
    converged: bool = False


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run on one page; its JSON is `summary.json`."""

    run: str = ""
    reason: str = KILLED
    wall_seconds: float = 0.0
    """Seconds observed, over all the times the run was started."""
    virtual: bool = False
    """Whether any of them are those of the simulated engine's clock."""
    algorithm: str = ""
    replicas: int = 0
    shards: int = 0
    parameters: int = 0
    epochs: int = 0
    shard_balance: float = 1.0
    """Largest shard / mean shard, in parameters."""
    examples: Examples = Examples()
    loss: float | None = None
    """The last mean training loss per example; None when there was none or it was not finite."""
    test: dict[str, float | None] = {}
    """The last measurement on the test set; None for a value that was not finite."""
    staleness: Staleness = Staleness()
    pushes: int = 0
    """Applied by the shard that has applied most; of Sandblaster, contributions since the run was last started."""
    mini_batches: int = 0
    """Mini-batches that were accrued in the pushes."""
    refused: int = 0
    """Examples, among those seen, of the pushes that a replica refused because the gradient was not finite."""
    lost_updates: int = 0
    batch: Batch | None = None
    """None for Downpour."""
    checkpoints: Checkpoints = Checkpoints()
    strangers: dict[str, int] = {}
    """Callers that were refused, by what they did, since the run was last started."""
    faults: tuple[Fault, ...] = ()
    export_command: str = ""
    """Writes the trained model to a file; empty when nothing has been saved."""
    resume_command: str = ""


def summarize(observations: Iterable[Observation]) -> Summary:
    """Fold the events of a run, finished or not, once or several times started, into its summary."""
    observed = list(one_clock(observations))
    summary = functools.reduce(_after, observed, Summary())
    resumed = any(isinstance(each.event, JobStarted) and each.event.resumed_examples for each in observed)
    if summary.reason == KILLED and not (summary.checkpoints.written or resumed):
        return replace(summary, export_command="", resume_command="")
    return summary


def moved(summary: Summary, run: str) -> Summary:
    """The summary of a run that is in this folder now; what resumes and exports it names the folder."""
    here, before = shlex.quote(run), shlex.quote(summary.run)
    resume = summary.resume_command.replace(f"distbelief resume {before}", f"distbelief resume {here}")
    return replace(
        summary,
        run=run,
        resume_command=resume.replace(f"resume={summary.run!r}", f"resume={run!r}"),
        export_command=summary.export_command.replace(f"distbelief export {before} ", f"distbelief export {here} "),
    )


def one_clock(observations: Iterable[Observation]) -> Iterator[Observation]:
    """The same events on one clock that never goes back: a resumed run goes on where the earlier one stopped."""
    offset = latest = 0.0
    for observation in observations:
        if observation.seconds + offset < latest:  # not with JobStarted: damaged checkpoints are told before it
            offset = latest
        latest = observation.seconds + offset
        yield Observation(observation.seconds + offset, observation.event) if offset else observation


def _after(summary: Summary, observation: Observation) -> Summary:
    summary = replace(summary, wall_seconds=observation.seconds)
    event = observation.event
    if isinstance(event, FAULTS):
        fault = Fault(observation.seconds, type(event).__name__, sentence(event) or "")
        summary = replace(summary, faults=(*summary.faults, fault))
    match event:
        case JobStarted():
            return _started(summary, event)
        case Progress():
            return replace(
                summary,
                examples=_counted(summary.examples, event.examples),
                loss=summary.loss if event.loss is None else finite(event.loss),
                staleness=Staleness(event.staleness_median, event.staleness_p95),
                pushes=event.pushes,
                mini_batches=event.mini_batches,
                lost_updates=event.lost_updates,
            )
        case BatchProgress() | Iterated():
            return _moved(summary, event)
        case Evaluated():
            return replace(summary, test={name: finite(value) for name, value in values_of(event).items()})
        case LeasesReturned(repeated=repeated):
            examples = replace(summary.examples, repeated=summary.examples.repeated + repeated)
            return replace(summary, examples=examples)
        case PushRefused(examples=refused):
            return replace(summary, refused=summary.refused + refused)
        case CheckpointWritten() | CheckpointFailed() | CheckpointRejected():
            return _checkpointed(summary, event)
        case JobFinished():
            return _finished(summary, event)
    return summary


def _moved(summary: Summary, event: BatchProgress | Iterated) -> Summary:
    before = summary.batch or Batch(event.iteration)
    batch = replace(
        before, iterations=event.iteration, evaluations=event.evaluations, backed_up=event.backed_up,
        gradient=event.gradient,
    )  # fmt: skip
    examples = replace(summary.examples, seen=event.examples)
    return replace(summary, batch=batch, examples=examples, loss=finite(event.loss))


def _started(summary: Summary, event: JobStarted) -> Summary:
    planned = event.examples_per_epoch * event.epochs
    before = replace(summary.examples, planned=planned, repeated=event.resumed_repeated)
    return replace(
        summary,
        run=event.run,
        reason=KILLED,
        virtual=summary.virtual or event.virtual,
        algorithm=event.algorithm,
        replicas=event.replicas,
        shards=event.shards,
        parameters=event.parameters,
        epochs=event.epochs,
        shard_balance=event.shard_balance,
        examples=_counted(before, event.resumed_examples),
        refused=event.resumed_refused,
        checkpoints=replace(summary.checkpoints, examples=event.resumed_examples),
        batch=Batch(event.iterations) if event.iterations else None,
        resume_command=event.resume_command,
        export_command=event.export_command,
    )


def _checkpointed(summary: Summary, event: CheckpointWritten | CheckpointFailed | CheckpointRejected) -> Summary:
    before = summary.checkpoints
    match event:
        case CheckpointWritten():
            now = replace(before, written=before.written + 1, last_failed=False, examples=event.examples)
            return replace(summary, checkpoints=now)
        case CheckpointFailed():
            return replace(summary, checkpoints=replace(before, failed=before.failed + 1, last_failed=True))
        case CheckpointRejected():
            return replace(summary, checkpoints=replace(before, rejected=before.rejected + 1))


def _finished(summary: Summary, event: JobFinished) -> Summary:
    staleness, batch = summary.staleness, summary.batch
    if batch is not None:
        batch = replace(
            batch, iterations=event.iterations, evaluations=event.evaluations, round_trips=event.round_trips,
            gradient=event.gradient, converged=event.converged,
        )  # fmt: skip
    if event.staleness:
        staleness = Staleness(staleness_quantile(event.staleness, 0.5), staleness_quantile(event.staleness, 0.95))
    return replace(
        summary,
        reason=event.reason,
        examples=Examples(event.seen, event.repeated, event.missing, summary.examples.planned),
        staleness=staleness,
        pushes=event.pushes,
        mini_batches=event.mini_batches,
        refused=event.refused,
        lost_updates=event.lost_updates,
        strangers=event.strangers,
        loss=summary.loss if event.loss is None else event.loss,
        batch=batch,
        export_command=event.export_command,
        resume_command=event.resume_command,
    )


def _counted(examples: Examples, seen: int) -> Examples:
    return replace(examples, seen=seen, missing=max(0, examples.planned - seen))


def text(summary: Summary) -> str:
    """The summary for people: labelled lines of at most 80 columns, but commands uncut so that they can be copied.

    Write it with `console.out(text(summary), highlight=False)`, which neither wraps nor crops.
    """
    lines = []
    for label, words in _lines(summary):
        cut = [words] if label in UNCUT else textwrap.wrap(words, LINE, break_on_hyphens=False)
        lines += [f"{'' if position else label:<14}{line}" for position, line in enumerate(cut)]
    return "\n".join(lines)


def _lines(summary: Summary) -> Iterator[tuple[str, str]]:
    checkpoints = summary.checkpoints
    yield "run", summary.run
    running = summary.reason == RUNNING
    clock = " of virtual time" if summary.virtual else ""
    yield "so far" if running else "ended", f"{summary.reason} ({duration(summary.wall_seconds)}{clock})"
    epochs = "" if summary.batch is not None else f"{count(summary.epochs, 'epoch')}, "
    yield (
        "job",
        f"{summary.algorithm}, {epochs}{count(summary.replicas, 'replica')}, {count(summary.parameters, 'parameter')}",
    )
    yield "shards", f"{summary.shards:,}, largest / mean {summary.shard_balance:.3f}"
    yield from _of_downpour(summary) if summary.batch is None else _of_batch(summary, summary.batch)
    yield "test", ", ".join(f"{name} {number(value)}" for name, value in summary.test.items()) or "not measured"
    yield (
        "checkpoints",
        f"{checkpoints.written:,} written, {checkpoints.failed:,} failed, {checkpoints.rejected:,} damaged"
        + ("; the latest state is not kept" if checkpoints.last_failed else ""),
    )
    for position, (reason, number_of_them) in enumerate(sorted(summary.strangers.items())):
        yield "" if position else "strangers", f"{count(number_of_them, 'caller')} refused that {reason}"
    yield "faults", _fault_counts(summary.faults)
    for fault in summary.faults[:FAULTS_PRINTED]:
        for position, line in enumerate(textwrap.wrap(fault.text, LINE, max_lines=2, placeholder=" ...")):
            yield "" if position else f"{duration(fault.seconds):>12}  ", line
    if len(summary.faults) > FAULTS_PRINTED:
        yield "", f"and {len(summary.faults) - FAULTS_PRINTED:,} more in summary.json"
    nothing = "not possible: no checkpoint is kept"
    yield "export with", summary.export_command or nothing
    if not running:
        yield "resume with", summary.resume_command or nothing


def _of_downpour(summary: Summary) -> Iterator[tuple[str, str]]:
    examples, kept = summary.examples, summary.checkpoints.examples
    unsaved = 0 if kept is None or summary.reason == RUNNING else examples.seen - kept
    yield (
        "examples",
        f"{examples.seen:,} of {examples.planned:,} seen, of which {summary.refused:,} refused; "
        f"{examples.repeated:,} repeated, {examples.missing:,} "
        + ("still to come" if summary.reason.startswith(("stopped", "failed", KILLED, RUNNING)) else "missing")
        + (f", and {unsaved:,} since the last checkpoint again" if unsaved > 0 else ""),
    )
    yield (
        "pushes",
        f"{summary.pushes:,} applied, made of {summary.mini_batches:,} mini-batches; {summary.lost_updates:,} lost",
    )
    yield "staleness", f"median {summary.staleness.median:g}, 95 % of pushes at most {summary.staleness.p95:g}"
    yield "training loss", number(summary.loss) if examples.seen or summary.loss is not None else "none"


def _of_batch(summary: Summary, batch: Batch) -> Iterator[tuple[str, str]]:
    converged = "converged" if batch.converged else "NOT converged: the loss may go on falling"
    yield "iterations", f"{batch.iterations:,} of at most {batch.max_iterations:,}; {converged}"
    trips = f", in {count(batch.round_trips, 'round trip')} to the shards" if batch.round_trips else ""
    yield "evaluations", f"{batch.evaluations:,}{trips}"
    yield (
        "examples",
        f"{summary.examples.seen:,}, none twice in an evaluation; copies of slow portions: {batch.backed_up:,}",
    )
    loss = "none" if summary.loss is None else f"{summary.loss:.8g}"
    yield "training loss", f"{loss}, largest gradient {'-' if batch.gradient is None else f'{batch.gradient:.2e}'}"


def _fault_counts(faults: tuple[Fault, ...]) -> str:
    lost = sum(fault.type == "RoleLost" for fault in faults)
    restored = sum(fault.type == "ShardRestored" for fault in faults)
    evaluations = sum(fault.type == "EvaluationLost" for fault in faults)
    rises = sum(fault.type == "LossRose" for fault in faults)
    files = len(faults) - lost - restored - evaluations - rises
    parts = {
        f"{count(lost, 'role')} lost": lost,
        f"{count(restored, 'shard')} restored": restored,
        f"{count(evaluations, 'evaluation')} computed again": evaluations,
        "the training loss rose": rises,
        f"{count(files, 'checkpoint')} failed or damaged": files,
    }
    return ", ".join(words for words, number in parts.items() if number) or "none"
