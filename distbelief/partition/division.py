# SPDX-License-Identifier: Apache-2.0
"""Divisions: which partition holds which box of a value."""

from collections.abc import Sequence
from dataclasses import dataclass

from distbelief.partition.box import Box, Range, split, tiles, whole


@dataclass(frozen=True)
class Division:
    """Who holds which box of a value: disjoint boxes that cover it, or everybody the whole."""

    shape: tuple[int, ...]
    """Of the whole value, without the batch."""
    boxes: tuple[Box | None, ...]
    """Per partition; None for nothing."""
    batched: bool = True
    """Whether a batch stands in front of `shape`; a parameter has none."""

    @property
    def everywhere(self) -> bool:
        """Whether each partition can have the whole without asking."""
        return all(box == whole(self.shape) for box in self.boxes)

    @property
    def owner(self) -> int | None:
        """The one partition that holds anything, if there is one."""
        holders = [partition for partition, box in enumerate(self.boxes) if box is not None]
        return holders[0] if len(holders) == 1 else None

    def is_cut(self, dimension: int) -> bool:
        """Whether somebody holds a part of the dimension only."""
        return any(box is not None and box[dimension] != (0, self.shape[dimension]) for box in self.boxes)

    def carried(self, shape: Sequence[int]) -> "Division":
        """The same cut of another shape of so many dimensions.

        Dimensions of unchanged length keep their ranges; others are cut evenly into as many, in the same order.
        """
        maps: list[dict[Range, Range]] = []
        for dimension, length in enumerate(shape):
            ranges = sorted({box[dimension] for box in self.boxes if box is not None})
            same = length == self.shape[dimension]
            maps.append(dict(zip(ranges, ranges if same else split(length, len(ranges)), strict=True)))
        boxes = tuple(
            None if box is None else tuple(known[side] for known, side in zip(maps, box, strict=True))
            for box in self.boxes
        )
        return Division(tuple(shape), tuple(box if box and _some(box) else None for box in boxes), self.batched)


def _some(box: Box) -> bool:
    return all(high > low for low, high in box)


def in_tiles(shape: Sequence[int], parts: Sequence[int], partitions: int) -> Division:
    """`shape` cut evenly into so many `parts` per dimension; partitions beyond them hold nothing."""
    boxes = tiles(shape, parts)
    return Division(tuple(shape), (*boxes, *[None] * (partitions - len(boxes))))


def along(shape: Sequence[int], dimension: int, partitions: int, *, unit: int = 1, batched: bool = True) -> Division:
    """`shape` cut along one dimension into whole units."""
    dimension %= len(shape)
    boxes = [
        None if low == high else (*whole(shape[:dimension]), (low, high), *whole(shape[dimension + 1 :]))
        for low, high in split(shape[dimension], partitions, unit)
    ]
    return Division(tuple(shape), tuple(boxes), batched)


def at(shape: Sequence[int], owner: int, partitions: int, *, batched: bool = True) -> Division:
    """`shape` on one partition."""
    boxes = tuple(whole(shape) if partition == owner else None for partition in range(partitions))
    return Division(tuple(shape), boxes, batched)


def everywhere(shape: Sequence[int], partitions: int, *, batched: bool = True) -> Division:
    """`shape` on every partition."""
    return Division(tuple(shape), (whole(shape),) * partitions, batched)
