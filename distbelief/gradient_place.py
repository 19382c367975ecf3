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
from torch.autograd import forward_ad

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
        place = None if torch.compiler.is_compiling() else self.places.of(self.weight)
        if place is None or not _is_plain(input, self.weight):
            return super().forward(input)
        output: torch.Tensor = _Linear.apply(input, self.weight, self.bias, place)  # type: ignore[no-untyped-call]
        return output


def _is_plain(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the call is an ordinary one of ordinary tensors in the weight's own type, recorded for backward."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and type(input) in (torch.Tensor, nn.Parameter)
        and input.layout is torch.strided
        and not input.is_nested
        and input.dtype == weight.dtype
        and not torch.is_autocast_enabled(input.device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


class _Linear(torch.autograd.Function):
    """What nn.functional.linear computes, forward and backward, in the same order."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, place: Place
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None)
        ctx.place = place
        output = nn.functional.linear(input, weight, bias)
        # Autograd forbids to change a view that a Function returns, which nn.ReLU(inplace=True) does.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        outer = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = input.reshape(-1, input.shape[-1])
        return (
            outer.mm(weight).view(input.shape) if ctx.needs_input_grad[0] else None,
            _of_weight(ctx.next_functions[1][0], outer.t(), rows, ctx.place),
            outer.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


def _of_weight(leaf: Any, outer: torch.Tensor, rows: torch.Tensor, place: Place) -> torch.Tensor | None:
    """The gradient of the weight, in its place where this pass adds it to `.grad`, and nobody looks at it before.

    `leaf` is the node of the graph that does so. None where this pass has no use for it.
    """
    try:
        if not torch._C._will_engine_execute_node(leaf):
            return None
        kept = torch.is_grad_enabled()  # create_graph: it has a history
    except RuntimeError:  # what torch says of a leaf whose gradient torch.autograd.grad hands to its caller
        kept = True
    watched = leaf.variable._backward_hooks or len(leaf.variable._post_accumulate_grad_hooks or ()) > 1
    own = None if kept or watched else place()
    return outer.mm(rows) if own is None else torch.mm(outer, rows, out=own)
