# SPDX-License-Identifier: Apache-2.0
"""The command line: builds the same values as a script would."""

import gc
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from msgspec.structs import replace

from distbelief import launch
from distbelief.errors import ConfigurationError, DistbeliefError, TrainingFailed
from distbelief.events import JobFinished
from distbelief.export import export
from distbelief.job import Job
from distbelief.launch import Launch
from distbelief.options import option, parse
from distbelief.outline import outline
from distbelief.report.files import EVENTS, SUMMARY, read_events, read_summary
from distbelief.report.plan import plan_text
from distbelief.report.plan_picture import plan_picture
from distbelief.report.plots import write_plots
from distbelief.report.summary import RUNNING, moved, summarize, text
from distbelief.run_folder import is_held
from distbelief.train import train

USAGE = """\
distbelief train FILE.py [--epochs 3] [--cluster.replicas 4] [--algorithm.rate 0.02]    train the job of a file
distbelief train FILE.py --algorithm sandblaster [--algorithm.max-iterations 100]       with L-BFGS
distbelief train FILE.py --help                                                         all of its options
distbelief plan FILE.py --cluster.partitions 4 [--picture plan.png]                     what each process would hold
distbelief resume RUN [--epochs 6] [--cluster.shards 3]                                 go on from a run folder
distbelief export RUN model.safetensors                                                 write an ordinary state_dict
distbelief show RUN                                                                     the summary again, and plots"""


def command() -> None:
    """Entry point of `distbelief`."""
    try:
        _command(sys.argv[1:])
    finally:
        gc.freeze()  # Python would look for garbage in all of torch before it ends, for half a second


def _command(arguments: list[str]) -> None:
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": _train, "plan": _plan, "resume": _resume, "export": _export, "show": _show,
    }  # fmt: skip
    if arguments == ["--version"]:
        _run(lambda: _say(metadata.version("distbelief")))
        return
    asked = arguments in (["-h"], ["--help"])
    if not asked and (not arguments or arguments[0] not in verbs):
        said = f"there is no command {arguments[0]}\n\n" if arguments else ""
        print(said + USAGE, file=sys.stderr)
        sys.exit(2)
    about_paths = arguments[0] in ("export", "show")  # whose arguments are no options
    if asked or (arguments[-1] in ("-h", "--help") and (len(arguments) == 2 or about_paths)):
        _run(lambda: _say(USAGE))
        return
    _run(lambda: verbs[arguments[0]](arguments[1:]))


def main(make_job: Callable[..., Job]) -> None:
    """The command line of a script: `make_job`'s parameters and the job's fields are the options.

    `make_job` is a function of the script with typed keyword parameters that all have defaults. `distbelief resume`
    can go on with the run where the script calls it `job`.
    """

    def start() -> None:
        if not inspect.isfunction(make_job):
            raise ConfigurationError(
                f"distbelief.main was given a {type(make_job).__name__}, not a function that makes a job",
                hint="give the function, or call distbelief.train(job)",
            )
        script = Path(inspect.getfile(inspect.unwrap(make_job))).resolve()
        if not launch.in_package():
            launch.check_name(script)
        found = getattr(sys.modules.get(make_job.__module__), "job", None) is make_job
        kept = Launch(str(script)) if found and not launch.in_package() else Launch()
        _start(make_job, kept, sys.argv[1:], f"python {sys.argv[0]}", None)

    _run(start)


def _run(action: Callable[[], None]) -> None:
    try:
        action()
    except DistbeliefError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError("distbelief train needs a file", hint="distbelief train FILE.py [options]")
    path = Path(arguments[0])
    _start(launch.job_of(path), Launch(str(path.resolve())), arguments[1:], f"distbelief train {path}", None)


def _plan(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError("distbelief plan needs a file", hint="distbelief plan FILE.py --cluster.partitions 4")
    path = Path(arguments[0])
    picture = option(
        "picture", Path, "PNG file to draw into: which partition holds which part of each layer.", "none is drawn"
    )
    job, _, extra = parse(
        launch.job_of(path), Launch(str(path.resolve())), arguments[1:], f"distbelief plan {path}", [picture]
    )
    plan = outline(job)
    _say(plan_text(plan))
    if extra["picture"] is not None:
        plan_picture(plan, extra["picture"])
        _say(f"\npicture     {extra['picture']}")


def _resume(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError("distbelief resume needs a run folder", hint="distbelief resume RUN [options]")
    run = Path(arguments[0])
    opened = run.absolute()
    before = launch.read(run)
    if before.script is None:
        raise ConfigurationError(
            f"{run} was not started by a command, or by a script whose job is the very one that was trained",
            hint="call " + before.call.format(job="job", run=str(run)),
        )
    for fixed in ("--run", "--checkpoints"):
        if any(word.partition("=")[0] == fixed for word in arguments[1:]):
            raise ConfigurationError(
                f"{fixed} cannot be changed when a run is resumed: it goes on where it is",
                hint=f"leave {fixed} out; to try something else, copy the run folder and resume the copy",
            )
    if not os.path.isfile(before.script):
        raise ConfigurationError(
            f"{run} was started with the file {before.script}, which is not there any more",
            hint=f"put it back, or call distbelief.train(job, resume={str(run)!r})",
        )
    make_job = launch.job_of(Path(before.script))
    same = run.absolute() == opened  # unless the file changes the working folder
    _start(make_job, before, arguments[1:], f"distbelief resume {run}", run if same else opened)


def _export(arguments: list[str]) -> None:
    if len(arguments) != 2 or any(path.startswith("-") for path in arguments):
        raise ConfigurationError("distbelief export takes two paths", hint="distbelief export RUN model.safetensors")
    numbers = export(Path(arguments[0]), Path(arguments[1]), _passed_over)
    _say(f"{arguments[1]}: {numbers:,} numbers; load it with model.load_state_dict(safetensors.torch.load_file(...))")


def _passed_over(path: object, reason: str) -> None:
    print(f"{path} is damaged and was passed over, an older checkpoint is taken: {reason}", file=sys.stderr)


def _show(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigurationError("distbelief show takes a run folder", hint="distbelief show RUN")
    run = Path(arguments[0])
    observations = read_events(run / EVENTS)
    # A run that was killed has no summary, or that of an earlier start.
    ended = isinstance(observations[-1].event, JobFinished) if observations else True
    whole = ended and (run / SUMMARY).exists()
    summary = read_summary(run / SUMMARY) if whole else summarize(observations)
    if not ended and is_held(run):
        summary = replace(summary, reason=RUNNING)
    _say(text(moved(summary, str(run))))
    try:
        for path in write_plots(observations, run / "plots"):
            _say(f"plot          {path}")
    except OSError as error:
        raise ConfigurationError(f"plots cannot be written: {error}", hint="show a copy of the run folder") from error


def _say(words: str) -> None:
    """Print what was asked for; a reader who goes away early, such as `head`, is no error."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(words.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try once more as it ends
        if not isinstance(error, BrokenPipeError):
            raise ConfigurationError(
                f"the answer cannot be written: {error.strerror}", hint="write it where there is room"
            ) from error


def _start(
    make_job: Callable[..., Job], before: Launch, arguments: Sequence[str], program: str, run: Path | None
) -> None:
    """Parse the options of the script and of the job together, build the job and train it."""
    job, launched, _ = parse(make_job, before, arguments, program)
    result = train(job, resume=run, launch=launched)
    if result.summary.checkpoints.last_failed:
        again = result.summary.resume_command
        raise TrainingFailed(
            f"the last checkpoint of {result.summary.run} could not be written: what was trained since the one before "
            "is lost\nhint: "
            + (f"make room, and train it again with {again}" if again else "let the run folder stay where it is")
        )
