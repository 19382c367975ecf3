# SPDX-License-Identifier: Apache-2.0
"""Whose memory the bodies of calls over TCP are received into and sent from."""

import random
import time
from typing import Any

import pytest
import torch
from conftest import Town

from distbelief.channel import staging
from distbelief.channel.base import Future, Out, Promise, exported
from distbelief.channel.futures import Kept
from distbelief.channel.second_stream import WIDE_BYTES

pytestmark = pytest.mark.parametrize("town", ["tcp"], indirect=True)


class Clerk:
    """Answers at once, or when it is told to."""

    def __init__(self) -> None:
        self.promises: list[Promise[int]] = []
        self.town: Town

    @exported
    def twice(self, values: torch.Tensor, out: Out) -> int:
        torch.mul(values, 2, out=out)
        return len(values)

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


@pytest.mark.parametrize("seed", range(12))
def test_calls_that_come_go_and_stop_midway_in_any_order_do_not_mix_their_numbers(
    town: Town, clerk: Clerk, seed: int
) -> None:
    """Bodies longer than the kernel takes at once, so that each is often half received or half sent."""
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
