# SPDX-License-Identifier: Apache-2.0
"""A model cut into stages: runs of consecutive layers, one per partition, each fed by the one before.

    the forward pass     byte + position | block 0 | block 1 | block 2 | norm, score
    may be cut                           ^         ^         ^         ^
    two stages           |------------- 0 -------------|---------- 1 ----------|

For models whose layers have no unit rule. A forward pass may be cut before a step with trainable parameters where one
value alone passes from what is done to what is to do; so residual blocks stay whole. Modules stay the user's own; what
is done between them becomes a graph. Planning computes nothing and comes out the same in every process.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, fx, nn

from distbelief.errors import ConfigurationError
from distbelief.partition.box import whole
from distbelief.partition.forward_pass import ForwardPass, name_of
from distbelief.partition.materialise import tensors
from distbelief.partition.stage_cuts import choose
from distbelief.partition.trace import skeleton
from distbelief.partition.units import Numbers, OwnedPiece


def stages(
    model: nn.Module, sample: Tensor, partitions: int, microbatches: int, *, cuts: Sequence[str] | None = None
) -> "StagePlan":
    """Plan `model`, on any device, for mini-batches like `sample`, any tensor of their dtype and shape, batch first.

    `cuts` names for each stage the module that it begins with, "layers.3", or the modules that it consists of,
    "layers.3-5"; None balances operations and elements sent. Tracing patches nn.Module
    for a moment: call it while no other thread runs a forward pass. Raises ConfigurationError, naming the module or the
    value, for what cannot be cut so.
    """
    if partitions < 1 or microbatches < 1:
        raise ConfigurationError(
            f"{partitions} stages with {microbatches} micro-batches cannot be", hint="use 1 or more of both"
        )
    if sample.shape[0] < microbatches:
        raise ConfigurationError(
            f"a mini-batch of {sample.shape[0]} examples cannot be cut into {microbatches} micro-batches",
            hint=f"use a batch_size of {microbatches} or more, or at most {sample.shape[0]} micro-batches",
        )
    hollow = skeleton(model)
    for _, owner, attribute, tensor in list(tensors(hollow)):
        if not tensor.dim() and not tensor.dtype.is_floating_point:  # BatchNorm without momentum divides by its counter
            setattr(owner, attribute, torch.zeros_like(tensor, device="cpu"))
    meta = torch.empty((max(2, sample.shape[0]), *sample.shape[1:]), dtype=sample.dtype, device="meta")
    passed, starts = choose(hollow, meta, partitions, cuts)
    plan = StagePlan(passed, starts, microbatches, sample.shape[0])
    micro = sample.shape[0] // plan.micro_batches(sample.shape[0])
    plan.boundaries(torch.empty((micro, *sample.shape[1:]), dtype=sample.dtype, device="meta"))
    return plan


@final
class Stage(nn.Module):
    """The consecutive layers that one partition computes, in training and in evaluation."""

    def __init__(
        self, training: fx.GraphModule, evaluating: fx.GraphModule, parameters: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self._training, self._evaluating = training, evaluating
        self.parameters_by_name = parameters
        """By their names in the uncut model, frozen ones included."""
        self.buffers_by_name = buffers

    def forward(self, x: Tensor) -> Tensor:
        """From the output of the stage before, or the mini-batch, to the input of the next, or the model's output."""
        output: Tensor = self._training(x) if self.training else self._evaluating(x)
        return output.contiguous()  # what is sent has to be


@final
class StagePlan:
    """The plan of a model cut into stages; made by `stages`, the same on every partition."""

    def __init__(self, passed: ForwardPass, starts: Sequence[int], microbatches: int, batch: int) -> None:
        self.partitions, self.microbatches = len(starts), microbatches
        self._passed, self._batch = passed, batch
        self._edges = [*starts, len(passed.steps)]
        self._model = passed.called.uncut_model
        self._names = {id(tensor): name for name, _, _, tensor in reversed(list(tensors(self._model)))}
        self._boundaries: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
        """Of micro-batches of this dtype and shape."""

    @property
    def out(self) -> int:
        """The partition on which the output comes out."""
        return self.partitions - 1

    # what is where

    def pieces(self, partition: int) -> list[OwnedPiece]:
        """The trainable parameters of a stage, each whole, in the model's order."""
        return self._held(partition, dict(self._model.named_parameters()), trainable=True)

    def frozen(self, partition: int) -> list[OwnedPiece]:
        """The frozen parameters that a stage holds; several may hold one."""
        return self._held(partition, dict(self._model.named_parameters()), trainable=False)

    def buffers(self, partition: int) -> list[OwnedPiece]:
        """The buffers that a stage holds; several may hold one that is only read."""
        return self._held(partition, dict(self._model.named_buffers()), trainable=False)

    def others(self, partition: int) -> list[OwnedPiece]:
        """The tensors that a stage's modules hold as plain attributes."""
        registered = {name for name, _ in (*self._model.named_parameters(), *self._model.named_buffers())}
        kept = {name: tensor for name, _, _, tensor in tensors(self._model) if name not in registered}
        return self._held(partition, kept, trainable=False)

    def _held(self, partition: int, named: Mapping[str, Tensor], *, trainable: bool) -> list[OwnedPiece]:
        used = self._used[partition]
        return [
            OwnedPiece(name, whole(tensor.shape), tuple(tensor.shape))
            for name, tensor in named.items()
            if name in used and (isinstance(tensor, nn.Parameter) and tensor.requires_grad) == trainable
        ]

    @cached_property
    def _used(self) -> list[set[str]]:
        """Per partition the first names of all tensors of its stage."""
        return [{self._name(tensor, name) for name, _, _, tensor in tensors(training)} for training, _ in self._planned]

    @cached_property
    def _planned(self) -> list[tuple[fx.GraphModule, fx.GraphModule]]:
        """Every stage as planned, without values, in training and in evaluation."""
        return [self._graphs(partition, self._passed.called) for partition in range(self.partitions)]

    def _name(self, tensor: Tensor, name: str) -> str:
        if id(tensor) not in self._names:
            raise ConfigurationError(
                f"{name_of(name)} is made anew before each forward pass, as by torch.nn.utils.prune, weight_norm or "
                "spectral_norm",
                hint="use those of torch.nn.utils.parametrizations, make it a parameter (prune.remove), or use "
                "partitions=1",
            )
        return self._names[id(tensor)]

    @cached_property
    def numbers(self) -> tuple[Numbers, ...]:
        """Per partition."""
        measures, batch = self._passed.measures, max(2, self._batch)
        sent = [measures[self._passed.passing(start)[0]].elements // batch for start in self._edges[1:-1]]
        counts = [
            sum(self._model.get_parameter(piece.name).numel() for piece in self.pieces(partition))
            for partition in range(self.partitions)
        ]
        work = [
            sum(measures[step].operations for step in self._passed.steps[start:stop]) // batch
            for start, stop in pairwise(self._edges)
        ]
        received, sent = [0, *sent], [*sent, 0]
        states = [
            received[partition] + sum(measures[step].saved for step in self._passed.steps[start:stop]) // batch
            for partition, (start, stop) in enumerate(pairwise(self._edges))
        ]
        messages = self.micro_batches(self._batch)
        return tuple(
            Numbers(
                counts[partition], work[partition], received[partition], sent[partition],
                messages_in=messages * (partition > 0), messages_out=messages * (partition < self.out),
                states=states[partition],
            )
            for partition in range(self.partitions)
        )  # fmt: skip

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Per partition the modules that are its steps, by name."""
        return tuple(
            tuple(name_of(step.target) for step in self._passed.steps[start:stop] if step.op == "call_module")
            for start, stop in pairwise(self._edges)
        )

    # what travels

    def micro_batches(self, examples: int) -> int:
        """Into how many micro-batches of one size a mini-batch of so many examples is cut.

        As many as planned, or the most that divide it and are no smaller than those of a mini-batch as planned.
        """
        whole_batch = self._divisor(self._batch, 1)
        return self._divisor(examples, min(examples, self._batch // whole_batch))

    def _divisor(self, examples: int, least: int) -> int:
        return max(n for n in range(1, self.microbatches + 1) if examples % n == 0 and examples // n >= least)

    def boundaries(self, micro_batch: Tensor) -> list[Tensor]:
        """What enters each stage for a meta micro-batch, and what leaves the last one; on the meta device.

        Raises ConfigurationError when a stage cannot compute on micro-batches of this size.
        """
        kind = micro_batch.dtype, micro_batch.shape
        if kind not in self._boundaries:
            self._boundaries[kind] = self._through(micro_batch)
        return [each.detach() for each in self._boundaries[kind]]

    def _through(self, micro_batch: Tensor) -> list[Tensor]:
        found = [micro_batch]
        for partition, graphs in enumerate(self._planned):
            entering = found[-1].detach().requires_grad_(partition > 0)
            try:
                with torch.device("meta"):
                    found.append(Stage(*graphs, {}, {}).train()(entering).detach())
            except Exception as error:
                raise ConfigurationError(
                    f"stage {partition} cannot compute on a micro-batch of {micro_batch.shape[0]}: {error}",
                    hint="use fewer micro-batches, or cut the model elsewhere",
                ) from error
        return found

    # what one partition runs

    def share(self, partition: int, values: Mapping[str, Tensor], device: torch.device) -> Stage:
        """The stage of one partition over `values` of its pieces, frozen parameters, buffers and other tensors.

        The stage's parameters and buffers share the values' memory when that is on `device`.
        """
        called = copy.deepcopy(self._passed.called)
        names = {id(tensor): name for name, _, _, tensor in reversed(list(tensors(called.uncut_model)))}
        filled: dict[str, Tensor] = {}
        graphs = self._graphs(partition, called)
        for graph in graphs:
            for _, owner, attribute, hollow in list(tensors(graph)):
                name = names.get(id(hollow))
                if name is None:
                    continue  # a module that both graphs call has been filled
                if name not in filled:
                    value = values[name].to(device)
                    is_parameter = isinstance(hollow, nn.Parameter)
                    filled[name] = nn.Parameter(value, hollow.requires_grad) if is_parameter else value
                setattr(owner, attribute, filled[name])
        held = {name: value for name, value in filled.items() if isinstance(value, nn.Parameter)}
        buffers = {piece.name: filled[piece.name] for piece in self.buffers(partition)}
        return Stage(*graphs, held, buffers)

    def _graphs(self, partition: int, called: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The stage in training and in evaluation, over the modules of `called`."""
        return self._graph(partition, called.train(), {}), self._graph(partition, called.train(), self._passed.twins)

    def _graph(self, partition: int, called: nn.Module, twins: Mapping[fx.Node, fx.Node]) -> fx.GraphModule:
        graph, passed = fx.Graph(), self._passed
        start, stop = self._edges[partition : partition + 2]
        entering = passed.input if partition == 0 else passed.passing(start)[0]
        copies = {twins.get(entering, entering): graph.placeholder("x")}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        for step in passed.steps[start:stop]:
            copied(twins.get(step, step))
        output = twins.get(passed.output, passed.output)
        if partition == self.out:
            graph.output(fx.node.map_arg(output.args[0], copied))
        else:
            leaving = passed.passing(stop)[0]
            graph.output(copied(twins.get(leaving, leaving)))
        return fx.GraphModule(called, graph)
