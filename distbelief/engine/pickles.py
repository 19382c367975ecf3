# SPDX-License-Identifier: Apache-2.0
"""How the job reaches the zygote: code by reference where it can be, the bytes of tensors and arrays out of band.

Functions and classes of the user's files travel by name; what other processes cannot import, as it is: lambdas, inner
functions, cells of a notebook. The big buffers of an in-memory data set are written once into anonymous memory that all
roles then share.
"""

import copyreg
import inspect
import io
import itertools
import linecache
import os
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import current_process, spawn
from types import CodeType, FunctionType
from typing import Any, ClassVar

import cloudpickle
import torch

from distbelief.errors import ConfigurationError


class Shared:
    """Stands for what `Engine.load` prepared, in the arguments of a role."""


SHARED = Shared()
_SHARED_NAME = "shared"
ZYGOTE = "distbelief zygote"
"""What multiprocessing calls the zygote, from before it imports the user's script; its roles inherit it."""


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(memoryview(buffer)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _rebuild_code(
    file: str, lines: list[str], rebuild: Callable[..., CodeType], arguments: tuple[Any, ...]
) -> CodeType:
    """Code of a notebook's cell, which is a file to nobody but Python: tracebacks show its lines."""
    linecache.cache[file] = sum(map(len, lines)), None, lines, file
    return rebuild(*arguments)


def _main() -> dict[str, Any]:
    """How other processes import the user's program, as multiprocessing does it, if it is in a file that they can."""
    main = spawn.get_preparation_data(ZYGOTE)
    del main["authkey"]  # multiprocessing's own, which it refuses to pickle; our roles do not use it
    if not os.path.isfile(main.get("init_main_from_path", __file__)):
        del main["init_main_from_path"]  # it comes from the standard input
    if main.get("init_main_from_name", "").rpartition(".")[2] == "__main__":
        del main["init_main_from_name"]
    return main


def _is_in_main(value: type | FunctionType) -> bool:
    """Whether other processes find it in `__main__` when they import that."""
    if value.__module__ != "__main__" or _main().keys().isdisjoint(("init_main_from_path", "init_main_from_name")):
        return False
    found: Any = sys.modules["__main__"]
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not value:
        return False
    functions = [value] if isinstance(value, FunctionType) else vars(value).values()
    codes = [inspect.unwrap(each).__code__ for each in functions if isinstance(each, FunctionType)]
    return all(os.path.isfile(code.co_filename) for code in codes)  # else it was typed in behind the file


def _reduce_code(code: CodeType) -> Any:
    """As cloudpickle does, whose versions from 3.1.1 on leave out the file, which tracebacks name."""
    rebuild, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    arguments = tuple(code.co_filename if each == "<dynamic-code>" else each for each in arguments)
    lines = [] if os.path.isfile(code.co_filename) else linecache.getlines(code.co_filename)
    return (_rebuild_code, (code.co_filename, lines, rebuild, arguments)) if lines else (rebuild, arguments)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles plain CPU tensors out of band, as protocol 5 does NumPy arrays, and the shared object by name."""

    dispatch_table: ClassVar[Any] = ChainMap(
        {CodeType: _reduce_code},
        # Text files would travel as all their text.
        {kind: reduce for kind, reduce in cloudpickle.Pickler.dispatch_table.items() if kind is not io.TextIOWrapper},
        copyreg.dispatch_table,
    )

    @classmethod
    def dumps(cls, value: Any, *, buffers: list[pickle.PickleBuffer] | None = None) -> bytes:
        """Pickle `value`; raises what pickle raises for objects that cannot be."""
        file = io.BytesIO()
        cls(file, protocol=5, buffer_callback=None if buffers is None else buffers.append).dump(value)
        return file.getvalue()

    def persistent_id(self, value: Any) -> str | None:
        """Name the shared object instead of copying it."""
        return _SHARED_NAME if value is SHARED else None

    def reducer_override(self, value: Any) -> Any:
        """Hand a plain tensor's memory to pickle as a buffer, and code by reference or as it is."""
        if isinstance(value, type | FunctionType):
            return NotImplemented if _is_in_main(value) else super().reducer_override(value)
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
        if not plain or value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        flat = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _rebuild, (pickle.PickleBuffer(flat), value.dtype, tuple(value.shape))


class Unpickler(pickle.Unpickler):
    """The inverse of Pickler."""

    shared: Any = None

    @classmethod
    def loads(cls, text: bytes | memoryview, buffers: list[memoryview] | None = None, *, shared: Any = None) -> Any:
        """Unpickle; the buffers become the memory of tensors and arrays, SHARED becomes `shared`."""
        unpickler = cls(io.BytesIO(text), buffers=buffers)
        unpickler.shared = shared
        return unpickler.load()

    def persistent_load(self, name: Any) -> Any:
        """The shared object."""
        if name != _SHARED_NAME:
            raise pickle.UnpicklingError(f"unknown persistent name {name!r}")
        return self.shared


def places(sizes: Sequence[int]) -> list[int]:
    """Where buffers of these sizes begin that lie one after another, 64-byte aligned; last, where all of them end."""
    return [0, *itertools.accumulate((size + 63) & ~63 for size in sizes)]


@dataclass(frozen=True)
class Luggage:
    """A job on its way to where roles are born: the pickle first, then the memory of its tensors and arrays."""

    main: dict[str, Any]
    """How to import the user's script, as multiprocessing does it."""
    buffers: list[memoryview]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each buffer."""
        return [buffer.nbytes for buffer in self.buffers]

    def arena(self) -> int:
        """All buffers in anonymous memory; returns its descriptor."""
        descriptor = new_arena(self.sizes)
        for start, buffer in zip(places(self.sizes), self.buffers, strict=False):
            write(descriptor, start, buffer)
        return descriptor


def pack(prepare: Callable[..., Any], arguments: tuple[Any, ...], attempt: Callable[[Any], object] | None) -> Luggage:
    """Pickle what `Engine.load` is given. Raises ConfigurationError for what cannot be."""
    if current_process().name == ZYGOTE:
        raise ConfigurationError(
            "other processes import the program, and importing it starts training again",
            hint='put what trains below `if __name__ == "__main__":`',
        )
    main, buffers = _main(), list[pickle.PickleBuffer]()
    try:
        text = Pickler.dumps((prepare, arguments, attempt), buffers=buffers)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the job cannot be handed to other processes: {error}",
            hint="give data as a function that builds the data set, and leave files, locks and generators out of the "
            "other fields",
        ) from error
    return Luggage(main, [memoryview(text), *(buffer.raw() for buffer in buffers)])


def new_arena(sizes: Sequence[int]) -> int:
    """Anonymous memory for buffers of these sizes; returns its descriptor."""
    descriptor = os.memfd_create("distbelief-job")
    os.ftruncate(descriptor, places(sizes)[-1])
    return descriptor


def write(arena: int, start: int, part: memoryview) -> None:
    """Write into an arena."""
    written = 0
    while written < part.nbytes:
        written += os.pwrite(arena, part[written : written + (1 << 30)], start + written)
