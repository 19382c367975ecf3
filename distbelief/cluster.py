# SPDX-License-Identifier: Apache-2.0
"""Cluster: how many roles there are and on which engine they live."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

from distbelief.errors import ConfigurationError

EngineName = Literal["local", "simulated"]
TransportName = Literal["shared_memory", "tcp"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How many model replicas and parameter server shards, and where they live."""

    replicas: int = 2
    """Model replicas N; each is one process that computes gradients."""
    shards: int = 1
    """Parameter server shards M; each is one process that stores n/M parameters and updates them."""
    engine: EngineName = "local"
    """`local`: processes of this machine. `simulated`: everything in this process under a virtual clock."""
    transport: TransportName = "shared_memory"
    """How tensors travel on the local engine: memory shared between processes, or TCP over loopback."""
    threads_per_replica: int | None = None
    """Torch threads of each replica; None shares the cores equally, but for one that is left to the shards."""
    device: str | None = None
    """Where replicas compute: "cpu", "cuda", "cuda:1"; None takes CUDA when there is one."""
    silence_seconds: float = 60.0
    """A replica not heard of for so long, and for twenty of its slowest mini-batches, is ended and replaced."""

    def __post_init__(self) -> None:
        for name in ("replicas", "shards"):
            count = getattr(self, name)
            if count < 1:
                raise ConfigurationError(
                    f"Cluster({name}={count}): a job needs at least 1", hint=f"set {name} to 1 or more"
                )
        for name, known in (("engine", get_args(EngineName)), ("transport", get_args(TransportName))):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"Cluster({name}={getattr(self, name)!r}) is not known", hint=f"use one of {', '.join(known)}"
                )
        if self.threads_per_replica is not None and self.threads_per_replica < 1:
            raise ConfigurationError(
                f"Cluster(threads_per_replica={self.threads_per_replica}) cannot compute",
                hint="use 1 or more, or None to share the cores",
            )
        if not self.silence_seconds > 0:
            raise ConfigurationError(
                f"Cluster(silence_seconds={self.silence_seconds}) would end every replica at once",
                hint="use a positive number of seconds",
            )

    @property
    def threads(self) -> int:
        """Torch threads of each replica.

        One core is left to the shards: threads that wait for each other suffer most from a core that is taken away.
        """
        return self.threads_per_replica or max(1, (available_cores() - 1) // self.replicas)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
