# SPDX-License-Identifier: Apache-2.0
"""Laws of re-cutting: the same values of the same parameters on every cut, the same examples behind them, no holes."""

import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import final

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from distbelief import checkpoint, shard_file
from distbelief.buffers import flat_buffers
from distbelief.checkpoint import Manifest
from distbelief.errors import CheckpointError
from distbelief.export import export, write_template
from distbelief.leases import Leases, LeaseState
from distbelief.parameters import Layout, Piece, Span, lay_out
from distbelief.recut import recut
from tests.cuts import (
    LEASES,
    Attention,
    Lines,
    Vision,
    buffer_numbers,
    by_rows,
    lines,
    numbers,
    on_line,
    read_line,
    write_checkpoint,
)

ADAM = ("parameters", "exp_avg", "exp_avg_sq")


def trained(model: Callable[[], nn.Module]) -> nn.Module:
    """A module whose buffers training has changed."""
    torch.manual_seed(1)
    module = model()
    for name, buffer in module.named_buffers():
        if name.startswith("norm"):
            buffer.copy_(torch.rand(buffer.shape) * 9 + 2)
    return module


def initial(model: Callable[[], nn.Module], where: Lines) -> list[Tensor]:
    line = on_line(where.buffers, buffer_numbers(model()))
    return [line[span.start : span.stop] for span in where.buffers.partitions]


@pytest.mark.parametrize("model", [Vision, Attention])
def test_every_vector_and_buffer_is_the_same_under_every_cut_and_back(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    module = trained(model)
    vectors = {name: numbers(module, seed) for seed, name in enumerate(ADAM)}
    cuts = {partitions: lines(model, partitions) for partitions in (0, 1, 2, 3)}
    folder, manifest = write_checkpoint(tmp_path, module, cuts[3], vectors)
    for partitions in (2, 1, 3, 0, 3, 1, 2, 0):
        where = cuts[partitions]
        newer, manifest = recut(folder, manifest, where.layout, where.buffers, initial(model, where))
        assert newer == folder.with_name(f"{int(folder.name) + 1:08d}")
        folder = newer
        assert checkpoint.newest(tmp_path, lambda path, reason: pytest.fail(reason)) == (folder, manifest)
        checkpoint.check_same_model(manifest, module, folder)
        found = read_line(folder, manifest)
        assert found.keys() == set(ADAM)
        for name in ADAM:
            assert torch.equal(found[name], on_line(where.layout, vectors[name])), (partitions, name)
        expected = on_line(where.buffers, buffer_numbers(module))
        buffers = checkpoint.read_buffers(folder, manifest)
        assert torch.equal(torch.cat(buffers), expected)
        assert [len(each) for each in buffers] == [len(span) for span in where.buffers.partitions]


def test_on_one_partition_the_buffers_are_those_of_the_module(tmp_path: Path) -> None:
    module, where = trained(Vision), lines(Vision, 1)
    folder, manifest = write_checkpoint(tmp_path, module, lines(Vision, 3), {"parameters": numbers(module, 0)})
    folder, manifest = recut(folder, manifest, where.layout, where.buffers, initial(Vision, where))
    (buffers,) = checkpoint.read_buffers(folder, manifest)
    assert torch.equal(buffers, flat_buffers(dict(module.named_buffers())))


def test_a_buffer_that_several_partitions_hold_is_taken_from_the_first(tmp_path: Path) -> None:
    module, three, one = trained(Vision), lines(Vision, 3), lines(Vision, 1)
    folder, manifest = write_checkpoint(tmp_path, module, three, {"parameters": numbers(module, 0)})
    held = [piece for piece in three.buffers.pieces if piece.name == "norm.num_batches_tracked"]
    assert len(held) == 3
    buffers = checkpoint.read_buffers(folder, manifest)
    for number, (values, own, piece) in enumerate(zip(buffers, three.buffers.partitions, held, strict=True)):
        values[piece.span.within(own)] = 100 + number
    manifest = checkpoint.commit(folder, manifest, buffers)
    folder, manifest = recut(folder, manifest, one.layout, one.buffers, initial(Vision, one))
    names = [name for name, buffer in module.named_buffers() for _ in range(buffer.numel())]
    assert checkpoint.read_buffers(folder, manifest)[0][names.index("norm.num_batches_tracked")] == 100


def test_a_checkpoint_that_is_cut_so_already_is_the_answer(tmp_path: Path) -> None:
    module, where = trained(Vision), lines(Vision, 3)
    folder, manifest = write_checkpoint(tmp_path, module, where, {"parameters": numbers(module, 0)})
    again = lines(Vision, 3)
    assert recut(folder, manifest, again.layout, again.buffers, []) == (folder, manifest)
    assert checkpoint.folders(tmp_path) == [folder]


def test_where_the_buffers_alone_lie_otherwise_they_are_cut_anew(tmp_path: Path) -> None:
    module, where = trained(Vision), lines(Vision, 1)
    folder, manifest = write_checkpoint(tmp_path, module, where, {"parameters": numbers(module, 0)})
    own = flat_buffers(dict(module.named_buffers()))
    module.register_buffer("added", torch.tensor([5.0, 6.0]))
    buffers, start = checkpoint.lay_out_buffers(module), [*torch.zeros(1, len(own), dtype=torch.float64), own[:2]]
    folder, manifest = recut(folder, manifest, where.layout, buffers, start)
    named = {piece.name: piece.span for piece in buffers.pieces}
    (found,) = checkpoint.read_buffers(folder, manifest)
    added = named["added"]
    assert torch.equal(found[added.start : added.stop], torch.cat(start)[added.start : added.stop])
    assert torch.equal(torch.cat([found[: added.start], found[added.stop :]]), own)


def test_no_example_is_lost_or_repeated_by_a_recut(tmp_path: Path) -> None:
    module, where = trained(Attention), lines(Attention, 1)
    folder, manifest = write_checkpoint(tmp_path, module, lines(Attention, 3), {"parameters": numbers(module, 0)})

    def resumed(folder: Path, manifest: Manifest) -> tuple[LeaseState, int, int]:
        leases = Leases.resumed(manifest.leases, 5, checkpoint.read_replica_positions(folder, manifest))
        return leases.state(), leases.settled_examples, leases.examples_to_come

    before = resumed(folder, manifest)
    assert before[0] != LEASES
    assert before[0].repeated > LEASES.repeated
    newer, moved = recut(folder, manifest, where.layout, where.buffers, [])
    assert resumed(newer, moved) == before
    assert moved.examples == before[1]


def test_the_new_file_is_as_far_as_the_newest_of_the_old(tmp_path: Path) -> None:
    module, where = trained(Attention), lines(Attention, 1)
    folder, manifest = write_checkpoint(tmp_path, module, lines(Attention, 3), {"parameters": numbers(module, 0)})
    newest = max(
        (shard_file.read_state(folder / file.name) for file in manifest.shards), key=lambda state: state.version
    )
    newer, moved = recut(folder, manifest, where.layout, where.buffers, [])
    (file,) = moved.shards
    state = shard_file.read_state(newer / file.name)
    assert (state.start, state.stop) == (file.start, file.stop) == (0, where.layout.length)
    assert state == msgspec.structs.replace(newest, start=0, stop=where.layout.length, replicas={})
    assert (moved.rule, moved.seed, moved.incarnation) == (manifest.rule, manifest.seed, manifest.incarnation)


def test_a_vector_that_some_sections_have_not_yet_is_zero_there(tmp_path: Path) -> None:
    module, three, one = trained(Vision), lines(Vision, 3), lines(Vision, 1)
    values = numbers(module, 0)
    folder, manifest = write_checkpoint(tmp_path, module, three, {"parameters": values, "sum": numbers(module, 1)}, 1)
    first = manifest.shards[0]
    path = folder / first.name
    state, own = shard_file.read_state(path), Span(first.start, first.stop)
    draft = shard_file.write(path, {"parameters": on_line(three.layout, values)[own.start : own.stop]}, state)
    manifest = msgspec.structs.replace(manifest, shards=[shard_file.seal(draft, state), *manifest.shards[1:]])
    later = on_line(three.layout, numbers(module, 1))
    later[own.start : own.stop] = 0
    expected = {name: torch.empty(value.shape) for name, value in values.items()}
    for piece in three.layout.pieces:
        assert piece.whole is not None
        box = tuple(slice(low, low + size) for low, size in zip(piece.corner, piece.shape, strict=True))
        expected[piece.name].view(piece.whole)[box] = later[piece.span.start : piece.span.stop].view(piece.shape)
    newer, moved = recut(folder, manifest, one.layout, one.buffers, initial(Vision, one))
    assert torch.equal(read_line(newer, moved)["sum"], on_line(one.layout, expected))


def without(layout: Layout, gone: Piece) -> Layout:
    return replace(layout, pieces=tuple(piece for piece in layout.pieces if piece != gone))


def test_a_hole_is_refused_by_the_name_of_the_parameter_and_changes_nothing(tmp_path: Path) -> None:
    module, three, one = trained(Vision), lines(Vision, 3), lines(Vision, 1)
    box = three.layout.pieces[0]
    assert (box.name, box.shape) == ("conv.weight", (2, 2, 3, 3))
    holed = Lines(without(three.layout, box), three.buffers)
    folder, manifest = write_checkpoint(tmp_path, module, holed, {"parameters": numbers(module, 0)})
    with pytest.raises(CheckpointError, match=rf"{folder} lacks 36 of the 108 elements of conv\.weight"):
        recut(folder, manifest, one.layout, one.buffers, initial(Vision, one))
    whole = write_checkpoint(tmp_path, module, one, {"parameters": numbers(module, 0)})
    with pytest.raises(CheckpointError, match=r"the new cut lacks 36 of the 108 elements of conv\.weight"):
        recut(*whole, holed.layout, holed.buffers, initial(Vision, holed))
    bias = one.layout.pieces[1]
    for there, missing in ((one.layout, without(one.layout, bias)), (without(one.layout, bias), one.layout)):
        source = write_checkpoint(tmp_path, module, Lines(there, one.buffers), {"parameters": numbers(module, 0)})
        with pytest.raises(CheckpointError, match=r"lacks 6 of the 6 elements of conv\.bias"):
            recut(*source, missing, one.buffers, initial(Vision, one))
    mean = three.buffers.pieces[0]
    source = write_checkpoint(
        tmp_path, module, Lines(three.layout, without(three.buffers, mean)), {"parameters": numbers(module, 0)}
    )
    with pytest.raises(CheckpointError, match=r"lacks 2 of the 6 elements of norm\.running_mean"):
        recut(*source, one.layout, one.buffers, initial(Vision, one))
    assert len(checkpoint.folders(tmp_path)) == len(checkpoint.complete(tmp_path)) == 5


def test_a_parameter_or_buffer_of_another_size_is_refused(tmp_path: Path) -> None:
    module, where = trained(Vision), lines(Vision, 1)
    folder, manifest = write_checkpoint(tmp_path, module, lines(Vision, 3), {"parameters": numbers(module, 0)})

    class Wider(Vision):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

    wider = lines(Wider, 1)
    for layout, buffers, name in ((wider.layout, where.buffers, "weight"), (where.layout, wider.buffers, "running_m")):
        with pytest.raises(CheckpointError, match=rf"has 6 elements of norm\.{name}\w*, not 8"):
            recut(folder, manifest, layout, buffers, [])


def test_a_recut_that_breaks_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, where = trained(Vision), lines(Vision, 1)
    folder, manifest = write_checkpoint(tmp_path, module, lines(Vision, 3), {"parameters": numbers(module, 0)})
    (folder / manifest.shards[-1].name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        recut(folder, manifest, where.layout, where.buffers, initial(Vision, where))
    assert checkpoint.folders(tmp_path) == [folder]
    folder, manifest = write_checkpoint(tmp_path, module, lines(Vision, 3), {"parameters": numbers(module, 0)})

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        recut(folder, manifest, where.layout, where.buffers, initial(Vision, where))
    assert checkpoint.folders(tmp_path)[0] == folder


@pytest.mark.slow
def test_neither_a_recut_nor_an_export_holds_more_than_two_parameters(tmp_path: Path) -> None:
    # In a process of its own, for what other tests have allocated and freed would count, and with a malloc that gives
    # back at once what is freed.
    told = subprocess.run(
        [sys.executable, "-c", f"from tests.test_recut import most_held; most_held({str(tmp_path)!r})"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True, timeout=100,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    recutting, exporting, bytes_each = map(int, told.stdout.split())
    assert bytes_each < recutting < 3 * bytes_each
    assert bytes_each < exporting < 3 * bytes_each


def most_held(folder_name: str) -> None:
    """Print the most bytes held by a recut, by an export, and by one parameter."""
    run = Path(folder_name)
    module, bytes_each = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))), 2048 * 2048 * 4
    where, values = by_rows(module), dict(module.named_parameters())
    folder, manifest = write_checkpoint(run, module, where, {"parameters": values, "sum": values})
    write_template(run, module)
    one = Lines(lay_out(module), checkpoint.lay_out_buffers(module))
    with Watch() as recutting:
        recut(folder, manifest, one.layout, one.buffers, [])
    with Watch() as exporting:
        export(run, run / "model.safetensors")
    print(recutting.most_bytes, exporting.most_bytes, bytes_each)


@final
class Watch:
    """The most memory of its own, pages of files apart, that this process has come to need meanwhile."""

    def __enter__(self) -> "Watch":
        self.most_bytes, self._before, self._over = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(5e-4):
            self.most_bytes = max(self.most_bytes, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return kilobytes * 1024


Shape = tuple[int, ...]
VIEWS: Mapping[Shape, list[Shape]] = {
    (): [()], (7,): [(7,)], (12,): [(12,), (3, 4)], (6, 4): [(6, 4), (3, 2, 4), (24,)],
}  # fmt: skip


@some.composite
def layouts(draw: some.DrawFn, shapes: Mapping[str, Shape]) -> Layout:
    """Any cut: each parameter whole or, as some view of it, in a grid of boxes, on any partition, in any order."""
    partitions = draw(some.integers(1, 4))
    placed: list[tuple[int, Piece]] = []
    for name, shape in shapes.items():
        if draw(some.booleans()):
            placed.append((draw(some.integers(0, partitions - 1)), Piece(name, shape, Span(0, 0))))
            continue
        view = draw(some.sampled_from(VIEWS[shape]))
        sides = []
        for length in view:
            edges = sorted({0, length, *draw(some.lists(some.integers(0, length), max_size=2))})
            sides.append(list(itertools.pairwise(edges)))
        for box in itertools.product(*sides):
            size, corner = tuple(high - low for low, high in box), tuple(low for low, _ in box)
            placed.append((draw(some.integers(0, partitions - 1)), Piece(name, size, Span(0, 0), (), view, corner)))
    placed = sorted(draw(some.permutations(placed)), key=lambda item: item[0])
    pieces: list[Piece] = []
    ends = [0] * partitions
    start = 0
    for partition, piece in placed:
        span = Span(start, start + math.prod(piece.shape))
        pieces.append(replace(piece, span=span))
        start = span.stop
        ends[partition] = start
    return Layout(tuple(pieces), torch.float32, tuple(itertools.accumulate(ends[:-1], max)))


class Named(nn.Module):
    """Parameters of these shapes, and no forward pass."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@given(some.data())
@settings(max_examples=40, deadline=None)
def test_a_recut_of_a_recut_is_the_direct_recut(
    tmp_path_factory: pytest.TempPathFactory, data: some.DataObject
) -> None:
    shapes = {
        f"p{number}": shape
        for number, shape in enumerate(data.draw(some.lists(some.sampled_from(sorted(VIEWS)), min_size=1, max_size=3)))
    }
    module, run = Named(shapes), tmp_path_factory.mktemp("run")
    buffers = checkpoint.lay_out_buffers(module)
    first, second, third = (data.draw(layouts(shapes)) for _ in range(3))
    vectors = {"parameters": numbers(module, 0), "sum": numbers(module, 1)}
    shards = data.draw(some.integers(1, min(4, first.length)))
    taken = write_checkpoint(run, module, Lines(first, buffers), vectors, shards)
    direct_folder, direct = recut(*taken, third, buffers, [])
    around_folder, around = recut(*recut(*taken, second, buffers, []), third, buffers, [])
    for folder, manifest in ((direct_folder, direct), (around_folder, around)):
        found = read_line(folder, manifest)
        for name, named in vectors.items():
            assert torch.equal(found[name], on_line(third, named))
    if first.fingerprint() != third.fingerprint() != second.fingerprint():
        assert around == direct
        for file in direct.shards:
            assert (direct_folder / file.name).read_bytes() == (around_folder / file.name).read_bytes()
