# SPDX-License-Identifier: Apache-2.0
"""Where stages begin: as named by the user, or so that the dearest stage is cheapest. Pure."""

import re
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, fx, nn

from distbelief.errors import ConfigurationError
from distbelief.partition.balance import fairest
from distbelief.partition.forward_pass import ForwardPass, cost, follow

_RANGE = re.compile(r"(.*?)(\d+)-(\d+)")


def choose(
    model: nn.Module, sample: Tensor, partitions: int, cuts: Sequence[str] | None
) -> tuple[ForwardPass, list[int]]:
    """The forward pass, and the step at which each stage begins. Model and mini-batch are on the meta device."""
    ranges = None if cuts is None else [_range(cut) for cut in cuts]
    if ranges is None:
        passed = _opened_for_balance(model, sample, partitions)
        starts = _balanced(passed, partitions)
    else:
        passed = _opened_for_names(model, sample, [name for both in ranges for name in both])
        starts = _named(passed, ranges, partitions)
    _check(passed, starts)
    return passed, starts


def _range(cut: str) -> tuple[str, str]:
    """First and last module of "layers.0-5"; the same one twice of a name."""
    match = _RANGE.fullmatch(cut)
    return (match[1] + match[2], match[1] + match[3]) if match else (cut, cut)


# what stands in the way of a cut


def _trainable(passed: ForwardPass, step: fx.Node) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in passed.tensors(step).items() if tensor.requires_grad]


def _ties(passed: ForwardPass) -> list[tuple[str, int, int]]:
    """The trainable parameters of several steps: name, first and last step."""
    found: dict[int, tuple[str, int, int]] = {}
    for position, step in enumerate(passed.steps):
        for name, tensor in _trainable(passed, step):
            first = found.get(id(tensor), (name, position, position))
            found[id(tensor)] = (*first[:2], position)
    return [tie for tie in found.values() if tie[1] != tie[2]]


def _obstacle(passed: ForwardPass, position: int, ties: Sequence[tuple[str, int, int]]) -> str | None:
    """Why the pass cannot be cut before a step; None when it can."""
    passing = passed.passing(position)
    if len(passing) > 1 or passing[0] is passed.input:
        return f"{' and '.join(map(passed.label, passing))} would have to pass"
    value = passed.measures[passing[0]].result
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return f"{passed.label(passing[0])} is no floating-point tensor"
    for name, first, last in ties:
        if first < position <= last:
            return f"parameter {name} is used before and after"
    return None


def _places(passed: ForwardPass) -> list[int]:
    """The steps that a stage after the first may begin with: each of the stages has something to train."""
    ties = _ties(passed)
    trained = [position for position, step in enumerate(passed.steps) if _trainable(passed, step)]
    return [position for position in trained[1:] if _obstacle(passed, position, ties) is None]


# looking into modules


def _opened_for_balance(model: nn.Module, sample: Tensor, partitions: int) -> ForwardPass:
    """Look into the user's modules that are more than a fair share, or into all while there are too few places."""
    opened: list[str] = []
    left: set[str] = set()
    passed = follow(model, sample)
    while partitions > 1:
        fair = sum(cost(passed.measures[step]) for step in passed.steps) / partitions
        few = len(_places(passed)) + 1 < partitions
        names = [name for name, dear in passed.closed() if name not in left and (few or dear > fair)]
        if not names:
            break
        left.add(names[0])
        try:
            inner = follow(model, sample, [*opened, names[0]])
        except ConfigurationError:
            continue  # it stays a step
        if len(_places(inner)) > len(_places(passed)) or len(inner.closed()) >= len(passed.closed()):
            opened.append(names[0])
            passed = inner
    return passed


def _opened_for_names(model: nn.Module, sample: Tensor, names: Sequence[str]) -> ForwardPass:
    """Look into the modules that contain the named ones."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            raise ConfigurationError(
                f"a stage is to begin or end with module {name!r}, which {type(model).__name__} has not",
                hint=f"it has {', '.join(list(known)[1:9])}{', ...' if len(known) > 9 else ''}",
            )
    opened: list[str] = []
    passed = follow(model, sample)
    while inner := [
        each for each, _ in passed.closed() if any(name.startswith(f"{each}.") for name in names)
    ]:  # fmt: skip
        opened += inner
        passed = follow(model, sample, opened)
    return passed


# choosing


def _balanced(passed: ForwardPass, partitions: int) -> list[int]:
    places = [0, *_places(passed)]
    if len(places) < partitions:
        raise _too_few(passed, places, partitions)
    edges = [*places, len(passed.steps)]
    runs = [passed.steps[start:stop] for start, stop in pairwise(edges)]
    costs = [sum(cost(passed.measures[step]) for step in run) for run in runs]
    sent = [0, *(passed.measures[passed.passing(place)[0]].elements for place in places[1:]), 0]
    return [edges[edge] for edge in fairest(costs, partitions, sent)[:-1]]


def _too_few(passed: ForwardPass, places: Sequence[int], partitions: int) -> ConfigurationError:
    """Names what holds the longest run together."""
    bounds = [*places, len(passed.steps)]
    start, stop = max(
        pairwise(bounds), key=lambda run: sum(len(_trainable(passed, s)) for s in passed.steps[slice(*run)])
    )
    ties, reason = _ties(passed), ""
    obstacles = {
        position: obstacle
        for position in range(start + 1, stop)
        if _trainable(passed, passed.steps[position]) and (obstacle := _obstacle(passed, position, ties)) is not None
    }
    tied = [position for position in obstacles if _obstacle(passed, position, ()) is None]
    for position in [*tied, *obstacles][:1]:  # where a tied parameter alone is in the way, a cut is nearest
        where = (passed.place(passed.steps[position]) or [str(passed.steps[position])])[-1]
        reason = f"; before {where}, for example, {obstacles[position]}"
    return ConfigurationError(
        f"{_name(passed)} can be cut into at most {len(places)} stages, not {partitions}{reason}",
        hint=f"use partitions={len(places)}, or write the model as an nn.Sequential of more modules",
    )


def _named(passed: ForwardPass, ranges: Sequence[tuple[str, str]], partitions: int) -> list[int]:
    if len(ranges) != partitions:
        raise ConfigurationError(
            f"{len(ranges)} stages are named for {partitions} partitions", hint="name the modules of each stage"
        )
    ties = _ties(passed)
    firsts = [_positions(passed, first)[0] for first, _ in ranges]
    for (earlier, _), (later, _), start, stop in zip(ranges, ranges[1:], firsts, firsts[1:], strict=False):
        if start >= stop:
            raise ConfigurationError(
                f"{later} does not come after {earlier} in the forward pass of {_name(passed)}",
                hint="name the stages in the order of the forward pass",
            )
    for (first, last), start, stop in zip(ranges, firsts, [*firsts[1:], len(passed.steps)], strict=True):
        if start != firsts[0] and (obstacle := _obstacle(passed, start, ties)):
            raise ConfigurationError(
                f"no stage can begin with {first}: {obstacle}", hint="begin it with another module"
            )
        if first != last:
            _check_between(passed, f"stage {first} to {last}", _positions(passed, last)[-1] + 1, stop)
    _check_between(passed, f"the first stage, which is to begin with {ranges[0][0]}", 0, firsts[0])
    return [0, *firsts[1:]]


def _positions(passed: ForwardPass, name: str) -> list[int]:
    found = [position for position, step in enumerate(passed.steps) if name in passed.place(step)]
    if not found:
        raise ConfigurationError(
            f"module {name} is no step of the forward pass of {_name(passed)}",
            hint="name a module that is called with what the one before it returns",
        )
    return found


def _check_between(passed: ForwardPass, what: str, start: int, stop: int) -> None:
    """A stage named by its modules has no others with parameters."""
    between = [name for step in passed.steps[start:stop] for name, _ in _trainable(passed, step)]
    if stop < start or between:
        told = f"{between[0]} would belong to it, too" if between else "what it ends with is beyond it"
        raise ConfigurationError(f"{what}: {told}", hint="name stages that have all modules among them, in order")


def _check(passed: ForwardPass, starts: Sequence[int]) -> None:
    """Every stage has something to train, every parameter a stage, and the output is a tensor."""
    used = set[int]()
    for partition, (start, stop) in enumerate(pairwise([*starts, len(passed.steps)])):
        trained = {id(tensor) for step in passed.steps[start:stop] for _, tensor in _trainable(passed, step)}
        used |= trained
        if not trained:
            raise ConfigurationError(
                f"stage {partition} has no trainable parameters", hint="use fewer partitions, or cut elsewhere"
            )
    for name, parameter in passed.called.uncut_model.named_parameters():
        if parameter.requires_grad and id(parameter) not in used:
            raise ConfigurationError(
                f"parameter {name} takes no part in the forward pass, so that no stage computes its gradient",
                hint="remove it, or freeze it with requires_grad_(False)",
            )
    if not isinstance(passed.measures[passed.output].result, Tensor):
        raise ConfigurationError(
            f"{_name(passed)} returns a {type(passed.measures[passed.output].result).__name__}",
            hint="a model cut into stages returns one tensor, shape (batch, ...)",
        )


def _name(passed: ForwardPass) -> str:
    return type(passed.called.uncut_model).__name__
