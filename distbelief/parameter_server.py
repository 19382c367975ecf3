# SPDX-License-Identifier: Apache-2.0
"""The parameter server: shards that store and update, and one partition's view of all of them (paper, section 4.1).

    partition k of a replica            shard m of M
      push(stamp, gradient[k ∩ m])     ->    once per (replica, incarnation, sequence):
                                               rule.apply(gradient);  version += 1
                                       <-    version, staleness
      fetch(replica, k, parameters[k ∩ m]) ->  copy of one version, never a torn one
                                       <-    version
    exchange(stamp, gradient, parameters)  a push and the fetch behind it in one call

A shard is a span of the flat vector. It holds a section for every partition that computes on some of it, mostly one.
It answers one call at a time, so updates exclude each other and fetches see whole versions without a lock. Sections
and shards know nothing of each other: they may stand at different versions, as in the paper.

Sandblaster (section 4.2) keeps other vectors there, and the coordinator orders the operations:

    replica                                 shard                                             coordinator
      trial(version, t, x[k ∩ m])      ->     x + t d
      contribute(evaluation, bundle, g)->     once per (evaluation, bundle): sum += g
                                              inner products of all vectors             <-      seal(evaluation, trial)
                                              x += t d;  keep the pair;  next d         <-      step(version, ..., step)
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, final

import msgspec
import torch

from distbelief.batch_section import BatchSection, Extent, Keeping, Mark
from distbelief.channel.base import Future, Out, Remote, exported, rounded
from distbelief.engine.base import UNTIL_LOST_SECONDS, Home
from distbelief.engine.insistent import All, Insistent
from distbelief.errors import Behind, ChannelError, DeadlineExceeded, NotReady, PeerLost, ProtocolError
from distbelief.files import path_of
from distbelief.lbfgs import Evaluate, Step
from distbelief.parameters import Layout, Span
from distbelief.sealed import Sealed
from distbelief.section import Applied, Awaited, Offer, Section, ShardStatus, Stamp
from distbelief.shard_file import ShardFile
from distbelief.update_rule import UpdateRule

S = TypeVar("S", Section, BatchSection)


def shard_name(index: int) -> str:
    """The role name of shard `index`."""
    return f"shard/{index}"


@final
class ParameterServerShard:
    """One shard: the owner of one span of the flat parameter vector.

    Memory: that of its sections. Over shared memory a gradient is read where the replica accrued it; over TCP there
    are as many staging buffers here as bodies are under way at once.
    """

    def __init__(self, home: Home, span: Span, layout: Layout, keeping: UpdateRule | Keeping) -> None:
        torch.set_num_threads(1)
        self._home, self._span = home, span
        self._cut = len(layout.partitions) > 1
        self._sections: dict[int, Section | BatchSection] = {
            partition: BatchSection(part, layout, keeping)
            if isinstance(keeping, Keeping)
            else Section(home, part, layout, keeping)
            for partition, own in enumerate(layout.partitions)
            if len(part := own.overlap(span))
        }

    def _section(self, partition: int, kind: type[S]) -> S:
        found = self._sections.get(partition)
        if not isinstance(found, kind):
            held = f"shard {self._span.start}..{self._span.stop}"
            raise ProtocolError(f"{held} keeps no {kind.__name__} for partition {partition}")
        return found

    def _batch_sections(self) -> list[BatchSection]:
        return [self._section(partition, BatchSection) for partition in self._sections]

    # both algorithms

    @exported
    def initialise(self, partition: int, values: torch.Tensor) -> None:
        """Set the parameters of a section, once; `values` has its shape (n,)."""
        self._sections[partition].initialise(values)

    @exported
    def read(self, partition: int, parameters: Out) -> int:
        """Copy a section's parameters, as they are, into the caller's buffer of shape (n,); answers their version.

        For those who will not push: who evaluates or keeps the result. Raises NotReady.
        """
        if partition not in self._sections:
            raise ProtocolError(f"shard {self._span.start}..{self._span.stop} stores nothing for partition {partition}")
        return self._sections[partition].read(parameters)

    @exported
    def status(self) -> ShardStatus:
        """Counters of every section, for the coordinator."""
        sections = [section.status() for section in self._sections.values()]
        return ShardStatus(sections, self._home.incarnation, dict(self._home.strangers))

    @exported
    def snapshot(
        self, path: str, slots: tuple[int, ...], durable: bool, version: int
    ) -> Future[list[ShardFile]]:  # fmt: skip
        """Write every section to files beginning with `path`; checksums, and the disk, are waited for beside the shard.

        Of Sandblaster's history the pairs in `slots` are written. Fails with OSError's text when the disk is full.
        Raises NotReady, also where a section has not come to `version`.
        """
        if any(section.status().version < version for section in self._sections.values()):
            raise NotReady(f"shard {self._span.start}..{self._span.stop} has not come to step {version}")
        with self._naming_itself():
            seals = [
                section.write(
                    path_of(f"{path}-{partition}.safetensors" if self._cut else f"{path}.safetensors"), slots, durable
                )
                for partition, section in self._sections.items()
            ]

        def seal_all() -> list[ShardFile]:
            with self._naming_itself():
                return [file for seal in seals for file in seal()]

        return self._home.background(seal_all)

    @contextlib.contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """A disk that is full may be that of this host alone: what goes to a store is written there first."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{self._home.name} at {self._home.address}: {error}") from error

    @exported
    def restore(
        self, folder: str, files: list[ShardFile], replaced: dict[int, int], own: bool, offers: Awaited | None
    ) -> list[int]:  # fmt: skip
        """Take the span from a checkpoint's files, cut anyhow; a Downpour section that has its parameters keeps them.

        Of a checkpoint that is not this algorithm's `own` only the parameters are taken. `replaced` (replica ->
        incarnation) are refused as by `fence`, before a push can come in between: the shard has forgotten what it was
        told in its earlier life. `offers` as in `Section.restore`. Answers the version of each
        section there. Raises CheckpointError.
        """
        versions = []
        for section in self._sections.values():
            if isinstance(section, Section):
                section.refuse(replaced)
            versions.append(section.restore(folder, files, own=own, offers=offers))
        return versions

    # Downpour

    @exported
    @rounded
    def fetch(self, replica: int, partition: int, parameters: Out) -> int:
        """`read` for a replica: the numbers may be rounded on their way. Raises NotReady."""
        return self._section(partition, Section).fetch(replica, parameters)

    @exported
    @rounded
    def push(self, stamp: Stamp, gradient: torch.Tensor) -> Applied:
        """Apply a gradient of a section's shape (n,) once, however often it is sent. Raises Fenced, NotReady."""
        return self._section(stamp.partition, Section).push(stamp, gradient)

    @exported
    @rounded
    def exchange(self, stamp: Stamp, gradient: torch.Tensor, parameters: Out) -> int:
        """A `push` and the `fetch` of the same replica behind it; both of the section's shape (n,).

        The answer is the version of what was fetched. Raises Fenced, NotReady; then nothing was fetched.
        """
        return self._section(stamp.partition, Section).exchange(stamp, gradient, parameters)

    @exported
    def offer(self, offer: Offer, parameters: torch.Tensor) -> None:
        """What a replica has fetched of a section, shape (n,), which came back from a checkpoint. Raises Fenced."""
        self._section(offer.partition, Section).offer(offer, parameters)

    @exported
    def fence(self, replica: int, incarnation: int) -> list[dict[int, int]]:
        """Refuse pushes of this incarnation and older ones from now on.

        Answers, per section, (lease -> position up to which its examples are applied here) for the leases of its latest
        pushes. Raises NotReady.
        """
        return [self._section(partition, Section).fence(replica, incarnation) for partition in self._sections]

    # Sandblaster

    @exported
    def trial(self, partition: int, version: int, t: float, parameters: Out) -> None:
        """Write the trial at `t` after step `version` into the caller's buffer of shape (n,). Raises NotReady."""
        self._section(partition, BatchSection).trial(version, t, parameters)

    @exported
    def contribute(self, partition: int, mark: Mark, gradient: torch.Tensor) -> bool:
        """Add the gradient of one bundle, once per (evaluation, position). Raises NotReady."""
        return self._section(partition, BatchSection).contribute(mark, gradient)

    @exported
    def seal(self, evaluation: int, trial: Evaluate, extent: Extent) -> list[Sealed]:
        """The inner products of a complete evaluation, per section. Raises NotReady when bundles are missing."""
        return [section.seal(evaluation, trial, extent) for section in self._batch_sections()]

    @exported
    def step(self, version: int, evaluation: int, step: Step) -> None:
        """Carry out step number `version`, once, perhaps to the trial of this evaluation. Raises NotReady."""
        for section in self._batch_sections():
            section.step(version, evaluation, step)

    @exported
    def gram(self, pairs: tuple[int, ...]) -> list[list[list[float]]]:
        """Every section's inner products, measured anew. Raises NotReady."""
        return [section.gram(pairs) for section in self._batch_sections()]


@final
class ParameterServer:
    """All shards as one partition sees them: fetch and push its whole flat vectors of shape (n,).

    `spans` are those of the shards, `own` that of the partition, on the line of all parameters. `replica` is the one
    that trains with what it fetches; those who only read have no number.
    """

    def __init__(
        self, home: Home, spans: Sequence[Span], own: Span, replica: int | None = None, partition: int = 0
    ) -> None:  # fmt: skip
        self._home, self._replica, self._partition = home, replica, partition
        self.held: Callable[[int], tuple[Offer, torch.Tensor]] | None = None
        """What a replica has of the shard at this position of `routes`: asked when that came back from a checkpoint."""
        self._offered: dict[int, tuple[str, Future[None]]] = {}
        """To which life of it that was offered, in its own words, and whether it arrived."""
        self.routes = [
            (home.find(shard_name(index), ParameterServerShard, UNTIL_LOST_SECONDS), part.within(own))
            for index, span in enumerate(spans)
            if len(part := span.overlap(own))
        ]

    def initialise(self, values: torch.Tensor) -> Future[list[None]]:
        """Start setting the initial parameters; sections that have some keep them."""
        return self._all(
            partial(shard.call, ParameterServerShard.initialise, self._partition, _part(values, part))
            for shard, part in self.routes
        )

    def read(self, into: torch.Tensor) -> Future[list[int]]:
        """Start copying the parameters, as they are, into `into`; the answer is one version per shard."""
        return self._all(
            partial(shard.call, ParameterServerShard.read, self._partition, _part(into, part))
            for shard, part in self.routes
        )

    def fetch(self, into: torch.Tensor) -> Future[list[int]]:
        """Start copying the parameters into `into` to train with them; the answer is one version per shard."""
        assert self._replica is not None, "who only reads does not fetch"
        return self._all(
            partial(shard.call, ParameterServerShard.fetch, self._replica, self._partition, _part(into, part))
            for shard, part in self.routes
        )

    def push(self, stamps: Sequence[Stamp], gradient: torch.Tensor) -> Future[list[Applied]]:
        """Start pushing `gradient`, a stamp per shard; the memory stays untouched until it is done."""
        return self._all(
            Sending(stamp, partial(_push, shard, _part(gradient, part)))
            for (shard, part), stamp in zip(self.routes, stamps, strict=True)
        )

    def exchange(self, stamps: Sequence[Stamp], gradient: torch.Tensor, into: torch.Tensor) -> Future[list[int]]:
        """Start a push and the fetch behind it, one call a shard; the answer is one version per shard."""
        return self._all(
            Sending(stamp, partial(_exchange, shard, _part(gradient, part), _part(into, part)))
            for (shard, part), stamp in zip(self.routes, stamps, strict=True)
        )

    def trial(self, version: int, t: float, into: torch.Tensor) -> Future[list[None]]:
        """Start writing the trial at `t` after step `version` into `into`."""
        return self._all(
            partial(shard.call, ParameterServerShard.trial, self._partition, version, t, _part(into, part))
            for shard, part in self.routes
        )

    def contribute(self, mark: Mark, gradient: torch.Tensor) -> Future[list[bool]]:
        """Start adding the gradient of one bundle; the memory stays untouched until it is done."""
        return self._all(
            partial(shard.call, ParameterServerShard.contribute, self._partition, mark, _part(gradient, part))
            for shard, part in self.routes
        )

    def _all(self, calls: Iterable[Callable[[], Future[Any]]]) -> All[Any]:
        return All(
            self._home, [Insistent(self._home, call, partial(self._lost, at, call)) for at, call in enumerate(calls)]
        )

    def _lost(self, position: int, call: Callable[[], Future[Any]], error: ChannelError) -> None:
        """Before a call is made again: say so where it is a push, and offer what is here to a shard that is Behind."""
        if isinstance(call, Sending) and not isinstance(error, NotReady):
            call.again()
        if self.held is None or not isinstance(error, Behind):
            return
        life, arrived = self._offered.get(position, ("", None))
        if life == str(error) and (arrived is None or not arrived.done() or _answered(arrived)):
            return
        (shard, part), (offer, parameters) = self.routes[position], self.held(position)
        # The repeated call comes behind this one, so nobody waits for its answer.
        self._offered[position] = str(error), shard.call(ParameterServerShard.offer, offer, _part(parameters, part))


@final
class Sending:
    """A push that is sent until it is answered; its stamp says when an earlier try may have been applied."""

    def __init__(self, stamp: Stamp, send: Callable[[Stamp], Future[Any]]) -> None:
        self._stamp, self._send = stamp, send

    def __call__(self) -> Future[Any]:
        """Send it."""
        return self._send(self._stamp)

    def again(self) -> None:
        """It was sent, and nobody knows what became of it."""
        self._stamp = msgspec.structs.replace(self._stamp, again=True)


def _push(shard: Remote[ParameterServerShard], gradient: torch.Tensor, stamp: Stamp) -> Future[Applied]:
    return shard.call(ParameterServerShard.push, stamp, gradient)


def _exchange(
    shard: Remote[ParameterServerShard], gradient: torch.Tensor, into: torch.Tensor, stamp: Stamp
) -> Future[int]:  # fmt: skip
    return shard.call(ParameterServerShard.exchange, stamp, gradient, into)


def _answered(future: Future[None]) -> bool:
    """Whether a future that is done was answered, if not as one would like."""
    try:
        future.result()
    except (PeerLost, DeadlineExceeded):
        return False
    except ChannelError:
        return True
    return True


def _part(vector: torch.Tensor, part: slice) -> torch.Tensor:
    """A shard's part of a vector: the vector itself where there is one shard."""
    return vector if part.stop - part.start == vector.numel() else vector[part]
