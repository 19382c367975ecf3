# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: chosen, made, held by the one process that trains it. What the disk refuses is said at once."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from distbelief import checkpoint
from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.export import STATE
from distbelief.job import Job
from distbelief.launch import LAUNCH
from distbelief.report.files import EVENTS


def choose(job: Job, resume: Path | str | None) -> tuple[Path, Path]:
    """(the run folder: the one to resume, or a new one; how it was given). Raises ConfigurationError, CheckpointError.

    The user's code may change the working folder while the job runs.
    """
    if resume is not None:
        shown = Path(resume)
        run = shown.absolute()
        if not os.path.isdir(run):
            raise CheckpointError(f"{shown} is no run folder\nhint: give the folder that an earlier run printed")
        return run, shown
    name = getattr(job.model, "__name__", getattr(getattr(job.model, "func", None), "__name__", "model")).lower()
    name = "model" if name == "<lambda>" else name
    shown = Path(job.run) if job.run is not None else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run = shown.absolute()
    with writing(shown):
        if run.exists():
            raise FileExistsError
    return run, shown


def make(job: Job, run: Path, shown: Path) -> None:
    """Make a new run folder, and try whether it can be written. Raises ConfigurationError."""
    with writing(shown):
        run.mkdir(parents=True)
        probe = run / "probe"
        try:
            probe.write_bytes(b"0" * 4096)
            probe.unlink()
        except OSError:
            shutil.rmtree(run, ignore_errors=True)
            raise
    if job.checkpoints is not None:
        _keep_elsewhere(run, job)


def _keep_elsewhere(run: Path, job: Job) -> None:
    store = job.checkpoints or ""
    try:
        if store.startswith("memory:") and job.cluster.engine != "simulated":
            raise OSError("every process has a memory of its own")
        checkpoint.keep_elsewhere(run, store if "://" in store else str(Path(store).absolute()))
    except (OSError, CheckpointError) as error:
        shutil.rmtree(run)
        raise ConfigurationError(
            f"checkpoints cannot be kept at {store}: {error}",
            hint="give a place that every host can write, with the package that fsspec needs for it, and nothing in it",
        ) from error


@contextlib.contextmanager
def held(run: Path, *, resume: bool) -> Iterator[None]:
    """Hold the run for this process; the system lets go of it however the process ends. Raises ConfigurationError."""
    path = run / EVENTS
    if resume and not path.exists():
        yield  # it may be no run
        return
    with writing(run):
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"{run} is being trained by another process, or by another thread of this one",
                hint="wait until it has ended, or end it",
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # for processes, too, that a listener may have forked


def is_held(run: Path) -> bool:
    """Whether somebody is training the run, where the file system has locks."""
    with (run / EVENTS).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


def is_kept(run: Path) -> bool:
    """Whether there is a checkpoint; a store that is out of reach now may be there again when it is wanted."""
    if not ((run / LAUNCH).exists() and (run / STATE).exists()):
        return False  # somebody has emptied it
    try:
        return bool(checkpoint.complete(run))
    except OSError:
        return True


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """Raise what the disk refuses as a ConfigurationError."""
    try:
        yield
    except FileExistsError as error:  # also when another job was quicker to make it
        raise ConfigurationError(
            f"the run folder {run} exists",
            hint=f"choose another run folder, remove it, or go on from it with `distbelief resume {run}`",
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"the run folder {run} cannot be written: {error}", hint="give run=... on a disk with room and permission"
        ) from error
