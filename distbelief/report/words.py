# SPDX-License-Identifier: Apache-2.0
"""Events and numbers in words, for the terminal, the summary and the pictures."""

import math

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
    LossRose,
    Progress,
    PushRefused,
    ReplicasReleased,
    RoleLost,
    RoleStarted,
    SearchBegun,
    ShardRestored,
)

METRICS_SHOWN = 8
"""Metrics for which the live view and a picture have room: the first ones. The events hold all."""
NAME_LENGTH = 30
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mse", "mae", "rmse", "nll", "cross_entropy")
"""Words that, in the name of a metric, say that less is better."""


def sentence(event: AnyEvent) -> str | None:
    """One line for people, without line breaks; None for what is not notable in itself."""
    match event:
        case JobStarted():
            return _start(event)
        case RoleStarted(role=role, incarnation=incarnation, again=again):
            return f"{role.replace('/', ' ')} is back, incarnation {incarnation}" if again else None
        case RoleLost(role=role, reason=reason):
            return f"{role.replace('/', ' ')} was lost: {first_line(reason)}"
        case ReplicasReleased(replicas=replicas, examples=examples):
            return f"warmstart: {count(replicas, 'replica')} may train from example {examples:,} on"
        case LeasesReturned(replica=replica, leases=leases, examples=examples, repeated=repeated):
            repeats = f", {repeated:,} of them applied already" if repeated else ""
            return f"replica {replica} gave back {count(leases, 'lease')} of {count(examples, 'example')}{repeats}"
        case ShardRestored(shard=shard, version=version, offers=offers):
            more = ", and asks replicas for newer parameters" if offers else ""
            return f"shard {shard} was restored from its checkpoint at version {version:,}{more}"
        case PushRefused(replica=replica, step=step, reason=reason):
            return f"replica {replica} refused its push of step {step:,}: {first_line(reason)}"
        case LossRose(lowest=lowest, loss=loss, replicas=replicas):
            risen = f"training loss rose from {number(lowest)} to {number(loss)}"
            fewer = f"fewer than {count(replicas, 'replica')}"
            return f"{risen}: lower the rate, use {fewer}, or momentum in Downpour only"
        case Progress() | BatchProgress() | Iterated():
            return None
        case SearchBegun(loss=now, loss_before=before):
            return f"the loss here was {number(before)} and is {number(now)}: data or loss differ, a new search begins"
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
    limit = f"at most {count(event.iterations, 'iteration')}" if event.iterations else count(event.epochs, "epoch")
    return (
        f"{event.run}: {event.algorithm}, {count(event.replicas, 'replica')}, {count(event.shards, 'shard')}, "
        f"{count(event.parameters, 'parameter')}, {limit} of {count(event.examples_per_epoch, 'example')}{resumed}"
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


def shortened(name: str) -> str:
    """A name as a picture has room for it."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def count(number: int, noun: str) -> str:
    """`1 shard`, `1,234 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number(value: float | None) -> str:
    """A measured value in four digits; "not finite" for None, which is how JSON writes nan and inf."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:.4g}"


def rate(value: float) -> str:
    """A number per second: `12,345`, or `1.2` where the fraction matters."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


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
