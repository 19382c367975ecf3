# SPDX-License-Identifier: Apache-2.0
"""What travels between the steps of a cut model: who needs what, and which needs share an exchange."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from distbelief.partition.box import Box, intersect, union, whole
from distbelief.partition.exchange import traffic
from distbelief.partition.site import State, Step, tensor

Needs = tuple[Box | None, ...]
"""What each partition needs of a value, or has of it."""


@dataclass(frozen=True, eq=False)
class Crossing:
    """A value that is exchanged, as much of it as its consumers need."""

    state: State
    needs: Needs
    fill: float
    before: int
    """The first step that consumes it."""


@dataclass(frozen=True)
class Input:
    """Where a step finds an input, and what it takes of what lies there."""

    crossing: int | None
    """None: nothing is exchanged; the step that makes it left it."""
    needs: Needs
    held: Needs


@dataclass(frozen=True, eq=False)
class Flow:
    """Steps and what travels between them."""

    steps: Sequence[Step]
    wanted: Sequence[Sequence[bool]]
    """Per step and partition: whether the partition does the step."""
    crossings: Sequence[Crossing]
    inputs: Sequence[Sequence[Input]]
    """Per step and input."""

    def box(self, step: int, partition: int) -> Box | None:
        """The box that the partition computes in the step; None for none, or for a result that is no tensor."""
        division = self.steps[step].division
        return division.boxes[partition] if division is not None and self.wanted[step][partition] else None


def flow(steps: Sequence[Step], partitions: int) -> Flow:
    """Connect the steps. The last one is the model's output."""
    wanted = _wanted(steps, partitions)
    uses: dict[int, list[tuple[int, int, Needs]]] = defaultdict(list)
    states: dict[int, State] = {}
    for index, step in enumerate(steps):
        per_partition = [_needs(step, wanted[index], partition) for partition in range(partitions)]
        for place, state in enumerate(step.inputs):
            states[state.step] = state
            uses[state.step].append((index, place, tuple(needs[place] for needs in per_partition)))
    inputs: list[list[Input]] = [[Input(None, (None,) * partitions, ())] * len(step.inputs) for step in steps]
    crossings: list[Crossing] = []
    for source, consumers in sorted(uses.items()):
        division = states[source].division
        if division is None:
            continue
        remote: dict[float, list[tuple[int, int, Needs]]] = defaultdict(list)
        for index, place, asked in consumers:
            if all(
                need is None or intersect(have, need) == need for have, need in zip(division.boxes, asked, strict=True)
            ):
                inputs[index][place] = Input(None, asked, division.boxes)
            else:
                remote[steps[index].fill].append((index, place, asked))
        for fill, asking in remote.items():
            for merged, served in _merged(division.boxes, asking):
                for index, place, needs in served:
                    inputs[index][place] = Input(len(crossings), needs, merged)
                crossings.append(Crossing(states[source], merged, fill, min(index for index, _, _ in served)))
    return Flow(steps, wanted, crossings, inputs)


def _wanted(steps: Sequence[Step], partitions: int) -> list[list[bool]]:
    """From the last step back: boxes are computed by who has them, lazy steps by whom they are needed."""
    wanted = [
        [False] * partitions if step.lazy or step.division is None else [box is not None for box in step.division.boxes]
        for step in steps
    ]
    for index, step in reversed(list(enumerate(steps))):
        for state in step.inputs:
            if steps[state.step].lazy:
                for partition in range(partitions):
                    wanted[state.step][partition] |= wanted[index][partition]
    return wanted


def _needs(step: Step, wanted: Sequence[bool], partition: int) -> Sequence[Box | None]:
    """Per input."""
    if not wanted[partition]:
        return [None] * len(step.inputs)
    if step.lazy:
        return [None if state.division is None else whole(state.division.shape) for state in step.inputs]
    box = tensor(step).boxes[partition]
    assert box is not None
    return step.need(box)


def _merged(have: Needs, asking: Sequence[tuple[int, int, Needs]]) -> list[tuple[Needs, list[tuple[int, int, Needs]]]]:
    """Consumers that share an exchange, and the needs of it: equal needs always, others where that sends no more."""
    distinct: dict[Needs, list[tuple[int, int, Needs]]] = defaultdict(list)
    for use in asking:
        distinct[use[2]].append(use)
    around = tuple(union(per) for per in zip(*distinct, strict=True))
    if traffic(have, around) <= sum(traffic(have, needs) for needs in distinct):
        return [(around, list(asking))]
    return list(distinct.items())
