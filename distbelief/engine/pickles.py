# SPDX-License-Identifier: Apache-2.0
"""How the job reaches the zygote: by reference for code, out of band for the bytes of tensors and arrays.

Functions and classes of the user travel by name and must be importable; the big buffers of an in-memory data set are
written once into anonymous memory that all roles then share.
"""

import io
import pickle
from typing import Any

import torch


class Shared:
    """Stands for what `Engine.load` prepared, in the arguments of a role."""


SHARED = Shared()
_SHARED_NAME = "shared"


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(memoryview(buffer)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


class Pickler(pickle.Pickler):
    """Pickles plain CPU tensors out of band, as protocol 5 does NumPy arrays, and the shared object by name."""

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
        """Hand a plain tensor's memory to pickle as a buffer."""
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
        if not plain or value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return NotImplemented
        flat = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _rebuild, (pickle.PickleBuffer(flat), value.dtype, tuple(value.shape))


class Unpickler(pickle.Unpickler):
    """The inverse of Pickler."""

    shared: Any = None

    @classmethod
    def loads(cls, text: bytes, buffers: list[memoryview] | None = None, *, shared: Any = None) -> Any:
        """Unpickle; the buffers become the memory of tensors and arrays, SHARED becomes `shared`."""
        unpickler = cls(io.BytesIO(text), buffers=buffers)
        unpickler.shared = shared
        return unpickler.load()

    def persistent_load(self, name: Any) -> Any:
        """The shared object."""
        if name != _SHARED_NAME:
            raise pickle.UnpicklingError(f"unknown persistent name {name!r}")
        return self.shared
