# SPDX-License-Identifier: Apache-2.0
"""A plan in a picture: which partition holds which part of each layer, and how much falls to each. An optional extra.

input ->  [ conv1 ]  [ conv2 ]  [ fc6 ]  [ fc8 ]       tiles, channels or units, coloured by partition
          [ parameters ]  [ FLOPs ]  [ in and out ]    a bar for each partition
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbelief.errors import ConfigurationError
from distbelief.report.plan import Box, LayerRow, PlanTable, balance, scaled
from distbelief.report.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 6
"""Layers in a row of the picture."""
MOST_LAYERS = 36
"""Layers drawn: the last ones of a longer model are left out, and counted."""
NAME_LENGTH = 22
NUMBERED = 0.06
"""A box is numbered when both its sides are at least this share of the panel."""

Rectangle = tuple[float, float, float, float]
"""Left, top, width, height, in shares of a panel."""


def plan_picture(plan: PlanTable, path: Path) -> None:
    """Draw the plan into a PNG file. Raises ConfigurationError when matplotlib is not installed, or for its path."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ConfigurationError(
            "a picture needs matplotlib, which is not installed", hint="pip install 'distbelief[plots]'"
        ) from missing
    drawn = shown(plan.layers)
    layers, left_out = drawn[:MOST_LAYERS], len(drawn[MOST_LAYERS:])
    lines = math.ceil(len(layers) / ACROSS)
    figure = Figure(figsize=(10, 2.1 * lines + 2.4), layout="constrained")
    more = f"; {left_out} more layers" if left_out else ""
    figure.suptitle(f"{plan.model}, cut by {plan.kind}{more}", fontsize="medium", x=0.02, ha="left")
    halves: Any = figure.subfigures(2, 1, height_ratios=[2.1 * lines, 2.2])
    above, below = halves
    panels = above.subplots(lines, ACROSS, squeeze=False).flat
    for panel, layer in zip(panels, [*layers, *[None] * (lines * ACROSS - len(layers))], strict=True):
        panel.set_axis_off()
        if layer is not None:
            _draw(panel, layer)
    _bars(below, plan)
    try:
        figure.savefig(path, dpi=130, format="png")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the picture: {error}", hint="give a path in a folder that is there: --picture plan.png"
        ) from error


def shown(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Without what is cut as the layer before it: activations, normalisation. Of many only those with parameters."""
    found = [
        layer
        for before, layer in zip([None, *layers], layers, strict=False)
        if layer.parameters or before is None or (layer.shape, layer.boxes) != (before.shape, before.boxes)
    ]
    return found if len(found) <= MOST_LAYERS else [layer for layer in found if layer.parameters]


def rectangles(layer: LayerRow) -> list[tuple[int, Rectangle]]:
    """The boxes as they are drawn, by partition: of a plane its tiles, else channels or units from top to bottom."""
    down, across = _sides(layer)
    found: list[tuple[int, Rectangle]] = []
    for partition, box in enumerate(layer.boxes):
        if box is not None:
            top, bottom = _share(layer, box, down)
            left, right = _share(layer, box, across)
            found.append((partition, (left, top, right - left, bottom - top)))
    return found


def _sides(layer: LayerRow) -> tuple[int | None, int | None]:
    """The dimensions drawn downwards and across."""
    if layer.shape is None or not layer.shape:
        return None, None
    cut = [
        dimension
        for dimension in range(len(layer.shape))
        if any(box is not None and box[dimension] != (0, layer.shape[dimension]) for box in layer.boxes)
    ]
    last = len(layer.shape) - 1
    if last >= 2 and (not cut or cut[-1] >= last - 1):
        return last - 1, last
    if len(cut) > 1:
        return cut[0], cut[1]
    return (cut[0] if cut else 0), None


def _share(layer: LayerRow, box: Box, dimension: int | None) -> tuple[float, float]:
    if dimension is None or layer.shape is None:
        return 0.0, 1.0
    low, high = box[dimension]
    return low / layer.shape[dimension], high / layer.shape[dimension]


def _draw(panel: "Axes", layer: LayerRow) -> None:
    from matplotlib.patches import Rectangle as Patch

    _, across = _sides(layer)
    width = 1.0 if across is not None or layer.shape is None else 0.3
    whole = [item for item in rectangles(layer) if item[1] == (0.0, 0.0, 1.0, 1.0)]
    boxes = whole[:1] if len(whole) > 1 else rectangles(layer)
    for partition, (left, top, wide, high) in boxes:
        colour = "#cccccc" if len(whole) > 1 else _colour(partition, len(layer.boxes))
        panel.add_patch(Patch((left * width, top), wide * width, high, facecolor=colour, edgecolor="white"))
        if wide * width >= NUMBERED and high >= NUMBERED:
            name = "all" if len(whole) > 1 else str(partition)
            middle = ((left + wide / 2) * width, top + high / 2)
            panel.text(*middle, name, ha="center", va="center", color="white", fontsize="small")
    panel.set_xlim(0, 1)
    panel.set_ylim(1, 0)
    panel.set_aspect("equal")
    shape = "" if layer.shape is None else " x ".join(map(str, layer.shape))
    name = layer.name if len(layer.name) <= NAME_LENGTH else f"...{layer.name[3 - NAME_LENGTH :]}"
    panel.set_title(f"{name}\n{shape}", fontsize="small", loc="left")


def _bars(figure: "Figure", plan: PlanTable) -> None:
    rows = plan.partitions
    places = range(len(rows))
    colours = [_colour(index, len(rows)) for index in places]
    amounts: dict[str, list[float]] = {
        "parameters": [row.parameters for row in rows],
        "FLOPs": [row.operations for row in rows],
        "bytes in and out": [row.bytes_in + row.bytes_out for row in rows],
    }
    for panel, (name, numbers) in zip(figure.subplots(1, 3), amounts.items(), strict=True):
        panel.bar(places, numbers, color=colours)
        evenness = f", mean / largest {balance(numbers):.2f}" if any(numbers) else ""
        panel.set_title(f"{name}{evenness}", fontsize="small", loc="left")
        panel.yaxis.set_major_formatter(lambda value, _: scaled(value, ""))
        panel.tick_params(labelsize="small")
        panel.set_xlabel("partition", fontsize="small")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.25, axis="y")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)


def _colour(partition: int, partitions: int) -> str:
    if partitions <= len(COLOURS):
        return COLOURS[partition]
    from matplotlib import colormaps, colors

    # Neighbours on the plane lie far apart on the map.
    return colors.to_hex(colormaps["turbo"](0.08 + 0.84 * ((partition * 0.618034) % 1)))
