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
        methods["step"] = torch.no_grad()(step)
        methods["step"].hooked = True  # by which torch knows that its profiler's hook is there already
    return type(kind.__name__, (kind,), methods)


def _of_torch(method: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that torch.optim has wrapped, if this is one of its own."""
    inner = inspect.unwrap(method)
    return inner if inner.__module__.startswith("torch.optim.") else None


def _nothing(self: torch.optim.Optimizer) -> None:
    return
