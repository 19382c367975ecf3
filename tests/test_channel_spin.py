# SPDX-License-Identifier: Apache-2.0
"""Laws of waiting: who has a core looks before it sleeps where that has paid; nobody is late for it."""

from types import SimpleNamespace

import pytest

from distbelief.channel.spin import SHORT_WAITS, SPIN_SECONDS, Spin

LOOK_SECONDS = SPIN_SECONDS / 30


class Visitor:
    """Somebody who is awaited on a clock of his own: a look takes a while, and who sleeps is woken at once."""

    def __init__(self) -> None:
        self.looks, self.yields = list[float](), 0
        self.now = self._comes = 0.0

    def expect(self, spin: Spin, comes_after: float, patience: float = 1.0) -> bool:
        """Wait for him; whether he has come. How long each look may sleep is written down."""
        self.looks.clear()
        self.yields = 0
        self._comes = self.now + comes_after
        return spin.wait(self._look, patience)

    def give_way(self) -> None:
        """The core is offered to others."""
        self.yields += 1

    def _look(self, seconds: float) -> bool:
        self.looks.append(seconds)
        self.now = max(self.now + LOOK_SECONDS, min(self._comes, self.now + seconds))
        return self.now >= self._comes


@pytest.fixture
def visitor(monkeypatch: pytest.MonkeyPatch) -> Visitor:
    visitor = Visitor()
    monkeypatch.setattr("distbelief.channel.spin.time", SimpleNamespace(perf_counter=lambda: visitor.now))
    monkeypatch.setattr("distbelief.channel.spin.os", SimpleNamespace(sched_yield=visitor.give_way))
    return visitor


def used_to_short_waits(visitor: Visitor) -> Spin:
    spin = Spin(own_core=True)
    for _ in range(SHORT_WAITS):
        assert visitor.expect(spin, 0.0)
        assert visitor.looks == [1.0]
    return spin


def test_who_shares_his_core_sleeps_at_once_however_short_it_is(visitor: Visitor) -> None:
    spin = Spin(own_core=False)
    for _ in range(3 * SHORT_WAITS):
        assert visitor.expect(spin, 0.0)
        assert visitor.looks == [1.0]


def test_after_short_waits_what_comes_at_once_is_not_slept_for(visitor: Visitor) -> None:
    spin = used_to_short_waits(visitor)
    for _ in range(3):
        assert visitor.expect(spin, 3.5 * LOOK_SECONDS)
        assert visitor.looks == [0.0] * 4
        assert visitor.yields == 3


def test_what_does_not_come_within_the_moment_is_slept_for_and_so_are_the_next(visitor: Visitor) -> None:
    spin = used_to_short_waits(visitor)
    assert visitor.expect(spin, 3 * SPIN_SECONDS)
    assert visitor.looks[-1] == 1.0
    assert 29 <= visitor.looks.count(0.0) <= 31
    for _ in range(SHORT_WAITS):
        assert visitor.expect(spin, 0.0)
        assert visitor.looks == [1.0]
    assert visitor.expect(spin, 0.0)
    assert visitor.looks == [0.0]


def test_short_waits_count_only_in_a_row(visitor: Visitor) -> None:
    spin = Spin(own_core=True)
    for _ in range(3):
        for _ in range(SHORT_WAITS - 1):
            assert visitor.expect(spin, 0.0)
            assert visitor.looks == [1.0]
        assert visitor.expect(spin, 2 * SPIN_SECONDS)
        assert visitor.looks == [1.0]


def test_who_does_not_come_is_given_up_in_time_and_who_may_not_wait_looks_once(visitor: Visitor) -> None:
    spin = used_to_short_waits(visitor)
    assert not visitor.expect(spin, 1.0, patience=0.0)
    assert visitor.looks == [0.0]
    started, patience = visitor.now, 3.5 * LOOK_SECONDS
    assert not visitor.expect(spin, 1.0, patience)
    assert visitor.looks == [0.0] * 4 + [patience]
    assert visitor.now - started < 8 * LOOK_SECONDS
