# SPDX-License-Identifier: Apache-2.0
"""Rules for calls that only arrange units: reshapes, transposes, slices, and questions about shapes."""

from collections.abc import Callable
from typing import Any

import torch

from distbelief.partition.box import Box, reshaped, sizes, whole
from distbelief.partition.division import Division
from distbelief.partition.rules.whole import Applied, states_in, whole_call
from distbelief.partition.site import Site, State, tensor

KNOWN = ("shape", "dtype", "device", "ndim")
"""Attributes of a tensor that do not depend on its values."""

QUESTIONS = ("size", "dim", "ndimension", "numel", "is_floating_point")
"""Methods of a tensor that do not depend on its values."""


def reshape(site: Site, x: State, *args: Any, **kwargs: Any) -> State:
    """Boxes stay where they are if they are boxes in the new shape, too; else whoever needs the whole arranges it."""
    division, value = x.division, site.call.value
    if division is None or value is None or value.batched != division.batched or _at_hand(site, division):
        return whole_call(site, x, *args, **kwargs)
    images = tuple(None if box is None else reshaped(box, division.shape, value.shape) for box in division.boxes)
    if [box is None for box in images] != [box is None for box in division.boxes]:
        return whole_call(site, x, *args, **kwargs)
    back = {image: box for image, box in zip(images, division.boxes, strict=True) if image is not None}

    def build(box: Box) -> Callable[[torch.Tensor], torch.Tensor]:
        if value.batched:
            return lambda held: held.reshape(held.shape[0], *sizes(box))
        return lambda held: held.reshape(sizes(box))

    return site.compute([x], Division(value.shape, images, value.batched), build, need=lambda box: [back[box]])


def transpose(site: Site, x: State, dim0: int, dim1: int) -> State:
    """Exchange two dimensions behind the batch."""
    order = list(range(_rank(x)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(site, x, order, dim0, dim1)


def permute(site: Site, x: State, *given: Any, dims: Any = ()) -> State:
    """Rearrange the dimensions behind the batch."""
    order = dims or (given if isinstance(given[0], int) else given[0])
    return _permuted(site, x, [dimension % max(1, _rank(x)) for dimension in order], *given, *([dims] if dims else []))


def _permuted(site: Site, x: State, order: list[int], *args: Any) -> State:
    division = x.division
    if division is None or site.call.value is None or _at_hand(site, division) or (division.batched and order[0] != 0):
        return whole_call(site, x, *args)
    behind = [dimension - division.batched for dimension in order[division.batched :]]
    boxes = tuple(None if box is None else tuple(box[dimension] for dimension in behind) for box in division.boxes)

    def need(box: Box) -> list[Box]:
        return [tuple(box[behind.index(dimension)] for dimension in range(len(behind)))]

    return site.compute(
        [x], Division(site.shape, boxes, division.batched), lambda box: lambda held: held.permute(order), need=need
    )


def getitem(site: Site, x: State | tuple[Any, ...], index: Any) -> Any:
    """Slices along dimensions that are not cut; everything else is taken from the whole."""
    if not isinstance(x, State):
        return x[index]  # of the results of a rule that has several
    division, value = x.division, site.call.value
    parts = index if isinstance(index, tuple) else (index,)
    if (
        division is None
        or value is None
        or value.batched != division.batched
        or _at_hand(site, division)
        or not all(isinstance(part, slice) for part in parts)
        or (division.batched and parts[0] != slice(None))
    ):
        return whole_call(site, x, index)
    sliced = [part != slice(None) for part in parts[division.batched :]]
    sliced += [False] * (len(division.shape) - len(sliced))
    if any(division.is_cut(dimension) for dimension, narrower in enumerate(sliced) if narrower):
        return whole_call(site, x, index)
    there = zip(sliced, division.shape, strict=True)
    needed = [(0, length) if narrower else None for narrower, length in there]
    boxes = tuple(
        None
        if box is None
        else tuple(end if known else side for known, side, end in zip(needed, box, whole(value.shape), strict=True))
        for box in division.boxes
    )
    inputs = states_in((x, index, site.evaluating))
    return site.compute(
        inputs, Division(value.shape, boxes, value.batched), lambda box: Applied(site, inputs, (x, index), {}),
        need=lambda box: [
            tuple(known or side for known, side in zip(needed, box, strict=True)), *[None] * (len(inputs) - 1)
        ],
    )  # fmt: skip


def shape_of(site: Site, x: State, *args: Any) -> State:
    """What a shape says is known to everybody, from the mini-batch and the plan."""
    if x.division is None or (site.call.kind == "call_function" and args[0] not in KNOWN):
        return whole_call(site, x, *args)
    division, dtype, target = tensor(x), x.dtype, site.call.target

    def build() -> Callable[[torch.Tensor], Any]:
        def answer(source: torch.Tensor) -> Any:
            shape = (*source.shape[:1], *division.shape) if division.batched else division.shape
            like = torch.empty(shape, dtype=dtype, device="meta")
            if target is getattr:
                return source.device if args[0] == "device" else getattr(like, args[0])
            return getattr(like, target)(*args)

        return answer

    return site.lazily([site.source], build)


def _at_hand(site: Site, division: Division) -> bool:
    """Whether everybody has the whole, so that there is nothing to follow; or the user asked for something else."""
    return site.cut is not None or (division.everywhere and site.partitions > 1)


def _rank(x: State) -> int:
    return 0 if x.division is None else len(x.division.shape) + x.division.batched
