# SPDX-License-Identifier: Apache-2.0
"""Boxes of units: pure arithmetic.

A box is a half-open range per dimension, batch left out: ((0, 8), (16, 32), (0, 32)) are eight channels of the second
half of a plane's rows. A box may reach outside its layer; what lies there is padding. Where a partition has nothing at
all, None stands for the box.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

Range = tuple[int, int]
Box = tuple[Range, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of everything."""
    return tuple((0, length) for length in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a tensor that holds the box."""
    return tuple(high - low for low, high in box)


def count(box: Box | None) -> int:
    """Number of units; 0 for None, 1 for the box without dimensions."""
    return 0 if box is None else math.prod(sizes(box))


def intersect(one: Box | None, other: Box | None) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    if one is None or other is None:
        return None
    both = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return both if all(high > low for low, high in both) else None


def union(boxes: Iterable[Box | None]) -> Box | None:
    """The smallest box around all of them."""
    some = [box for box in boxes if box is not None]
    if not some:
        return None
    return tuple((min(low for low, _ in side), max(high for _, high in side)) for side in zip(*some, strict=True))


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of `box` in a tensor that holds `outer`, both without a batch."""
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(box, outer, strict=True))


def split(length: int, parts: int, unit: int = 1) -> list[Range]:
    """Cut [0, length) into consecutive ranges of whole units, equal but for one unit more in the first ones."""
    size, rest = divmod(length // unit, parts)
    edges = [0, *itertools.accumulate((size + (part < rest)) * unit for part in range(parts))]
    return list(itertools.pairwise(edges))


def tiles(shape: Sequence[int], grid: Sequence[int]) -> list[Box | None]:
    """`shape` cut evenly into `grid` parts per dimension, row by row; None where a dimension has fewer units."""
    cut = itertools.product(*(split(length, parts) for length, parts in zip(shape, grid, strict=True)))
    return [box if count(box) else None for box in cut]


def near_square(parts: int) -> tuple[int, int]:
    """The most nearly square grid of so many tiles, with at least as many columns as rows."""
    rows = next(rows for rows in range(math.isqrt(parts), 0, -1) if parts % rows == 0)
    return rows, parts // rows


def field(outputs: Range, kernel: int, stride: int, padding: int, dilation: int = 1) -> Range:
    """The receptive field of a range of outputs along one dimension; it may reach into the padding."""
    low, high = outputs
    return low * stride - padding, (high - 1) * stride - padding + dilation * (kernel - 1) + 1


def reshaped(box: Box, shape: Sequence[int], target: Sequence[int]) -> Box | None:
    """The box of a tensor of `shape` after a reshape to `target`; None where its units make no box there."""
    image: list[Range] = []
    dimension = place = 0
    while dimension < len(shape) or place < len(target):
        # The shortest runs of dimensions, in both shapes, with equally many units.
        start, first = dimension, place
        here = there = 1
        while here != there or (dimension, place) == (start, first):
            if here <= there and dimension < len(shape):
                here, dimension = here * shape[dimension], dimension + 1
            elif place < len(target):
                there, place = there * target[place], place + 1
            else:
                here, dimension = here * shape[dimension], dimension + 1
        run = _run(box[start:dimension], shape[start:dimension])
        part = None if run is None else _box_of_run(run, target[first:place])
        if part is None:
            return None
        image += part
    return tuple(image)


def _run(box: Box, shape: Sequence[int]) -> Range | None:
    """The box as a range of the flattened units; None where it is not one."""
    low, length = 0, 1
    open_ended = False
    for (start, stop), size in zip(box, shape, strict=True):
        if open_ended and (start, stop) != (0, size):
            return None
        low, length = low * size + start, length * (stop - start)
        open_ended |= stop - start > 1
    return low, low + length


def _box_of_run(run: Range, shape: Sequence[int]) -> Box | None:
    """The range of flattened units as a box; None where it is not one."""
    low, high = run
    for dimension in range(len(shape)):
        inner = math.prod(shape[dimension + 1 :])
        first, last = low // inner, (high - 1) // inner
        if low % inner == high % inner == 0 and first // shape[dimension] == last // shape[dimension]:
            box: list[Range] = [(first % shape[dimension], last % shape[dimension] + 1)]
            outer = first // shape[dimension]
            for size in reversed(shape[:dimension]):
                box.insert(0, (outer % size, outer % size + 1))
                outer //= size
            return (*box, *whole(shape[dimension + 1 :]))
    return () if not shape else None
