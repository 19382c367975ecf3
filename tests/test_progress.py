# SPDX-License-Identifier: Apache-2.0
"""Laws of the numbers that a Downpour job tells of itself while it runs."""

from collections.abc import Sequence

import pytest
import torch

from distbelief.leases import Leases
from distbelief.progress import Counters, Meter
from distbelief.roster import Refusal, Report
from distbelief.section import SectionStatus, ShardStatus
from distbelief.tally import Tally
from distbelief.training_loss import Losses


def shard(*versions: int, ready: bool = True, staleness: dict[int, int] | None = None) -> ShardStatus:
    """What a shard says whose sections have applied so many pushes, each of two mini-batches."""
    sections = [SectionStatus(ready, version, 2 * version, 0, dict(staleness or {})) for version in versions]
    return ShardStatus(sections, 0, {})


def settled(examples: Sequence[int]) -> Leases:
    """A job of two epochs of 100 examples, of which these many are settled, lease by lease."""
    leases = Leases(100, 50, 2)
    for position in examples:
        lease = leases.next(0)
        assert lease is not None
        leases.settle(0, lease.identifier, lease.start + position)
    return leases


def test_rates_are_of_the_time_since_the_event_before_and_so_is_the_loss() -> None:
    meter, counters = Meter(10.0, 0), Counters()
    counters.update([shard(0, 0), shard(0)])
    meter.progress(11.0, settled([]), counters, 3)
    meter.count(Losses(2, 20, 60.0, 180.0))
    meter.count(Losses(1, 20, 20.0, 20.0))
    counters.update([shard(6, 5), shard(8, staleness={0: 7, 2: 1})])
    first = meter.progress(15.0, settled([40]), counters, 3)
    assert (first.examples, first.total_examples, first.epoch, first.replicas_alive) == (40, 200, 0, 3)
    assert (first.examples_per_second, first.pushes_per_second, first.loss) == (40 / 4, 8 / 4, 80 / 40)
    assert (first.pushes, first.mini_batches) == (8, 16)
    counters.update([shard(9, 9), shard(11)])
    second = meter.progress(17.0, settled([50, 50]), counters, 3)
    assert (second.examples_per_second, second.pushes_per_second, second.loss) == (60 / 2, 3 / 2, None)


def test_what_was_pushed_before_a_job_is_resumed_is_in_the_pushes_and_not_in_their_rate() -> None:
    meter, counters = Meter(0.0, 50), Counters()
    counters.go_on(0)
    leases = settled([50])
    assert meter.progress(1.0, leases, counters, 1).pushes_per_second == 0.0
    counters.update([shard(0, ready=False)])  # it is being given the checkpoint
    assert meter.progress(2.0, leases, counters, 1).pushes_per_second == 0.0
    counters.update([shard(5000)])
    told = meter.progress(3.0, leases, counters, 1)
    assert (told.pushes, told.pushes_per_second, told.examples_per_second) == (5000, 0.0, 0.0)
    counters.update([shard(5007)])
    assert meter.progress(4.0, leases, counters, 1).pushes_per_second == 7.0


def test_no_rate_is_below_zero_when_a_shard_goes_back_to_a_checkpoint() -> None:
    meter, counters = Meter(0.0, 0), Counters()
    rates = []
    for now, version in enumerate((0, 90, 20, 80), start=1):
        counters.update([shard(version)])
        rates.append(meter.progress(float(now), settled([]), counters, 1).pushes_per_second)
    assert rates == [0.0, 90.0, 0.0, 60.0]


def test_what_a_shard_has_lost_is_known_though_it_tells_of_itself_before_it_is_known_to_be_restored() -> None:
    counters = Counters()
    for version in (10, 4, 5):
        counters.update([shard(version)])
    counters.restored(0, [4])
    assert counters.lost_updates == 6


def test_the_epoch_that_is_told_is_the_last_one_when_all_are_over() -> None:
    assert Meter(0.0, 0).progress(1.0, settled([50, 50, 50, 50]), Counters(), 0).epoch == 1


def test_staleness_is_that_of_all_sections_of_all_shards() -> None:
    counters = Counters()
    counters.update([shard(3, 3, staleness={0: 1, 1: 2}), shard(3, staleness={1: 1, 4: 2})])
    assert counters.staleness == {0: 2, 1: 5, 4: 2}


@pytest.mark.parametrize("incarnation", [0, 1])
def test_who_was_refused_is_counted_once_an_incarnation_however_often_it_is_told(incarnation: int) -> None:
    counters = Counters()
    for seen in (1, 3):
        counters.update([ShardStatus([], 0, {"wrong token": seen})])
    counters.update([ShardStatus([], incarnation, {"wrong token": 4})])
    assert counters.strangers == {"wrong token": 4 + 3 * incarnation}


def test_a_report_holds_what_was_counted_since_the_one_before_and_the_slowest_mini_batch_ever() -> None:
    tally = Tally(0.0)
    for loss, examples, seconds in ((2.0, 16, 0.5), (4.0, 8, 0.25)):
        tally.count(torch.tensor(loss), examples, seconds)
    tally.settled, tally.refused = [(3, 16)], [Refusal(2, 8, "it is NaN")]
    losses = Losses(2, 24, 2.0 * 16 + 4.0 * 8, 4.0 * 16 + 16.0 * 8)
    assert tally.take(5, 1, 2.0) == Report(5, 1, ((3, 16),), losses, 0.5, (Refusal(2, 8, "it is NaN"),))
    assert (tally.sent, tally.mini_batch_seconds, tally.mini_batches_ever) == (2.0, 0.25, 2)
    assert tally.take(5, 1, 3.0) == Report(5, 1, (), Losses(0, 0, 0.0, 0.0), 0.5, ())


def life(incarnation: int, version: int, lost: int = 0, regained: int = 0) -> ShardStatus:
    """What a shard of one section says of itself."""
    return ShardStatus([SectionStatus(True, version, version, lost, {}, regained)], incarnation, {})


def test_what_each_death_of_a_shard_has_cost_is_lost_and_what_replicas_gave_back_is_not() -> None:
    counters = Counters()
    counters.update([life(0, 100)])
    counters.restored(0, [60])
    counters.update([life(1, 60)])
    assert counters.lost_updates == 40
    counters.update([life(1, 80, regained=15)])
    assert counters.lost_updates == 40 - 15
    counters.restored(0, [60])
    counters.update([life(2, 60)])
    assert counters.lost_updates == 40 - 15 + 20


def test_a_checkpoint_newer_than_what_was_heard_of_a_shard_makes_up_for_no_loss() -> None:
    counters = Counters()
    counters.update([life(0, 50)])
    counters.restored(0, [60])
    counters.update([life(1, 70)])
    counters.restored(0, [60])
    counters.update([life(2, 60)])
    assert counters.lost_updates == 10


@pytest.mark.parametrize(("kept", "told"), [(5, 5), (5, 0), (3, 5)])
def test_what_was_lost_before_a_resume_is_counted_once_whoever_tells_it(kept: int, told: int) -> None:
    """The manifest, and on the same cut the shards' files, which may know more."""
    counters = Counters()
    counters.go_on(kept)
    counters.update([life(3, 100, lost=told)])
    assert counters.lost_updates == 5
    counters.update([life(3, 120, lost=told + 2)])
    assert counters.lost_updates == 7
