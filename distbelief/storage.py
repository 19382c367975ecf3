# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie: in a folder, or in a store that all hosts reach, such as S3, through fsspec.

A store's place is a Path, too: Path makes of "s3://bucket/run" `s3:/bucket/run`, which no other path looks like.
Files of tensors are written and read in one piece on the own disk (`spool`, `fetched`), and carried from and to there.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_STORE = re.compile(r"([a-z][a-z0-9+.-]+):/+")


def is_store(path: Path) -> bool:
    """Whether it is a place in a store."""
    return _STORE.match(str(path)) is not None


def text(path: Path) -> str:
    """The path as users write it."""
    found = _STORE.match(str(path))
    if found is None:
        return str(path)
    root = "///" if found[1] == "file" else "//"
    return f"{found[1]}:{root}{str(path)[found.end() :]}"


def _store(path: Path) -> tuple[Any, str]:
    """The file system of a store and the name of the path there."""
    import fsspec

    def find() -> tuple[Any, str]:
        system, name = fsspec.core.url_to_fs(text(path))
        system.invalidate_cache()
        return system, name

    return _attempt(path, find)


def _attempt(path: Path, action: Callable[[], T]) -> T:
    """Do it; whatever a store's client raises becomes an OSError."""
    try:
        return action()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{text(path)}: {type(error).__name__}: {error}") from error


def listing(folder: Path) -> list[Path]:
    """The folders in a folder; none when there is no such folder. Raises OSError."""
    if not is_store(folder):
        return [path for path in folder.glob("*") if path.is_dir()]
    system, name = _store(folder)

    def names() -> list[str]:
        try:
            return [entry["name"] for entry in system.ls(name, detail=True) if entry["type"] == "directory"]
        except FileNotFoundError:
            return []

    return [folder / Path(each.rstrip("/")).name for each in _attempt(folder, names)]


def make(folder: Path) -> None:
    """A new folder. Raises OSError."""
    if is_store(folder):
        system, name = _store(folder)
        _attempt(folder, lambda: system.makedirs(name, exist_ok=True))
    else:
        folder.mkdir(parents=True)


def exists(path: Path) -> bool:
    """Whether there is such a file. Raises OSError."""
    if not is_store(path):
        return path.exists()
    system, name = _store(path)
    return bool(_attempt(path, lambda: system.exists(name)))


def read(path: Path) -> bytes:
    """A whole file. Raises OSError."""
    if not is_store(path):
        return path.read_bytes()
    system, name = _store(path)
    data: bytes = _attempt(path, lambda: system.cat_file(name))
    return data


def write(path: Path, data: bytes, *, durable: bool) -> None:
    """A whole file, or none: `durable` forces it and its folder to disk. Raises OSError."""
    if is_store(path):
        system, name = _store(path)
        _attempt(path, lambda: system.pipe_file(name, data))
        return
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    part.rename(path)
    for directory in (path.parent, path.parent.parent) if durable else ():
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def share(source: Path, target: Path) -> None:
    """Let a file have a second name, without a copy where the disk can. Raises OSError."""
    if is_store(source):
        system, name = _store(source)
        _attempt(source, lambda: system.cp_file(name, _store(target)[1]))
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """A file or a folder with all that is in it; what is not there, or cannot be removed, is let be."""
    if is_store(path):
        with contextlib.suppress(OSError):
            system, name = _store(path)
            _attempt(path, lambda: system.rm(name, recursive=True))
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def spool(path: Path) -> Path:
    """Where to write a file that is then delivered: there itself, or for a store on the own disk."""
    if not is_store(path):
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"distbelief-{os.getpid()}-{name}"


def deliver(path: Path) -> None:
    """A file has been written to its `spool`: carry it to its store. Raises OSError."""
    if is_store(path):
        written = spool(path)
        system, name = _store(path)
        try:
            _attempt(path, lambda: system.put_file(str(written), name))
        finally:
            written.unlink(missing_ok=True)


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """The file on the own disk, for as long as the context lasts. Raises OSError."""
    if not is_store(path):
        yield path
        return
    system, name = _store(path)
    descriptor, copy = tempfile.mkstemp(prefix="distbelief-")
    os.close(descriptor)
    try:
        _attempt(path, lambda: system.get_file(name, copy))
        yield Path(copy)
    finally:
        os.unlink(copy)
