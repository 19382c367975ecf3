# SPDX-License-Identifier: Apache-2.0
"""Who computes which bundle of a full batch: dynamic shares and backup copies (paper, section 4.2). Pure decisions.

    examples   |---------------------- the data, in its own order ----------------------|
    bundles    |--0--|--1--|--2--|--3--|--4--|--5--|--6--|--7--|--8--|--9--|-10--|-11--|   fixed for the whole run
    at home    |------ replica 0 ------|------ replica 1 ------|------ replica 2 ------|

A bundle is what is handed out, summed by one replica, pushed, copied and counted. A replica works through its own
consecutive ones, then through what others have not begun. When nothing is left to hand out, an idle replica is given a
copy of the bundle in somebody's hands that is expected to take longest. The first copy counts.
"""

import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

import msgspec

BUNDLES_PER_REPLICA = 8
DETERMINISTIC_BUNDLES = 64
"""Whatever the number of replicas: what is summed first must not depend on it."""
COPIES = 2
"""How many replicas may have one bundle in hand."""
AHEAD = 2
"""Bundles that one replica may have in hand: the one that it computes, and the next."""
DEATHS = 3
"""Replicas that die one after another with the same bundle in hand, after which the bundle is to blame."""


class Bundle(msgspec.Struct, array_like=True, frozen=True):
    """Examples [start, stop) of the data."""

    index: int
    start: int
    stop: int

    @property
    def examples(self) -> int:
        """Examples in the bundle."""
        return self.stop - self.start


def cut_bundles(examples: int, micro_batch: int, count: int) -> list[Bundle]:
    """At most `count` bundles of about equal size, each of whole micro-batches but for the last one."""
    micro_batches = -(-examples // micro_batch)
    count = min(micro_batches, count)
    edges = [min(examples, micro_batches * index // count * micro_batch) for index in range(count + 1)]
    return [Bundle(index, edges[index], edges[index + 1]) for index in range(count)]


class Batch(msgspec.Struct, frozen=True):
    """The bundles of one batch, in ascending order, and where in that order those are that it shares."""

    bundles: tuple[int, ...]
    before: frozenset[int] = frozenset()
    """Positions of those that the batch before had, too."""
    after: frozenset[int] = frozenset()
    """Positions of those that the next one will have, too."""

    def place(self, bundle: int) -> tuple[int, bool, bool]:
        """The position of the bundle of this index, and whether the batches before and after this one have it, too."""
        position = self.bundles.index(bundle)
        return position, position in self.before, position in self.after


@dataclass(frozen=True)
class Batches:
    """Which bundles are in which batch: all in every one, or a few new ones and some of the batch before.

        batch 0   |--- new ---|==after==|
        batch 1               |==before=|--- new ---|==after==|
        batch 2                                     |==before=|--- new ---|==after==|

    New ones come in the order of a permutation that the seed gives every pass over the data (Berahas et al., 2016).
    """

    count: int
    """Bundles of the data."""
    size: int | None = None
    """Bundles in a batch; None for all."""
    shared: int = 0
    """Of them, those that the next batch has, too."""
    seed: int = 0

    def batch(self, number: int) -> Batch:
        """Batch `number`, from 0; it depends on nothing else."""
        if self.size is None:
            return Batch(tuple(range(self.count)))
        fresh = self._new(number)
        before = self._new(number - 1)[-self.shared :] if number else ()
        order = sorted({*before, *fresh})
        after = fresh[-self.shared :]
        return Batch(
            tuple(order), frozenset(map(order.index, before)), frozenset(map(order.index, after))
        )  # fmt: skip

    def _new(self, number: int) -> tuple[int, ...]:
        """The bundles that come in with a batch: all but the shared ones are new to it, in the first one all."""
        assert self.size is not None
        each = self.size - self.shared
        return tuple(self._place(place) for place in range(number * each, number * each + each))

    def _place(self, place: int) -> int:
        passed, index = divmod(place, self.count)
        return _order(self.count, f"{self.seed} {passed}")[index]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: str) -> list[int]:
    """The order in which new bundles come in one pass; a batch and the one before it are mostly of one or two."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass
class Hand:
    """What one replica has in hand: bundles in the order in which it computes them."""

    bundles: list[Bundle] = field(default_factory=list)
    since: float = 0.0
    """When it began the first of them."""
    seconds_per_example: float | None = None
    """Of the latest bundle that it finished."""


@final
class Portions:
    """The ledger of one batch after another: a bundle is to be handed out, in hand, or done. `now` is in seconds."""

    def __init__(self, bundles: Sequence[Bundle], replicas: int, *, backups: bool = True) -> None:
        self.bundles, self._backups = list(bundles), backups
        self._hands = [Hand() for _ in range(replicas)]
        self._open: set[int] = set()
        """Bundles that nobody has been given."""
        self._done: dict[int, float] = {}
        """Bundle -> its loss, summed over its examples."""
        self._deaths: dict[int, int] = {}
        self.batch = Batch(())
        """The one under way."""
        self.backed_up = 0
        """Copies handed out, over the whole run."""

    def begin(self, batch: Batch) -> None:
        """Begin another batch; what is in hand belongs to the last one."""
        self.batch = batch
        self._open, self._done = set(batch.bundles), {}
        for hand in self._hands:
            hand.bundles = []

    @property
    def complete(self) -> bool:
        """Whether every bundle of the batch is done."""
        return len(self._done) == len(self.batch.bundles)

    @property
    def done(self) -> int:
        """How many bundles of the batch are done."""
        return len(self._done)

    @property
    def examples_done(self) -> int:
        """Examples of the bundles that are done."""
        return sum(self.bundles[index].examples for index in self._done)

    @property
    def examples(self) -> int:
        """Examples in the batch."""
        return self.examples_at(range(len(self.batch.bundles)))

    def examples_at(self, positions: Iterable[int]) -> int:
        """Examples of the bundles at these positions of the batch."""
        return sum(self.bundles[self.batch.bundles[position]].examples for position in positions)

    def mean_loss(self, positions: Iterable[int] | None = None) -> float:
        """The mean loss over the examples of a complete batch, or at these positions, whoever computed what."""
        chosen = list(range(len(self.batch.bundles)) if positions is None else positions)
        return math.fsum(self._done[self.batch.bundles[place]] for place in chosen) / self.examples_at(chosen)

    def next(self, replica: int, now: float) -> Bundle | None:
        """A bundle for the replica, or nothing for now."""
        hand = self._hands[replica]
        if len(hand.bundles) >= AHEAD:
            return None
        index = self._unbegun(replica)
        if index is None and not hand.bundles:
            index = self._copy(replica, now)
        if index is None:
            return None
        self._open.discard(index)
        if not hand.bundles:
            hand.since = now
        hand.bundles.append(self.bundles[index])
        return self.bundles[index]

    def _unbegun(self, replica: int) -> int | None:
        """Its own next one; else the last one of whoever has most left."""
        if not self._open:
            return None
        own = [index for index in self._open if self._home(index) == replica]
        if own:
            return min(own)
        left: dict[int, int] = {}
        for index in self._open:
            left[self._home(index)] = left.get(self._home(index), 0) + 1
        busiest = max(left, key=lambda other: (left[other], -other))
        return max(index for index in self._open if self._home(index) == busiest)

    def _home(self, index: int) -> int:
        return index * len(self._hands) // len(self.bundles)

    def _copy(self, replica: int, now: float) -> int | None:
        """What is expected to take longest, where this replica would be sooner."""
        if not self._backups:
            return None
        own = self._hands[replica].seconds_per_example or self._usual()
        worth: dict[int, float] = {}
        held: dict[int, int] = {}
        for hand in self._hands:
            wait = 0.0
            for position, bundle in enumerate(hand.bundles):
                held[bundle.index] = held.get(bundle.index, 0) + 1
                needs = bundle.examples * (hand.seconds_per_example or self._usual())
                spent = now - hand.since if position == 0 else 0.0
                # One that is overdue is expected to take as long again as it is late.
                wait += abs(needs - spent)
                gain = wait - bundle.examples * own
                if gain > 0 and bundle.index not in self._done:
                    worth[bundle.index] = min(gain, worth.get(bundle.index, gain))
        free = [index for index in worth if held[index] < COPIES]
        if not free:
            return None
        self.backed_up += 1
        return max(free, key=lambda index: (worth[index], -index))

    def _usual(self) -> float:
        """Seconds per example of the replicas that have finished something, else nothing to go by."""
        known = [hand.seconds_per_example for hand in self._hands if hand.seconds_per_example is not None]
        return sum(known) / len(known) if known else 0.0

    def finish(self, replica: int, index: int, loss_sum: float, now: float) -> None:
        """The replica's contribution for this bundle of the batch is with every shard; the first copy's loss counts."""
        hand = self._hands[replica]
        if hand.bundles and hand.bundles[0].index == index:
            bundle = hand.bundles.pop(0)
            hand.seconds_per_example = (now - hand.since) / bundle.examples
            hand.since = now
        self._open.discard(index)
        self._done.setdefault(index, loss_sum)
        self._deaths.pop(index, None)

    def lose(self, replica: int) -> Bundle | None:
        """A replica died: what it had in hand goes to others. The bundle to blame, if one is by now."""
        lost, self._hands[replica] = self._hands[replica].bundles, Hand()
        for bundle in lost:
            if bundle.index not in self._done and not any(bundle in hand.bundles for hand in self._hands):
                self._open.add(bundle.index)
        for bundle in lost[:1]:
            self._deaths[bundle.index] = self._deaths.get(bundle.index, 0) + 1
            if self._deaths[bundle.index] >= DEATHS:
                return bundle
        return None
