# SPDX-License-Identifier: Apache-2.0
"""Rules for layers that subtract a mean and divide by a deviation: by channel, or over the last dimensions."""

import math
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from distbelief.partition.box import Box, count, sizes, whole
from distbelief.partition.division import Division
from distbelief.partition.site import Part, Site, State, part, tensor
from distbelief.partition.trace import Value


def batch_norm(site: Site, x: State) -> State:
    """Channels with their statistics, over whole planes: exact, and nobody has to wait for anybody's sums."""
    module: nn.BatchNorm2d = site.module
    division = site.follow(x, {"channels": lambda: site.along(0)})
    if any(division.is_cut(dimension) for dimension in range(1, len(division.shape))):
        division = site.along(0)
    tensors = {**module._parameters, **module._buffers}

    def build(box: Box) -> nn.Module:
        options = (module.eps, module.momentum, module.affine, module.track_running_stats)
        return type(module)(sizes(box)[0], *options).to(site.value.dtype)

    def pieces(box: Box) -> dict[str, Part]:
        return {
            name: part(module, name, (box[0],) if value.dim() else ())
            for name, value in tensors.items()
            if value is not None
        }

    return site.compute([x], division, build, need=lambda box: [(box[0], *whole(site.shape[1:]))], pieces=pieces)


def layer_norm(site: Site, x: State) -> State:
    """Own units with their weights. Partitions tell each other mean and deviation of what they own, two numbers."""
    module: nn.LayerNorm = site.module
    ahead = len(site.shape) - len(module.normalized_shape)
    division = site.follow(x, {"rows": lambda: site.along(-1)})
    if any(division.is_cut(dimension) for dimension in range(ahead)):
        division = site.along(-1)

    def pieces(box: Box) -> dict[str, Part]:
        return {
            name: part(module, name, box[ahead:]) for name, value in module._parameters.items() if value is not None
        }

    holders = [partition for partition, box in enumerate(division.boxes) if box is not None]
    if len(holders) == 1 or tensor(x).everywhere:  # who has the whole asks nobody
        return site.compute([x], division, lambda box: WholeNorm(module, ahead, box), pieces=pieces)
    lead = site.shape[:ahead]
    seats: list[Box | None] = [None] * site.partitions
    for seat, partition in enumerate(holders):
        seats[partition] = (*whole(lead), (seat, seat + 1), (0, 2))
    table = Division((*lead, len(holders), 2), tuple(seats))
    owned = {seats[partition]: division.boxes[partition] for partition in holders}
    numbers = [count(box) // math.prod(lead) for partition in holders if (box := division.boxes[partition]) is not None]
    told = site.yielding(Value(table.shape, torch.promote_types(x.dtype, torch.float32), batched=True))
    moments = told.compute([x], table, lambda box: Moments(ahead), need=lambda box: [owned[box]])
    return site.compute(
        [x, moments], division, lambda box: CutNorm(module, ahead, box, numbers),
        need=lambda box: [box, whole(table.shape)], pieces=pieces,
    )  # fmt: skip


@final
class Moments(nn.Module):
    """Mean and summed squared deviations of what one partition has: shape (..., 1, 2), of 16 bits in 32, as torch's."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self._ahead = ahead

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the dimensions behind the batch and `ahead` others."""
        flat = x.flatten(self._ahead + 1).to(torch.promote_types(x.dtype, torch.float32))
        mean = flat.mean(-1)
        squares = (flat - mean.unsqueeze(-1)).square().sum(-1)
        return torch.stack((mean, squares), -1).unsqueeze(-2)


class _Affine(nn.Module):
    """Weight and bias of a box of the normalised dimensions."""

    def __init__(self, module: nn.LayerNorm, box: Box) -> None:
        super().__init__()
        self.eps = module.eps
        for name, value in module._parameters.items():
            made = None if value is None else nn.Parameter(torch.empty(sizes(box), dtype=value.dtype))
            self.register_parameter(name, made)

    def scaled(self, normal: torch.Tensor) -> torch.Tensor:
        """`normal` times weight plus bias."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        scaled = normal if weight is None else normal * weight
        return scaled if bias is None else scaled + bias


@final
class CutNorm(_Affine):
    """Layer normalisation of a box, from everybody's moments.

    mean = sum of n_k mean_k / n        n variance = sum of squares_k + n_k (mean_k - mean)²
    """

    def __init__(self, module: nn.LayerNorm, ahead: int, box: Box, numbers: list[int]) -> None:
        """`numbers`: of units by which partition k made its moments."""
        super().__init__(module, box[ahead:])
        self._ahead, self._numbers = ahead, numbers

    def forward(self, x: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """`moments` have the shape (..., partitions, 2)."""
        numbers = moments.new_tensor(self._numbers)
        means, squares = moments.unbind(-1)
        mean = (means * numbers).sum(-1, keepdim=True) / sum(self._numbers)
        spread = squares + (means - mean).square() * numbers
        scale = torch.rsqrt(spread.sum(-1, keepdim=True) / sum(self._numbers) + self.eps)
        behind = (*mean.shape[:-1], *[1] * (x.dim() - mean.dim() + 1))
        return self.scaled(((x - mean.reshape(behind)) * scale.reshape(behind)).to(x.dtype))


@final
class WholeNorm(_Affine):
    """Layer normalisation of a box by a partition that has the whole."""

    def __init__(self, module: nn.LayerNorm, ahead: int, box: Box) -> None:
        super().__init__(module, box[ahead:])
        self._shape = module.normalized_shape
        self._part: tuple[Any, ...] = (..., *(slice(*side) for side in box[ahead:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The box of the normalised whole."""
        return self.scaled(functional.layer_norm(x, self._shape, eps=self.eps)[self._part])
