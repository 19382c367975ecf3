# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie: a folder of this machine, or one of a store that every host reaches, by its fsspec URL.

What goes to a store is written to a nameless file of this machine first, which vanishes with the process that made it,
however that ends; what is read from it is read in the parts that are needed.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import fsspec
import msgspec

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises for what is not as it was written: of no text, or of too many brackets, Python's own errors."""
_COPY_BYTES = 1 << 24
_REFUSALS = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT)


@final
@dataclass(frozen=True)
class StorePath:
    """A file or folder of a store, "s3://bucket/run"."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The folder that it is in."""
        return StorePath(self.url.rstrip("/").rpartition("/")[0])

    def exists(self) -> bool:
        """Whether it is there. Raises OSError."""
        return bool(self._call("exists"))

    def is_dir(self) -> bool:
        """Whether it is a folder that holds something. Raises OSError."""
        return bool(self._call("isdir"))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder and those that it is in, where the store knows such a thing. Raises OSError."""
        self._call("makedirs", exist_ok=True)

    def children(self) -> list["StorePath"]:
        """What is in the folder; nothing where there is none. Raises OSError."""
        try:
            found = self._call("ls", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return [self / str(path).rstrip("/").rpartition("/")[2] for path in found]

    def size_bytes(self) -> int:
        """The size of the file. Raises OSError."""
        return int(self._call("size"))

    def read_bytes(self) -> bytes:
        """All of a small file. Raises OSError."""
        return bytes(self._call("cat_file"))

    def write_bytes(self, content: bytes) -> None:
        """A small file, whole or not at all where the store is like that. Raises OSError."""
        self._call("pipe_file", content)

    def open_to_read(self) -> BinaryIO:
        """The file, to be read in parts and closed by the caller. Raises OSError."""
        file: BinaryIO = self._call("open", "rb")
        return file

    def put(self, path: Path) -> None:
        """Make it a copy of a file of this machine. Raises OSError."""
        with _raised_as_os_error(self.url), path.open("rb") as source, self._call("open", "wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def copy_to(self, other: "StorePath") -> None:
        """Make `other`, of the same store, a copy of the file. Raises OSError."""
        self._call("cp_file", other._system()[1])  # `copy` asks first whether either is a folder

    def remove(self) -> None:
        """Remove it and what is in it, if it is there. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", recursive=True)

    def _system(self) -> tuple[Any, str]:
        with _raised_as_os_error(self.url):
            system, own = fsspec.core.url_to_fs(self.url)
        return system, own

    def _call(self, method: str, *given: Any, **options: Any) -> Any:
        system, own = self._system()
        with _raised_as_os_error(self.url):
            return getattr(system, method)(own, *given, **options)


@contextlib.contextmanager
def _raised_as_os_error(url: str) -> Iterator[None]:
    """The packages of stores have errors of their own, for one that is out of reach or asks for a password."""
    try:
        yield
    except OSError as error:
        if str(error) or isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{url}: {error!r}") from error
    except Exception as error:
        raise OSError(f"{url}: {error}") from error


AnyPath = Path | StorePath


def path_of(name: str) -> AnyPath:
    """The path of this machine, or the place in a store when it is a URL."""
    return StorePath(name) if "://" in name else Path(name)


@final
class Draft:
    """A file that is being written: at its place, or in a nameless one until `finish` puts it into the store."""

    def __init__(self, place: AnyPath) -> None:
        self.place = place
        self.local = place if isinstance(place, Path) else self._nameless()
        """Where to write it, as long as this object lives."""

    def _nameless(self) -> Path:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
        weakref.finalize(self, os.close, descriptor)
        return Path(f"/proc/self/fd/{descriptor}")

    def finish(self, *, durable: bool) -> None:
        """It is written: force it to disk, if it is to be `durable` beyond the machine's life. Raises OSError."""
        if isinstance(self.place, StorePath):
            self.place.put(self.local)
        elif durable:
            with self.local.open("rb") as file:
                os.fsync(file.fileno())


def open_over(path: Path) -> BinaryIO:
    """A file to be written from its beginning over what is there; truncate what is left of it. Raises OSError.

    Emptied first, as mode "wb" does, ext4 would begin to write it to the disk when it is closed.
    """
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")


def open_to_read(path: AnyPath) -> BinaryIO:
    """The file, to be read in parts and closed by the caller. Raises OSError."""
    return path.open("rb") if isinstance(path, Path) else path.open_to_read()


def children(folder: AnyPath) -> list[AnyPath]:
    """What is in a folder; nothing where there is none. Raises OSError."""
    try:
        return [*folder.iterdir()] if isinstance(folder, Path) else [*folder.children()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def may_be_whole(path: AnyPath, error: OSError) -> bool:
    """Whether what could not be read may be as it was: in a store, or where the system refused to look."""
    return isinstance(path, StorePath) or error.errno in _REFUSALS


def remove(path: AnyPath) -> None:
    """Remove a file or a folder with what is in it, if it is there, as far as that can be done."""
    with contextlib.suppress(OSError):
        if isinstance(path, StorePath):
            path.remove()
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def copy(source: AnyPath, target: AnyPath) -> None:
    """Make `target`, of the same disk or store, the same file, without a copy where the disk can. Raises OSError."""
    if isinstance(source, StorePath):
        assert isinstance(target, StorePath)
        source.copy_to(target)
        return
    assert isinstance(target, Path)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
