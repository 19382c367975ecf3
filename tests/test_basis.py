# SPDX-License-Identifier: Apache-2.0
"""Laws of the vectors of L-BFGS: the direction without vectors is the one with them, on any cut; what is measured."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from distbelief import basis
from distbelief.basis import Basis
from distbelief.errors import CheckpointError
from distbelief.history import History
from distbelief.lbfgs import Step
from distbelief.parameters import cut
from distbelief.penalty import Penalty
from distbelief.sealed import Sealed, add, merge

N = 30
FAR = 1e60
"""A trial so far away shows the direction without the rounding of the point."""


def two_loops(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The direction by the recursion of Nocedal (1980), on whole vectors."""
    q, alphas = gradient.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= (s @ y) / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - (y @ q) / (s @ y))
    return -q


def dense(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The direction by BFGS updates of the inverse Hessian as a matrix."""
    one = torch.eye(len(gradient), dtype=torch.float64)
    inverse = one.clone()
    if pairs:
        s, y = pairs[-1]
        inverse *= (s @ y) / (y @ y)
    for s, y in pairs:
        left = one - torch.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    return -inverse @ gradient


def gather(sections: list[Basis], t: float) -> Tensor:
    parts = []
    for section, span in zip(sections, cut(N, len(sections)), strict=True):
        parts.append(torch.empty(len(span), dtype=torch.float64))
        section.trial(t, parts[-1])
    return torch.cat(parts)


def apart(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("shards", [1, 2, 3, 7, N + 11])
@pytest.mark.parametrize(("history", "steps"), [(1, 8), (2, 10), (10, 35), (40, 50)])
def test_the_direction_is_that_of_the_recursion_and_of_the_dense_inverse(history: int, steps: int, shards: int) -> None:
    torch.manual_seed(history)
    root = torch.randn(N, N, dtype=torch.float64)
    matrix = root @ root.T / N + torch.eye(N, dtype=torch.float64)
    point = torch.randn(N, dtype=torch.float64)
    sections = [Basis(point[span.start : span.stop].clone(), history) for span in cut(N, shards)]
    scalars, pairs, gradient, skipped = History(), [], torch.zeros(N, dtype=torch.float64), 0
    for number in range(steps):
        t = 0.0 if number == 0 else 0.05 + 0.05 * torch.rand(()).item()
        trial = gather(sections, t)
        # Every sixth step finds the function curved downwards, so that its pair is left out.
        bent = number % 6 == 5
        new = gradient - matrix @ (trial - point) if bent else matrix @ trial + 0.1 * trial.sin()
        for section, span in zip(sections, cut(N, shards), strict=True):
            section.open()
            section.add(2 * new[span.start : span.stop])
            section.add(new[span.start : span.stop])
        sealed = merge([section.seal(t, 3, scalars.pairs) for section in sections])
        s, y = trial - point, new - gradient
        curved = number > 0 and bool(s @ y > 0)
        scalars, slot = scalars.accept(sealed.rows, history, 1e-12)
        assert (slot is not None) == curved
        skipped += number > 0 and not curved
        pairs = [*pairs, (s, y)][-history:] if curved else pairs
        point, gradient = trial, new
        assert len(scalars.pairs) == len(pairs) == len(set(scalars.pairs))
        coefficients, slope = scalars.direction()
        for section in sections:
            section.step(Step(True, t, slot, scalars.pairs, coefficients))
        direction = gather(sections, FAR) / FAR
        expected = two_loops(pairs, gradient) if number % 5 else dense(pairs, gradient)
        assert apart(direction, expected) < 1e-9
        assert slope == pytest.approx((expected @ gradient).item(), rel=1e-9)
    measured = torch.tensor(add([section.gram(scalars.pairs) for section in sections]), dtype=torch.float64)
    torch.testing.assert_close(measured, torch.tensor(scalars.gram, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert skipped >= steps // 6
    assert len(pairs) == min(history, steps - 1 - skipped)
    assert torch.equal(point, gather(sections, 0.0))


def test_without_pairs_the_direction_is_steepest_descent_and_forgetting_returns_to_it() -> None:
    history, slot = History().accept([[0.0] * 3, [0.0] * 3, [0.0, 0.0, 4.0]], 5, math.inf)
    assert (slot, history.direction()) == (None, ((-1.0,), -4.0))
    history, slot = history.accept([[1.0, 2.0, 0.5], [2.0, 5.0, 1.0], [0.5, 1.0, 9.0]], 5, 1e-12)
    assert (slot, history.pairs) == (0, (0,))
    assert history.forgotten().direction() == ((-1.0,), -9.0)


GROUPS = (Penalty(0, 9, l2=0.5), Penalty(9, 20, l1=0.3), Penalty(24, N, low=-0.4, high=0.25))
"""Entries 20 to 23 have neither penalty nor bound."""


def penalty_of(entry: int) -> Penalty:
    return next((group for group in GROUPS if group.start <= entry < group.stop), Penalty(entry, entry + 1))


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


def reduced(entry: int, x: float, g: float) -> float:
    """The subgradient of smallest norm with L1, the gradient without what an active bound blocks."""
    group = penalty_of(entry)
    if group.l1:
        return g + group.l1 * sign(x) if x else sign(g) * max(0.0, abs(g) - group.l1)
    return 0.0 if (x <= group.low and g > 0) or (x >= group.high and g < 0) else g


def aligned(entry: int, d: float, x: float, g: float) -> float:
    if penalty_of(entry).l1:
        return d if d * reduced(entry, x, g) < 0 else 0.0
    return 0.0 if g and not reduced(entry, x, g) else d


def kept(entry: int, trial: float, x: float, g: float) -> float:
    """The trial in the orthant of x, or of -p, and between the bounds."""
    group = penalty_of(entry)
    if group.l1:
        return trial if sign(trial) == (sign(x) or -sign(reduced(entry, x, g))) else 0.0
    return min(max(trial, group.low), group.high)


def entrywise(function: Callable[..., float], *vectors: Tensor) -> Tensor:
    entries = zip(*(vector.tolist() for vector in vectors), strict=True)
    return torch.tensor([function(entry, *values) for entry, values in enumerate(entries)], dtype=torch.float64)


def pieces(shards: int) -> list[list[Penalty]]:
    """The groups as every section sees its part of them."""
    return [
        [
            Penalty(start - span.start, stop - span.start, group.l2, group.l1, group.low, group.high)
            for group in GROUPS
            if (start := max(group.start, span.start)) < (stop := min(group.stop, span.stop))
        ]
        for span in cut(N, shards)
    ]


@pytest.mark.parametrize("shards", [1, 4])
def test_a_seal_measures_what_the_formulas_say_for_every_group_of_entries(
    shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "CHUNK", 4)
    torch.manual_seed(3)
    x = torch.randn(N, dtype=torch.float64) * (torch.rand(N) > 0.3)
    x[24:] = x[24:].clamp(-0.4, 0.25)
    spans = cut(N, shards)
    sections = [
        Basis(x[span.start : span.stop].clone(), 3, own) for span, own in zip(spans, pieces(shards), strict=True)
    ]

    def seal(t: float, gradient: Tensor, pairs: Sequence[int], *, whole: bool = False) -> Sealed:
        for section, span in zip(sections, spans, strict=True):
            section.open()
            section.add(5 * gradient[span.start : span.stop])
        return merge([section.seal(t, 5, pairs, whole=whole) for section in sections])

    def step(step: Step) -> None:
        for section in sections:
            section.step(step)

    l2 = torch.tensor([penalty_of(entry).l2 for entry in range(N)], dtype=torch.float64)
    l1 = torch.tensor([penalty_of(entry).l1 for entry in range(N)], dtype=torch.float64)
    g = torch.randn(N, dtype=torch.float64) + l2 * x
    seal(0.0, g - l2 * x, ())
    step(Step(True, 0.0, None, (), (-1.0,)))
    pairs: list[tuple[Tensor, Tensor]] = []
    coefficients = [-1.0]
    for t in (0.3, 0.7, 0.2):
        p = entrywise(reduced, x, g)
        rows = [s for s, _ in pairs] + [y for _, y in pairs]
        raw = torch.tensor(coefficients, dtype=torch.float64) @ torch.stack([*rows, p])
        d = entrywise(aligned, raw, x, g)
        new_x = entrywise(kept, x + t * d, x, g)
        assert apart(gather(sections, t), new_x) < 1e-15
        data = torch.randn(N, dtype=torch.float64)
        new_g = data + l2 * new_x
        kept_pairs = tuple(range(len(pairs)))
        sealed, whole = seal(t, data, kept_pairs), seal(t, data, kept_pairs, whole=True)
        new_p, s, y = entrywise(reduced, new_x, new_g), new_x - x, new_g - g
        expected = torch.stack([s, y, new_p]) @ torch.stack([*rows, s, y, new_p]).T
        torch.testing.assert_close(torch.tensor(sealed.rows, dtype=torch.float64), expected, rtol=1e-12, atol=1e-12)
        vectors = torch.stack([*rows, s, y, new_p])
        everything = torch.tensor(whole.rows, dtype=torch.float64)
        torch.testing.assert_close(everything, vectors @ vectors.T, rtol=1e-12, atol=1e-12)
        assert sealed.slope == pytest.approx((d @ new_g).item(), abs=1e-12)
        assert sealed.raw_slope == pytest.approx((raw @ p).item(), abs=1e-12)
        assert sealed.decrease == pytest.approx((p @ s).item(), abs=1e-12)
        assert sealed.largest_gradient == pytest.approx(new_p.abs().max().item(), rel=1e-15)
        assert sealed.square == pytest.approx((l2 @ new_x**2).item(), rel=1e-12)
        assert sealed.absolute == pytest.approx((l1 @ new_x.abs()).item(), rel=1e-12)
        assert sealed.finite
        slot = len(pairs)
        pairs.append((s, y))
        x, g = new_x, new_g
        coefficients = torch.randn(2 * len(pairs) + 1).tolist()
        step(Step(True, t, slot, tuple(range(len(pairs))), tuple(coefficients)))
    assert not seal(0.1, torch.full((N,), math.nan, dtype=torch.float64), (0, 1, 2)).finite


def test_a_start_outside_the_bounds_is_moved_to_them_by_the_first_step() -> None:
    section = Basis(torch.tensor([-3.0, 0.1, 5.0]), 2, [Penalty(0, 3, low=-1.0, high=2.0)])
    section.open()
    section.seal(0.0, 1, ())
    section.step(Step(True, 0.0, None, (), (-1.0,)))
    out = torch.empty(3)
    section.trial(0.0, out)
    assert out.tolist() == pytest.approx([-1.0, 0.1, 2.0])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_inner_products_are_of_the_pairs_as_they_are_stored(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    section = Basis(torch.randn(N, dtype=torch.float64), 2, (), stored)
    section.open()
    section.add(torch.randn(N, dtype=torch.float64))
    section.seal(0.0, 1, ())
    section.step(Step(True, 0.0, None, (), (-1.0,)))
    section.open()
    section.add(torch.randn(N, dtype=torch.float64))
    rows = section.seal(0.3, 1, ()).rows
    section.step(Step(True, 0.3, 1, (1,), (0.0, 0.0, -1.0)))
    kept = section.vectors()
    assert kept["s1"].dtype == kept["y1"].dtype == stored
    vectors = torch.stack([kept["s1"].double(), kept["y1"].double(), kept["gradient"]])
    torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), vectors @ vectors.T, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.tensor(section.gram((1,)), dtype=torch.float64), vectors @ vectors.T, rtol=1e-13, atol=0
    )


def test_a_step_that_is_short_beside_the_parameters_is_measured_as_it_was_meant() -> None:
    """Between 1e6 and the next number of float32 there is a sixteenth."""
    torch.manual_seed(0)
    section, gradient = Basis(torch.full((N,), 1e6), 2), torch.randn(N)
    section.open()
    section.add(gradient)
    section.seal(0.0, 1, ())
    section.step(Step(True, 0.0, None, (), (-1.0,)))
    square = section.seal(0.25, 1, ()).rows[0][0]
    assert square == pytest.approx(float((0.25 * gradient.double()).square().sum()), rel=1e-6)


def test_what_is_loaded_is_all_there_is_then() -> None:
    section = Basis(torch.zeros(3), 2)
    for kept in ({"gradient": [2.0] * 3, "s0": [3.0] * 3, "y0": [4.0] * 3}, {"s1": [5.0] * 3, "y1": [6.0] * 3}):
        section.load({name: torch.tensor(values) for name, values in kept.items()})
        assert {name: vector.tolist() for name, vector in section.vectors().items()} == {"gradient": [0.0] * 3} | kept
    section.step(Step(False, 0.0, None, (0, 1), (0.0,) * 5))
    assert section.vectors()["s0"].tolist() == [0.0] * 3


def reachable(section: Basis, parameters: Tensor) -> int:
    """Bytes of all memory that the tensors of the section share."""
    tensors = [value for value in vars(section).values() if isinstance(value, Tensor)]
    assert any(tensor.data_ptr() == parameters.data_ptr() for tensor in tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("history", [1, 10])
@pytest.mark.parametrize(
    ("dtype", "stored", "words"),
    [(torch.float32, None, 4), (torch.float64, None, 8), (torch.float32, torch.bfloat16, 2)],
)
def test_the_memory_is_what_the_contract_says(
    dtype: torch.dtype, stored: torch.dtype | None, words: int, history: int
) -> None:
    n = 100_000
    parameters = torch.zeros(n, dtype=dtype)
    section = Basis(parameters, history, (), stored)
    expected = n * (2 * history * words + 3 * dtype.itemsize + 8)
    assert reachable(section, parameters) == expected + (2 * history + 3) * basis.CHUNK * 8
    section.open()
    section.add(torch.ones(n, dtype=dtype))
    section.seal(0.0, 1, ())
    section.step(Step(True, 0.0, 0, (0,), (0.0, 0.0, -1.0)))
    assert reachable(section, parameters) == expected + (2 * history + 3) * basis.CHUNK * 8


def test_vectors_of_another_algorithm_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"momentum, s7 are none of an L-BFGS history of 2 pairs; resume with"):
        Basis(torch.zeros(3), 2).load({"gradient": torch.zeros(3), "s7": torch.zeros(3), "momentum": torch.zeros(3)})
