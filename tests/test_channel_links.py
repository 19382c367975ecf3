# SPDX-License-Identifier: Apache-2.0
"""Laws of links between hosts: found when called, made without waiting, cut anywhere, silent; and of who is refused."""

import contextlib
import gc
import os
import resource
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import numpy
import pytest
import torch
from conftest import Town
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st

from distbelief import sgd
from distbelief.channel import door, frames, links, memory
from distbelief.channel.authenticate import CallingSide
from distbelief.channel.base import Future, Out, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.frames import Call
from distbelief.channel.futures import Kept
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Address, Place
from distbelief.channel.wire import Wire
from distbelief.engine.home import ProcessHome
from distbelief.engine.insistent import Insistent
from distbelief.errors import DeadlineExceeded, PeerLost
from distbelief.parameter_server import ParameterServerShard
from distbelief.parameters import Layout, Piece, Span
from distbelief.section import Stamp


class Clerk:
    """A role that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[int] = []
        self.kept: list[torch.Tensor] = []

    @exported
    def note(self, number: int) -> list[int]:
        self.notes.append(number)
        return self.notes

    @exported
    def keep(self, values: torch.Tensor, out: Out) -> None:
        out.copy_(values)
        self.kept = [values]


@pytest.mark.parametrize("address", [("127.0.0.1", 1), "\0distbelief-nobody"])
def test_who_has_no_descriptor_to_spare_cannot_call_and_is_told_why(address: Address) -> None:
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(PeerLost, match=r"nothing answers at .*Too many open files"):
            links.dial(address)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def town() -> Iterator[Town]:
    made = Town("tcp")
    yield made
    made.close()


@pytest.fixture
def clerk() -> Clerk:
    return Clerk()


@contextmanager
def nobody() -> Iterator[tuple[str, int]]:
    """An address that says nothing, as a host that is gone: its backlog is full, and the kernel drops more callers."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address: tuple[str, int] = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for link in waiting:
            link.setblocking(False)
            link.connect_ex(address)
        yield address
        for link in waiting:
            link.close()


# where a role answers


def test_a_role_shares_memory_with_callers_of_its_host_and_answers_others_over_tcp(town: Town, clerk: Clerk) -> None:
    here, there = Town("shared_memory").listen(), town.listen()
    town.endpoint(clerk, here, there)
    place = Place("a", here.getsockname().decode(), there.getsockname())
    for own_host, shared in (("a", True), ("b", False)):
        values, out = (memory.allocate(1000, torch.float32) for _ in range(2))
        caller = town.peer(place.nearest(own_host))
        town.answer(caller.call(Clerk.keep, values, out))
        values.fill_(5.0)
        assert bool(clerk.kept[0].eq(5.0).all()) == shared
        assert caller._connection is not None
        assert caller._connection.shares_memory == shared
    clerk.kept.clear()


def test_calls_wait_in_their_order_until_the_role_is_found(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk)
    caller = town.endpoint()
    place: Kept[Address] = Kept(caller)
    asked: list[None] = []

    def locate() -> Future[Address]:
        asked.append(None)
        return place

    peer: Peer[Clerk] = Peer(caller, locate, 20.0)
    futures = [peer.call(Clerk.note, number) for number in range(5)]
    town.work(10)
    assert clerk.notes == []
    place.keep(address)
    assert town.answer(futures[-1]) == [0, 1, 2, 3, 4]
    assert len(asked) == 1


def test_a_role_that_is_not_found_is_waited_for_until_the_calls_deadline(town: Town, clerk: Clerk) -> None:
    caller = town.endpoint()
    peer: Peer[Clerk] = Peer(caller, lambda: Kept(caller), 0.1)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded):
            peer.call(Clerk.note, 1).result()
    town.work()
    assert peer._waiting == []


def test_a_role_is_looked_for_again_after_it_was_lost(town: Town, clerk: Clerk) -> None:
    second = Clerk()
    addresses = [town.serve(clerk), town.serve(second)]
    found = iter(addresses)
    peer: Peer[Clerk] = Peer(town.endpoint(), lambda: at(next(found))(), 20.0)
    town.answer(peer.call(Clerk.note, 1))
    town.endpoints.pop(0).close()
    with pytest.raises(PeerLost):
        town.answer(peer.call(Clerk.note, 2))
    assert town.answer(peer.call(Clerk.note, 3)) == [3]
    assert second.notes == [3]


# connecting


def test_connecting_to_a_silent_host_ends_in_time_and_holds_nobody_up(town: Town, clerk: Clerk) -> None:
    served = town.peer(town.serve(clerk), wire=Wire(connect_seconds=0.4))
    with nobody() as address:
        lost: Peer[Clerk] = Peer(served.endpoint, at(address), 20.0)
        started = time.monotonic()
        futures = [lost.call(Clerk.note, number) for number in range(3)]
        assert town.answer(served.call(Clerk.note, 7)) == [7]
        assert time.monotonic() - started < 0.3
        for future in futures:
            with pytest.raises(PeerLost, match=rf"nothing answers at .*{address[1]}.*within 0\.4 s"):
                town.answer(future)
        assert 0.4 <= time.monotonic() - started < 1.0
        connection = weakref.ref(lost._connection)
        del lost, futures, future
        gc.collect()
        assert connection() is None, "it is let go"


def test_who_is_being_connected_to_has_his_time_however_silent_he_is(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "is_silent", lambda *_: True)
    with nobody() as address, pytest.raises(PeerLost, match=r"within 0\.8 s"):
        town.answer(town.peer(address, wire=Wire(connect_seconds=0.8)).call(Clerk.note, 1))


def test_the_error_names_the_address_at_which_nobody_listens_and_why(town: Town) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as once:
        address: tuple[str, int] = once.getsockname()
    with pytest.raises(PeerLost, match=rf"nothing answers at .*{address[1]}.*refused"):
        town.answer(town.peer(address).call(Clerk.note, 1))
    with pytest.raises(PeerLost, match=r"nothing answers at .*no such host"):
        town.answer(town.peer(("no such host", 1)).call(Clerk.note, 1))


def test_where_as_many_callers_wait_as_may_the_next_one_is_told_so() -> None:
    with closing(Town("shared_memory")) as near, contextlib.ExitStack() as waiting:
        listener = waiting.enter_context(near.listen())
        listener.listen(1)
        for _ in range(2):
            waiting.enter_context(links.dial(near.address(listener)))
        with pytest.raises(PeerLost, match="as many callers wait there as it lets wait"):
            links.dial(near.address(listener))


# cuts, delays, silence


def shard(town: Town, length: int) -> tuple[ParameterServerShard, ProcessHome]:
    span = Span(0, length)
    layout = Layout((Piece("all", (length,), span),), torch.float32)
    home = ProcessHome("shard/0", 0, town.endpoint(), lambda role: at(("127.0.0.1", 0)), address="127.0.0.1")
    made = ParameterServerShard(home, span, layout, sgd(0.5))
    made.initialise(0, torch.zeros(length))
    return made, home


@pytest.fixture(params=[1 << 40, 1 << 12], ids=["one stream", "two streams"])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """From how many bytes on a call uses a second stream, and how many go by one and then by the other."""
    monkeypatch.setattr("distbelief.channel.endpoint.WIDE_BYTES", request.param)
    monkeypatch.setattr("distbelief.channel.second_stream.PIECE_BYTES", 1 << 10)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("seed", range(3))
def test_pushes_over_a_link_that_is_cut_anywhere_are_applied_exactly_once_each(town: Town, seed: int) -> None:
    length, pushes = 20_000, 12
    random = numpy.random.default_rng(seed)
    served, home = shard(town, length)
    # Up to two and a half exchanges pass before a cut: in proofs, headers and bodies, of calls and of answers.
    cuts = [int(cut) for cut in random.integers(1, 2.5 * 2 * 4 * length, size=14)]
    with closing(FaultProxy(town.serve(served), cuts)) as proxy:
        peer = town.peer(proxy.address)
        expected, fetched = torch.zeros(length), torch.zeros(length)
        for sequence in range(1, 1 + pushes):
            gradient = torch.from_numpy(random.standard_normal(length, dtype="float32"))
            stamp = Stamp(0, 0, sequence, sequence - 1, 1, ())
            again = Insistent(
                home, lambda s=stamp, g=gradient: peer.call(ParameterServerShard.exchange, s, g, fetched)  # type: ignore[misc]
            )  # fmt: skip
            assert town.answer(again) == sequence
            expected.sub_(gradient, alpha=0.5)
            assert torch.equal(fetched, expected)
        assert proxy.cut >= 5
    assert served.status().sections[0].version == pushes


@pytest.mark.usefixtures("streams")
def test_what_replicas_fetch_may_be_rounded_on_its_way_and_what_others_read_never_is(town: Town) -> None:
    served, _ = shard(town, 3_000)
    peer = town.peer(town.serve(served), wire=Wire(dtype="bfloat16"))
    gradient, fetched, read = torch.arange(3_000) / 3, torch.zeros(3_000), torch.zeros(3_000)
    town.answer(peer.call(ParameterServerShard.push, Stamp(0, 0, 1, 0, 1, ()), gradient))
    expected = -0.5 * gradient.bfloat16().float()
    town.answer(peer.call(ParameterServerShard.push, Stamp(0, 0, 2, 1, 1, ()), torch.full((3_000,), 0.125)))
    expected.sub_(0.0625)
    town.answer(peer.call(ParameterServerShard.read, 0, read))
    town.answer(peer.call(ParameterServerShard.fetch, 0, 0, fetched))
    assert torch.equal(read, expected)
    assert torch.equal(fetched, expected.bfloat16().float())
    assert not torch.equal(fetched, read)


@pytest.mark.usefixtures("streams")
def test_a_push_is_applied_as_a_whole_though_who_exchanges_reads_slowly_and_others_call_meanwhile(town: Town) -> None:
    length = 200_000
    served, _ = shard(town, length)
    address = town.serve(served)
    with closing(FaultProxy(address, delay_seconds=0.001, piece_bytes=50_000)) as proxy:
        slow, quick = town.peer(proxy.address), town.peer(address)
        fetched, read = torch.zeros(length), torch.ones(length)
        answer = slow.call(ParameterServerShard.exchange, Stamp(0, 0, 1, 0, 1, ()), torch.full((length,), 2.0), fetched)
        seen = {0.0}
        while not answer.done():
            town.answer(quick.call(ParameterServerShard.read, 0, read))
            assert len(set(read.tolist())) == 1
            seen.add(read[0].item())
        assert answer.result() == 1
        assert torch.equal(fetched, torch.full((length,), -1.0))
        assert seen <= {0.0, -1.0}


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("length", [1_500_000, 2_500_000])
def test_who_exchanges_and_does_not_read_keeps_nobody_waiting(town: Town, length: int) -> None:
    served, _ = shard(town, length)
    address = town.serve(served)
    deaf, quick = town.peer(address), town.peer(address)
    gradient, fetched, read = torch.full((length,), 2.0), torch.zeros(length), torch.zeros(length)
    answer = deaf.call(ParameterServerShard.exchange, Stamp(0, 0, 1, 0, 1, ()), gradient, fetched)
    town.until(lambda: served.status().sections[0].version == 1)
    town.endpoints.remove(deaf.endpoint)  # who does nothing from now on, with most of the answer still to come
    assert town.answer(quick.call(ParameterServerShard.read, 0, read)) == 1
    assert set(read.tolist()) == {-1.0}
    town.endpoints.append(deaf.endpoint)
    assert town.answer(answer) == 1
    assert torch.equal(fetched, read)


@pytest.mark.usefixtures("streams")
def test_a_link_that_delays_and_divides_everything_changes_nothing(town: Town, clerk: Clerk) -> None:
    with closing(FaultProxy(town.serve(clerk), delay_seconds=0.001, piece_bytes=997)) as proxy:
        peer = town.peer(proxy.address)
        for _ in range(3):
            clerk.notes.clear()
            values, out = torch.randn(20_000), torch.zeros(20_000)
            futures = [peer.call(Clerk.keep, values, out), *(peer.call(Clerk.note, number) for number in range(3))]
            assert town.answer(futures[-1]) == [0, 1, 2]
            assert torch.equal(out, values)


def test_a_call_over_a_link_that_swallows_everything_ends_at_its_deadline(town: Town, clerk: Clerk) -> None:
    with closing(FaultProxy(town.serve(clerk))) as proxy:
        peer = town.peer(proxy.address, 0.3)
        town.answer(peer.call(Clerk.note, 1))
        proxy.swallows = True
        started = time.monotonic()
        for _ in range(2):  # the first on a connection, the second on one that cannot prove itself
            with pytest.raises(DeadlineExceeded):
                town.answer(peer.call(Clerk.note, 2))
        assert time.monotonic() - started < 1.5
        proxy.swallows = False
        assert town.answer(peer.call(Clerk.note, 3)) == [1, 3]


def test_what_a_caller_said_is_worth_nothing_to_somebody_who_says_it_again(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk)
    with closing(FaultProxy(address)) as proxy:
        town.answer(town.peer(proxy.address).call(Clerk.note, 1))
        said = bytes(proxy.heard[0])
        assert b"note" in said
        with socket.create_connection(proxy.address) as liar:
            liar.sendall(said)
            town.until(lambda: town.endpoints[0].refused)
    assert clerk.notes == [1]
    assert town.endpoints[0].refused == {door.NO_KEY: 1}


# refusals


def test_every_kind_of_refusal_is_counted(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    address = town.serve(clerk)
    endpoint = town.endpoints[0]
    with pytest.raises(PeerLost):
        town.answer(town.peer(address, key=b"another").call(Clerk.note, 1))
    assert endpoint.refused == {door.NO_KEY: 1}
    with socket.create_connection(address) as half:
        half.sendall(b"half")
        town.until(lambda: endpoint._door.strangers)
    town.until(lambda: endpoint.refused[door.TRUNCATED])
    with socket.create_connection(address):
        town.until(lambda: endpoint._door.strangers)
        monkeypatch.setattr(door, "STRANGER_SECONDS", 0.0)
        town.until(lambda: endpoint.refused[door.TOO_SLOW])
    monkeypatch.undo()
    monkeypatch.setattr(door, "STRANGERS", 2)
    many = [socket.create_connection(address) for _ in range(5)]
    town.until(lambda: endpoint.refused[door.TOO_MANY] == 3)
    for link in many:
        link.close()
    assert sum(endpoint.refused.values()) == 6
    assert town.answer(town.peer(address).call(Clerk.note, 2)) == [2]


def test_an_honest_caller_that_comes_and_goes_is_not_counted_as_refused(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk)
    for _ in range(3):
        caller = town.peer(address)
        town.answer(caller.call(Clerk.note, 1))
        town.endpoints.remove(caller.endpoint)
        caller.endpoint.close()
    town.work(10)
    assert not town.endpoints[0].refused


honest = frames.encode(Call(1, "note", b"\x91\x01"))
oversized = st.builds(
    lambda header, body: frames.PREFIX.pack(frames.MAGIC, 1, header, body),
    st.integers(frames.HEADER_LIMIT + 1, 2**32 - 1), st.integers((1 << 20) + 1, 2**64 - 1),
)  # fmt: skip
truncated = st.integers(1, len(honest) - 1).map(lambda kept: honest[:kept])
nonsense = st.one_of(st.binary(min_size=1, max_size=300), oversized, truncated, st.just(honest + b"\0" * 40))


@settings(deadline=None, max_examples=150, database=None)
@given(said=nonsense, knows_the_key=st.booleans())
def test_whatever_is_said_the_process_lives_takes_no_memory_and_serves_others(said: bytes, knows_the_key: bool) -> None:
    town, clerk = Town("tcp"), Clerk()
    with closing(town):
        address = town.serve(clerk, body_limit=1 << 20)
        endpoint = town.endpoints[0]
        assert isinstance(address, tuple)
        with socket.create_connection(address) as link:
            if knows_the_key:
                side = CallingSide(town.key)
                town.until(lambda: endpoint._connections)
                link.sendall(side.take(link.recv(32))[0])
                town.until(lambda: next(iter(endpoint._connections)).proved)
                link.recv(32)
            link.sendall(said)
            town.work(3)
            held = sum(len(connection._inbox) for connection in endpoint._connections)
            assert held <= len(said)
            assert not town.staged()
        town.until(lambda: not endpoint._connections)
        assert sum(endpoint.refused.values()) <= 1
        assert town.answer(town.peer(address).call(Clerk.note, 5))[-1] == 5


def test_tensors_of_ever_other_lengths_do_not_pile_up(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk, body_limit=1 << 20)
    peer = town.peer(address)
    for length in range(100_000, 200_000, 10_000):
        values, out = torch.randn(length), torch.zeros(length)
        town.answer(peer.call(Clerk.keep, values, out))
        assert torch.equal(out, values)
    assert len(town.endpoints[0]._connections) == 1
    assert sum(tensor.nbytes for tensor in town.staged()) <= 2 << 20
    clerk.kept.clear()


def test_a_stopped_process_is_not_taken_for_a_silent_host(town: Town, clerk: Clerk) -> None:
    served = town.serve(clerk)
    caller: Endpoint = town.endpoint(wire=Wire(silence_seconds=0.2))
    peer: Peer[Clerk] = Peer(caller, at(served), 20.0)
    town.answer(peer.call(Clerk.note, 1))
    # Nobody lets the clerk work for a while: its socket's buffers fill up.
    future = peer.call(Clerk.keep, torch.zeros(8 << 20), torch.zeros(8 << 20))
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        caller.poll(0.05)
    assert not future.done()
    town.answer(future)
    clerk.kept.clear()


@pytest.mark.parametrize(
    ("awaited_bytes", "wanted"),
    [
        (0, 1), (1, 1), (50_000, 50_000), (131_072, 131_072), (300_000, 131_072), (600_000, 150_000),
        (1_000_000, 250_000), (2_097_152, 524_288), (1 << 31, 524_288),
    ],
)  # fmt: skip
def test_a_socket_is_woken_for_a_quarter_of_a_body_and_never_for_more_than_is_to_come(
    awaited_bytes: int, wanted: int
) -> None:
    with closing(socket.socket()) as link:
        assert links.wake_for(link, awaited_bytes, 0) == wanted
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == wanted


def test_a_host_is_lost_that_is_silent_at_two_looks_in_a_row(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = town.peer(town.serve(clerk))
    assert town.answer(peer.call(Clerk.note, 1)) == [1]
    monkeypatch.setattr("distbelief.channel.endpoint.LOOK_SECONDS", 0.01)
    looks: list[bool] = []
    always = False

    def is_silent(*_: object) -> bool:
        looks.append(always or not (looks and looks[-1]))
        return looks[-1]

    monkeypatch.setattr(links, "is_silent", is_silent)
    future = peer.call(Clerk.note, 2)
    while len(looks) < 8:
        peer.endpoint.poll(0.02)
    assert not future.done()
    always = True
    while not future.done():
        assert len(looks) < 20
        peer.endpoint.poll(0.02)
    with pytest.raises(PeerLost, match=r"its host has been silent for 1\.5 s"):
        future.result()


@pytest.mark.parametrize(
    ("sent_again", "probes", "growing", "data_ms", "acknowledged_ms", "silent"),
    [
        (1, 0, 0, 2000, 2000, True), (0, 1, 0, 2000, 2000, True), (0, 2, 1, 2000, 2000, True),
        (0, 0, 0, 9000, 9000, False), (0, 1, 1, 2000, 2000, False),
        (1, 0, 0, 100, 2000, False), (1, 0, 0, 2000, 100, False), (1, 0, 0, 1400, 1400, False),
    ],
)  # fmt: skip
def test_silence_is_to_leave_something_unanswered_and_neither_send_nor_acknowledge_anything(
    sent_again: int, probes: int, growing: int, data_ms: int, acknowledged_ms: int, silent: bool
) -> None:
    class Link:
        """As the kernel tells of a connection: linux/tcp.h, struct tcp_info."""

        def getsockopt(self, level: int, option: int, length: int) -> bytes:
            times = [0] * 13
            times[11:] = [data_ms, acknowledged_ms]
            return struct.pack("=8B13I", 1, 0, sent_again, probes, growing, 0, 0, 0, *times)

    assert links.is_silent(cast(Any, Link()), 1.5) == silent


def test_connections_are_watched_for_silence_only_where_another_host_may_be(town: Town, clerk: Clerk) -> None:
    watched: list[Callable[..., bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "is_silent", lambda *_: bool(watched.append(links.is_silent)))
        near = Town("shared_memory")
        with closing(near):
            near.answer(near.peer(near.serve(clerk)).call(Clerk.note, 1))
            time.sleep(0.3)
            near.work(3)
        assert not watched
        town.answer(town.peer(town.serve(clerk)).call(Clerk.note, 2))
        time.sleep(0.3)
        town.work(3)
        assert watched
