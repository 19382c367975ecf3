# SPDX-License-Identifier: Apache-2.0
"""What an update rule is: a value the user chooses, and what it becomes inside one parameter server shard.

job:    rule = adagrad(0.05);  check(rule, groups)            before anything starts
shard:  bound = rule.bind(parameters, segments, span)         once
        bound.apply(gradient, ...)                            per push, updates `parameters` in place
        bound.fetched(reader, version)                        per fetch of a replica
        bound.vectors(), bound.scalars(); bound.load(...)     checkpoints
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distbelief.errors import ConfigurationError
from distbelief.parameters import Options, Segment, Span
from distbelief.update_rule.schedule import check_schedule


class BoundRule(Protocol):
    """An update rule that owns the state for one span; called by one shard, one call at a time."""

    def apply(self, gradient: Tensor, *, reader: int, version: int, base_version: int, examples: int) -> None:
        """Update the parameters in place with one pushed gradient.

        gradient: shape (len(span),), dtype of the parameters. It may be another process's memory, so it is read only,
            and nothing of it is kept after return.
        reader: the replica that pushes.
        version: pushes applied before this one. base_version: the version at which the gradient was computed.
        examples: examples applied by this shard before this push; learning-rate schedules depend on it.
        """
        ...

    def fetched(self, reader: int, version: int) -> None:
        """Replica `reader` has just been given the parameters at `version`, the present one."""
        ...

    def forget(self, reader: int) -> None:
        """Replica `reader` is gone and will not push what it fetched; unknown readers are fine."""
        ...

    def vectors(self) -> dict[str, Tensor]:
        """The state, by name, each of shape (len(span),); empty while there is none. Valid until the next call."""
        ...

    def scalars(self) -> dict[str, float]:
        """The numbers that the state needs besides, such as Adam's step."""
        ...

    def load(self, vectors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Go on from what `vectors` and `scalars` answered, perhaps on another cut; the tensors are copied.

        Raises CheckpointError when they are another rule's.
        """
        ...


class UpdateRule(Protocol):
    """A picklable value that says how pushed gradients become parameters. Its repr is shown in the summary."""

    @property
    def name(self) -> str:
        """The short name, for tables."""
        ...

    def check(self, groups: Iterable[Options]) -> None:
        """Raise ConfigurationError for values that cannot work; `groups` are the users' parameter groups."""
        ...

    def bind(self, parameters: Tensor, segments: Sequence[Segment], span: Span) -> BoundRule:
        """Take over `parameters`, the shard's own contiguous CPU tensor of shape (len(span),), cut into `segments`."""
        ...


def check(rule: object, groups: Iterable[Options] = (), examples: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Refuse an update rule that cannot work, before anything starts. Raises ConfigurationError.

    `groups` are the options of the users' parameter groups (`Piece.options`). A `schedule` that the rule has is tried
    all along the `examples` of the job. In the parameters' `dtype` numbers may round to zero that are divided by.
    """
    if isinstance(rule, type) or not (hasattr(rule, "bind") and hasattr(rule, "check")):
        raise ConfigurationError(
            f"update_rule={getattr(rule, '__name__', repr(rule))} is no update rule",
            hint="use adagrad(0.05), or optimizer(torch.optim.RMSprop, lr=0.01) for an optimizer class",
        )
    groups = tuple(dict.fromkeys(groups))  # each is tried, and thousands of parameters may have the same
    rule.check(groups)
    check_schedule(getattr(rule, "schedule", None), examples)
    for options in groups or ((),):
        values, span = torch.zeros(1, dtype=dtype), Span(0, 1)
        bound: BoundRule = rule.bind(values, [Segment(span, options)], span)
        bound.apply(torch.zeros(1, dtype=dtype), reader=0, version=0, base_version=0, examples=0)
        if not values.isfinite():
            raise ConfigurationError(
                f"{rule!r}{f' with {dict(options)}' if options else ''} makes NaN of a gradient of zero in {dtype}",
                hint="use a larger eps, such as 1e-4, or train in float32",
            )
