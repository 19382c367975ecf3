# SPDX-License-Identifier: Apache-2.0
"""The initial values of a model that no process holds whole, bit for bit those of `torch.manual_seed(seed); build()`.

    recorded = record(build, seed)      the user's constructor runs once, as it is, on a tape
    recorded.module                     its model on the meta device: structure, names, shapes
    recorded.values(wanted)             what it would have held, box by box

Whatever the cut, a value is that of the uncut model, for it is a part of what the same operations make of the same
random numbers. Of a large model only the layers at work are in memory, first while it is recorded, then while the
wanted boxes are made.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distbelief.draws import begin_draws, draws_kept
from distbelief.errors import ConfigurationError
from distbelief.freed import freed_at_once
from distbelief.partition.box import Box, inside, whole
from distbelief.partition.tape import Sharing, Tape, View, every

Part = tuple[tuple[int, ...], Box]
"""A box of a tensor that is looked at in this shape."""

AT_WORK_BYTES = 1 << 26
"""Memory that the constructor may fill before what it used longest ago is given back."""


@dataclass(frozen=True)
class Recorded:
    """A model that has been built and is not there."""

    module: nn.Module
    """The model on the meta device."""
    _tape: Tape
    _views: Mapping[str, View]

    def values(self, wanted: Mapping[str, Part | None]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each wanted parameter, buffer or other tensor of the model, new memory, in any order.

        A name is that of `named_parameters` or `named_buffers`, or "module.attribute". `None` wants the whole tensor.
        Memory beside that of the values: the layer that is being made.
        """
        by_memory = defaultdict(list)
        for name in wanted:
            by_memory[self._views[name].memory].append(name)
        for memory, names in by_memory.items():
            with freed_at_once():  # the values, too: they are mostly copied to where they are to be, and let go
                content = self._tape.content(memory)
                values = list(self._parts(content, {name: wanted[name] for name in names}))
                del content
            yield from values

    def _parts(self, content: torch.UntypedStorage, wanted: Mapping[str, Part | None]) -> Iterator[tuple[str, Tensor]]:
        for name, part in wanted.items():
            tensor = self._views[name].of(content)
            if part is not None:
                shape, box = part
                tensor = tensor.reshape(shape)[inside(box, whole(shape))]
            yield name, tensor.clone() if tensor.nbytes < content.nbytes() or len(wanted) > 1 else tensor


def record(build: Callable[[], nn.Module], seed: int, at_work_bytes: int = AT_WORK_BYTES) -> Recorded:
    """Build the user's model with the random numbers of `seed`, keeping at most `at_work_bytes` of it and one layer.

    Takes as long as building it. The random numbers of the process stay where they are. Raises what `build` raises,
    and ConfigurationError when the model keeps tensors where they cannot be found again.
    """
    tape = Tape(at_work_bytes)
    with draws_kept(), freed_at_once():
        begin_draws(seed)
        with Sharing(tape), tape:
            module = build()
    _check_found(module)
    views = {name: tape.view(tensor) for name, _, _, tensor in tensors(module)}
    _move_to_meta(module, views)
    lost = tape.close()
    if lost:
        raise ConfigurationError(
            f"{type(module).__name__} keeps {lost} bytes of tensors that are no attribute of one of its modules, "
            "for example in a closure",
            hint="register them with register_buffer(name, tensor, persistent=False)",
        )
    return Recorded(module, tape, views)


def _check_found(module: nn.Module) -> None:
    for name, each in module.named_modules():
        if isinstance(each, torch.jit.ScriptModule):
            raise ConfigurationError(
                f"module {name or 'of the model'} is a script of torch.jit, which cannot be followed",
                hint="use the module that it was made of, or partitions=1",
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ConfigurationError(
                f"parameter {name} is lazy (its shape is not known yet)", hint="use parameters of known shape"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ConfigurationError(
                f"parameter {name} has hooks, which its parts would not call",
                hint="let the loss, or options such as clip_norm, do what they do, or use partitions=1",
            )


def tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter, buffer and tensor attribute that has a shape: its name, its owner, its name at the owner."""
    for prefix, owner in module.named_modules():
        own = {**owner._parameters, **owner._buffers, **vars(owner)}
        for attribute, value in own.items():
            if isinstance(value, Tensor) and not is_lazy(value):
                yield f"{prefix}.{attribute}".lstrip("."), owner, attribute, value


def _move_to_meta(module: nn.Module, views: Mapping[str, View]) -> None:
    """Replace every tensor by one of no content; what was one tensor, or one memory, stays one."""
    twins: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = defaultdict(partial(torch.UntypedStorage, 0, device="meta"))
    for name, owner, attribute, tensor in list(tensors(module)):
        if id(tensor) not in twins:
            twin = views[name].of(storages[views[name].memory])
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            vars(twin).update(vars(tensor))
            twins[id(tensor)] = twin
        setattr(owner, attribute, twins[id(tensor)])
    for prefix, owner in module.named_modules():
        for attribute, value in vars(owner).items():
            if attribute not in ("_parameters", "_buffers") and any(not each.is_meta for each in every(value, Tensor)):
                raise ConfigurationError(
                    f"{type(module).__name__} keeps tensors in {f'{prefix}.{attribute}'.lstrip('.')}, "
                    f"a {type(value).__name__}, where a partition cannot find them",
                    hint="register each with register_buffer(name, tensor, persistent=False), or use nn.ParameterList",
                )
