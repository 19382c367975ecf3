# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: every shard's file, the leases and the buffers, complete or not at all.

    run/
      checkpoints/00000042/          the number is the order of writing
        shard-0.safetensors ...      parameters and rule state by span, each at one version
        buffers.safetensors          mean of the live replicas' buffers
        manifest.json                written last, atomically: without it the folder is no checkpoint

The leases are noted before the shards are asked, and what is settled has been acknowledged by every shard; so a
checkpoint never claims an example whose gradient it does not hold.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from distbelief import shard_file
from distbelief.errors import CheckpointError
from distbelief.parameters import Layout, Span, changed_pieces
from distbelief.portions import LeaseState
from distbelief.shard_file import ShardFile, ShardState

FORMAT = 1
MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a folder a checkpoint."""

    format: int
    fingerprint: str
    pieces: dict[str, tuple[int, ...]]
    dtype: str
    rule: str
    seed: int
    incarnation: int
    """No role that pushed into these shards had this incarnation or a higher one."""
    examples: int
    leases: LeaseState
    shards: list[ShardFile]
    buffers: ShardFile | None = None
    """Filled in by `commit`."""


class Sealed(msgspec.Struct, frozen=True):
    """The file of a manifest: its text, and the checksum that proves it unchanged."""

    crc32: int
    manifest: msgspec.Raw


def folders(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, complete or not."""
    found = (run / "checkpoints").glob("*")
    return sorted((folder for folder in found if folder.name.isdecimal() and folder.is_dir()), reverse=True)


def next_folder(run: Path) -> Path:
    """A new folder after all that exist. Raises OSError."""
    existing = folders(run)
    folder = run / "checkpoints" / f"{int(existing[0].name) + 1 if existing else 0:08d}"
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, manifest: Manifest, buffers: torch.Tensor) -> None:
    """Make the folder a checkpoint: buffers, then the manifest, forced to disk in that order. Raises OSError."""
    whole = ShardState(start=0, stop=len(buffers))
    shard_file.write(folder / BUFFERS, {"buffers": buffers}, whole)
    manifest = msgspec.structs.replace(manifest, buffers=shard_file.seal(folder / BUFFERS, whole))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    part = folder / (MANIFEST + ".part")
    with part.open("wb") as file:
        file.write(msgspec.json.encode(Sealed(zlib.crc32(text), msgspec.Raw(text))))
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / MANIFEST)
    for directory in (folder, folder.parent):
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a checkpoint or what there is of it; a manifest goes first, so that nothing half removed counts."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def keep_newest(run: Path, count: int) -> None:
    """Remove all complete checkpoints but the newest `count`, and incomplete ones older than the newest."""
    complete = [folder for folder in folders(run) if (folder / MANIFEST).exists()]
    for folder in folders(run):
        if complete and folder < complete[0] and folder not in complete[:count]:
            discard(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, with every file checked. Raises CheckpointError."""
    try:
        sealed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Sealed)
        if zlib.crc32(sealed.manifest) != sealed.crc32:
            raise CheckpointError(f"{folder / MANIFEST} was changed since it was written")
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} was not completed") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.format}, this version reads {FORMAT}")
    for file in (*manifest.shards, *([manifest.buffers] if manifest.buffers else [])):
        shard_file.check(folder, file)
    return manifest


def newest(run: Path, rejected: Callable[[Path, str], None]) -> tuple[Path, Manifest]:
    """The newest checkpoint that is whole; `rejected` hears of each damaged one passed over. Raises CheckpointError."""
    for folder in folders(run):
        try:
            return folder, read_manifest(folder)
        except CheckpointError as error:
            rejected(folder, str(error))
    raise CheckpointError(f"{run} holds no complete checkpoint; nothing can be resumed or exported from it")


def check_same_model(manifest: Manifest, layout: Layout, folder: Path) -> None:
    """Raise CheckpointError naming the parameters that differ from the checkpoint's."""
    if manifest.fingerprint == layout.fingerprint():
        return
    differences = changed_pieces(manifest.pieces, {piece.name: piece.shape for piece in layout.pieces})
    if not differences:
        differences = [f"the order of the parameters or their dtype changed (the checkpoint has {manifest.dtype})"]
    shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
    raise CheckpointError(
        f"{folder} is of another model: {shown}\nhint: resume with the model that the run was started with"
    )


def read_vector(folder: Path, manifest: Manifest) -> torch.Tensor:
    """The whole parameter vector, shape (n,)."""
    length = max(file.stop for file in manifest.shards)
    return shard_file.read_span(folder, manifest.shards, Span(0, length))["parameters"]


def read_buffers(folder: Path) -> torch.Tensor:
    """The buffers as `flat_buffers` makes them, float64. Raises CheckpointError."""
    try:
        return load_file(folder / BUFFERS)["buffers"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder / BUFFERS} cannot be read: {error}") from error


def read_replica_positions(folder: Path, manifest: Manifest) -> Iterator[dict[int, int]]:
    """Per shard: lease -> position up to which its examples are in the shard's file, over all replicas."""
    for file in manifest.shards:
        positions: dict[int, int] = {}
        for record in shard_file.read_state(folder / file.name).replicas.values():
            for lease, position in record.portions.items():
                positions[lease] = max(position, positions.get(lease, 0))
        yield positions
