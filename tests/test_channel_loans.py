# SPDX-License-Identifier: Apache-2.0
"""Laws of what a role lends: what arrives is what it held when it was asked, though it is not copied unless it must."""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from conftest import WIDE_BYTES, Town
from hypothesis import given, settings
from hypothesis import strategies as st

from distbelief.channel import links, second_stream
from distbelief.channel.base import Future, Out, Promise, exported, rounded
from distbelief.channel.codec import Part
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.frames import bytes_of
from distbelief.channel.futures import BackgroundWork, Kept
from distbelief.channel.loan import Loan
from distbelief.channel.peer import Peer
from distbelief.channel.secure import new_certificate
from distbelief.channel.wire import Wire
from distbelief.engine.home import ProcessHome
from distbelief.errors import RemoteError
from distbelief.parameter_server import ParameterServerShard, Stamp
from distbelief.parameters import Layout, Piece, Span
from distbelief.update_rule import sgd

pytestmark = pytest.mark.usefixtures("smaller_wide_bodies")
LENGTH = 5 * WIDE_BYTES // 4
"""Numbers; far more than sockets hold."""


class Library:
    """A role that lends its numbers, and changes them."""

    def __init__(self) -> None:
        self.own = torch.zeros(LENGTH)
        self.endpoint: Endpoint
        self.held = threading.Event()
        self.kept: tuple[Kept, torch.Tensor]

    @exported
    def take(self, out: Out) -> int:
        self.endpoint.desk.lending.lend(out, self.own)
        return int(self.own[0])

    @exported
    @rounded
    def take_rounded(self, out: Out) -> None:
        self.endpoint.desk.lending.lend(out, self.own)

    @exported
    def take_later(self, out: Out) -> Future[None]:
        self.endpoint.desk.lending.lend(out, self.own)
        return BackgroundWork(self.wait, self.endpoint, lambda work: threading.Thread(target=work).start())

    def wait(self) -> None:
        self.held.wait(20)

    @exported
    def take_when_kept(self, out: Out) -> Promise[None]:
        self.kept = Kept(self.endpoint), out
        return self.kept[0]

    def keep(self) -> None:
        promise, out = self.kept
        self.endpoint.desk.lending.lend(out, self.own)
        promise.keep(None)

    @exported
    def take_and_fail(self, out: Out) -> None:
        self.endpoint.desk.lending.lend(out, self.own)
        raise ValueError("no")

    @exported
    def take_before_adding(self, out: Out, number: int) -> None:
        self.endpoint.desk.lending.lend(out, self.own)
        self.endpoint.desk.lending.end(self.own)
        self.own += number

    @exported
    def put(self, values: torch.Tensor) -> None:
        self.endpoint.desk.lending.end(self.own)
        self.own.copy_(values)

    @exported
    def add(self, number: int) -> None:
        self.endpoint.desk.lending.end(self.own)
        self.own += number


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def library(request: pytest.FixtureRequest) -> Iterator[tuple[Town, Library, Callable[[], Peer[Library]]]]:
    """A library, and how to come to readers of it whose connections have a second stream."""
    town, role = Town("tcp"), Library()
    wire = Wire(certificate=new_certificate() if request.param else None)
    address = town.serve(role, wire=wire)
    role.endpoint = town.endpoints[0]

    def reader() -> Peer[Library]:
        peer = town.peer(address, wire=wire)
        town.answer(peer.call(Library.add, 0))
        town.answer(peer.call(Library.put, role.own.clone()))
        town.until(lambda: peer._connection is not None and peer._connection.second is not None)
        return peer

    with closing(town):
        yield town, role, reader


def number(values: torch.Tensor) -> float:
    """The number that all of these are."""
    low, high = values.aminmax()
    assert low == high, f"some of it is {low}, some {high}"
    return float(low)


def test_what_is_lent_is_not_copied(library: tuple[Town, Library, Callable[[], Peer[Library]]]) -> None:
    town, role, reader = library
    peer, out = reader(), torch.full((LENGTH,), -1.0)
    future = peer.call(Library.take, out)
    town.endpoints[0].poll(1.0)
    role.own += 1  # without a word: so what is on its way changes
    assert town.answer(future) == 0
    assert out.aminmax() == (0.0, 1.0)


def test_what_travels_rounded_is_not_sent_as_it_is_lent() -> None:
    town, role, wire = Town("tcp"), Library(), Wire(dtype="bfloat16")
    with closing(town):
        peer = town.peer(town.serve(role), wire=wire)
        role.endpoint = town.endpoints[0]
        role.own.fill_(1 / 3)
        for _ in range(3):  # the first one has no second stream yet
            out = torch.zeros(LENGTH)
            town.answer(peer.call(Library.take_rounded, out))
            assert number(out) == float(torch.tensor(1 / 3).bfloat16())
        assert peer._connection is not None
        assert peer._connection.second is not None


def test_what_is_on_its_way_is_as_it_was_though_it_is_changed_meanwhile(
    library: tuple[Town, Library, Callable[[], Peer[Library]]],
) -> None:
    town, role, reader = library
    slow, quick = reader(), reader()
    for round_ in range(3):
        outs = [torch.full((LENGTH,), -1.0) for _ in range(2)]
        first = slow.call(Library.take, outs[0])
        town.endpoints[0].poll(1.0)
        for _ in range(3):
            quickly(town, quick, quick.call(Library.add, 1))
        second = quick.call(Library.take, outs[1])
        quickly(town, quick, second)
        quickly(town, quick, quick.call(Library.add, 1))
        assert not first.done()
        assert (town.answer(first), number(outs[0])) == (4 * round_, 4.0 * round_)
        assert (second.result(), number(outs[1])) == (4 * round_ + 3, 4.0 * round_ + 3)
    assert number(role.own) == 12.0


def quickly(town: Town, peer: Peer[Library], future: Future[object]) -> None:
    """Wait for an answer while nobody else reads what he is sent."""
    while not future.done():
        town.endpoints[0].poll(0.0)
        peer.endpoint.poll(0.0)


def test_what_is_answered_later_or_not_at_all_lends_nothing(
    library: tuple[Town, Library, Callable[[], Peer[Library]]],
) -> None:
    town, role, reader = library
    peer, other = reader(), reader()
    out, again = torch.full((LENGTH,), -1.0), torch.full((LENGTH,), -1.0)
    town.answer(other.call(Library.add, 7))
    later = peer.call(Library.take_later, out)
    town.until(lambda: role.endpoint.desk._deferred)
    town.answer(other.call(Library.add, 1))
    with pytest.raises(RemoteError, match="no"):
        town.answer(other.call(Library.take_and_fail, again))
    role.held.set()
    town.answer(later)
    assert number(out) == 7.0
    assert not role.endpoint.desk.lending._loans
    kept = peer.call(Library.take_when_kept, out)
    town.until(lambda: role.endpoint.desk._deferred)
    role.keep()
    town.answer(other.call(Library.add, 1))
    town.answer(kept)
    assert number(out) == 8.0
    town.answer(other.call(Library.put, torch.full((LENGTH,), 5.0)))
    assert town.answer(other.call(Library.take, again)) == 5
    assert number(again) == 5.0


def test_what_changes_in_the_call_that_lends_it_arrives_as_it_was(
    library: tuple[Town, Library, Callable[[], Peer[Library]]],
) -> None:
    town, role, reader = library
    peer, out = reader(), torch.full((LENGTH,), -1.0)
    for round_ in range(3):
        town.answer(peer.call(Library.take_before_adding, out, 2))
        assert number(out) == 2.0 * round_
    assert number(role.own) == 6.0


def test_what_has_been_sent_is_lent_no_more(library: tuple[Town, Library, Callable[[], Peer[Library]]]) -> None:
    town, role, reader = library
    peer, out = reader(), torch.zeros(LENGTH)
    for _ in range(4):
        town.answer(peer.call(Library.take, out))
        assert len(role.endpoint.desk.lending._loans) == 1


def test_who_has_gone_keeps_nothing_lent(library: tuple[Town, Library, Callable[[], Peer[Library]]]) -> None:
    town, role, reader = library
    peer, other = reader(), reader()
    peer.call(Library.take, torch.zeros(LENGTH))
    town.endpoints[0].poll(1.0)
    assert len(role.endpoint.desk.lending._loans) == 1
    assert peer._connection is not None
    peer.endpoint.end(peer._connection, "it goes")
    town.until(lambda: not role.endpoint.desk.lending._loans)
    town.answer(other.call(Library.add, 1))
    out = torch.full((LENGTH,), -1.0)
    assert (town.answer(other.call(Library.take, out)), number(out)) == (1, 1.0)


@settings(deadline=None, max_examples=60, database=None)
@given(
    length=st.integers(1, 40), steps=st.lists(st.integers(1, 9), max_size=30), ended=st.integers(0, 30),
    dealt=st.booleans(),
)  # fmt: skip
def test_a_loan_sends_what_was_lent_whenever_it_is_ended(
    length: int, steps: list[int], ended: int, dealt: bool
) -> None:
    own = torch.arange(length, dtype=torch.uint8)
    loan = Loan(bytes_of(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distbelief.channel.second_stream.PIECE_BYTES", 7)
        streams = [deque[Part](parts) for parts in second_stream.deal([loan])] if dealt else [deque[Part]([loan])]
    sent: list[bytes] = []

    class Link(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            piece = bytes(memoryview(data)[: steps.pop() if steps else 9])  # type: ignore[arg-type]
            sent.append(piece)
            return len(piece)

    count = 0
    with Link() as link:
        while any(streams):
            if count == ended:
                loan.end()
                own.fill_(255)
            stream = streams[count % len(streams)] or next(stream for stream in streams if stream)
            links.send_some(link, stream)
            count += 1
    assert sorted(b"".join(sent)) == list(range(length))
    assert loan.over


def test_a_loan_is_not_ended_while_a_thread_is_sending_of_it() -> None:
    sending, release = threading.Event(), threading.Event()

    class Link(socket.socket):
        def send(self, data: object, flags: int = 0) -> int:
            sending.set()
            release.wait(20)
            return 1

    loan = Loan(memoryview(bytearray(b"abc")))
    with Link() as link:
        sender = threading.Thread(target=loan.send_by, args=(link,))
        ender = threading.Thread(target=loan.end)
        sender.start()
        sending.wait(20)
        ender.start()
        ender.join(0.1)
        assert ender.is_alive()
        release.set()
        for thread in (sender, ender):
            thread.join(20)
            assert not thread.is_alive()


def test_replicas_of_other_hosts_fetch_whole_versions_while_others_push() -> None:
    layout = Layout((Piece("w", (LENGTH,), Span(0, LENGTH)),), torch.float32)
    town = Town("tcp")
    with closing(town):
        listener = town.listen()
        endpoint = town.endpoint(None, listener)
        home = ProcessHome("shard/0", 0, endpoint, lambda _: None, address="127.0.0.1")  # type: ignore[arg-type,return-value]
        shard = ParameterServerShard(home, Span(0, LENGTH), layout, sgd(1.0))
        shard.initialise(0, torch.zeros(LENGTH))
        endpoint.answer_with(shard)
        peers = [town.peer(town.address(listener)) for _ in range(3)]
        for peer in peers:
            peer.endpoint.background()
        serving = threading.Event()

        def serve() -> None:
            while not serving.is_set():
                endpoint.poll(0.05)

        thread = threading.Thread(target=serve)
        thread.start()
        seen: list[list[tuple[int, float]]] = [[] for _ in peers]
        gradient = torch.full((LENGTH,), -1.0)

        def replica(index: int) -> None:
            into = torch.zeros(LENGTH)
            for sequence in range(1, 16):
                stamp = Stamp(index, 0, sequence, 0, 1, ())
                if index == 2:
                    version = peers[index].call(ParameterServerShard.fetch, index, 0, into).result()
                else:
                    version = peers[index].call(ParameterServerShard.exchange, stamp, gradient, into).result()
                seen[index].append((version, number(into)))

        replicas = [threading.Thread(target=replica, args=(index,)) for index in range(len(peers))]
        for one in replicas:
            one.start()
        for one in replicas:
            one.join()
        serving.set()
        thread.join()
    assert [len(versions) for versions in seen] == [15, 15, 15]
    assert all(version == value for versions in seen for version, value in versions)
