# SPDX-License-Identifier: Apache-2.0
"""One shard on disk: an ordinary safetensors file whose vectors can be read by range, and what it says of itself.

A checkpoint holds one such file per shard. Loading on another number of shards reads, from every file, the part that
meets the new span; nothing is converted.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distbelief import storage, tensor_file
from distbelief.errors import CheckpointError
from distbelief.parameters import Span
from distbelief.tensor_file import DTYPES, TensorFile

_READ_BYTES = 1 << 22


class ReplicaRecord(msgspec.Struct):
    """What a shard remembers of one replica, so that a push counts once."""

    incarnation: int
    sequence: int
    portions: dict[int, int] = {}
    """Lease -> position up to which its examples are applied here, for the leases of its latest pushes."""


class ShardState(msgspec.Struct, kw_only=True):
    """Everything a shard knows besides its vectors."""

    start: int
    stop: int
    version: int = 0
    """Pushes applied so far."""
    examples: int = 0
    """Examples whose gradients were applied so far; learning-rate schedules are functions of it."""
    mini_batches: int = 0
    """Mini-batches that were accrued in those pushes."""
    lost_updates: int = 0
    """Acknowledged pushes that a restart from an older checkpoint lost."""
    scalars: dict[str, float] = {}
    """The update rule's numbers, such as Adam's step."""
    replicas: dict[int, ReplicaRecord] = {}
    staleness: dict[int, int] = {}
    """Staleness -> pushes applied at it."""


class ShardFile(msgspec.Struct, frozen=True):
    """A shard's file in a manifest, with what proves it whole."""

    name: str
    start: int
    stop: int
    size_bytes: int
    crc32: int
    partial: bool = False
    """Whether it holds only some vectors of its span, beside a file that holds the others."""


def write(path: Path, vectors: dict[str, torch.Tensor], state: ShardState) -> None:
    """Write the vectors straight from their memory. Raises OSError."""
    try:
        save_file(
            {name: vector.contiguous() for name, vector in vectors.items()}, storage.spool(path), _metadata(state)
        )
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def create(path: Path, vectors: Mapping[str, torch.dtype], state: ShardState) -> AbstractContextManager[TensorFile]:
    """A file for vectors of the state's span that are not in memory as a whole. Raises OSError."""
    shape = (state.stop - state.start,)
    tensors = {name: (dtype, shape) for name, dtype in vectors.items()}
    return tensor_file.create(storage.spool(path), tensors, _metadata(state))


def _metadata(state: ShardState) -> dict[str, str]:
    return {"shard": msgspec.json.encode(state).decode()}


def seal(path: Path, state: ShardState, *, partial: bool = False, durable: bool = True) -> ShardFile:
    """Force the file to disk, if it is to be `durable` beyond the machine's life, and describe it. Raises OSError.

    One that belongs into a store is carried there.
    """
    size_bytes, checksum = _measure(storage.spool(path), durable=durable)
    storage.deliver(path)
    return ShardFile(path.name, state.start, state.stop, size_bytes, checksum, partial)


def _measure(path: Path, *, durable: bool = False) -> tuple[int, int]:
    """(size in bytes, checksum) of a file on the own disk."""
    with path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        checksum = 0
        while chunk := file.read(_READ_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return path.stat().st_size, checksum


def check(folder: Path, file: ShardFile) -> None:
    """Raise CheckpointError unless the file is there, whole and unchanged."""
    path = folder / file.name
    try:
        if not storage.exists(path):
            raise CheckpointError(f"{path} is missing")
        with storage.fetched(path) as here:
            size_bytes, checksum = _measure(here)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if size_bytes != file.size_bytes:
        raise CheckpointError(f"{path} has {size_bytes} bytes, {file.size_bytes} were written")
    if checksum != file.crc32:
        raise CheckpointError(f"{path} was changed since it was written (checksum {checksum}, was {file.crc32})")


def read_state(path: Path) -> ShardState:
    """What the file says of itself. Raises CheckpointError."""
    try:
        with storage.fetched(path) as here, safe_open(here, framework="pt") as file:
            return msgspec.json.decode(file.metadata()["shard"], type=ShardState)
    except (SafetensorError, OSError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def vectors(folder: Path, files: Sequence[ShardFile]) -> dict[str, torch.dtype]:
    """The names of the vectors that are in any of the files. Raises CheckpointError."""
    found: dict[str, torch.dtype] = {}
    for source in files:
        try:
            with storage.fetched(folder / source.name) as here, safe_open(here, framework="pt") as file:
                found |= {name: DTYPES[file.get_slice(name).get_dtype()] for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / source.name} cannot be read: {error}") from error
    return found


def read_span(
    folder: Path, files: Sequence[ShardFile], span: Span, wanted: Mapping[str, torch.dtype] | None = None
) -> dict[str, torch.Tensor]:
    """Every vector, or the wanted ones, cut to `span`, each of shape (len(span),), from the files that meet it.

    A rule such as Adam has no vectors before its first push: where one file lacks a vector of another, it is zero, and
    so is a wanted one that all of them lack. Raises CheckpointError.
    """
    vectors = {name: torch.zeros(len(span), dtype=dtype) for name, dtype in (wanted or {}).items()}
    missing = len(span)
    for source in files:
        held = Span(source.start, source.stop)
        part = held.overlap(span)
        if not len(part):
            continue
        missing -= 0 if source.partial else len(part)
        path = folder / source.name
        try:
            with storage.fetched(path) as here, safe_open(here, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if wanted is not None and name not in wanted:
                        continue
                    values = file.get_slice(name)[part.within(held)]
                    if name not in vectors:
                        vectors[name] = torch.zeros(len(span), dtype=values.dtype)
                    vectors[name][part.within(span)] = values
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if missing:
        raise CheckpointError(f"{folder} lacks {missing} of the {len(span)} parameters {span.start}..{span.stop}")
    return vectors
