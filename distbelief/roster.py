# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a job: how to start each role, what the coordinator knows of it, and what it reports."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from distbelief.leases import Lease
from distbelief.parameters import Span
from distbelief.section import Awaited
from distbelief.training_loss import Losses

EVALUATOR = "evaluator"
PATIENCE = 20.0
"""A replica is waited for as long as this many of its slowest mini-batches."""
SHARD_BYTES_PER_SECOND = 5e6
"""A shard gets so much longer to write or read a checkpoint: of its parameters alone, so several vectors go faster."""
FIRST_WORD_SECONDS = 600.0
"""Before its first word a replica builds its model, which may take longer than any mini-batch."""


def replica_name(index: int) -> str:
    """The role name of replica `index`."""
    return f"replica/{index}"


def member_name(name: str, partition: int, partitions: int) -> str:
    """The role name of one partition of a replica or of the evaluator; one of one process is its own partition."""
    return name if partitions == 1 else f"{name}/{partition}"


class Refusal(msgspec.Struct, array_like=True, frozen=True):
    """A push that a replica refused."""

    step: int
    examples: int
    reason: str


class Report(msgspec.Struct, array_like=True, frozen=True):
    """What a replica did since its last report."""

    replica: int
    incarnation: int
    settled: tuple[tuple[int, int], ...]
    """(lease, position): every shard has acknowledged the lease's examples before the position."""
    losses: Losses
    """Of the mini-batches computed."""
    slowest_seconds: float
    """The slowest mini-batch so far."""
    refused: tuple[Refusal, ...]


class Granted(msgspec.Struct, array_like=True, frozen=True):
    """The answer to a request for a lease: one, or none now, or none ever."""

    lease: Lease | None
    finished: bool


@dataclass(frozen=True)
class RoleSpec:
    """How to start a role, again and again."""

    name: str
    factory: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the coordinator needs to know of a job."""

    run: Path
    replicas: Sequence[Sequence[RoleSpec]]
    """Each with its partitions, of which the last one leads."""
    shards: Sequence[RoleSpec]
    evaluator: Sequence[RoleSpec]
    """Its partitions; none for no evaluation."""
    checkpoint_seconds: float
    keep_checkpoints: int
    evaluate_examples: int
    evaluate_at_once: bool = False
    """Whether the model is evaluated before it is trained, too."""
    offers: bool
    """Whether what replicas hold are the shards' own numbers, so that one which comes back can have them."""
    silence_seconds: float
    """Within which a replica is heard of whose mini-batches are not slow."""
    shard_silence_seconds: float
    """Within which a shard is heard of. While it reads or writes its vectors it answers nothing."""
    refusals: int
    """Refused pushes that the job survives."""
    incarnation: int
    """First incarnation of every role; higher than any that an earlier run of the job used."""

    @property
    def roles(self) -> list[RoleSpec]:
        """Every role but the coordinator."""
        return [*self.shards, *(member for replica in self.replicas for member in replica), *self.evaluator]

    @property
    def leaders(self) -> list[str]:
        """By replica, the partition that speaks for it."""
        return [members[-1].name for members in self.replicas]


@dataclass
class ReplicaRecord:
    """What is known of one replica."""

    incarnation: int
    heard: float
    slowest_seconds: float = 0.0
    left: bool = False
    alive: bool = True

    def patience_seconds(self, least: float) -> float:
        """How long it may say nothing: `least`, or longer if its mini-batches are slow."""
        slow = PATIENCE * self.slowest_seconds if self.slowest_seconds else FIRST_WORD_SECONDS
        return max(least, slow)


def silent_replicas(replicas: Sequence[ReplicaRecord], now: float, least: float) -> Iterator[tuple[int, int, float]]:
    """(index, incarnation, how long it may say nothing) of those silent for longer; it is counted anew from now."""
    for index, record in enumerate(replicas):
        limit = record.patience_seconds(least)
        if not record.left and now - record.heard > limit:
            record.heard = now
            yield index, record.incarnation, limit


def awaited_offers(replicas: Sequence[ReplicaRecord]) -> Awaited:
    """What a shard that comes back may expect of these replicas, which may be in the midst of a mini-batch."""
    awaited = {i: record.slowest_seconds for i, record in enumerate(replicas) if record.alive and not record.left}
    return Awaited(tuple(awaited), 1.0 + 2 * max(awaited.values(), default=0.0))


def shard_silence_seconds(silence_seconds: float, spans: Sequence[Span], dtype: torch.dtype) -> float:
    """How long a shard may say nothing, and those that wait for it."""
    return silence_seconds + max(map(len, spans)) * dtype.itemsize / SHARD_BYTES_PER_SECOND
