# SPDX-License-Identifier: Apache-2.0
"""Laws of leases, warmstart and failures.

The leases are driven by random schedules of replicas that ask, compute, push to shards one by one, report late, die
and leave, and are compared with a ledger that notes every single position on every shard.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from distbelief.leases import Failures, Lease, Leases, LeaseState, Loss, Release, lease_size

Position = tuple[int, int]
"""(epoch, position in its permutation)."""


@dataclass
class Push:
    """A push under way: positions reached, the positions themselves, and the shards that have not applied it."""

    portions: dict[int, int]
    positions: list[Position]
    pending: list[int]


@dataclass
class Life:
    """One incarnation of a replica; it has a number of its own."""

    number: int
    queue: list[Lease] = field(default_factory=list)
    at: int | None = None
    accrued: Push = field(default_factory=lambda: Push({}, [], []))
    under_way: Push | None = None
    reports: list[Push] = field(default_factory=list)


class Shard:
    """What one shard has applied, by position, and up to where it knows each lease of a replica."""

    def __init__(self) -> None:
        self.applied: dict[Position, list[int]] = defaultdict(list)
        self.records: dict[int, dict[int, int]] = defaultdict(dict)

    def copy(self) -> "Shard":
        twin = Shard()
        twin.applied.update({position: list(lives) for position, lives in self.applied.items()})
        twin.records.update({life: dict(record) for life, record in self.records.items()})
        return twin


class World:
    """Replicas and shards around the leases, one random step at a time; the ledger is in the shards and `settled`."""

    def __init__(self, seed: int, leases: Leases, batch: int, replicas: int, shards: list[Shard]) -> None:
        self.random, self.leases, self.batch, self.shards = random.Random(seed), leases, batch, shards
        self.births, self.deaths, self.late = seed * 1000, 0, 0
        self.of_the_dead: list[tuple[int, Push]] = []
        self.lives = [self.born() for _ in range(replicas)]
        self.settled: Counter[Position] = Counter()

    def born(self) -> Life:
        self.births += 1
        return Life(self.births)

    def step(self, *, deadly: bool = True) -> None:
        index = self.random.randrange(len(self.lives))
        life = self.lives[index]
        act = self.random.choices("acpsrtdl", (3, 8, 6, 16, 3, 1, 0.5 * deadly, 0.2 * deadly))[0]
        if act == "a" and len(life.queue) < 3:
            lease = self.leases.next(life.number)
            life.queue += [lease] if lease else []
        elif act == "c":
            self.compute(life)
        elif act == "p" and life.accrued.positions and life.under_way is None:
            life.under_way, life.accrued = life.accrued, Push({}, [], [])
            life.under_way.pending = self.random.sample(range(len(self.shards)), len(self.shards))
        elif act == "s" and life.under_way is not None:
            self.arrive(life, life.under_way)
        elif act == "r" and life.reports:
            self.report(life, life.reports.pop(0))
        elif act == "t" and self.of_the_dead:
            self.report_too_late(*self.of_the_dead.pop())
        elif act in "dl":
            self.lives[index] = self.born()
            self.die(life) if act == "d" else self.leave(life)

    def compute(self, life: Life) -> None:
        if not life.queue:
            return
        lease = life.queue[0]
        start = lease.start if life.at is None else life.at
        stop = min(start + self.batch, lease.stop)
        life.accrued.positions += [(lease.epoch, position) for position in range(start, stop)]
        life.accrued.portions[lease.identifier] = life.at = stop
        if stop == lease.stop:
            life.queue.pop(0)
            life.at = None

    def arrive(self, life: Life, push: Push) -> None:
        shard = self.shards[push.pending.pop()]
        for position in push.positions:
            shard.applied[position].append(life.number)
        shard.records[life.number].update(push.portions)
        if not push.pending:
            life.under_way = None
            life.reports.append(push)

    def report(self, life: Life, push: Push) -> None:
        for identifier, position in push.portions.items():
            self.leases.settle(life.number, identifier, position)
        self.settled.update(push.positions)

    def die(self, life: Life) -> None:
        self.deaths += 1
        by_shard = [Counter(p for p, lives in shard.applied.items() if life.number in lives) for shard in self.shards]
        everywhere = set.intersection(*map(set, by_shard))
        somewhere = set.union(*map(set, by_shard))
        repeated = self.leases.repeated
        loss = self.leases.lose(life.number, [shard.records[life.number] for shard in self.shards])
        assert loss.repeated == len(somewhere - everywhere) == self.leases.repeated - repeated
        self.settled.update(everywhere - set(self.settled))
        self.of_the_dead += [(life.number, push) for push in life.reports]

    def report_too_late(self, number: int, push: Push) -> None:
        before, held = self.leases.state(), {lease.identifier for other in self.lives for lease in other.queue}
        for identifier, position in push.portions.items():
            self.late += identifier in held
            self.leases.settle(number, identifier, position)
        assert self.leases.state() == before

    def leave(self, life: Life) -> None:
        while life.under_way is not None:
            self.arrive(life, life.under_way)
        while life.reports:
            self.report(life, life.reports.pop(0))
        self.leases.give_back(life.number)

    def check(self) -> None:
        assert self.leases.settled_examples == len(self.settled)
        assert self.leases.finished == (len(self.settled) == self.leases.total_examples)
        for position in self.settled:
            assert all(shard.applied[position] for shard in self.shards)

    def run_to_the_end(self) -> None:
        for _ in range(20_000):
            self.step()
            if self.leases.finished:
                return
        pytest.fail("the leases never finish")

    def check_the_end(self) -> None:
        everything = {(e, p) for e in range(self.leases.epochs) for p in range(self.leases.examples_per_epoch)}
        assert self.leases.settled_examples == self.leases.total_examples == len(everything)
        for shard in self.shards:
            assert {position for position, lives in shard.applied.items() if lives} == everything

    @property
    def repeated(self) -> int:
        """Times that a position was begun anew although some shard had applied it."""
        lives: dict[Position, set[int]] = defaultdict(set)
        for shard in self.shards:
            for position, numbers in shard.applied.items():
                assert len(numbers) == len(set(numbers)), "one life applied a position twice"
                lives[position].update(numbers)
        return sum(len(numbers) - 1 for numbers in lives.values() if numbers)


def world(seed: int) -> World:
    draw = random.Random(-seed - 1)
    batch = draw.randint(1, 4)
    leases = Leases(draw.randint(1, 40), batch * draw.randint(1, 4), draw.randint(1, 3))
    return World(seed, leases, batch, draw.randint(1, 5), [Shard() for _ in range(draw.randint(1, 3))])


def test_every_position_settles_once_and_repeats_are_exactly_what_deaths_left_on_some_shards_only() -> None:
    deaths = repeats = late = 0
    for seed in range(300):
        one = world(seed)
        one.run_to_the_end()
        one.check_the_end()
        one.check()
        assert set(one.settled.values()) == {1}
        assert one.leases.repeated == one.repeated
        deaths, repeats, late = deaths + one.deaths, repeats + one.repeated, late + one.late
    assert deaths > 300
    assert repeats > 100
    assert late > 20


def test_at_every_moment_what_counts_as_settled_is_applied_on_every_shard() -> None:
    for seed in range(300, 330):
        one = world(seed)
        for _ in range(400):
            one.step()
            one.check()
            assert one.leases.epoch == min((lease.epoch for lease in one.leases.unsettled()), default=one.leases.epoch)


def test_without_deaths_nothing_repeats_and_every_shard_applies_each_position_once() -> None:
    for seed in range(330, 360):
        one = world(seed)
        while not one.leases.finished:
            one.step(deadly=False)
        one.check_the_end()
        assert one.leases.repeated == 0
        assert all(len(lives) == 1 for shard in one.shards for lives in shard.applied.values())


def killed_and_resumed(seed: int, *, deadly: bool) -> World:
    """A checkpoint whose shards write one after another while training goes on; then everything dies and resumes."""
    one = world(seed)
    for _ in range(one.random.randint(0, 300)):
        one.step(deadly=deadly)
    state = one.leases.state()
    files: list[Shard | None] = [None] * len(one.shards)
    for index in one.random.sample(range(len(files)), len(files)):
        for _ in range(one.random.randint(0, 40)):
            one.step(deadly=False)
        files[index] = one.shards[index].copy()
    shards = [shard for shard in files if shard is not None]
    positions: list[dict[int, int]] = []
    for shard in shards:
        positions.append({})
        for record in shard.records.values():
            for lease, position in record.items():
                positions[-1][lease] = max(position, positions[-1].get(lease, 0))
    leases = Leases.resumed(state, one.leases.epochs, positions)
    lives = one.random.randint(1, 6)
    return World(seed + 500_000, leases, one.random.choice([one.batch, 1, 5]), lives, shards)


def test_a_job_killed_as_a_whole_covers_exactly_the_rest_with_any_number_of_replicas() -> None:
    repeats = 0
    for seed in range(200):
        one = killed_and_resumed(seed, deadly=False)
        one.run_to_the_end()
        one.check_the_end()
        assert one.leases.repeated == one.repeated
        repeats += one.repeated
    assert repeats > 100


def test_a_resume_after_earlier_deaths_covers_the_rest_and_never_counts_too_few_repeats() -> None:
    for seed in range(200, 400):
        one = killed_and_resumed(seed, deadly=True)
        one.run_to_the_end()
        one.check_the_end()
        assert one.leases.repeated >= one.repeated


def test_a_returned_lease_is_handed_out_before_new_ones_without_what_was_settled() -> None:
    leases = Leases(100, 20, 1)
    first, second = leases.next(0), leases.next(0)
    assert (first, second) == (Lease(0, 0, 0, 20), Lease(1, 0, 20, 40))
    assert leases.next(1) == Lease(2, 0, 40, 60)
    leases.settle(0, 0, 12)
    leases.settle(1, 0, 20)  # not its lease
    loss = leases.lose(0, [{0: 12, 1: 24}, {0: 16, 1: 20}])
    assert (loss.leases, loss.examples, loss.repeated) == (2, 8 + 20, 4 + 4)
    assert [leases.next(1) for _ in range(4)] == [
        Lease(0, 0, 12, 20), Lease(1, 0, 20, 40), Lease(3, 0, 60, 80), Lease(4, 0, 80, 100),
    ]  # fmt: skip
    assert leases.next(1) is None


def test_an_epoch_goes_on_until_all_of_it_is_handed_out_and_settled() -> None:
    leases = Leases(10, 5, 2)
    told = []
    for identifier in range(4):
        leases.next(0)
        told.append(leases.epoch)
        leases.settle(0, identifier, 10 if identifier % 2 else 5)
        told.append(leases.epoch)
    assert told == [0, 0, 0, 1, 1, 1, 1, 2]


def test_what_no_shard_tells_of_is_not_settled_by_a_death() -> None:
    leases = Leases(10, 5, 1)
    lease = leases.next(0)
    assert leases.lose(0, []) == Loss(1, 5, 0)
    assert (leases.settled_examples, leases.next(1)) == (0, lease)


def test_a_resume_for_fewer_epochs_than_are_behind_is_finished_and_for_more_goes_on() -> None:
    state = LeaseState(examples_per_epoch=10, lease_examples=5, issued=4, unsettled=(), repeated=3, refused=7)
    assert Leases.resumed(state, 1, [{}]).finished
    assert Leases.resumed(state, 2, [{}]).finished
    longer = Leases.resumed(state, 3, [{}])
    assert (longer.finished, longer.repeated, longer.settled_examples, longer.epoch) == (False, 3, 20, 2)
    assert (longer.refused, longer.state().refused) == (7, 7)
    assert longer.next(0) == Lease(4, 2, 0, 5)
    assert (longer.begun, Leases.resumed(state, 1, [{}]).begun) == (3, 2)


@settings(deadline=None)
@given(some.integers(1, 10**7), some.integers(1, 512), some.integers(1, 200), some.integers(1, 50))
def test_a_lease_is_whole_mini_batches_a_push_at_least_and_a_small_part_of_the_epoch(
    examples: int, batch: int, replicas: int, n_push: int
) -> None:
    size = lease_size(examples, batch, replicas, n_push)
    assert size % batch == 0
    assert n_push <= size // batch <= max(n_push, 32)
    if n_push == 1 and examples >= 8 * replicas * batch:
        assert -(-examples // size) >= 8 * replicas


PLENTY = 1 << 60


@settings(deadline=None)
@given(some.integers(0, 300), some.integers(1, 300))
def test_warmstart_begins_with_one_replica_and_doubles_them_as_the_examples_double(warmstart: int, count: int) -> None:
    release = Release(warmstart, 0)
    moments = [max(0, warmstart * factor + shift) for factor in (0, 1, 2, 3, 4, 8, 16, 512) for shift in (-1, 0, 1)]
    released = [release.released(settled, PLENTY, count) for settled in sorted(moments)]
    assert released == sorted(released)
    assert released[0] == (1 if warmstart else count)
    assert released[-1] == count
    if warmstart:
        assert release.released(warmstart - 1, PLENTY, count) == 1
        for doubling in range(6):
            assert release.released(warmstart << doubling, PLENTY, count) == min(count, 2 << doubling)


@settings(deadline=None)
@given(some.integers(1, 300), some.integers(1, 300), some.integers(0, 100_000))
def test_the_cooldown_withdraws_replicas_as_warmstart_released_them(cooldown: int, count: int, left: int) -> None:
    assert Release(0, cooldown).released(PLENTY, left, count) == Release(cooldown, 0).released(left, PLENTY, count)
    assert Release(0, cooldown).released(PLENTY, 0, count) == 1


def test_a_single_replica_is_never_held_back() -> None:
    assert {Release(100, 100).released(settled, 300 - settled, 1) for settled in range(300)} == {1}


def test_a_job_resumed_past_its_warmstart_releases_everybody_at_once() -> None:
    assert Release(100, 0).released(10_000, PLENTY, 64) == 64


def test_failures_stop_the_job_only_when_nothing_is_settled_in_between() -> None:
    patient = Failures(limit=3)
    assert not any(patient.died(settled) for settled in range(1, 50))
    hopeless = Failures(limit=3)
    assert [hopeless.died(7) for _ in range(5)] == [False, False, False, True, True]
    assert not hopeless.died(8)
