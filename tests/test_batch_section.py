# SPDX-License-Identifier: Apache-2.0
"""Laws of a section under Sandblaster: what is sent again, late or in another order changes nothing."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distbelief.batch_section import BatchSection, Extent, Keeping, Mark
from distbelief.errors import NotReady
from distbelief.lbfgs import Evaluate, Options, Solver, Step
from distbelief.parameters import Layout, Piece, Span

LENGTH, BUNDLES, EXAMPLES = 6, 5, 10
SPAN = Span(0, LENGTH)
CENTERS = torch.randn(BUNDLES, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SCALES = torch.rand(BUNDLES, LENGTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
EXTENT = Extent(BUNDLES, BUNDLES * EXAMPLES)


def section(*, deterministic: bool = False) -> BatchSection:
    layout = Layout((Piece("a", (LENGTH,), SPAN),), torch.float64)
    made = BatchSection(SPAN, layout, Keeping(history=3, deterministic=deterministic))
    made.initialise(torch.zeros(LENGTH, dtype=torch.float64))
    return made


def gradients(x: Tensor) -> list[Tensor]:
    """By bundle, of the sum over its examples of half the scaled squared distance from its center."""
    return [EXAMPLES * scale * (x - center) for center, scale in zip(CENTERS, SCALES, strict=True)]


def loss(x: Tensor) -> float:
    return float((SCALES * (x - CENTERS) ** 2).sum() / 2 / BUNDLES)


def read(it: BatchSection) -> Tensor:
    into = torch.empty(LENGTH, dtype=torch.float64)
    it.read(into)
    return into


def minimised(it: BatchSection, draw: random.Random | None = None) -> Iterator[Tensor]:
    """The points on the way to the minimum; with `draw` everything is sent again, late, and in another order."""
    solver, version, number = Solver(Options(history=3, max_iterations=8, gtol=0.0, ftol=0.0)), 0, 0
    commands, late = solver.begin(), list[tuple[Mark, Tensor]]()
    while True:
        command, *commands = commands
        if isinstance(command, Step):
            version += 1
            for _ in range(1 if draw is None else draw.randint(1, 3)):
                it.step(version, number, command)
            if draw is not None:
                it.step(draw.randint(1, version), number, command)
        elif isinstance(command, Evaluate):
            number += 1
            x = torch.empty(LENGTH, dtype=torch.float64)
            it.trial(version, command.t, x)
            calls = [(Mark(number, position), gradient) for position, gradient in enumerate(gradients(x))]
            if draw is not None:
                draw.shuffle(calls)
            seen = set[int]()
            for mark, gradient in [
                call for each in calls for call in ([each] if draw is None else [each, *late, each])
            ]:
                sent = gradient.clone()
                assert it.contribute(mark, sent) == (mark.evaluation == number and mark.position not in seen)
                sent.fill_(torch.nan)  # the memory that it came in is used again
                seen |= {mark.position} if mark.evaluation == number else set()
            late = [] if draw is None else draw.sample(calls, 2)
            commands = solver.tell(loss(x), it.seal(number, command, EXTENT))
            yield read(it)
        else:
            return


@pytest.mark.parametrize("seed", range(10))
def test_steps_and_contributions_count_once_in_whatever_order_and_however_often_they_are_sent(seed: int) -> None:
    expected = list(minimised(section(deterministic=True)))
    found = list(minimised(section(deterministic=True), random.Random(seed)))
    assert len(found) == len(expected) > 8
    assert all(map(torch.equal, found, expected))
    anyhow = list(minimised(section(), random.Random(seed)))
    best = (SCALES * CENTERS).sum(0) / SCALES.sum(0)
    for points in (expected, anyhow):
        torch.testing.assert_close(points[-1], best, rtol=1e-2, atol=1e-2)


def test_an_evaluation_is_complete_when_every_bundle_is_here_and_no_later_one_has_begun() -> None:
    it, trial = section(), Evaluate(0.0, ())
    x = read(it)
    it.contribute(Mark(1, 3), gradients(x)[3])
    it.contribute(Mark(1, 0), gradients(x)[0])
    with pytest.raises(NotReady, match=r"shard 0\.\.6 lacks bundles \[1, 2, 4\] of 1"):
        it.seal(1, trial, EXTENT)
    for position, gradient in enumerate(gradients(x)):
        it.contribute(Mark(1, position), gradient)
    it.seal(1, trial, EXTENT)
    it.contribute(Mark(2, 0), gradients(x)[0])
    for number, missing in ((1, r"\[0, 1, 2, 3, 4\] of 1"), (2, r"\[1, 2, 3, 4\] of 2")):
        with pytest.raises(NotReady, match=missing):
            it.seal(number, trial, EXTENT)


def test_a_shard_that_came_back_has_no_trial_to_step_to_and_none_after_a_step_that_it_lacks(tmp_path: Path) -> None:
    it = section()
    (file,) = it.write(tmp_path / "shard.safetensors", (), True)()
    for position, gradient in enumerate(gradients(read(it))):
        it.contribute(Mark(1, position), gradient)
    it.seal(1, Evaluate(0.0, ()), EXTENT)
    it.restore(str(tmp_path), [file], own=True, offers=None)
    with pytest.raises(NotReady, match="has not the trial of evaluation 1"):
        it.step(1, 1, Step(True, 0.0, None, (), (-1.0,)))
    with pytest.raises(NotReady, match="is at step 0, not 1"):
        it.trial(1, 0.0, torch.empty(LENGTH, dtype=torch.float64))
    assert it.contribute(Mark(1, 0), gradients(read(it))[0]), "it is new to this life"


def test_initial_parameters_are_taken_once() -> None:
    it = section()
    it.initialise(torch.ones(LENGTH, dtype=torch.float64))
    assert not read(it).any()


def test_who_asks_for_the_trial_of_an_earlier_step_is_answered_and_does_not_wait_for_ever() -> None:
    it, into = section(), torch.empty(LENGTH, dtype=torch.float64)
    for version in (1, 2):
        it.step(version, 0, Step(False, 0.0, None, (), (0.0,)))
    it.trial(1, 0.0, into)
    assert not into.any()
