# SPDX-License-Identifier: Apache-2.0
"""Laws of who computes which bundle; time is a number."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbelief.bundles import AHEAD, DEATHS, Batches, Bundle, Portions, cut_bundles


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 40))
def test_bundles_cover_the_data_once_in_whole_micro_batches(examples: int, micro_batch: int, count: int) -> None:
    bundles = cut_bundles(examples, micro_batch, count)
    assert [index for bundle in bundles for index in range(bundle.start, bundle.stop)] == list(range(examples))
    assert all(bundle.examples > 0 and bundle.start % micro_batch == 0 for bundle in bundles)
    assert len(bundles) <= count


def makespan(speeds: list[float], bundles: int, *, backups: bool) -> tuple[float, Portions]:
    """When a batch is complete, if replica i computes one example in speeds[i] seconds, after one batch to learn it."""
    portions = Portions(cut_bundles(bundles * 10, 10, bundles), len(speeds), backups=backups)
    clock = begun = 0.0
    for _ in range(2):
        portions.begin(Batches(len(portions.bundles)).batch(0))
        begun = clock
        queues: list[list[Bundle]] = [[] for _ in speeds]
        running: list[tuple[float, int]] = []

        def offer(now: float, queues: list[list[Bundle]] = queues, running: list[tuple[float, int]] = running) -> None:
            for replica, speed in enumerate(speeds):
                while (bundle := portions.next(replica, now)) is not None:
                    queues[replica].append(bundle)
                    if len(queues[replica]) == 1:
                        heapq.heappush(running, (now + bundle.examples * speed, replica))

        offer(clock)
        while not portions.complete:
            clock, replica = heapq.heappop(running)
            portions.finish(replica, queues[replica].pop(0).index, 0.0, clock)
            if queues[replica]:
                heapq.heappush(running, (clock + queues[replica][0].examples * speeds[replica], replica))
            offer(clock)
    return clock - begun, portions


@pytest.mark.parametrize("replicas", [2, 4, 16])
def test_with_one_replica_slowed_four_times_a_batch_ends_within_1_3_of_the_ideal(replicas: int) -> None:
    speeds = [4.0] + [1.0] * (replicas - 1)
    bundles = 8 * replicas
    ideal = bundles * 10 / sum(1 / speed for speed in speeds)
    static = bundles * 10 / replicas * 4.0
    shared, portions = makespan(speeds, bundles, backups=True)
    assert shared <= 1.3 * ideal
    assert static > 2 * ideal
    assert portions.backed_up > 0


def test_without_backups_nobody_is_given_what_another_has() -> None:
    _, portions = makespan([4.0, 1.0, 1.0], 24, backups=False)
    assert portions.backed_up == 0


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 40), st.randoms(use_true_random=False))
def test_every_bundle_of_a_batch_is_done_once_whatever_dies(replicas: int, count: int, chance: random.Random) -> None:
    portions = Portions(cut_bundles(count * 3, 3, count), replicas)
    deaths = 0
    for batch in range(3):
        portions.begin(Batches(len(portions.bundles)).batch(0))
        hands: list[list[Bundle]] = [[] for _ in range(replicas)]
        losses: dict[int, float] = {}
        now = 0.0
        for _ in range(20_000):
            if portions.complete:
                break
            now += chance.random()
            replica = chance.randrange(replicas)
            if chance.random() < 0.05 and deaths < DEATHS - 1:
                assert portions.lose(replica) is None
                hands[replica], deaths = [], deaths + 1
            elif hands[replica] and chance.random() < 0.6:
                bundle = hands[replica].pop(0)
                loss = float(bundle.index * 1000 + chance.randrange(1000) + batch)
                losses.setdefault(bundle.index, loss)
                portions.finish(replica, bundle.index, loss, now)
            elif (bundle_ := portions.next(replica, now)) is not None:
                hands[replica].append(bundle_)
                assert len(hands[replica]) <= AHEAD
        assert portions.complete
        assert set(losses) == {bundle.index for bundle in portions.bundles}
        assert portions.mean_loss() == pytest.approx(sum(losses.values()) / (count * 3))


def test_a_replica_works_through_consecutive_bundles_and_keeps_them_from_batch_to_batch() -> None:
    portions = Portions(cut_bundles(64, 1, 32), 4)
    seen = []
    for _ in range(2):
        portions.begin(Batches(len(portions.bundles)).batch(0))
        order = []
        for step in range(8):
            for replica in range(4):
                bundle = portions.next(replica, float(step))
                assert bundle is not None
                portions.finish(replica, bundle.index, 0.0, float(step))
                order.append((replica, bundle.index))
        seen.append(order)
    assert seen[0] == seen[1]
    for replica in range(4):
        own = [index for owner, index in seen[0] if owner == replica]
        assert own == list(range(own[0], own[0] + 8))


def test_a_bundle_with_which_replicas_keep_dying_is_to_blame() -> None:
    portions = Portions(cut_bundles(8, 1, 8), 2)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    blamed = []
    for life in range(DEATHS):
        bundle = portions.next(0, float(life))
        assert bundle is not None
        assert bundle.index == 0
        blamed.append(portions.lose(0))
    assert blamed == [None] * (DEATHS - 1) + [Bundle(0, 0, 1)]


def test_neither_a_bundle_that_was_finished_since_is_to_blame_nor_one_that_was_not_begun() -> None:
    portions = Portions(cut_bundles(8, 1, 8), 1)
    for _ in range(2 * DEATHS):
        portions.begin(Batches(len(portions.bundles)).batch(0))
        assert [portions.next(0, 0.0), portions.next(0, 0.0)] == [Bundle(0, 0, 1), Bundle(1, 1, 2)]
        assert portions.lose(0) is None
        assert portions.next(0, 1.0) == Bundle(0, 0, 1)
        portions.finish(0, 0, 0.0, 2.0)


def test_what_dies_with_a_copy_is_not_handed_out_again_while_another_has_it() -> None:
    portions = Portions([Bundle(0, 0, 10)], 2)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert portions.next(0, 0.0) == portions.next(1, 5.0) == Bundle(0, 0, 10)
    portions.lose(1)
    assert portions.next(0, 6.0) is None
    portions.lose(0)
    assert portions.next(0, 7.0) == Bundle(0, 0, 10)


def test_no_third_has_a_bundle_and_what_is_done_is_not_handed_out_when_the_holder_of_a_copy_dies() -> None:
    portions = Portions([Bundle(0, 0, 10)], 3)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert portions.next(0, 0.0) == portions.next(1, 5.0) == Bundle(0, 0, 10)
    assert portions.next(2, 50.0) is None
    assert portions.backed_up == 1
    portions.finish(0, 0, 5.0, 51.0)
    portions.lose(1)
    assert [portions.next(replica, 52.0) for replica in range(3)] == [None] * 3


def test_who_has_something_to_compute_is_given_no_copy() -> None:
    portions = Portions(cut_bundles(20, 10, 2), 2)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert (portions.next(0, 0.0), portions.next(1, 0.0)) == (Bundle(0, 0, 10), Bundle(1, 10, 20))
    assert portions.next(1, 9.0) is None
    portions.finish(1, 1, 0.0, 10.0)
    assert portions.next(1, 30.0) == Bundle(0, 0, 10)


def test_of_what_is_done_no_copy_is_given_though_somebody_still_computes_it() -> None:
    portions = Portions(cut_bundles(20, 10, 2), 3)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert (portions.next(0, 0.0), portions.next(1, 0.0)) == (Bundle(0, 0, 10), Bundle(1, 10, 20))
    assert portions.next(2, 5.0) == Bundle(0, 0, 10)
    portions.finish(2, 0, 0.0, 6.0)
    assert portions.next(2, 7.0) == Bundle(1, 10, 20)


def test_who_would_take_longer_than_the_holder_is_given_no_copy() -> None:
    portions = Portions(cut_bundles(40, 10, 4), 2)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert portions.next(0, 0.0) == Bundle(0, 0, 10)
    for now, bundle in ((0.0, Bundle(2, 20, 30)), (10.0, Bundle(3, 30, 40))):  # a second for an example
        assert portions.next(1, now) == bundle
        portions.finish(1, bundle.index, 0.0, now + 10.0)
    assert portions.next(1, 20.0) == Bundle(1, 10, 20)
    portions.finish(0, 0, 0.0, 100.0)  # ten seconds
    assert portions.next(0, 100.0) is None, "it is expected to take the other one 70 more seconds"
    assert portions.next(0, 150.0) == Bundle(1, 10, 20), "and now 120"


def test_a_bundle_takes_as_long_as_from_its_turn_whenever_the_next_one_was_handed_out() -> None:
    portions = Portions(cut_bundles(30, 10, 3), 1)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    portions.next(0, 0.0)
    portions.next(0, 8.0)
    portions.finish(0, 0, 0.0, 10.0)
    assert portions._hands[0].seconds_per_example == 1.0
    portions.finish(0, 1, 0.0, 40.0)
    assert portions._hands[0].seconds_per_example == 3.0


def test_a_late_copy_changes_nothing() -> None:
    portions = Portions([Bundle(0, 0, 10)], 2)
    portions.begin(Batches(len(portions.bundles)).batch(0))
    assert portions.next(0, 0.0) is not None
    portions.finish(0, 0, 5.0, 1.0)
    portions.finish(1, 0, 7.0, 2.0)
    assert portions.complete
    assert portions.mean_loss() == 0.5
