# SPDX-License-Identifier: Apache-2.0
"""What a process of a job is built of when it is born: a partition of a replica, or of the evaluator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from distbelief.cluster import Cluster
from distbelief.coordinator import Coordinator
from distbelief.data_shard import DataShard
from distbelief.downpour import DownpourReplica
from distbelief.draws import begin_draws
from distbelief.engine.base import COORDINATOR, UNTIL_LOST_SECONDS, Home
from distbelief.evaluator import Evaluator
from distbelief.job import Prepared
from distbelief.model_partition import Meeting, PartObjective
from distbelief.model_replica import ModelReplica, Part, build, pick_device, whole
from distbelief.parameter_server import ParameterServer
from distbelief.parameters import Layout, Span
from distbelief.partition.group import Group, Site, form_default_group
from distbelief.partition.stages import StagePlan
from distbelief.roster import EVALUATOR, replica_name, shard_silence_seconds
from distbelief.sandblaster import Sandblaster, SandblasterReplica


@dataclass(frozen=True, eq=False)
class Seat:
    """Where one process computes: its part of the model, where that lies, and its partners."""

    part: Part
    layout: Layout
    own: Span
    group: Group


def site_of(cluster: Cluster, name: str, device: torch.device, address: str) -> Site:
    """Where a partition of the replica `name`, or of the evaluator, computes."""
    own_device = device.type == "cuda" and cluster.own_devices(torch.cuda.device_count())
    own_core = name != EVALUATOR and cluster.own_cores
    return Site(device=device, own_device=own_device, own_core=own_core, address=address)


def _seat(
    home: Home, prepared: Prepared, name: str, partition: int, device: torch.device, seed: int, spans: Sequence[Span]
) -> Seat:  # fmt: skip
    """Take a place in the replica `name`. The draws of its partitions, such as dropout's, are those of `seed`."""
    job, cut = prepared.job, prepared.cut
    if cut is None:
        module, layout = build(job.model, job.seed, job.grouping, prepared.layout)
        begin_draws(seed)
        return Seat(whole(module), layout, Span(0, layout.length), Group(None, 0, 1, Site(device=device)))
    coordinator = home.find(COORDINATOR, Coordinator, UNTIL_LOST_SECONDS)
    meeting = Meeting(home, coordinator, (Coordinator.keep, Coordinator.look), f"{name}/{home.incarnation}")
    # A partner may be waiting for a shard.
    patience = shard_silence_seconds(job.cluster.silence_seconds, spans, cut.layout.dtype)
    site = site_of(job.cluster, name, device, home.address)
    group = Group(meeting, partition, job.cluster.plan.partitions, site, deadline_seconds=patience)
    if isinstance(cut.plan, StagePlan):
        store = dist.PrefixStore("stages", meeting)  # type: ignore[attr-defined]
        form_default_group(store, partition, group.size, patience, site)
    part = cut.part(partition, group, seed)
    begin_draws(seed)
    return Seat(part, cut.layout.of_partition(partition), cut.layout.partitions[partition], group)


def replica_role(
    home: Home, prepared: Prepared, index: int, partition: int, spans: Sequence[Span]
) -> DownpourReplica | SandblasterReplica:
    """Build one partition of model replica `index` in its own process."""
    job = prepared.job
    torch.set_num_threads(job.cluster.threads)
    # Draws, of dropout or augmentation, differ between replicas and lives, and are the same for partitions of one.
    seed = job.seed + 1_000_003 * (index + 1) + 7_919 * home.incarnation
    device = pick_device(job.cluster.device, index * job.cluster.plan.partitions + partition)
    seat = _seat(home, prepared, replica_name(index), partition, device, seed, spans)
    objective = job.objective if prepared.cut is None else PartObjective(job.objective, seat.group)
    model = ModelReplica(seat.part, seat.layout, objective.differentiate, device, home.allocate, seat.group)
    server = ParameterServer(home, spans, seat.own, index, partition)
    if isinstance(job.algorithm, Sandblaster):
        # The module's training modes are as the user built it: an objective must not change from call to call. What
        # would make it do so is refused where it is left in training, so parts compute as in evaluation.
        if prepared.cut is not None:
            seat.part.module.eval()
        micro_batch = job.algorithm.micro_batch_of(job.batch_size, len(prepared.data))
        data = DataShard(home, prepared.data, micro_batch, None)
        return SandblasterReplica(home, index, model, data, server)
    seat.part.module.train()
    # A TensorDataset draws nothing.
    draws = None if prepared.cut is None or type(prepared.data) is TensorDataset else seed
    data = DataShard(home, prepared.data, job.batch_size, job.seed, draws)
    return DownpourReplica(home, index, model, data, server, job.algorithm)


def evaluator_role(home: Home, prepared: Prepared, partition: int, spans: Sequence[Span]) -> Evaluator:
    """Build one partition of the evaluator in its own process."""
    torch.set_num_threads(1)
    seat = _seat(home, prepared, EVALUATOR, partition, torch.device("cpu"), prepared.job.seed, spans)
    server = ParameterServer(home, spans, seat.own, partition=partition)
    return Evaluator(home, seat.part, seat.layout, server, seat.group, prepared.test, prepared.job.measures)
