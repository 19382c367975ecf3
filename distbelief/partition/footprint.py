# SPDX-License-Identifier: Apache-2.0
"""What a partition of a replica holds in memory, counted from the plan before anything is made.

    parameters and gradients    3 buffers of its share: parameters, gradient, and one by which both travel
    kept                        its frozen parameters and buffers
    states                      what its layers yield and what arrives, for one mini-batch, kept for the backward pass

Not counted: the interpreter with torch, what one layer needs while it computes, and the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distbelief.errors import ConfigurationError
from distbelief.partition.box import count
from distbelief.partition.stages import StagePlan
from distbelief.partition.units import Blueprint

COPIES = 3
"""Buffers of the length of a partition's parameters."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one partition of a replica holds."""

    parameters: int
    """Parameters and gradients, with the buffer by which both travel."""
    kept: int
    """Frozen parameters and buffers."""
    states: int
    """Of one mini-batch: its layers' results and what arrives for them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.kept + self.states


def footprints(plan: Blueprint | StagePlan, batch_size: int, dtype: torch.dtype) -> tuple[Footprint, ...]:
    """Per partition, for mini-batches of so many examples and a model of one `dtype`."""
    size, found = dtype.itemsize, []
    for partition, numbers in enumerate(plan.numbers):
        kept = sum(count(piece.box) for piece in (*plan.frozen(partition), *plan.buffers(partition)))
        found.append(Footprint(numbers.parameters * COPIES * size, kept * size, numbers.states * batch_size * size))
    return tuple(found)


def uncut_footprint(module: nn.Module, parameters: int, dtype: torch.dtype) -> Footprint:
    """Of a whole model with so many trainable parameters; its states are not known and count nothing."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    kept = sum(tensor.nbytes for tensor in tensors.values()) - parameters * dtype.itemsize
    return Footprint(parameters * COPIES * dtype.itemsize, kept, 0)


def check_memory(held: Sequence[Footprint], memory_bytes: int) -> None:
    """Raise ConfigurationError for a partition that does not fit, naming the one that is furthest from it."""
    totals = [footprint.total for footprint in held]
    most = max(totals)
    if most > memory_bytes:
        largest = held[totals.index(most)]
        raise ConfigurationError(
            f"partition {totals.index(most)} of {len(held)} takes {most:,} bytes of memory, of {memory_bytes:,} given: "
            f"{largest.parameters:,} for parameters and gradients, {largest.kept:,} for frozen parameters and buffers, "
            f"{largest.states:,} for the states of a mini-batch",
            hint="use more partitions, a smaller batch_size, of Sandblaster a smaller micro_batch, or "
            f"Cluster(memory_bytes={most}) if there is so much",
        )
