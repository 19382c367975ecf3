# SPDX-License-Identifier: Apache-2.0
"""What a job's partitions would hold and do, before anything starts."""

from distbelief.errors import ConfigurationError
from distbelief.job import Job, computed_at_once, prepare
from distbelief.partition.box import Box, count
from distbelief.partition.footprint import footprints
from distbelief.partition.stages import StagePlan
from distbelief.partition.units import Blueprint
from distbelief.report.plan import LayerRow, PartitionRow, PlanTable


def outline(job: Job) -> PlanTable:
    """The plan that `train` would use. Raises ConfigurationError for one that cannot be, or that does not fit."""
    prepared, _ = prepare(job)
    if prepared.cut is None:
        raise ConfigurationError(
            "one process holds the whole model: there is nothing to plan",
            hint="say how many processes a replica spans: --cluster.partitions 2",
        )
    plan, dtype = prepared.cut.plan, prepared.cut.layout.dtype
    at_once = computed_at_once(job, len(prepared.data))
    held = footprints(plan, at_once, dtype)
    partitions = tuple(
        PartitionRow(
            numbers.parameters, footprint.total, numbers.operations,
            dtype.itemsize * (numbers.elements_in + numbers.elements_in_once / at_once),
            dtype.itemsize * (numbers.elements_out + numbers.elements_out_once / at_once),
            numbers.messages_in + numbers.messages_out,
        )
        for numbers, footprint in zip(plan.numbers, held, strict=True)
    )  # fmt: skip
    kind = "stages" if isinstance(plan, StagePlan) else "units"
    return PlanTable(type(prepared.cut.module).__name__, kind, at_once, partitions, _layers(plan))


def _layers(plan: Blueprint | StagePlan) -> tuple[LayerRow, ...]:
    named: list[tuple[str, tuple[int, ...] | None, tuple[Box | None, ...]]]
    if isinstance(plan, Blueprint):
        named = [(layer.name, layer.shape, layer.boxes) for layer in plan.layers]
    else:
        named = [
            (name, None, tuple(() if partition == owner else None for partition in range(plan.partitions)))
            for owner, names in enumerate(plan.layers)
            for name in names
        ]
    last = {name: index for index, (name, _, _) in enumerate(named)}  # where a layer is several steps
    parameters = [0] * len(named)
    for partition in range(plan.partitions):
        for piece in plan.pieces(partition):
            around = [piece.name[:end] for end in range(len(piece.name) + 1) if piece.name[:end] in last]
            if around:
                parameters[last[around[-1]]] += count(piece.box)
    return tuple(LayerRow(*row, number) for row, number in zip(named, parameters, strict=True))
