# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine's description, interleaved repetitions, medians with their range, tables.

A machine is never quiet. All methods of a comparison therefore run once in every round, in an order that moves on by
one from round to round, and what is compared are ratios of neighbours within a round.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Cell = str | float | int | bool | None
Row = dict[str, Cell]
"""One line of a table in plain numbers (seconds, examples per second, ratios), as --json writes it."""


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements and how far they lay apart."""

    median: float
    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


@dataclass(frozen=True)
class Measured:
    """What one method gave: a sample of each round, or why there is none."""

    samples: tuple[float, ...]
    failure: str | None = None

    @property
    def spread(self) -> Spread | None:
        """The samples' spread; None for a method that failed."""
        return None if self.failure else spread(self.samples)

    def then(self, later: "Measured") -> "Measured":
        """This and what further rounds gave."""
        return Measured(self.samples + later.samples, self.failure or later.failure)


def spread(samples: Sequence[float]) -> Spread:
    """Median, mean, smallest and largest of at least one sample."""
    return Spread(statistics.median(samples), statistics.fmean(samples), min(samples), max(samples), len(samples))


def ratio(of: Measured, to: Measured) -> Spread | None:
    """Spread of the quotients of samples taken in the same round; None when either method failed.

    Where one method sat out the later rounds, the rounds of both count.
    """
    if of.failure or to.failure:
        return None
    return spread([above / below for above, below in zip(of.samples, to.samples, strict=False)])


def interleave(
    methods: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    budget_seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Measured]:
    """Run every method once in each round and collect what they return.

    The first of the methods moves on by one from round to round. A method that raises is left out from then on and its
    reason kept; the others go on. No round begins after `budget_seconds`, but one always runs.
    """
    began = clock()
    names = list(methods)
    samples: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for number in range(rounds):
        if number and clock() - began > budget_seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failures:
                continue
            try:
                samples[name].append(methods[name]())
            except Exception as error:
                failures[name] = one_line(error)
    return {name: Measured(tuple(samples[name]), failures.get(name)) for name in names}


class Beside:
    """A method timed between two blocks of what it is compared with, so that both meet the machine in one state."""

    def __init__(self, method: Callable[[], float], reference: Callable[[], float]) -> None:
        """Each takes no argument and returns seconds per call over a block of calls."""
        self._method = method
        self._reference = reference
        self.ratios: list[float] = []

    def __call__(self) -> float:
        """The method's seconds per call; the quotient is kept."""
        before = self._reference()
        seconds = self._method()
        self.ratios.append(2 * seconds / (before + self._reference()))
        return seconds


def standing(samples: Spread, reference: Spread, margin: float) -> str:
    """Where the mean lies to the range of `reference`: within, above, below, or within `margin` below."""
    if samples.mean > reference.high:
        return "above"
    if samples.mean >= reference.low:
        return "within"
    return f"within {margin:g}" if samples.mean >= reference.low - margin else "below"


def one_line(error: BaseException) -> str:
    """An exception as a cell of a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def table_text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    ruler = ["-" * width for width in widths]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in [header, ruler, *rows])
    ]
    return "\n".join(["", title, *(line.rstrip() for line in lines)])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def verdict(reached: Cell) -> str:
    """Whether a target was reached, as a cell; "-" where there was none."""
    return {True: "yes", False: "NO"}[reached] if isinstance(reached, bool) else "-"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """Processor, memory, system and versions, by name."""
    described = {
        "processor": _processor(),
        "cores": str(cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("distbelief", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            described[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def machine_line(described: Mapping[str, str]) -> str:
    """The machine as one printed line."""
    return ", ".join(f"{name} {value}" for name, value in described.items())


def document(name: str, quick: bool, described: Mapping[str, str], rows: Sequence[Row]) -> dict[str, object]:
    """What --json writes."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"benchmark": name, "date": today, "quick": quick, "machine": dict(described), "rows": list(rows)}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
