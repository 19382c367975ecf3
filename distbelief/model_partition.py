# SPDX-License-Identifier: Apache-2.0
"""A replica that spans several processes: the plan of a job's model, and the part that one process runs (section 3).

    once, where roles are born     record the constructor, plan, lay the pieces on the line     CutModel
    in each process of a replica   meet the others, make its own values, build its share        CutModel.part

Nothing here holds the whole model: its structure lies on the meta device, its values are made piece by piece.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn

from distbelief.channel.base import Remote
from distbelief.engine.base import Home
from distbelief.errors import ConfigurationError, DeadlineExceeded
from distbelief.model_replica import Objective, Part
from distbelief.parameters import Groups, Layout, Piece, Span, check_state, group_options
from distbelief.partition.box import sizes
from distbelief.partition.group import Group
from distbelief.partition.materialise import Recorded, record
from distbelief.partition.pipeline import Pipeline
from distbelief.partition.stages import StagePlan, stages
from distbelief.partition.units import Blueprint, OwnedPiece, units
from distbelief.plan import Plan

MEETING_POLL_SECONDS = 0.005
MICRO_BATCHES_PER_STAGE = 4


@dataclass(frozen=True, eq=False)
class CutModel:
    """The plan of a model for replicas of several partitions; the same in every process."""

    recorded: Recorded
    plan: Blueprint | StagePlan
    layout: Layout

    @property
    def module(self) -> nn.Module:
        """The uncut model on the meta device."""
        return self.recorded.module

    @property
    def held_buffers(self) -> list[list[OwnedPiece]]:
        """Per partition, the boxes of buffers that it holds."""
        return [self.plan.buffers(index) for index in range(self.plan.partitions)]

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the model yields for a mini-batch like `x`, without values: on the meta device."""
        if isinstance(self.plan, StagePlan):
            return self.plan.boundaries(torch.empty_like(x, device="meta"))[-1]
        return self.plan.output(x)

    def part(self, index: int, group: Group, seed: int) -> Part:
        """What partition `index` runs, with its initial values. `seed` is that of dropout's masks, one per replica.

        Stages talk over the default process group, which is formed before.
        """
        owned = [*self.plan.pieces(index), *self.plan.frozen(index), *self.plan.buffers(index)]
        if isinstance(self.plan, StagePlan):
            owned += self.plan.others(index)
        values = dict(self.recorded.values({piece.name: (piece.full_shape, piece.box) for piece in owned}))
        if isinstance(self.plan, StagePlan):
            stage = self.plan.share(index, values, group.device)
            module: nn.Module = Staged(stage, Pipeline(self.plan, index, stage, group.device))
            named, buffers = stage.parameters_by_name, stage.buffers_by_name
        else:
            module = share = self.plan.share(index, values, group, seed=seed)
            named, buffers = share.parameters_by_name, share.buffers_by_name
        return Part(module, {name: each for name, each in named.items() if each.requires_grad}, buffers)


def cut_model(
    model: Callable[[], nn.Module], seed: int, groups: Groups | None, sample: torch.Tensor, plan: Plan
) -> CutModel:
    """Plan a model for mini-batches whose input is like `sample`. Raises ConfigurationError."""
    recorded = record(model, seed)
    check_state(recorded.module)
    made = _make(plan, recorded.module, sample)
    return CutModel(recorded, made, lay_out_pieces(recorded.module, made, groups))


def _make(plan: Plan, module: nn.Module, sample: torch.Tensor) -> Blueprint | StagePlan:
    """Units, or stages where a layer has no rule for its units and the user has not said which."""
    microbatches = plan.microbatches or min(MICRO_BATCHES_PER_STAGE * plan.partitions, sample.shape[0])
    in_stages = partial(
        stages, module, sample, plan.partitions, microbatches, cuts=list(plan.starts) if plan.starts else None
    )
    if plan.kind == "stages":
        return in_stages()
    try:
        return units(module, sample, plan.partitions, dict(plan.layers))
    except ConfigurationError as by_units:
        if plan.kind == "units":
            raise
        try:
            return in_stages()
        except ConfigurationError as by_stages:
            raise ConfigurationError(
                f"the model can be cut neither by units: {by_units}\nnor in stages: {by_stages}",
                hint="register a rule for the units of the layer, or use fewer partitions",
            ) from by_units


def lay_out_pieces(module: nn.Module, plan: Blueprint | StagePlan, groups: Groups | None) -> Layout:
    """Partitions follow each other on the line; within one, pieces of one parameter group lie together."""
    named = dict(module.named_parameters())
    options = {name: group_options(groups, name, each) for name, each in named.items()}
    order = {group: rank for rank, group in enumerate(dict.fromkeys(options.values()))}
    pieces: list[Piece] = []
    edges: list[int] = []
    start = 0
    for index in range(plan.partitions):
        owned = sorted(plan.pieces(index), key=lambda piece: order[options[piece.name]])
        if not owned:
            raise ConfigurationError(
                f"partition {index} of {plan.partitions} would hold no trainable parameter",
                hint="use fewer partitions, or cut a larger layer by hand: filters and units that several partitions "
                "need stay together, on the last one, where they are fewer than four for each",
            )
        for piece in owned:
            span = Span(start, start + _count(piece))
            corner = tuple(low for low, _ in piece.box)
            pieces.append(
                Piece(piece.name, sizes(piece.box), span, options[piece.name], tuple(piece.full_shape), corner)
            )
            start = span.stop
        edges.append(start)
    return Layout(tuple(pieces), named[pieces[0].name].dtype, tuple(edges[:-1]))


def initial_buffers(recorded: Recorded, layout: Layout) -> list[torch.Tensor]:
    """What each partition's buffers are at first, as `flat_buffers` gives them; `layout` is that of the buffers."""
    values = dict(recorded.values({piece.name: None for piece in layout.pieces}))
    flats: list[torch.Tensor] = []
    for index in range(len(layout.partitions)):
        parts = []
        for piece in layout.of_partition(index).pieces:
            value = values[piece.name]
            value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            box = tuple(slice(low, low + size) for low, size in zip(piece.corner, piece.shape, strict=True))
            parts.append((value if piece.whole is None else value.reshape(piece.whole)[box]).double().reshape(-1))
        flats.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64))
    return flats


def _count(piece: OwnedPiece) -> int:
    return torch.Size(sizes(piece.box)).numel()


@final
class Staged(nn.Module):
    """A stage as the others see a share of units: called with the whole input, the last one has the output."""

    def __init__(self, stage: nn.Module, pipeline: Pipeline) -> None:
        super().__init__()
        self.stage, self.pipeline = stage, pipeline

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output in evaluation, or an empty tensor."""
        output = self.pipeline.evaluate(x)
        return torch.empty(0) if output is None else output


@final
@dataclass(frozen=True)
class PartObjective:
    """What one partition minimises: the loss where the output comes out, elsewhere its empty share of it."""

    objective: Objective
    group: Group

    def differentiate(self, share: nn.Module, batch: Any) -> torch.Tensor:
        """Add this partition's gradients to its parameters'; returns the detached loss, or 0 where it is not known."""
        x, target = batch
        if isinstance(share, Staged):
            found = share.pipeline.step(x, target, self.objective.of)
            return torch.zeros(()) if found is None else found
        if self.group.leads:
            return self.objective.differentiate(share, batch)
        empty: torch.Tensor = share(x)
        empty.sum().backward()  # type: ignore[no-untyped-call]
        return torch.zeros(())


@final
class Meeting(dist.Store):  # type: ignore[misc, name-defined, unused-ignore]
    """How the partitions of a replica find each other: a store that the coordinator keeps, over the job's channel."""

    def __init__(self, home: Home, keeper: Remote[Any], methods: Sequence[Callable[..., Any]], name: str) -> None:
        """`methods` of the keeper remember and look up a value by (name, key)."""
        super().__init__()
        self._home, self._keeper, self._name = home, keeper, name
        self._keep, self._look = methods
        self._limit = datetime.timedelta(seconds=60)
        self._known: set[str] = set()

    def set(self, key: str, value: str | bytes) -> None:
        """Say something."""
        self._known.add(key)
        said = value.encode() if isinstance(value, str) else bytes(value)
        self._keeper.call(self._keep, self._name, key, said).result()

    def get(self, key: str) -> bytes:
        """What was said under `key`, as soon as it is. Raises DeadlineExceeded."""
        until = self._home.now() + self._limit.total_seconds()
        while (said := self._keeper.call(self._look, self._name, key).result()) is None:
            if self._home.now() > until:
                raise DeadlineExceeded(f"{self._home.name} waited {self._limit.total_seconds():.0f} s for its partners")
            self._home.sleep(MEETING_POLL_SECONDS)
        self._known.add(key)
        return bytes(said)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are known here. A thread of nccl's asks for this each second, so nobody else is asked."""
        return self._known.issuperset(keys)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Return when all keys have been set."""
        for key in keys:
            self.get(key)

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """How long `get` waits."""
        self._limit = timeout
