# SPDX-License-Identifier: Apache-2.0
"""Rules for layers over a plane: locally connected ones, pooling, local contrast normalisation."""

import math
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d
from distbelief.partition.box import Box, field, sizes, whole
from distbelief.partition.site import Part, Site, State, part, tensor


def numbers(value: Any, dimensions: int) -> tuple[int, ...]:
    """One number for each dimension, as torch's layers take it."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def locally_connected(site: Site, x: State) -> State:
    """Tiles of the plane with their weights; the receptive field of the tile, all channels. The exchange pads."""
    module: LocallyConnected2d = site.module
    weight = module.weight

    def build(box: Box) -> nn.Module:
        height, width = (
            (length - 1) * stride + kernel
            for length, stride, kernel in zip(sizes(box)[1:], module.stride, module.kernel_size, strict=True)
        )
        return LocallyConnected2d(
            module.in_channels, module.out_channels, (height, width), module.kernel_size, module.stride,
            bias=module.bias is not None,
        ).to(weight.dtype)  # fmt: skip

    def need(box: Box) -> list[Box]:
        fields = zip(box[1:], module.kernel_size, module.stride, module.padding, strict=True)
        return [((0, module.in_channels), *(field(*one) for one in fields))]

    def pieces(box: Box) -> dict[str, Part]:
        held = {"weight": part(module, "weight", (*box[1:], *whole(weight.shape[2:])))}
        return held | ({"bias": part(module, "bias", (*box[1:], box[0]))} if module.bias is not None else {})

    division = site.choose(x, {"grid": site.tiles}, math.prod(site.shape))
    return site.compute([x], division, build, need=need, pieces=pieces)


def max_pool(site: Site, x: State) -> State:
    """As the input; the field, own channels. Padding is minus infinity."""
    module: nn.MaxPool2d = site.module
    if module.return_indices:
        raise site.impossible("returns the places of its maxima")
    dimensions = len(site.shape) - 1
    kernel, stride = numbers(module.kernel_size, dimensions), numbers(module.stride, dimensions)
    dilation = numbers(module.dilation, dimensions)

    def build(box: Box) -> nn.Module:
        return type(module)(module.kernel_size, module.stride, dilation=module.dilation)

    def need(box: Box) -> list[Box]:
        padding = numbers(module.padding, dimensions)
        return [(box[0], *(field(*one) for one in zip(box[1:], kernel, stride, padding, dilation, strict=True)))]

    return site.compute([x], _pooled(site, x), build, need=need, fill=-math.inf)


def average_pool(site: Site, x: State) -> State:
    """As the input; the field, own channels. Padding is zero, counted or not as the layer says."""
    module: nn.AvgPool2d = site.module
    dimensions = len(site.shape) - 1
    kernel, stride, padding = (numbers(n, dimensions) for n in (module.kernel_size, module.stride, module.padding))
    lengths = tensor(x).shape[1:]
    divisor = getattr(module, "divisor_override", None)

    def build(box: Box) -> nn.Module:
        sides = list(zip(box[1:], lengths, kernel, stride, padding, strict=True))
        full = divisor is not None
        counts = None if full else [_counts(*side, padded=module.count_include_pad) for side in sides]
        scale = math.prod(kernel) / (divisor if divisor is not None else 1)
        return AverageOfCounted(kernel, stride, counts, scale)

    def need(box: Box) -> list[Box]:
        return [(box[0], *(field(*one) for one in zip(box[1:], kernel, stride, padding, strict=True)))]

    return site.compute([x], _pooled(site, x), build, need=need)


def _counts(side: tuple[int, int], length: int, kernel: int, stride: int, padding: int, *, padded: bool) -> list[int]:
    """By how many a window is averaged along one dimension, for every place of the side."""
    starts = [place * stride - padding for place in range(*side)]
    ends = [min(start + kernel, length + padding) for start in starts]
    if padded:
        return [end - start for start, end in zip(starts, ends, strict=True)]
    return [min(end, length) - max(start, 0) for start, end in zip(starts, ends, strict=True)]


@final
class AverageOfCounted(nn.Module):
    """Sums of windows over numbers of units, which at the edge of a plane may be fewer than the window has."""

    def __init__(
        self, kernel: tuple[int, ...], stride: tuple[int, ...], counts: list[list[int]] | None, scale: float
    ) -> None:
        """`counts` per dimension and place; None where all averages are `scale` times those of full windows."""
        super().__init__()
        self._kernel, self._stride, self._counts, self._scale = kernel, stride, counts, scale
        if counts is not None and all(
            count == size for side, size in zip(counts, kernel, strict=True) for count in side
        ):
            self._counts, self._scale = None, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average windows side by side or overlapping."""
        pool: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(self._kernel) - 1]
        averages: torch.Tensor = pool(x, self._kernel, self._stride)
        if self._scale != 1:
            averages = averages * self._scale
        for dimension, counts in enumerate(reversed(self._counts or [])):
            averages = averages / x.new_tensor(counts).reshape(-1, *[1] * dimension)
        return averages


def l2_pool(site: Site, x: State) -> State:
    """As the input; the field, own channels."""
    module: L2Pool2d = site.module

    def need(box: Box) -> list[Box]:
        fields = zip(box[1:], module.kernel_size, module.stride, module.padding, strict=True)
        return [(box[0], *(field(*one) for one in fields))]

    return site.compute(
        [x], _pooled(site, x), lambda box: L2Pool2d(module.kernel_size, module.stride, eps=module.eps), need=need
    )


def adaptive_pool(site: Site, x: State) -> State:
    """Own channels, their whole plane."""
    division = site.follow(x, {"channels": lambda: site.along(0)})
    if any(division.is_cut(dimension) for dimension in range(1, len(division.shape))):
        division = site.along(0)
    plane = whole(tensor(x).shape[1:])
    return site.compute(
        [x], division, lambda box: type(site.module)(site.module.output_size), need=lambda box: [(box[0], *plane)]
    )


def _pooled(site: Site, x: State) -> Any:
    return site.follow(x, {"grid": site.tiles, "channels": lambda: site.along(0)})


def contrast_norm(site: Site, x: State) -> State:
    """As the input if its channels are whole, else in tiles; twice half a window around, once for each of two steps."""
    module: LocalContrastNorm2d = site.module
    division = site.follow(x, {"grid": site.tiles})
    if division.is_cut(0):
        division = site.tiles()
    middle = module.kernel_size // 2

    def around(box: Box) -> Box:
        return (box[0], *((low - middle, high + middle) for low, high in box[1:]))

    def centre(box: Box) -> Any:
        return lambda x: x[..., middle : x.shape[-2] - middle, middle : x.shape[-1] - middle] - module.mean(x)

    centred = site.compute([x], division, centre, need=lambda box: [around(box)])
    return site.compute([centred, centred], division, lambda box: module.scaled, need=lambda box: [box, around(box)])
