# SPDX-License-Identifier: Apache-2.0
"""A section: what one shard stores for one partition, and what it remembers of the pushes into it.

A push counts once per (replica, incarnation, sequence), a repeat gets the recorded answer, and what was pushed by an
incarnation that has been replaced is refused. The vectors are "parameters" and the update rule's state.
"""

import math
from collections.abc import Callable, Sequence
from typing import final

import msgspec
import torch

from distbelief import shard_file
from distbelief.engine.base import Home
from distbelief.errors import Behind, Fenced, NotReady, ProtocolError
from distbelief.files import AnyPath, path_of
from distbelief.parameters import Layout, Span
from distbelief.shard_file import PushRecord, ShardFile, ShardState
from distbelief.update_rule import UpdateRule

LEASES_REMEMBERED = 64
OFFERS_SECONDS = 0.25
"""After the first offer, so long a section that came back from a checkpoint waits for those of other replicas: twice
the longest pause before a call is made again, and more."""
SQUARES = ("sum", "z", "z_max")
"""Vectors of Adagrad and AdaptiveRevision that grow by the square of each gradient."""


class Stamp(msgspec.Struct, array_like=True, frozen=True):
    """What a push says of itself."""

    replica: int
    incarnation: int
    sequence: int
    """Counts the pushes of this replica; the same on all shards."""
    base_version: int
    """The version of this shard at which the gradient was computed."""
    examples: int
    """Examples in the gradient."""
    portions: tuple[tuple[int, int], ...]
    """(lease, position): the examples of the lease before that position are covered by this push or earlier ones."""
    mini_batches: int = 1
    """Mini-batches accrued in the gradient."""
    partition: int = 0
    """Which partition of the replica computed it."""
    again: bool = False
    """Whether it was sent before, to a shard that did not answer and may have applied it."""


class Awaited(msgspec.Struct, array_like=True, frozen=True):
    """The offers that a section which comes back from a checkpoint waits for."""

    replicas: tuple[int, ...]
    """The replicas that have something to offer, at most."""
    seconds: float
    """How long another one may take, when a replica has nothing to offer."""


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """What a replica says of parameters that it has fetched, to a shard that has come back from a checkpoint."""

    replica: int
    incarnation: int
    version: int
    """Of this shard, when they were fetched; -1 where none have been."""
    examples: int = 0
    """In a push of this replica."""
    mini_batches: int = 0
    """Likewise."""
    partition: int = 0
    """Which partition of the replica computes with them."""


class Applied(msgspec.Struct, array_like=True, frozen=True):
    """The answer to a push."""

    version: int
    """Pushes applied to the shard, this one included."""
    staleness: int
    """Pushes applied between the fetch of the base version and this push."""


class SectionStatus(msgspec.Struct, array_like=True, frozen=True):
    """What the coordinator asks of a shard now and then, for each of its sections."""

    ready: bool
    """Whether it has its parameters."""
    version: int
    mini_batches: int
    lost_updates: int
    staleness: dict[int, int]
    regained: int = 0
    """Updates since the checkpoint that this life has had back from replicas."""


class ShardStatus(msgspec.Struct, array_like=True, frozen=True):
    """What a shard says of itself."""

    sections: list[SectionStatus]
    incarnation: int
    strangers: dict[str, int]
    """Callers that this incarnation refused, by what they did."""


@final
class Section:
    """The part of a shard that one partition computes on: a span of the line with its vectors, versions and records.

    Memory: the span times (1 + vectors of the rule's state).
    """

    def __init__(self, home: Home, span: Span, layout: Layout, rule: UpdateRule) -> None:
        self._home, self.span, self._length = home, span, len(span)
        self._parameters = torch.zeros(len(span), dtype=layout.dtype)
        self._rule = rule.bind(self._parameters, layout.segments(span), span)
        self._state = ShardState(start=span.start, stop=span.stop)
        self._answers: dict[int, Applied] = {}
        self._fenced: dict[int, int] = {}
        self.ready = self._restored = False
        """Whether it has its parameters."""
        self._restored_version = 0
        self._offers_until: float | None = None
        """While it waits for newer parameters, until when: for ever before the first offer."""
        self._awaited = Awaited((), 0.0)
        self._offered: set[int] = set()
        """The replicas that have offered what they have, or said that they have nothing."""
        self._regained = self._uncounted = 0
        """Updates taken in this life, and those of them whose squares are not in the rule's sums."""

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReady(f"shard {self.span.start}..{self.span.stop} waits for its parameters")

    def _check_length(self, vector: torch.Tensor) -> None:
        if vector.numel() != self._length:
            raise ProtocolError(
                f"a vector of {vector.numel()} numbers for the section {self.span.start}..{self.span.stop}, which has "
                f"{self._length}"
            )

    def _check_offers(self) -> None:
        if self._offers_until is None:
            return
        if self._home.now() < self._offers_until:
            raise Behind(
                f"shard {self.span.start}..{self.span.stop} incarnation {self._home.incarnation} came back from a "
                f"checkpoint at version {self._restored_version}"
            )
        self._offers_until = None

    def initialise(self, values: torch.Tensor) -> None:
        """Set the parameters, once; `values` has shape (len(span),)."""
        if self.ready:
            return
        self._parameters.copy_(values)
        self.ready = True

    def _check_fence(self, replica: int, incarnation: int) -> None:
        record = self._state.replicas.get(replica)
        if incarnation < max(0 if record is None else record.incarnation, self._fenced.get(replica, 0)):
            raise Fenced(f"replica {replica} incarnation {incarnation} has been replaced")

    def offer(self, offer: Offer, parameters: torch.Tensor) -> None:
        """After a restart, take parameters of shape (len(span),) that are newer than those here.

        The state of the rule stays that of the checkpoint. Raises Fenced, NotReady.
        """
        self._check_ready()
        self._check_length(parameters)
        self._check_fence(offer.replica, offer.incarnation)
        if self._offers_until is None:
            return
        self._offered.add(offer.replica)
        seconds = OFFERS_SECONDS if offer.version >= 0 else self._awaited.seconds
        if self._offered.issuperset(self._awaited.replicas):
            seconds = 0.0
        self._offers_until = min(self._offers_until, self._home.now() + seconds)
        state = self._state
        if (newer := offer.version - state.version) > 0:
            self._home.end_loans(self._parameters)
            self._parameters.copy_(parameters)
            state.version = state.taken = offer.version
            state.examples += newer * offer.examples
            state.mini_batches += newer * offer.mini_batches
            state.regained, state.heard = state.regained + newer, []
            self._regained, self._uncounted = self._regained + newer, self._uncounted + newer

    def _count_squares(self, gradient: torch.Tensor) -> None:
        """Add the squares of the updates taken to Adagrad's sums, as if all had been of this gradient.

        With the sums of the checkpoint, perhaps zeros, the next steps would be those of the beginning.
        """
        vectors = {name: vector.clone() for name, vector in self._rule.vectors().items()}
        if grown := [vectors[name] for name in SQUARES if name in vectors]:
            for vector in grown:
                vector.addcmul_(gradient, gradient, value=self._uncounted)
            self._rule.load(vectors, self._rule.scalars())
        self._uncounted = 0

    def push(self, stamp: Stamp, gradient: torch.Tensor, *, answered_there: bool = False) -> Applied:
        """Apply a gradient of shape (len(span),) once, however often it is sent. Raises Fenced, NotReady, Behind.

        `answered_there` says that an earlier life of this shard may have written its answer over the gradient.
        """
        self._check_ready()
        self._check_length(gradient)
        state = self._state
        self._check_fence(stamp.replica, stamp.incarnation)
        self._check_offers()
        record = state.replicas.get(stamp.replica)
        if record is None or record.incarnation < stamp.incarnation:
            record = state.replicas[stamp.replica] = PushRecord(stamp.incarnation, 0)
        if stamp.sequence <= record.sequence:
            return self._answers.get(stamp.replica, Applied(state.version, 0))
        if self._restored:
            # Sequences run without gaps, so a gap is what the restart from an older checkpoint lost of this replica.
            state.lost_updates += stamp.sequence - record.sequence - 1
        unheard = state.taken >= 0 and stamp.replica not in state.heard
        if unheard:
            state.heard.append(stamp.replica)
        overwritten = answered_there and stamp.replica not in self._answers
        if stamp.again and (unheard or overwritten):
            # An earlier life may have applied it; then it is in the parameters that were taken, or a gradient no more.
            state.lost_updates += 1
            answer = Applied(state.version, 0)
        else:
            answer = self._apply(stamp, gradient)
        record.sequence = stamp.sequence
        for lease, position in stamp.portions:
            record.portions[lease] = position
        while len(record.portions) > LEASES_REMEMBERED:
            del record.portions[next(iter(record.portions))]
        self._answers[stamp.replica] = answer
        return answer

    def _apply(self, stamp: Stamp, gradient: torch.Tensor) -> Applied:
        state = self._state
        answer = Applied(state.version + 1, max(0, state.version - stamp.base_version))
        if self._uncounted:
            self._count_squares(gradient)
        self._home.end_loans(self._parameters)
        self._rule.apply(
            gradient, version=state.version, base_version=stamp.base_version, examples=state.examples,
            reader=stamp.replica,
        )  # fmt: skip
        state.version = answer.version
        state.examples += stamp.examples
        state.mini_batches += stamp.mini_batches
        state.staleness[answer.staleness] = state.staleness.get(answer.staleness, 0) + 1
        return answer

    def read(self, parameters: torch.Tensor) -> int:
        """Copy the parameters into the caller's buffer of shape (len(span),); the answer is their version."""
        self._check_ready()
        self._home.lend(parameters, self._parameters)
        return self._state.version

    def fetch(self, replica: int, parameters: torch.Tensor) -> int:
        """`read` for a replica, whose next push will be of a gradient at these parameters."""
        self._check_length(parameters)
        self._check_offers()
        version = self.read(parameters)
        self._rule.fetched(replica, version)
        return version

    def exchange(self, stamp: Stamp, gradient: torch.Tensor, parameters: torch.Tensor) -> int:
        """A push and the fetch of the same replica behind it; the answer is the version of what was fetched.

        `parameters` may lie where `gradient` does.
        """
        self._check_length(parameters)
        self.push(stamp, gradient, answered_there=True)
        return self.fetch(stamp.replica, parameters)

    def fence(self, replica: int, incarnation: int) -> dict[int, int]:
        """Refuse pushes of this incarnation and older ones from now on.

        Answers (lease -> position up to which its examples are applied here) for the leases of its latest pushes.
        """
        self._check_ready()
        self._fenced[replica] = max(incarnation + 1, self._fenced.get(replica, 0))
        self._rule.forget(replica)
        self._answers.pop(replica, None)
        record = self._state.replicas.get(replica)
        return dict(record.portions) if record is not None and record.incarnation == incarnation else {}

    def status(self) -> SectionStatus:
        """Counters, for the coordinator."""
        state = self._state
        lost = max(0, state.lost_updates - state.regained)
        return SectionStatus(self.ready, state.version, state.mini_batches, lost, dict(state.staleness), self._regained)

    def write(self, file: AnyPath, slots: Sequence[int], durable: bool) -> Callable[[], list[ShardFile]]:
        """Write everything to a file, at one version; what is returned seals it, and may run beside the shard.

        There are no slots here; `durable` forces to disk. Raises OSError.
        """
        self._check_ready()
        self._state.scalars = self._rule.scalars()
        draft = shard_file.write(file, {"parameters": self._parameters, **self._rule.vectors()}, self._state)
        state = ShardState(start=self.span.start, stop=self.span.stop)
        return lambda: [shard_file.seal(draft, state, durable=durable)]

    def refuse(self, replaced: dict[int, int]) -> None:
        """Refuse pushes of these (replica -> incarnation) and older ones, as `fence` does."""
        for replica, incarnation in replaced.items():
            self._fenced[replica] = max(incarnation + 1, self._fenced.get(replica, 0))

    def restore(self, folder: str, files: list[ShardFile], *, own: bool, offers: Awaited | None) -> int:
        """Take the span from a checkpoint's files, cut anyhow, unless this section has its parameters already.

        From those of another algorithm only the parameters are taken. Where `offers` are awaited, calls of replicas
        raise Behind until these have come, or one of them a while ago. Answers the version of the checkpoint. Raises
        CheckpointError.
        """
        if self.ready:
            return self._restored_version
        vectors, states = shard_file.read_shard(path_of(folder), files, self.span, own=own)
        self._parameters.copy_(vectors.pop("parameters"))
        if own:
            newest = max(states, key=lambda state: state.version)
            self._rule.load(vectors, newest.scalars)
            same_cut = (newest.start, newest.stop) == (self.span.start, self.span.stop)
            self._state = ShardState(
                start=self.span.start, stop=self.span.stop, version=newest.version, examples=newest.examples,
                mini_batches=newest.mini_batches, lost_updates=newest.lost_updates, regained=newest.regained,
                replicas=newest.replicas if same_cut else {}, staleness=newest.staleness,
                # Where the job is started, no push of those that replicas send again can be in what was taken.
                taken=newest.taken if same_cut and offers is not None else -1, heard=newest.heard,
            )  # fmt: skip
        self.ready, self._restored = True, own or offers is not None
        self._restored_version = self._state.version
        if offers is not None:
            self._awaited, self._offers_until = offers, math.inf
        return self._restored_version
