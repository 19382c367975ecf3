# SPDX-License-Identifier: Apache-2.0
"""A section of a shard under Sandblaster: the vectors of L-BFGS, and what makes every contribution count once.

    trial(t)        the point at which replicas compute, formed while it is served
    contribute      the gradient of one bundle; the first copy counts, later ones are only acknowledged
    seal            all contributions are in: the inner products that the solver needs
    step            move to the trial, keep its pair, form the next direction

An evaluation has a number; contributions to an earlier one are acknowledged and dropped, so a replica that comes late,
or was thought dead, changes nothing. Steps are numbered too, so a step sent again is no second step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

import msgspec
import torch

from distbelief import shard_file
from distbelief.basis import Basis
from distbelief.errors import NotReady
from distbelief.files import AnyPath, path_of
from distbelief.lbfgs import Evaluate, Step
from distbelief.parameters import Layout, Segment, Span
from distbelief.penalty import Penalty
from distbelief.sealed import Sealed
from distbelief.section import Awaited, SectionStatus
from distbelief.shard_file import ShardFile, ShardState


@dataclass(frozen=True)
class Keeping:
    """What the sections of a Sandblaster job keep. A parameter group's penalties and bounds go before these."""

    history: int = 10
    half_history: bool = False
    """Whether the pairs are kept in bfloat16."""
    overlapping: bool = False
    """Whether batches change, and share examples with the ones before and after."""
    deterministic: bool = False
    """Whether contributions are added in the order of their bundles, so that a sum never depends on who came first."""
    l2: float = 0.0
    l1: float = 0.0
    low: float = -torch.inf
    high: float = torch.inf

    def penalties(self, segments: Iterable[Segment], span: Span) -> list[Penalty]:
        """Those of a section's entries."""
        own = {name: getattr(self, name) for name in ("l2", "l1", "low", "high")}
        return [
            Penalty(
                segment.span.start - span.start, segment.span.stop - span.start, **(own | dict(segment.options))
            )
            for segment in segments
        ]  # fmt: skip


class Mark(msgspec.Struct, array_like=True, frozen=True):
    """What a contribution says of itself."""

    evaluation: int
    position: int
    """Of the bundle in its batch."""
    before: bool = False
    """Whether the batch before had it, too."""
    after: bool = False
    """Whether the next batch will have it, too."""


class Extent(msgspec.Struct, array_like=True, frozen=True):
    """How large a batch is."""

    bundles: int
    examples: int
    before: int = 0
    """Examples that the batch before had, too."""
    after: int = 0
    """Examples that the next batch will have, too."""


@final
class BatchSection:
    """The part of a shard that one partition computes on.

    Memory: that of its Basis, in float32 span x (2 history + 5) words, and with `deterministic` the contributions that
    came before their turn.
    """

    def __init__(self, span: Span, layout: Layout, keeping: Keeping) -> None:
        self.span = span
        self._parameters = torch.zeros(len(span), dtype=layout.dtype)
        dtype = torch.bfloat16 if keeping.half_history else None
        penalties = keeping.penalties(layout.segments(span), span)
        self._basis = Basis(self._parameters, keeping.history, penalties, dtype, overlapping=keeping.overlapping)
        self._deterministic = keeping.deterministic
        self._state = ShardState(start=span.start, stop=span.stop)
        """Its version counts steps, its mini-batches contributions."""
        self._evaluation = 0
        self._seen: set[int] = set()
        self._early: dict[int, tuple[torch.Tensor, bool, bool]] = {}
        """Contributions that came before those ahead of them."""
        self._added = 0
        self.ready = False
        """Whether it has its parameters."""

    def _check_ready(self) -> None:
        if not self.ready:
            raise NotReady(f"shard {self.span.start}..{self.span.stop} waits for its parameters")

    def initialise(self, values: torch.Tensor) -> None:
        """Set the parameters, once; `values` has shape (len(span),)."""
        if not self.ready:
            self._parameters.copy_(values)
            self.ready = True

    def read(self, parameters: torch.Tensor) -> int:
        """Copy the point of the last step into the caller's buffer of shape (len(span),); the answer is its version."""
        self._check_ready()
        parameters.copy_(self._parameters)
        return self._state.version

    def trial(self, version: int, t: float, parameters: torch.Tensor) -> None:
        """Write the trial at `t` after step `version` into the caller's buffer. Raises NotReady before that step."""
        self._check_ready()
        if self._state.version < version:
            raise NotReady(f"shard {self.span.start}..{self.span.stop} is at step {self._state.version}, not {version}")
        self._basis.trial(t, parameters)

    def contribute(self, mark: Mark, gradient: torch.Tensor) -> bool:
        """Add the gradient of one bundle, summed over its examples, shape (len(span),); whether it was the first copy.

        The first contribution opens the evaluation.
        """
        evaluation, position = mark.evaluation, mark.position
        self._check_ready()
        if evaluation > self._evaluation:
            self._evaluation, self._seen, self._early, self._added = evaluation, set(), {}, 0
            self._basis.open()
        if evaluation < self._evaluation or position in self._seen:
            return False
        self._seen.add(position)
        self._state.mini_batches += 1
        if not self._deterministic or position == self._added:
            self._basis.add(gradient, before=mark.before, after=mark.after)
            self._added += 1
            while self._added in self._early:
                early, before, after = self._early.pop(self._added)
                self._basis.add(early, before=before, after=after)
                self._added += 1
        else:
            self._early[position] = gradient.clone(), mark.before, mark.after
        return True

    def seal(self, evaluation: int, trial: Evaluate, extent: Extent) -> Sealed:
        """What the solver needs of a complete evaluation. Raises NotReady naming the bundles that are missing."""
        bundles = extent.bundles
        self._check_ready()
        seen = self._seen if self._evaluation == evaluation else set()
        if missing := sorted(set(range(bundles)) - seen):
            raise NotReady(f"shard {self.span.start}..{self.span.stop} lacks bundles {missing} of {evaluation}")
        shared = extent.before, extent.after
        return self._basis.seal(trial.t, extent.examples, trial.pairs, shared, whole=trial.whole)

    def step(self, version: int, evaluation: int, step: Step) -> None:
        """Carry out step number `version`, once. Raises NotReady for one that moves to the trial of an `evaluation`
        that is not here: a shard that was given a checkpoint meanwhile has forgotten it.
        """
        self._check_ready()
        if version <= self._state.version:
            return
        if step.commit and evaluation != self._evaluation:
            raise NotReady(f"shard {self.span.start}..{self.span.stop} has not the trial of evaluation {evaluation}")
        self._basis.step(step)
        self._state.version = version

    def gram(self, pairs: Sequence[int]) -> list[list[float]]:
        """The inner products of [s.., y.., p], measured anew."""
        self._check_ready()
        return self._basis.gram(pairs)

    def status(self) -> SectionStatus:
        """Counters, for the coordinator."""
        state = self._state
        return SectionStatus(self.ready, state.version, state.mini_batches, 0, {})

    def write(self, file: AnyPath, slots: Sequence[int], durable: bool) -> Callable[[], list[ShardFile]]:
        """Write the point and gradient, and beside them the pairs of these slots; what is returned seals the files.

        Sealing may run beside the shard; `durable` forces to disk. Raises OSError.
        """
        self._check_ready()
        vectors = self._basis.vectors()
        pairs = {f"{half}{slot}": vectors.get(f"{half}{slot}") for slot in slots for half in "sy"}
        written = {name: vector for name, vector in pairs.items() if vector is not None}
        point = {name: vector for name, vector in vectors.items() if name in ("gradient", "overlap")}
        drafts = [(shard_file.write(file, {"parameters": self._parameters, **point}, self._state), False)]
        if written:
            name, suffix = file.name.rsplit(".", 1)
            drafts.append((shard_file.write(file.parent / f"{name}-pairs.{suffix}", written, self._state), True))
        state = ShardState(start=self.span.start, stop=self.span.stop)

        return lambda: [shard_file.seal(draft, state, partial=partial, durable=durable) for draft, partial in drafts]

    def restore(self, folder: str, files: list[ShardFile], *, own: bool, offers: Awaited | None) -> int:
        """Take the span from a checkpoint's files, cut anyhow; from those of another algorithm only the parameters.

        Nobody has a newer point, so no `offers` are awaited. Answers the version. Raises CheckpointError.
        """
        vectors, states = shard_file.read_shard(path_of(folder), files, self.span, own=own)
        self._parameters.copy_(vectors.pop("parameters"))
        if own:
            self._basis.load(vectors)
            self._state.version = max(state.version for state in states)
        self._evaluation, self._seen, self._early, self._added = 0, set(), {}, 0
        self.ready = True
        return self._state.version
