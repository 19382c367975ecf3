# SPDX-License-Identifier: Apache-2.0
"""AdaptiveRevision: Adagrad that takes the delay of each gradient into account (McMahan, Streeter, NIPS 2014).

A gradient computed at version v arrives after others were applied. Their sum b = G - G_v is what the replica had not
seen. The rule counts 2*g*b beside g^2, and revises the steps of those others to the rate known now:

    b       = G - G_v
    rate_old = a / sqrt(z_max)
    z      += g^2 + 2*g*b;  z_max = max(z_max, z);  rate = a / sqrt(z_max)
    w      += -rate*g + (rate_old - rate)*b
    G      += g

z and z_max start at c, which is the paper's c inside the root. Without delay (b = 0) it is Adagrad with the initial
accumulator c and no eps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import final

import torch
from torch import Tensor

from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.parameters import Options, Segment, Span
from distbelief.update_rule.schedule import Schedule, factor_of, name_of

_CHUNK = 131_072
"""Elements worked on at a time, so that the passes over them find them in the processor's cache."""

_OUTSTANDING = 8
"""Versions remembered per reader; a replica holds two or three (computing, fetching, a push under way)."""

_NAMES = ("gradients", "z", "z_max")


@final
@dataclass(frozen=True)
class AdaptiveRevision:
    """The value; built by `adaptive_revision`."""

    rate: float
    c: float
    schedule: Schedule | None = None

    @property
    def name(self) -> str:
        """The short name."""
        return "adaptive_revision"

    def __repr__(self) -> str:
        schedule = "" if self.schedule is None else f", schedule={name_of(self.schedule)}"
        return f"adaptive_revision({self.rate}, c={self.c}{schedule})"

    def check(self, groups: Iterable[Options] = ()) -> None:
        """Raise ConfigurationError for values out of range and options of a group that this rule does not know."""
        for name, value in (("rate", self.rate), ("c", self.c)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"adaptive_revision({name}={value})", hint=f"use a {name} above 0")
        for group in groups:
            rate, c = self.values(group)
            if not (math.isfinite(rate) and rate >= 0 and math.isfinite(c) and c > 0):
                raise ConfigurationError(
                    f"the parameter group {dict(group)} sets rate {rate} and c {c}",
                    hint="use a rate of 0 or more and a c above 0",
                )

    def values(self, group: Options) -> tuple[float, float]:
        """The rate and c of a parameter group; `lr` is `rate`. Raises ConfigurationError."""
        given = {"rate" if name == "lr" else name: value for name, value in group}
        unknown = sorted(set(given) - {"rate", "c"})
        if unknown:
            raise ConfigurationError(
                f"the parameter group {dict(group)} sets {unknown[0]}, which adaptive_revision does not know",
                hint="it knows c, rate",
            )
        return given.get("rate", self.rate), given.get("c", self.c)

    def bind(self, parameters: Tensor, segments: Sequence[Segment], span: Span) -> "BoundAdaptiveRevision":
        """See UpdateRule.bind. Raises ConfigurationError for options of a segment that it does not know."""
        return BoundAdaptiveRevision(self, parameters, segments, span)


@final
class BoundAdaptiveRevision:
    """The state for one span and the sums of gradients at the versions that replicas hold; see BoundRule.

    Memory: four vectors of the span (three of state, one spare), and one per version that some replica holds and
    that is not the present one.
    """

    def __init__(self, rule: AdaptiveRevision, parameters: Tensor, segments: Sequence[Segment], span: Span) -> None:
        self._rule, self._parameters = rule, parameters
        self._gradients, self._z = torch.zeros_like(parameters), torch.empty_like(parameters)
        self._segments: list[_Segment] = []
        self._sums = _Sums()
        self._scratch = tuple(torch.empty(_CHUNK, dtype=parameters.dtype) for _ in range(3))
        for segment in segments:
            rate, c = rule.values(segment.options)
            where = segment.span.within(span)
            self._z[where] = c
            if not (self._z[where] > 0).all():
                raise ConfigurationError(
                    f"adaptive_revision(c={c}) is 0 in {parameters.dtype}, and the first steps divide by its root",
                    hint="use a larger c, or train in float32",
                )
            self._segments.append(_Segment(where, rate))
        self._z_max = self._z.clone()

    def apply(self, gradient: Tensor, *, reader: int, version: int, base_version: int, examples: int) -> None:
        """One push by the formulas above; see BoundRule.apply.

        A schedule's factor of this push is used for both rates: past steps are not revised to a new factor. The sum of
        gradients at an unknown base version (after a restore) is the next known one, at the latest the present.
        """
        factor = factor_of(self._rule.schedule, examples)
        present, base = self._gradients, self._sums.at(base_version)
        following = self._sums.successor(version, present)
        for segment in self._segments:
            vectors = (self._parameters, self._z, self._z_max, gradient, present, following)
            bases = repeat(None) if base is None else segment.chunks(base)
            chunks = zip(*(segment.chunks(vector) for vector in vectors), strict=True)
            for (w, z, z_max, g, now, next_), then in zip(chunks, bases, strict=False):
                b = None if then is None else torch.sub(now, then, out=self._scratch[0][: len(g)])
                self._step(w, z, z_max, g, segment.rate * factor, b)
                torch.add(now, g, out=next_)
        self._gradients = following
        self._sums.pushed(reader, base_version)

    def _step(self, w: Tensor, z: Tensor, z_max: Tensor, g: Tensor, a: float, b: Tensor | None) -> None:
        rate_old, rate = (scratch[: len(g)] for scratch in self._scratch[1:])
        z.addcmul_(g, g)
        if b is not None:
            z.addcmul_(g, b, value=2)
            torch.rsqrt(z_max, out=rate_old)
        torch.maximum(z_max, z, out=z_max)
        torch.rsqrt(z_max, out=rate)
        w.addcmul_(g, rate, value=-a)
        if b is not None:
            w.addcmul_(rate_old.sub_(rate), b, value=a)

    def fetched(self, reader: int, version: int) -> None:
        """Remember that `reader` may push a gradient computed at `version`."""
        self._sums.fetched(reader, version)

    def forget(self, reader: int) -> None:
        """Drop what only `reader` could have needed."""
        self._sums.forget(reader)

    def vectors(self) -> dict[str, Tensor]:
        """The sum of gradients, z and its maximum. What replicas hold is not saved: a restore forgets their delay."""
        return dict(zip(_NAMES, (self._gradients, self._z, self._z_max), strict=True))

    def scalars(self) -> dict[str, float]:
        """None."""
        return {}

    def load(self, vectors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """See BoundRule.load. Raises CheckpointError when the vectors are another rule's."""
        if set(vectors) != set(_NAMES):
            raise CheckpointError(
                f"the checkpoint holds the update rule's state {sorted(vectors)}, but {self._rule!r} keeps "
                f"{sorted(_NAMES)}\nhint: resume with the rule of the checkpoint"
            )
        for name, vector in self.vectors().items():
            vector.copy_(vectors[name])
        self._sums = _Sums()


@final
@dataclass(frozen=True)
class _Segment:
    where: slice
    rate: float

    def chunks(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The segment's part of a vector of the span, as views of a chunk each."""
        return torch.split(vector[self.where], _CHUNK)


@final
class _Sums:
    """The sums of gradients at earlier versions that some reader may still push from, one per version.

    No sum is copied: where a version is held, the next sum goes to other memory and the present one stays.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._sums: dict[int, Tensor] = {}
        self._spare: Tensor | None = None

    def at(self, version: int) -> Tensor | None:
        """The sum at `version`, or at the first later version known; None for the present one."""
        known = [other for other in self._sums if other >= version]
        return self._sums[min(known)] if known else None

    def successor(self, version: int, present: Tensor) -> Tensor:
        """Where the sum after `version` belongs: `present` itself, unless somebody holds it."""
        if not any(version in versions for versions in self._held.values()):
            return present
        self._sums[version] = present
        target = torch.empty_like(present) if self._spare is None else self._spare
        self._spare = None
        return target

    def fetched(self, reader: int, version: int) -> None:
        """`reader` holds `version` now."""
        versions = self._held.setdefault(reader, [])
        if version not in versions:
            versions.append(version)
        if len(versions) > _OUTSTANDING:
            versions.pop(0)
            self._drop()

    def pushed(self, reader: int, base_version: int) -> None:
        """`reader` will push from `base_version` or later versions only."""
        versions = self._held.get(reader, [])
        self._held[reader] = [version for version in versions if version >= base_version]
        self._drop()

    def forget(self, reader: int) -> None:
        """`reader` will not push."""
        self._held.pop(reader, None)
        self._drop()

    def _drop(self) -> None:
        held = {version for versions in self._held.values() for version in versions}
        for version in [version for version in self._sums if version not in held]:
            self._spare = self._sums.pop(version)


def adaptive_revision(rate: float, c: float = 1e-10, schedule: Schedule | None = None) -> AdaptiveRevision:
    """Delay-tolerant Adagrad (McMahan, Streeter, NIPS 2014): for many replicas, or where a warmstart is unwanted.

    rate: as for Adagrad. c: where the accumulated squares start; above 0, and a larger one softens the first steps.
    schedule: factor on the rate as a function of the examples applied.
    """
    return AdaptiveRevision(rate, c, schedule)
