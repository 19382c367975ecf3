# SPDX-License-Identifier: Apache-2.0
"""Laws: no cut is fairer than that of `fairest`; the work counted is that of the textbook."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from distbelief.errors import ConfigurationError
from distbelief.partition.balance import fairest, measure

NUMBERS = st.integers(0, 20)


def dearest(edges: tuple[int, ...], costs: list[int], crossing: list[int]) -> float:
    """What the dearest run costs."""
    runs = itertools.pairwise(edges)
    return max(sum(costs[start:stop]) + crossing[start] + crossing[stop] for start, stop in runs)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_cut_has_a_cheaper_dearest_run(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 8))
    parts = data.draw(st.integers(1, min(5, length)))
    costs = data.draw(st.lists(NUMBERS, min_size=length, max_size=length))
    crossing = data.draw(st.lists(NUMBERS, min_size=length + 1, max_size=length + 1))
    every = [(0, *inner, length) for inner in itertools.combinations(range(1, length), parts - 1)]
    found = tuple(fairest(costs, parts, crossing))
    assert found in every
    assert dearest(found, costs, crossing) == min(dearest(edges, costs, crossing) for edges in every)


def test_one_to_nine_in_three_runs() -> None:
    assert fairest(range(1, 10), 3) == [0, 5, 7, 9]


def test_four_hundred_layers_are_cut_into_sixteen_runs() -> None:
    edges = fairest([float(cost) for cost in range(1, 400)], 16)
    runs = [sum(range(start + 1, stop + 1)) for start, stop in itertools.pairwise(edges)]
    assert sum(runs) == 399 * 400 / 2
    assert sum(runs) / 16 / max(runs) > 0.95


def measured(model: nn.Module, *shape: int) -> dict[str, tuple[int, int]]:
    """Operations and elements of the result of each call."""
    with torch.device("meta"):
        found = measure(fx.symbolic_trace(model.to("meta")), torch.empty(shape))
    return {node.name: (each.operations, each.elements) for node, each in found.items()}


def test_work_is_that_of_the_formulas() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10, bias=False))
    found = measured(model, 4, 3, 6, 6)
    assert found["_0"] == (2 * 4 * 8 * 36 * 3 * 25, 4 * 8 * 36)
    assert found["_1"] == (0, 4 * 8 * 36)
    assert found["_3"] == (2 * 4 * 8 * 36 * 10, 40)


class Valued(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


def test_a_call_that_needs_values_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"getitem.* cannot be planned without computing it"):
        measured(Valued(), 3)
