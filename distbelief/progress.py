# SPDX-License-Identifier: Apache-2.0
"""How a job gets on: sums since the last progress event, turned into rates. Told what happened; no clock of its own."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import final

from distbelief.events import Progress, staleness_quantile
from distbelief.leases import Leases
from distbelief.parameter_server import shard_name
from distbelief.section import SectionStatus, ShardStatus
from distbelief.training_loss import Losses


@final
class Counters:
    """What the shards last said of their sections, and what restarts of shards have lost."""

    def __init__(self) -> None:
        self._statuses: dict[int, list[SectionStatus]] = {}
        self._strangers: dict[tuple[str, int], Mapping[str, int]] = {}
        """(role, incarnation) -> callers that it refused."""
        self._lost: dict[tuple[int, int], int] = {}
        """(shard, section) -> pushes known to have been applied to it that its restarts have lost."""
        self._highest: dict[tuple[int, int], int] = {}
        """(shard, section) -> the highest version that it is known to have had since it was last restored."""
        self._lives: dict[int, int] = {}
        """Shard -> the incarnation that said what is known of it."""
        self._lost_before = 0
        self._told_before: dict[tuple[int, int], int] | None = None
        """(shard, section) -> losses before the run was resumed that the section tells of again; None if it was not."""

    def go_on(self, lost_updates: int) -> None:
        """Count on from a checkpoint, before which so many pushes had been lost."""
        self._lost_before, self._told_before = lost_updates, {}

    def update(self, statuses: Iterable[ShardStatus]) -> None:
        """Take in what all shards say, in their order; of one without parameters, what it said before stands."""
        for shard, status in enumerate(statuses):
            self.refused(shard_name(shard), status.incarnation, status.strangers)
            if not all(section.ready for section in status.sections):
                continue
            if status.incarnation != self._lives.get(shard, status.incarnation):
                for section, before in enumerate(self._statuses.get(shard, ())):
                    self._lost[shard, section] = self._lost.get((shard, section), 0) - before.regained
            self._lives[shard], self._statuses[shard] = status.incarnation, status.sections
            for section, now in enumerate(status.sections):
                if self._told_before is not None:
                    self._told_before.setdefault((shard, section), now.lost_updates)
                self._highest[shard, section] = max(self._highest.get((shard, section), 0), now.version)

    def refused(self, role: str, incarnation: int, strangers: Mapping[str, int]) -> None:
        """Take in how many callers an incarnation of a role has refused so far, by what they did."""
        self._strangers[role, incarnation] = dict(strangers)

    @property
    def strangers(self) -> dict[str, int]:
        """Callers refused by the shards and the coordinator, by what they did."""
        counts: Counter[str] = Counter()
        for strangers in self._strangers.values():
            counts.update(strangers)
        return dict(counts)

    def restored(self, shard: int, versions: Sequence[int]) -> None:
        """A shard has gone back to these versions of its sections; what it regains, its statuses tell."""
        for section, version in enumerate(versions):
            known = self._highest.get((shard, section), version)
            self._lost[shard, section] = self._lost.get((shard, section), 0) + max(0, known - version)
            self._highest[shard, section] = version

    def _sections(self) -> Iterable[SectionStatus]:
        return (section for sections in self._statuses.values() for section in sections)

    @property
    def told(self) -> bool:
        """Whether any shard has said something of its sections."""
        return bool(self._statuses)

    @property
    def pushes(self) -> int:
        """Pushes applied by the section that has applied most."""
        return max((section.version for section in self._sections()), default=0)

    @property
    def mini_batches(self) -> int:
        """Mini-batches in the pushes applied by the section that has applied most of them."""
        return max((section.mini_batches for section in self._sections()), default=0)

    @property
    def staleness(self) -> dict[int, int]:
        """Staleness -> pushes, over all sections of all shards."""
        counts: dict[int, int] = {}
        for section in self._sections():
            for staleness, count in section.staleness.items():
                counts[staleness] = counts.get(staleness, 0) + count
        return counts

    @property
    def lost_updates(self) -> int:
        """Acknowledged pushes that restarts have lost, over all sections."""
        before = self._told_before or {}
        return max(self._lost_before, sum(before.values())) + sum(
            max(
                0,
                status.lost_updates - before.get((shard, section), 0),
                self._lost.get((shard, section), 0) - status.regained,
            )
            for shard, sections in self._statuses.items()
            for section, status in enumerate(sections)
        )


@final
class Meter:
    """Counts between two progress events; `now` is in the engine's seconds."""

    def __init__(self, now: float, examples: int) -> None:
        self._since, self._examples = now, examples
        self._pushes: int | None = None
        """None before the shards have told; of a resumed job they have applied many in earlier starts."""
        self._losses = Losses()

    def count(self, losses: Losses) -> None:
        """Take in the training losses of some mini-batches."""
        self._losses = self._losses.plus(losses)

    def progress(self, now: float, leases: Leases, counters: Counters, alive: int) -> Progress:
        """The event of this moment; counting starts anew."""
        elapsed, examples = now - self._since, leases.settled_examples
        pushes, staleness = counters.pushes, counters.staleness
        applied = 0 if self._pushes is None else max(0, pushes - self._pushes)  # a shard that died may have had most
        event = Progress(
            epoch=min(leases.epoch, leases.epochs - 1),
            examples=examples,
            total_examples=leases.total_examples,
            loss=self._losses.mean if self._losses.examples else None,
            examples_per_second=(examples - self._examples) / elapsed,
            pushes_per_second=applied / elapsed,
            pushes=pushes,
            mini_batches=counters.mini_batches,
            lost_updates=counters.lost_updates,
            staleness_median=staleness_quantile(staleness, 0.5),
            staleness_p95=staleness_quantile(staleness, 0.95),
            replicas_alive=alive,
        )
        self._since, self._examples, self._pushes = now, examples, pushes if counters.told else None
        self._losses = Losses()
        return event
