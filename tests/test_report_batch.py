# SPDX-License-Identifier: Apache-2.0
"""What people see of a Sandblaster job."""

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from distbelief import events
from distbelief.events import Observation
from distbelief.report import Terminal, read_events, read_summary, summarize, text, write_plots
from distbelief.report.terminal import View
from tests.test_sandblaster import job, trained


def started() -> events.JobStarted:
    return events.JobStarted(
        run="runs/probe", replicas=3, shards=2, parameters=650, examples_per_epoch=1000, epochs=0, batch_size=32,
        seed=0, algorithm="Sandblaster L-BFGS, 10 pairs", shard_balance=1.0, iterations=40,
    )  # fmt: skip


def progress(iteration: int, done: int = 5) -> events.BatchProgress:
    return events.BatchProgress(
        iteration=iteration, max_iterations=40, evaluations=iteration + 2, loss=0.5 / (iteration + 1), gradient=1e-3,
        portions_done=done, portions=24, backed_up=7, examples=1000 * iteration, examples_per_second=4321.0,
        replicas_alive=2,
    )  # fmt: skip


def iterated(iteration: int) -> events.Iterated:
    return events.Iterated(
        iteration=iteration, loss=0.5 / (iteration + 1), gradient=1e-3 / iteration, t=0.5, length=0.25,
        evaluations=iteration + 2, examples=1000 * iteration, backed_up=7,
    )  # fmt: skip


def finished(converged: bool) -> events.JobFinished:
    return events.JobFinished(
        reason="the largest gradient, 9.0e-06, is within 1e-05", seen=12_000, repeated=0, missing=0, refused=0,
        lost_updates=0, pushes=288, staleness={}, export_command="e", resume_command="r", iterations=10, evaluations=12,
        round_trips=13, converged=converged, loss=0.04545, gradient=9e-6,
    )  # fmt: skip


def run(*, converged: bool = True) -> list[Observation]:
    return [
        Observation(0.0, started()),
        Observation(0.5, events.SearchBegun(loss=0.75, loss_before=0.25)),
        Observation(1.0, progress(0)),
        *(Observation(1.0 + iteration / 2, iterated(iteration)) for iteration in range(1, 11)),
        Observation(4.0, progress(6)),
        Observation(4.5, events.EvaluationLost(evaluation=8, reason="shard 1 was lost")),
        Observation(7.0, finished(converged)),
    ]


def test_the_summary_is_about_iterations_evaluations_and_the_gradient() -> None:
    summary = summarize(run())
    assert summary.batch is not None
    assert (summary.batch.iterations, summary.batch.evaluations, summary.batch.round_trips) == (10, 12, 13)
    assert (summary.loss, summary.batch.gradient, summary.batch.converged) == (0.04545, 9e-6, True)
    printed = text(summary)
    assert "10 of at most 40; converged" in printed
    assert "12, in 13 round trips to the shards" in printed
    assert "0.04545, largest gradient 9.00e-06" in printed
    assert "1 evaluation computed again" in printed
    assert "evaluation 8 is computed again: shard 1 was lost" in printed
    assert not any(word in printed for word in ("epoch", "staleness", "pushes"))
    assert max(map(len, printed.splitlines())) <= 80


def test_a_search_that_did_not_converge_says_so() -> None:
    assert "NOT converged" in text(summarize(run(converged=False)))
    assert "NOT converged" in text(summarize(run()[:6]))


def test_of_a_search_that_was_killed_no_number_is_told_that_only_its_end_would_have_told() -> None:
    killed = text(summarize(run()[:6]))
    assert "evaluations   5\n" in killed
    assert "round trip" not in killed
    assert "3,000, none twice" in killed
    assert "none, largest gradient -" in text(summarize(run()[:1]))


def test_a_search_that_was_resumed_lacks_no_examples_of_epochs() -> None:
    resumed = msgspec.structs.replace(started(), resumed_examples=3000)
    assert summarize([*run()[:6], Observation(0.0, resumed)]).examples.missing == 0


def test_lines_in_a_log_say_where_the_search_is() -> None:
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=False, width=100)) as terminal:
        for observation in run():
            terminal(observation)
    lines = out.getvalue().splitlines()
    assert "at most 40 iterations of 1,000 examples" in lines[0]
    assert any(
        "iteration 6 of at most 40 | loss 0.0714286 | gradient 1.00e-03 | 8 evaluations" in line for line in lines
    )
    assert "the loss here was 0.25 and is 0.75: data or loss differ, a new search begins" in lines[1]
    assert "ended: the largest gradient" in lines[-1]


def test_the_time_left_of_a_search_that_was_resumed_is_judged_by_what_it_did_since() -> None:
    view = View()
    for seconds, event in ((0.0, started()), (0.5, progress(20)), (10.5, progress(22))):
        view = view.after(Observation(seconds, event))
    assert view.remaining_seconds == pytest.approx((40 - 22) * 10 / 2)
    for seconds, event in ((20.0, started()), (20.5, progress(30)), (30.5, progress(32))):
        view = view.after(Observation(seconds, event))
    assert view.remaining_seconds == pytest.approx((40 - 32) * 10 / 2)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_live_view_fits_and_has_step_portions_and_time_left(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=30, legacy_windows=False, color_system=None)
    with Terminal(console) as terminal:
        for observation in run()[:-1]:
            terminal(observation)
    shown = out.getvalue()
    assert "iteration 6 of 40" in shown
    assert "at most" in shown
    assert "portions" in shown
    assert "of 24 done" in shown
    assert "of the whole batch, with penalties" in shown
    assert max(len(line.rstrip()) for line in shown.replace("\r", "\n").split("\n") if "\x1b" not in line) <= width


def test_a_real_run_writes_the_files_of_any_run_and_a_picture_of_its_iterations(tmp_path: Path) -> None:
    result, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": 10}))
    assert summarize(read_events(tmp_path / "run" / "events.jsonl")) == read_summary(tmp_path / "run" / "summary.json")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["batch"]["iterations"] == 10 == result.summary.batch.iterations  # type: ignore[union-attr]
    assert summary["batch"]["evaluations"] == summary["batch"]["round_trips"]
    pictures = {path.name for path in write_plots(heard, tmp_path / "plots")}
    assert "iterations.png" in pictures
    assert list((tmp_path / "run" / "tensorboard").iterdir())
