# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk: `events.jsonl`, a line for each event as it happens, and `summary.json` at the end.

A run may be killed at any moment. A line counts once its newline is in the file; what follows the last newline is
half an event and is ignored on reading and cut off when the run is resumed.
"""

import contextlib
import os
import warnings
from pathlib import Path

import msgspec

from distbelief.errors import ConfigurationError
from distbelief.events import Observation, from_line, to_line
from distbelief.files import MALFORMED
from distbelief.report.summary import Summary

EVENTS, SUMMARY = "events.jsonl", "summary.json"
"""Their names in the run folder."""


class EventFile:
    """A listener that appends to `events.jsonl`; every event is handed to the operating system before it returns.

    Opening creates the folder and keeps earlier events (a resumed run). Raises OSError when the file cannot be
    opened; afterwards it never raises: when a line cannot be written it warns once and goes on with later events.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._whole_bytes = _cut_half_line(self.path)
        self._warned = False

    def __call__(self, observation: Observation) -> None:
        """Append one event."""
        if self._file.closed:
            return
        line = to_line(observation)
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            self._whole_bytes += len(line)
        except OSError as problem:
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole_bytes)
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self.path}: {problem}; events are missing from it", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Close the file; later events are ignored. May be called again."""
        # a full disk may be reported only here, when all has been done that can be
        with contextlib.suppress(OSError):
            self._file.close()


def _cut_half_line(path: Path) -> int:
    """Cut what a killed run left of its last line; returns the length of what stands."""
    if not path.stat().st_size:
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return whole


def read_events(path: Path) -> list[Observation]:
    """All events of `events.jsonl` in the order they happened; half a line at the end is left out.

    Raises ConfigurationError when there is no such file, or with the number of the first line that is no event.
    """
    lines = _read(Path(path)).split(b"\n")[:-1]
    observations = []
    for position, line in enumerate(lines, start=1):
        try:
            observations.append(from_line(line))
        except MALFORMED as problem:
            raise ConfigurationError(
                f"{path}, line {position} is not an event of this version: {problem}",
                hint="remove the line, or read the run with the version of distbelief that wrote it",
            ) from problem
    return observations


def write_summary(path: Path, summary: Summary) -> None:
    """Write `summary.json` whole or not at all: a reader, or a crash at any moment, meets the old file or the new.

    Raises OSError when it cannot be written; the old file then stands.
    """
    path = Path(path)
    content = msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # the new name is on disk only when its folder is
        os.fsync(folder)
    finally:
        os.close(folder)


def read_summary(path: Path) -> Summary:
    """The inverse of `write_summary`; raises ConfigurationError when there is none or it is not a summary."""
    try:
        return msgspec.json.decode(_read(Path(path)), type=Summary)
    except MALFORMED as problem:
        raise ConfigurationError(
            f"{path} is not a summary of this version: {problem}",
            hint="remove it: without it `distbelief show` makes the summary of the events.jsonl beside it",
        ) from problem


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as problem:
        raise ConfigurationError(
            f"there is no file {path}", hint="give the folder of a run, which holds events.jsonl and summary.json"
        ) from problem
    except OSError as problem:
        raise ConfigurationError(
            f"{path} cannot be read: {problem.strerror}",
            hint="give the folder of a run, as somebody who may read what is in it",
        ) from problem
