# SPDX-License-Identifier: Apache-2.0
"""Optimizers without what torch wraps around their methods for its compiler and its profiler.

Made or stepped for the first time, each of torch's optimizers imports the compiler: 1.5 s of processor time in every
command and every process that roles are forked from, and memory in all of them. And some ask in each step whether CUDA
records a graph; on a machine with an accelerator that makes a context on it in every shard, and in the process that
roles are forked from, after which none can use it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_ASKS_ACCELERATOR = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
"""Methods of torch's optimizers, in torch 2.11 and later, and before."""


@functools.cache
def bare(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of an optimizer that does the same and no more; what a user's own class defines stays as it is."""
    methods: dict[str, Any] = {name: _nothing for name in _ASKS_ACCELERATOR if hasattr(kind, name)}
    if (add := _of_torch(kind.add_param_group)) is not None:
        methods["add_param_group"] = add
    if (step := _of_torch(kind.step)) is not None:
        plain = torch.no_grad()(step)
        methods["step"] = _adagrad_step(plain) if kind is torch.optim.Adagrad else plain
        methods["step"].hooked = True  # by which torch knows that its profiler's hook is there already
    return type(kind.__name__, (kind,), methods)


def _of_torch(method: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that torch.optim has wrapped, if this is one of its own."""
    inner = inspect.unwrap(method)
    return inner if inner.__module__.startswith("torch.optim.") else None


def _adagrad_step(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    """The step of torch.optim.Adagrad, or where it is fused what that does in the end, in a third of the time.

    For every push torch would ask anew of what dtype the tensors are and where they lie.
    """

    def step(self: torch.optim.Optimizer) -> None:
        if not self.defaults["fused"]:
            plain(self)
            return
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            for state in states:
                state["step"].add_(1)
            torch._fused_adagrad_(
                [parameter.data for parameter in parameters], [parameter.grad for parameter in parameters],
                [state["sum"] for state in states], [state["step"] for state in states],
                lr=group["lr"], lr_decay=group["lr_decay"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=group["maximize"],
            )  # fmt: skip

    return step


def _nothing(self: torch.optim.Optimizer) -> None:
    return
