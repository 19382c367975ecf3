# SPDX-License-Identifier: Apache-2.0
"""What people look at: the pictures of a run, and the terminal while it lasts."""

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import msgspec
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console
from rich.text import Text

from distbelief import events
from distbelief.errors import ConfigurationError
from distbelief.events import Observation
from distbelief.report import Terminal, write_plots
from distbelief.report.plots import COLOURS, FAULT_COLOUR, _over_time, collect
from distbelief.report.terminal import View
from distbelief.report.words import duration, number, rate, shortened

STALENESS = {0: 4, 1: 10, 2: 5, 7: 1}


def started(resumed_examples: int = 0) -> Observation:
    event = events.JobStarted(
        run="runs/digits",
        replicas=2,
        shards=1,
        parameters=1000,
        examples_per_epoch=1000,
        epochs=1,
        batch_size=10,
        seed=0,
        algorithm="Downpour",
        shard_balance=1.0,
        resumed_examples=resumed_examples,
    )
    return Observation(0.0, event)


def progress(seconds: float, examples: int, loss: float | None) -> Observation:
    event = events.Progress(
        epoch=0,
        examples=examples,
        total_examples=1000,
        loss=loss,
        examples_per_second=100.0,
        pushes_per_second=10.0,
        pushes=examples // 10,
        staleness_median=1.0,
        staleness_p95=2.0,
        replicas_alive=2,
    )
    return Observation(seconds, event)


def evaluated(seconds: float, examples: int, accuracy: float) -> Observation:
    metrics = {"accuracy": accuracy}
    return Observation(seconds, events.Evaluated(examples=examples, loss=None, metrics=metrics, evaluation_seconds=0.1))


def lost(seconds: float) -> Observation:
    return Observation(seconds, events.RoleLost(role="replica/1", incarnation=0, reason="killed"))


def finished(seconds: float) -> Observation:
    event = events.JobFinished(
        reason="all epochs finished",
        seen=1000,
        repeated=0,
        missing=0,
        refused=0,
        lost_updates=0,
        pushes=20,
        staleness=STALENESS,
        export_command="",
        resume_command="",
    )
    return Observation(seconds, event)


def run(with_fault: bool = True) -> list[Observation]:
    observations = [started()]
    for step in range(1, 11):
        observations.append(progress(float(step), 100 * step, math.exp(-step / 4)))
        observations.append(evaluated(step + 0.1, 100 * step, 1 - math.exp(-step / 4)))
        if step == 5 and with_fault:
            observations.append(lost(5.5))
    return [*observations, finished(11.0)]


# the pictures


def pixels(path: Path) -> "np.ndarray[Any, Any]":
    return matplotlib.image.imread(path)[:, :, :3]


def share(picture: "np.ndarray[Any, Any]", colour: str) -> float:
    """The share of the pixels that have this colour."""
    return float(np.mean(np.abs(picture - np.array(to_rgb(colour))).max(axis=2) < 0.02))


def test_three_pictures_are_written_with_their_curves_in_them(tmp_path: Path) -> None:
    paths = write_plots(run(), tmp_path / "plots")
    assert [path.name for path in paths] == ["over_time.png", "over_examples.png", "staleness.png"]
    for path in paths:
        picture = pixels(path)
        assert picture.shape[0] > 400
        assert picture.shape[1] > 800
        assert 0.5 < share(picture, "white") < 0.99
        assert share(picture, COLOURS[0]) > 0.001
    for path in paths[:2]:
        assert share(pixels(path), COLOURS[2]) > 0.001, "the test metric is drawn"


def test_time_is_wall_clock_time_or_that_of_the_simulated_engine() -> None:
    def label(virtual: bool) -> str:
        begun = Observation(0.0, msgspec.structs.replace(started().event, virtual=virtual))
        axes: str = _over_time(collect([begun, *run()[1:], started(1000), *run()[1:]])).axes[-1].get_xlabel()
        return axes

    assert [label(virtual) for virtual in (False, True)] == ["wall-clock time (seconds)", "virtual time (seconds)"]


def test_a_bar_of_the_histogram_stands_for_each_staleness(tmp_path: Path) -> None:
    picture = pixels(write_plots(run(), tmp_path)[-1])
    bar = np.abs(picture - np.array(to_rgb(COLOURS[0]))).max(axis=2) < 0.02
    foot = np.flatnonzero(bar.sum(axis=1) > 20)[-3]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bar[foot].astype(int), [0]])) == 1)
    # the lines of the median (1) and of the 95 % (2) cut their own bars in two
    assert len(edges) == len(STALENESS) + 2


def test_a_fault_is_a_vertical_line(tmp_path: Path) -> None:
    def tallest(observations: list[Observation], folder: str) -> float:
        picture = pixels(write_plots(observations, tmp_path / folder)[0])
        line = np.abs(picture - np.array(to_rgb(FAULT_COLOUR))).max(axis=2) < 0.1
        return float(np.max(line.sum(axis=0))) / float(picture.shape[0])

    assert tallest(run(with_fault=True), "with") > 0.3
    assert tallest(run(with_fault=False), "without") == 0.0


def test_a_rise_of_the_loss_is_marked_at_the_examples_of_its_event_not_of_the_progress_before_it() -> None:
    (mark,) = (mark for mark in collect(eventful_run()).marks if mark.kind == "loss rose")
    assert (mark.seconds, mark.examples) == (2.9, 700)


def test_over_examples_what_resuming_undid_is_left_out() -> None:
    killed = [started(), progress(1.0, 100, 0.9), progress(2.0, 200, 0.8), lost(2.5), progress(3.0, 300, 0.7)]
    resumed = [started(resumed_examples=100), progress(1.0, 200, 0.85), progress(2.0, 300, 0.75)]
    curves = collect(killed + resumed)
    assert [point.seconds for point in curves.loss] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [(mark.kind, mark.seconds) for mark in curves.marks] == [("role lost", 2.5), ("resumed", 3.0)]
    standing = curves.standing()
    assert [(point.examples, point.value) for point in standing.loss] == [(100, 0.9), (200, 0.85), (300, 0.75)]
    assert [mark.kind for mark in standing.marks] == ["resumed"]


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    diverged = [started(), progress(1.0, 100, 0.9), progress(2.0, 200, math.nan), evaluated(3.0, 200, math.inf)]
    curves = collect(diverged)
    assert [point.value for point in curves.loss] == [0.9]
    assert curves.test == {}
    assert len(write_plots(diverged, tmp_path)) == 2


def test_a_run_without_measurements_has_no_pictures(tmp_path: Path) -> None:
    assert write_plots([started()], tmp_path) == []


def test_of_more_metrics_than_there_is_room_for_the_first_are_drawn_and_the_title_says_so() -> None:
    def tested(metrics: int) -> Observation:
        values = {f"metric {number}": 0.5 for number in range(metrics)}
        return Observation(1.0, events.Evaluated(examples=1, loss=0.5, metrics=values, evaluation_seconds=0.1))

    few, many = collect([started(), tested(7)]), collect([started(), tested(300)])
    assert list(many.test) == list(few.test) == ["loss", *(f"metric {number}" for number in range(7))]
    assert few.title == "runs/digits: Downpour, 2 replicas, 1 shard"
    assert many.title == f"{few.title}; the first 8 of 301 metrics"


def test_of_a_name_that_is_longer_than_a_panel_the_beginning_is_drawn() -> None:
    assert shortened("a" * 30) == "a" * 30
    assert shortened("b" * 3000) == "b" * 27 + "..."


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"hint: pip install 'distbelief\[plots\]'"):
        write_plots(run(), tmp_path)


# the terminal


def eventful_run() -> list[Observation]:
    """A Downpour run in which every kind of event happens."""
    return [
        started(),
        Observation(0.1, events.RoleStarted(role="replica/1", incarnation=0)),
        Observation(0.2, events.ReplicasReleased(replicas=2, examples=100)),
        progress(1.0, 500, 0.6),
        lost(1.5),
        Observation(1.6, events.LeasesReturned(replica=1, leases=1, examples=20, repeated=7)),
        Observation(1.7, events.RoleStarted(role="replica/1", incarnation=1, again=True)),
        Observation(1.7, events.RoleStarted(role="replica/7", incarnation=1)),
        evaluated(1.8, 500, 0.875),
        Observation(2.9, events.LossRose(lowest=0.5, loss=0.75, replicas=2, examples=700)),
        Observation(3.0, events.ShardRestored(shard=0, version=12)),
        Observation(3.1, events.PushRefused(replica=0, step=12, examples=10, reason="not finite")),
        Observation(3.2, events.CheckpointFailed(path="c/2", reason="no space left on device")),
        Observation(3.3, events.CheckpointRejected(path="c/0", reason="checksum differs")),
        progress(4.0, 1000, 0.25),
        Observation(4.1, events.EpochFinished(epoch=0, seen=1000, repeated=7)),
        Observation(4.2, events.CheckpointWritten(path="c/3", examples=1000, checkpoint_seconds=0.2)),
        evaluated(4.3, 1000, 0.75),
        Observation(4.4, events.JobStopping(reason="Ctrl-C")),
        finished(4.5),
    ]


def test_the_eventful_run_holds_every_kind_of_event() -> None:
    of_sandblaster = {events.BatchProgress, events.Iterated, events.EvaluationLost, events.SearchBegun}
    happened = {type(observation.event) for observation in eventful_run()}
    assert happened == set(events.AnyEvent.__args__) - of_sandblaster


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(observations: list[Observation], seconds_between: float = 0.0) -> list[str]:
    file, clock = io.StringIO(), Clock()
    with Terminal(Console(file=file, width=80), clock=clock) as terminal:
        for observation in observations:
            clock.now += seconds_between
            terminal(observation)
    return file.getvalue().splitlines()


def test_without_a_terminal_each_notable_event_is_one_line() -> None:
    lines = plain(eventful_run())
    assert not [line for line in lines if "replica 7" in line], "it was resumed, not lost"
    for words in (
        "runs/digits: Downpour, 2 replicas, 1 shard, 1,000 parameters, 1 epoch of 1,000 examples",
        "warmstart: 2 replicas may train from example 100 on",
        "replica 1 was lost: killed",
        "replica 1 gave back 1 lease of 20 examples, 7 of them applied already",
        "replica 1 is back, incarnation 1",
        "tested after 500 examples: accuracy 0.875",
        "training loss rose from 0.5 to 0.75: lower the rate, use fewer than 2 replicas, or momentum in Downpour only",
        "shard 0 was restored from its checkpoint at version 12",
        "replica 0 refused its push of step 12: not finite",
        "checkpoint c/2 could not be written: no space left on device",
        "checkpoint c/0 was passed over: checksum differs",
        "epoch 1 finished: 1,000 examples seen",
        "checkpoint written after 1,000 examples, in 0.2 s",
        "stopping: Ctrl-C",
        "ended: all epochs finished",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(("seconds_between", "expected"), [(0.0, 2), (0.25, 6), (1.0, 21)])
def test_without_a_terminal_progress_is_at_most_one_line_a_second(seconds_between: float, expected: int) -> None:
    reports = [progress(0.3 * number, 30 * number, 0.5) for number in range(21)]
    lines = [line for line in plain(reports, seconds_between) if "examples/s" in line]
    assert len(lines) == expected
    assert "epoch 1 | 60 % | 100 examples/s | loss 0.5 | staleness 1 | 4.0 s left" in lines[-1]


def test_of_slow_mini_batches_the_rate_and_the_time_left_are_told_as_they_are() -> None:
    seconds = [0.5 * number for number in range(1, 121)]  # 10 of the 1,000 examples each 5 s, after a second
    lines = plain([started(), *(progress(now, 10 * int((now - 1) // 5), 0.5) for now in seconds)], seconds_between=0.5)
    told = [line.split(" | ") for line in lines if "examples/s" in line]
    steady = told[20:]
    assert len(steady) >= 35
    assert all(1.4 <= float(rate.split()[0]) <= 2.0 for _, _, rate, *_ in steady)
    assert all(7 <= int(left.split()[0]) <= 11 and " min " in left for *_, left in steady), "and not from 1 to 60"


def test_the_training_loss_that_is_shown_is_the_last_one_that_was_told() -> None:
    lines = plain([started(), progress(1.0, 100, 0.75), progress(2.0, 200, None)], seconds_between=1.0)
    assert "| loss 0.75 |" in lines[-1]


def test_of_checkpoints_and_refused_pushes_in_a_row_the_last_is_kept_and_of_other_things_each() -> None:
    written = [
        Observation(float(number), events.CheckpointWritten(path="c", examples=number, checkpoint_seconds=0.1))
        for number in range(1, 5)
    ]
    view = View()
    for observation in (started(), *written[:2], lost(2.5), *written[2:], lost(4.5)):
        view = view.after(observation)
    assert list(view.notable) == [written[1], lost(2.5), written[3], lost(4.5)]


def test_when_a_run_has_ended_no_time_is_left() -> None:
    view = View()
    for observation in (started(), progress(1.0, 500, 0.6), progress(2.0, 600, 0.6)):
        view = view.after(observation)
    assert view.remaining_seconds
    assert view.after(finished(2.5)).remaining_seconds is None


def test_while_nothing_is_settled_the_time_left_grows() -> None:
    still = [progress(1.0 * second, min(20 * second, 500), 0.5) for second in range(1, 125)]
    lines = plain([started(), *still], seconds_between=1.0)
    assert "| 20.0 examples/s |" in lines[25]
    assert "| 25 s left" in lines[25]
    assert float(lines[-1].split(" | ")[2].split()[0]) < 2


def test_a_resumed_run_tells_the_rate_of_this_start() -> None:
    lines = plain([started(resumed_examples=600), progress(2.0, 700, 0.5)], seconds_between=1.0)
    assert "50.0 examples/s" in lines[-1]
    assert "6.0 s left" in lines[-1]


def test_progress_lines_get_rarer_in_a_long_run() -> None:
    hour = [progress(float(second), 100, 0.5) for second in range(3600)]
    lines = plain(hour, seconds_between=1.0)
    assert 60 <= len(lines) <= 60 + 60 * math.log(60) + 10


def test_the_last_measurement_is_told_before_the_progress_that_came_behind_it() -> None:
    reports = [progress(1.0, 900, 0.5), evaluated(2.0, 900, 0.8), evaluated(3.0, 1000, 0.9), progress(4.0, 1000, 0.5)]
    lines = plain([started(), *reports, finished(5.0)])
    assert "accuracy 0.9" in lines[-3]
    assert "100 %" in lines[-2]
    assert "ended" in lines[-1]


def test_a_measurement_that_was_not_told_is_not_told_behind_a_later_one() -> None:
    happened = [started(), *(evaluated(1.0 + at, 500, at) for at in (0.1, 0.2)), *(progress(3.0, 600, 0.5),) * 3]
    lines = plain([*happened, evaluated(4.0, 700, 0.3), finished(5.0)], seconds_between=0.4)
    told = [line.split("accuracy ")[1] for line in lines if "accuracy" in line]
    assert told == ["0.1", "0.3"]


def test_what_a_console_has_no_letters_for_is_told_without_them() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    reason = events.JobStopping(reason="Größe")
    with Terminal(Console(file=file, width=80)) as terminal:
        for observation in (started(), Observation(1.0, reason), finished(2.0)):
            terminal(observation)
    file.seek(0)
    told = file.read()
    assert "stopping: Gr??e" in told
    assert "ended" in told


def test_a_model_that_diverged_does_not_flood_the_log() -> None:
    refused = events.PushRefused(replica=0, step=1, examples=10, reason="nan")
    lines = plain([Observation(1.0, refused)] * 1000)
    assert len(lines) == 10
    assert lines[-1].endswith("(512 refused so far)")


def test_a_traceback_is_told_in_the_line_of_its_exception() -> None:
    reason = 'Traceback (most recent call last):\n  File "net.py", line 3\nValueError: too wide\n'
    (line,) = plain([Observation(1.0, events.RoleLost(role="replica/0", incarnation=0, reason=reason))])
    assert line.endswith("replica 0 was lost: ValueError: too wide")


def live(observations: list[Observation], width: int) -> list[str]:
    """The lines of the last view, without control codes."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=40, force_terminal=True, no_color=True, _environ={})
    with Terminal(console, clock=Clock()) as terminal:
        for observation in observations:
            terminal(observation)
    # every redraw erases the lines of the view before
    return [Text.from_ansi(line).plain for line in file.getvalue().rpartition("\x1b[2K")[2].splitlines()]


def test_a_rise_of_the_loss_is_told_at_80_columns_with_what_to_do() -> None:
    rose = events.LossRose(lowest=0.12345, loss=0.23456, replicas=16, examples=500)
    (line,) = (line for line in live([started(), Observation(1.0, rose)], 80) if "loss rose" in line)
    assert "0.1235 to 0.2346: lower the rate" in line


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_shows_the_state_within_the_width(width: int) -> None:
    lines = live(eventful_run()[:-1], width)
    for words in (
        "running for 4.4 s",
        "epoch 1 of 1",
        "100 %",
        "2  of 2 alive; Downpour, 1 shard, 1,000 parameters",
        "100  applied, 1 refused",
        "1  median, 95 % of pushes at most 2",
        "0.25  training, per example",
        "0.75  highest so far 0.875",
        "stopping: Ctrl-C",
        "checkpoint written after 1,000 examples",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert any("1,000  of 1,000 " in f"{line} " for line in lines), "and not what was done in the last moment"
    assert max(map(len, lines)) <= width
    halfway = live(eventful_run()[:12], width)
    for words in ("500  of 1,000, 500 per second", "10.0 per second, 1 refused", "50 %  1.0 s left"):
        assert sum(words in line for line in halfway) == 1, words


@pytest.mark.parametrize(
    ("silent_seconds", "ended", "said"),
    [(9.0, False, "running for 1.0 s"), (12.0, False, "no news for 12 s; 1.0 s"), (12.0, True, "ended after 1.0 s")],
)
def test_the_live_view_says_when_nothing_has_been_heard_for_long_unless_all_is_over(
    silent_seconds: float, ended: bool, said: str
) -> None:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=True, width=100, height=30, legacy_windows=False, color_system=None)
    with Terminal(console, clock=clock) as terminal:
        for observation in (started(), progress(1.0, 500, 0.6), *([finished(1.0)] if ended else [])):
            terminal(observation)
        clock.now += silent_seconds
    assert said in file.getvalue()
    assert ("no news" in file.getvalue()) == ("no news" in said)


def test_the_best_value_of_a_metric_is_kept_by_its_sense() -> None:
    def tested(value: float) -> Observation:
        metrics = {"error": value, "accuracy": value}
        return Observation(1.0, events.Evaluated(examples=1, loss=value, metrics=metrics, evaluation_seconds=0.1))

    view = "\n".join(live([started(), tested(0.5), tested(0.25), tested(0.75), tested(0.5)], 80))
    assert view.count("0.5  lowest so far 0.25") == 2
    assert view.count("0.5  highest so far 0.75") == 1


def test_an_exception_passes_through_and_leaves_the_cursor_visible() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={})

    def watched() -> None:
        with Terminal(console) as terminal:
            terminal(started())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched()
    sent = file.getvalue()
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")


def test_a_console_that_fails_does_not_stop_the_run() -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, _: str) -> int:
            self.writes += 1
            raise OSError("input/output error")

    for interactive in (True, False):
        file = Broken()
        with Terminal(Console(file=file, force_terminal=interactive, width=80, _environ={})) as terminal:
            for observation in eventful_run():
                terminal(observation)
        assert file.writes > 0


def test_a_closed_pipe_does_not_stop_the_run() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from rich.console import Console\n"
        "from distbelief.events import *\n"
        "from distbelief.report import Terminal\n"
        "with Terminal(Console()) as terminal:\n"
        "    for number in range(5000):\n"
        "        terminal(Observation(1.0, RoleLost(role='replica/0', incarnation=0, reason='gone')))\n"
        "print('trained on', file=sys.stderr)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, *sys.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert "trained on" in run.stderr.read()
    run.stderr.close()
    assert run.wait() == 0


def test_durations_read_as_people_say_them() -> None:
    said = [duration(seconds) for seconds in (0.04, 9.94, 9.96, 59.6, 3599.6, 11222)]
    assert said == ["0.0 s", "9.9 s", "10 s", "1 min 00 s", "1 h 00 min", "3 h 07 min"]


def test_numbers_keep_their_digits_where_the_form_changes() -> None:
    assert [number(value) for value in (0.12345, 9_999.4, 9_999.5, -9_999.7, 12_345.6)] == [
        "0.1235", "9999", "10,000", "-10,000", "12,346",
    ]  # fmt: skip
    assert [rate(value) for value in (0.04, 99.94, 99.96, 12_345.6)] == ["0.0", "99.9", "100", "12,346"]
    assert [number(value) for value in (None, math.nan, math.inf, -math.inf)] == ["not finite"] * 4
