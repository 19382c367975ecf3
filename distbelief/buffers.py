# SPDX-License-Identifier: Apache-2.0
"""Buffers of a module (BatchNorm statistics, counters) as one vector, so that their mean over replicas can be taken."""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import nn

from distbelief.errors import ConfigurationError, ProtocolError
from distbelief.parameters import persistent


class Registered(Mapping[str, torch.Tensor]):
    """The buffers of a module as they are at the moment: its forward pass may assign other tensors to them.

    Those that are not persistent, as caches are, stay what they were. Raises ConfigurationError for one that is asked
    for when it is of another shape or kind than before.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = dict(module.named_buffers())
        self._owners = persistent(module)

    def __getitem__(self, name: str) -> torch.Tensor:
        before = self._before[name]
        if name not in self._owners:
            return before
        now = getattr(*self._owners[name])
        if not isinstance(now, torch.Tensor) or (now.shape, _kind(now.dtype)) != (before.shape, _kind(before.dtype)):
            is_tensor = isinstance(now, torch.Tensor)
            raise ConfigurationError(
                f"buffer {name} was {_kind(before.dtype)} of shape {list(before.shape)} and now is "
                + (f"{_kind(now.dtype)} of shape {list(now.shape)}" if is_tensor else f"a {type(now).__name__}"),
                hint="let it keep its shape and kind, register it with persistent=False, or keep it in an attribute",
            )
        return now

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else "whole"


def _flat(buffer: torch.Tensor) -> torch.Tensor:
    """The numbers of a buffer in one row, of a complex one (rotary frequencies) real and imaginary parts in turn."""
    real = torch.view_as_real(buffer.resolve_conj()) if buffer.is_complex() else buffer
    return real.detach().to("cpu", torch.float64).reshape(-1)


def flat_buffers(buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All buffers one after another, float64 on the CPU; float64 holds counters exactly up to 2**53."""
    parts = [_flat(buffer) for buffer in buffers.values()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def load_buffers(buffers: Mapping[str, torch.Tensor], values: torch.Tensor) -> None:
    """Write a vector made by `flat_buffers` back; counters are rounded."""
    start = 0
    for buffer in buffers.values():
        stop = start + buffer.numel() * (2 if buffer.is_complex() else 1)
        part, start = values[start:stop], stop
        part = (torch.complex(part[::2], part[1::2]) if buffer.is_complex() else part).view(buffer.shape)
        for dimension, (stride, size) in enumerate(zip(buffer.stride(), buffer.shape, strict=True)):
            if stride == 0 and size > 1:  # expanded: the same numbers again and again
                buffer, part = buffer.narrow(dimension, 0, 1), part.narrow(dimension, 0, 1)
        with torch.no_grad():
            buffer.copy_(part.round() if _kind(buffer.dtype) == "whole" else part)


@final
class SentBuffers:
    """The buffers that replicas have sent, each a vector per partition, and their mean over replicas at work."""

    def __init__(self, initial: Sequence[torch.Tensor], replicas: int) -> None:
        self._kept = list(initial)
        """Per partition, what the mean was when a replica died, or before there was one."""
        self._sent: list[dict[int, torch.Tensor]] = [{} for _ in range(replicas)]

    def take(self, replica: int, partition: int, values: torch.Tensor) -> None:
        """What a replica has sent. Raises ProtocolError for another number of them than there are."""
        kept = self._kept[partition]
        if (values.shape, values.dtype) != (kept.shape, kept.dtype):
            raise ProtocolError(
                f"{values.numel()} numbers of {values.dtype} for the buffers of partition {partition}, which are "
                f"{kept.numel()} of {kept.dtype}"
            )
        self._sent[replica][partition] = values.clone()

    def lose(self, replica: int, at_work: int) -> None:
        """A replica died; what it sent counts as long as nobody of those at work has sent anything since."""
        self._kept = self.mean(at_work)
        for gone in (replica, *range(at_work, len(self._sent))):  # what the idle have sent is older than what is kept
            self._sent[gone] = {}

    def mean(self, at_work: int) -> list[torch.Tensor]:
        """Per partition, the mean of what the first `at_work` replicas have sent, or any; else what is kept.

        Who has nothing to do is left out: what it saw last belongs to parameters of long ago.
        """
        means = []
        for partition, kept in enumerate(self._kept):
            sent = [values.get(partition) for values in self._sent]
            some = [values for values in sent[:at_work] if values is not None]
            some = some or [values for values in sent if values is not None]
            means.append(torch.stack(some).mean(0) if some else kept)
        return means
