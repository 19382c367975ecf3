# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: every shard's file, the leases and the buffers, complete or not at all.

    run/
      checkpoints/00000042/          the number is the order of writing
        shard-0-0.safetensors ...    parameters and rule state by span, each at one version
        buffers.safetensors          mean of the buffers of replicas at work, partition after partition
        manifest.json                written last, atomically: without it the folder is no checkpoint

Where not all hosts see the run folder, `checkpoints` is a file that names a place in a store, which holds the folders.
The leases are noted before the shards are asked, and what is settled has been acknowledged by every shard; so a
checkpoint never claims an example whose gradient it does not hold. What lies where on the line is in the manifest: the
files can be read without the model, and be cut again.
"""

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import nn

from distbelief import shard_file
from distbelief.errors import CheckpointError, OtherFormat, OutOfReach
from distbelief.files import MALFORMED, AnyPath, children, copy, may_be_whole, open_over, path_of, remove
from distbelief.lbfgs import SolverState
from distbelief.leases import LeaseState
from distbelief.parameters import Layout, Piece, Span, changed_pieces, trainable
from distbelief.partition.box import count, sizes, whole
from distbelief.partition.units import OwnedPiece
from distbelief.shard_file import ShardFile, ShardState

FORMAT = 2
HOME, MANIFEST, PART = "checkpoints", "manifest.json", "manifest.json.part"
BUFFERS = "buffers.safetensors"
BUFFERS_DTYPE = torch.float64
SPARE_BYTES = 1 << 20


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a piece lies; its options are not kept, they are the job's."""

    name: str
    shape: tuple[int, ...]
    start: int
    whole: tuple[int, ...] | None
    corner: tuple[int, ...]


class LayoutRecord(msgspec.Struct, frozen=True):
    """A layout, as a manifest keeps it."""

    dtype: str
    edges: tuple[int, ...]
    places: tuple[Place, ...]

    @classmethod
    def of(cls, layout: Layout) -> "LayoutRecord":
        """The record of a layout."""
        places = (
            Place(piece.name, piece.shape, piece.span.start, piece.whole, piece.corner) for piece in layout.pieces
        )
        return cls(str(layout.dtype), layout.edges, tuple(places))

    @property
    def layout(self) -> Layout:
        """The layout again, without the options of its pieces."""
        pieces = (
            Piece(
                place.name, place.shape, Span(place.start, place.start + math.prod(place.shape)),
                whole=place.whole, corner=place.corner,
            )
            for place in self.places
        )  # fmt: skip
        return Layout(tuple(pieces), getattr(torch, self.dtype.removeprefix("torch.")), self.edges)


class Search(msgspec.Struct, frozen=True):
    """Where Sandblaster was."""

    solver: SolverState
    version: int
    """Of the last step that moved the point; what the shards' files hold is the point after it."""
    examples: int
    """Examples in the data."""
    objective: str
    """Penalties, bounds and batches: the history of another objective is of no use."""
    computed: int = 0
    """Examples whose gradients were added up, over all evaluations."""
    round_trips: int = 0
    """To the shards, over all evaluations."""
    backed_up: int = 0
    """Copies of slow bundles that were handed out."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a folder a checkpoint."""

    format: int
    fingerprint: str
    """Of the layout."""
    pieces: dict[str, tuple[int, ...]]
    """Shapes of the whole parameters, however the model is cut."""
    layout: LayoutRecord
    buffer_layout: LayoutRecord
    """Of the buffers, which are a line of their own: see `lay_out_buffers`."""
    rule: str
    seed: int
    incarnation: int
    """No role that pushed into these shards had this incarnation or a higher one."""
    examples: int
    lost_updates: int = 0
    """Pushes that deaths of shards had lost."""
    leases: LeaseState | None = None
    """Of Downpour."""
    search: Search | None = None
    """Of Sandblaster."""
    shards: list[ShardFile]
    buffers: ShardFile | None = None
    """Filled in by `commit`."""


class Versioned(msgspec.Struct, frozen=True):
    """What a manifest of any version holds."""

    format: int


class Proved(msgspec.Struct, frozen=True):
    """The file of a manifest: its text, and the checksum that proves it unchanged."""

    crc32: int
    manifest: msgspec.Raw


def manifests(module: nn.Module, layout: Layout, buffers: Layout, *, rule: str, seed: int) -> Callable[..., Manifest]:
    """Makes the manifests of a model of such parts, which may be on the meta device, of what differs between them."""
    return partial(
        Manifest, format=FORMAT, fingerprint=layout.fingerprint(), pieces=_shapes(module), rule=rule, seed=seed,
        layout=LayoutRecord.of(layout), buffer_layout=LayoutRecord.of(buffers),
    )  # fmt: skip


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in trainable(module)}


def lay_out_buffers(module: nn.Module, held: Sequence[Sequence[OwnedPiece]] | None = None) -> Layout:
    """Where the buffers of the model lie: partition after partition, each as what it has `held`, by default one of all.

    A complex buffer lies there as its real and imaginary parts. One that several partitions hold is there repeatedly.
    """
    named = dict(module.named_buffers())
    if held is None:
        held = [[OwnedPiece(name, whole(buffer.shape), tuple(buffer.shape)) for name, buffer in named.items()]]
    pieces: list[Piece] = []
    edges: list[int] = []
    start = 0
    for partition in held:
        for owned in partition:
            pair = (2,) if named[owned.name].is_complex() else ()
            box, full_shape = (*owned.box, *whole(pair)), (*owned.full_shape, *pair)
            span = Span(start, start + count(box))
            corner = tuple(low for low, _ in box)
            pieces.append(Piece(owned.name, sizes(box), span, whole=full_shape, corner=corner))
            start = span.stop
        edges.append(start)
    return Layout(tuple(pieces), BUFFERS_DTYPE, tuple(edges[:-1]))


def home(run: Path) -> AnyPath:
    """The folder of a run's checkpoints: `checkpoints` in the run folder, or what the file of that name says."""
    own = (run / HOME).absolute()  # other processes have other working directories
    return path_of(own.read_text()) if own.is_file() else own


def keep_elsewhere(run: Path, store: str) -> None:
    """Let the checkpoints of a new run go to this place, which is tried. Raises OSError, CheckpointError."""
    folder = path_of(store)
    if any(child.name.isdecimal() for child in children(folder)):
        raise CheckpointError("it holds those of another run")
    try_store(folder)
    (run / HOME).write_text(store)


def try_store(folder: AnyPath) -> None:
    """Write there and remove it again. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe").write_bytes(b"0" * 4096)
    remove(folder / "probe")


def folders(run: Path) -> list[AnyPath]:
    """The checkpoint folders of a run, newest first, complete or not."""
    return _folders(home(run))


def _folders(home: AnyPath) -> list[AnyPath]:
    found = [folder for folder in children(home) if folder.name.isdecimal() and folder.is_dir()]
    return sorted(found, key=lambda folder: folder.name, reverse=True)


def next_folder(home: AnyPath, spare: AnyPath | None = None) -> AnyPath:
    """A new folder after all checkpoints that exist there, perhaps made of a `spare` one. Raises OSError.

    A run folder that somebody has moved is not made anew: it would hold checkpoints that nothing can be done with.
    """
    existing = _folders(home)
    folder = home / f"{int(existing[0].name) + 1 if existing else 0:08d}"
    if isinstance(spare, Path) and isinstance(folder, Path):
        with contextlib.suppress(OSError):  # somebody may have removed it
            return spare.rename(folder)
    if isinstance(home, Path):
        try:
            home.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the folder {home.parent} is gone: it was removed or renamed") from error
    folder.mkdir()
    return folder


def make_spare(folder: AnyPath, manifest: Manifest) -> bool:
    """Make of a small checkpoint a folder whose files are written over; the answer is whether it was done.

    A new file can take the disk a millisecond, which is long beside an iteration of a small model. Large ones are not
    written over: somebody may be in the middle of reading them.
    """
    files = [*(file for file in manifest.shards if not file.partial), *([manifest.buffers] if manifest.buffers else [])]
    whole = {file.name: file.size_bytes for file in files}
    if not isinstance(folder, Path) or sum(whole.values()) > SPARE_BYTES:
        return False
    try:
        (folder / MANIFEST).rename(folder / PART)
        for child in folder.iterdir():
            if (child.name not in whole and child.name != PART) or child.stat().st_nlink > 1:
                child.unlink()
    except OSError:
        return False
    return True


def commit(folder: AnyPath, manifest: Manifest, buffers: Sequence[torch.Tensor], *, durable: bool = True) -> Manifest:
    """Make the folder a checkpoint: buffers, then the manifest, in that order.

    One that is not `durable` outlives processes, but perhaps not the machine: nothing is forced to disk. `buffers` are
    those of each partition on their line. Returns what the manifest became. Raises OSError.
    """
    line = torch.cat([*buffers, torch.empty(0, dtype=BUFFERS_DTYPE)])
    state = ShardState(start=0, stop=len(line))
    draft = shard_file.write(folder / BUFFERS, {"buffers": line}, state)
    manifest = msgspec.structs.replace(manifest, buffers=shard_file.seal(draft, state, durable=durable))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    sealed = msgspec.json.encode(Proved(zlib.crc32(text), msgspec.Raw(text)))
    if isinstance(folder, Path):
        _write_at_once(folder, sealed, durable)
    else:
        (folder / MANIFEST).write_bytes(sealed)
    return manifest


def _write_at_once(folder: Path, sealed: bytes, durable: bool) -> None:
    part = folder / PART
    with open_over(part) as file:
        file.write(sealed)
        file.truncate()
        file.flush()
        if durable:
            os.fsync(file.fileno())
    part.rename(folder / MANIFEST)
    for directory in (folder, folder.parent) if durable else ():
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def share(source: AnyPath, file: ShardFile, folder: AnyPath) -> ShardFile:
    """Let a file of the checkpoint `source` be one of `folder`, too; no copy where the disk can. Raises OSError."""
    there = shared(source, file)
    copy(source / file.name, folder / there.name)
    return there


def shared(source: AnyPath, file: ShardFile) -> ShardFile:
    """A file of the checkpoint `source` as later ones name it: by where it was written first."""
    name = file.name if file.name[0].isdecimal() else f"{source.name}-{file.name}"
    return msgspec.structs.replace(file, name=name)


def discard(folder: AnyPath) -> None:
    """Remove a checkpoint or what there is of it; a manifest goes first, so that nothing half removed counts."""
    remove(folder / MANIFEST)
    remove(folder)


def complete(run: Path) -> list[AnyPath]:
    """The checkpoints of a run that were completed, newest first, damaged since or not. Raises OSError."""
    return [folder for folder in folders(run) if (folder / MANIFEST).exists()]


def keep_newest(run: Path, count: int) -> None:
    """Remove all complete checkpoints but the newest `count`, and incomplete ones older than the newest.

    Of a store that is out of reach, at another time.
    """
    with contextlib.suppress(OSError):
        kept = complete(run)[:count]
        for folder in folders(run):
            if kept and folder.name < kept[0].name and folder not in kept:
                discard(folder)


def read_manifest(folder: AnyPath) -> Manifest:
    """The manifest, with every file checked. Raises CheckpointError."""
    try:
        sealed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Proved)
        if zlib.crc32(sealed.manifest) != sealed.crc32:
            raise CheckpointError(f"{folder / MANIFEST} was changed since it was written")
        if (written := msgspec.json.decode(sealed.manifest, type=Versioned).format) != FORMAT:
            raise OtherFormat(
                f"{folder} was written by another version of distbelief: it has format {written}, this version reads "
                f"{FORMAT}\nhint: go on with the version that wrote it, or train anew in another run folder"
            )
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} was not completed") from error
    except (OSError, *MALFORMED) as error:
        if isinstance(error, OSError) and may_be_whole(folder, error):
            raise OutOfReach(folder / MANIFEST, error) from error
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    for file in (*manifest.shards, *([manifest.buffers] if manifest.buffers else [])):
        shard_file.check(folder, file)
    return manifest


def newest(run: Path, rejected: Callable[[AnyPath, str], None]) -> tuple[AnyPath, Manifest]:
    """The newest checkpoint that is whole; `rejected` hears of each damaged one passed over. Raises CheckpointError.

    One of another version is not damaged: what was trained since the one before it would be lost.
    """
    try:
        found = folders(run)
    except OSError as error:
        raise OutOfReach(home(run), error) from error
    reasons = []
    for folder in found:
        try:
            return folder, read_manifest(folder)
        except (OtherFormat, OutOfReach):
            raise  # an older one would be whole, but not the newest
        except CheckpointError as error:
            rejected(folder, str(error))
            reasons.append(str(error))
    damaged = f"; the newest of its {len(reasons)} is damaged: {reasons[0]}" if reasons else ""
    raise CheckpointError(
        f"{run} holds no complete checkpoint{damaged}\nhint: nothing can be resumed or exported from it; train it anew"
    )


def check_same_model(manifest: Manifest, module: nn.Module, folder: AnyPath) -> None:
    """Raise CheckpointError naming the parameters that differ from the checkpoint's, however either model is cut.

    The module may be on the meta device.
    """
    differences = changed_pieces(manifest.pieces, _shapes(module))
    dtypes = {str(parameter.dtype) for _, parameter in trainable(module)} - {manifest.layout.dtype}
    differences += [f"its parameters are {dtype}, the checkpoint's {manifest.layout.dtype}" for dtype in dtypes]
    if not differences:
        return
    shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
    raise CheckpointError(
        f"{folder} is of another model: {shown}\nhint: resume with the model that the run was started with"
    )


def read_buffers(folder: AnyPath, manifest: Manifest) -> list[torch.Tensor]:
    """The buffers of each partition, as they were committed. Raises CheckpointError."""
    assert manifest.buffers is not None
    line = shard_file.read_span(folder, [manifest.buffers], Span(0, manifest.buffers.stop), {"buffers": BUFFERS_DTYPE})
    return [line["buffers"][span.start : span.stop] for span in manifest.buffer_layout.layout.partitions]


def read_replica_positions(folder: AnyPath, manifest: Manifest) -> Iterator[dict[int, int]]:
    """Per shard: lease -> position up to which its examples are in its file, as far as the leases do not say."""
    alive = None if manifest.leases is None else manifest.leases.alive
    for file in manifest.shards:
        positions: dict[int, int] = {}
        for replica, record in shard_file.read_state(folder / file.name).replicas.items():
            if alive is not None and record.incarnation < alive.get(replica, record.incarnation + 1):
                continue
            for lease, position in record.portions.items():
                positions[lease] = max(position, positions.get(lease, 0))
        yield positions
