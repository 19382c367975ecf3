# SPDX-License-Identifier: Apache-2.0
"""The parameter server: shards that store and update, and one replica's view of all of them (paper, section 4.1).

    replica                                  shard m of M
      push(stamp, gradient[span m])    ->    once per (replica, incarnation, sequence):
                                               rule.apply(gradient);  version += 1
                                       <-    version, staleness
      fetch(reader, parameters[span m])->    copy of one version, never a torn one
                                       <-    version

A shard is a span of the flat vector plus named vectors: "parameters" and the update rule's state. It answers one call
at a time, so updates exclude each other and fetches see whole versions without a lock. Shards know nothing of each
other: they may stand at different versions, as in the paper.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import msgspec
import torch

from distbelief import shard_file
from distbelief.channel.base import Future, Out, exported
from distbelief.engine.base import Home
from distbelief.errors import CheckpointError, DeadlineExceeded, Fenced, NotReady, PeerLost
from distbelief.parameters import Layout, Span
from distbelief.shard_file import ReplicaRecord, ShardFile, ShardState
from distbelief.update_rule import UpdateRule

T = TypeVar("T")

RETRY_SECONDS = 0.1
PATIENCE_SECONDS = 300.0
"""How long a replica waits for a shard that is being replaced before it ends with an error."""
LEASES_REMEMBERED = 64


def shard_name(index: int) -> str:
    """The role name of shard `index`."""
    return f"shard/{index}"


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


class Applied(msgspec.Struct, array_like=True, frozen=True):
    """The answer to a push."""

    version: int
    """Pushes applied to the shard, this one included."""
    staleness: int
    """Pushes applied between the fetch of the base version and this push."""


class ShardStatus(msgspec.Struct, array_like=True, frozen=True):
    """What the coordinator asks of a shard now and then."""

    version: int
    examples: int
    lost_updates: int
    staleness: dict[int, int]


@final
class ParameterServerShard:
    """One shard: the owner of one span of the flat parameter vector.

    Memory: the span times (1 + vectors of the rule's state). Over shared memory a gradient is read where the replica
    accrued it; over TCP each connected replica has one staging buffer here.
    """

    def __init__(self, home: Home, span: Span, layout: Layout, rule: UpdateRule) -> None:
        torch.set_num_threads(1)
        self._home, self._span = home, span
        self._parameters = torch.zeros(len(span), dtype=layout.dtype)
        self._rule = rule.bind(self._parameters, layout.segments(span), span)
        self._state = ShardState(start=span.start, stop=span.stop)
        self._answers: dict[int, Applied] = {}
        self._fenced: dict[int, int] = {}
        self._ready = self._restored = False

    def _check_ready(self) -> None:
        if not self._ready:
            raise NotReady(f"shard {self._span.start}..{self._span.stop} waits for its parameters")

    @exported
    def initialise(self, values: torch.Tensor) -> None:
        """Set the parameters; `values` has shape (len(span),)."""
        self._parameters.copy_(values)
        self._ready = True

    @exported
    def push(self, stamp: Stamp, gradient: torch.Tensor) -> Applied:
        """Apply a gradient of shape (len(span),) once, however often it is sent. Raises Fenced, NotReady."""
        self._check_ready()
        record = self._state.replicas.get(stamp.replica)
        known = 0 if record is None else record.incarnation
        if stamp.incarnation < max(known, self._fenced.get(stamp.replica, 0)):
            raise Fenced(f"replica {stamp.replica} incarnation {stamp.incarnation} has been replaced")
        if record is None or record.incarnation < stamp.incarnation:
            record = self._state.replicas[stamp.replica] = ReplicaRecord(stamp.incarnation, 0)
        if stamp.sequence <= record.sequence:
            return self._answers.get(stamp.replica, Applied(self._state.version, 0))
        if self._restored:
            # Sequences run without gaps, so a gap is what the restart from an older checkpoint lost of this replica.
            self._state.lost_updates += stamp.sequence - record.sequence - 1
        version, state = self._state.version, self._state
        staleness = max(0, version - stamp.base_version)
        self._rule.apply(
            gradient, version=version, base_version=stamp.base_version, examples=state.examples, reader=stamp.replica
        )
        state.version += 1
        state.examples += stamp.examples
        state.staleness[staleness] = state.staleness.get(staleness, 0) + 1
        record.sequence = stamp.sequence
        for lease, position in stamp.portions:
            record.portions[lease] = position
        while len(record.portions) > LEASES_REMEMBERED:
            del record.portions[next(iter(record.portions))]
        answer = self._answers[stamp.replica] = Applied(state.version, staleness)
        return answer

    @exported
    def fetch(self, reader: int, parameters: Out) -> int:
        """Copy the parameters into the caller's buffer of shape (len(span),); the answer is their version.

        `reader` is the replica's number; a negative one is somebody who will not push.
        """
        self._check_ready()
        parameters.copy_(self._parameters)
        if reader >= 0:
            self._rule.fetched(reader, self._state.version)
        return self._state.version

    @exported
    def fence(self, replica: int, incarnation: int) -> dict[int, int]:
        """Refuse pushes of this incarnation and older ones from now on.

        Answers (lease -> position up to which its examples are applied here) for the leases of its latest pushes.
        """
        self._check_ready()
        self._fenced[replica] = incarnation + 1
        self._rule.forget(replica)
        self._answers.pop(replica, None)
        record = self._state.replicas.get(replica)
        return dict(record.portions) if record is not None and record.incarnation == incarnation else {}

    @exported
    def status(self) -> ShardStatus:
        """Counters, for the coordinator."""
        state = self._state
        return ShardStatus(state.version, state.examples, state.lost_updates, dict(state.staleness))

    @exported
    def snapshot(self, path: str) -> Future[ShardFile]:
        """Write everything to a file, at one version; forcing it to disk happens beside the shard.

        Fails with OSError's text when the disk is full.
        """
        self._check_ready()
        file = Path(path)
        self._state.scalars = self._rule.scalars()
        shard_file.write(file, {"parameters": self._parameters, **self._rule.vectors()}, self._state)
        state = ShardState(start=self._span.start, stop=self._span.stop)
        return self._home.background(lambda: shard_file.seal(file, state))

    @exported
    def restore(self, folder: str, files: list[ShardFile]) -> int:
        """Take the span from a checkpoint's files, cut anyhow, unless this shard has its parameters already.

        Answers the version. Raises CheckpointError.
        """
        if self._ready:
            return self._state.version
        vectors = shard_file.read_span(Path(folder), files, self._span)
        own = [file for file in files if len(Span(file.start, file.stop).overlap(self._span))]
        states = [shard_file.read_state(Path(folder) / file.name) for file in own]
        if "parameters" not in vectors:
            raise CheckpointError(f"{folder} has no parameters in {', '.join(file.name for file in own)}")
        self._parameters.copy_(vectors.pop("parameters"))
        newest = max(states, key=lambda state: state.version)
        self._rule.load(vectors, newest.scalars)
        same_cut = (newest.start, newest.stop) == (self._span.start, self._span.stop)
        self._state = ShardState(
            start=self._span.start, stop=self._span.stop, version=newest.version, examples=newest.examples,
            lost_updates=newest.lost_updates, replicas=newest.replicas if same_cut else {},
            staleness=newest.staleness,
        )  # fmt: skip
        self._restored = self._ready = True
        return self._state.version


@final
class Insistent(Generic[T]):
    """A call that is made again until it is answered: for calls whose repetition is harmless."""

    def __init__(self, home: Home, make: Callable[[], Future[T]], patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._home, self._make = home, make
        self._until = home.now() + patience_seconds
        self._again = 0.0
        self._future: Future[T] | None = make()
        self._value: T
        self._error: Exception | None = None
        self._settled = False

    def done(self) -> bool:
        """Whether the answer is here; makes the call again when the peer was lost."""
        if self._settled:
            return True
        if self._future is None and self._home.now() >= self._again:
            self._future = self._make()
        if self._future is not None and self._future.done():
            self._take()
        return self._settled

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long."""
        until = self._home.now() + seconds
        while not self.done() and (left := until - self._home.now()) > 0:
            if self._future is None:
                self._home.sleep(min(left, max(0.0, self._again - self._home.now())))
            else:
                self._future.wait(left)
        return self._settled

    def result(self) -> T:
        """Wait for the answer. Raises what is no loss of the peer, and PeerLost when patience ends."""
        while not self._settled:
            self.wait(PATIENCE_SECONDS)
        if self._error is not None:
            raise self._error
        return self._value

    def _take(self) -> None:
        assert self._future is not None
        try:
            self._value = self._future.result()
            self._settled = True
        except (PeerLost, DeadlineExceeded, NotReady) as error:
            self._future, self._again = None, self._home.now() + RETRY_SECONDS
            if self._home.now() > self._until:
                self._error, self._settled = error, True
        except Exception as error:
            self._error, self._settled = error, True


@final
class All(Generic[T]):
    """The answers of several futures, in order."""

    def __init__(self, home: Home, futures: Sequence[Future[T]]) -> None:
        self._home, self._futures = home, futures

    def done(self) -> bool:
        """Whether all are done."""
        # Each is asked, since asking makes a lost call again.
        return all([future.done() for future in self._futures])  # noqa: C419

    def outstanding(self) -> list[int]:
        """The positions of those that are not done."""
        return [position for position, future in enumerate(self._futures) if not future.done()]

    def wait(self, seconds: float) -> bool:
        """Wait for all, at most so long."""
        until = self._home.now() + seconds
        return all([future.wait(max(0.0, until - self._home.now())) for future in self._futures])  # noqa: C419

    def result(self) -> list[T]:
        """Wait for all; raises the first error."""
        return [future.result() for future in self._futures]


@final
class ParameterServer:
    """All shards as one reader sees them: fetch and push whole flat vectors of shape (n,)."""

    def __init__(self, home: Home, spans: Sequence[Span], reader: int) -> None:
        self._home, self.spans, self._reader = home, tuple(spans), reader
        self._shards = [home.find(shard_name(index), ParameterServerShard) for index in range(len(spans))]

    def fetch(self, into: torch.Tensor) -> Future[list[int]]:
        """Start copying the parameters into `into`; the answer is one version per shard."""
        calls = [
            self._insist(shard.call, ParameterServerShard.fetch, self._reader, into[span.start : span.stop])
            for shard, span in zip(self._shards, self.spans, strict=True)
        ]
        return All(self._home, calls)

    def push(self, stamps: Sequence[Stamp], gradient: torch.Tensor) -> Future[list[Applied]]:
        """Start pushing `gradient`, a stamp per shard; the memory stays untouched until it is done."""
        calls = [
            self._insist(shard.call, ParameterServerShard.push, stamp, gradient[span.start : span.stop])
            for shard, span, stamp in zip(self._shards, self.spans, stamps, strict=True)
        ]
        return All(self._home, calls)

    def _insist(self, call: Callable[..., Future[Any]], *arguments: Any) -> Insistent[Any]:
        return Insistent(self._home, lambda: call(*arguments))
