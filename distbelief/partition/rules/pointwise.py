# SPDX-License-Identifier: Apache-2.0
"""Rules for what is computed unit by unit: activations, sums and products of layers, dropout."""

import operator
from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from distbelief.partition.box import Box, Range, inside
from distbelief.partition.rules.whole import Applied, states_in, whole_call
from distbelief.partition.share import Draws
from distbelief.partition.site import Site, State, tensor

MODULES: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

_NAMES = (
    "abs", "add", "clamp", "clip", "cos", "div", "divide", "eq", "erf", "exp", "expm1", "ge", "gt", "le", "log",
    "log1p", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "multiply",
    "ne", "neg", "negative", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "sign", "sin", "sqrt", "square",
    "sub", "subtract", "tanh", "true_divide", "where",
)  # fmt: skip
_ACTIVATIONS = (
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
    "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
)  # fmt: skip
_OPERATORS = (
    "abs", "add", "and_", "eq", "ge", "gt", "iadd", "imul", "invert", "isub", "itruediv", "le", "lt", "mul", "ne",
    "neg", "or_", "pow", "sub", "truediv",
)  # fmt: skip
_CONVERSIONS = ("bool", "clone", "contiguous", "detach", "double", "float", "to", "type_as")

FUNCTIONS: tuple[Callable[..., Any] | str, ...] = (
    *(getattr(torch, name) for name in _NAMES),
    *(getattr(functional, name) for name in _ACTIVATIONS),
    *(getattr(operator, name) for name in _OPERATORS),
    *_NAMES, *(f"{name}_" for name in _NAMES), *_CONVERSIONS,
)  # fmt: skip
"""Functions, and methods by their names, that compute each unit of the result from one unit of each operand."""


def pointwise(site: Site, *args: Any, **kwargs: Any) -> State:
    """As the first cut operand of the result's shape; the others are brought there, as few as broadcast to it."""
    inputs = states_in((args, kwargs, site.evaluating))
    value = site.call.value
    leaders = [
        state.division
        for state in inputs
        if value is not None
        and state.division is not None
        and (state.division.shape, state.division.batched) == (value.shape, value.batched)
    ]
    cut_ones = [division for division in leaders if not division.everywhere or site.partitions == 1]
    if value is None or not cut_ones or site.cut is not None:
        return whole_call(site, *args, **kwargs)
    return site.compute(
        inputs, cut_ones[0], lambda box: Applied(site, inputs, args, kwargs),
        need=lambda box: [seen(box, value.batched, state) for state in inputs],
    )  # fmt: skip


def seen(box: Box, batched: bool, operand: State) -> Box | None:
    """The box of an operand that broadcasts to a box of a result, `batched` or not; None for what is no tensor."""
    if operand.division is None:
        return None
    # Dimensions are matched from the last one on, the batch among them, where a parameter has length 1.
    ranges: list[Range] = [(0, 1)] * batched + list(box)
    shape = (1,) * operand.division.batched + operand.division.shape
    matched = ranges[len(ranges) - len(shape) :]
    matching = [side if length != 1 else (0, 1) for side, length in zip(matched, shape, strict=True)]
    return tuple(matching[operand.division.batched :])


@final
class CutDropout(nn.Module):
    """Dropout of a box of a layer. The mask is drawn for the whole layer, so that it does not depend on the cut."""

    draws: Draws | None = None
    """Set by the share that this belongs to."""

    def __init__(self, rates: tuple[float, float], shape: tuple[int, ...], box: Box, layer: int) -> None:
        """`rates` of dropping in training and in evaluation; `shape` of the layer's mask."""
        super().__init__()
        self.rates, self.shape, self.layer = rates, shape, layer
        self._part = (slice(None), *inside(box, tuple((0, 0) for _ in box)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop units of `x`, and scale the others up."""
        rate = self.rates[0] if self.training else self.rates[1]
        if rate == 0:
            return x
        assert self.draws is not None
        generator = self.draws.generator(self.layer, x.device)
        drawn = torch.rand((x.shape[0], *self.shape), generator=generator, device=x.device)
        kept = drawn[self._part] >= rate
        return x * kept * (1 / (1 - rate) if rate < 1 else 0.0)


def dropout_module(site: Site, x: State) -> State:
    """nn.Dropout, and the variants that drop whole channels."""
    return _dropout(site, x, (site.module.p, 0.0), by_channel=not isinstance(site.module, nn.Dropout))


def dropout_function(site: Site, input: State, p: float = 0.5, training: bool = True, inplace: bool = False) -> State:
    """functional.dropout, whose `training` is self.training as a rule."""
    args, kwargs = site.evaluating
    evaluating = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    rates = tuple(
        given.get("p", 0.5) if given.get("training", True) else 0.0
        for given in ({"p": p, "training": training}, evaluating)
    )
    return _dropout(site, input, (rates[0], rates[1]), by_channel=False)


def _dropout(site: Site, x: State, rates: tuple[float, float], *, by_channel: bool) -> State:
    division, layer = tensor(x) if site.cut is None else site.follow(x, {}), len(site.steps)
    shape = (division.shape[0], *[1] * (len(division.shape) - 1)) if by_channel else division.shape

    def build(box: Box) -> nn.Module:
        return CutDropout(rates, shape, (box[0], *[(0, 1)] * (len(box) - 1)) if by_channel else box, layer)

    if division.everywhere and site.partitions > 1:
        return site.lazily([x], lambda: build(division.boxes[0] or ()))
    return site.compute([x], division, build, need=lambda box: [box])
