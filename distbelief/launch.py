# SPDX-License-Identifier: Apache-2.0
"""How a run was started, so that `distbelief resume RUN` can start it again: the script, and what commands said."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import msgspec

from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.files import MALFORMED
from distbelief.job import Job

LAUNCH = "launch.json"


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The commands behind a run."""

    script: str | None = None
    """Path of the script that defines `job`; None when there is none, as in an interactive session."""
    commands: tuple[tuple[str, ...], ...] = ()
    """The options of each command, the first one first, as they were typed: so they may be of any type."""
    call: str = "distbelief.train({job}, resume={run!r})"
    """What resumes the run in Python, where there is no script; empty for a run that is not kept."""

    def then(self, command: Sequence[str]) -> "Launch":
        """With another command behind these."""
        return msgspec.structs.replace(self, commands=(*self.commands, tuple(command)) if command else self.commands)

    def write(self, run: Path) -> None:
        """Keep it in the run folder. Raises OSError."""
        (run / LAUNCH).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def read(run: Path) -> Launch:
    """How the run was started. Raises CheckpointError."""
    try:
        return msgspec.json.decode((run / LAUNCH).read_bytes(), type=Launch)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{run} was started by another version of distbelief, which kept other things: {error}\n"
            f"hint: go on with distbelief.train(job, resume={str(run)!r})"
        ) from error
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(
            f"{run} does not say how it was started: {error}\nhint: give the folder that an earlier run printed"
        ) from error


def of_main(job: Job) -> Launch:
    """The script that is running, if it is a file that a command can import, and its `job` is this very job."""
    main = sys.modules.get("__main__")
    path, found = getattr(main, "__file__", None), getattr(main, "job", None)
    if not path or not os.path.isfile(path) or found is not job or in_package():
        return Launch()
    script = Path(path).resolve()
    try:
        check_name(script)
    except ConfigurationError:
        return Launch()
    return Launch(str(script))


def check_text(*paths: Path | str | None) -> None:
    """Raise ConfigurationError for a path whose bytes are no text, which events and manifests could not name."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"the path {str(path)!a} is no text in {sys.getfilesystemencoding()}, the encoding of file names here",
                hint="rename that file or folder, or use another",
            ) from error


def in_package() -> bool:
    """Whether what is running is a module of a package, or `__main__.py`, and cannot be started again as a file."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and (bool(spec.parent) or spec.name == "__main__")


def job_of(path: Path) -> Callable[..., Job]:
    """The `job` of a script, as a function. Raises ConfigurationError."""
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise ConfigurationError(
            f"there is no file {path} that can be read", hint="give the path of a Python file that defines job"
        )
    path = path.resolve()  # other processes import it from where it lies, by the name that it has there
    check_name(path)
    found = getattr(_load(path), "job", None)
    if isinstance(found, Job):
        job = found
        return lambda: job
    if not inspect.isfunction(found):
        raise ConfigurationError(
            f"{path} defines no job" if found is None else f"{path}: job is a {type(found).__name__}",
            hint="define `job = distbelief.Job(...)`, or a function `def job(...) -> distbelief.Job`",
        )
    return found


def check_name(path: Path) -> None:
    """Raise ConfigurationError for a script that other processes cannot import."""
    if "." in path.stem:
        raise ConfigurationError(
            f"{path} cannot be imported, as other processes do, for the dot in its name",
            hint=f"rename it, for example to {path.stem.replace('.', '_')}.py",
        )
    if path.suffix != ".py":
        raise ConfigurationError(f"{path} is no Python file", hint="give a file whose name ends in .py")
    known = sys.modules.get(path.stem)
    if path.stem in sys.stdlib_module_names or (known and _file_of(known) != path):
        raise ConfigurationError(
            f"{path} has the name of another module, which processes would import in its place",
            hint=f"rename it, for example to my_{path.name}",
        )


def _file_of(module: ModuleType) -> Path | None:
    path = getattr(module, "__file__", None)
    return Path(path).resolve() if path else None


def _load(path: Path) -> ModuleType:
    """Import a file under its own name, so that other processes find its functions by that name."""
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
