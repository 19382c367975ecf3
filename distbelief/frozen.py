# SPDX-License-Identifier: Apache-2.0
"""What training may not change of a module, as it would be in one replica only, and be lost.

Frozen parameters, which no shard holds; trained ones, but by a fetch; and which parameters and buffers there are.
"""

from typing import final

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distbelief.errors import ConfigurationError
from distbelief.parameters import persistent, trainable

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Numbers summed at once: torch widens them to 64 bits first, in new memory."""


@final
class Frozen:
    """The parameters and buffers of a module, and what the frozen ones were: a sum each, as a copy would not fit."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._buffers = module, set(persistent(module))
        self._trained = {name: (id(each), each._version) for name, each in trainable(module)}
        frozen = [(name, each) for name, each in module.named_parameters() if name not in self._trained]
        self._known = {name: (_place(each), bit_sum(each)) for name, each in frozen}

    def check(self, *, closely: bool) -> None:
        """Raise ConfigurationError where one has changed, has come, or is not frozen any more.

        Not `closely`, values are read only where torch has noticed a write, which it does not through `.data`, and
        buffers are not looked for, which takes twice as long as all else.
        """
        now = dict(self._module.named_parameters())
        for name, parameter in now.items():
            if name in self._trained:
                if id(parameter) != self._trained[name][0]:
                    raise _unknown(f"parameter {name} is another one than")
                if parameter._version != self._trained[name][1]:
                    raise changed(name)
            elif name not in self._known:
                raise _unknown(f"parameter {name} was not there")
            elif parameter.requires_grad:
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
        for name in persistent(self._module) if closely else ():
            if name not in self._buffers:
                raise _unknown(f"buffer {name} was not there")


def changed(name: str) -> ConfigurationError:
    """What to say of a trained parameter that is written by anything but a fetch."""
    return ConfigurationError(
        f"computing the loss changes parameter {name} itself, as max_norm of nn.Embedding and the clipping of "
        "weights do; shards keep it, and their next answer would undo the change",
        hint="compute with a changed copy in forward, or add a penalty to the loss; keep an average of the "
        "model in buffers (register_buffer), and leave the optimizer's steps to the job",
    )


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} when the job began, so nobody would train or keep it, and the result would not have it",
        hint="let the function that builds the model make all parameters and buffers, by a call of the model if their "
        "shapes are not known before; what is only a cache may be a buffer with persistent=False",
    )


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """Where a parameter is and how often torch has seen it written."""
    if not _is_plain(parameter) or parameter.is_inference():
        return id(parameter), 0
    return parameter.data_ptr(), parameter._version


def bit_sum(parameter: torch.Tensor) -> int:
    """The sum of the values' bits taken as whole numbers, exact also for NaN; 0 where they cannot be read."""
    if not _is_plain(parameter):
        return 0
    values = parameter.detach().resolve_conj().resolve_neg()
    if values.is_complex():
        values = torch.view_as_real(values)
    whole = values.reshape(-1).view(_WHOLE[values.element_size()])
    return sum(int(whole[start : start + _CHUNK].sum()) for start in range(0, len(whole), _CHUNK))


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether it is numbers in memory, and not a quantised tensor or the like."""
    return parameter.layout is torch.strided and not parameter.is_meta and not is_traceable_wrapper_subclass(parameter)
