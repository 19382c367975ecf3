# SPDX-License-Identifier: Apache-2.0
"""Symbolic tracing for both kinds of plans. What a graph of calls would lose, or freeze, is refused by name.

the user's forward                        a graph of its calls would        here
with torch.no_grad(): y = f(x)            train f                           refused, where y then needs a gradient
with torch.autocast(...): y = f(x)        compute in full precision         refused
y = MyFunction.apply(x)                   forget its backward               one call, with its backward
y = x * self.calls                        keep the number of the first      refused, where the second differs
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from distbelief.errors import ConfigurationError

FACTORIES = ("arange", "zeros", "ones", "full", "linspace", "tensor")
"""Functions that make a tensor from numbers alone, which tracing does not see by itself."""

UNCUT = "uncut_model"
"""Under this name a model is a module of what stages trace; no user has a module of that name."""
_NO_GRAD = "no_grad"
"""The mark of a node whose call stands below torch.no_grad()."""
_OWN_MODULE = "put what does it into a module of its own, and cut the model by layers with Plan.stages"
"""Modules that stages do not look into are called as they are."""


class Tracer(fx.Tracer):
    """Follows a forward pass as it is when the trace begins: with gradients, without autocast."""

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call to the graph."""
        node = super().create_node(kind, *args, **kwargs)
        if kind.startswith("call_"):
            if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
                raise ConfigurationError(
                    f"{call_name(node)} is called below torch.autocast, which parts of the model would not know",
                    hint=_OWN_MODULE,
                )
            node.meta[_NO_GRAD] = not torch.is_grad_enabled()
        return node


def graph_of(make: Callable[[], Tracer], root: nn.Module, name: str) -> fx.Graph:
    """The calls of `root`, whose forward pass in training must be the same one when it is called again.

    `name` is that of the model in messages. Raises ConfigurationError where it is not, and what tracing raises.
    """
    held = {id(tensor): (name, tensor._version) for name, tensor in (*root.named_parameters(), *root.named_buffers())}
    with _traced(), torch.enable_grad():
        first = make().trace(root)
        again = make().trace(root) if root.training else first
    for changed, tensor in (*root.named_parameters(), *root.named_buffers()):
        if held.get(id(tensor)) != (changed, tensor._version):
            raise _changes("a call", changed.removeprefix(f"{UNCUT}."))
    differing = [
        f"{call_name(a)} with {one!r}, then with {other!r}"
        for a, b in zip(first.nodes, again.nodes, strict=False)
        for one, other in zip(_constants(a), _constants(b), strict=False)
        if one != other
    ]
    if differing or _calls(first) != _calls(again):
        what = f"calls {differing[0]}" if differing else "makes other calls"
        raise ConfigurationError(
            f"the forward pass of {name} {what} when it is done again: it counts, or draws numbers",
            hint="keep counters in buffers and draw with torch, within a module of its own that is cut in stages; or "
            "use partitions=1",
        )
    return first


def _calls(graph: fx.Graph) -> list[tuple[str, str, list[int], int]]:
    """What is called, on the results of which calls, with how many constants."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            "" if node.op == "get_attr" else str(getattr(node.target, "__qualname__", node.target)),
            [order[each] for each in node.all_input_nodes],
            len(_constants(node)),
        )
        for node in graph.nodes
    ]


def _constants(node: fx.Node) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if leaf is None or (
            isinstance(leaf, int | float | complex | str | torch.dtype | torch.device) and leaf == leaf
        ):
            found.append(leaf)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), note)  # it looks into slices, too
    return found


def _changes(call: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{call} in forward changes {what} itself, which other parts would not see", hint=_OWN_MODULE
    )


def call_name(node: fx.Node) -> str:
    """How messages name what a node calls."""
    return str(getattr(node.target, "__name__", node.target)).removeprefix(f"{UNCUT}.")


class Followed(fx.Interpreter):
    """Runs a graph on the meta device; notes what each call costs, and which earlier results it changes in place.

    `hint` is for a call that needs values.
    """

    def __init__(self, module: fx.GraphModule, hint: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self._hint = hint
        self.operations: dict[fx.Node, int] = {}
        """Floating-point operations of each call, as torch counts them: those of matrix products alone."""
        self.changed: dict[fx.Node, list[fx.Node]] = {}
        """For each call the earlier ones whose results it has changed."""
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one call.

        Raises ConfigurationError for one that needs values, or is trained where the user's forward does not.
        """
        with FlopCounterMode(display=False) as counter:
            try:
                result = super().run_node(n)
            except Exception as error:
                raise ConfigurationError(
                    f"{call_name(n)} cannot be planned without computing it: {type(error).__name__}: {error}",
                    hint=self._hint,
                ) from error
        self.operations[n] = counter.get_total_flops()
        if any(self._is_changed(node) for node in n.all_input_nodes):  # and with it what shares its memory
            self.changed[n] = [node for node in self._versions if self._is_changed(node)]
            self._versions |= {node: self.env[node]._version for node in self.changed[n]}
        if isinstance(result, torch.Tensor):
            self._versions[n] = result._version
            if n.meta.get(_NO_GRAD) and result.requires_grad:
                raise ConfigurationError(
                    f"{call_name(n)} is called below torch.no_grad(), and parts of the model would train it",
                    hint="freeze its parameters with requires_grad_(False), or detach its result",
                )
        return result

    def _is_changed(self, node: fx.Node) -> bool:
        return node in self._versions and self.env[node]._version != self._versions[node]


def check_alike(training: fx.Graph, evaluating: fx.Graph, name: str, hint: str) -> None:
    """Raise ConfigurationError unless the model of that name makes the same calls in evaluation as in training."""
    if [(node.op, node.target) for node in training.nodes] != [(node.op, node.target) for node in evaluating.nodes]:
        raise ConfigurationError(
            f"the forward pass of {name} calls other layers in evaluation than in training", hint=hint
        )


def check_changes(changed: Mapping[fx.Node, Iterable[fx.Node]], movable: Callable[[fx.Node], bool]) -> None:
    """Raise ConfigurationError for changes in place that parts of the model would not see.

    `changed` has for each call those whose results it changes; `movable` says of one whether its users may be
    elsewhere than the call that changes it.
    """
    order = {node: position for call in changed for position, node in enumerate(call.graph.nodes)}
    for call, node in ((call, node) for call, nodes in changed.items() for node in nodes):
        if node.op == "get_attr":
            raise _changes(call_name(call), call_name(node))
        later = [user for user in node.users if order[user] > order[call]]
        if movable(node) and later:
            raise ConfigurationError(
                f"{call_name(later[0])} uses a value that {call_name(call)} has overwritten in place",
                hint="use the result of the call, or compute out of place, such as x * 2 for x.mul_(2)",
            )


@contextmanager
def _traced() -> Iterator[None]:
    """Functions that make tensors from numbers, and autograd functions, are calls of the graph, too."""
    originals = {name: getattr(torch, name) for name in FACTORIES}
    apply = torch.autograd.Function.__dict__["apply"]
    for name, original in originals.items():
        setattr(torch, name, _factory(original))
    torch.autograd.Function.apply = classmethod(_apply(apply))  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        for name, original in originals.items():
            setattr(torch, name, original)


def _proxy(arguments: Any) -> fx.Proxy | None:
    return next((each for each in tree_leaves(arguments) if isinstance(each, fx.Proxy)), None)


def _factory(original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        proxy = _proxy((args, kwargs))
        if proxy is None:
            return original(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", original, args, kwargs)

    return factory


def _apply(original: Any) -> Callable[..., Any]:
    def apply(function: Any, *args: Any) -> Any:
        proxy = _proxy(args)
        if proxy is None or function.__module__.startswith(
            "torch."
        ):  # such as that of checkpoints, which calls modules
            return original.__func__(function, *args)
        return proxy.tracer.create_proxy("call_function", _applied(function), args, {})

    return apply


@functools.cache
def _applied(function: Any) -> Callable[..., Any]:
    """A function of that name: what torch itself calls `apply` would be looked for there by the name."""

    def applied(*args: Any) -> Any:
        return function.apply(*args)

    applied.__name__ = applied.__qualname__ = function.__name__
    applied.__module__ = function.__module__
    return applied
