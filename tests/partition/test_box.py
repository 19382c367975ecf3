# SPDX-License-Identifier: Apache-2.0
"""Laws of boxes, against sets of units."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from distbelief.partition.box import (
    Box,
    count,
    field,
    inside,
    intersect,
    near_square,
    reshaped,
    sizes,
    split,
    tiles,
    union,
    whole,
)  # fmt: skip
from distbelief.partition.division import Division, along, at, everywhere, in_tiles

RANGES = some.tuples(some.integers(-3, 6), some.integers(1, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
BOXES = some.tuples(RANGES, RANGES, RANGES)
SHAPES = some.lists(some.integers(1, 5), min_size=1, max_size=4).map(tuple)


def units(box: Box | None) -> set[tuple[int, ...]]:
    return set() if box is None else set(itertools.product(*(range(*side) for side in box)))


@given(BOXES, BOXES)
def test_boxes_intersect_in_their_common_units_and_their_union_is_the_smallest_box_around_both(a: Box, b: Box) -> None:
    assert units(intersect(a, b)) == units(a) & units(b)
    assert count(intersect(a, b)) == len(units(a) & units(b))
    around = union([a, None, b])
    assert around is not None
    assert units(around) >= units(a) | units(b)
    assert all({low, high} <= {*x, *y} for (low, high), x, y in zip(around, a, b, strict=True))


def test_nothing_intersects_with_nothing_and_the_box_without_dimensions_has_one_unit() -> None:
    assert intersect(None, ((0, 1),)) is None
    assert union([None, None]) is None
    assert (count(None), count(()), intersect((), ())) == (0, 1, ())


@given(BOXES, some.data())
def test_the_index_of_a_box_finds_its_units_in_a_tensor_of_an_outer_box(outer: Box, data: some.DataObject) -> None:
    low_high = [data.draw(some.tuples(some.integers(*side), some.integers(*side)).map(sorted)) for side in outer]
    box = tuple((low, high) for low, high in low_high)
    assume(count(box))
    names = torch.tensor([hash(unit) % 2**31 for unit in sorted(units(outer))]).reshape(sizes(outer))
    assert names[inside(box, outer)].flatten().tolist() == [hash(unit) % 2**31 for unit in sorted(units(box))]


@given(some.integers(0, 60), some.integers(1, 12), some.integers(1, 5))
def test_a_split_covers_all_units_in_order_and_parts_differ_by_one_unit_at_most(
    units_: int, parts: int, unit: int
) -> None:
    ranges = split(units_ * unit, parts, unit)
    assert [place for low, high in ranges for place in range(low, high)] == list(range(units_ * unit))
    lengths = {high - low for low, high in ranges}
    assert max(lengths) - min(lengths) <= unit
    assert all(length % unit == 0 for length in lengths)


@given(some.tuples(some.integers(1, 9), some.integers(1, 9)), some.tuples(some.integers(1, 4), some.integers(1, 4)))
def test_tiles_are_disjoint_and_cover(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    boxes = tiles(shape, grid)
    assert len(boxes) == math.prod(grid)
    assert sum(map(count, boxes)) == math.prod(shape)
    assert set().union(*map(units, boxes)) == units(whole(shape))


def test_a_near_square_grid_has_the_smallest_difference_of_sides() -> None:
    assert [near_square(parts) for parts in (1, 2, 3, 4, 6, 7, 9, 12, 16, 81)] == [
        (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (1, 7), (3, 3), (3, 4), (4, 4), (9, 9),
    ]  # fmt: skip


@given(RANGES, *(some.integers(1, 4) for _ in range(4)))
def test_a_field_spans_all_inputs_that_some_output_sees(
    outputs: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int
) -> None:
    seen = {out * stride - padding + dilation * tap for out in range(*outputs) for tap in range(kernel)}
    assert field(outputs, kernel, stride, padding, dilation) == (min(seen), max(seen) + 1)


@settings(deadline=None)
@given(SHAPES, SHAPES, some.data())
def test_a_reshaped_box_holds_the_same_units_and_is_found_whenever_there_is_one(
    shape: tuple[int, ...], groups: tuple[int, ...], data: some.DataObject
) -> None:
    length = math.prod(shape)
    target = []
    for size in groups:
        size = math.gcd(size, length)
        target, length = [*target, size], length // size
    target.append(length)
    box = tuple(
        tuple(sorted(data.draw(some.lists(some.integers(0, size), min_size=2, max_size=2, unique=True))))
        for size in shape
    )
    numbers = torch.arange(math.prod(shape))
    mine = set(numbers.reshape(shape)[inside(box, whole(shape))].flatten().tolist())  # type: ignore[arg-type]
    image = reshaped(box, shape, target)  # type: ignore[arg-type]
    there = numbers.reshape(target)
    if image is not None:
        assert set(there[inside(image, whole(target))].flatten().tolist()) == mine
    else:
        # A run of dimensions that holds no box does not do so in the reshape of the whole either.
        places = torch.stack([(there == number).nonzero()[0] for number in sorted(mine)])
        around = places.max(0).values - places.min(0).values + 1
        assert math.prod(around.tolist()) != len(mine)


@pytest.mark.parametrize("partitions", [1, 2, 3, 5])
def test_divisions_say_who_holds_what(partitions: int) -> None:
    assert everywhere((4, 6), partitions).everywhere
    assert at((4, 6), partitions - 1, partitions).owner == partitions - 1
    cut = along((4, 6), -1, partitions)
    assert (cut.is_cut(0), cut.is_cut(1)) == (False, partitions > 1)
    assert cut.everywhere == (partitions == 1)
    assert sum(map(count, cut.boxes)) == 24


def test_a_division_is_carried_to_another_shape_tile_by_tile() -> None:
    cut = in_tiles((3, 9, 7), (1, 2, 2), 4)
    carried = cut.carried((3, 5, 7))
    assert carried == Division(
        (3, 5, 7),
        (((0, 3), (0, 3), (0, 4)), ((0, 3), (0, 3), (4, 7)), ((0, 3), (3, 5), (0, 4)), ((0, 3), (3, 5), (4, 7))),
    )
    assert [box is None for box in cut.carried((3, 1, 7)).boxes] == [False, False, True, True]
    assert at((2, 8), 1, 3).carried((2, 3)) == at((2, 3), 1, 3)
    assert everywhere((5,), 2).carried((4,)) == everywhere((4,), 2)
