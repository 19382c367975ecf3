# SPDX-License-Identifier: Apache-2.0
"""The engine that a job asks for, and what its roles ask of a cluster."""

import os
import resource
import sys
from pathlib import Path

from distbelief.channel.secure import new_certificate
from distbelief.channel.wire import Wire
from distbelief.cluster import Cluster
from distbelief.engine.base import Engine, Faults
from distbelief.engine.hosts import HostsEngine
from distbelief.engine.local import LocalEngine
from distbelief.engine.placement import Group
from distbelief.engine.simulated import SimulatedEngine
from distbelief.engine.virtual import Costs
from distbelief.errors import ConfigurationError
from distbelief.job import Job
from distbelief.parameter_server import shard_name
from distbelief.roster import EVALUATOR, member_name, replica_name


def engine_of(job: Job, faults: Faults | None, costs: Costs | None) -> Engine:
    """An engine with nothing started on it. Raises ConfigurationError when there is no such cluster."""
    cluster = job.cluster
    shards = [shard_name(index) for index in range(cluster.shards)]
    if cluster.engine == "simulated":
        return SimulatedEngine(job.seed, costs=costs, faults=faults)
    if cluster.engine == "local":
        _allow_files(cluster, evaluates=job.test is not None)
        replicas = [name for index in range(cluster.replicas) for name in _members(replica_name(index), cluster)]
        own_cores = [*shards, *replicas] if cluster.own_cores else []
        return LocalEngine(shards, transport=cluster.transport, faults=faults, own_cores=own_cores)
    try:
        from distbelief.engine.ray import RayKeepers
    except ImportError as error:
        found = getattr(sys.modules.get("ray"), "__file__", None)
        if found and Path(found).name != "__init__.py":
            raise ConfigurationError(
                f"Cluster(engine='ray') needs Ray, and the file {found} is imported in its place",
                hint="rename it, for example to my_ray.py",
            ) from error
        raise ConfigurationError(
            f"Cluster(engine='ray') needs Ray, which is not installed: {error}", hint="pip install 'distbelief[ray]'"
        ) from error
    wire = Wire(dtype=cluster.wire, certificate=new_certificate() if cluster.tls else None)
    keepers = RayKeepers(cluster.address, groups(cluster, evaluates=job.test is not None))
    try:
        return HostsEngine(shards, keepers, faults=faults, wire=wire, lost_seconds=cluster.lost_seconds)
    except OSError as error:
        keepers.end()
        raise ConfigurationError(
            f"this host cannot listen at {keepers.address}, its address in the Ray cluster: {error}",
            hint="start Ray on each host with --node-ip-address= and an address of one of its own network interfaces",
        ) from error


def _allow_files(cluster: Cluster, *, evaluates: bool) -> None:
    """Raise this process's limit of open files, which roles inherit, where the job needs more. ConfigurationError.

    Measured, and rounded up: a shard has a socket and memory of each process that computes, the coordinator sockets of
    all, beside what the user has open.
    """
    partitions, shards = cluster.plan.partitions, cluster.shards
    computing = (cluster.replicas + evaluates) * partitions
    of_shard = 20 + 2 * shards + (4 if partitions == 1 else 8) * computing
    of_coordinator = len(os.listdir("/proc/self/fd")) + 20 + 4 * shards + 2 * computing
    needed = max(of_shard, of_coordinator)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigurationError(
            f"Cluster(replicas={cluster.replicas}, partitions={partitions}, shards={shards}) may need {needed:,} open "
            f"files in one process, and {hard:,} are allowed",
            hint="use fewer, or allow more: ulimit -n, LimitNOFILE= of systemd, or --ulimit nofile= of docker",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def groups(cluster: Cluster, *, evaluates: bool) -> list[Group]:
    """What is placed together: the partitions of each replica, packed; the shards, spread; the evaluator."""
    partitions = cluster.plan.partitions
    each = {"CPU": cluster.cpus_per_replica / partitions, "GPU": cluster.gpus_per_replica / partitions}
    each = {name: amount for name, amount in {**each, **(cluster.resources or {})}.items() if amount}
    if not each:
        raise ConfigurationError(
            f"Cluster(cpus_per_replica={cluster.cpus_per_replica:g}) asks for nothing, and so Ray gives no room",
            hint="use a small number, for example cpus_per_replica=0.1",
        )
    if (gpus := each.get("GPU", 0.0)) > 1 and gpus % 1:
        raise ConfigurationError(
            f"Cluster(gpus_per_replica={cluster.gpus_per_replica:g}) is {gpus:g} accelerators for each of {partitions} "
            "processes; Ray gives parts of one, or whole ones",
            hint=f"use gpus_per_replica={int(gpus) * partitions} or {(int(gpus) + 1) * partitions}",
        )

    # In the order in which room is reserved: who needs most, first.
    found = [Group(_members(replica_name(index), cluster), each) for index in range(cluster.replicas)]
    found.append(Group(tuple(shard_name(index) for index in range(cluster.shards)), {"CPU": 1.0}, spread=True))
    if evaluates:
        found.append(Group(_members(EVALUATOR, cluster), {"CPU": 1.0 / partitions}))
    return found


def _members(name: str, cluster: Cluster) -> tuple[str, ...]:
    """The roles of a replica, or of the evaluator: its partitions."""
    partitions = cluster.plan.partitions
    return tuple(member_name(name, partition, partitions) for partition in range(partitions))
