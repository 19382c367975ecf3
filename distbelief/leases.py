# SPDX-License-Identifier: Apache-2.0
"""Who works on which examples: leases of a seeded epoch permutation. Pure decisions, no I/O.

The epochs follow each other on one line of positions; a lease is a run of positions within one epoch. A replica holds
a lease until every shard has acknowledged the pushes that carry it; positions settle from the lease's start onwards.
What a dead replica had not settled goes back and is handed out first.

    positions   |-------- epoch 0 --------|-------- epoch 1 --------|
    leases      |--0--|--1--|--2--|--3--|4|--5--|--6--|...
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import msgspec

MINI_BATCHES_PER_LEASE = 32
LEASES_PER_REPLICA_AND_EPOCH = 8
ALONE_SHARE = 0.02
"""Share of the job's examples that one replica trains on alone, first and last; measured on the speech task."""
ALONE_MINI_BATCHES = 100
"""No fewer mini-batches than these, in jobs so small that a share would be nothing, up to a tenth of the job."""


class Lease(msgspec.Struct, array_like=True, frozen=True):
    """Positions [start, stop) of one epoch's permutation."""

    identifier: int
    epoch: int
    start: int
    stop: int

    @property
    def examples(self) -> int:
        """Examples in the lease."""
        return self.stop - self.start


class LeaseState(msgspec.Struct, frozen=True):
    """What a checkpoint keeps of the leases."""

    examples_per_epoch: int
    lease_examples: int
    issued: int
    unsettled: tuple[Lease, ...]
    repeated: int
    refused: int = 0
    alive: dict[int, int] | None = None
    """Replica -> incarnation whose pushes the shards' files tell of and nothing above does. What older ones had pushed
    when they died is settled, or counted as repeated. None, in older checkpoints, for all of them."""


@dataclass(frozen=True)
class Release:
    """How many replicas train when: one first, then the others in stages (paper, section 4.1), one at the end again.

    Staleness grows with the number of replicas, and what it harms is a step that is large against the progress made so
    far: so the number doubles whenever the examples seen have doubled. Towards the end it halves in the same way, so
    that the last steps are made on fresh parameters.
    """

    warmstart: int = 0
    """Examples after which the second replica is released; twice as many for the third and fourth, and so on."""
    cooldown: int = 0
    """Examples that the first replica is given at the end, when the others get no more."""

    @classmethod
    def planned(
        cls, total_examples: int, batch_size: int, replicas: int, warmstart: int | None, cooldown: int | None
    ) -> "Release":
        """Of a job of so many examples in all; what is None is derived from it."""
        if replicas == 1:
            return cls()
        derived = max(int(ALONE_SHARE * total_examples), min(ALONE_MINI_BATCHES * batch_size, total_examples // 10))
        return cls(derived if warmstart is None else warmstart, derived if cooldown is None else cooldown)

    def released(self, settled_examples: int, examples_to_come: int, replicas: int) -> int:
        """How many replicas may be given work; `examples_to_come` have not been handed out yet."""
        allowed = replicas
        if self.warmstart:
            allowed = min(allowed, 1 << (settled_examples // self.warmstart).bit_length())
        if self.cooldown:
            allowed = min(allowed, 1 << (examples_to_come // self.cooldown).bit_length())
        return allowed


def lease_size(examples: int, batch_size: int, replicas: int, n_push: int) -> int:
    """Examples per lease: whole mini-batches, at most 32, about 8 leases per replica and epoch, no less than a push."""
    mini_batches = -(-examples // batch_size) // (replicas * LEASES_PER_REPLICA_AND_EPOCH)
    return batch_size * max(1, n_push, min(MINI_BATCHES_PER_LEASE, mini_batches))


@final
class Leases:
    """The ledger of one job: every position is unissued, held by one replica, returned, or settled."""

    def __init__(self, examples_per_epoch: int, lease_examples: int, epochs: int) -> None:
        self.examples_per_epoch, self.lease_examples, self.epochs = examples_per_epoch, lease_examples, epochs
        self.leases_per_epoch = -(-examples_per_epoch // lease_examples)
        self.repeated = 0
        """Examples that some shard applied twice because a replica died between its shards' acknowledgements."""
        self.refused = 0
        """Examples, settled like others, whose gradient was not finite."""
        self._issued = 0
        self._returned: list[Lease] = []
        self._held: dict[int, tuple[int, Lease]] = {}
        """Lease identifier -> (replica, what is left of it)."""

    @property
    def total_examples(self) -> int:
        """Examples of the whole job."""
        return self.examples_per_epoch * self.epochs

    @property
    def settled_examples(self) -> int:
        """Examples settled so far."""
        return self._issued_examples - sum(lease.examples for lease in self.unsettled())

    @property
    def examples_to_come(self) -> int:
        """Examples that have never been handed out."""
        return self.total_examples - self._issued_examples

    @property
    def _issued_examples(self) -> int:
        epoch, index = divmod(self._issued, self.leases_per_epoch)
        return epoch * self.examples_per_epoch + index * self.lease_examples

    @property
    def finished(self) -> bool:
        """Whether every example of every epoch is settled."""
        return self._issued >= self.leases_per_epoch * self.epochs and not self._held and not self._returned

    @property
    def begun(self) -> int:
        """Epochs of which examples have been handed out."""
        return -(-self._issued // self.leases_per_epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the oldest lease that is not settled; `epochs` at the end."""
        return min([lease.epoch for lease in self.unsettled()], default=self._issued // self.leases_per_epoch)

    def unsettled(self) -> list[Lease]:
        """What has been issued and is not settled."""
        return [lease for _, lease in self._held.values()] + self._returned

    def next(self, replica: int) -> Lease | None:
        """A lease for the replica; None when there is nothing to hand out now."""
        if self._returned:
            lease = self._returned.pop(0)
        elif self._issued < self.leases_per_epoch * self.epochs:
            lease = self._lease(self._issued)
            self._issued += 1
        else:
            return None
        self._held[lease.identifier] = (replica, lease)
        return lease

    def _lease(self, identifier: int) -> Lease:
        epoch, index = divmod(identifier, self.leases_per_epoch)
        start = index * self.lease_examples
        return Lease(identifier, epoch, start, min(start + self.lease_examples, self.examples_per_epoch))

    def settle(self, replica: int, identifier: int, position: int) -> None:
        """Every shard has acknowledged the lease's examples before `position`; late reports are ignored."""
        holder, lease = self._held.get(identifier, (None, None))
        if holder != replica or lease is None or position <= lease.start:
            return
        if position >= lease.stop:
            del self._held[identifier]
        else:
            self._held[identifier] = (replica, Lease(identifier, lease.epoch, position, lease.stop))

    def give_back(self, replica: int) -> list[Lease]:
        """A replica ends cleanly: what it has not settled goes back."""
        gone = [lease for holder, lease in self._held.values() if holder == replica]
        for lease in gone:
            del self._held[lease.identifier]
        self._returned = sorted([*self._returned, *gone], key=lambda lease: lease.identifier)
        return gone

    def lose(self, replica: int, applied: Iterable[Mapping[int, int]]) -> "Loss":
        """A replica died; `applied` tells, per shard, up to which position each of its leases was applied.

        What every shard applied is settled. What only some applied is repeated.
        """
        shards = list(applied)
        before = self.repeated
        for holder, lease in list(self._held.values()):
            if holder == replica:
                reached = [max(lease.start, shard.get(lease.identifier, 0)) for shard in shards] or [lease.start]
                self.repeated += max(reached) - min(reached)
                self.settle(replica, lease.identifier, min(reached))
        gone = self.give_back(replica)
        return Loss(len(gone), sum(lease.examples for lease in gone), self.repeated - before)

    def state(self) -> LeaseState:
        """For a checkpoint. Take it before the shards' snapshots: what is settled now is in all of them."""
        return LeaseState(
            self.examples_per_epoch, self.lease_examples, self._issued, tuple(self.unsettled()), self.repeated,
            self.refused,
        )  # fmt: skip

    @classmethod
    def resumed(cls, state: LeaseState, epochs: int, applied: Iterable[Mapping[int, int]]) -> "Leases":
        """Continue from a checkpoint; `applied` tells, per shard file, up to which position a lease is in it.

        Shards may hold examples of leases that were issued while they wrote their files, after the state was taken.
        """
        leases, shards = cls(state.examples_per_epoch, state.lease_examples, epochs), list(applied)
        later = [identifier + 1 for shard in shards for identifier in shard]
        leases._issued, leases.repeated, leases.refused = max([state.issued, *later]), state.repeated, state.refused
        unsettled = [*state.unsettled, *map(leases._lease, range(state.issued, leases._issued))]
        leases._held = {lease.identifier: (-1, lease) for lease in unsettled}
        leases.lose(-1, shards)
        return leases


@dataclass(frozen=True)
class Loss:
    """What a death cost."""

    leases: int
    examples: int
    repeated: int


@final
@dataclass
class Failures:
    """Decides when replacing the dead has stopped making sense."""

    limit: int
    """Deaths without a settled example in between after which the job stops."""
    _count: int = 0
    _settled: int = -1

    def died(self, settled_examples: int) -> bool:
        """Count a death; True when the job should stop."""
        if settled_examples > self._settled:
            self._settled, self._count = settled_examples, 0
        self._count += 1
        return self._count > self.limit
