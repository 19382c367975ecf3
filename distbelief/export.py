# SPDX-License-Identifier: Apache-2.0
"""From a run folder to an ordinary state_dict, without the user's code.

At its start a run writes what a checkpoint does not hold: which entry of the module's state_dict is which piece of the
flat vector or which buffer, and the values of everything frozen.
"""

from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distbelief import checkpoint
from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.parameters import Layout, trainable

STATE = "state.json"
FROZEN = "frozen.safetensors"


class Entry(msgspec.Struct, frozen=True):
    """Where the value of one state_dict entry comes from."""

    source: str
    """"parameters", "buffers" or "frozen"."""
    start: int
    """Offset in the flat vector of parameters or of buffers."""
    shape: tuple[int, ...]
    dtype: str


def write_template(run: Path, module: nn.Module, layout: Layout) -> None:
    """Note, once per run, how to make a state_dict of a checkpoint. Raises OSError."""
    pieces = {piece.name: piece.span.start for piece in layout.pieces}
    sources: dict[int, tuple[str, int]] = {id(p): ("parameters", pieces[name]) for name, p in trainable(module)}
    start = 0
    for _, buffer in module.named_buffers():
        sources[id(buffer)] = ("buffers", start)
        start += buffer.numel() * (2 if buffer.is_complex() else 1)
    entries, frozen = {}, {}
    for key, value in module.state_dict(keep_vars=True).items():
        source, offset = sources.get(id(value), ("frozen", 0))
        entries[key] = Entry(source, offset, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if source == "frozen":
            frozen[key] = value.detach().clone().contiguous()
    try:
        save_file(frozen, run / FROZEN)
    except SafetensorError as error:
        raise OSError(f"{run / FROZEN}: {error}") from error
    (run / STATE).write_bytes(msgspec.json.encode(entries))


def state_dict(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run as `Module.load_state_dict` takes it. Raises CheckpointError."""
    folder, manifest = checkpoint.newest(run, lambda path, reason: None)
    sources = {
        "parameters": checkpoint.read_vector(folder, manifest),
        "buffers": checkpoint.read_buffers(folder),
    }
    try:
        entries = msgspec.json.decode((run / STATE).read_bytes(), type=dict[str, Entry])
        frozen = load_file(run / FROZEN)
    except (OSError, SafetensorError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{run} does not say how its model is made: {error}") from error
    return {
        key: frozen[key] if entry.source == "frozen" else _value(entry, sources[entry.source])
        for key, entry in entries.items()
    }


def _value(entry: Entry, flat: torch.Tensor) -> torch.Tensor:
    """A new tensor with the values that the flat vector has for the entry."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    length = torch.Size(entry.shape).numel() * (2 if dtype.is_complex else 1)
    part = flat[entry.start : entry.start + length].clone()
    if dtype.is_complex:
        return torch.view_as_complex(part.view(*entry.shape, 2)).to(dtype)
    return (part if dtype.is_floating_point else part.round()).view(entry.shape).to(dtype)


def export(run: Path, path: Path) -> int:
    """Write the newest checkpoint's state_dict as safetensors; returns the number of parameters and buffers in it.

    Raises CheckpointError, and ConfigurationError when `path` cannot be written.
    """
    state = state_dict(run)
    try:
        save_file(state, path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="give a file in a folder that exists and has room"
        ) from error
    return sum(value.numel() for value in state.values())
