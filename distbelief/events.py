# SPDX-License-Identifier: Apache-2.0
"""What can be observed: one stream of frozen records that the terminal, the files, the summary and the tests read.

The coordinator emits; nothing else does. On disk (`events.jsonl`) an event is one line
``{"seconds": 12.3, "event": {"type": "Evaluated", ...}}`` with seconds since the job started.
"""

import math
from collections.abc import Callable

import msgspec


class Event(msgspec.Struct, frozen=True, tag_field="type", tag=True, kw_only=True):
    """Base of all events."""


class JobStarted(Event, frozen=True):
    """The first event of a start; `resumed_...` is what the checkpoint that it goes on from had counted."""

    run: str
    replicas: int
    shards: int
    parameters: int
    examples_per_epoch: int
    epochs: int
    batch_size: int
    seed: int
    algorithm: str
    shard_balance: float
    """Largest shard / mean shard, in parameters."""
    resumed_examples: int = 0
    resumed_repeated: int = 0
    resumed_refused: int = 0
    iterations: int = 0
    """At most so many iterations of Sandblaster, which has no epochs; 0 for Downpour."""
    resume_command: str = ""
    """Goes on with the run once a checkpoint of it is written; empty where nothing does."""
    export_command: str = ""
    virtual: bool = False
    """Whether seconds are those of the simulated engine's clock."""


class RoleStarted(Event, frozen=True):
    """A role is up; its first life has the lowest incarnation, which is 0 unless the run was resumed."""

    role: str
    incarnation: int
    again: bool = False
    """Whether it takes the place of one that was lost since the coordinator began."""


class RoleLost(Event, frozen=True):
    """A role died and will be replaced."""

    role: str
    incarnation: int
    reason: str


class ReplicasReleased(Event, frozen=True):
    """Warmstart let more replicas train: the first `replicas` of them may lease now."""

    replicas: int
    examples: int


class LeasesReturned(Event, frozen=True):
    """A dead replica's unsettled leases went back; `repeated` of their examples had been applied already."""

    replica: int
    leases: int
    examples: int
    repeated: int


class ShardRestored(Event, frozen=True):
    """A dead shard came back from a checkpoint, at the version it had there.

    How many acknowledged pushes are gone from its span shows when replicas push again; Progress and JobFinished tell.
    """

    shard: int
    version: int
    offers: bool = False
    """Whether it asks replicas for the newer parameters that they have."""


class PushRefused(Event, frozen=True):
    """A replica refused its own push because the gradient was not finite."""

    replica: int
    step: int
    examples: int
    reason: str


class LossRose(Event, frozen=True):
    """The training loss has risen well above its lowest while more than one replica trained; told once."""

    lowest: float
    """The lowest mean per example of a window of mini-batches so far."""
    loss: float
    """The mean of the latest window."""
    replicas: int
    """The most that were at work since the lowest."""
    examples: int
    """Settled by then."""


class Progress(Event, frozen=True):
    """The state of the job, about twice a second; what it says of pushes may be of half a second before."""

    epoch: int
    """The oldest epoch that is not settled, counted from 0."""
    examples: int
    """Examples settled so far, over all epochs."""
    total_examples: int
    loss: float | None
    """Mean training loss per example since the last progress event; None when no mini-batch finished."""
    examples_per_second: float
    pushes_per_second: float
    pushes: int
    """Pushes applied by the shard that has applied most."""
    staleness_median: float
    staleness_p95: float
    replicas_alive: int
    mini_batches: int = 0
    """Mini-batches that were accrued in the pushes."""
    lost_updates: int = 0
    """Acknowledged pushes that restarts of shards have lost; just after one, those that replicas give back, too."""


class BatchProgress(Event, frozen=True):
    """The state of a Sandblaster job, about twice a second."""

    iteration: int
    """Accepted steps."""
    max_iterations: int
    evaluations: int
    """Times that loss and gradient of the whole batch were computed."""
    loss: float | None
    """At the last accepted point, penalties included; None before there is one."""
    gradient: float | None
    """Its largest entry there."""
    portions_done: int
    """Bundles of the evaluation under way that are done."""
    portions: int
    backed_up: int
    """Copies of slow bundles that were handed out, over the whole run."""
    examples: int
    """Examples whose gradients were added up, over all evaluations."""
    examples_per_second: float
    replicas_alive: int


class Iterated(Event, frozen=True):
    """Sandblaster took a step, or passed over a batch in which none helps: a step of length 0."""

    iteration: int
    loss: float
    gradient: float
    """The largest entry of the gradient, as penalties and bounds reduce it."""
    t: float
    """How far along the direction."""
    length: float
    """The Euclidean length of the step."""
    evaluations: int
    examples: int
    backed_up: int


class SearchBegun(Event, frozen=True):
    """A search that was resumed began anew, from where it was: data or loss are others than before."""

    loss: float | None
    """Now, at the point where it was, penalties included."""
    loss_before: float
    """At the same point, as it was computed before."""


class EvaluationLost(Event, frozen=True):
    """A shard was lost during an evaluation, which is computed again."""

    evaluation: int
    reason: str


class Evaluated(Event, frozen=True):
    """The servers' parameters, measured on the held-out data."""

    examples: int
    loss: float | None
    metrics: dict[str, float | None]
    """None for a value that is NaN or infinite, which JSON cannot hold; the loss is among them where it is such."""
    evaluation_seconds: float


class EpochFinished(Event, frozen=True):
    """Every lease of the epoch is settled."""

    epoch: int
    seen: int
    repeated: int
    """Examples that were computed again since the epoch before was finished."""


class CheckpointWritten(Event, frozen=True):
    """A complete checkpoint is on disk."""

    path: str
    examples: int
    checkpoint_seconds: float


class CheckpointFailed(Event, frozen=True):
    """A checkpoint could not be written; training goes on and the previous one stands."""

    path: str
    reason: str


class CheckpointRejected(Event, frozen=True):
    """A damaged checkpoint was passed over on loading."""

    path: str
    reason: str


class JobStopping(Event, frozen=True):
    """The job was asked to stop early, by Ctrl-C, SIGTERM or SIGHUP."""

    reason: str


class JobFinished(Event, frozen=True):
    """The last event of a run, with the audit of the data."""

    reason: str
    seen: int
    repeated: int
    missing: int
    refused: int
    lost_updates: int
    pushes: int
    staleness: dict[int, int]
    """How many pushes were applied at each staleness (versions between fetch and apply), over all shards."""
    export_command: str
    """What writes the trained model to a file; empty where there is no checkpoint to take it from."""
    resume_command: str
    """What goes on from the last checkpoint; empty where there is none."""
    mini_batches: int = 0
    """Mini-batches that were accrued in the pushes."""
    iterations: int = 0
    """Of Sandblaster; 0 for Downpour, as are the next two."""
    evaluations: int = 0
    round_trips: int = 0
    """Times that the coordinator asked all shards for something and waited."""
    converged: bool = False
    """Whether the search ended where it was meant to."""
    loss: float | None = None
    """Of the whole batch at the last accepted point, penalties included; None for Downpour."""
    gradient: float | None = None
    """Its largest entry there, as penalties and bounds reduce it."""
    strangers: dict[str, int] = {}
    """Callers that the shards and the coordinator refused since the run was last started, by what they did."""


AnyEvent = (
    JobStarted
    | RoleStarted
    | RoleLost
    | ReplicasReleased
    | LeasesReturned
    | ShardRestored
    | PushRefused
    | LossRose
    | Progress
    | BatchProgress
    | Iterated
    | SearchBegun
    | EvaluationLost
    | Evaluated
    | EpochFinished
    | CheckpointWritten
    | CheckpointFailed
    | CheckpointRejected
    | JobStopping
    | JobFinished
)


class Observation(msgspec.Struct, frozen=True):
    """An event and when it happened, in seconds since the job started (virtual seconds on the simulated engine)."""

    seconds: float
    event: AnyEvent


Listener = Callable[[Observation], None]
"""Anything that wants to know; called in the coordinator's process, must return quickly. StopIteration ends the job as
Ctrl-C does; nothing else should be raised."""


def to_line(observation: Observation) -> bytes:
    """One line of `events.jsonl`, newline included."""
    return msgspec.json.encode(observation) + b"\n"


def from_line(line: bytes | str) -> Observation:
    """The inverse of `to_line`; raises msgspec.ValidationError on a line that is no event."""
    return msgspec.json.decode(line, type=Observation)


def finite(value: float | None) -> float | None:
    """The number, or None for one that is NaN or infinite, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def staleness_quantile(counts: dict[int, int], quantile: float) -> float:
    """The smallest staleness that at least `quantile` of the counted pushes do not exceed; 0.0 without pushes."""
    total = sum(counts.values())
    reached = 0
    for staleness in sorted(counts):
        reached += counts[staleness]
        if reached >= quantile * total:
            return float(staleness)
    return 0.0
