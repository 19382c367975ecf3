# SPDX-License-Identifier: Apache-2.0
"""Who does how much: the work of each call of a forward pass, and the fairest cut of a row of works.

Work is counted on meta tensors, so it takes no memory and comes out the same in every process.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from distbelief.partition.tracer import Followed


@dataclass(frozen=True)
class Measure:
    """What a call of the forward pass yields and costs."""

    result: Any
    """On the meta device where it is a tensor."""
    operations: int
    """Floating-point operations of the whole mini-batch, as torch counts them: those of matrix products alone."""
    saved: int
    """Elements that it keeps for the backward pass, and that no call before it has kept."""
    changed: tuple[fx.Node, ...]
    """The calls whose results it changes in place."""

    @property
    def elements(self) -> int:
        """Of the result; 0 when it is no tensor."""
        return self.result.numel() if isinstance(self.result, Tensor) else 0


def measure(module: fx.GraphModule, sample: Tensor) -> dict[fx.Node, Measure]:
    """Run the graph of `module`, which is on the meta device, on a meta mini-batch; what each of its calls does.

    Raises ConfigurationError for a call that needs values.
    """
    run = _Measuring(module)
    with torch.device("meta"), torch.enable_grad():
        run.run(sample)
    return run.found


class _Measuring(Followed):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, "let it depend on no values, and make new tensors on the device of its input")
        self.found: dict[fx.Node, Measure] = {}
        self._kept = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]

    def run_node(self, n: fx.Node) -> Any:
        saved = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal saved
            storage = tensor.untyped_storage()
            if all(storage is not each for each in self._kept):
                self._kept.append(storage)
                saved += storage.nbytes() // tensor.itemsize
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = super().run_node(n)
        self.found[n] = Measure(result, self.operations[n], saved, tuple(self.changed.get(n, ())))
        return result


def fairest(costs: Sequence[float], parts: int, crossing: Sequence[float] | None = None) -> list[int]:
    """Cut a row into `parts` runs, at most len(costs), so that the dearest is cheapest: their edges, the ends included.

    A run costs what its members cost and `crossing` (one number more than `costs`) at its two edges.

        best[p][j] = min over i of max(best[p - 1][i], costs[i:j] + crossing[i] + crossing[j])
    """
    length = len(costs)
    crossing = [0.0] * (length + 1) if crossing is None else crossing
    sums = [0.0, *itertools.accumulate(costs)]
    best = [0.0] + [math.inf] * length
    starts: list[list[int]] = []
    for _ in range(parts):
        before, best, chosen = best, [math.inf] * (length + 1), [0] * (length + 1)
        for stop in range(1, length + 1):
            for start in range(stop):
                value = max(before[start], sums[stop] - sums[start] + crossing[start] + crossing[stop])
                if value < best[stop]:
                    best[stop], chosen[stop] = value, start
        starts.append(chosen)
    edges = [length]
    for chosen in reversed(starts):
        edges.append(chosen[edges[-1]])
    return edges[::-1]
