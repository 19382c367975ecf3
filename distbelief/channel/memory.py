# SPDX-License-Identifier: Apache-2.0
"""Memory shared with other processes of this host, without a name that could be left behind.

A block is an anonymous memfd. Its descriptor travels once over the Unix socket; the peer maps it, and from then on a
tensor inside a block travels as (block, offset, length). A block is sealed against resizing, so a peer cannot turn our
reads into SIGBUS. The memory lives until the last process that maps it is gone.
"""

import fcntl
import itertools
import mmap
import os
import weakref

import torch

from distbelief.errors import ProtocolError

_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW, of which Python names some from 3.8 on
_identifiers = itertools.count(1)


class Block(mmap.mmap):
    """A mapped piece of shared memory; the tensors made from it keep it alive."""

    identifier: int
    descriptor: int

    @classmethod
    def create(cls, size_bytes: int) -> "Block":
        """New zeroed memory of this process, with an identifier that is unique in it."""
        descriptor = os.memfd_create("distbelief", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return cls._map(next(_identifiers), descriptor, size_bytes)

    @classmethod
    def attach(cls, identifier: int, descriptor: int) -> "Block":
        """Map a peer's memory. Raises ProtocolError when the descriptor is not a block sealed against resizing."""
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            size_bytes = os.fstat(descriptor).st_size
        except OSError:
            sealed, size_bytes = False, 0
        if not sealed or not size_bytes:
            os.close(descriptor)
            raise ProtocolError("a peer offered a descriptor that is no shared memory, or that it could shrink")
        try:
            return cls._map(identifier, descriptor, size_bytes)
        except OSError as error:
            os.close(descriptor)
            raise ProtocolError(f"shared memory of {size_bytes} bytes cannot be mapped: {error}") from error

    @classmethod
    def _map(cls, identifier: int, descriptor: int, size_bytes: int) -> "Block":
        block = cls(descriptor, size_bytes)
        block.identifier, block.descriptor = identifier, descriptor
        weakref.finalize(block, os.close, descriptor)
        return block

    def tensor(self, offset_bytes: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """A view of shape (length,). Raises ProtocolError when it would leave the block."""
        if offset_bytes < 0 or length < 0 or offset_bytes + length * dtype.itemsize > len(self):
            raise ProtocolError(
                f"a tensor of {length} x {dtype} at byte {offset_bytes} leaves its block of {len(self)} bytes"
            )
        if length == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self, dtype=dtype, count=length, offset=offset_bytes)


_own: "weakref.WeakValueDictionary[int, Block]" = weakref.WeakValueDictionary()


def allocate(length: int, dtype: torch.dtype) -> torch.Tensor:
    """A zeroed CPU tensor of shape (length,) that the shared-memory channel hands over without a copy."""
    block = Block.create(max(1, length) * dtype.itemsize)
    tensor = block.tensor(0, length, dtype)
    _own[tensor.untyped_storage().data_ptr()] = block
    return tensor


def find(tensor: torch.Tensor) -> tuple[Block, int] | None:
    """The block of this process that holds the tensor, and its offset there in bytes; None for ordinary memory."""
    if not tensor.numel():
        return None  # an empty tensor has no address
    start = tensor.data_ptr()
    if (block := _own.get(start)) is not None:
        return block, 0
    base = tensor.untyped_storage().data_ptr()
    block = _own.get(base)
    return None if block is None else (block, start - base)
