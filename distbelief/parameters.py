# SPDX-License-Identifier: Apache-2.0
"""The parameters are one flat vector, cut twice (paper, section 4.1: "sharded across many machines").

    partitions (who computes)   |----- 0 -----|------- 1 -------|
    pieces (of parameters)      |-w1-|b1|--w2-|--w2--|b2|---w3--|
    the flat parameter vector   0 . . . . . . . . . . . . . . . n
    shards (who stores)         |-- 0 --|-- 1 --|-- 2 --|-- 3 --|

Partitions follow each other, each lays its pieces one after another, and shards cut the line into equal spans. There
are no keys and no name table on the wire: who talks to whom about what is the overlap of spans.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from distbelief.errors import ConfigurationError

Groups = Callable[[str, nn.Parameter], Mapping[str, float]]
"""The user's parameter groups: (name, parameter) -> options of the update rule that differ for it, {} for none."""

EXACT_INTEGERS = 1 << 53
"""The mean of replicas' buffers is taken in float64."""

Options = tuple[tuple[str, float], ...]
"""Options of one parameter group in sorted order, so that equal groups compare equal."""


@dataclass(frozen=True, order=True)
class Span:
    """A half-open range [start, stop) of the flat parameter vector."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def overlap(self, other: "Span") -> "Span":
        """The common range; empty (length 0) where there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def within(self, outer: "Span") -> slice:
        """This span as a slice of a tensor that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


def cut(length: int, shards: int) -> list[Span]:
    """Cut [0, length) into `shards` consecutive spans whose lengths differ by at most one."""
    edges = [length * shard // shards for shard in range(shards + 1)]
    return [Span(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Piece:
    """One named parameter of the model, or a box of it, and where it lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    """Of the box, for a box."""
    span: Span
    options: Options = ()
    """What the user's groups function answered for it."""
    whole: tuple[int, ...] | None = None
    """For a box: the shape of what it is a box of, the parameter itself or a view of it. None: all of the parameter."""
    corner: tuple[int, ...] = ()
    """For a box: its first index in `whole`."""


@dataclass(frozen=True)
class Segment:
    """A range of the flat vector whose pieces share the options of one parameter group."""

    span: Span
    options: Options


@dataclass(frozen=True)
class Layout:
    """Where every trainable parameter lies. Frozen parameters and buffers are left out."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    edges: tuple[int, ...] = ()
    """Where partitions meet, in ascending order; none for a replica of one process."""

    @property
    def length(self) -> int:
        """Number of parameters, n."""
        return self.pieces[-1].span.stop if self.pieces else 0

    @property
    def partitions(self) -> list[Span]:
        """The part of the line that each partition of a replica computes on."""
        return [Span(start, stop) for start, stop in pairwise((0, *self.edges, self.length))]

    def of_partition(self, index: int) -> "Layout":
        """The pieces of one partition, laid out from 0 on."""
        own = self.partitions[index]
        pieces = tuple(
            replace(piece, span=Span(piece.span.start - own.start, piece.span.stop - own.start))
            for piece in self.pieces
            if own.start <= piece.span.start < own.stop
        )
        return Layout(pieces, self.dtype)

    def fingerprint(self) -> str:
        """Identifies names, shapes, boxes and order; checkpoints of another model or another cut differ in it."""
        text = ";".join(f"{piece.name}{list(piece.shape)}" for piece in self.pieces) + str(self.dtype)
        text += "".join(f";{piece.name}{piece.whole}{piece.corner}" for piece in self.pieces if piece.whole is not None)
        text += f";{self.edges}" if self.edges else ""
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def segments(self, span: Span) -> list[Segment]:
        """The parameter groups that meet `span`: maximal runs of pieces with equal options, cut to `span`."""
        runs: list[Segment] = []
        for piece in self.pieces:
            part = piece.span.overlap(span)
            if not len(part):
                continue
            if runs and runs[-1].options == piece.options:
                runs[-1] = Segment(Span(runs[-1].span.start, part.stop), piece.options)
            else:
                runs.append(Segment(part, piece.options))
        return runs

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every piece of `flat`, shape (n,), as a view in its own shape, by name; writing to one writes to `flat`."""
        return {piece.name: flat[piece.span.start : piece.span.stop].view(piece.shape) for piece in self.pieces}


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that training changes, each once and under its first name, in the order of `named_parameters`."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def persistent(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module that has each buffer which is kept, and its name there."""
    modules = dict(module.named_modules())
    places = ((name, *name.rpartition(".")) for name, _ in module.named_buffers())
    owners = {name: (modules[path], key) for name, path, _, key in places}
    return {name: (owner, key) for name, (owner, key) in owners.items() if key not in owner._non_persistent_buffers_set}


def lay_out(model: nn.Module, groups: Groups | None = None) -> Layout:
    """Lay the trainable parameters of `model` one after another, parameters of one group together.

    Raises ConfigurationError when there are none, or when they cannot share one vector.
    """
    named = list(trainable(model))
    if not named:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable parameters",
            hint="leave requires_grad on for at least one parameter",
        )
    _check_one_vector(named)
    check_state(model)
    options = {name: group_options(groups, name, parameter) for name, parameter in named}
    order = {group: rank for rank, group in enumerate(dict.fromkeys(options.values()))}
    pieces, start = [], 0
    for name, parameter in sorted(named, key=lambda item: order[options[item[0]]]):
        span = Span(start, start + parameter.numel())
        pieces.append(Piece(name, tuple(parameter.shape), span, options[name]))
        start = span.stop
    return Layout(tuple(pieces), named[0][1].dtype)


def group_options(groups: Groups | None, name: str, parameter: nn.Parameter) -> Options:
    """What the user's groups say of a parameter. Raises ConfigurationError."""
    given = groups(name, parameter) if groups else {}
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"Job(groups=...) gives {name} a {type(given).__name__}",
            hint='return the options that differ, such as {"weight_decay": 0.0}, or {} for none',
        )
    return tuple(sorted(given.items()))


def check_same(layout: Layout, expected: Layout) -> None:
    """Raise ConfigurationError when a model is not laid out as it was when the job was prepared."""
    if layout == expected:
        return
    expected_shapes, shapes = ({piece.name: piece.shape for piece in each.pieces} for each in (expected, layout))
    differences = changed_pieces(expected_shapes, shapes, "before")
    raise ConfigurationError(
        "the job's model is another one each time it is built: "
        + ("; ".join(differences[:5]) or "its parameters have another order, dtype or group"),
        hint="let the function build the same modules in every process: environment, other libraries' random numbers "
        "and what is set below `if __name__` are not the same there; import a file that was changed again",
    )


def _check_one_vector(named: list[tuple[str, nn.Parameter]]) -> None:
    first_name, first = named[0]
    storages: dict[int, str] = {}
    for name, parameter in named:
        if not parameter.dtype.is_floating_point:
            raise ConfigurationError(
                f"parameter {name} has dtype {parameter.dtype}; the flat vector holds floating-point numbers",
                hint="make it of real numbers (torch.view_as_real), or freeze it",
            )
        if parameter.dtype != first.dtype:
            raise ConfigurationError(
                f"parameter {name} has dtype {parameter.dtype}, {first_name} has {first.dtype}; "
                "one flat vector holds one floating-point dtype",
                hint="convert the model with model.float() or model.to(dtype), or freeze the odd parameter",
            )
        if parameter.is_sparse or isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(
                f"parameter {name} is {'sparse' if parameter.is_sparse else 'lazy (its shape is not known yet)'}",
                hint="use dense parameters of known shape",
            )
        if _is_expanded(parameter):
            raise ConfigurationError(
                f"parameter {name} is expanded: several of its numbers lie at the same place",
                hint="make it of a copy: nn.Parameter(values.expand(...).clone()), or expand it in forward",
            )
        storage = parameter.untyped_storage().data_ptr()
        if parameter.device.type != "meta" and parameter.numel() and storages.setdefault(storage, name) != name:
            raise ConfigurationError(
                f"parameters {storages[storage]} and {name} are different views of the same memory",
                hint="assign the same nn.Parameter object to both modules, which is counted once",
            )


def _memory(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(storage, first byte, last byte and one) of a strided tensor; the storage tells on the meta device, too."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = int(tensor.storage_offset()) * tensor.itemsize
    return tensor.untyped_storage()._cdata, start, start + (reach * tensor.itemsize if tensor.numel() else 0)


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] == other[0] and max(one[1], other[1]) < min(one[2], other[2])


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """By what two tensors are known to be the same one: a detached tensor is, a copy is not."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _check_entries(model: nn.Module) -> None:
    """Refuse a state_dict that hands out copies: nothing would tell what they are copies of."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigurationError(
                f"state_dict() of {type(model).__name__} has a {type(value).__name__} under {key}",
                hint="hand out tensors only, as load_state_dict and safetensors take them",
            )
    given = {key: place_of(value) for key, value in state.items()}
    known = {place_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copies = {key for key, place in given.items() if place not in known}
    shapes = {tuple(state[key].shape) for key in copies}
    lost = [
        name
        for name, parameter in trainable(model)
        if tuple(parameter.shape) in shapes and place_of(parameter) not in given.values()
    ]
    lost += [name for name, _ in model.named_buffers() if name in copies]
    if lost:
        raise ConfigurationError(
            f"state_dict() of {type(model).__name__} has a copy of {lost[0]}: exports would hold its first values",
            hint="hand out the parameters and buffers themselves, and make copies where they are saved",
        )


def check_state(model: nn.Module) -> None:
    """Raise ConfigurationError for what a model holds beside its parameters and cannot be kept with them."""
    for name, module in model.named_modules():
        own = type(module).get_extra_state is not nn.Module.get_extra_state
        if own and not isinstance(module.get_extra_state(), torch.Tensor):
            raise ConfigurationError(
                f"module {name or 'of the model'} ({type(module).__name__}) has an extra state that is no tensor: "
                "checkpoints and exports do not hold it",
                hint="keep it in buffers, or let get_extra_state return a tensor",
            )
    trained = [(name, *_memory(parameter)) for name, parameter in trainable(model)]
    for path, module in model.named_modules():
        for attribute, value in _plain(module).items():
            if shared := [name for name, *memory in trained if _overlap(_memory(value), memory)]:
                raise ConfigurationError(
                    f"{f'{path}.{attribute}'.lstrip('.')} is a view of parameter {shared[0]}, and would go on showing "
                    "its first values, as replicas put those that they fetch elsewhere",
                    hint="make the view in forward, or assign the same nn.Parameter object to both modules",
                )
    for name, buffer in model.named_buffers():
        problem, hint = "", "keep it in an attribute that is no buffer, and build it in forward or in the constructor"
        if isinstance(buffer, nn.parameter.UninitializedBuffer):
            problem, hint = "is lazy (its shape is not known yet)", "use buffers of known shape"
        elif buffer.layout != torch.strided:
            problem, hint = f"is sparse ({buffer.layout})", "register its indices and values instead"
        elif shared := [name for name, *memory in trained if _overlap(_memory(buffer), memory)]:
            problem, hint = f"is a view of parameter {shared[0]}", "register a copy of it: parameter.detach().clone()"
        elif buffer.device.type == "meta":
            continue
        elif buffer.dtype is torch.int64 and bool(((buffer > EXACT_INTEGERS) | (buffer < -EXACT_INTEGERS)).any()):
            problem = f"holds integers above {EXACT_INTEGERS:,}, which the mean of replicas' buffers would round"
        if problem:
            raise ConfigurationError(f"buffer {name} {problem}", hint=hint)
    _check_entries(model)


def _plain(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are mere attributes, but what torch.nn.utils.spectral_norm makes anew before each forward pass."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not isinstance(value, nn.Parameter)
        if f"{name}_orig" not in module._parameters
    }


def changed_pieces(
    old: Mapping[str, tuple[int, ...]], new: Mapping[str, tuple[int, ...]], older: str = "the checkpoint"
) -> list[str]:
    """How a model differs from an older one, a sentence per parameter; empty when names and shapes are the same."""
    differences = [f"{name} is missing in the model" for name in old if name not in new]
    differences += [f"{name} is new in the model" for name in new if name not in old]
    differences += [
        f"{name} has shape {list(new[name])}, {older} {list(old[name])}"
        for name in old
        if name in new and tuple(old[name]) != tuple(new[name])
    ]
    return differences
