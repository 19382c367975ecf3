# SPDX-License-Identifier: Apache-2.0
"""The calls of a forward pass, one after another, each by its rule, to steps cut into boxes."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from distbelief.errors import ConfigurationError
from distbelief.partition.division import at, everywhere
from distbelief.partition.rules import has_rule, rule_of
from distbelief.partition.site import Site, State, Step
from distbelief.partition.trace import Call, trace
from distbelief.plan import Cut

LIGHT_SHARE = 1 / 64
"""The part of a partition's work that is not worth an exchange."""


def walk(model: nn.Module, sample: torch.Tensor, partitions: int, cuts: Mapping[str, Cut]) -> list[Step]:
    """The steps of `model`, a skeleton; the first is its input, the last its output, whole on the last partition.

    Raises ConfigurationError for a model or for cuts that cannot be.
    """
    check_cuts(model, cuts, partitions)
    calls = trace(model, sample, has_rule)
    _check_uses(model, calls)
    shape, source = tuple(sample.shape[1:]), None
    steps: list[Step] = []
    states: dict[fx.Node, Any] = {}
    for call in calls:
        if call.kind == "placeholder":
            if source is None:
                source = _source(steps, call, shape, partitions)
                states[call.node] = source
            else:
                states[call.node] = call.args[0]
            continue
        assert source is not None
        args, kwargs, evaluating = fx.node.map_arg((call.args, call.kwargs, call.evaluating), states.__getitem__)
        module = model.get_submodule(call.target) if call.kind == "call_module" else None
        light = _is_light(call, module, calls, model, partitions)
        site = Site(call, module, _cut_of(call, cuts), light, partitions, evaluating, source, steps)
        if call.kind == "get_attr":
            states[call.node] = site.attribute(model)
        elif call.kind == "output":
            _output(site, args[0])
        else:
            if module is not None and has_rule(module):  # rules take arguments as the layer's forward does
                bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
                args, kwargs = bound.args[1:], bound.kwargs
            states[call.node] = rule_of(site)(site, *args, **kwargs)
    return steps


def _is_light(call: Call, module: nn.Module | None, calls: Sequence[Call], model: nn.Module, partitions: int) -> bool:
    """Whether one partition alone can do the call, and hold what it holds, without the others waiting long for it."""
    work, held = sum(each.operations for each in calls), _elements(model)
    share = LIGHT_SHARE / partitions
    return call.operations < work * share and (module is None or _elements(module) < held * share)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _source(steps: list[Step], call: Call, shape: tuple[int, ...], partitions: int) -> State:
    division = everywhere(shape, partitions)
    steps.append(Step("input", (), division, False, lambda box: [], lambda box: tuple, lambda box: {}, "", 0.0))
    assert call.value is not None
    return State(0, division, call.value.dtype)


def _output(site: Site, result: Any) -> None:
    if not isinstance(result, State) or site.call.value is None or not site.value.batched:
        kind = (
            "something that is no tensor with the batch in front"
            if isinstance(result, State)
            else type(result).__name__
        )
        raise ConfigurationError(
            f"the model returns {kind}; a model cut by units returns one tensor, shape (batch, ...)",
            hint="let forward return one tensor, or cut the model by layers with Plan.stages",
        )
    site.compute([result], at(site.shape, site.last, site.partitions), lambda box: lambda held: held)


def _cut_of(call: Call, cuts: Mapping[str, Cut]) -> Cut | None:
    """The cut asked for the layer; else `on` for the nearest module around it."""
    if call.kind != "call_module":
        return None
    name = str(call.target)
    if name in cuts:
        return cuts[name]
    around = [name[:end] for end in range(len(name)) if name[end] == "."]
    return next((cuts[outer] for outer in reversed(around) if outer in cuts), None)


def check_cuts(model: nn.Module, cuts: Mapping[str, Cut], partitions: int) -> None:
    """Raise ConfigurationError for a module that is not there, and for a partition that is not."""
    modules = dict(model.named_modules())
    for name, cut in cuts.items():
        if name not in modules or not name:
            close = difflib.get_close_matches(name, list(modules), 3) or [known for known in modules if known][:3]
            raise ConfigurationError(
                f"the plan cuts {name!r}, but {type(model).__name__} has no module of that name",
                hint=f"did you mean {' or '.join(map(repr, close))}?",
            )
        if cut.kind == "on" and not 0 <= cut.numbers[0] < partitions:
            raise ConfigurationError(
                f"the plan puts {name!r} {cut}, but the partitions are 0 to {partitions - 1}",
                hint=f"use on(0) to on({partitions - 1}), or more partitions",
            )
        if cut.kind != "on" and not has_rule(modules[name]) and any(True for _ in modules[name].children()):
            raise ConfigurationError(
                f"the plan cuts {name!r} by {cut}, but it is a {type(modules[name]).__name__} of several layers",
                hint="cut its layers by their own names, or put it on(partition) as a whole",
            )


def _check_uses(model: nn.Module, calls: Sequence[Call]) -> None:
    """Raise ConfigurationError for parameters used in two places."""
    names: dict[int, str] = {}
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            if names.setdefault(id(tensor), name) != name:
                raise ConfigurationError(
                    f"{kind}s {names[id(tensor)]} and {name} are one: tied {kind}s cannot be cut by units",
                    hint=f"give each layer its own {kind}, or cut the model by layers with Plan.stages",
                )
    owners: dict[str, str] = {}
    for call in calls:
        if call.kind in ("call_module", "get_attr"):
            _claim(model, call, owners)


def _claim(model: nn.Module, call: Call, owners: dict[str, str]) -> None:
    target = str(call.target)
    if call.kind == "get_attr":
        used = [target] if target in dict(model.named_parameters()) else []
    else:
        module = model.get_submodule(target)
        used = [f"{target}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in used:
        if name in owners:
            twice = (
                f"module {target} is called twice" if call.kind == "call_module" else f"parameter {name} is used twice"
            )
            raise ConfigurationError(
                f"{twice} in the forward pass; partitions hold one part of a parameter, for one use of it",
                hint="give each call a layer of its own, or cut the model by layers with Plan.stages",
            )
        owners[name] = call.node.name
