# SPDX-License-Identifier: Apache-2.0
"""A run in pictures, an optional extra: `pip install 'distbelief[plots]'`.

`over_time.png`       training loss and test metrics over time, with everything that happened
`over_examples.png`   the same over examples: what resuming undid is left out
`staleness.png`       how many pushes were applied at each staleness
`iterations.png`      of Sandblaster: loss, gradient and evaluations over iterations
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from distbelief.errors import ConfigurationError
from distbelief.events import (
    Evaluated,
    Iterated,
    JobFinished,
    JobStarted,
    LossRose,
    Observation,
    Progress,
    RoleLost,
    ShardRestored,
    staleness_quantile,
)
from distbelief.report.summary import one_clock
from distbelief.report.words import METRICS_SHOWN, count, shortened, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

BARS = 60
"""At most so many bars in the histogram of staleness."""
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#9f6b53")
DECADES = 100
"""A loss that falls by more than this factor is drawn on a logarithmic scale."""
FAULT_COLOUR = "#b05555"


@dataclass(frozen=True)
class Point:
    """A measured value, and when: in seconds and in examples."""

    seconds: float
    examples: int
    value: float


@dataclass(frozen=True)
class Mark:
    """Something that happened, and when."""

    seconds: float
    examples: int
    kind: str


@dataclass
class Curves:
    """Everything the pictures draw, collected from the events."""

    title: str = ""
    loss: list[Point] = field(default_factory=list)
    test: dict[str, list[Point]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    staleness: dict[int, int] = field(default_factory=dict)
    iterations: dict[int, Iterated] = field(default_factory=dict)
    """By number; one that was taken again counts as it was taken last."""
    clock: str = "wall-clock"
    """Whose time it is."""

    def standing(self) -> "Curves":
        """Without what resuming undid: what lay, in examples, beyond the point from which a later run went on."""
        resumed = [mark for mark in self.marks if mark.kind == "resumed"]

        def stands(item: Point | Mark) -> bool:
            return not any(item.seconds <= mark.seconds and item.examples > mark.examples for mark in resumed)

        test = {name: list(filter(stands, points)) for name, points in self.test.items()}
        standing = {name: points for name, points in test.items() if points}
        return Curves(
            self.title, list(filter(stands, self.loss)), standing, list(filter(stands, self.marks)), self.staleness,
            self.iterations,
        )  # fmt: skip


def write_plots(observations: Iterable[Observation], folder: Path) -> list[Path]:
    """Draw a run into PNG files in `folder`, which is created, and return their paths.

    A picture for which the run has no data (a killed run has no histogram) is not written. Raises ConfigurationError
    when matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as missing:
        raise ConfigurationError(
            "plots need matplotlib, which is not installed", hint="pip install 'distbelief[plots]'"
        ) from missing
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves = collect(observations)
    pictures: dict[str, Figure] = {}
    if curves.loss or curves.test:
        pictures["over_time.png"] = _over_time(curves)
        pictures["over_examples.png"] = _over_examples(curves.standing())
    if curves.staleness:
        pictures["staleness.png"] = _staleness(curves)
    if curves.iterations:
        pictures["iterations.png"] = _iterations(curves)
    for name, picture in pictures.items():
        picture.savefig(folder / name, dpi=150)
    return [folder / name for name in pictures]


def collect(observations: Iterable[Observation]) -> Curves:
    """Pick out what the pictures draw; values that are not finite are left out."""
    curves, examples = Curves(), 0
    for observation in one_clock(observations):
        seconds, event = observation.seconds, observation.event
        match event:
            case JobStarted():
                examples, again = event.resumed_examples, bool(curves.title or event.resumed_examples)
                roles = f"{count(event.replicas, 'replica')}, {count(event.shards, 'shard')}"
                curves.title = f"{event.run}: {event.algorithm}, {roles}"
                curves.clock = "virtual" if event.virtual else curves.clock
                if again:
                    curves.marks.append(Mark(seconds, examples, "resumed"))
            case Progress():
                examples = event.examples
                if event.loss is not None and math.isfinite(event.loss):
                    curves.loss.append(Point(seconds, examples, event.loss))
            case Iterated():
                examples = event.examples
                curves.loss.append(Point(seconds, examples, event.loss))
                curves.iterations[event.iteration] = event
            case Evaluated():
                for name, value in values_of(event).items():
                    if math.isfinite(value):
                        curves.test.setdefault(name, []).append(Point(seconds, event.examples, value))
            case RoleLost() | ShardRestored():
                kind = "role lost" if isinstance(event, RoleLost) else "shard restored"
                curves.marks.append(Mark(seconds, examples, kind))
            case LossRose():
                curves.marks.append(Mark(seconds, event.examples, "loss rose"))
            case JobFinished():
                curves.staleness = dict(event.staleness)
    if len(curves.test) > METRICS_SHOWN:
        curves.title += f"; the first {METRICS_SHOWN} of {len(curves.test)} metrics"
        curves.test = dict(islice(curves.test.items(), METRICS_SHOWN))
    return curves


def _over_time(curves: Curves) -> "Figure":
    points = [*curves.loss, *(point for points in curves.test.values() for point in points)]
    longest = max(point.seconds for point in points)
    unit, length = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60) if longest > 180 else ("seconds", 1)
    return _curves(curves, f"{curves.clock} time ({unit})", lambda happened: happened.seconds / length)


def _over_examples(curves: Curves) -> "Figure":
    return _curves(curves, "examples seen", lambda happened: happened.examples)


def _curves(curves: Curves, across: str, x: Callable[[Point | Mark], float]) -> "Figure":
    """Losses in one panel, every other metric in its own below, with one axis across."""
    others = [name for name in curves.test if name != "loss"]
    figure = _figure(curves.title, height=3.2 + 2.2 * len(others))
    panels = figure.subplots(1 + len(others), 1, sharex=True, squeeze=False, height_ratios=[3, *[2 for _ in others]])
    top = panels[0, 0]
    _draw_loss(top, curves.loss, x)
    _draw_test(top, curves.test.get("loss", []), x, COLOURS[1])
    top.set_ylabel("loss per example")
    for position, name in enumerate(others):
        panel = panels[1 + position, 0]
        _draw_test(panel, curves.test[name], x, COLOURS[(2 + position) % len(COLOURS)])
        panel.set_ylabel(shortened(name))
    for panel in panels[:, 0]:
        _mark(panel, curves.marks, x, named=panel is top)
        _tidy(panel)
        panel.margins(x=0.01)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize="small")
    panels[-1, 0].set_xlabel(across)
    panels[-1, 0].xaxis.set_major_formatter(_thousands())
    figure.align_ylabels()
    return figure


def _draw_loss(panel: "Axes", points: list[Point], x: Callable[[Point | Mark], float]) -> None:
    if not points:
        return
    across, losses = [x(point) for point in points], [point.value for point in points]
    reach = len(points) // 100
    if not reach:
        panel.plot(across, losses, color=COLOURS[0], linewidth=1.4, label="training")
        return
    panel.plot(across, losses, color=COLOURS[0], linewidth=0.6, alpha=0.35)
    label = f"training, mean of {2 * reach + 1} reports"
    panel.plot(across, _moving_mean(losses, reach), color=COLOURS[0], linewidth=1.6, label=label)


def _moving_mean(values: list[float], reach: int) -> list[float]:
    """Mean over up to `reach` neighbours on either side, as many on one as on the other, so that it does not lag."""
    sums = [0.0, *accumulate(values)]
    reaches = [min(reach, at, len(values) - 1 - at) for at in range(len(values))]
    return [(sums[at + near + 1] - sums[at - near]) / (2 * near + 1) for at, near in enumerate(reaches)]


def _draw_test(panel: "Axes", points: list[Point], x: Callable[[Point | Mark], float], colour: str) -> None:
    if not points:
        return
    marker = "o" if len(points) <= 60 else None
    across = [x(point) for point in points]
    label = f"test (last {points[-1].value:.4g})"
    panel.plot(across, [point.value for point in points], color=colour, marker=marker, markersize=4, label=label)


def _mark(panel: "Axes", marks: list[Mark], x: Callable[[Point | Mark], float], named: bool) -> None:
    styles = {"role lost": "--", "shard restored": ":", "resumed": "-.", "loss rose": (0, (1, 4))}
    for kind in dict.fromkeys(mark.kind for mark in marks):
        places = [x(mark) for mark in marks if mark.kind == kind]
        for position, place in enumerate(places):
            label = f"{kind} ({len(places)})" if named and position == 0 else None
            panel.axvline(place, color=FAULT_COLOUR, linestyle=styles[kind], linewidth=1.2, label=label)


def _staleness(curves: Curves) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    counts, total = curves.staleness, sum(curves.staleness.values())
    width = max(1, math.ceil((max(counts) + 1) / BARS))
    bars: dict[int, int] = {}
    for staleness, pushes in counts.items():
        bars[staleness // width] = bars.get(staleness // width, 0) + pushes
    figure = _figure(curves.title, height=3.6)
    panel = figure.subplots()
    middles = [bar * width + (width - 1) / 2 for bar in bars]
    panel.bar(middles, [100 * pushes / total for pushes in bars.values()], width=0.9 * width, color=COLOURS[0])
    for name, quantile, style in (("median", 0.5, "-"), ("95 % of pushes at most", 0.95, "--")):
        value = staleness_quantile(counts, quantile)
        panel.axvline(value, color=COLOURS[1], linestyle=style, label=f"{name} {value:g}")
    each = "" if width == 1 else f", {width} to a bar"
    panel.set_xlabel(f"staleness (versions between fetch and apply{each})")
    panel.set_ylabel(f"pushes (% of {total:,})")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(panel)
    panel.legend(frameon=False, fontsize="small")
    return figure


def _iterations(curves: Curves) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    numbers = sorted(curves.iterations)
    taken = [curves.iterations[number] for number in numbers]
    figure = _figure(curves.title, height=6.4)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    losses = [each.loss for each in taken]
    panels[0].plot(numbers, losses, color=COLOURS[0])
    if min(losses) > 0 and max(losses) > DECADES * min(losses):
        panels[0].set_yscale("log")
    panels[0].set_ylabel("loss, with penalties")
    panels[1].semilogy(numbers, [max(each.gradient, 1e-300) for each in taken], color=COLOURS[1])
    panels[1].set_ylabel("largest gradient")
    before = [1, *(each.evaluations for each in taken)]
    each_took = [after - earlier for earlier, after in pairwise(before)]
    panels[2].fill_between(numbers, each_took, step="mid", color=COLOURS[2], linewidth=0)
    panels[2].set_ylim(bottom=0)
    panels[2].set_ylabel("evaluations")
    panels[2].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[2].set_xlabel("iteration")
    for panel in panels:
        _tidy(panel)
    figure.align_ylabels()
    return figure


def _figure(title: str, height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(title, fontsize="medium", x=0.02, ha="left")
    return figure


def _tidy(panel: "Axes") -> None:
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _thousands() -> "FuncFormatter":
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:g}")
