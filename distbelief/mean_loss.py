# SPDX-License-Identifier: Apache-2.0
"""A loss that is computed in parts must be the mean of the parts' losses; here that is tried, before anything starts.

Sums, weights per class, ignored targets and whatever compares examples with each other are no such mean: the sum over
parts would be of another function than the user's, and nobody would see it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from distbelief.errors import ConfigurationError

TOLERANCE, TOLERANCE_IN_DOUBLE = 1e-3, 1e-6
"""Relative difference that is rounding."""
DISTANCES = (0.0, 0.1, 1.0)
"""How far parameters are moved, relative to 1 + |x|: elsewhere a term of the loss may show that is zero at first."""
AS_A_MEAN = (
    'let the loss be the mean over the mini-batch (reduction="mean"), the same for every example: divide weighted '
    "losses by the number of examples; a function of minimize is the sum over the examples of its portion"
)

Part = tuple[int, Any]
"""(examples, mini-batch)."""


def check_mean(loss_of: Callable[[Any], torch.Tensor], whole: Any, parts: Sequence[Part], hint: str) -> None:
    """Refuse a loss of a mini-batch that is not the mean of those of `parts` of it, by their examples.

    Nothing is said where one of them cannot be computed. Raises ConfigurationError.
    """
    try:
        found = loss_of(whole).detach()
        losses = [float(loss_of(batch).detach()) for _, batch in parts]
    except Exception:
        return
    counts = [count for count, _ in parts]
    once, mean = float(found), sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
    near = math.isfinite(mean) and abs(once - mean) <= _rounding(found) * max(map(abs, (once, *losses))) + 1e-12
    if math.isfinite(once) and not near:
        told = ", ".join(f"{loss:.6g} of {count}" for count, loss in zip(counts[:3], losses, strict=False))
        raise ConfigurationError(
            f"the loss of {sum(counts)} examples is {once:.6g}; parts of them have {told}: it is not their mean",
            hint=hint,
        )


def check_scale(loss_of: Callable[[Any], torch.Tensor], sample: Any, twice: Any) -> None:
    """Refuse a loss that grows, or shrinks, with the number of examples, which `twice` has twice over: a sum.

    Nothing is said where there is no loss of so many. Raises ConfigurationError.
    """
    found = loss_of(sample).detach()
    try:
        other = float(loss_of(twice).detach())
    except Exception:
        return
    once = float(found)
    if once and any(abs(other - factor * once) <= _rounding(found) * abs(once) for factor in (0.5, 2.0)):
        raise ConfigurationError(
            f"the loss of the same examples twice over is {other:.6g}, of once {once:.6g}: it is not their mean",
            hint=AS_A_MEAN,
        )


def _rounding(loss: torch.Tensor) -> float:
    epsilon = torch.finfo(loss.dtype).eps
    return TOLERANCE_IN_DOUBLE if loss.dtype == torch.float64 else max(TOLERANCE, 10 * epsilon)


@contextmanager
def moved(parameters: Sequence[nn.Parameter], distance: float) -> Iterator[None]:
    """Parameters so far from where they are, each in a direction of its own; afterwards as before, bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            direction = torch.arange(1, 1 + parameter.numel(), dtype=torch.float64).sin().reshape(parameter.shape)
            parameter.add_(distance * direction.to(parameter) * (1 + parameter.abs()))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def doubled(sample: Any) -> Any:
    """The mini-batch twice over; None for one that is not made of tensors."""
    return _of_tensors(sample, lambda tensor: torch.cat([tensor, tensor]))


def divided(sample: Any, edges: Sequence[int]) -> list[Part] | None:
    """The parts of the mini-batch between the edges; None for one that is not made of tensors."""
    parts: list[Part] = []
    for start, stop in pairwise(edges):
        part = _of_tensors(sample, _rows(start, stop))
        if part is None:
            return None
        parts.append((stop - start, part))
    return parts


def _rows(start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
    rows = torch.arange(start, stop)
    return lambda tensor: tensor.index_select(0, rows)  # takes sparse ones, too


def _of_tensors(sample: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    leaves, structure = tree_flatten(sample)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
        return None
    return tree_unflatten([change(leaf) for leaf in leaves], structure)
