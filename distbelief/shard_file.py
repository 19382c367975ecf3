# SPDX-License-Identifier: Apache-2.0
"""One shard on disk: an ordinary safetensors file whose vectors can be read by range, and what it says of itself.

A checkpoint holds one such file per shard. Loading on another number of shards reads, from every file, the part that
meets the new span; nothing is converted.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import torch

from distbelief import tensor_file
from distbelief.errors import CheckpointError, OutOfReach
from distbelief.files import AnyPath, Draft, may_be_whole, open_to_read
from distbelief.parameters import Span
from distbelief.tensor_file import TensorFile, TensorReader

_READ_BYTES = 1 << 22


class PushRecord(msgspec.Struct):
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
    replicas: dict[int, PushRecord] = {}
    taken: int = -1
    """The version of the parameters that replicas had fetched and that were taken after a death; -1 for none."""
    heard: list[int] = []
    """Replicas that have pushed since."""
    regained: int = 0
    """Updates that were taken, of those that `lost_updates` counts."""
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


def write(path: AnyPath, vectors: dict[str, torch.Tensor], state: ShardState) -> Draft:
    """Write the vectors straight from their memory; `seal` is to follow. Raises OSError."""
    draft = Draft(path)
    shapes = {name: (vector.dtype, vector.shape) for name, vector in vectors.items()}
    with tensor_file.create(draft.local, shapes, _metadata(state)) as file:
        for name, vector in vectors.items():
            file.write(name, vector)
    return draft


def create(draft: Draft, vectors: Mapping[str, torch.dtype], state: ShardState) -> AbstractContextManager[TensorFile]:
    """A file for vectors of the state's span that are not in memory as a whole. Raises OSError."""
    shape = (state.stop - state.start,)
    return tensor_file.create(draft.local, {name: (dtype, shape) for name, dtype in vectors.items()}, _metadata(state))


def _metadata(state: ShardState) -> dict[str, str]:
    return {"shard": msgspec.json.encode(state).decode()}


def seal(draft: Draft, state: ShardState, *, partial: bool = False, durable: bool = True) -> ShardFile:
    """Put the file where it belongs and describe it; a `durable` one outlives the machine. Raises OSError."""
    draft.finish(durable=durable)
    size_bytes, checksum = measure(draft.local)
    return ShardFile(draft.place.name, state.start, state.stop, size_bytes, checksum, partial)


def measure(path: Path) -> tuple[int, int]:
    """(size in bytes, checksum) of the file. Raises OSError."""
    size_bytes = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            size_bytes, checksum = size_bytes + len(chunk), zlib.crc32(chunk, checksum)
    return size_bytes, checksum


def check(folder: AnyPath, file: ShardFile) -> None:
    """Raise CheckpointError unless the file is there, whole and unchanged; of a file in a store only its size is seen.

    A store keeps checksums of its own, and to read all files here would be to copy them here.
    """
    path = folder / file.name
    try:
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        size_bytes, checksum = measure(path) if isinstance(path, Path) else (path.size_bytes(), file.crc32)
    except OSError as error:
        if may_be_whole(path, error):
            raise OutOfReach(path, error) from error
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if size_bytes != file.size_bytes:
        raise CheckpointError(f"{path} has {size_bytes} bytes, {file.size_bytes} were written")
    if checksum != file.crc32:
        raise CheckpointError(f"{path} was changed since it was written (checksum {checksum}, was {file.crc32})")


def read_state(path: AnyPath) -> ShardState:
    """What the file says of itself. Raises CheckpointError."""
    with _opened(path) as file:
        return msgspec.json.decode(file.metadata["shard"], type=ShardState)


def vectors(folder: AnyPath, files: Sequence[ShardFile]) -> dict[str, torch.dtype]:
    """The names of the vectors that are in any of the files. Raises CheckpointError."""
    found: dict[str, torch.dtype] = {}
    for source in files:
        with _opened(folder / source.name) as file:
            found |= file.dtypes
    return found


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[TensorReader]:
    """What goes wrong with the file is raised as CheckpointError."""
    try:
        with open_to_read(path) as file:
            yield TensorReader(file)
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file anything, of a store what its package raises
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_shard(
    folder: AnyPath, files: Sequence[ShardFile], span: Span, *, own: bool
) -> tuple[dict[str, torch.Tensor], list[ShardState]]:
    """(vectors cut to `span`, what the files that meet it say of themselves); of another algorithm parameters only.

    Raises CheckpointError.
    """
    held = [file for file in files if len(Span(file.start, file.stop).overlap(span))]
    wanted = {name: dtype for name, dtype in vectors(folder, held).items() if own or name == "parameters"}
    found = read_span(folder, held, span, wanted)
    if "parameters" not in found:
        raise CheckpointError(f"{folder} has no parameters of {span.start}..{span.stop}")
    return found, [read_state(folder / file.name) for file in held]


def read_span(
    folder: AnyPath, files: Sequence[ShardFile], span: Span, wanted: Mapping[str, torch.dtype] | None = None
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
        with _opened(folder / source.name) as file:
            for name, dtype in file.dtypes.items():
                if wanted is not None and name not in wanted:
                    continue
                if name not in vectors:
                    vectors[name] = torch.zeros(len(span), dtype=dtype)
                vectors[name][part.within(span)] = file.read(name, part.within(held))
    if missing:
        raise CheckpointError(f"{folder} lacks {missing} of the {len(span)} parameters {span.start}..{span.stop}")
    return vectors
