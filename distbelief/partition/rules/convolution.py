# SPDX-License-Identifier: Apache-2.0
"""The rule for convolutions: by output channels, or over the plane."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from distbelief.partition.box import Box, field, sizes, whole
from distbelief.partition.division import Division
from distbelief.partition.site import Part, Site, State, part, tensor
from distbelief.plan import CutName


def convolution(site: Site, x: State) -> State:
    """Output channels, between groups if there are any, from the planes of their input channels.

    Over the plane, all partitions use one weight: each owns some of it, sends that to the others and gets the gradient
    back, as it does with states.
    """
    module: nn.Conv2d = site.module
    unit = module.out_channels // module.groups if module.groups > 1 else 1
    planar = len(module.kernel_size) == 2 and module.padding_mode == "zeros"
    ways: dict[CutName, Callable[[], Division]] = {"channels": lambda: site.along(0, unit)}
    if planar:
        ways["grid"] = site.tiles
    division = site.choose(x, ways, math.prod(site.shape))
    if site.cut is not None and site.cut.kind == "grid":
        return _over_the_plane(site, x, division)

    def groups(box: Box) -> int:
        return max(1, sizes(box)[0] // unit) if module.groups > 1 else 1

    def need(box: Box) -> list[Box]:
        per_group = module.in_channels // module.groups
        first = box[0][0] // unit if module.groups > 1 else 0
        planes = whole(tensor(x).shape[1:])
        return [((first * per_group, (first + groups(box)) * per_group), *planes)]

    def build(box: Box) -> nn.Module:
        per_group = module.in_channels // module.groups
        return type(module)(
            per_group * groups(box), sizes(box)[0], module.kernel_size, module.stride,  # type: ignore[arg-type]
            module.padding, module.dilation, groups(box), module.bias is not None, module.padding_mode,  # type: ignore[arg-type]
            dtype=module.weight.dtype,
        )  # fmt: skip

    def pieces(box: Box) -> dict[str, Part]:
        weight = {"weight": part(module, "weight", (box[0], *whole(module.weight.shape[1:])))}
        return weight | ({"bias": part(module, "bias", (box[0],))} if module.bias is not None else {})

    return site.compute([x], division, build, need=need, pieces=pieces)


def _over_the_plane(site: Site, x: State, division: Division) -> State:
    module: nn.Conv2d = site.module
    held = [site.parameter(module.weight, "weight", f"{site.call.name}.", dimension=0)]
    if module.bias is not None:
        held.append(site.parameter(module.bias, "bias", f"{site.call.name}.", dimension=0))

    def need(box: Box) -> list[Box]:
        sides = zip(box[1:], module.kernel_size, module.stride, _before(module), module.dilation, strict=True)
        states = [whole(tensor(state).shape) for state in held]
        return [(*whole(tensor(x).shape[:1]), *(field(*side) for side in sides)), *states]

    def build(box: Box) -> Any:
        def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return functional.conv2d(x, weight, bias, module.stride, 0, module.dilation, module.groups)

        return convolve

    return site.compute([x, *held], division, build, need=need)


def _before(module: nn.Conv2d) -> tuple[int, ...]:
    """The padding before the first place, per dimension."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        sides = zip(module.dilation, module.kernel_size, strict=True)
        return tuple(dilation * (kernel - 1) // 2 for dilation, kernel in sides)
    assert isinstance(module.padding, tuple)
    return module.padding
