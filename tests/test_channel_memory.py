# SPDX-License-Identifier: Apache-2.0
"""Laws of memory: a block has no name, cannot be shrunk under its readers and is gone with its last user; the tensors
of a call arrive whole, in place where they are shared."""

import contextlib
import fcntl
import gc
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import Town

from distbelief.channel import frames, memory, staging
from distbelief.channel.base import Future, Out, exported
from distbelief.channel.connection import Connection
from distbelief.channel.memory import Block
from distbelief.channel.peer import Peer
from distbelief.errors import PeerLost, ProtocolError


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


# tensors of calls, over both transports


class Keeper:
    """A role that keeps the tensors it was given, to show whose memory they are."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    @exported
    def mirror(self, values: torch.Tensor, out: Out) -> None:
        out.copy_(values)

    @exported
    def keep(self, values: torch.Tensor, out: Out) -> int:
        out.zero_()
        self.kept = [values, out]
        return len(values)

    @exported
    def fill(self, value: float, out: Out) -> None:
        out.fill_(value)

    @exported
    def total(self, values: torch.Tensor) -> float:
        return float(values.double().sum())


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.kept.clear()


@pytest.fixture
def peer(town: Town, keeper: Keeper) -> Peer[Keeper]:
    return town.peer(town.serve(keeper))


def new(place: str, length: int, dtype: torch.dtype) -> torch.Tensor:
    return memory.allocate(length, dtype) if place == "a block" else torch.zeros(length, dtype=dtype)


PLACES = ["a block", "ordinary memory"]


@pytest.mark.parametrize("dtype", frames.DTYPES.values(), ids=frames.DTYPES)
def test_tensors_of_every_dtype_and_length_arrive_and_come_back(
    town: Town, peer: Peer[Keeper], dtype: torch.dtype
) -> None:
    for length in (0, 1, 7, 1001, 70_001):
        for places in itertools.product(PLACES, PLACES):
            values, out = (new(place, length, dtype) for place in places)
            values.copy_(torch.arange(length) % 100)
            town.answer(peer.call(Keeper.mirror, values, out))
            assert torch.equal(out, values), (length, places)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (3, 20), (99, 100)])
def test_a_slice_is_sent_and_filled_and_its_surroundings_are_left_alone(
    town: Town, peer: Peer[Keeper], place: str, start: int, stop: int
) -> None:
    values, out = new(place, 100, torch.int64), new(place, 100, torch.int64)
    values.copy_(torch.arange(100))
    town.answer(peer.call(Keeper.mirror, values[start:stop], out[start:stop]))
    expected = torch.zeros(100, dtype=torch.int64)
    expected[start:stop] = torch.arange(start, stop)
    assert torch.equal(out, expected)


def test_64_megabytes_go_there_and_back(town: Town, peer: Peer[Keeper]) -> None:
    values, out = torch.arange(16 << 20, dtype=torch.float32), torch.zeros(16 << 20)
    town.answer(peer.call(Keeper.mirror, values, out))
    assert torch.equal(out, values)


def test_a_tensor_of_any_shape_travels_as_its_memory_in_order(town: Town, peer: Peer[Keeper]) -> None:
    values, out = torch.arange(12).view(3, 4), torch.zeros(2, 6, dtype=torch.int64)
    town.answer(peer.call(Keeper.mirror, values, out))
    assert out.flatten().tolist() == list(range(12))


def test_a_tensor_that_is_not_contiguous_is_refused_by_the_callers_side(peer: Peer[Keeper]) -> None:
    with pytest.raises(TypeError, match="contiguous"):
        peer.call(Keeper.total, torch.zeros(10, 2)[:, 0])


def test_a_tensor_of_another_device_is_refused_by_the_callers_side(peer: Peer[Keeper]) -> None:
    with pytest.raises(TypeError, match="on meta"):
        peer.call(Keeper.total, torch.zeros(10, device="meta"))


def test_a_block_is_read_and_written_in_place_and_ordinary_memory_is_not(
    town: Town, peer: Peer[Keeper], keeper: Keeper
) -> None:
    for place in PLACES:
        values, out = new(place, 1000, torch.float32), new(place, 1000, torch.float32)
        town.answer(peer.call(Keeper.keep, values, out))
        shared = place == "a block" and town.transport == "shared_memory"
        values.fill_(5.0)
        assert bool(keeper.kept[0].eq(5.0).all()) == shared
        keeper.kept[1].fill_(6.0)
        assert bool(out.eq(6.0).all()) == shared


def test_a_tensor_that_comes_and_one_that_goes_take_one_staging_buffer(
    town: Town, peer: Peer[Keeper], keeper: Keeper
) -> None:
    for length in (1000, 1000, 500):
        values, out = (new("ordinary memory", length, torch.float32) for _ in range(2))
        town.answer(peer.call(Keeper.keep, values, out))
        assert keeper.kept[0].data_ptr() == keeper.kept[1].data_ptr()


def test_calls_under_way_at_once_do_not_mix_their_tensors(town: Town, peer: Peer[Keeper]) -> None:
    outs = [torch.zeros(4 << 20) for _ in range(4)]
    futures: list[Future[Any]] = []
    for number, out in enumerate(outs):
        futures.append(peer.call(Keeper.fill, float(number + 1), out))
        futures.append(peer.call(Keeper.total, torch.full((4 << 20,), -1.0)))
    for future in futures:
        town.answer(future)
    whole = [bool(out.eq(float(number + 1)).all()) for number, out in enumerate(outs)]
    assert whole == [True] * 4, "an answer was torn"


def test_a_block_that_is_shared_behind_a_long_body_arrives(town: Town, peer: Peer[Keeper]) -> None:
    long = torch.ones(4 << 20)
    answers = []
    for number in (1.0, 2.0, 3.0):
        answers += [(number * len(long), peer.call(Keeper.total, long * number))]
        answers += [(number * 10, peer.call(Keeper.total, memory.allocate(10, torch.float32).fill_(number)))]
    for total, answer in answers:
        assert town.answer(answer) == total


def test_a_block_is_mapped_once_however_often_it_is_named(
    town: Town, peer: Peer[Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    attach = Block.attach
    monkeypatch.setattr(
        Block, "attach", lambda identifier, number: mapped.append(identifier) or attach(identifier, number)
    )
    block = memory.allocate(100, torch.float32).fill_(1.0)
    for length in (1, 50, 100, 50):
        assert town.answer(peer.call(Keeper.total, block[:length])) == length
    assert len(mapped) == (1 if town.transport == "shared_memory" else 0)


def test_a_callers_memory_is_let_go_when_the_caller_goes(town: Town, peer: Peer[Keeper], keeper: Keeper) -> None:
    before = mappings(), opened()
    for length in (10, 100_000):
        values = memory.allocate(length, torch.float32)
        town.answer(peer.call(Keeper.total, values))
    del values
    town.endpoints.remove(peer.endpoint)
    peer.endpoint.close()
    peer._connection = None
    town.work(5)
    gc.collect()
    assert (mappings(), opened()) == before


@pytest.mark.parametrize("town", ["shared_memory"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [{"length": 11}, {"offset_bytes": 4}, {"offset_bytes": -4}, {"block": 999_999}, {"dtype": "object"},
     {"dtype": "float64"}, {"length": -1}, {"length": 2**62}],
    ids=str,
)  # fmt: skip
def test_a_reference_to_memory_that_is_not_shared_is_refused_and_others_are_served(
    town: Town, peer: Peer[Keeper], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    values = memory.allocate(10, torch.float32)
    honest = Connection.reference
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "reference", lambda *given: msgspec.structs.replace(honest(*given), **change))
        future = peer.call(Keeper.total, values)
    with pytest.raises(ProtocolError):
        town.answer(future)
    assert town.answer(town.peer(peer.locate().result()).call(Keeper.total, torch.ones(3))) == 3.0


@pytest.mark.parametrize("body", [b"", b"more"], ids=["alone", "with a body"])
def test_who_offers_a_block_and_sends_none_is_refused_and_others_are_served(
    town: Town, peer: Peer[Keeper], body: bytes
) -> None:
    assert town.answer(peer.call(Keeper.total, torch.ones(2))) == 2.0
    assert peer._connection is not None
    peer._connection.send(frames.encode(frames.Attach(7), len(body)), [memoryview(body)])
    town.until(lambda: peer._connection is None or peer._connection.closed)
    assert town.answer(town.peer(peer.locate().result()).call(Keeper.total, torch.ones(3))) == 3.0


@pytest.mark.parametrize("town", ["tcp"], indirect=True)
def test_a_body_that_is_shorter_than_its_tensors_costs_no_memory_and_others_are_served(
    town: Town, peer: Peer[Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, new_memory, taken = Connection.reference, staging._buffer, list[int]()

    def watched(size_bytes: int) -> torch.Tensor:
        taken.append(size_bytes)
        return new_memory(size_bytes)

    monkeypatch.setattr(staging, "_buffer", watched)
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "reference", lambda *given: msgspec.structs.replace(honest(*given), length=1 << 30))
        with pytest.raises(PeerLost):
            town.answer(peer.call(Keeper.total, torch.ones(3)))
    assert taken == []
    assert town.answer(town.peer(peer.locate().result()).call(Keeper.total, torch.ones(3))) == 3.0
    assert taken == [12]
