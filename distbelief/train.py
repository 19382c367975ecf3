# SPDX-License-Identifier: Apache-2.0
"""Start the roles, run the algorithm, return the Result."""

import contextlib
import shlex
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from distbelief import checkpoint, events, run_folder
from distbelief.appoint import appoint, check_resume, started
from distbelief.attempt import attempt
from distbelief.coordinator import Coordinator
from distbelief.draws import draws_kept
from distbelief.engine.base import Engine, Faults
from distbelief.engine.hosts import HostsEngine
from distbelief.engine.simulated import SimulatedEngine
from distbelief.engine.virtual import Costs
from distbelief.engines import engine_of
from distbelief.errors import ConfigurationError
from distbelief.events import AnyEvent, Listener, Observation
from distbelief.export import write_template
from distbelief.job import Facts, Job, prepare
from distbelief.launch import Launch, check_text, of_main
from distbelief.model_replica import check_device
from distbelief.parameters import Span, cut
from distbelief.recut import recut
from distbelief.report.files import EVENTS, SUMMARY, EventFile, read_events, write_summary
from distbelief.report.summary import Summary, summarize, text
from distbelief.report.tensorboard import tensorboard_files
from distbelief.report.terminal import Terminal
from distbelief.uncut import Uncut


@dataclass(frozen=True)
class Result:
    """What a job came to."""

    summary: Summary
    run: Path
    """The run folder, absolute: checkpoints, events.jsonl, summary.json, TensorBoard files."""
    _model: Callable[[], nn.Module] = field(repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The trained module: in eval mode, with the servers' parameters and the mean of the replicas' buffers.

        One that was trained in partitions is put together, whole, when it is first asked for, from the last checkpoint.
        Raises CheckpointError where that could not be written.
        """
        return self._model().eval()

    @property
    def test(self) -> dict[str, float | None]:
        """The last measurement on the held-out data."""
        return dict(self.summary.test)


def train(
    job: Job,
    *,
    resume: Path | str | None = None,
    faults: Faults | None = None,
    costs: Costs | None = None,
    listeners: Sequence[Listener] = (),
    view: bool = True,
    launch: Launch | None = None,
) -> Result:
    """Train `job` and return the trained model.

    `resume` continues the run in that folder from its newest checkpoint. `faults` scripts deaths and slowness, `costs`
    are the simulated engine's times. `listeners` hear every event; one that raises StopIteration(why) ends the job as
    Ctrl-C does, with a checkpoint. `view=False` prints nothing. `launch` is how to start the job again, kept for
    `distbelief resume`; by default the running script.

    Raises ConfigurationError before anything has started, UserCodeError, TrainingFailed, CheckpointError, and what
    else a listener raised.
    """
    if not isinstance(job, Job):
        raise ConfigurationError(
            f"distbelief.train was given a {type(job).__name__}, not a Job",
            hint="give distbelief.Job(model=..., data=...)",
        )
    if not isinstance(listeners, Sequence) or not all(map(callable, listeners)):
        raise ConfigurationError(
            f"distbelief.train(listeners={listeners!r}) is no list of functions",
            hint="give a list of what is to be called with each event, such as listeners=[print]",
        )
    if job.cluster.engine != "ray":  # this process computes nothing, and other hosts have other devices
        check_device(job.cluster.device)
    run, shown = run_folder.choose(job, resume)
    launched = launch or of_main(job)
    check_text(run, launched.script, job.checkpoints)
    engine = engine_of(job, faults, costs)
    with contextlib.ExitStack() as alone, contextlib.closing(engine):
        alone.enter_context(_untouched(engine))
        facts = engine.load(prepare, job, attempt=attempt)
        spans = _spans(job, facts)
        with draws_kept():  # not for the whole job: other threads of the program draw, too
            model = Uncut(job, facts)
        refused = alone.enter_context(contextlib.ExitStack())
        if resume is None:
            run_folder.make(job, run, shown)
            refused.callback(shutil.rmtree, run, ignore_errors=True)
        alone.enter_context(run_folder.held(run, resume=resume is not None))
        if isinstance(engine, HostsEngine) and isinstance(home := checkpoint.home(run), Path):
            engine.check_visible(home if home.is_dir() else run)
        rejected: list[AnyEvent] = []
        restore = None
        if resume is not None:
            restore = checkpoint.newest(
                run, lambda path, reason: rejected.append(events.CheckpointRejected(path=str(path), reason=reason))
            )
            checkpoint.check_same_model(restore[1], model.module, restore[0])
            check_resume(job, facts, *restore)
        with run_folder.writing(run):
            if restore is not None:
                restore = recut(*restore, facts.layout, facts.buffers, model.buffers)
        record = Record(run)
        with _reporting(record, run, engine, listeners, view) as emit:
            for event in rejected:
                emit(event)

            def tell(event: AnyEvent) -> None:
                try:
                    wish = emit(event)
                    coordinator.interrupted = coordinator.interrupted or wish
                except Exception as error:  # of a listener: a role that is being answered is not to blame for it
                    coordinator.failure = coordinator.failure or error

            coordinator = appoint(job, engine, facts, run, spans, model, restore, tell)
            with run_folder.writing(run):  # only now that all of it is accepted
                launched.write(run)
                write_template(run, model.module, model.values)
            refused.pop_all()
            engine.answer(coordinator)
            reason = "failed"
            with _stopping_on_signals(coordinator):
                try:
                    commands = _commands(shown, launched, coordinator)
                    wish = emit(started(job, facts, shown, spans, coordinator, *commands))
                    coordinator.interrupted = coordinator.interrupted or wish
                    coordinator.start(restore)
                    reason = coordinator.run()
                    if coordinator.failure is not None:
                        raise coordinator.failure
                    model.load(engine, coordinator, spans)
                except BaseException as error:
                    lines = [line for line in str(error).strip().splitlines() if not line.startswith("hint:")]
                    said = (lines or [""])[-1]
                    reason = f"failed: {type(error).__name__}" + (f": {said}" if said else "")
                    raise
                finally:
                    commands = _commands(shown, launched, coordinator) if run_folder.is_kept(run) else ("", "")
                    try:
                        emit(coordinator.finished(reason, *commands))
                    finally:
                        _write_summary(run, record.summary())
    summary = record.summary()
    return Result(summary, run, partial(model.trained, run, kept=not summary.checkpoints.last_failed))


def _spans(job: Job, facts: Facts) -> list[Span]:
    length = facts.layout.length
    if job.cluster.shards > length:
        raise ConfigurationError(
            f"cannot cut {length} parameters into {job.cluster.shards} shards",
            hint=f"use Cluster(shards={length}) or fewer",
        )
    return cut(length, job.cluster.shards)


@contextlib.contextmanager
def _untouched(engine: Engine) -> Iterator[None]:
    """Compute as torch does by default, whatever is set around the call, and leave the user's random numbers alone."""
    with contextlib.ExitStack() as stack:
        if isinstance(engine, SimulatedEngine):  # roles draw in this process
            stack.enter_context(draws_kept())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _commands(run: Path, launched: Launch, coordinator: Coordinator) -> tuple[str, str]:
    """(what resumes the run, what exports its model) once there is a checkpoint; empty for a run that is not kept."""
    if not (launched.script or launched.call):
        return "", ""
    folder, (option, expression) = shlex.quote(str(run)), coordinator.go_on()
    if launched.script is None:
        resume = launched.call.format(job=expression, run=str(run))
    else:
        resume = f"distbelief resume {folder}" + (f" {option}" if option else "")
    return resume, f"distbelief export {folder} model.safetensors"


class Record:
    """Remembers what the summary is made of: the run's earlier events, and this one's with only the latest progress."""

    def __init__(self, run: Path) -> None:
        path = run / EVENTS
        self._before = read_events(path) if path.exists() else []
        self._heard: list[Observation] = []

    def __call__(self, observation: Observation) -> None:
        """Hear an event."""
        last, event = self._heard[-1].event if self._heard else None, observation.event
        match last, event:
            case events.Progress(loss=before), events.Progress(loss=now) if before is None or now is not None:
                self._heard.pop()
            case events.BatchProgress(), events.BatchProgress():
                self._heard.pop()
        self._heard.append(observation)

    def summary(self) -> Summary:
        """The summary of everything heard."""
        return summarize([*self._before, *self._heard])


@contextlib.contextmanager
def _reporting(
    record: Record, run: Path, engine: Engine, listeners: Sequence[Listener], view: bool
) -> Iterator[Callable[[AnyEvent], str | None]]:
    """Tells an event to everything that hears, for the time of the job; answers why a listener wants that to end.

    Writes and prints the summary at the end.
    """
    console = Console()
    with run_folder.writing(run):
        file = EventFile(run / EVENTS)
    board = tensorboard_files(run / "tensorboard")
    started = engine.now()
    with contextlib.ExitStack() as stack:
        hearing: list[Listener] = [file, record, *listeners]
        stack.callback(file.close)
        if board is not None:
            hearing.append(board)
            stack.callback(board.close)
        if view:
            hearing.append(stack.enter_context(Terminal(console)))

        def emit(event: AnyEvent) -> str | None:
            observation, wish = Observation(engine.now() - started, event), None
            for listener in hearing:
                try:
                    listener(observation)
                except StopIteration as stop:
                    wish = ": ".join(["stopped by a listener", *map(str, stop.args)])
            return wish

        yield emit
    if view:
        with contextlib.suppress(OSError, UnicodeError):  # the result is there, whoever reads of it
            console.out(text(record.summary()), highlight=False)


def _write_summary(run: Path, summary: Summary) -> None:
    try:
        write_summary(run / SUMMARY, summary)
    except OSError as error:
        warnings.warn(f"{run / SUMMARY} was not written: {error}", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def _stopping_on_signals(coordinator: Coordinator) -> Iterator[None]:
    """Ctrl-C, SIGTERM or a terminal that closes: checkpoint and stop cleanly. Ctrl-C or SIGTERM again: stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if coordinator.interrupted is None:
            coordinator.interrupted = f"stopped by {signal.Signals(number).name}"
        elif number != signal.SIGHUP:  # which the kernel and the shell both send when a terminal closes
            raise KeyboardInterrupt

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[int, Any] = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
