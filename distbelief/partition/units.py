# SPDX-License-Identifier: Apache-2.0
"""A model cut by units: which partition computes what, and what travels (paper, section 3).

    calls of the forward pass  --rules-->  steps cut into boxes  --needs-->  exchanges  -->  a program per partition

Planning computes nothing and knows no process: it works on meta tensors and comes out the same on every partition. A
state crosses to a partition once: consumers of the same states share an exchange.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distbelief.errors import ConfigurationError
from distbelief.partition.box import Box, count, inside, sizes
from distbelief.partition.exchange import Exchange, routes
from distbelief.partition.flow import Crossing, flow
from distbelief.partition.group import Group
from distbelief.partition.share import Computation, Draws, Index, Share, Transfer, check_shape
from distbelief.partition.site import Step, tensor
from distbelief.partition.trace import skeleton
from distbelief.partition.walk import walk
from distbelief.plan import Cut


@dataclass(frozen=True)
class OwnedPiece:
    """A box of a parameter or buffer that one partition holds."""

    name: str
    """In the uncut model's named_parameters or named_buffers."""
    box: Box
    full_shape: tuple[int, ...]
    """What the box is a box of: the tensor's shape, or a view of it with as many elements."""


@dataclass(frozen=True)
class Numbers:
    """What one partition has to do in a forward pass."""

    parameters: int
    """Trainable parameters that it owns."""
    operations: int
    """Floating-point operations per example."""
    elements_in: int
    """Elements of states that arrive, per example; in the backward pass as many leave."""
    elements_out: int
    elements_in_once: int = 0
    """Elements of parameters that arrive, per mini-batch, where several partitions use one."""
    elements_out_once: int = 0
    messages_in: int = 0
    """How often something arrives, in a forward pass; in the backward pass as much leaves."""
    messages_out: int = 0
    states: int = 0
    """Elements of results that it computes or receives, per example: what it keeps for the backward pass, at most."""


@dataclass(frozen=True)
class LayerCut:
    """How one step of the forward pass is divided."""

    name: str
    shape: tuple[int, ...]
    """Of its result, without the batch."""
    boxes: tuple[Box | None, ...]
    """Per partition."""


def units(
    model: nn.Module, sample: torch.Tensor, partitions: int, cuts: Mapping[str, Cut] | None = None
) -> "Blueprint":
    """Plan `model`, on any device, for mini-batches like `sample`, any tensor of their dtype and shape, batch first.

    `cuts` names layers; the others are cut automatically. The output comes out on the last partition.
    Tracing patches nn.Module for a moment: call it while no other thread runs a forward pass. Raises
    ConfigurationError, naming the layer, for what cannot be cut so.
    """
    hollow = skeleton(model)
    steps = walk(hollow, sample, partitions, cuts or {})
    return Blueprint(hollow, steps, max(2, sample.shape[0]), partitions)


@final
class Blueprint:
    """The plan of a model cut by units; made by `units`, the same on every partition."""

    def __init__(self, model: nn.Module, steps: list[Step], batch: int, partitions: int) -> None:
        self.partitions, self._batch = partitions, batch
        self._flow, self._steps = flow(steps, partitions), steps
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._check()

    @property
    def out(self) -> int:
        """The partition on which the output comes out."""
        return self.partitions - 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of an example: mini-batches are of this shape behind the batch."""
        return tensor(self._steps[0]).shape

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the model yields for a mini-batch, without values: on the meta device. Raises ConfigurationError."""
        check_shape(self.input_shape, x)
        (state,) = self._steps[-1].inputs
        assert state.division is not None
        return torch.empty((len(x), *state.division.shape), dtype=state.dtype, device="meta")

    # what is where

    def pieces(self, partition: int) -> list[OwnedPiece]:
        """The boxes of trainable parameters that the partition owns, in the order of the forward pass."""
        return [piece for piece in self._held(partition) if self._kept(piece.name, trainable=True)]

    def frozen(self, partition: int) -> list[OwnedPiece]:
        """The boxes of frozen parameters that the partition holds."""
        return [piece for piece in self._held(partition) if self._kept(piece.name, trainable=False)]

    def buffers(self, partition: int) -> list[OwnedPiece]:
        """The boxes of buffers that the partition holds; one without dimensions is held by several."""
        return [piece for piece in self._held(partition) if piece.name in self._buffers]

    @cached_property
    def numbers(self) -> tuple[Numbers, ...]:
        """Per partition."""
        moved = {(batched, way): [0] * self.partitions for batched in (True, False) for way in ("in", "out")}
        messages = {way: [0] * self.partitions for way in ("in", "out")}
        for crossing in self._flow.crossings:
            division = crossing.state.division
            assert division is not None
            for (sender, receiver), box in routes(division.boxes, crossing.needs).items():
                if sender != receiver:
                    for way, partition in (("in", receiver), ("out", sender)):
                        moved[division.batched, way][partition] += count(box)
                        messages[way][partition] += 1
        return tuple(
            Numbers(
                sum(count(piece.box) for piece in self.pieces(partition)), self._operations(partition),
                moved[True, "in"][partition], moved[True, "out"][partition],
                moved[False, "in"][partition], moved[False, "out"][partition],
                messages["in"][partition], messages["out"][partition], self._states(partition),
            )
            for partition in range(self.partitions)
        )  # fmt: skip

    @property
    def layers(self) -> tuple[LayerCut, ...]:
        """How the steps are divided, in the order of the forward pass, but for those that several do as a whole."""
        return tuple(
            LayerCut(step.name, step.division.shape, step.division.boxes)
            for step in self._steps[1:-1]
            if step.division is not None and not step.lazy
        )

    # what one partition runs

    def share(self, partition: int, values: Mapping[str, torch.Tensor], group: Group, *, seed: int = 0) -> Share:
        """The share of one partition, over `values` of its pieces, frozen ones and buffers, each of its box's shape.

        The share's parameters and buffers are views of the values. `seed` is that of dropout's masks, one for all.
        """
        draws, program = Draws(seed), []
        parameters: dict[str, nn.Parameter] = {}
        buffers: dict[str, torch.Tensor] = {}
        for index in range(len(self._steps)):
            for number, crossing in enumerate(self._flow.crossings):
                if crossing.before == index:
                    program += self._transfer(number, crossing, group)
            if index == 0 or not self._flow.wanted[index][partition]:
                continue
            layer = self._layer(index, partition)
            for local, piece in self._step_pieces(index, partition):
                value = values[piece.name].view(getattr(layer, local).shape)
                delattr(layer, local)
                if piece.name in self._buffers:
                    buffers[piece.name] = value
                    layer.register_buffer(local, value)
                else:
                    parameters[piece.name] = nn.Parameter(value, self._kept(piece.name, trainable=True))
                    layer.register_parameter(local, parameters[piece.name])
            for module in layer.modules() if isinstance(layer, nn.Module) else ():
                if hasattr(module, "draws"):
                    module.draws = draws  # type: ignore[assignment]
            program.append(Computation(layer, self._sources(index, partition), index))
        output = len(self._steps) - 1 if partition == self.out else None
        return Share(self.input_shape, program, (parameters, buffers), group, draws, output)

    def _transfer(self, number: int, crossing: Crossing, group: Group) -> list[Transfer | Computation]:
        division = crossing.state.division
        assert division is not None
        exchange = Exchange(
            division.boxes,
            crossing.needs,
            group,
            dtype=crossing.state.dtype,
            fill=crossing.fill,
            batched=division.batched,
        )
        if exchange.wanted is None and not exchange.send:
            return []
        return [Transfer(exchange, crossing.state.step, len(self._steps) + number)]

    def _sources(self, index: int, partition: int) -> list[tuple[int, Index | None]]:
        """Where the inputs of a step are, and which part of what is there."""
        found: list[tuple[int, Index | None]] = []
        for state, entry in zip(self._steps[index].inputs, self._flow.inputs[index], strict=True):
            slot = state.step if entry.crossing is None else len(self._steps) + entry.crossing
            need = entry.needs[partition]
            part = None
            if need is not None and state.division is not None and need != (held := entry.held[partition]):
                assert held is not None
                part = (slice(None),) * state.division.batched + inside(need, held)
            found.append((slot, part))
        return found

    def _layer(self, index: int, partition: int) -> Any:
        with torch.device("meta"):
            return self._steps[index].build(self._flow.box(index, partition))

    # numbers

    def _held(self, partition: int) -> Iterator[OwnedPiece]:
        for index in range(len(self._steps)):
            for _, piece in self._step_pieces(index, partition):
                yield piece

    def _step_pieces(self, index: int, partition: int) -> Iterator[tuple[str, OwnedPiece]]:
        step, box = self._steps[index], self._flow.box(index, partition)
        for local, (part, full_shape) in step.pieces(box).items() if box is not None else ():
            yield local, OwnedPiece(step.within + local, part, full_shape)

    def _kept(self, name: str, *, trainable: bool) -> bool:
        return name in self._parameters and self._parameters[name].requires_grad == trainable

    def _operations(self, partition: int) -> int:
        """Counted on meta tensors: what the layers of this partition would compute."""
        total = 0
        for index, step in enumerate(self._steps[1:-1], 1):
            if not self._flow.wanted[index][partition]:
                continue
            if step.lazy:
                total += step.operations
                continue
            layer: Callable[..., Any] = self._layer(index, partition)
            held = [
                None if need is None or state.division is None
                else torch.empty(
                    ((self._batch,) if state.division.batched else ()) + sizes(need), dtype=state.dtype, device="meta"
                )
                for state, entry in zip(step.inputs, self._flow.inputs[index], strict=True)
                for need in [entry.needs[partition]]
            ]  # fmt: skip
            with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
                layer.eval()(*held) if isinstance(layer, nn.Module) else layer(*held)
            total += counter.get_total_flops() // self._batch
        return total

    def _states(self, partition: int) -> int:
        boxes = [crossing.needs[partition] for crossing in self._flow.crossings]
        for index, step in enumerate(self._steps[1:-1], 1):
            if step.division is not None and step.division.batched:
                boxes.append(self._flow.box(index, partition))
        return sum(map(count, boxes))

    def _check(self) -> None:
        """Every trainable parameter is owned whole and once, every partition has something to do."""
        owned = dict.fromkeys((name for name in self._parameters if self._kept(name, trainable=True)), 0)
        for partition in range(self.partitions):
            for piece in self.pieces(partition):
                owned[piece.name] += count(piece.box)
        for name, number in owned.items():
            if number == 0:
                raise ConfigurationError(
                    f"parameter {name} takes no part in the forward pass, so that no partition computes its gradient",
                    hint="remove it, or freeze it with requires_grad_(False)",
                )
            if number != self._parameters[name].numel():
                raise ConfigurationError(
                    f"the rule for {name} hands out {number} of its {self._parameters[name].numel()} elements",
                    hint="let the pieces of a rule cover each parameter once",
                )
        busy = [
            any(
                row[partition]
                for row, step in zip(self._flow.wanted[1:-1], self._steps[1:-1], strict=True)
                if not step.lazy
            )
            for partition in range(self.partitions)
        ]
        if not all(busy):
            raise ConfigurationError(
                f"the model has units for {sum(busy)} of {self.partitions} partitions; "
                f"partition {busy.index(False)} would have nothing to compute",
                hint="use fewer partitions, or cut a layer by hand",
            )
