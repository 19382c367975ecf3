# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a job: how to start each role, what the coordinator knows of it, and what it reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from distbelief.portions import Lease

EVALUATOR = "evaluator"


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
    examples: int
    loss_sum: float
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
    silence_seconds: float
    refusals: int
    """Refused pushes that the job survives."""
    incarnation: int
    """First incarnation of every role; higher than any that an earlier run of the job used."""


@dataclass
class ReplicaRecord:
    """What is known of one replica."""

    incarnation: int
    heard: float
    slowest_seconds: float = 0.0
    left: bool = False
    alive: bool = True
    buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    """By partition."""
