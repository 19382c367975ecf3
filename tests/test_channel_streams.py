# SPDX-License-Identifier: Apache-2.0
"""Laws of second streams: what travels on two is what was sent, whatever becomes of either; and when there is none."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
import torch
from conftest import Town
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st

from distbelief.channel import door, frames, second_stream
from distbelief.channel.authenticate import CallingSide
from distbelief.channel.base import Future, Out, exported, rounded
from distbelief.channel.connection import Connection
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.frames import Call, Join, TensorReference
from distbelief.channel.futures import Kept
from distbelief.channel.peer import Peer
from distbelief.channel.second_stream import SecondStream
from distbelief.channel.secure import new_certificate
from distbelief.channel.wire import Wire
from distbelief.errors import DeadlineExceeded, PeerLost, ProtocolError

WIDE, PIECE = 1 << 12, 1 << 10
FOREVER = 1 << 60


class Clerk:
    """A role that gives back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.endpoint: Endpoint

    @exported
    @rounded
    def twice(self, values: torch.Tensor, numbers: torch.Tensor, out: Out) -> int:
        self.seen = [values.clone(), numbers.clone()]
        out.copy_(2 * values)
        return len(values)

    @exported
    def who(self) -> str:
        return "clerk"

    @exported
    def never(self) -> Future[int]:
        return Kept(self.endpoint)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of some kilobytes are large."""
    monkeypatch.setattr("distbelief.channel.endpoint.WIDE_BYTES", WIDE)
    monkeypatch.setattr("distbelief.channel.second_stream.PIECE_BYTES", PIECE)


@pytest.fixture
def town() -> Iterator[Town]:
    made = Town("tcp")
    yield made
    made.close()


def connection_of(peer: Peer[Clerk]) -> Connection:
    assert peer._connection is not None
    return peer._connection


def call(peer: Peer[Clerk], length: int) -> tuple[Future[int], torch.Tensor, torch.Tensor]:
    """A call of two tensors there and one back; its future, the one, and what is twice as much."""
    values, out = torch.randn(length).bfloat16().float(), torch.zeros(length)
    return peer.call(Clerk.twice, values, torch.arange(length), out), values, out


def widened(town: Town, peer: Peer[Clerk]) -> Connection:
    """The connection of a peer, when it has its second stream."""
    town.answer(peer.call(Clerk.who))
    town.answer(call(peer, WIDE)[0])
    town.until(lambda: connection_of(peer).second is not None)
    return connection_of(peer)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_travels_on_two_streams_arrives_as_it_was_sent(town: Town, dtype: str, encrypted: bool) -> None:
    wire = Wire(dtype=dtype, certificate=new_certificate() if encrypted else None)  # type: ignore[arg-type]
    clerk = Clerk()
    peer = town.peer(town.serve(clerk, wire=wire), wire=wire)
    connection = widened(town, peer)
    parts = [PIECE, WIDE, 3 * PIECE // 4, 10 * PIECE, 17 * PIECE + 5, 0, 1, 300_001]
    for length in parts:
        future, values, out = call(peer, length)
        assert town.answer(future) == length
        assert torch.equal(clerk.seen[0], values)
        assert torch.equal(clerk.seen[1], torch.arange(length))
        assert torch.equal(out, 2 * values)
    assert connection_of(peer) is connection


@settings(deadline=None, max_examples=40, database=None)
@given(lengths=st.lists(st.integers(0, 6 * PIECE), min_size=1, max_size=8))
def test_calls_under_way_at_once_on_two_streams_do_not_mix(lengths: list[int]) -> None:
    town, clerk = Town("tcp"), Clerk()
    with pytest.MonkeyPatch.context() as patch, closing(town):
        patch.setattr("distbelief.channel.endpoint.WIDE_BYTES", WIDE)
        patch.setattr("distbelief.channel.second_stream.PIECE_BYTES", PIECE)
        peer = town.peer(town.serve(clerk))
        widened(town, peer)
        under_way = [call(peer, length) for length in lengths]
        for (future, values, out), length in zip(under_way, lengths, strict=True):
            assert town.answer(future) == length
            assert torch.equal(out, 2 * values)


@given(st.lists(st.integers(0, 5 * PIECE), max_size=5))
def test_dealt_out_and_put_together_again_a_body_is_what_it_was(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distbelief.channel.second_stream.PIECE_BYTES", PIECE)
        whole = bytes(index % 251 for index in range(sum(lengths)))
        body, start = [], 0
        for length in lengths:
            body.append(memoryview(whole)[start : start + length])
            start += length
        own, beside = (list(parts) for parts in second_stream.deal(body))
        together = b""
        for length in lengths:
            for number in range(-(-length // PIECE)):
                together += bytes((beside if number % 2 else own).pop(0))  # type: ignore[arg-type]
        assert together == whole
        assert not own + beside


def test_one_stream_has_to_do_for_small_bodies_and_for_who_shares_memory(town: Town) -> None:
    peer = town.peer(town.serve(Clerk()))
    for _ in range(20):
        town.answer(call(peer, WIDE // 17)[0])
    assert len(town.endpoints[0]._connections) == 1
    assert connection_of(peer).second is None
    near = Town("shared_memory")
    with closing(near):
        other = near.peer(near.serve(Clerk()))
        for _ in range(3):
            near.answer(call(other, WIDE)[0])
        assert connection_of(other).second is None


def test_where_no_second_connection_can_be_made_one_stream_has_to_do(town: Town) -> None:
    peer = town.peer(town.serve(Clerk()))
    town.answer(peer.call(Clerk.who))
    (listener,) = town.endpoints[0]._listeners
    town.endpoints[0].unwatch(listener)
    listener.close()
    for _ in range(5):
        future, values, out = call(peer, 3 * WIDE)
        town.answer(future)
        assert torch.equal(out, 2 * values)
    assert connection_of(peer).second is None


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("cut", [10, 150, 3 * WIDE, 15 * WIDE])
def test_a_call_is_lost_soon_when_one_of_its_streams_breaks_and_the_next_one_connects_again(
    town: Town, cut: int, first: bool
) -> None:
    clerk = Clerk()
    # The second stream is cut in the proof, behind it, in what goes there, in what comes back; or the first one is.
    cuts = [60_000 + cut if first else FOREVER, FOREVER if first else cut]
    with closing(FaultProxy(town.serve(clerk), cuts)) as proxy:
        peer = town.peer(proxy.address)
        town.answer(peer.call(Clerk.who))
        started, lost = time.monotonic(), 0
        for _ in range(12):
            future, values, out = call(peer, WIDE)
            try:
                town.answer(future)
            except PeerLost:
                lost += 1
            else:
                assert torch.equal(out, 2 * values)
        assert proxy.cut == 1
        assert lost <= 1
        assert first or cut < 3 * WIDE or lost == 1
        assert time.monotonic() - started < 10
        town.until(lambda: connection_of(peer).second is not None or cut < 3 * WIDE)


def test_a_second_stream_that_ends_before_all_is_there_has_broken() -> None:
    noticed: list[bool] = []
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        stream = SecondStream(one, lambda: None, lambda: noticed.append(True), lambda: None)
        stream.receive([memoryview(bytearray(10))])
        other.sendall(b"half")
        assert stream.carry() == select.POLLIN
        other.shutdown(socket.SHUT_WR)
        assert stream.carry() == 0
        assert isinstance(stream.error, ConnectionError)
        assert noticed == [True]


def test_nothing_is_written_into_a_callers_memory_once_it_has_given_up(town: Town) -> None:
    with closing(FaultProxy(town.serve(Clerk()), delay_seconds=0.002, piece_bytes=4 * PIECE)) as proxy:
        peer = town.peer(proxy.address, deadline_seconds=20.0)
        widened(town, peer)
        peer.deadline_seconds = 0.3
        future, _, out = call(peer, 200 * WIDE)
        with pytest.raises(DeadlineExceeded):
            town.answer(future)
        out.fill_(7.0)
        for _ in range(50):
            town.work()
            time.sleep(0.002)
        assert torch.equal(out, torch.full_like(out, 7.0))


class Over(Exception):
    """The time in which somebody might speak is over."""


@pytest.mark.parametrize("stream", ["the first", "the second"])
def test_who_may_speak_no_more_does_not_even_finish_what_it_has_begun(
    town: Town, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = asked = False

    def permit() -> None:
        nonlocal asked
        if over and (threading.current_thread() is threading.main_thread()) == (stream == "the first"):
            asked = True
            raise Over

    clerk = Clerk()
    peer = town.peer(town.serve(clerk), permit=permit)
    if stream == "the second":
        widened(town, peer)
        clerk.seen = []
    else:
        monkeypatch.setattr("distbelief.channel.endpoint.WIDE_BYTES", FOREVER)
    town.answer(peer.call(Clerk.who))
    call(peer, 1_000_000)
    over = True
    for _ in range(200):
        with suppress(Over):
            town.work()
        time.sleep(0.001)
    assert asked
    assert clerk.seen == []


def test_a_second_stream_that_nobody_has_taken_up_ends_with_the_first(town: Town) -> None:
    peer = town.peer(town.serve(Clerk()))
    town.answer(peer.call(Clerk.who))
    first = connection_of(peer)
    call(peer, WIDE)
    assert len(peer.endpoint._connections) == 2
    peer.endpoint.poll(0.5)  # it is connected, and the other side does not look
    peer.endpoint.end(first, "its peer is gone")
    assert not peer.endpoint._connections


def test_others_are_served_while_a_body_waits_for_its_second_stream(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = town.serve(Clerk())
    slow, quick = town.peer(address), town.peer(address)
    widened(town, slow)
    held, carry = threading.Event(), SecondStream.carry
    held.set()
    monkeypatch.setattr(SecondStream, "carry", lambda stream: 0 if held.is_set() else carry(stream))
    behind = [(*call(slow, 2 * WIDE), slow.call(Clerk.who)) for _ in range(3)]
    for _ in range(20):
        assert town.answer(quick.call(Clerk.who)) == "clerk"
    assert not any(future.done() or after.done() for future, _, _, after in behind)
    held.clear()
    for connection in [*town.endpoints[0]._connections, connection_of(slow)]:
        if connection.second is not None:
            connection.second._wake()
    for future, values, out, after in behind:
        town.answer(future)
        assert torch.equal(out, 2 * values)
        assert town.answer(after) == "clerk"


def prove(town: Town, address: object) -> socket.socket:
    """A stranger's socket that has shown that it knows the key."""
    link = socket.create_connection(address)  # type: ignore[arg-type]
    side = CallingSide(town.key)
    endpoint, before = town.endpoints[0], len(town.endpoints[0]._connections)
    town.until(lambda: len(endpoint._connections) > before)
    link.sendall(side.take(link.recv(32))[0])
    town.work(5)
    link.recv(32)
    return link


def test_a_wide_frame_without_a_second_stream_is_refused(town: Town) -> None:
    address = town.serve(Clerk())
    with prove(town, address) as link:
        references = [
            TensorReference("float32", 1000),
            TensorReference("int64", 1000),
            TensorReference("float32", 1000),
        ]
        link.sendall(frames.encode(Call(1, "twice", b"\x90", references, wide=True), 12_000))
        town.until(lambda: not town.endpoints[0]._connections)
    assert town.endpoints[0].refused == {door.MALFORMED: 1}
    assert town.answer(town.peer(address).call(Clerk.who)) == "clerk"


@pytest.mark.parametrize("identity", [b"", b"x" * 32])
def test_a_second_stream_of_nothing_is_ended_and_nobody_else_is(town: Town, identity: bytes) -> None:
    address = town.serve(Clerk())
    peer = town.peer(address)
    connection = widened(town, peer)
    before = set(town.endpoints[0]._connections)
    with prove(town, address) as link:
        link.sendall(frames.encode(Join(identity)))
        town.until(lambda: town.endpoints[0]._connections == before)
    with prove(town, address) as link:  # nor does a second one take the place of the first
        link.sendall(frames.encode(Join(connection.identity)))
        town.until(lambda: town.endpoints[0]._connections == before)
    future, values, out = call(peer, 5 * WIDE)
    town.answer(future)
    assert torch.equal(out, 2 * values)
    assert connection_of(peer) is connection


def test_who_says_more_on_a_connection_that_is_to_be_a_second_stream_is_refused(town: Town) -> None:
    address = town.serve(Clerk())
    connection = widened(town, town.peer(address))
    other = town.peer(address)
    town.answer(other.call(Clerk.who))
    identity = connection_of(other).identity
    before = set(town.endpoints[0]._connections)
    who = frames.encode(Call(1, "who", b"\x90"))
    for refused, behind in enumerate([who, who[:7], b"\0"], 1):
        with prove(town, address) as link:
            link.sendall(frames.encode(Join(identity)) + behind)
            town.until(lambda refused=refused: town.endpoints[0].refused == {door.MALFORMED: refused})  # type: ignore[misc]
        assert town.endpoints[0]._connections == before
    assert town.answer(other.call(Clerk.who)) == "clerk"
    assert connection_of(other).second is None
    assert connection.second is not None


def test_a_role_that_offers_a_connection_on_which_it_owes_an_answer_loses_only_that(town: Town) -> None:
    clerk = Clerk()
    address = town.serve(clerk)
    clerk.endpoint = town.endpoints[0]
    owing, other = town.peer(address), town.peer(address)
    town.answer(owing.call(Clerk.who))
    widened(town, other)
    future = owing.call(Clerk.never)
    (served,) = [one for one in town.endpoints[0]._connections if one.identity == connection_of(owing).identity]
    town.work(5)
    served.send(frames.encode(Join(connection_of(other).identity)), [])
    with pytest.raises(ProtocolError, match="owes answers"):
        town.answer(future)
    again, values, out = call(other, 5 * WIDE)
    town.answer(again)
    assert torch.equal(out, 2 * values)


def test_a_connection_that_has_a_second_stream_is_none_itself(town: Town) -> None:
    address = town.serve(Clerk())
    one, other = town.peer(address), town.peer(address)
    wide, target = widened(town, one), widened(town, other)
    wide.send(frames.encode(Join(target.identity)), [])
    town.until(lambda: town.endpoints[0].refused == {door.MALFORMED: 1})
    future, values, out = call(other, 5 * WIDE)
    town.answer(future)
    assert torch.equal(out, 2 * values)


def test_the_thread_of_second_streams_ends_with_the_last_of_them(town: Town) -> None:
    address = town.serve(Clerk())
    peers = [town.peer(address) for _ in range(2)]
    for peer in peers:
        widened(town, peer)
    names = lambda: [thread.name for thread in threading.enumerate()].count("distbelief-streams")  # noqa: E731
    assert names() == 3
    for peer in peers:
        peer.endpoint.end(connection_of(peer), "it is over")
    town.until(lambda: names() == 0)
