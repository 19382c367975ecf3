# SPDX-License-Identifier: Apache-2.0
"""Whose memory the bodies of calls over TCP are received into and sent from."""

import random
import time
from contextlib import closing
from typing import Any

import pytest
import torch
from conftest import WIDE_BYTES, Town

from distbelief.channel import staging
from distbelief.channel.base import Future, Out, Promise, exported
from distbelief.channel.futures import Kept
from distbelief.channel.peer import Peer

pytestmark = [
    pytest.mark.parametrize("town", ["tcp"], indirect=True),
    pytest.mark.usefixtures("smaller_wide_bodies"),
]


class Clerk:
    """Answers at once, or when it is told to."""

    def __init__(self) -> None:
        self.promises: list[Promise[int]] = []
        self.pings = 0
        self.town: Town

    @exported
    def twice(self, values: torch.Tensor, out: Out) -> int:
        torch.mul(values, 2, out=out)
        return len(values)

    @exported
    def ping(self) -> int:
        self.pings += 1
        return self.pings

    @exported
    def first(self, values: torch.Tensor) -> int:
        assert bool((values == values[0]).all())
        return int(values[0])

    @exported
    def later(self, values: torch.Tensor, out: Out) -> Future[int]:
        torch.mul(values, 2, out=out)
        self.promises.append(Kept(self.town.endpoints[0]))
        return self.promises[-1]


@pytest.fixture
def clerk(town: Town) -> Clerk:
    clerk = Clerk()
    clerk.town = town
    return clerk


@pytest.mark.parametrize("length", [1000, WIDE_BYTES // 4 + 1000], ids=["short", "by two streams"])
def test_callers_who_take_turns_share_one_buffer(town: Town, clerk: Clerk, length: int) -> None:
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(5)]
    for turn in range(4):
        for number, peer in enumerate(peers):
            values, out = torch.full((length,), float(turn * 10 + number)), torch.zeros(length)
            town.answer(peer.call(Clerk.twice, values, out))
            assert torch.equal(out, 2 * values)
            town.until(lambda: not any(link.reading for link in town.endpoints[0]._connections))
    assert len(town.staged()) == 1


def test_a_caller_who_is_still_waiting_keeps_his_buffer(town: Town, clerk: Clerk) -> None:
    address = town.serve(clerk)
    first, second = town.peer(address), town.peer(address)
    values, out, other = torch.arange(1000.0), torch.zeros(1000), torch.zeros(1000)
    waiting = first.call(Clerk.later, values, out)
    town.until(lambda: clerk.promises)
    town.answer(second.call(Clerk.twice, torch.full((1000,), -1.0), other))
    assert len(town.staged()) == 2
    clerk.promises[0].keep(1)
    town.answer(waiting)
    assert torch.equal(out, 2 * values)


def test_what_a_rush_needed_is_given_back_after_it(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "IDLE_SECONDS", 0.3)
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(5)]
    waiting = [peer.call(Clerk.later, torch.ones(1000), torch.zeros(1000)) for peer in peers]
    town.until(lambda: len(clerk.promises) == 5)
    for promise in clerk.promises:
        promise.keep(1)
    for future in waiting:
        town.answer(future)
    assert len(town.staged()) == 5
    for turn in range(5):
        time.sleep(0.1)
        town.answer(peers[turn].call(Clerk.twice, torch.ones(1000), torch.zeros(1000)))
    assert len(town.staged()) == 1


def test_a_caller_who_has_gone_leaves_no_buffer(town: Town, clerk: Clerk) -> None:
    peer = town.peer(town.serve(clerk))
    town.answer(peer.call(Clerk.twice, torch.ones(1000), torch.zeros(1000)))
    town.endpoints.remove(peer.endpoint)
    peer.endpoint.close()
    town.until(lambda: not town.endpoints[0]._connections)
    assert not town.staged()


LONG = 5 * WIDE_BYTES // 4
"""Numbers; far more than sockets hold, so that a caller who does nothing has sent a part of them."""


def began(town: Town, peer: Peer[Clerk], number: float) -> tuple[Future[int], torch.Tensor]:
    """A long call that has come in part, or is held up."""
    out = torch.zeros(LONG)
    future = peer.call(Clerk.twice, torch.full((LONG,), number), out)
    while peer._connection is None or not peer._connection.proved:
        peer.endpoint.poll(0.0)
        town.endpoints[0].poll(0.0)
    for _ in range(20):
        town.endpoints[0].poll(0.0)
    assert not future.done()
    return future, out


def finish(town: Town, calls: list[tuple[Future[int], torch.Tensor]], numbers: list[float]) -> None:
    for (future, out), number in zip(calls, numbers, strict=True):
        assert town.answer(future) == LONG
        assert bool((out == 2 * number).all())


def test_long_bodies_that_come_fast_are_received_into_one_buffer(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(4)]
    desk = town.endpoints[0].desk
    for turn in range(3):
        numbers = [10 * turn + number for number in range(4)]
        futures = [
            peer.call(Clerk.first, torch.full((LONG,), float(number)))
            for peer, number in zip(peers, numbers, strict=True)
        ]
        assert [town.answer(future) for future in futures] == numbers
        assert len(town.staged()) == 1
    assert not desk.held_up


def test_who_was_held_up_first_is_received_first(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(5)]
    calls = [began(town, peer, float(number)) for number, peer in enumerate(peers)]
    ended: list[int] = []

    def note() -> bool:
        ended.extend(number for number, (future, _) in enumerate(calls) if future.done() and number not in ended)
        return len(ended) == len(calls)

    town.until(note)
    assert ended == list(range(5))


def test_a_body_that_takes_long_holds_nobody_up(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", LONG * 4 / 0.3)
    address = town.serve(clerk)
    slow, quick = town.peer(address), town.peer(address)
    stalled = began(town, slow, 1.0)
    started = time.monotonic()
    out = torch.zeros(LONG)
    future = quick.call(Clerk.twice, torch.full((LONG,), 2.0), out)
    while not future.done():
        assert time.monotonic() < started + 20
        quick.endpoint.poll(0.0)
        town.endpoints[0].poll(0.0)
    assert len(town.staged()) == 2
    assert time.monotonic() - started > 0.1
    assert not stalled[0].done()
    finish(town, [stalled, (future, out)], [1.0, 2.0])


def test_short_bodies_and_answers_wait_for_nobody(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    address = town.serve(clerk)
    slow, quick = town.peer(address), town.peer(address)
    stalled = began(town, slow, 1.0)
    out = torch.zeros(1000)
    future = quick.call(Clerk.twice, torch.ones(1000), out)
    while not future.done():
        quick.endpoint.poll(0.0)
        town.endpoints[0].poll(0.0)
    assert bool((out == 2).all())
    finish(town, [stalled], [1.0])


def test_a_caller_does_not_wait_for_himself(town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    peer = town.peer(town.serve(clerk))
    for number in range(4):
        finish(town, [began(town, peer, float(number))], [float(number)])


@pytest.mark.parametrize("gone", [0, 1], ids=["who was being received", "who was held up"])
def test_a_caller_who_goes_midway_holds_nobody_up(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(3)]
    calls = [began(town, peer, float(number)) for number, peer in enumerate(peers)]
    town.endpoints.remove(peers[gone].endpoint)
    peers[gone].endpoint.close()
    del calls[gone]
    finish(town, calls, [float(number) for number in range(3) if number != gone])
    town.until(lambda: len(town.endpoints[0]._connections) == 2)
    assert not town.endpoints[0].desk.held_up


@pytest.mark.parametrize("transport", ["tcp", "shared_memory"])
def test_a_body_that_is_held_up_goes_on_in_time_though_nothing_else_happens(
    clerk: Clerk, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", LONG * 4 / 0.1)
    with closing(Town(transport)) as town:
        address = town.serve(clerk)
        peers = [town.peer(address) for _ in range(2)]
        for peer in peers:
            town.answer(peer.call(Clerk.ping))
        town.until(lambda: not town.endpoints[0]._door.strangers)
        for number, peer in enumerate(peers):
            began(town, peer, float(number))
        assert len(town.endpoints[0].desk.held_up) == 1
        started = time.monotonic()
        while town.endpoints[0].desk.held_up:
            town.endpoints[0].poll(5.0)
        assert time.monotonic() - started < 0.2


def test_who_sends_one_long_body_after_another_lets_others_come_between(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", 1.0)
    address = town.serve(clerk)
    busy, other = town.peer(address), town.peer(address)
    many = [busy.call(Clerk.first, torch.full((LONG,), float(number))) for number in range(5)]
    while not many[0].done():
        busy.endpoint.poll(0.0)
        town.endpoints[0].poll(0.0)
    one = other.call(Clerk.first, torch.full((LONG,), 7.0))
    town.until(lambda: town.endpoints[0].desk.held_up or one.done())
    assert town.answer(one) == 7
    assert not many[4].done()
    assert [town.answer(future) for future in many] == list(range(5))


@pytest.mark.parametrize("deferred", [False, True], ids=["being sent", "to be answered later"])
def test_a_call_without_tensors_leaves_the_buffers_of_the_one_before_alone(
    town: Town, clerk: Clerk, deferred: bool
) -> None:
    address = town.serve(clerk)
    patient, other = town.peer(address), town.peer(address)
    method = Clerk.later if deferred else Clerk.twice
    out, answers = torch.zeros(LONG), []
    slow = patient.call(method, torch.full((LONG,), 1.0), out)
    answers.append(patient.call(Clerk.ping))
    server = town.endpoints[0]
    while not clerk.pings:
        patient.endpoint.poll(0.0)
        server.poll(0.0)
    again = torch.zeros(LONG)
    quick = other.call(Clerk.twice, torch.full((LONG,), 50.0), again)
    while not quick.done():
        other.endpoint.poll(0.0)
        server.poll(0.0)
    assert not slow.done()
    for promise in clerk.promises:
        promise.keep(LONG)
    finish(town, [(slow, out), (quick, again)], [1.0, 50.0])
    assert town.answer(answers[0]) == 1


class Library:
    """Lends its numbers, and changes them."""

    def __init__(self) -> None:
        self.own = torch.zeros(LONG)
        self.town: Town

    @exported
    def exchange(self, values: torch.Tensor, out: Out) -> int:
        lending = self.town.endpoints[0].desk.lending
        lending.end(self.own)
        self.own += values
        lending.lend(out, self.own)
        return int(self.own[0])


def test_while_what_was_lent_is_sent_the_next_call_has_the_buffer(town: Town) -> None:
    library = Library()
    library.town = town
    address = town.serve(library)
    peers = [town.peer(address) for _ in range(3)]
    ones = torch.ones(LONG)
    for peer in peers:  # each gets its second stream, without which nothing is lent
        town.answer(peer.call(Library.exchange, ones, torch.zeros(LONG)))
        town.answer(peer.call(Library.exchange, ones, torch.zeros(LONG)))
    town.until(lambda: all(peer._connection.second is not None for peer in peers))  # type: ignore[union-attr]
    outs = [torch.zeros(LONG) for _ in peers]
    server = town.endpoints[0]
    unread = peers[0].call(Library.exchange, ones, outs[0])
    before = int(library.own[0])
    while int(library.own[0]) == before:
        peers[0].endpoint.poll(0.0)
        server.poll(0.0)
    others = []
    for peer, out in zip(peers[1:], outs[1:], strict=True):
        others.append(peer.call(Library.exchange, ones, out))
        while not others[-1].done():
            peer.endpoint.poll(0.0)
            server.poll(0.0)
    assert not unread.done()
    assert len(town.staged()) == 1
    told = [town.answer(unread), *(other.result() for other in others)]
    assert told == [before + 1, before + 2, before + 3]
    for out, number in zip(outs, told, strict=True):
        assert bool((out == number).all())


@pytest.mark.parametrize("fast", [1.0, 1e9, 1e15], ids=["one after another", "as it is", "all at once"])
@pytest.mark.parametrize("seed", range(12))
def test_calls_that_come_go_and_stop_midway_in_any_order_do_not_mix_their_numbers(
    town: Town, clerk: Clerk, monkeypatch: pytest.MonkeyPatch, seed: int, fast: float
) -> None:
    """Bodies longer than the kernel takes at once, so that each is often half received or half sent."""
    monkeypatch.setattr(staging, "FAST_BYTES_PER_SECOND", fast)
    draw = random.Random(seed)
    address = town.serve(clerk)
    peers = [town.peer(address) for _ in range(4)]
    lengths = [1000, 700_000, WIDE_BYTES // 4 + 1000]
    calls: list[tuple[Future[Any], torch.Tensor, torch.Tensor]] = []
    for number in range(40):
        length = draw.choice(lengths)
        values, out = torch.full((length,), float(number)), torch.zeros(length)
        method = draw.choice([Clerk.twice, Clerk.twice, Clerk.later])
        calls.append((draw.choice(peers).call(method, values, out), values, out))
        for _ in range(draw.randrange(8)):
            draw.choice(town.endpoints).poll(0.0)
        if clerk.promises and draw.random() < 0.3:
            clerk.promises.pop(draw.randrange(len(clerk.promises))).keep(1)
    for future, values, out in calls:
        while not future.done():
            town.work()
            while clerk.promises:
                clerk.promises.pop().keep(1)
        future.result()
        assert torch.equal(out, 2 * values)
