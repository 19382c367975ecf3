# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a model as a row of steps: what each uses, and what passes from one to the next.

Modules are steps as they are; nn.Sequential is looked into, and so are the modules that the caller opens. The pass is
traced twice, for training and for evaluation, since a trace bakes `self.training` in. What does not depend on the input
(a parameter, a mask made from a buffer) is no step: whoever needs it computes it for himself.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from distbelief.errors import ConfigurationError
from distbelief.partition.balance import Measure, measure
from distbelief.partition.trace import MODES_HINT, check_hooks, check_modes
from distbelief.partition.tracer import UNCUT, Tracer, check_alike, check_changes, graph_of

_PREFIX = f"{UNCUT}."


class Called(nn.Module):
    """A model called with one argument and the defaults of the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uncut_model = model

    def forward(self, x: Any) -> Any:
        """The output for a mini-batch."""
        return self.uncut_model(x)


def name_of(target: Any) -> str:
    """The name in the model of what `Called` has under this name."""
    return str(target).removeprefix(_PREFIX)


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A traced forward pass; its nodes are those of the training graph."""

    called: Called
    """The model it was traced with, on the meta device."""
    training: fx.Graph
    twins: dict[fx.Node, fx.Node]
    """For each node the same call in evaluation."""
    measures: dict[fx.Node, Measure]

    @cached_property
    def input(self) -> fx.Node:
        """The mini-batch."""
        first: fx.Node = next(node for node in self.training.nodes if node.op == "placeholder")
        return first

    @cached_property
    def output(self) -> fx.Node:
        """What the model returns."""
        last: fx.Node = next(node for node in self.training.nodes if node.op == "output")
        return last

    @cached_property
    def steps(self) -> tuple[fx.Node, ...]:
        """The calls that depend on the input, in order."""
        depend = {self.input}
        for node in self.training.nodes:
            if depend.intersection(node.all_input_nodes):
                depend.add(node)
        return tuple(node for node in self.training.nodes if node in depend and node not in (self.input, self.output))

    @cached_property
    def _position(self) -> dict[fx.Node, int]:
        return {node: index for index, node in enumerate((self.input, *self.steps, self.output), start=-1)}

    def passing(self, position: int) -> list[fx.Node]:
        """What steps from `position` on need of those before it, the input included."""
        return [
            node
            for node in (self.input, *self.steps[:position])
            if any(self._position[user] >= position for user in node.users if user in self._position)
        ]

    def tensors(self, step: fx.Node) -> dict[str, Tensor]:
        """The model's tensors that a step uses, by their names there."""
        found: dict[str, Tensor] = {}
        if step.op == "call_module":
            module = self.called.get_submodule(str(step.target))
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                found[name_of(f"{step.target}.{name}")] = tensor
        for node in step.all_input_nodes:
            if node.op == "get_attr":
                owner, _, attribute = str(node.target).rpartition(".")
                found[name_of(node.target)] = getattr(self.called.get_submodule(owner), attribute)
            elif node not in self._position:
                found |= self.tensors(node)
        return found

    def place(self, step: fx.Node) -> list[str]:
        """The names of the modules that a step belongs to, the outermost first, and its own when it is a module."""
        names = [*step.meta.get("nn_module_stack", {}), *([step.target] if step.op == "call_module" else [])]
        return list(dict.fromkeys(name_of(name) for name in names if name not in ("", UNCUT)))

    def label(self, node: fx.Node) -> str:
        """How messages name a value: by what it comes from."""
        if node is self.input:
            return "the input of the model"
        what = name_of(node.target) if node.op == "call_module" else getattr(node.target, "__name__", node.target)
        where = self.place(node)
        return f"the output of {what}" + (f" in {where[-1]}" if where and node.op != "call_module" else "")

    def closed(self) -> list[tuple[str, float]]:
        """The user's own modules that are steps, and what they cost, the dearest first."""
        own = [
            (name_of(step.target), cost(self.measures[step]))
            for step in self.steps
            if step.op == "call_module"
            and not type(self.called.get_submodule(str(step.target))).__module__.startswith("torch.nn")
        ]
        return sorted(own, key=lambda each: -each[1])


def cost(measure: Measure) -> float:
    """What a call costs: its operations, and an operation for each element that it writes."""
    return float(measure.operations + measure.elements)


def follow(model: nn.Module, sample: Tensor, opened: Collection[str] = ()) -> ForwardPass:
    """Trace `model`, which is on the meta device, for a meta mini-batch, looking into the modules `opened`.

    Raises ConfigurationError when its forward pass cannot be followed, or is another one in evaluation.
    """
    called, tracer = Called(model), _Tracer(opened)
    leaves = [name_of(name) for name, each in called.named_modules() if name and tracer.is_leaf_module(each, name)]
    check_hooks(model, leaves, "put what they do into forward, or use partitions=1", called=True)
    check_modes(model, leaves, MODES_HINT)
    training, evaluating = (_trace(called.train(mode), opened) for mode in (True, False))
    check_alike(training, evaluating, type(model).__name__, "put what differs into a module of its own")
    measures = measure(fx.GraphModule(called.train(), training), sample)
    passed = ForwardPass(called, training, dict(zip(training.nodes, evaluating.nodes, strict=True)), measures)
    # Steps are done once, in order; what does not depend on the input is computed anew by whoever needs it.
    once = {passed.input, *passed.steps}
    check_changes({call: each.changed for call, each in measures.items()}, lambda node: node not in once)
    return passed


class _Tracer(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opened: Iterable[str]) -> None:
        super().__init__()
        self._opened = {UNCUT, *(_PREFIX + name for name in opened)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is not nn.Sequential.forward and module_qualified_name not in self._opened


def _trace(called: Called, opened: Iterable[str]) -> fx.Graph:
    name = type(called.uncut_model).__name__
    try:
        graph = graph_of(lambda: _Tracer(opened), called, name)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the user's code meets when its values are none
        raise ConfigurationError(
            f"the forward pass of {name} cannot be followed: {type(error).__name__}: {error}",
            hint="let it depend on no values of its input, or put what does into a module of its own",
        ) from error
    made = [node for node in graph.nodes if node.op == "get_attr" and str(node.target).startswith("_tensor_constant")]
    if made:
        raise ConfigurationError(
            f"the forward pass of {name} computes with a tensor that is neither a parameter nor a buffer",
            hint="make it in the constructor and register it with register_buffer(name, tensor, persistent=False)",
        )
    return graph
