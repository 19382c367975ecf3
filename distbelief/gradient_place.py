# SPDX-License-Identifier: Apache-2.0
"""Backward writes the gradient of a large linear layer's weight where the replica accrues it.

    ordinary     backward makes dL/dW in new memory    ->  the hook copies it into the flat gradient
    in place     backward makes dL/dW in the flat gradient itself

The numbers are the same, bit for bit, and so is what autograd sees: the place is what it takes as the gradient. Where
somebody else might keep or change that gradient, the ordinary way is taken.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch
from torch import nn

LARGE_NUMBERS = 1 << 19
"""Weights from here on are written in place. For smaller ones the copy costs less than what this takes in Python."""

Place = Callable[[], torch.Tensor | None]
"""A new view, in the parameter's shape, of the place for its gradient; None when that holds something already."""


@final
class Places:
    """Where the gradients of some parameters are wanted. Copies of a module that holds this have no such place."""

    def __init__(self, places: Mapping[nn.Parameter, Place] | None = None) -> None:
        self._places = {id(parameter): (parameter, place) for parameter, place in (places or {}).items()}

    def of(self, tensor: torch.Tensor) -> Place | None:
        """The place for the gradient of exactly this parameter, if there is one."""
        return self._places.get(id(tensor), (None, None))[1]

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def write_in_place(module: nn.Module, places: Mapping[nn.Parameter, Place]) -> None:
    """From now on linear layers of `module` with large weights among `places` have their gradients written there.

    Only nn.Linear itself is meant: what derives from it may compute something else.
    """
    held = Places({parameter: place for parameter, place in places.items() if parameter.numel() >= LARGE_NUMBERS})
    for layer in module.modules():
        if type(layer) is nn.Linear and held.of(layer.weight) is not None:
            layer.__class__ = PlacingLinear
            layer.places = held  # type: ignore[assignment]


class PlacingLinear(nn.Linear):
    """An nn.Linear that knows where the gradient of its weight is wanted."""

    places: Places

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear, shapes (..., in_features) to (..., out_features)."""
        place = self.places.of(self.weight)
        if place is None or not _ordinary_backward(input, self.weight):
            return super().forward(input)
        output: torch.Tensor = _Linear.apply(input, self.weight, self.bias, place)  # type: ignore[no-untyped-call]
        return output


def _ordinary_backward(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the call is recorded as it stands, in the weight's own type, and no hook sees the weight's gradient."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and input.dtype == weight.dtype
        and not weight._backward_hooks
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Linear(torch.autograd.Function):
    """What nn.functional.linear computes, forward and backward, in the same order."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, place: Place
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight)
        ctx.place = place
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        outer = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = input.reshape(-1, input.shape[-1])
        place = ctx.place() if of_weight and _accumulates(ctx.next_functions[1][0]) else None
        return (
            outer.mm(weight).view(input.shape) if of_input else None,
            (outer.t().mm(rows) if place is None else torch.mm(outer.t(), rows, out=place)) if of_weight else None,
            outer.sum(0) if of_bias else None,
            None,
        )


def _accumulates(leaf: Any) -> bool:
    """Whether the pass under way adds to `.grad` of this leaf, once and for all.

    torch.autograd.grad hands gradients to its caller, who may keep them, and with create_graph they have a history.
    """
    if torch.is_grad_enabled():
        return False
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # what torch says of a leaf in torch.autograd.grad
        return False
