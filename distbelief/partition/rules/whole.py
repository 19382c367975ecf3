# SPDX-License-Identifier: Apache-2.0
"""The rule for what has none: computed as a whole, by whoever needs it."""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, final

from torch import fx, nn

from distbelief.partition.division import at
from distbelief.partition.site import Site, State


@final
class Applied(nn.Module):
    """A function, method or module without parameters, applied to arguments in which states have places."""

    def __init__(self, site: Site, inputs: Sequence[State], args: Any, kwargs: Any) -> None:
        super().__init__()
        self._target = _out_of_place(copy.deepcopy(site.module) if site.module is not None else site.call.target)
        self._places = {id(state): place for place, state in enumerate(inputs)}
        self._training, self._evaluating = (args, kwargs), site.evaluating

    def forward(self, *held: Any) -> Any:
        """The function of what this partition holds of the states."""
        args, kwargs = fx.node.map_aggregate(
            self._training if self.training else self._evaluating,
            lambda item: held[self._places[id(item)]] if isinstance(item, State) else item,
        )
        return self._target(*args, **{name: name != "inplace" and value for name, value in kwargs.items()})


def _out_of_place(target: Any) -> Callable[..., Any]:
    """The same without writing to its first argument, which may be a view of what others need."""
    if isinstance(target, str):
        method = target[:-1] if target.endswith("_") and not target.endswith("__") else target
        return lambda owner, *args, **kwargs: getattr(owner, method)(*args, **kwargs)
    if hasattr(target, "inplace"):
        target.inplace = False
    name = getattr(target, "__name__", "")
    in_place = name.startswith("i") and getattr(operator, name, None) is target
    plain: Callable[..., Any] = getattr(operator, name[1:], target) if in_place else target
    return plain  # add for iadd, but invert for invert


def states_in(arguments: Any) -> list[State]:
    """The states among nested arguments, each once, in order."""
    found: dict[int, State] = {}
    fx.node.map_aggregate(arguments, lambda item: found.setdefault(id(item), item) if isinstance(item, State) else item)
    return list(found.values())


def whole_call(site: Site, *args: Any, **kwargs: Any) -> State:
    """A call without parameters, not cut: where its inputs are if that is one partition, else by whoever needs it."""
    if site.call.random:
        raise site.impossible("draws random numbers, which partitions would draw differently")
    return as_a_whole(site, *args, **kwargs)


def as_a_whole(site: Site, *args: Any, **kwargs: Any) -> State:
    """The same for a call that is known to draw no random numbers."""
    inputs = states_in((args, kwargs, site.evaluating))
    owners = {state.division.owner for state in inputs if state.division is not None and not state.division.everywhere}
    asked = site.cut.numbers[0] if site.cut is not None and site.cut.kind == "on" else None
    if site.cut is not None and asked is None:
        raise site.impossible(f"cannot be cut by {site.cut}", hint="cut it by on(partition), or not at all")
    owner = asked if asked is not None else owners.pop() if len(owners) == 1 else None
    if site.call.value is None or owner is None:
        return site.lazily(inputs, lambda: Applied(site, inputs, args, kwargs))
    division = at(site.shape, owner, site.partitions, batched=site.value.batched)
    return site.compute(inputs, division, lambda box: Applied(site, inputs, args, kwargs))
