# SPDX-License-Identifier: Apache-2.0
"""How the job reaches the zygote: code by reference where it can be, the bytes of tensors and arrays out of band.

Functions and classes of the user's files travel by name; what other processes cannot import, as it is: lambdas, inner
functions, cells of a notebook. The big buffers of an in-memory data set are written once into anonymous memory that all
roles then share. What is mapped from a file, for reading, is mapped again where roles are on the same machine: it may
be larger than memory.
"""

import copyreg
import io
import itertools
import mmap
import os
import pickle
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing import current_process
from types import CodeType, FunctionType
from typing import Any, ClassVar

import cloudpickle
import numpy
import torch

from distbelief.engine.user_code import ZYGOTE, importing, is_in_main, reduce_code
from distbelief.errors import ConfigurationError


class Shared:
    """Stands for what `Engine.load` prepared, in the arguments of a role."""


SHARED = Shared()
_SHARED_NAME = "shared"


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(memoryview(buffer)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _map(filename: str, dtype: numpy.dtype[Any], offset: int, shape: tuple[int, ...], order: Any) -> Any:
    return numpy.memmap(filename, dtype, "r", offset, shape, order)


def _mapped_again(value: numpy.memmap[Any, Any]) -> tuple[Any, ...] | None:
    """How to map the same part of the same file; None where that is not known, or memory may hold something else."""
    whole: Any = value
    while isinstance(whole.base, numpy.ndarray):
        whole = whole.base
    order = "C" if value.flags.c_contiguous else "F" if value.flags.f_contiguous else None
    if not (isinstance(whole, numpy.memmap) and isinstance(whole.base, mmap.mmap) and whole.mode == "r"):
        return None
    offset, path = whole.offset + value.ctypes.data - whole.ctypes.data, str(whole.filename)
    if order is None or not value.nbytes or not os.path.isfile(path) or os.path.getsize(path) < offset + value.nbytes:
        return None
    return _map, (path, value.dtype, offset, value.shape, order)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles plain CPU tensors out of band, as protocol 5 does NumPy arrays, and the shared object by name."""

    dispatch_table: ClassVar[Any] = ChainMap(
        {CodeType: reduce_code},
        copyreg.dispatch_table,
        # Text files would travel as all their text.
        {kind: reduce for kind, reduce in cloudpickle.Pickler.dispatch_table.items() if kind is not io.TextIOWrapper},
    )

    here = False
    """Whether it is unpickled on this machine, which has the same files."""

    @classmethod
    def dumps(cls, value: Any, *, buffers: list[pickle.PickleBuffer] | None = None, here: bool = False) -> bytes:
        """Pickle `value`; raises what pickle raises for objects that cannot be."""
        file = io.BytesIO()
        pickler = cls(file, protocol=5, buffer_callback=None if buffers is None else buffers.append)
        pickler.here = here
        pickler.dump(value)
        return file.getvalue()

    def persistent_id(self, value: Any) -> str | None:
        """Name the shared object instead of copying it."""
        return _SHARED_NAME if value is SHARED else None

    def reducer_override(self, value: Any) -> Any:
        """Hand a plain tensor's memory to pickle as a buffer, and code by reference or as it is."""
        if isinstance(value, type | FunctionType):
            return NotImplemented if is_in_main(value) else super().reducer_override(value)
        if type(value) is numpy.memmap and self.here:
            return _mapped_again(value) or NotImplemented
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
        if not plain or value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        rows = value.detach().contiguous().view(-1).unsqueeze(-1)  # a single element may have any stride in one row
        flat = rows.view(torch.uint8).numpy()
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


def pack(
    prepare: Callable[..., Any], arguments: tuple[Any, ...], attempt: Callable[[Any], object] | None, *, here: bool
) -> Luggage:
    """Pickle what `Engine.load` is given, to be loaded `here` or on any host. Raises ConfigurationError."""
    if current_process().name == ZYGOTE:
        raise ConfigurationError(
            "other processes import the program, and importing it starts training again",
            hint='put what trains below `if __name__ == "__main__":`',
        )
    main, buffers = importing(), list[pickle.PickleBuffer]()
    try:
        text = Pickler.dumps((prepare, arguments, attempt), buffers=buffers, here=here)
    except Exception as error:
        raise ConfigurationError(
            f"{_culprit(arguments)} cannot be handed to other processes: {error}",
            hint="give data as a function that builds the data set, and leave files, locks and generators out of the "
            "other fields, and of what their functions name",
        ) from error
    return Luggage(main, [memoryview(text), *(buffer.raw() for buffer in buffers)])


def _culprit(arguments: tuple[Any, ...]) -> str:
    """The first field of a dataclass among these that cannot be pickled, as its user gave it."""
    for value in filter(is_dataclass, arguments):
        for field in fields(value):
            try:
                Pickler.dumps(getattr(value, field.name), buffers=[])
            except Exception:
                return f"{type(value).__name__}({field.name}=...)"
    return "the job"


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
