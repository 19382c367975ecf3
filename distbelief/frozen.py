# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters, which no shard holds: what training changed in them would be in one replica only, and be lost."""

from typing import final

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distbelief.errors import ConfigurationError
from distbelief.parameters import trainable

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Numbers summed at once: torch widens them to 64 bits first, in new memory."""


@final
class Frozen:
    """The frozen parameters of a module, and what they were: a sum each, as a copy of a large model would not fit."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._trained = {name for name, _ in trainable(module)}
        frozen = [(name, each) for name, each in module.named_parameters() if name not in self._trained]
        self._known = {name: (_place(each), bit_sum(each)) for name, each in frozen}

    def check(self, *, closely: bool) -> None:
        """Raise ConfigurationError where one has changed, or is not frozen any more.

        Not `closely`, values are read only where torch has noticed a write, which it does not through `.data`.
        """
        if not self._known:
            return
        now = dict(self._module.named_parameters())
        for name, parameter in now.items():
            if parameter.requires_grad and name not in self._trained:
                raise ConfigurationError(
                    f"parameter {name} was frozen when the job began and requires a gradient now, but shards do not "
                    "hold it, so nobody would train it",
                    hint="let all that is ever trained require a gradient from the beginning, and detach what is not "
                    "trained yet; or train in two jobs, the second with the result of the first as its model",
                )
        for name, (place, values) in self._known.items():
            if name in now:
                here = _place(now[name])
                if (here == place and not closely) or bit_sum(now[name]) == values:
                    self._known[name] = here, values
                    continue
            raise ConfigurationError(
                f"computing the loss changes the frozen parameter {name}, but shards do not hold it, so the result "
                "would have its initial values",
                hint="keep what follows the model, such as an average of it or a teacher, in buffers "
                "(register_buffer), which are carried along, with the mean over replicas",
            )


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """Where a parameter is and how often torch has seen it written."""
    if not _is_plain(parameter) or parameter.is_inference():
        return id(parameter), 0
    return parameter.data_ptr(), parameter._version


def bit_sum(parameter: nn.Parameter) -> int:
    """The sum of the values' bits taken as whole numbers, exact also for NaN; 0 where they cannot be read."""
    if not _is_plain(parameter):
        return 0
    values = parameter.detach().resolve_conj().resolve_neg()
    if values.is_complex():
        values = torch.view_as_real(values)
    whole = values.reshape(-1).view(_WHOLE[values.element_size()])
    return sum(int(whole[start : start + _CHUNK].sum()) for start in range(0, len(whole), _CHUNK))


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is numbers in memory, and not a quantised tensor or the like."""
    return parameter.layout is torch.strided and not parameter.is_meta and not is_traceable_wrapper_subclass(parameter)
