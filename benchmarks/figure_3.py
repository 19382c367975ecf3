# SPDX-License-Identifier: Apache-2.0
"""Figure 3 of the paper, predicted: speed-up of one model replica against the machines that it spans.

Nothing is run: each model is planned on the meta device for every number of machines, and a mini-batch takes as long as
the partition that needs longest:

    3 * operations / rate  +  2 * (messages * latency  +  bytes / bandwidth)

forward once and backward twice the operations, the messages and bytes both ways. What is supposed of the machines is
printed. Left out: stragglers, waiting between layers, what is not a matrix product, and computing while sending.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.table import Row, table_text
from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d
from distbelief.partition.units import Numbers, units

MACHINES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81, 96, 128)
QUICK_MACHINES = (1, 16)
BATCH_SIZE, NUMBER_BYTES = 100, 4
FIELD, WINDOW, CLASSES = 10, 5, 21_000
"""Of the vision nets: places on the side of a patch and of the contrast window, and one-vs-all outputs."""


@dataclass(frozen=True)
class Machine:
    """What is supposed of a machine and of the network between machines."""

    name: str
    operations_per_second: float
    bytes_per_second: float
    """In each direction, both at once."""
    message_seconds: float
    """Of a machine's time for each message that it sends or receives, with what it waits for it."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.operations_per_second / 1e9:,.0f} GFLOP/s a machine, "
            f"{self.bytes_per_second * 8 / 1e9:g} Gbit/s each way, {self.message_seconds * 1e6:.0f} us a message"
        )

    def seconds(self, partition: Numbers) -> float:
        """How long one partition takes for a mini-batch, forward and backward."""
        messages = partition.messages_in + partition.messages_out
        elements = max(partition.elements_in, partition.elements_out) * BATCH_SIZE
        return 3 * partition.operations * BATCH_SIZE / self.operations_per_second + 2 * (
            messages * self.message_seconds + elements * NUMBER_BYTES / self.bytes_per_second
        )


SUPPOSED = (
    Machine("a cluster of 2012 (20 cores, gigabit Ethernet)", 100e9, 125e6, 50e-6),
    Machine("a cluster of today (32 cores, 25-gigabit Ethernet)", 1.5e12, 3.125e9, 20e-6),
)


@dataclass(frozen=True)
class Model:
    """A model of the figure."""

    name: str
    module: nn.Module
    """On the meta device."""
    shape: tuple[int, ...]
    """Of an example."""

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def speech() -> nn.Module:
    """The paper's acoustic model, 42 million parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((440, 2560, 2560, 2560, 2560)):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(2560, 8192))


def vision(maps: int, plane: int) -> nn.Module:
    """Three stages of 10 x 10 patches without shared weights, L2 pooling by two, local contrast normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(3):
        local = LocallyConnected2d(channels, maps, plane, FIELD)
        layers += [local, L2Pool2d(2), LocalContrastNorm2d(maps, WINDOW)]
        channels, plane = maps, local.out_plane[0] // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(maps * plane * plane, CLASSES))


def models() -> list[Model]:
    """The paper names the sizes; maps, of the paper's 8 to 36, and planes are chosen to come to them."""
    with torch.device("meta"):
        return [
            Model("speech, 42 million", speech(), (440,)),
            Model("vision, 80 million", vision(16, 100), (3, 100, 100)),
            Model("vision, 330 million", vision(36, 106), (3, 106, 106)),
            Model("vision, 1.7 billion", vision(36, 200), (3, 200, 200)),
        ]


def run(quick: bool) -> list[Row]:
    """Plan every model for every number of machines, print a table for each supposition, return its rows."""
    machines = QUICK_MACHINES if quick else MACHINES
    planned = [(model, {count: _plan(model, count) for count in machines}) for model in models()]
    rows = [row for supposed in SUPPOSED for model, plans in planned for row in _rows(supposed, model, plans)]
    for supposed in SUPPOSED:
        print(_table(supposed, machines, rows), flush=True)
    return rows


def _plan(model: Model, machines: int) -> Sequence[Numbers]:
    sample = torch.empty(BATCH_SIZE, *model.shape, device="meta")
    return units(model.module, sample, machines).numbers


def _rows(supposed: Machine, model: Model, plans: dict[int, Sequence[Numbers]]) -> list[Row]:
    seconds = {count: max(map(supposed.seconds, partitions)) for count, partitions in plans.items()}
    return [
        {
            "supposed": str(supposed),
            "batch_size": BATCH_SIZE,
            "model": model.name,
            "parameters": model.parameters,
            "machines": count,
            "seconds": seconds[count],
            "speed-up": seconds[1] / seconds[count],
            "most_operations_per_example": max(one.operations for one in partitions),
            "most_elements_per_example": max(max(one.elements_in, one.elements_out) for one in partitions),
            "most_messages": max(one.messages_in + one.messages_out for one in partitions),
        }
        for count, partitions in plans.items()
    ]


def _table(supposed: Machine, machines: Sequence[int], rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["supposed"] == str(supposed)]
    names = list(dict.fromkeys(str(row["model"]) for row in mine))
    found = {(row["model"], row["machines"]): float(str(row["speed-up"])) for row in mine}
    lines = [[f"{count:,}", *(f"{found[name, count]:.2f}" for name in names)] for count in machines]
    best = {name: max(machines, key=lambda count, name=name: found[name, count]) for name in names}
    title = f"Predicted speed-up by machines, mini-batches of {BATCH_SIZE}. {supposed}"
    return table_text(title, ["machines", *names], [*lines, ["best at", *(str(best[name]) for name in names)]])


def draw(rows: Sequence[Row], path: Path) -> None:
    """The speed-ups as a picture: a panel for each supposition."""
    from matplotlib.figure import Figure

    suppositions = list(dict.fromkeys(str(row["supposed"]) for row in rows))
    figure = Figure(figsize=(5.2 * len(suppositions), 4.4), layout="constrained")
    panels = figure.subplots(1, len(suppositions), squeeze=False)[0]
    for panel, supposed in zip(panels, suppositions, strict=True):
        mine = [row for row in rows if row["supposed"] == supposed]
        for name in dict.fromkeys(str(row["model"]) for row in mine):
            points = [(row["machines"], row["speed-up"]) for row in mine if row["model"] == name]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        title, _, numbers = supposed.partition(": ")
        panel.set_title(f"{title}\n{numbers}", fontsize="small", loc="left")
        panel.set_xlabel("machines per model replica")
        panel.set_ylabel("predicted speed-up")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130, format="png")
