# SPDX-License-Identifier: Apache-2.0
"""What people watch while a job runs: one live view on a terminal, plain lines in a file or a pipe.

`View` is what is known so far, a pure fold over the events. `Terminal` shows it: on a terminal rich's own thread draws
the latest view four times a second, so that an event costs the coordinator only the fold; elsewhere each notable event
is one line, and progress at most one line a second, rarer as the run gets longer.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from distbelief.events import (
    BatchProgress,
    CheckpointWritten,
    EpochFinished,
    Evaluated,
    Iterated,
    JobFinished,
    JobStarted,
    Observation,
    Progress,
    PushRefused,
)
from distbelief.report.batch import batch_parts, batch_rows
from distbelief.report.words import (
    METRICS_SHOWN,
    better,
    count,
    duration,
    number,
    rate,
    sentence,
    smaller_is_better,
    values_of,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

REDRAWS_PER_SECOND = 4
NOTABLE_SHOWN = 5
SILENCE_SECONDS = 10.0
"""After so long without an event the view says so."""
FADING = 0.9
"""Weight that what was known of the rate keeps whenever examples are settled: the last ten times count most."""
NUMBERS = (JobStarted, Evaluated, EpochFinished)
"""Events that the live view shows as numbers, not as notable."""
REPLACED = (CheckpointWritten, PushRefused)
"""Notable events that replace one of their kind, so that a row of them does not push out what matters."""


@dataclass(frozen=True)
class Pace:
    """Examples and the seconds that they took, of which older ones fade; slow mini-batches are settled now and then.

    Of Sandblaster it is iterations that are counted.
    """

    now: float = 0.0
    settled: int = 0
    examples: float = 0.0
    seconds: float = 0.0

    def after(self, now: float, settled: int) -> "Pace":
        """The pace once so many examples are settled; while none are, only the time goes on."""
        kept = FADING if settled > self.settled else 1.0
        examples, seconds = self.examples + settled - self.settled, self.seconds + now - self.now
        return Pace(now, settled, kept * examples, kept * seconds)

    @property
    def rate(self) -> float:
        """Examples per second."""
        return self.examples / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class View:
    """What is known of a run so far."""

    seconds: float = 0.0
    started: JobStarted | None = None
    progress: Progress | None = None
    batch: BatchProgress | None = None
    """Of Sandblaster, instead of `progress`."""
    iterated: Iterated | None = None
    loss: float | None = None
    """The last training loss that was reported."""
    pace: Pace = field(default_factory=Pace)
    tested: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    refused: int = 0
    notable: tuple[Observation, ...] = ()
    """The last few notable events, oldest first."""
    ended: bool = False

    def after(self, observation: Observation) -> "View":
        """The view once this event has been seen."""
        view = replace(self, seconds=observation.seconds)._noted(observation)
        match observation.event:
            case JobStarted() as event:
                pace = Pace(observation.seconds, event.resumed_examples)
                return replace(view, started=event, batch=None, iterated=None, pace=pace, ended=False)
            case BatchProgress() as event:
                now, done = observation.seconds, event.iteration
                return replace(view, batch=event, pace=view.pace.after(now, done) if view.batch else Pace(now, done))
            case Iterated() as event:
                return replace(view, iterated=event)
            case Progress() as event:
                return replace(
                    view,
                    progress=event,
                    loss=view.loss if event.loss is None else event.loss,
                    pace=view.pace.after(observation.seconds, event.examples),
                )
            case Evaluated() as event:
                tested = values_of(event)
                improved = {
                    name: value
                    for name, value in tested.items()
                    if name not in view.best or better(name, value, than=view.best[name])
                }
                return replace(view, tested=tested, best=view.best | improved)
            case PushRefused():
                return replace(view, refused=view.refused + 1)
            case JobFinished():
                return replace(view, ended=True)
        return view

    def _noted(self, observation: Observation) -> "View":
        event, earlier = observation.event, self.notable
        if isinstance(event, NUMBERS) or sentence(event) is None:
            return self
        if isinstance(event, REPLACED) and earlier and type(earlier[-1].event) is type(event):
            earlier = earlier[:-1]
        return replace(self, notable=(*earlier, observation)[-NOTABLE_SHOWN:])

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate of the time to the end; None while there is nothing to go by.

        Of Sandblaster it is the time to its limit of iterations: it mostly ends sooner.
        """
        if self.pace.rate <= 0 or self.ended:
            return None
        if self.batch is not None:
            return (self.batch.max_iterations - self.batch.iteration) / self.pace.rate
        assert self.progress is not None
        return max(0, self.progress.total_examples - self.progress.examples) / self.pace.rate


class Terminal:
    """A listener and context manager that shows a run on `console`, and never lets the showing stop the run.

    Enter it before the job starts. On the way out, also by an exception, the terminal is as it was, with the last view
    left standing. When the console fails (its pipe is closed, say) nothing more is shown.
    """

    def __init__(self, console: "Console", clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._view = View()
        self._live: Live | None = None
        self._muted = False
        self._heard = clock()
        self._first_line: float | None = None
        self._last_line: float | None = None
        self._told: dict[type, float] = {}
        """When a line of these events was last printed."""
        self._untold: Observation | None = None
        """The last test, where its line has not been printed."""
        self._unprinted: Progress | BatchProgress | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive and self._console.encoding.startswith("utf"):
            from rich.live import Live

            live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=REDRAWS_PER_SECOND)
            with self._muting():
                live.start(refresh=True)
            self._live = live
        return self

    def __exit__(self, *exception: object) -> None:
        with self._muting():
            if self._live is not None:
                self._live.stop()
            else:
                self._print_progress()

    def __call__(self, observation: Observation) -> None:
        """Take an event into the view and, where there is no live view, print it."""
        if self._muted:
            return
        with self._muting():
            self._view = self._view.after(observation)
            self._heard = self._clock()
            if self._live is None:
                self._print(observation)

    @contextmanager
    def _muting(self) -> Iterator[None]:
        # rich answers a closed pipe with SystemExit; neither that nor any other failure to show may end the training
        try:
            yield
        except (Exception, SystemExit):
            self._muted = True

    def _draw(self) -> "RenderableType":
        silence = self._clock() - self._heard
        return draw(self._view, silence if silence >= SILENCE_SECONDS and not self._view.ended else None)

    def _print(self, observation: Observation) -> None:
        event = observation.event
        if isinstance(event, Progress | BatchProgress):
            self._unprinted = event
            if self._last_line is None or self._heard - self._last_line >= self._pause():
                self._print_progress()
            return
        if isinstance(event, EpochFinished | Evaluated):  # of a small job there are many a second
            if self._heard - self._told.get(type(event), -math.inf) < self._pause():
                self._untold = observation if isinstance(event, Evaluated) else self._untold
                return
            self._told[type(event)] = self._heard
            self._untold = None if isinstance(event, Evaluated) else self._untold
        words = sentence(event)
        if isinstance(event, PushRefused):
            # a model that has diverged refuses every push: the 1st, 2nd, 4th, 8th ... are printed
            refused = self._view.refused
            words = None if refused & (refused - 1) else f"{words} ({refused:,} refused so far)"
        if words is None:
            return
        if isinstance(event, JobFinished):
            if self._untold is not None:
                self._write(_stamped(self._untold.seconds, sentence(self._untold.event) or ""))
            self._print_progress()
        self._write(_stamped(observation.seconds, words))

    def _pause(self) -> float:
        """Seconds between progress lines: 1 in the first minute, 60 after an hour, so that a long log stays short."""
        elapsed = 0.0 if self._first_line is None else self._heard - self._first_line
        return min(60.0, max(1.0, elapsed / 60))

    def _print_progress(self) -> None:
        if self._unprinted is None:
            return
        self._unprinted = None
        self._last_line = self._heard
        self._first_line = self._heard if self._first_line is None else self._first_line
        self._write(progress_line(self._view))

    def _write(self, line: str) -> None:
        encoding = self._console.encoding
        self._console.out(line.encode(encoding, errors="replace").decode(encoding), highlight=False)


def _stamped(seconds: float, words: str) -> str:
    return f"{duration(seconds):>12}  {words}"


def progress_line(view: View) -> str:
    """Where a run that has reported progress stands, in one line."""
    if view.batch is not None:
        return _stamped(view.seconds, " | ".join(batch_parts(view, view.batch)))
    progress = view.progress
    assert progress is not None
    parts = [
        f"epoch {progress.epoch + 1}",
        f"{100 * progress.examples // max(1, progress.total_examples)} %",
        *([] if _is_over(progress) else [f"{rate(view.pace.rate)} examples/s"]),
        f"loss {'-' if view.loss is None else number(view.loss)}",
        f"staleness {progress.staleness_median:g}",
    ]
    if view.remaining_seconds:
        parts.append(f"{duration(view.remaining_seconds)} left")
    return _stamped(view.seconds, " | ".join(parts))


def _is_over(progress: Progress) -> bool:
    """Whether every example is behind the job; what was done in the last moment says nothing then."""
    return progress.examples >= progress.total_examples


def draw(view: View, silence_seconds: float | None = None) -> "RenderableType":
    """The live view; it fits any width without wrapping, and says nothing by colour alone.

    `silence_seconds`: how long nothing has been heard of the job, when that is long enough to be said.
    """
    from rich.console import Group
    from rich.text import Text

    if view.started is None:
        return Text("starting ...", no_wrap=True, overflow="ellipsis")
    lines: list[RenderableType] = [_header(view, silence_seconds)]
    if view.progress is not None or view.batch is not None:
        lines += [_bar(view)]
    lines.append(_numbers(view))
    if view.notable:
        lines.append(Text(""))
    for observation in view.notable:
        line = Text(no_wrap=True, overflow="ellipsis")
        lines.append(line.append(_stamped(observation.seconds, sentence(observation.event) or "")))
    return Group(*lines)


def _header(view: View, silence_seconds: float | None) -> "RenderableType":
    started = view.started
    assert started is not None
    grid = _grid()
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    state = "ended after" if view.ended else "running for"
    if silence_seconds is not None:
        state = f"no news for {duration(silence_seconds)};"
    grid.add_row(_bold(started.run), f"{state} {duration(view.seconds)}")
    return grid


def _bar(view: View) -> "RenderableType":
    from rich.progress_bar import ProgressBar

    grid = _grid()
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(no_wrap=True, justify="right")
    label, done, total = _stage(view)
    most = "at most " if view.batch is not None else ""
    remaining = view.remaining_seconds
    grid.add_row(
        label,
        ProgressBar(total=total, completed=done),
        f"{100 * done // total} %",
        "" if remaining is None else f"{most}{duration(remaining)} left",
    )
    return grid


def _stage(view: View) -> tuple[str, int, int]:
    """(where the run is, how much is done, of how much)."""
    if view.batch is not None:
        limit = max(1, view.batch.max_iterations)
        return f"iteration {view.batch.iteration:,} of {limit:,}", view.batch.iteration, limit
    progress = view.progress
    assert progress is not None
    epochs = view.started.epochs if view.started is not None else 0
    return f"epoch {min(progress.epoch + 1, epochs)} of {epochs}", progress.examples, max(1, progress.total_examples)


def _numbers(view: View) -> "RenderableType":
    started, progress = view.started, view.progress
    assert started is not None
    grid = _grid()
    grid.add_column(no_wrap=True, min_width=10)
    grid.add_column(no_wrap=True, overflow="ellipsis", justify="right", min_width=10)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    model = f"{started.algorithm}, {count(started.shards, 'shard')}, {count(started.parameters, 'parameter')}"
    reported = view.batch or progress
    alive = started.replicas if reported is None else reported.replicas_alive
    grid.add_row(_bold("replicas"), f"{alive:,}", f"of {started.replicas:,} alive; {model}")
    for name, told, about in batch_rows(view, view.batch) if view.batch is not None else ():
        grid.add_row(_bold(name), told, about)
    if progress is not None:
        refused = f", {view.refused:,} refused" if view.refused else ""
        over = _is_over(progress)
        examples = f"of {progress.total_examples:,}"
        examples += "" if over else f", {rate(view.pace.rate)} per second"
        pushes = f"applied{refused}" if over else f"{rate(progress.pushes_per_second)} per second{refused}"
        staleness = f"median, 95 % of pushes at most {progress.staleness_p95:g}"
        grid.add_row(_bold("examples"), f"{progress.examples:,}", examples)
        grid.add_row(_bold("pushes"), f"{progress.pushes:,}", pushes)
        grid.add_row(_bold("staleness"), f"{progress.staleness_median:g}", staleness)
        grid.add_row(_bold("loss"), "-" if view.loss is None else number(view.loss), "training, per example")
    for name, value in list(view.tested.items())[:METRICS_SHOWN]:
        best = f"{'lowest' if smaller_is_better(name) else 'highest'} so far {number(view.best[name])}"
        grid.add_row(_bold(f"test {name}"), number(value), best)
    return grid


def _grid() -> "Table":
    from rich.table import Table

    return Table.grid(expand=True, padding=(0, 2, 0, 0))


def _bold(words: str) -> "RenderableType":
    from rich.text import Text

    return Text(words, style="bold")
