# SPDX-License-Identifier: Apache-2.0
"""The share of a model that one partition computes: exchanges and layers in the order of the forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from distbelief.errors import ConfigurationError
from distbelief.partition.exchange import Exchange, tie
from distbelief.partition.group import Group

Index = tuple[slice, ...]


@final
class Draws:
    """Where random numbers of a share come from: the same on all partitions, whatever the cut."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """A fresh generator of this mini-batch and layer."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.step * 0xBF58476D1CE4E5B9 + layer * 0x94D049BB133111EB) % 2**63
        return torch.Generator(device).manual_seed(mixed)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Bring what this partition needs of the value in slot `source` into slot `target`."""

    exchange: Exchange
    source: int
    target: int


@dataclass(frozen=True, eq=False)
class Computation:
    """Compute this partition's box of a layer: slots and the part of each that is meant, into slot `target`."""

    layer: Callable[..., Any]
    sources: Sequence[tuple[int, Index | None]]
    target: int


def check_shape(planned: tuple[int, ...], x: torch.Tensor) -> None:
    """Raise ConfigurationError for a mini-batch that boxes were not planned for, without the batch."""
    if tuple(x.shape[1:]) != planned:
        raise ConfigurationError(
            f"the model is cut by units for inputs of shape {list(planned)}, a mini-batch has {list(x.shape[1:])}",
            hint="bring all to one shape in the data set or in collate, also the test set's; or use Plan.stages",
        )


@final
class Share(nn.Module):
    """One partition's share of a model. Called like the model, by all partitions of the group at once.

    Everybody gets the whole input. The whole output comes out on one partition, an empty one elsewhere; there, call
    `output.sum().backward()` where the one with the output calls `loss.backward()`.
    """

    def __init__(
        self, shape: tuple[int, ...], program: Sequence[Transfer | Computation],
        held: tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]], group: Group, draws: Draws, output: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._shape = shape
        """Of the input without the batch, for which the boxes were planned."""
        self.parameters_by_name, self.buffers_by_name = held
        """This partition's boxes of parameters and buffers, by their names in the uncut model."""
        self._program, self._group, self._draws, self._output = tuple(program), group, draws, output
        self._layers = nn.ModuleList(
            item.layer for item in program if isinstance(item, Computation) and isinstance(item.layer, nn.Module)
        )
        last_use: dict[int, int] = {}
        for position, item in enumerate(self._program):
            used = [item.source] if isinstance(item, Transfer) else [slot for slot, _ in item.sources]
            last_use |= dict.fromkeys([*used, item.target], position)
        self._free = [[s for s, last in last_use.items() if last == p and s != output] for p in range(len(program))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output for a mini-batch, shape (batch, ...). Raises PeerLost, DeadlineExceeded, ConfigurationError."""
        check_shape(self._shape, x)
        group, batch = self._group, x.shape[0]
        group.thread = None
        values: dict[int, Any] = {0: x}
        for item, free in zip(self._program, self._free, strict=True):
            if isinstance(item, Transfer):
                exchange = item.exchange
                values[item.target] = exchange(values.get(item.source), batch)
            else:
                values[item.target] = item.layer(
                    *(values[slot] if part is None else values[slot][part] for slot, part in item.sources)
                )
            for slot in free:
                values.pop(slot, None)
        self._draws.step += self.training
        output = (
            torch.zeros(0, device=group.device, requires_grad=torch.is_grad_enabled())
            if self._output is None
            else values[self._output]
        )
        return tie(output, group)
