# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a model as a list of calls, and what each of them yields, found without computing anything.

The pass is traced symbolically twice, for training and for evaluation, since a trace bakes `self.training` in; then run
on meta tensors with two sizes of mini-batch, which tells where the batch is. Tracing patches nn.Module for the whole
process: trace before any thread runs a forward.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distbelief.errors import ConfigurationError
from distbelief.partition.tracer import Followed, Tracer, call_name, check_alike, check_changes, graph_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STAGES_HINT = "register a rule for the layer with register_rule, or cut the model by layers with Plan.stages"
"""The two ways out where a model cannot be cut by units."""
MODES_HINT = "let a class of its own, derived from the layer's, have the method; or use partitions=1"


@dataclass(frozen=True)
class Value:
    """What a call yields, known before anything is computed."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: torch.dtype
    batched: bool


@dataclass(frozen=True)
class Call:
    """One call of the forward pass. Arguments hold fx nodes where results of earlier calls go."""

    node: fx.Node
    kind: str
    """placeholder, call_module, call_function, call_method, get_attr or output, as fx says."""
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    evaluating: tuple[tuple[Any, ...], dict[str, Any]]
    """The same arguments in evaluation."""
    value: Value | None
    """None for what is not a tensor, or not one with the batch in front."""
    operations: int
    """Floating-point operations of the uncut call per example."""
    random: bool
    """Whether it draws random numbers in training."""

    @property
    def name(self) -> str:
        """How messages name the call."""
        return call_name(self.node)


def check_hooks(model: nn.Module, leaves: Collection[str], hint: str, *, called: bool) -> None:
    """Raise ConfigurationError for hooks that nobody would call.

    Those of `leaves` and of what is below are called where the leaves are `called` as they are; of what a trace looks
    into, forward hooks become a part of it.
    """
    for name, module in model.named_modules():
        in_leaf = any(name == each or name.startswith(f"{each}.") for each in leaves)
        lost = () if in_leaf and called else HOOKS if in_leaf or not (name or called) else HOOKS[2:]
        kinds = [kind for kind in lost if getattr(module, kind)]
        of = f"module {name}" if name else "the model itself"
        if lost == HOOKS and "forward" in vars(module):
            raise ConfigurationError(f"{of} has a forward of its own, which its parts would not call", hint=hint)
        if kinds:
            raise ConfigurationError(
                f"{of} has {kinds[0].strip('_').replace('_', ' ')}, which its parts would not call", hint=hint
            )


def check_modes(model: nn.Module, leaves: Collection[str], hint: str) -> None:
    """Raise ConfigurationError where a `train` of the model's own leaves a leaf in another mode than parts would."""
    outer = [leaf for leaf in leaves if not any(leaf.startswith(f"{each}.") for each in leaves)]
    for mode in (False, True):
        given = {name: module.training for name, module in model.train(mode).named_modules()}
        for leaf in outer:
            model.get_submodule(leaf).train(mode)
        for name, module in model.named_modules():
            if module.training != given[name]:
                raise ConfigurationError(
                    f"train({mode}) leaves module {name} in {'training' if given[name] else 'evaluation'}, by a method "
                    "of a module around it, which its parts would not call",
                    hint=hint,
                )


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device; nothing of its parameters is copied."""
    known = {id(tensor): _hollow(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, known)


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    hollow = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow


def trace(model: nn.Module, sample: torch.Tensor, is_leaf: Callable[[nn.Module], bool]) -> list[Call]:
    """The calls of the forward pass of `model`, a skeleton, on one mini-batch like `sample`, batch first.

    Raises ConfigurationError for a forward pass that depends on values, or that is another one in evaluation.
    """
    hint = "put what they do into a module of its own, or cut the model by layers with Plan.stages"
    leaves = [name for name, each in model.named_modules() if name and _Tracer(is_leaf).is_leaf_module(each, name)]
    check_hooks(model, leaves, hint, called=False)
    check_modes(model, leaves, MODES_HINT)
    training, evaluating = (_symbolic(model.train(mode), is_leaf) for mode in (True, False))
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in training.nodes):
        raise ConfigurationError(
            f"the forward pass of {type(model).__name__} computes with a tensor of its own, or one made of a buffer",
            hint="make it in the constructor and register it as a buffer, or cut the model by layers with Plan.stages",
        )
    check_alike(training, evaluating, type(model).__name__, STAGES_HINT)
    twins = dict(zip(evaluating.nodes, training.nodes, strict=True))
    size = max(2, sample.shape[0])
    facts = [_Facts(fx.GraphModule(model.train(), training)) for _ in range(2)]
    for run, batch in zip(facts, (size, size + 1), strict=True):
        example = torch.empty((batch, *sample.shape[1:]), dtype=sample.dtype, device="meta")
        with torch.device("meta"), torch.enable_grad():
            run.run(example)
    check_changes(facts[0].changed, lambda node: True)
    calls = []
    for twin, node in twins.items():
        arguments = fx.node.map_arg((twin.args, twin.kwargs), twins.__getitem__)
        one, two = (run.found[node] for run in facts)
        value = _value(one.result, two.result, size)
        target, evaluation = node.target, (arguments[0], dict(arguments[1]))
        calls.append(
            Call(
                node,
                node.op,
                target,
                node.args,
                dict(node.kwargs),
                evaluation,
                value,
                facts[0].operations[node] // size,
                one.random,
            )
        )
    return calls


def _value(one: Any, two: Any, size: int) -> Value | None:
    if not isinstance(one, torch.Tensor):
        return None
    if one.shape == two.shape:
        return Value(tuple(one.shape), one.dtype, batched=False)
    if one.dim() and one.shape[0] == size and two.shape == (size + 1, *one.shape[1:]):
        return Value(tuple(one.shape[1:]), one.dtype, batched=True)
    return None


class _Tracer(Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _symbolic(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    name = type(model).__name__
    try:
        return graph_of(lambda: _Tracer(is_leaf), model, name)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigurationError(
            f"the forward pass of {name} cannot be followed by units: {type(error).__name__}: {error}",
            hint="let it depend on no values of its input, or cut the model by layers with Plan.stages",
        ) from error


@dataclass
class _Fact:
    result: Any
    random: bool


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation that draws random numbers was among those called."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Facts(Followed):
    """Runs the graph on meta tensors and notes what each node yields."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, f"give a sample like the model's mini-batches; or {STAGES_HINT}")
        self.found: dict[fx.Node, _Fact] = {}

    def run_node(self, n: fx.Node) -> Any:
        draws = _Draws()  # type: ignore[no-untyped-call]
        with draws:
            result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            result = result.to("meta")
        self.found[n] = _Fact(result, draws.found)
        return result
