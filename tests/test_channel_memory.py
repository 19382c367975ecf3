# SPDX-License-Identifier: Apache-2.0
"""Laws of shared memory: it has no name, cannot be shrunk under its readers, and is gone with its last user."""

import contextlib
import fcntl
import gc
import mmap
import os
from pathlib import Path

import pytest
import torch

from distbelief.channel import frames, memory
from distbelief.channel.memory import Block
from distbelief.errors import ProtocolError

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="this system has no memfd; tensors are streamed")


def mappings() -> int:
    """How many blocks this process has mapped; a mapping that two tensors use counts once."""
    return Path("/proc/self/maps").read_text().count("/memfd:distbelief")


def opened() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists the folder
            count += "/memfd:distbelief" in os.readlink(f"/proc/self/fd/{name}")
    return count


def attached(block: Block) -> Block:
    """The block as a peer sees it: its own descriptor, its own mapping."""
    return Block.attach(block.identifier, os.dup(block.descriptor))


@pytest.mark.parametrize("dtype", frames.DTYPES.values(), ids=frames.DTYPES)
@pytest.mark.parametrize("length", [0, 1, 1023, 4097])
def test_allocated_memory_is_a_zeroed_tensor(dtype: torch.dtype, length: int) -> None:
    tensor = memory.allocate(length, dtype)
    assert tensor.shape == (length,)
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor.fill_(1)
    assert torch.equal(tensor, torch.ones(length, dtype=dtype))


def test_what_one_side_writes_the_other_side_sees() -> None:
    mine = memory.allocate(1001, torch.float64)
    found = memory.find(mine)
    assert found is not None
    theirs = attached(found[0]).tensor(found[1], 1001, torch.float64)
    assert theirs.data_ptr() != mine.data_ptr()
    mine.copy_(torch.arange(1001))
    assert torch.equal(theirs, torch.arange(1001, dtype=torch.float64))
    theirs.neg_()
    assert torch.equal(mine, -torch.arange(1001, dtype=torch.float64))


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (3, 10), (9, 10)])
def test_a_slice_of_a_block_is_found_where_it_lies(start: int, stop: int) -> None:
    whole = memory.allocate(10, torch.int32)
    found = memory.find(whole[start:stop])
    assert found is not None
    block, offset = found
    assert offset == 4 * start
    whole.copy_(torch.arange(10))
    assert block.tensor(offset, stop - start, torch.int32).tolist() == list(range(start, stop))


def test_ordinary_memory_and_empty_tensors_are_no_block() -> None:
    whole = memory.allocate(10, torch.float32)
    assert memory.find(torch.zeros(10)) is None
    assert memory.find(whole.clone()) is None
    assert memory.find(whole[5:5]) is None
    assert memory.find(memory.allocate(0, torch.float32)) is None


def test_a_block_cannot_be_resized() -> None:
    block = Block.create(8192)
    for size_bytes in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(block.descriptor, size_bytes)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1025), (4, 1024), (4096, 1), (-4, 1), (0, -1), (2**62, 1), (0, 2**62)]
)
def test_a_tensor_that_leaves_its_block_is_refused(offset: int, length: int) -> None:
    block = Block.create(4096)
    assert block.tensor(0, 1024, torch.float32).numel() == 1024
    with pytest.raises(ProtocolError, match="leaves its block of 4096 bytes"):
        block.tensor(offset, length, torch.float32)


def unsealed() -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    return descriptor


def empty() -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 7)
    return descriptor


@pytest.mark.parametrize(
    "offer", [unsealed, empty, lambda: os.open("/dev/null", os.O_RDWR), lambda: os.open("/etc/passwd", os.O_RDONLY)],
    ids=["a memfd that could shrink", "an empty memfd", "a device", "a file"],
)  # fmt: skip
def test_what_is_no_sealed_memory_is_refused_and_closed(offer: object) -> None:
    assert callable(offer)
    descriptor = offer()
    with pytest.raises(ProtocolError):
        Block.attach(1, descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_memory_is_gone_with_the_last_tensor_that_uses_it() -> None:
    before = mappings(), opened()
    whole = memory.allocate(100_000, torch.float32)
    during = mappings(), opened()
    assert during[0] == before[0] + 1
    assert during[1] > before[1]
    part = whole[10:20].view(2, 5)
    del whole
    gc.collect()
    assert (mappings(), opened()) == during
    del part
    gc.collect()
    assert (mappings(), opened()) == before


def test_a_peers_memory_outlives_the_peer() -> None:
    mine = memory.allocate(10, torch.float32)
    found = memory.find(mine)
    assert found is not None
    theirs = attached(found[0]).tensor(0, 10, torch.float32)
    mine.fill_(3.0)
    del mine, found
    gc.collect()
    assert theirs.tolist() == [3.0] * 10


def test_memory_that_comes_to_lie_where_a_block_was_is_not_taken_for_it() -> None:
    tensor = memory.allocate(mmap.PAGESIZE, torch.uint8)
    del tensor
    gc.collect()
    again = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    assert memory.find(again) is None
