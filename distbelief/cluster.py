# SPDX-License-Identifier: Apache-2.0
"""Cluster: how many roles there are and on which engine they live."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from distbelief.checks import check_number, check_whole
from distbelief.errors import ConfigurationError
from distbelief.plan import Plan

EngineName = Literal["local", "ray", "simulated"]
TransportName = Literal["shared_memory", "tcp"]
WireDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How many model replicas and parameter server shards, and where they live."""

    replicas: int = 2
    """Model replicas N; each computes gradients, in as many processes as `partitions` says."""
    partitions: int | Plan = 1
    """Processes that one replica, and the evaluator, spans, each holding a part of the model; or a plan by hand."""
    shards: int = 1
    """Parameter server shards M; each is one process that stores n/M parameters and updates them."""
    engine: EngineName = "local"
    """`local`: processes of this machine. `ray`: the hosts of a Ray cluster. `simulated`: everything in this process
    under a virtual clock."""
    address: str | None = None
    """Of the Ray cluster: "auto" for the one that this process runs in, "host:port" of its head; None for the one that
    this process is connected to, where there is one, else a Ray of this machine that is begun for the job."""
    transport: TransportName = "shared_memory"
    """How tensors travel on the local engine: memory shared between processes, or TCP over loopback."""
    threads_per_replica: int | None = None
    """Torch threads of each process of a replica; None shares the cores equally, but for one, left to the shards."""
    device: str | None = None
    """Where replicas compute: "cpu", "cuda" (the devices in turn), "cuda:1", or another device of torch's (host memory
    is page-locked for CUDA only); None takes CUDA when there is one."""
    memory_bytes: int | None = None
    """What one partition may hold of parameters, gradients and states; a plan that needs more is refused. The states of
    a model that is not cut are not known before it runs, and count nothing."""
    cpus_per_replica: float = 1.0
    """Cores of a Ray cluster that a replica is given, all its partitions together; a shard is given one."""
    gpus_per_replica: float = 0.0
    """Accelerators that a replica is given on a Ray cluster, all its partitions together."""
    resources: Mapping[str, float] | None = None
    """Custom resources of a Ray cluster that each process of a replica needs, such as {"fast": 1}."""
    wire: WireDtype = "float32"
    """How parameters and gradients travel between hosts: as they are, or rounded to bfloat16 with half the bytes."""
    tls: bool = False
    """Encrypt what travels between hosts, with a certificate made for the job."""
    lost_seconds: float = 1.5
    """A host of a cluster that is silent for so long is lost: its roles end, and are started on other hosts."""
    silence_seconds: float = 60.0
    """A replica not heard of for so long, and for twenty of its slowest mini-batches, is ended and replaced; so is a
    shard after this and the time that its parameters take at 5 MB/s, which it may spend on a checkpoint."""

    def __post_init__(self) -> None:
        check_whole(self, ("replicas", "shards", "threads_per_replica"))
        check_number(self, ("memory_bytes", "cpus_per_replica", "gpus_per_replica", "lost_seconds", "silence_seconds"))
        if not isinstance(self.partitions, Plan):
            check_whole(self, ("partitions",))
        for name in ("replicas", "shards"):
            count = getattr(self, name)
            if count < 1:
                raise ConfigurationError(
                    f"Cluster({name}={count}): a job needs at least 1", hint=f"set {name} to 1 or more"
                )
        plan = self.plan
        if plan.partitions > 1 and self.engine == "simulated":
            raise ConfigurationError(
                f"Cluster(partitions={plan.partitions}, engine='simulated'): partitions wait for each other in ways "
                "that a virtual clock does not see",
                hint="use engine='local', or partitions=1",
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
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ConfigurationError(
                f"Cluster(memory_bytes={self.memory_bytes}) holds nothing",
                hint="give the bytes that each process may use, or None",
            )
        self._check_hosts()
        if not self.silence_seconds > 0:
            raise ConfigurationError(
                f"Cluster(silence_seconds={self.silence_seconds}) would end every replica at once",
                hint="use a positive number of seconds",
            )

    def _check_hosts(self) -> None:
        """Raise ConfigurationError for options of clusters that cannot be."""
        if self.address is not None and self.engine != "ray":
            raise ConfigurationError(
                f"Cluster(address={self.address!r}) is of a Ray cluster, the engine is {self.engine!r}",
                hint="use engine='ray', or leave address out",
            )
        if self.wire not in get_args(WireDtype):
            raise ConfigurationError(
                f"Cluster(wire={self.wire!r}) is not known", hint=f"use one of {', '.join(get_args(WireDtype))}"
            )
        asked = {"cpus_per_replica": self.cpus_per_replica, "gpus_per_replica": self.gpus_per_replica}
        asked |= {f"resources[{name!r}]": amount for name, amount in (self.resources or {}).items()}
        for name, amount in asked.items():
            if not amount >= 0:
                raise ConfigurationError(f"Cluster({name}={amount}) is less than nothing", hint="use 0 or more")
        if not self.lost_seconds >= 0.5:
            raise ConfigurationError(
                f"Cluster(lost_seconds={self.lost_seconds}) would lose hosts that are only busy",
                hint="use 0.5 or more; 1.5 suits most networks",
            )

    @property
    def threads(self) -> int:
        """Torch threads of each process of a replica.

        On a Ray cluster, its share of the replica's cores. On one machine, one core is left to the shards: threads that
        wait for each other suffer most from a core that is taken away.
        """
        if self.engine == "ray":
            return self.threads_per_replica or max(1, int(self.cpus_per_replica / self.plan.partitions))
        return self.threads_per_replica or max(1, (available_cores() - 1) // self._computing)

    @property
    def own_cores(self) -> bool:
        """Whether each process of a replica, and on one machine each shard, has cores that no other one computes on.

        There, one is left to the coordinator, which is busy where mini-batches are short. A Ray that is begun for the
        job gives as many cores as are asked for, whatever the machine has.
        """
        if self.engine == "ray":
            return self.address is not None and self.cpus_per_replica >= self.plan.partitions * self.threads
        return self._computing * self.threads + self.shards < available_cores()

    @property
    def _computing(self) -> int:
        return self.replicas * self.plan.partitions

    def own_devices(self, visible: int) -> bool:
        """Whether each process of a replica has an accelerator of its own, where so many are visible to it."""
        if ":" in (self.device or ""):
            return False  # one for all
        if self.engine == "ray":
            return self.gpus_per_replica >= self.plan.partitions
        return visible >= self._computing

    @property
    def plan(self) -> Plan:
        """How the model is cut."""
        return self.partitions if isinstance(self.partitions, Plan) else Plan(self.partitions)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
