# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the same model under another cut: other partitions, other boxes, another order on the line.

    pieces of the old line     |-w1-|b1|--w2--|  |--w2--|b2|---w3--|      by boxes, one parameter at a time
    a whole parameter                      |----w2----|
    pieces of the new line     |-w1-|b1|----w2----|b2|  |---w3--|

A piece may be a box of a view of its parameter, another one on the other line; what both are boxes of is the
parameter's elements in one row. Shards need no re-cut, they take any span from files that are cut anyhow.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import msgspec
import torch

from distbelief import shard_file
from distbelief.checkpoint import LayoutRecord, Manifest, commit, discard, next_folder, read_replica_positions
from distbelief.errors import CheckpointError
from distbelief.files import AnyPath, Draft
from distbelief.leases import Leases
from distbelief.parameters import Layout, Piece, Span
from distbelief.shard_file import ShardFile

Read = Callable[[Span], torch.Tensor]
"""Gives a range of a line, shape (len(span),)."""

LINE = "line.safetensors"


def recut(
    folder: AnyPath, manifest: Manifest, layout: Layout, buffers: Layout, initial_buffers: Sequence[torch.Tensor]
) -> tuple[AnyPath, Manifest]:
    """A checkpoint with the parameters and buffers on these lines: the given one, or a new one of the same run.

    The new one holds the same values of the same parameters, and has the same examples behind it. A buffer that no
    partition held so far is the initial one. Memory: twice the largest parameter, and the buffers. Raises
    CheckpointError naming the parameter that either line lacks, OSError; the run is then as it was.
    """
    if manifest.fingerprint == layout.fingerprint() and manifest.buffer_layout == LayoutRecord.of(buffers):
        return folder, manifest
    before, buffers_before = manifest.layout.layout, manifest.buffer_layout.layout
    _check_same(folder, before, layout)
    _check_same(folder, *_in_common(buffers_before, buffers))
    leases, examples = manifest.leases, manifest.examples
    if leases is not None:
        # How many epochs there will be makes no difference to what is settled.
        resumed = Leases.resumed(leases, 0, read_replica_positions(folder, manifest))
        leases, examples = resumed.state(), resumed.settled_examples
    target = next_folder(folder.parent)
    with contextlib.ExitStack() as undo:
        undo.callback(discard, target)
        file = _write_line(target / LINE, folder, manifest, layout)
        line = torch.cat([*initial_buffers, torch.empty(0, dtype=buffers.dtype)])
        _move(
            *_in_common(buffers_before, buffers), buffer_reader(folder, manifest),
            lambda values, start: line[start : start + len(values)].copy_(values),
        )  # fmt: skip
        manifest = msgspec.structs.replace(
            manifest, fingerprint=layout.fingerprint(), layout=LayoutRecord.of(layout),
            buffer_layout=LayoutRecord.of(buffers), leases=leases, examples=examples,
            shards=[file],
        )  # fmt: skip
        manifest = commit(target, manifest, [line])
        undo.pop_all()
    return target, manifest


def _write_line(path: AnyPath, folder: AnyPath, manifest: Manifest, layout: Layout) -> ShardFile:
    """Every vector of the checkpoint, cut anew, in one file.

    What replicas have pushed so far is in the leases by now, and they will be other incarnations.
    """
    files = manifest.shards
    newest = max((shard_file.read_state(folder / file.name) for file in files), key=lambda state: state.version)
    state = msgspec.structs.replace(newest, start=0, stop=layout.length, replicas={})
    vectors = shard_file.vectors(folder, files)
    draft = Draft(path)
    with shard_file.create(draft, vectors, state) as line:
        for vector in vectors:
            read = vector_reader(folder, manifest, vector)
            _move(manifest.layout.layout, layout, read, partial(line.write, vector))
    return shard_file.seal(draft, state)


def vector_reader(folder: AnyPath, manifest: Manifest, name: str) -> Read:
    """Reads ranges of one vector on the line of the parameters. Raises CheckpointError when there is none."""
    return _reader(folder, manifest.shards, name)


def buffer_reader(folder: AnyPath, manifest: Manifest) -> Read:
    """Reads ranges of the line of the buffers."""
    assert manifest.buffers is not None
    return _reader(folder, [manifest.buffers], "buffers")


def _reader(folder: AnyPath, files: Sequence[ShardFile], name: str) -> Read:
    vectors = shard_file.vectors(folder, files)
    if name not in vectors:
        raise CheckpointError(f"{folder} has no {name} in {', '.join(file.name for file in files)}")
    return lambda span: shard_file.read_span(folder, files, span, {name: vectors[name]})[name]


def _move(before: Layout, after: Layout, read: Read, write: Callable[[torch.Tensor, int], object]) -> None:
    """Write each piece of the new line, in one row, where it begins, from what can be read of the old line."""
    wanted = by_name(after)
    for name, pieces in by_name(before).items():
        values = uncut(pieces, read)
        for piece in wanted[name]:
            shape, box = _box(piece)
            write(values.view(shape)[box].reshape(-1), piece.span.start)
        del values  # before the next ones are made


def by_name(layout: Layout) -> dict[str, list[Piece]]:
    """The pieces of each parameter, in the order of the line."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in layout.pieces:
        pieces[piece.name].append(piece)
    return dict(pieces)


def uncut(pieces: Sequence[Piece], read: Read) -> torch.Tensor:
    """The elements of one parameter, in one row, put together from its pieces.

    What several pieces hold is taken from the first of them.
    """
    whole: torch.Tensor | None = None
    for piece in reversed(pieces):
        values, (shape, box) = read(piece.span), _box(piece)
        if piece.shape == shape:
            whole = values
            continue
        if whole is None:
            whole = values.new_empty(math.prod(shape))
        whole.view(shape)[box] = values.view(piece.shape)
    assert whole is not None
    return whole


def check_covered(where: AnyPath | str, name: str, pieces: Sequence[Piece], elements: int) -> None:
    """Raise CheckpointError unless the pieces hold all of the so many elements of a parameter."""
    covered = torch.zeros(elements, dtype=torch.bool)
    for piece in pieces:
        shape, box = _box(piece)
        if math.prod(shape) != elements:
            raise CheckpointError(f"{where} has {math.prod(shape)} elements of {name}, not {elements}")
        covered.view(shape)[box] = True
    lacking = elements - int(covered.sum())
    if lacking or not pieces:
        raise CheckpointError(f"{where} lacks {lacking} of the {elements} elements of {name}")


def _in_common(one: Layout, other: Layout) -> tuple[Layout, Layout]:
    """Both lines without what only one of them has."""
    names = by_name(one).keys() & by_name(other).keys()
    first, second = (
        replace(line, pieces=tuple(piece for piece in line.pieces if piece.name in names)) for line in (one, other)
    )
    return first, second


def _check_same(folder: AnyPath, before: Layout, after: Layout) -> None:
    """Raise CheckpointError unless both lines hold all elements of the same parameters."""
    held, wanted = by_name(before), by_name(after)
    for name, pieces in (held | wanted).items():
        elements = math.prod(_box(pieces[0])[0])
        check_covered(folder, name, held.get(name, []), elements)
        check_covered("the new cut", name, wanted.get(name, []), elements)


def _box(piece: Piece) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """What the piece is a box of, and the index of the box in it."""
    if piece.whole is None:
        return piece.shape, tuple(slice(0, size) for size in piece.shape)
    return piece.whole, tuple(slice(low, low + size) for low, size in zip(piece.corner, piece.shape, strict=True))
