# SPDX-License-Identifier: Apache-2.0
"""The parameter server: shards that store and update, and one partition's view of all of them (paper, section 4.1).

    partition k of a replica            shard m of M
      push(stamp, gradient[k ∩ m])     ->    once per (replica, incarnation, sequence):
                                               rule.apply(gradient);  version += 1
                                       <-    version, staleness
      fetch(reader, k, parameters[k ∩ m])->  copy of one version, never a torn one
                                       <-    version
    exchange(stamp, gradient, parameters)  a push and the fetch behind it in one call

A shard is a span of the flat vector. It holds a section for every partition that computes on some of it, mostly one.
It answers one call at a time, so updates exclude each other and fetches see whole versions without a lock. Sections
and shards know nothing of each other: they may stand at different versions, as in the paper.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from distbelief.channel.base import Future, Out, exported
from distbelief.engine.base import Home
from distbelief.engine.insistent import All, Insistent
from distbelief.errors import ProtocolError
from distbelief.parameters import Layout, Span
from distbelief.section import Applied, Section, SectionStatus, Stamp
from distbelief.shard_file import ShardFile
from distbelief.update_rule import UpdateRule


def shard_name(index: int) -> str:
    """The role name of shard `index`."""
    return f"shard/{index}"


@final
class ParameterServerShard:
    """One shard: the owner of one span of the flat parameter vector.

    Memory: that of its sections. Over shared memory a gradient is read where the replica accrued it; over TCP each
    connected partition has one staging buffer here.
    """

    def __init__(self, home: Home, span: Span, layout: Layout, rule: UpdateRule) -> None:
        torch.set_num_threads(1)
        self._home, self._span = home, span
        self._cut = len(layout.partitions) > 1
        self._sections = {
            partition: Section(part, layout, rule)
            for partition, own in enumerate(layout.partitions)
            if len(part := own.overlap(span))
        }

    def _section(self, partition: int) -> Section:
        if partition not in self._sections:
            held = f"shard {self._span.start}..{self._span.stop}"
            raise ProtocolError(f"{held} stores nothing for partition {partition}")
        return self._sections[partition]

    @exported
    def initialise(self, partition: int, values: torch.Tensor) -> None:
        """Set the parameters of a section, once; `values` has its shape (n,)."""
        self._section(partition).initialise(values)

    @exported
    def push(self, stamp: Stamp, gradient: torch.Tensor) -> Applied:
        """Apply a gradient of a section's shape (n,) once, however often it is sent. Raises Fenced, NotReady."""
        return self._section(stamp.partition).push(stamp, gradient)

    @exported
    def fetch(self, reader: int, partition: int, parameters: Out) -> int:
        """Copy a section's parameters into the caller's buffer of shape (n,); the answer is their version.

        `reader` is the replica's number; a negative one is somebody who will not push. Raises NotReady.
        """
        return self._section(partition).fetch(reader, parameters)

    @exported
    def exchange(self, stamp: Stamp, gradient: torch.Tensor, parameters: Out) -> int:
        """A `push` and the `fetch` of the same replica behind it; both of the section's shape (n,).

        The answer is the version of what was fetched. Raises Fenced, NotReady; then nothing was fetched.
        """
        return self._section(stamp.partition).exchange(stamp, gradient, parameters)

    @exported
    def fence(self, replica: int, incarnation: int) -> list[dict[int, int]]:
        """Refuse pushes of this incarnation and older ones from now on.

        Answers, per section, (lease -> position up to which its examples are applied here) for the leases of its latest
        pushes. Raises NotReady.
        """
        return [section.fence(replica, incarnation) for section in self._sections.values()]

    @exported
    def status(self) -> list[SectionStatus]:
        """Counters of every section, for the coordinator."""
        return [section.status() for section in self._sections.values()]

    @exported
    def snapshot(self, path: str) -> Future[list[ShardFile]]:
        """Write every section to a file beginning with `path`; forcing them to disk happens beside the shard.

        Fails with OSError's text when the disk is full. Raises NotReady.
        """
        seals = [
            section.write(Path(f"{path}-{partition}.safetensors" if self._cut else f"{path}.safetensors"))
            for partition, section in self._sections.items()
        ]
        return self._home.background(lambda: [seal() for seal in seals])

    @exported
    def restore(self, folder: str, files: list[ShardFile], replaced: dict[int, int]) -> list[int]:
        """Take the span from a checkpoint's files, cut anyhow; sections that have their parameters keep them.

        `replaced` (replica -> incarnation) are refused as by `fence`, before a push can come in between: the shard has
        forgotten what it was told in its earlier life. Answers each section's version. Raises CheckpointError.
        """
        return [section.restore(folder, files, replaced) for section in self._sections.values()]


@final
class ParameterServer:
    """All shards as one partition sees them: fetch and push its whole flat vectors of shape (n,).

    `spans` are those of the shards, `own` that of the partition, on the line of all parameters. `reader` as in `fetch`.
    """

    def __init__(self, home: Home, spans: Sequence[Span], own: Span, reader: int, partition: int = 0) -> None:
        self._home, self._reader, self._partition = home, reader, partition
        self.routes = [
            (home.find(shard_name(index), ParameterServerShard), part.within(own))
            for index, span in enumerate(spans)
            if len(part := span.overlap(own))
        ]

    def initialise(self, values: torch.Tensor) -> Future[list[None]]:
        """Start setting the initial parameters; sections that have some keep them."""
        return self._all(
            partial(shard.call, ParameterServerShard.initialise, self._partition, values[part])
            for shard, part in self.routes
        )

    def fetch(self, into: torch.Tensor) -> Future[list[int]]:
        """Start copying the parameters into `into`; the answer is one version per shard."""
        return self._all(
            partial(shard.call, ParameterServerShard.fetch, self._reader, self._partition, into[part])
            for shard, part in self.routes
        )

    def push(self, stamps: Sequence[Stamp], gradient: torch.Tensor) -> Future[list[Applied]]:
        """Start pushing `gradient`, a stamp per shard; the memory stays untouched until it is done."""
        return self._all(
            partial(shard.call, ParameterServerShard.push, stamp, gradient[part])
            for (shard, part), stamp in zip(self.routes, stamps, strict=True)
        )

    def exchange(self, stamps: Sequence[Stamp], gradient: torch.Tensor, into: torch.Tensor) -> Future[list[int]]:
        """Start a push and the fetch behind it, one call a shard; the answer is one version per shard."""
        return self._all(
            partial(shard.call, ParameterServerShard.exchange, stamp, gradient[part], into[part])
            for (shard, part), stamp in zip(self.routes, stamps, strict=True)
        )

    def _all(self, calls: Iterable[Callable[[], Future[Any]]]) -> All[Any]:
        return All(self._home, [Insistent(self._home, call) for call in calls])
