# SPDX-License-Identifier: Apache-2.0
"""torch.optim in a shard: the default rule is Adagrad, as in the paper (section 4.1), fused.

    the shard's span    |------------- segment 0 -------------|---- segment 1 ----|
    what is optimized   |------------- body ------------|rest'|----- body ---|rest'|

The optimizer sees one nn.Parameter per body, a view of the shard's vector: a step is one pass, in place. A body is a
multiple of 64 elements long and the rest of its segment is stepped in a padded copy of 64 (a segment of up to 4,096
with a rest is copied whole), because the fused kernels of torch round the last elements, which do not fill a vector
register, differently (seen in SGD with momentum and Adam). So every element takes the same path wherever the vector is
cut, and the number of shards never changes a result.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.parameters import Options, Segment, Span
from distbelief.update_rule import trial
from distbelief.update_rule.bare import bare
from distbelief.update_rule.schedule import Schedule, factor_of, name_of

_BLOCK = 64
"""Elements; a multiple of every vector register and of the unit that the fused kernels deal out to threads."""
_SHORT = 1 << 12
"""Elements; where a segment is no longer, a step on two parts of it takes more time than to copy all of it."""

_FUSED = (torch.optim.Adagrad, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_FUSED_DTYPES = (torch.float32, torch.float64)
"""Not the 16-bit ones: the fused SGD of torch 2.13 takes wrong steps in them on a CPU."""

_GROUP = "group."
"""Before the name of a number that an optimizer counts in its parameter groups."""
_IMPLEMENTATION = ("fused", "foreach", "differentiable", "capturable")
_AT_BIRTH = ("initial_accumulator_value",)
"""Options that torch reads from the constructor's arguments only, so that they cannot differ between groups."""


@final
@dataclass(frozen=True, repr=False)
class TorchRule:
    """A torch.optim optimizer as an update rule; built by the functions of optimizers.py."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    options: tuple[tuple[str, Any], ...]
    """Arguments of the optimizer's constructor."""
    schedule: Schedule | None = None
    damping: float = 0.0

    def __repr__(self) -> str:
        known = {name: parameter.default for name, parameter in inspect.signature(self.optimizer).parameters.items()}
        given = dict(self.options)
        shown = [f"{given.pop('lr', known.get('lr'))}"]
        shown += [f"{name}={value}" for name, value in given.items() if name not in known or known[name] != value]
        shown += [] if self.schedule is None else [f"schedule={name_of(self.schedule)}"]
        shown += [f"damping={self.damping}"] if self.damping else []
        return f"{self.name}({', '.join(shown)})"

    def check(self, groups: Iterable[Options] = ()) -> None:
        """Raise ConfigurationError unless the optimizer works on any cut of the parameters with these values."""
        self._check_class()
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ConfigurationError(
                f"{self.name}(damping={self.damping}): the rate is divided by (1 + staleness) ** damping",
                hint="use 0 for no damping, 1 to divide by the staleness",
            )
        plain = self._try({})
        for group in groups:
            override = self.overrides(group)
            if set(self._try(override).state) != set(plain.state):
                raise ConfigurationError(
                    f"the parameter group {dict(group)} makes {self.name} keep other state than the other groups",
                    hint="give the option that adds state (a momentum, amsgrad) to the update rule itself",
                )

    def bind(self, parameters: Tensor, segments: Sequence[Segment], span: Span) -> "BoundTorchRule":
        """See UpdateRule.bind. Raises ConfigurationError for options of a segment that the optimizer does not know."""
        return BoundTorchRule(self, parameters, segments, span)

    def make(self, parameters: Iterable[Any], dtype: torch.dtype, override: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The optimizer over tensors or groups of `dtype`, with its options and `override`; fused where that works."""
        options = {**dict(self.options), **override}
        if self.optimizer in _FUSED and dtype in _FUSED_DTYPES and not any(name in options for name in _IMPLEMENTATION):
            options["fused"] = True
        return bare(self.optimizer)(parameters, **options)  # type: ignore[arg-type]  # a class is hashable

    def overrides(self, group: Options) -> dict[str, float]:
        """The options of a parameter group under torch's names: `rate` is `lr`. Raises ConfigurationError."""
        defaults = self.make([nn.Parameter(torch.zeros(1))], torch.float32, {}).defaults
        known = sorted(
            name
            for name, value in defaults.items()
            if isinstance(value, int | float) and name not in _IMPLEMENTATION + _AT_BIRTH
        )
        override: dict[str, float] = {}
        for name, value in group:
            target = "lr" if name == "rate" else name
            if target not in known:
                raise ConfigurationError(
                    f"the parameter group {dict(group)} sets {name}, which {self.name} cannot set for a group",
                    hint=f"it knows {', '.join(known)}",
                )
            if target in override:
                raise ConfigurationError(f"the parameter group {dict(group)} sets the rate twice", hint="leave lr out")
            override[target] = value
        return override

    def _check_class(self) -> None:
        if not (isinstance(self.optimizer, type) and issubclass(self.optimizer, torch.optim.Optimizer)):
            raise ConfigurationError(
                f"optimizer({self.optimizer!r}) is no subclass of torch.optim.Optimizer",
                hint="give the class, such as optimizer(torch.optim.RMSprop, lr=0.01)",
            )
        for refused, reason in trial.REFUSED.items():
            if issubclass(self.optimizer, refused):
                raise ConfigurationError(
                    f"{self.name} cannot run in parameter server shards: {reason}",
                    hint="use adagrad, sgd, adam, adamw, or another optimizer that treats each parameter by itself",
                )
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigurationError(
                f"{self.name}.step needs a closure that computes the loss, but a shard has no model",
                hint="use an optimizer whose step works on gradients alone",
            )
        if callable(getattr(self.optimizer, "train", None)) and callable(getattr(self.optimizer, "eval", None)):
            raise ConfigurationError(
                f"{self.name} wants more than step(): train() and eval() change the parameters between training and "
                "tests, as schedule-free optimizers do, and a shard calls neither",
                hint="use an optimizer of which step() is all, such as adamw with schedule=cosine_decay(...)",
            )
        if isinstance(dict(self.options).get("lr"), Tensor):
            raise ConfigurationError(f"the rate of {self.name} is a tensor", hint="give a float, such as 0.01")

    def _try(self, override: Mapping[str, float]) -> trial.Trial:
        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return self.make(parameters, parameters[0].dtype, override)

        try:
            rate = make([nn.Parameter(torch.zeros(1))]).defaults.get("lr")
            done = trial.run(make)
            reason = trial.whole_tensor_reason(make)
        except Exception as error:
            raise ConfigurationError(
                f"{self!r}{f' with {dict(override)}' if override else ''} does not work: {error}",
                hint=f"correct the option; help({self.optimizer.__module__}.{self.optimizer.__name__}) lists them",
            ) from error
        if not isinstance(rate, int | float) or not math.isfinite(rate) or rate < 0 or (rate == 0 and not override):
            raise ConfigurationError(f"{self.name} has the rate {rate}", hint="use a number above 0, such as 0.01")
        if not done.values.isfinite().all():
            raise ConfigurationError(
                f"{self!r}{f' with {dict(override)}' if override else ''} makes finite parameters infinite or NaN",
                hint="use finite options",
            )
        if reason is None and done.other_state():
            reason = f"keeps {', '.join(done.other_state())}, which is neither a number nor one number per parameter"
        if reason is not None:
            raise ConfigurationError(
                f"{self.name} cannot run in parameter server shards: it {reason}, but a shard holds any cut of them",
                hint="use an optimizer that treats each parameter by itself and draws no random numbers",
            )
        if done.elsewhere:
            raise ConfigurationError(
                f"{self.name} keeps {', '.join(done.elsewhere)} where no checkpoint would hold it",
                hint="let it keep what its steps change in self.state[parameter], or as numbers in self.param_groups",
            )
        return done


@final
class BoundTorchRule:
    """The optimizer and its state for one span; see BoundRule."""

    def __init__(self, rule: TorchRule, parameters: Tensor, segments: Sequence[Segment], span: Span) -> None:
        self._rule, self._length = rule, len(parameters)
        self._parts: list[_Part] = []
        self._names = [_name_of(segment) for segment in segments]
        """Of the parameter groups."""
        groups: list[dict[str, Any]] = []
        self._kept = trial.run(lambda some: rule.make(some, parameters.dtype, {}), dtype=parameters.dtype)
        for segment in segments:
            parts = _cut(parameters, segment, span, copies_gradient=self._kept.writes_gradient)
            groups.append({"params": [part.parameter for part in parts], **rule.overrides(segment.options)})
            self._parts += parts
        self._optimizer = rule.make(groups, parameters.dtype, {})
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        counted = self._kept.counted
        self._born = [
            {name: group[name] for name in counted if name in group} for group in self._optimizer.param_groups
        ]
        """What of each parameter group its steps change, as it is before the first."""
        self._factor = 1.0
        self._homes: dict[str, Tensor] = {}
        self._keeps_state_from_birth = bool(self._optimizer.state)

    def apply(self, gradient: Tensor, *, reader: int, version: int, base_version: int, examples: int) -> None:
        """One step of the optimizer; see BoundRule.apply."""
        factor = factor_of(self._rule.schedule, examples)
        if self._rule.damping:
            factor /= (1.0 + max(0, version - base_version)) ** self._rule.damping
        if factor != self._factor:
            self._factor = factor
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        for part in self._parts:
            part.take(gradient)
        self._optimizer.step()
        for part in self._parts:
            part.give_back()

    def fetched(self, reader: int, version: int) -> None:
        """Nothing to remember: the step does not depend on what was fetched."""

    def forget(self, reader: int) -> None:
        """Nothing was remembered."""

    def vectors(self) -> dict[str, Tensor]:
        """The optimizer's state under torch's names; empty before the first push where torch creates it then."""
        for name, dtype in self._kept.vectors().items():
            for part in self._parts:
                value = self._optimizer.state.get(part.parameter, {}).get(name)
                if value is None:
                    continue
                if name not in self._homes:
                    self._homes[name] = torch.zeros(self._length, dtype=dtype)
                home = self._homes[name][part.where]
                if part.padded:
                    home.copy_(value[: len(home)])
                elif value.data_ptr() != home.data_ptr():
                    home.copy_(value)
                    self._optimizer.state[part.parameter][name] = home
        return dict(self._homes)

    def scalars(self) -> dict[str, float]:
        """The optimizer's numbers under torch's names; those of a group get its options added where groups differ.

        Those that it counts in its parameter groups are "group.NAME", once they have changed.
        """
        result: dict[str, float] = {}
        states = [(part.group, self._optimizer.state.get(part.parameter, {})) for part in self._parts]
        found = {
            name: {group: float(state[name]) for group, state in states if name in state}
            for name in self._kept.numbers()
        }
        for name in self._kept.counted:
            found[_GROUP + name] = {
                own: float(group[name])
                for own, group, born in zip(self._names, self._optimizer.param_groups, self._born, strict=True)
                if name in group and group[name] != born.get(name)
            }
        for name, values in found.items():
            if values:
                result[name] = next(iter(values.values()))
            if len(set(values.values())) > 1:
                result.update({name + group: value for group, value in values.items()})
        return result

    def load(self, vectors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """See BoundRule.load; empty mappings, saved before the first push, take an optimizer back to its start."""
        fresh = not vectors and not scalars and not self._keeps_state_from_birth
        expected, numbers = self._kept.vectors(), self._kept.numbers()
        if not fresh and (set(vectors) != set(expected) or not set(numbers) <= set(scalars)):
            raise CheckpointError(
                f"the checkpoint holds the update rule's state {sorted([*vectors, *scalars])}, "
                f"but {self._rule!r} keeps {sorted([*expected, *numbers])}\n"
                "hint: resume with the rule of the checkpoint"
            )
        for own, group, born in zip(self._names, self._optimizer.param_groups, self._born, strict=True):
            for name, example in self._kept.counted.items():
                group.pop(name, None)
                if (saved := scalars.get(_GROUP + name + own, scalars.get(_GROUP + name))) is not None:
                    group[name] = _like(example, saved)
                elif name in born:
                    group[name] = born[name]
        self._homes = {name: vector.to(expected[name], copy=True) for name, vector in vectors.items()}
        for part in self._parts:
            self._optimizer.state.pop(part.parameter, None)  # not emptied: some ask `parameter in self.state`
            if fresh:
                continue
            state = self._optimizer.state[part.parameter]
            for name, home in self._homes.items():
                state[name] = part.own(home)
            for name, example in numbers.items():
                state[name] = _like(example, scalars.get(name + part.group, scalars[name]))


def _like(example: Any, value: float) -> Any:
    """The number in the kind of another one."""
    return torch.full_like(example, value) if isinstance(example, Tensor) else type(example)(value)


@final
class _Part:
    """What one nn.Parameter of the optimizer stands for: a body (a view) or a rest (a padded copy) of a segment."""

    def __init__(self, parameters: Tensor, where: slice, group: str, *, padded: bool, copies_gradient: bool) -> None:
        self.where, self.group, self.padded = where, group, padded
        self._copies_gradient = copies_gradient
        self._values = parameters[where]
        self.parameter = nn.Parameter(self.own(parameters))
        self._copy = self.parameter.detach()[: len(self._values)]
        self._gradient = torch.zeros_like(self.parameter.detach()) if padded else self._values
        self._gradient_copy = self._gradient[: len(self._values)]

    def own(self, flat: Tensor) -> Tensor:
        """This part of a vector of the span: a view of it, or a copy padded with zeros."""
        part = flat[self.where]
        return nn.functional.pad(part, (0, -len(part) % _BLOCK)) if self.padded else part

    def take(self, gradient: Tensor) -> None:
        """Hand this part of the pushed gradient to the optimizer."""
        piece = gradient[self.where]
        if self.padded:
            self._copy.copy_(self._values)
            self._gradient_copy.copy_(piece)
            self.parameter.grad = self._gradient
        else:
            self.parameter.grad = piece.clone() if self._copies_gradient else piece

    def give_back(self) -> None:
        """Let go of the gradient, and bring a copy's new values into the shard's vector."""
        self.parameter.grad = None
        if self.padded:
            self._values.copy_(self._copy)


def _name_of(segment: Segment) -> str:
    return f"[{', '.join(f'{name}={value}' for name, value in segment.options)}]" if segment.options else ""


def _cut(parameters: Tensor, segment: Segment, span: Span, *, copies_gradient: bool) -> list[_Part]:
    where = segment.span.within(span)
    rest = len(segment.span) % _BLOCK
    middle = where.start if rest and len(segment.span) <= _SHORT else where.stop - rest
    group = _name_of(segment)
    cuts = [(slice(where.start, middle), False), (slice(middle, where.stop), True)]
    return [
        _Part(parameters, part, group, padded=padded, copies_gradient=copies_gradient)
        for part, padded in cuts
        if part.stop > part.start
    ]
