# SPDX-License-Identifier: Apache-2.0
"""What Sandblaster's coordinator and its replicas say to each other, and what there is to do."""

from dataclasses import dataclass

import msgspec

from distbelief.batch_section import Mark
from distbelief.bundles import Batches, Bundle, Portions


class Task(msgspec.Struct, array_like=True, frozen=True):
    """What a replica is to do: compute a bundle at a trial; nothing, and ask again; or leave."""

    bundle: Bundle | None = None
    mark: Mark = Mark(0, 0)
    """For the contribution."""
    version: int = 0
    """The step from which the trial starts."""
    t: float = 0.0
    over: bool = False


class Done(msgspec.Struct, array_like=True, frozen=True):
    """A replica's contribution is with every shard."""

    evaluation: int
    bundle: int
    loss_sum: float
    """Over the examples of the bundle; NaN when the loss or its gradient is not finite."""
    seconds: float


@dataclass(frozen=True)
class Work:
    """What is to be minimised, in portions."""

    portions: Portions
    batches: Batches
    objective: str
    """Penalties, bounds and batches, in words that are the same where they are."""
    computed: int = 0
    """Examples whose gradients were added up before this start."""
    round_trips: int = 0
    """To the shards, before this start."""
