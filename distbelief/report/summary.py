# SPDX-License-Identifier: Apache-2.0
"""What a run came to: a pure fold over its events, the content of `summary.json` and of the last lines printed.

A run that was killed has no JobFinished; its summary is made of what had been observed until then. A run that was
resumed has several JobStarted; the fold goes on over them, with one clock. What a JobFinished says about data and
pushes is taken as said about the whole job; what was refused is counted from the events. The sentences that put an
event into words, here and in the terminal, are at the end.
"""

import functools
import math
import shlex
from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from distbelief.events import (
    AnyEvent,
    BatchProgress,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointWritten,
    EpochFinished,
    Evaluated,
    EvaluationLost,
    Iterated,
    JobFinished,
    JobStarted,
    JobStopping,
    LeasesReturned,
    Observation,
    Progress,
    PushRefused,
    ReplicasReleased,
    RoleLost,
    RoleStarted,
    ShardRestored,
    staleness_quantile,
)

KILLED = "killed: no end was recorded"
"""The reason of a run whose events stop without a JobFinished."""

FAULTS = (RoleLost, ShardRestored, CheckpointFailed, CheckpointRejected)
"""What went wrong and was survived: listed in the summary, marked in the plots."""

SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mse", "mae", "rmse", "nll", "cross_entropy")
"""Words that, in the name of a metric, say that less is better."""

FAULTS_PRINTED = 20


class Examples(msgspec.Struct, frozen=True):
    """The audit of the data: how many of the planned examples were counted."""

    seen: int = 0
    repeated: int = 0
    missing: int = 0
    """Planned and not counted; in a run that was killed, what resuming it would still train on."""
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


class Fault(msgspec.Struct, frozen=True):
    """Something that went wrong and was survived, or came back."""

    seconds: float
    type: str
    """The name of the event: RoleLost, ShardRestored, CheckpointFailed, CheckpointRejected."""
    text: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run on one page; its JSON is `summary.json`."""

    run: str = ""
    reason: str = KILLED
    wall_seconds: float = 0.0
    """Seconds observed, over all the times the run was started."""
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
    mini_batches: int = 0
    """Mini-batches that were accrued in the pushes."""
    refused: int = 0
    """Examples of the pushes that a replica refused because the gradient was not finite, over all starts."""
    lost_updates: int = 0
    checkpoints: Checkpoints = Checkpoints()
    faults: tuple[Fault, ...] = ()
    export_command: str = ""
    """Writes the trained model to a file; empty when nothing has been saved."""
    resume_command: str = ""


def summarize(observations: Iterable[Observation]) -> Summary:
    """Fold the events of a run, finished or not, once or several times started, into its summary."""
    return functools.reduce(_after, one_clock(observations), Summary())


def one_clock(observations: Iterable[Observation]) -> Iterator[Observation]:
    """The same events on one clock that never goes back: a resumed run goes on where the earlier one stopped."""
    offset = latest = 0.0
    for observation in observations:
        if isinstance(observation.event, JobStarted) and observation.seconds + offset < latest:
            offset = latest
        latest = max(latest, observation.seconds + offset)
        yield Observation(observation.seconds + offset, observation.event) if offset else observation


def _after(summary: Summary, observation: Observation) -> Summary:
    summary = replace(summary, wall_seconds=max(summary.wall_seconds, observation.seconds))
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
                loss=summary.loss if event.loss is None else _finite(event.loss),
                staleness=Staleness(event.staleness_median, event.staleness_p95),
                pushes=event.pushes,
                mini_batches=event.mini_batches,
            )
        case Evaluated():
            return replace(summary, test={name: _finite(value) for name, value in values_of(event).items()})
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


def _started(summary: Summary, event: JobStarted) -> Summary:
    planned = event.examples_per_epoch * event.epochs
    resumable = summary.resume_command or event.resumed_examples
    return replace(
        summary,
        run=event.run,
        reason=KILLED,
        algorithm=event.algorithm,
        replicas=event.replicas,
        shards=event.shards,
        parameters=event.parameters,
        epochs=event.epochs,
        shard_balance=event.shard_balance,
        examples=_counted(replace(summary.examples, planned=planned), event.resumed_examples),
        **(_commands(event.run) if resumable else {}),
    )


def _checkpointed(summary: Summary, event: CheckpointWritten | CheckpointFailed | CheckpointRejected) -> Summary:
    before = summary.checkpoints
    match event:
        case CheckpointWritten():
            commands = _commands(summary.run)
            return replace(summary, checkpoints=replace(before, written=before.written + 1), **commands)
        case CheckpointFailed():
            return replace(summary, checkpoints=replace(before, failed=before.failed + 1))
        case CheckpointRejected():
            return replace(summary, checkpoints=replace(before, rejected=before.rejected + 1))


def _finished(summary: Summary, event: JobFinished) -> Summary:
    staleness = summary.staleness
    if event.staleness:
        staleness = Staleness(staleness_quantile(event.staleness, 0.5), staleness_quantile(event.staleness, 0.95))
    return replace(
        summary,
        reason=event.reason,
        examples=Examples(event.seen, event.repeated, event.missing, summary.examples.planned),
        staleness=staleness,
        pushes=event.pushes,
        mini_batches=event.mini_batches,
        lost_updates=event.lost_updates,
        export_command=event.export_command,
        resume_command=event.resume_command,
    )


def _counted(examples: Examples, seen: int) -> Examples:
    return replace(examples, seen=seen, missing=max(0, examples.planned - seen))


def _commands(run: str) -> dict[str, str]:
    folder = shlex.quote(run)
    return {
        "export_command": f"distbelief export {folder} model.safetensors",
        "resume_command": f"distbelief resume {folder}",
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def text(summary: Summary) -> str:
    """The summary for people: labelled lines of at most 80 columns, but commands uncut so that they can be copied.

    Write it with `console.out(text(summary), highlight=False)`, which neither wraps nor crops.
    """
    return "\n".join(f"{label:<14}{line}" for label, line in _lines(summary))


def _lines(summary: Summary) -> Iterator[tuple[str, str]]:
    examples, checkpoints = summary.examples, summary.checkpoints
    yield "run", summary.run
    yield "ended", f"{summary.reason} ({duration(summary.wall_seconds)})"
    yield (
        "job",
        f"{summary.algorithm}, {count(summary.epochs, 'epoch')}, {count(summary.replicas, 'replica')}, "
        f"{count(summary.parameters, 'parameter')}",
    )
    yield "shards", f"{summary.shards:,}, largest / mean {summary.shard_balance:.3f}"
    yield (
        "examples",
        f"{examples.seen:,} of {examples.planned:,} seen, of which {summary.refused:,} refused; "
        f"{examples.repeated:,} repeated, {examples.missing:,} missing",
    )
    yield (
        "pushes",
        f"{summary.pushes:,} applied, made of {summary.mini_batches:,} mini-batches; {summary.lost_updates:,} lost",
    )
    yield "staleness", f"median {summary.staleness.median:g}, 95 % of pushes at most {summary.staleness.p95:g}"
    yield "training loss", "none" if summary.loss is None else number(summary.loss)
    yield "test", ", ".join(f"{name} {number(value)}" for name, value in summary.test.items()) or "not measured"
    yield (
        "checkpoints",
        f"{checkpoints.written:,} written, {checkpoints.failed:,} failed, {checkpoints.rejected:,} damaged",
    )
    yield "faults", _fault_counts(summary.faults)
    for fault in summary.faults[:FAULTS_PRINTED]:
        yield f"{duration(fault.seconds):>12}  ", fault.text if len(fault.text) <= 66 else f"{fault.text[:63]}..."
    if len(summary.faults) > FAULTS_PRINTED:
        yield "", f"and {len(summary.faults) - FAULTS_PRINTED:,} more in summary.json"
    nothing = "not possible: no checkpoint was written"
    yield "export with", summary.export_command or nothing
    yield "resume with", summary.resume_command or nothing


def _fault_counts(faults: tuple[Fault, ...]) -> str:
    lost = sum(fault.type == "RoleLost" for fault in faults)
    restored = sum(fault.type == "ShardRestored" for fault in faults)
    parts = {
        f"{count(lost, 'role')} lost": lost,
        f"{count(restored, 'shard')} restored": restored,
        f"{count(len(faults) - lost - restored, 'checkpoint')} failed or damaged": len(faults) - lost - restored,
    }
    return ", ".join(words for words, number in parts.items() if number) or "none"


# events in words: what is not notable in itself has no sentence


def sentence(event: AnyEvent) -> str | None:
    """One line for people, without line breaks; None for what is not notable in itself."""
    match event:
        case JobStarted():
            return _start(event)
        case RoleStarted(role=role, incarnation=incarnation):
            return f"{role.replace('/', ' ')} is back, incarnation {incarnation}" if incarnation else None
        case RoleLost(role=role, reason=reason):
            return f"{role.replace('/', ' ')} was lost: {first_line(reason)}"
        case ReplicasReleased(replicas=replicas, examples=examples):
            return f"warmstart: {count(replicas, 'replica')} may train from example {examples:,} on"
        case LeasesReturned(replica=replica, leases=leases, examples=examples, repeated=repeated):
            repeats = f", {repeated:,} of them applied already" if repeated else ""
            return f"replica {replica} gave back {count(leases, 'lease')} of {count(examples, 'example')}{repeats}"
        case ShardRestored(shard=shard, version=version):
            return f"shard {shard} was restored from its checkpoint at version {version:,}"
        case PushRefused(replica=replica, step=step, reason=reason):
            return f"replica {replica} refused its push of step {step:,}: {first_line(reason)}"
        case Progress() | BatchProgress() | Iterated():
            return None
        case EvaluationLost(evaluation=evaluation, reason=reason):
            return f"evaluation {evaluation:,} is computed again: {first_line(reason)}"
        case Evaluated(examples=examples):
            return f"tested after {count(examples, 'example')}: {measured(values_of(event))}"
        case EpochFinished(epoch=epoch, seen=seen, repeated=repeated):
            repeats = f", {repeated:,} repeated" if repeated else ""
            return f"epoch {epoch + 1} finished: {count(seen, 'example')} seen{repeats}"
        case CheckpointWritten(examples=examples, checkpoint_seconds=seconds):
            return f"checkpoint written after {count(examples, 'example')}, in {duration(seconds)}"
        case CheckpointFailed(path=path, reason=reason):
            return f"checkpoint {path} could not be written: {first_line(reason)}"
        case CheckpointRejected(path=path, reason=reason):
            return f"checkpoint {path} was passed over: {first_line(reason)}"
        case JobStopping(reason=reason):
            return f"stopping: {first_line(reason)}"
        case JobFinished(reason=reason):
            return f"ended: {first_line(reason)}"


def _start(event: JobStarted) -> str:
    resumed = f", resumed after {count(event.resumed_examples, 'example')}" if event.resumed_examples else ""
    return (
        f"{event.run}: {event.algorithm}, {count(event.replicas, 'replica')}, {count(event.shards, 'shard')}, "
        f"{count(event.parameters, 'parameter')}, {count(event.epochs, 'epoch')} "
        f"of {count(event.examples_per_epoch, 'example')}{resumed}"
    )


def values_of(event: Evaluated) -> dict[str, float]:
    """What was measured on the test set by name, the loss among it where there is one; nan for what was not finite."""
    metrics = {name: math.nan if value is None else value for name, value in event.metrics.items()}
    return ({} if event.loss is None else {"loss": event.loss}) | metrics


def measured(values: dict[str, float]) -> str:
    """Named values in one line; "nothing measured" for none."""
    return ", ".join(f"{name} {number(value)}" for name, value in values.items()) or "nothing measured"


def better(name: str, value: float, than: float) -> bool:
    """Whether `value` of the metric `name` improves on `than`, judged by the name: losses and errors fall."""
    return value < than if smaller_is_better(name) else value > than


def smaller_is_better(name: str) -> bool:
    """Whether the metric's name says so: it contains loss, error, perplexity and the like."""
    return any(word in name.lower() for word in SMALLER_IS_BETTER)


def count(number: int, noun: str) -> str:
    """`1 shard`, `1,234 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number(value: float | None) -> str:
    """A measured value in four digits; "not finite" for None, which is how JSON writes nan and inf."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def rate(value: float) -> str:
    """A number per second: `12,345`, or `1.2` where the fraction matters."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `12 min 05 s`, `3 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def first_line(reason: str) -> str:
    """What a reason comes to in one line: the first, or of a traceback the last, where the exception stands."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
