# SPDX-License-Identifier: Apache-2.0
"""The plan of a partitioned model as people read it: who holds and does how much, and how each layer is cut.

A `PlanTable` holds plain numbers; it is printed by `plan_text` and drawn by `plan_picture`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distbelief.report.words import count

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PartitionRow:
    """What one partition holds and does."""

    parameters: int
    memory_bytes: int
    operations: int
    """Floating-point operations of a forward pass per example."""
    bytes_in: float
    """States that arrive in a forward pass, per example; as much leaves in the backward pass."""
    bytes_out: float
    messages: int
    """Sent and received in a forward pass."""


@dataclass(frozen=True)
class LayerRow:
    """How one step of the forward pass is divided."""

    name: str
    shape: tuple[int, ...] | None
    """Of its result, without the batch; None where the plan does not know it."""
    boxes: tuple[Box | None, ...]
    """The part of the result that each partition computes; None for nothing."""
    parameters: int = 0
    """Trainable ones, on all partitions together."""

    @property
    def owner(self) -> int | None:
        """The one partition that does it, if it is one."""
        busy = [partition for partition, box in enumerate(self.boxes) if box is not None]
        return busy[0] if len(busy) == 1 else None


@dataclass(frozen=True)
class PlanTable:
    """A model's plan in plain numbers."""

    model: str
    kind: str
    """`units` or `stages`."""
    batch_size: int
    partitions: tuple[PartitionRow, ...]
    layers: tuple[LayerRow, ...]


def balance(amounts: Sequence[float]) -> float:
    """Mean over largest: 1 when all have equally much."""
    return sum(amounts) / len(amounts) / max(amounts) if any(amounts) else 1.0


def plan_text(plan: PlanTable) -> str:
    """The tables, in plain text."""
    partitions = plan.partitions
    header = ["partition", "parameters", "memory", "FLOPs", "in", "out", "messages"]
    rows = [
        [
            str(index), f"{one.parameters:,}", scaled(one.memory_bytes, "B"), scaled(one.operations, ""),
            scaled(one.bytes_in, "B"), scaled(one.bytes_out, "B"), f"{one.messages:,}",
        ]
        for index, one in enumerate(partitions)
    ]  # fmt: skip
    largest = max(range(len(partitions)), key=lambda index: partitions[index].operations)
    return "\n".join(
        [
            f"{plan.model}, cut by {plan.kind} for {count(len(partitions), 'partition')} and mini-batches of "
            f"{plan.batch_size:,}",
            "",
            *_aligned([header, *rows]),
            "",
            f"balance     FLOPs {balance([one.operations for one in partitions]):.3f}, "
            f"parameters {balance([one.parameters for one in partitions]):.3f} (mean / largest); "
            f"partition {largest} computes most",
            "memory      parameters and gradients twice each, frozen ones, buffers, and the states of a mini-batch",
            "FLOPs       of the matrix products, per example, forward; backward they are twice as many",
            "in, out     states that cross to and from others, per example, forward; backward as much the other way",
            "messages    sent and received in a forward pass over a mini-batch",
            "",
            *_aligned(
                [
                    ["layer", "parameters", "result", "cut"],
                    *([row.name, f"{row.parameters:,}", _shape(row), _cut(row)] for row in plan.layers),
                ]
            ),
        ]
    )


def scaled(number: float, unit: str) -> str:
    """Three digits and a prefix: 1.23 MB."""
    power = 0
    while number >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".strip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers to the right, words to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = {0, *(column for column, title in enumerate(rows[0]) if title in ("result", "cut"))}
    return [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shape(row: LayerRow) -> str:
    return "" if row.shape is None else " x ".join(map(str, row.shape)) or "1"


def _cut(row: LayerRow) -> str:
    """In words: 2 x 2 tiles of 32 x 32, 4 parts of 640, on 3."""
    if row.owner is not None:
        return f"on {row.owner}" if len(row.boxes) > 1 else "whole"
    busy = [box for box in row.boxes if box is not None]
    if row.shape is None or all(box == busy[0] for box in busy):
        return "whole on each"
    sides = [side for side in zip(*busy, strict=True) if len(set(side)) > 1]
    numbers = " x ".join(str(len(set(side))) for side in sides)
    sizes = " x ".join(_range([high - low for low, high in side]) for side in sides)
    idle = [str(partition) for partition, box in enumerate(row.boxes) if box is None]
    kind = "parts" if len(sides) == 1 else "tiles"
    return f"{numbers} {kind} of {sizes}" + (f", none on {', '.join(idle)}" if idle else "")


def _range(lengths: Sequence[int]) -> str:
    return str(min(lengths)) if min(lengths) == max(lengths) else f"{min(lengths)}..{max(lengths)}"
