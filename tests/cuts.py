# SPDX-License-Identifier: Apache-2.0
"""Models cut for several partitions, and checkpoints of them, for the laws of re-cutting and of the export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distbelief import checkpoint, shard_file
from distbelief.buffers import flat_buffers
from distbelief.checkpoint import Manifest
from distbelief.leases import Lease, LeaseState
from distbelief.model_partition import lay_out_pieces
from distbelief.parameters import Layout, Piece, Span, cut, lay_out, trainable
from distbelief.partition.box import count, sizes, split, whole
from distbelief.partition.units import OwnedPiece, units
from distbelief.shard_file import PushRecord, ShardFile, ShardState

LEASES = LeaseState(100, 16, 6, (Lease(3, 0, 48, 64), Lease(5, 0, 80, 96)), 4)


class Vision(nn.Module):
    """A convolution by channels, dense layers by rows, BatchNorm, a frozen layer, a buffer that nobody uses."""

    sample = torch.zeros(2, 2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.frozen = nn.Linear(54, 24).requires_grad_(False)
        self.dense = nn.Linear(24, 24)
        self.out = nn.Linear(24, 5)
        self.register_buffer("unused", torch.arange(3.0) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv(x)).relu())
        output: Tensor = self.out(self.dense(self.frozen(x.flatten(1)).tanh()).tanh())
        return output


class Attention(nn.Module):
    """Heads that are boxes of a view: of the projection of width W as (3, W, W)."""

    sample = torch.zeros(2, 4, dtype=torch.long)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.attention = nn.MultiheadAttention(12, 6, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        output: Tensor = self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        return output


@dataclass(frozen=True)
class Lines:
    """Where the parameters and the buffers of a model lie."""

    layout: Layout
    buffers: Layout


def biases_last(name: str, parameter: nn.Parameter) -> Mapping[str, float]:
    return {"weight_decay": 0.0} if name.endswith("bias") else {}


def lines(model: Callable[[], nn.Module], partitions: int) -> Lines:
    """Of a model cut by units; 0 partitions: uncut, with another order on the line."""
    with torch.device("meta"):
        module = model()
    if partitions < 2:
        groups = biases_last if partitions == 0 else None
        return Lines(lay_out(module, groups), checkpoint.lay_out_buffers(module))
    blueprint = units(module, module.sample, partitions)  # type: ignore[arg-type]
    held = [blueprint.buffers(index) for index in range(partitions)]
    return Lines(lay_out_pieces(module, blueprint, None), checkpoint.lay_out_buffers(module, held))


def by_rows(module: nn.Module) -> Lines:
    """Cut by rows into two; a partition before them holds nothing. Buffers without dimensions are on both."""
    parameters = dict(trainable(module))
    owned = [_half(name, each, part) for part in (0, 1) for name, each in parameters.items() if each.dim() or not part]
    held = [[_half(name, buffer, part) for name, buffer in module.named_buffers()] for part in (0, 1)]
    pieces: list[Piece] = []
    edges = [0]
    for one, following in zip(owned, [*owned[1:], None], strict=True):
        start = pieces[-1].span.stop if pieces else 0
        corner = tuple(low for low, _ in one.box)
        pieces.append(Piece(one.name, sizes(one.box), Span(start, start + count(one.box)), (), one.full_shape, corner))
        if following is not None and following.name == owned[0].name:
            edges.append(pieces[-1].span.stop)
    dtype = next(iter(parameters.values())).dtype
    return Lines(Layout(tuple(pieces), dtype, tuple(edges)), checkpoint.lay_out_buffers(module, [[], *held]))


def _half(name: str, tensor: Tensor, part: int) -> OwnedPiece:
    shape = tuple(tensor.shape)
    box = (split(shape[0], 2)[part], *whole(shape[1:])) if shape else ()
    return OwnedPiece(name, box, shape)


def on_line(layout: Layout, named: Mapping[str, Tensor]) -> Tensor:
    """The line of these whole tensors: what every re-cut has to give."""
    line = torch.empty(layout.length, dtype=layout.dtype)
    for piece in layout.pieces:
        value = named[piece.name]
        if piece.whole is not None:
            box = tuple(slice(low, low + size) for low, size in zip(piece.corner, piece.shape, strict=True))
            value = value.reshape(piece.whole)[box]
        line[piece.span.start : piece.span.stop] = value.reshape(-1)
    return line


def numbers(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Values for all parameters of a module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for name, parameter in trainable(module)
    }


def buffer_numbers(module: nn.Module) -> dict[str, Tensor]:
    """The module's buffers as they lie on their line, whole."""
    return {
        name: flat_buffers({name: buffer}).view(
            torch.view_as_real(buffer).shape if buffer.is_complex() else buffer.shape
        )
        for name, buffer in module.named_buffers()
    }


def write_checkpoint(
    run: Path,
    module: nn.Module,
    where: Lines,
    vectors: Mapping[str, Mapping[str, Tensor]],
    shards: int = 2,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[Path, Manifest]:
    """A checkpoint of vectors (name -> parameter -> value) and buffers, by default the module's, as shards make it.

    The sections of the shards stand at different versions and have heard of different pushes.
    """
    folder = checkpoint.next_folder(checkpoint.home(run))
    flat = {name: on_line(where.layout, named) for name, named in vectors.items()}
    files: list[ShardFile] = []
    for span in cut(where.layout.length, shards):
        for own in where.layout.partitions:
            part = own.overlap(span)
            if len(part):
                files.append(_section(folder, part, flat, len(files)))
    manifests = checkpoint.manifests(module, where.layout, where.buffers, rule="adam(0.1)", seed=3)
    manifest = manifests(incarnation=4, examples=LEASES.issued * 16 - 32, leases=LEASES, shards=files)
    line = on_line(where.buffers, buffer_numbers(module) if buffers is None else buffers)
    parts = [line[span.start : span.stop] for span in where.buffers.partitions]
    return folder, checkpoint.commit(folder, manifest, parts)


def _section(folder: Path, span: Span, vectors: Mapping[str, Tensor], index: int) -> ShardFile:
    pushed = {0: PushRecord(3, 9, {3: 56 + 8 * (index % 2), 4: 80}), 1: PushRecord(3, 7, {6: 4 - index % 3})}
    state = ShardState(
        start=span.start, stop=span.stop, version=10 + index % 3, examples=320 + 32 * (index % 3), mini_batches=11,
        lost_updates=1, scalars={"step": 10.0 + index % 3}, replicas=pushed, staleness={0: 4, 2: 6 + index % 3},
    )  # fmt: skip
    path = folder / f"shard-{index}.safetensors"
    held = {name: vector[span.start : span.stop] for name, vector in vectors.items()}
    return shard_file.seal(shard_file.write(path, held, state), state)


def read_line(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Every vector of a checkpoint."""
    return shard_file.read_span(folder, manifest.shards, Span(0, manifest.layout.layout.length))
