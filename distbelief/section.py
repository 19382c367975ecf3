# SPDX-License-Identifier: Apache-2.0
"""A section: what one shard stores for one partition, and what it remembers of the pushes into it.

A push counts once per (replica, incarnation, sequence), a repeat gets the recorded answer, and what was pushed by an
incarnation that has been replaced is refused. The vectors are "parameters" and the update rule's state.
"""

from collections.abc import Callable, Sequence
from typing import final

import msgspec
import torch

from distbelief import shard_file
from distbelief.engine.base import Home
from distbelief.errors import Fenced, NotReady, ProtocolError
from distbelief.files import AnyPath, path_of
from distbelief.parameters import Layout, Span
from distbelief.shard_file import PushRecord, ShardFile, ShardState
from distbelief.update_rule import UpdateRule

LEASES_REMEMBERED = 64


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

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReady(f"shard {self.span.start}..{self.span.stop} waits for its parameters")

    def _check_length(self, vector: torch.Tensor) -> None:
        if vector.numel() != self._length:
            raise ProtocolError(
                f"a vector of {vector.numel()} numbers for the section {self.span.start}..{self.span.stop}, which has "
                f"{self._length}"
            )

    def initialise(self, values: torch.Tensor) -> None:
        """Set the parameters, once; `values` has shape (len(span),)."""
        if self.ready:
            return
        self._parameters.copy_(values)
        self.ready = True

    def push(self, stamp: Stamp, gradient: torch.Tensor) -> Applied:
        """Apply a gradient of shape (len(span),) once, however often it is sent. Raises Fenced, NotReady."""
        self._check_ready()
        self._check_length(gradient)
        state = self._state
        record = state.replicas.get(stamp.replica)
        known = 0 if record is None else record.incarnation
        if stamp.incarnation < max(known, self._fenced.get(stamp.replica, 0)):
            raise Fenced(f"replica {stamp.replica} incarnation {stamp.incarnation} has been replaced")
        if record is None or record.incarnation < stamp.incarnation:
            record = state.replicas[stamp.replica] = PushRecord(stamp.incarnation, 0)
        if stamp.sequence <= record.sequence:
            return self._answers.get(stamp.replica, Applied(state.version, 0))
        if self._restored:
            # Sequences run without gaps, so a gap is what the restart from an older checkpoint lost of this replica.
            state.lost_updates += stamp.sequence - record.sequence - 1
        answer = Applied(state.version + 1, max(0, state.version - stamp.base_version))
        self._home.end_loans(self._parameters)
        self._rule.apply(
            gradient, version=state.version, base_version=stamp.base_version, examples=state.examples,
            reader=stamp.replica,
        )  # fmt: skip
        state.version = answer.version
        state.examples += stamp.examples
        state.mini_batches += stamp.mini_batches
        state.staleness[answer.staleness] = state.staleness.get(answer.staleness, 0) + 1
        record.sequence = stamp.sequence
        for lease, position in stamp.portions:
            record.portions[lease] = position
        while len(record.portions) > LEASES_REMEMBERED:
            del record.portions[next(iter(record.portions))]
        self._answers[stamp.replica] = answer
        return answer

    def read(self, parameters: torch.Tensor) -> int:
        """Copy the parameters into the caller's buffer of shape (len(span),); the answer is their version."""
        self._check_ready()
        self._home.lend(parameters, self._parameters)
        return self._state.version

    def fetch(self, replica: int, parameters: torch.Tensor) -> int:
        """`read` for a replica, whose next push will be of a gradient at these parameters."""
        self._check_length(parameters)
        version = self.read(parameters)
        self._rule.fetched(replica, version)
        return version

    def exchange(self, stamp: Stamp, gradient: torch.Tensor, parameters: torch.Tensor) -> int:
        """A push and the fetch of the same replica behind it; the answer is the version of what was fetched.

        `parameters` may lie where `gradient` does.
        """
        self._check_length(parameters)
        self.push(stamp, gradient)
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
        return SectionStatus(self.ready, state.version, state.mini_batches, state.lost_updates, dict(state.staleness))

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

    def restore(self, folder: str, files: list[ShardFile], *, own: bool) -> int:
        """Take the span from a checkpoint's files, cut anyhow, unless this section has its parameters already.

        From those of another algorithm only the parameters are taken. Answers the version. Raises CheckpointError.
        """
        if self.ready:
            return self._state.version
        vectors, states = shard_file.read_shard(path_of(folder), files, self.span, own=own)
        self._parameters.copy_(vectors.pop("parameters"))
        if not own:
            self.ready = True
            return self._state.version
        newest = max(states, key=lambda state: state.version)
        self._rule.load(vectors, newest.scalars)
        same_cut = (newest.start, newest.stop) == (self.span.start, self.span.stop)
        self._state = ShardState(
            start=self.span.start, stop=self.span.stop, version=newest.version, examples=newest.examples,
            mini_batches=newest.mini_batches, lost_updates=newest.lost_updates,
            replicas=newest.replicas if same_cut else {}, staleness=newest.staleness,
        )  # fmt: skip
        self._restored = self.ready = True
        return self._state.version
