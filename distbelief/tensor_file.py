# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that is written and read part by part, by somebody who never holds all that is in it.

    length of the header, 8 bytes | header: name -> dtype, shape, place | values, one tensor after another

The package safetensors writes only what is in memory, and reads only files of this machine.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, final

import torch

from distbelief.errors import ConfigurationError
from distbelief.files import open_over

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
"""What the format calls the dtypes that it has."""

_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_ALIGNMENT = 8
"""Bytes; the values begin at a multiple of it, so that a mapped file can be used as it lies."""


@final
class TensorFile:
    """A file that is being written; made by `create`."""

    def __init__(self, file: BinaryIO, places: Mapping[str, tuple[torch.dtype, int]]) -> None:
        self._file, self._places = file, places

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write these values from element `start` of a tensor on, counted in one row. Raises OSError."""
        dtype, place = self._places[name]
        assert values.dtype == dtype
        self._file.seek(place + start * dtype.itemsize)
        plain = values.detach().resolve_conj().resolve_neg()
        rows = plain.reshape(-1).contiguous().unsqueeze(-1)  # a single element may have any stride in one row
        self._file.write(rows.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def create(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFile]:
    """A file of tensors of these dtypes and shapes, complete when the context is left.

    What is not written is zero, or where a file was there already, anything.
    Raises OSError, and ConfigurationError for a dtype that the format has not.
    """
    named = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places: dict[str, tuple[torch.dtype, int]] = {}
    end = 0
    # The widest first: then each tensor begins at a multiple of its element's size.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in named:
            raise ConfigurationError(
                f"{name} has dtype {dtype}, which a safetensors file cannot hold",
                hint=f"convert it to one of {', '.join(str(known).removeprefix('torch.') for known in named)}",
            )
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": named[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = (dtype, start)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = 8 + len(text)
    with open_over(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(first + end)
        yield TensorFile(file, {name: (dtype, first + start) for name, (dtype, start) in places.items()})


@final
class TensorReader:
    """The tensors of a file that can be read from anywhere; raises ValueError when it is none of this format."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header would have {length} bytes")
        header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._first = 8 + length
        self._entries = {name: (DTYPES[entry["dtype"]], entry["data_offsets"]) for name, entry in header.items()}
        size_bytes, end = file.seek(0, os.SEEK_END), max((end for _, (_, end) in self._entries.values()), default=0)
        if size_bytes != self._first + end:
            raise ValueError(f"it has {size_bytes} bytes, its header says {self._first + end}")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By the names of the tensors."""
        return {name: dtype for name, (dtype, _) in self._entries.items()}

    def read(self, name: str, part: slice) -> torch.Tensor:
        """Elements of a tensor, counted in one row. Raises OSError, and ValueError when the file is too short."""
        dtype, (begin, end) = self._entries[name]
        start, stop, _ = part.indices((end - begin) // dtype.itemsize)
        values = torch.empty(stop - start, dtype=dtype)
        self._file.seek(self._first + begin + start * dtype.itemsize)
        left = memoryview(values.view(torch.uint8).numpy().data).cast("B")
        while len(left):
            count = self._file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"it ends within {name}")
            left = left[count:]
        return values
