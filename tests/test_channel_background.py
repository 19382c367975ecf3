# SPDX-License-Identifier: Apache-2.0
"""Laws of the thread that polls while its owner computes: whoever waits polls himself, and it is not even woken."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import Town

from distbelief.channel import background
from distbelief.channel.base import Out, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import BackgroundWork, Kept
from distbelief.channel.peer import Peer, at
from distbelief.errors import PeerLost

LENGTH = 1000


class Clerk:
    """Answers in a thread of its own, so that a test may wait."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    @exported
    def twice(self, values: torch.Tensor, out: Out) -> int:
        torch.mul(values, 2, out=out)
        return len(values)

    @exported
    def late(self, number: int) -> int:
        assert self.may_answer.wait(10.0)
        return number


class Owner:
    """An endpoint with its thread, and who polled it, from now on."""

    def __init__(self, endpoint: Endpoint, peer: Peer[Clerk]) -> None:
        self.endpoint, self.peer = endpoint, peer
        self.polls = list[tuple[bool, float]]()
        """(whether it was the thread, for how many seconds)."""
        thread = endpoint._background
        assert thread is not None
        poll = thread._poll

        def watched(seconds: float) -> object:
            self.polls.append((thread.is_here, seconds))
            return poll(seconds)

        thread._poll = watched

    def exchange(self) -> None:
        values, out = torch.arange(float(LENGTH)), torch.zeros(LENGTH)
        assert self.peer.call(Clerk.twice, values, out).result() == LENGTH
        assert torch.equal(out, 2 * values)


@pytest.fixture
def clerk() -> Clerk:
    return Clerk()


@pytest.fixture
def owner(town: Town, clerk: Clerk) -> Iterator[Owner]:
    address = town.serve(clerk)
    town.endpoints[0].background()
    endpoint = Endpoint(Town.key, own_core=True)
    endpoint.background()
    owner = Owner(endpoint, Peer(endpoint, at(address)))
    owner.exchange()
    yield owner
    clerk.may_answer.set()
    endpoint.close()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for it without using the endpoint."""
    until = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)


def test_who_waits_takes_in_his_answers_himself_and_the_thread_sleeps(owner: Owner, clerk: Clerk) -> None:
    owner.polls.clear()
    for number in range(10):
        clerk.may_answer.clear()
        future = owner.peer.call(Clerk.late, number)
        answering = threading.Timer(0.02, clerk.may_answer.set)
        answering.start()
        assert future.result() == number
        answering.join()
    assert sum(by_thread for by_thread, _ in owner.polls) <= 3  # what is left of the start, and a slow machine's pauses
    own = [seconds for by_thread, seconds in owner.polls if not by_thread]
    assert len(own) >= 10
    assert min(own) > 0.0
    owner.polls.clear()
    clerk.may_answer.clear()
    assert not owner.peer.call(Clerk.late, 0).wait(0.5)
    assert owner.polls
    assert not any(
        by_thread for by_thread, _ in owner.polls
    )  # though it wakes now and then, to see whether it is to end


def test_the_thread_takes_in_what_comes_while_its_owner_computes_and_never_waits_in_a_poll(owner: Owner) -> None:
    owner.polls.clear()
    future = owner.peer.call(Clerk.twice, torch.ones(LENGTH), torch.zeros(LENGTH))
    eventually(lambda: future.settled)  # type: ignore[attr-defined]
    assert set(owner.polls) == {(True, 0.0)}
    assert future.result() == LENGTH


def test_the_thread_goes_on_after_a_wait_that_ended_too_early_or_was_broken_off(owner: Owner, clerk: Clerk) -> None:
    future = owner.peer.call(Clerk.late, 7)
    assert not future.wait(0.01)
    thread = owner.endpoint._background
    assert thread is not None
    poll = thread._poll

    def interrupted(seconds: float) -> object:
        if thread.is_here:
            return poll(seconds)
        raise KeyboardInterrupt

    thread._poll = interrupted
    with pytest.raises(KeyboardInterrupt):
        future.result()
    thread._poll = poll
    clerk.may_answer.set()
    eventually(lambda: future.settled)  # type: ignore[attr-defined]
    assert future.result() == 7


def test_several_threads_of_the_owner_wait_at_once_and_each_has_its_answer(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_OTHERS_SECONDS", 5.0)  # each is told at once
    began = time.monotonic()
    right = list[int]()

    def work() -> None:
        for _ in range(30):
            owner.exchange()
        right.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(right) == 4
    assert time.monotonic() - began < 5.0


def test_who_waits_is_woken_by_what_another_thread_of_his_has_ended(owner: Owner) -> None:
    def begin(run: Callable[[], None]) -> None:
        threading.Timer(0.05, run).start()

    began = time.monotonic()
    assert BackgroundWork(lambda: 5, owner.endpoint, begin).result() == 5
    assert time.monotonic() - began < 5.0


def test_a_promise_that_is_kept_when_its_owner_is_about_to_wait_is_not_waited_for(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    promise, take_in = Kept[int](owner.endpoint), owner.endpoint.take_in

    def too_late(seconds: float, *there: Callable[[], bool]) -> None:
        owner.polls.clear()
        promise.keep(3)
        eventually(lambda: bool(owner.polls))  # the thread has taken the news
        take_in(seconds, *there)

    monkeypatch.setattr(owner.endpoint, "take_in", too_late)
    assert promise.wait(5.0)
    assert all(by_thread for by_thread, _ in owner.polls)
    assert promise.result() == 3


def test_who_waits_while_another_thread_closes_the_endpoint_is_told_that_the_peer_is_lost(
    owner: Owner, clerk: Clerk
) -> None:
    future = owner.peer.call(Clerk.late, 7)
    closing = threading.Timer(0.05, owner.endpoint.close)
    closing.start()
    with pytest.raises(PeerLost):
        future.result()
    closing.join()


def test_an_endpoint_is_not_closed_under_one_who_polls_it(owner: Owner, clerk: Clerk) -> None:
    thread, polling, closed = owner.endpoint._background, threading.Event(), list[bool]()
    assert thread is not None
    poll = thread._poll

    def slow(seconds: float) -> object:
        if not thread.is_here:
            polling.set()
            time.sleep(0.1)
            closed.append(owner.endpoint._watch._epoll.closed)
        return poll(seconds)

    thread._poll = slow
    future = owner.peer.call(Clerk.late, 7)

    def close() -> None:
        polling.wait()
        owner.endpoint.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(PeerLost):
        future.result()
    closing.join()
    assert closed == [False]


def test_who_waits_for_something_else_after_the_endpoint_is_closed_does_not_spin(owner: Owner) -> None:
    owner.endpoint.close()
    began = time.thread_time()
    assert not Kept[int](owner.endpoint).wait(0.5)
    assert time.thread_time() - began < 0.1
