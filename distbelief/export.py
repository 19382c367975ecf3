# SPDX-License-Identifier: Apache-2.0
"""From a run folder to an ordinary state_dict, without the user's code.

At its start a run writes what a checkpoint does not hold: which entry of the module's state_dict is which parameter or
buffer, and the values of all that is not trained. Where the parameters lie, and in which boxes, is in each checkpoint.
The model is put together tensor by tensor: nobody needs to hold it.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distbelief import checkpoint, shard_file, tensor_file
from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.files import MALFORMED, AnyPath
from distbelief.parameters import place_of
from distbelief.recut import buffer_reader, by_name, check_covered, uncut, vector_reader

STATE = "state.json"
INITIAL = "initial.safetensors"

Values = Callable[[Mapping[str, None]], Iterable[tuple[str, torch.Tensor]]]
"""Gives the initial values of these parameters and buffers, in any order; a module on the meta device has none."""


class Entry(msgspec.Struct, frozen=True):
    """What one entry of the state_dict is."""

    source: str
    """"parameters", "buffers" or "initial"."""
    name: str
    """In the module's named_parameters or named_buffers, where what is tied has one name."""
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"there is no dtype {self.dtype}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the entry's value."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Template(msgspec.Struct, frozen=True):
    """What a run notes at its start, and the checksum that proves it unchanged."""

    crc32: int
    """Of the file of initial values and, behind it, the entries."""
    entries: msgspec.Raw


def write_template(run: Path, module: nn.Module, values: Values | None = None) -> None:
    """Note, once per run, how to make a state_dict of a checkpoint.

    A module on the meta device needs `values` of what is not trained. Raises OSError.
    """
    named: list[tuple[torch.Tensor, str, str]] = [
        (parameter, "parameters" if parameter.requires_grad else "initial", name)
        for name, parameter in module.named_parameters()
    ]
    named += [(buffer, "buffers", name) for name, buffer in module.named_buffers()]
    known = {id(tensor): (source, name) for tensor, source, name in named}
    places: dict[object, tuple[str, str]] = {}  # of what is handed out detached; what is trained is named first
    for tensor, source, name in sorted(named, key=lambda each: each[1] != "parameters"):
        places.setdefault(place_of(tensor), (source, name))
    entries, initial = {}, {}
    for key, value in module.state_dict(keep_vars=True).items():
        source, name = known.get(id(value)) or places.get(place_of(value), ("initial", key))
        entries[key] = Entry(source, name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if source != "parameters":
            initial[name] = value
    tensors = {name: (value.dtype, value.shape) for name, value in initial.items()}
    with tensor_file.create(run / INITIAL, tensors) as file:
        for name, value in initial.items() if values is None else values(dict.fromkeys(initial)):
            file.write(name, value)
    text = msgspec.json.encode(entries)
    (run / STATE).write_bytes(msgspec.json.encode(Template(_checksum(run, text), msgspec.Raw(text))))


def _checksum(run: Path, entries: bytes | msgspec.Raw) -> int:
    return zlib.crc32(entries, shard_file.measure(run / INITIAL)[1])


def state_dict(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run as `Module.load_state_dict` takes it. Raises CheckpointError."""
    entries = _entries(run)
    value = _newest(run, lambda path, reason: None)
    return {key: value(entry) for key, entry in entries.items()}


def export(run: Path, path: Path, rejected: Callable[[AnyPath, str], None] = lambda path, reason: None) -> int:
    """Write the newest checkpoint's state_dict as safetensors; returns the number of parameters and buffers in it.

    `rejected` hears of newer ones that are damaged. Memory: twice the largest of parameters and buffers. Raises
    CheckpointError, and ConfigurationError when `path` cannot be written.
    """
    path = Path(os.path.realpath(path))  # what a link names is written, not the link replaced
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ConfigurationError(f"{path} is a {kind}", hint="give a file, such as model.safetensors")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigurationError(
            f"{path.name} is a name of files that torch.load reads, and what is written is safetensors",
            hint=f"name it {path.stem}.safetensors",
        )
    entries = _entries(run)
    value = _newest(run, rejected)
    part = path.with_name(path.name + ".part")
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(part.unlink, missing_ok=True)
            tensors = {key: (entry.torch_dtype, entry.shape) for key, entry in entries.items()}
            with tensor_file.create(part, tensors) as file:
                for key, entry in entries.items():
                    file.write(key, value(entry))
            part.rename(path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="give a file in a folder that exists and has room"
        ) from error
    return sum(torch.Size(entry.shape).numel() for entry in entries.values())


def _entries(run: Path) -> dict[str, Entry]:
    try:
        template = msgspec.json.decode((run / STATE).read_bytes(), type=Template)
        if _checksum(run, template.entries) != template.crc32:
            raise OSError(f"{STATE} or {INITIAL} was changed since it was written")
        return msgspec.json.decode(template.entries, type=dict[str, Entry])
    except (OSError, *MALFORMED) as error:
        raise _unknown(run, error) from error


def _newest(run: Path, rejected: Callable[[AnyPath, str], None]) -> Callable[[Entry], torch.Tensor]:
    """Gives the values of entries in the newest checkpoint, each in new memory."""
    folder, manifest = checkpoint.newest(run, rejected)
    held = {
        "parameters": (by_name(manifest.layout.layout), vector_reader(folder, manifest, "parameters")),
        "buffers": (by_name(manifest.buffer_layout.layout), buffer_reader(folder, manifest)),
    }

    def value(entry: Entry) -> torch.Tensor:
        pieces, read = held.get(entry.source, ({}, None))
        # A buffer that no partition holds is no part of the forward pass: it is what it was.
        if read is None or (entry.source == "buffers" and entry.name not in pieces):
            return _initial(run, entry)
        numbers = torch.Size(entry.shape).numel() * (2 if entry.torch_dtype.is_complex else 1)
        check_covered(folder, entry.name, pieces.get(entry.name, []), numbers)
        return _value(entry, uncut(pieces[entry.name], read))

    return value


def _value(entry: Entry, flat: torch.Tensor) -> torch.Tensor:
    """The entry of these numbers, in one row, which are pairs for a complex one."""
    if entry.torch_dtype.is_complex:
        return torch.view_as_complex(flat.view(*entry.shape, 2)).to(entry.torch_dtype)
    return (flat if entry.torch_dtype.is_floating_point else flat.round()).view(entry.shape).to(entry.torch_dtype)


def _initial(run: Path, entry: Entry) -> torch.Tensor:
    try:
        with safe_open(run / INITIAL, framework="pt") as file:
            value: torch.Tensor = file.get_tensor(entry.name).clone()
            return value
    except (OSError, SafetensorError) as error:
        raise _unknown(run, error) from error


def _unknown(run: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{run} does not say how its model is made: {error}\n"
        "hint: give the folder of a run; going on with it, as `distbelief resume` does, writes that anew"
    )
