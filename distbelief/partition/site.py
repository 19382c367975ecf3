# SPDX-License-Identifier: Apache-2.0
"""What a rule is asked and what it answers: one call of the forward pass, cut into steps.

A rule is a function of a `Site` and the call's arguments, in which states stand for results of earlier calls. It
chooses a division for the result, says which boxes of the inputs and of the parameters a box of it takes, and how to
build the layer that computes that box:

    def linear(site: Site, x: State) -> State:
        division = site.choose(x, {"rows": lambda cut: site.along(-1)}, units=site.module.out_features)
        return site.compute([x], division, build=lambda box: nn.Linear(...), pieces=lambda box: {"weight": ...})

Everything else (who sends what to whom, what is exchanged only once, memory, counting) follows from these answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from distbelief.errors import ConfigurationError
from distbelief.partition.box import Box, near_square, sizes, whole
from distbelief.partition.division import Division, along, at, everywhere, in_tiles
from distbelief.partition.trace import STAGES_HINT, Call, Value
from distbelief.plan import Cut, CutName

Part = tuple[Box, tuple[int, ...]]
"""A box of a parameter or buffer, and the full shape it is a box of: the parameter's own, or a view of it."""

Layer = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class State:
    """What a step yields."""

    step: int
    division: Division | None
    """None for what is no tensor, or has no batch in front: whoever needs it makes it."""
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Step:
    """A layer, or a part of one, that partitions compute box by box."""

    name: str
    inputs: tuple[State, ...]
    division: Division | None
    lazy: bool
    """Computed as a whole by whoever needs it; otherwise each partition computes its box."""
    need: Callable[[Box], Sequence[Box | None]]
    """The boxes of the inputs that a box of the result takes."""
    build: Callable[[Box | None], Layer]
    """The layer that computes a box; made under the meta device, its parameters and buffers are then put in."""
    pieces: Callable[[Box], Mapping[str, Part]]
    """What the layer of a box holds of the uncut module's parameters and buffers, by their names in the layer."""
    within: str
    """What stands before those names in the uncut model."""
    fill: float
    """The padding where a need reaches outside an input."""
    operations: int = 0
    """Of a lazy step, per example."""


def tensor(state: State | Step) -> Division:
    """The division of a state that a rule takes for granted."""
    assert state.division is not None
    return state.division


@dataclass(frozen=True, eq=False)
class Site:
    """One call of the forward pass, as its rule sees it."""

    call: Call
    module: Any
    """The called module of the uncut model, on the meta device; None for a function."""
    cut: Cut | None
    """What the user asked for it."""
    light: bool
    """Whether it is next to nothing of a partition's work, and of its parameters."""
    partitions: int
    evaluating: Any
    """Arguments and keyword arguments of the call in evaluation, where they may differ."""
    source: State
    """The model's input, which everybody has."""
    steps: list[Step]

    @property
    def last(self) -> int:
        """The partition on which the model's output is wanted, and what nobody else is to have is put."""
        return self.partitions - 1

    @property
    def value(self) -> Value:
        """The result: shape without batch, dtype. For rules whose results are tensors."""
        if self.call.value is None:
            raise self.impossible("yields no tensor with the batch in front")
        return self.call.value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, without the batch."""
        return self.value.shape

    def impossible(self, problem: str, hint: str = STAGES_HINT) -> ConfigurationError:
        """The error that names this layer."""
        kind = f" ({type(self.module).__name__})" if self.module is not None else ""
        return ConfigurationError(f"layer {self.call.name}{kind} {problem}", hint=hint)

    def yielding(self, value: Value) -> "Site":
        """The same site where the call's result is not one tensor, but what the rule is about is."""
        return replace(self, call=replace(self.call, value=value))

    # divisions

    def choose(self, x: State, ways: Mapping[CutName, Callable[[], Division]], units: int) -> Division:
        """The division asked for, else the first of `ways`; a layer of fewer than 4K `units` stays on one partition."""
        cut = self.cut
        if cut is None:
            if units >= 4 * self.partitions:
                return next(iter(ways.values()))()
            owner = None if x.division is None else x.division.owner
            return at(self.shape, self.last if owner is None else owner, self.partitions, batched=self.value.batched)
        if cut.kind == "on":
            return at(self.shape, cut.numbers[0], self.partitions, batched=self.value.batched)
        if cut.kind not in ways:
            able = ", ".join([*(f"{way}(...)" if way == "grid" else f"{way}()" for way in ways), "on(partition)"])
            raise self.impossible(f"cannot be cut by {cut}", hint=f"cut it by one of {able}")
        if cut.kind == "grid":
            self._check_grid(cut.numbers)
        division = ways[cut.kind]()
        idle = sum(box is None for box in division.boxes)
        if idle:
            raise self.impossible(
                f"has too few units for {cut}: {idle} of {self.partitions} partitions would have none",
                hint=f"use on(partition) for it, or at most {self.partitions - idle} partitions",
            )
        return division

    def _check_grid(self, numbers: tuple[int, ...]) -> None:
        rows, columns = numbers
        if min(numbers) < 1 or rows * columns != self.partitions:
            best = near_square(self.partitions)
            raise self.impossible(
                f"cannot be cut by grid({rows}, {columns}): {rows * columns} tiles for {self.partitions} partitions",
                hint=f"use for example grid({best[0]}, {best[1]})",
            )

    def follow(self, x: State, ways: Mapping[CutName, Callable[[], Division]]) -> Division:
        """The division asked for, else that of the input; the first of `ways` where everybody has the input."""
        division = tensor(x)
        if self.cut is not None:
            return self.choose(x, ways, 0)
        if division.everywhere and self.partitions > 1:
            return next(iter(ways.values()))()
        return division.carried(self.shape)

    def along(self, dimension: int, unit: int = 1) -> Division:
        """The result cut along one dimension into whole units."""
        return along(self.shape, dimension, self.partitions, unit=unit, batched=self.value.batched)

    def tiles(self) -> Division:
        """The result cut over its plane, by the grid asked for or a nearly square one."""
        asked = self.cut is not None and self.cut.kind == "grid"
        parts = self.cut.numbers if self.cut is not None and asked else near_square(self.partitions)
        return in_tiles(self.shape, (*[1] * (len(self.shape) - 2), *parts), self.partitions)

    # steps

    def compute(
        self, inputs: Sequence[State], division: Division, build: Callable[[Box], Layer], *,
        need: Callable[[Box], Sequence[Box | None]] | None = None,
        pieces: Callable[[Box], Mapping[str, Part]] | None = None, within: str = "", fill: float = 0.0,
    ) -> State:  # fmt: skip
        """A step that each partition does for its box of `division`. Without `need` it takes the inputs whole."""
        everything = [None if state.division is None else whole(state.division.shape) for state in inputs]
        return self._add(
            Step(
                self.call.name, tuple(inputs), division, False, need or (lambda box: everything),
                build,  # type: ignore[arg-type]
                pieces or (lambda box: {}), f"{self.call.name}.{within}", fill,
            ),
            self.value.dtype,
        )  # fmt: skip

    def lazily(self, inputs: Sequence[State], build: Callable[[], Layer]) -> State:
        """A step without parameters that whoever needs its result does as a whole, on whole inputs.

        Where several do, each gets its part of the gradient, and the exchange of the inputs adds the parts up.
        """
        value = self.call.value
        division = None
        if value is not None:
            box = whole(value.shape)
            division = Division(value.shape, (box,) * self.partitions, value.batched)
        step = Step(
            self.call.name, tuple(inputs), division, True, lambda box: [], lambda box: build(), lambda box: {}, "", 0.0,
            self.call.operations,
        )  # fmt: skip
        return self._add(step, value.dtype if value is not None else torch.float32)

    def attribute(self, model: nn.Module) -> State:
        """The step that holds a parameter, buffer or constant which the forward pass uses by itself."""
        path, _, local = str(self.call.target).rpartition(".")
        owner = model.get_submodule(path)
        found: torch.Tensor = getattr(owner, local)
        within = f"{path}." if path else ""
        shape = tuple(found.shape)
        if isinstance(found, nn.Parameter):
            return self.parameter(found, local, within, dimension=-1)
        division = everywhere(shape, self.partitions, batched=False)
        if local in owner._buffers:
            step = Step(
                self.call.name, (), division, True, lambda box: [], lambda box: Kept(local, found),
                lambda box: {local: (box, shape)}, within, 0.0,
            )  # fmt: skip
        else:
            step = Step(
                self.call.name, (), division, True, lambda box: [], lambda box: lambda: found, lambda box: {}, "", 0.0
            )
        return self._add(step, found.dtype)

    def parameter(self, found: torch.Tensor, local: str, within: str, dimension: int) -> State:
        """A parameter as a state: partitions own parts of it along a dimension and send them where they are needed."""
        shape = tuple(found.shape)
        division = (
            along(shape, dimension, self.partitions, batched=False)
            if shape and shape[dimension] >= 4 * self.partitions
            else at(shape, self.last, self.partitions, batched=False)
        )

        def build(box: Box) -> nn.Module:
            return Kept(local, torch.empty(sizes(box), dtype=found.dtype))

        return self._add(
            Step(
                self.call.name, (), division, False, lambda box: [], build,  # type: ignore[arg-type]
                lambda box: {local: (box, shape)}, within, 0.0,
            ),
            found.dtype,
        )  # fmt: skip

    def _add(self, step: Step, dtype: torch.dtype) -> State:
        self.steps.append(step)
        return State(len(self.steps) - 1, step.division, dtype)


@final
class Kept(nn.Module):
    """A parameter or buffer that is a state itself."""

    def __init__(self, name: str, value: torch.Tensor) -> None:
        super().__init__()
        self._name = name
        self.register_buffer(name, value)

    def forward(self) -> torch.Tensor:
        """The value, whichever it is now."""
        value: torch.Tensor = getattr(self, self._name)
        return value


Rule = Callable[..., Any]
"""A rule: of a Site, then the arguments of the call, to the state that the call yields, or several in a tuple."""


def part(module: nn.Module, name: str, box: Box) -> Part:
    """A box of a tensor of the uncut module, in its own shape."""
    return box, tuple(getattr(module, name).shape)
