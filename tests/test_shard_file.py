# SPDX-License-Identifier: Apache-2.0
"""Laws of a shard's file: what is read is what was written, on any cut, and damage is noticed wherever it is."""

import random
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

from distbelief import shard_file
from distbelief.errors import CheckpointError
from distbelief.files import Draft
from distbelief.parameters import Span, cut
from distbelief.shard_file import PushRecord, ShardFile, ShardState

STATE = ShardState(
    start=0, stop=0, version=12, examples=384, lost_updates=2, scalars={"step": 12.0},
    replicas={0: PushRecord(1, 7, {3: 96, 4: 32}), 5: PushRecord(0, 5)}, staleness={0: 4, 3: 8},
)  # fmt: skip


def numbers(length: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(folder: Path, vectors: dict[str, torch.Tensor], shards: int) -> list[ShardFile]:
    """The vectors as `shards` files."""
    files = []
    for index, span in enumerate(cut(len(next(iter(vectors.values()))), shards)):
        path, state = folder / f"shard-{index}.safetensors", ShardState(start=span.start, stop=span.stop)
        held = {name: vector[span.start : span.stop] for name, vector in vectors.items()}
        files.append(shard_file.seal(shard_file.write(path, held, state), state))
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_every_span_of_every_vector_is_read_back_from_any_cut(shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    vectors = {"parameters": numbers(61, 1, dtype), "sum": numbers(61, 2, dtype)}
    files = write(tmp_path, vectors, shards)
    assert [(file.start, file.stop) for file in files] == [(span.start, span.stop) for span in cut(61, shards)]
    for other in (1, 2, 3, 61):
        for span in cut(61, other):
            found = shard_file.read_span(tmp_path, files, span)
            assert set(found) == set(vectors)
            for name, vector in vectors.items():
                assert torch.equal(found[name], vector[span.start : span.stop])
                assert found[name].dtype == dtype


@given(some.data())
@settings(max_examples=50, deadline=None)
def test_reading_a_span_equals_slicing_the_vector(
    tmp_path_factory: pytest.TempPathFactory, data: some.DataObject
) -> None:
    length = data.draw(some.integers(1, 40))
    folder = tmp_path_factory.mktemp("files")
    vector = numbers(length, 3)
    files = write(folder, {"parameters": vector}, data.draw(some.integers(1, length)))
    start = data.draw(some.integers(0, length - 1))
    stop = data.draw(some.integers(start + 1, length))
    assert torch.equal(shard_file.read_span(folder, files, Span(start, stop))["parameters"], vector[start:stop])


def test_a_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    vectors = {"parameters": numbers(10), "sum": numbers(20)[::2]}
    shard_file.write(tmp_path / "shard", vectors, STATE)
    found = load_file(tmp_path / "shard")
    assert {name: vector.tolist() for name, vector in found.items()} == {
        name: vector.tolist() for name, vector in vectors.items()
    }


def test_a_shard_remembers_everything_it_knew_besides_its_vectors(tmp_path: Path) -> None:
    shard_file.write(tmp_path / "shard", {"parameters": numbers(3)}, STATE)
    assert shard_file.read_state(tmp_path / "shard") == STATE


def test_a_vector_that_one_file_lacks_is_zero_there(tmp_path: Path) -> None:
    state = [ShardState(start=0, stop=4), ShardState(start=4, stop=8)]
    drafts = [
        shard_file.write(tmp_path / "a", {"parameters": numbers(4)}, state[0]),
        shard_file.write(tmp_path / "b", {"parameters": numbers(4), "moment": numbers(4, 1)}, state[1]),
    ]
    files = [shard_file.seal(*one) for one in zip(drafts, state, strict=True)]
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        found = shard_file.read_span(tmp_path, files, Span(2, 7))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found["moment"].tolist() == [0.0, 0.0, *numbers(4, 1)[:3].tolist()]
    assert found["parameters"].tolist() == [*numbers(4)[2:].tolist(), *numbers(4)[:3].tolist()]


def test_only_the_wanted_vectors_are_read_and_those_that_no_file_has_are_zero(tmp_path: Path) -> None:
    given = {"parameters": numbers(9, 1, torch.bfloat16), "sum": numbers(9, 2)}
    files = write(tmp_path, given, 2)
    assert shard_file.vectors(tmp_path, files) == {"parameters": torch.bfloat16, "sum": torch.float32}
    found = shard_file.read_span(tmp_path, files, Span(3, 8), {"sum": torch.float32, "moment": torch.float64})
    assert found.keys() == {"sum", "moment"}
    assert torch.equal(found["sum"], given["sum"][3:8])
    assert torch.equal(found["moment"], torch.zeros(5, dtype=torch.float64))


def test_of_another_algorithm_nothing_but_the_parameters_is_read(tmp_path: Path) -> None:
    files = write(tmp_path, {"parameters": numbers(10), "s0": numbers(10, 1), "y0": numbers(10, 2)}, 3)
    own, states = shard_file.read_shard(tmp_path, files, Span(2, 6), own=True)
    assert (own.keys(), len(states)) == ({"parameters", "s0", "y0"}, 2)
    others, _ = shard_file.read_shard(tmp_path, files, Span(2, 6), own=False)
    assert others.keys() == {"parameters"}
    assert torch.equal(others["parameters"], numbers(10)[2:6])
    with pytest.raises(CheckpointError, match=r"has no parameters of 2\.\.6"):
        shard_file.read_shard(tmp_path, write(tmp_path, {"s0": numbers(10)}, 3), Span(2, 6), own=False)


def test_a_file_made_part_by_part_is_the_file_that_is_written_at_once(tmp_path: Path) -> None:
    state, given = msgspec.structs.replace(STATE, start=4, stop=13), {"parameters": numbers(9, 1), "sum": numbers(9, 2)}
    draft = Draft(tmp_path / "parts")
    with shard_file.create(draft, dict.fromkeys(given, torch.float32), state) as file:
        for name, vector in given.items():
            file.write(name, vector[5:], 5)
            file.write(name, vector[:5])
    assert shard_file.read_state(tmp_path / "parts") == state
    found = shard_file.read_span(tmp_path, [shard_file.seal(draft, state)], Span(4, 13))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_span_that_the_files_do_not_cover_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    files = write(tmp_path, {"parameters": numbers(10)}, 2)
    with pytest.raises(CheckpointError, match=r"lacks 3 of the 6 parameters 2\.\.8"):
        shard_file.read_span(tmp_path, files[:1], Span(2, 8))


def header_bytes(path: Path) -> int:
    """Where the data begins: safetensors' length, then its header."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_file_of_some_vectors_covers_none_of_the_parameters(tmp_path: Path) -> None:
    """Else it would stand for one of all vectors that is missing."""
    files = write(tmp_path, {"parameters": numbers(50), "sum": numbers(50)}, 2)
    beside = msgspec.structs.replace(files[1], partial=True)
    with pytest.raises(CheckpointError, match=r"lacks 25 of the 50 parameters 0\.\.50"):
        shard_file.read_span(tmp_path, [files[0], beside], Span(0, 50))
    assert len(shard_file.read_span(tmp_path, [*files, beside], Span(0, 50))["sum"]) == 50


def test_a_file_cut_off_anywhere_is_refused_with_its_two_sizes(tmp_path: Path) -> None:
    (file,) = write(tmp_path, {"parameters": numbers(50), "sum": numbers(50)}, 1)
    path = tmp_path / file.name
    whole, header = path.read_bytes(), header_bytes(path)
    shard_file.check(tmp_path, file)
    for length in (0, 4, 8, header // 2, header - 1, header, header + 1, header + 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"has {length} bytes, {len(whole)} were written"):
            shard_file.check(tmp_path, file)
        with pytest.raises(CheckpointError, match="cannot be read"):
            shard_file.read_state(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            shard_file.read_span(tmp_path, [file], Span(10, 20))
        with pytest.raises(CheckpointError, match="cannot be read"):
            shard_file.vectors(tmp_path, [file])
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=f"has {len(whole) + 1} bytes"):
        shard_file.check(tmp_path, file)
    with pytest.raises(CheckpointError, match=f"cannot be read: it has {len(whole) + 1} bytes"):
        shard_file.read_state(path)


@pytest.mark.parametrize("read_bytes", [1 << 22, 100])
def test_a_single_flipped_bit_anywhere_is_noticed(
    read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts a file is read in."""
    monkeypatch.setattr(shard_file, "_READ_BYTES", read_bytes)
    (file,) = write(tmp_path, {"parameters": numbers(50)}, 1)
    path = tmp_path / file.name
    whole, header = path.read_bytes(), header_bytes(path)
    draw = random.Random(0)
    places = [0, 8 * 8, 8 * header - 1, 8 * header, 8 * len(whole) - 1, *draw.sample(range(8 * len(whole)), 300)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="was changed since it was written"):
            shard_file.check(tmp_path, file)


def test_a_file_that_is_gone_or_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    (file,) = write(tmp_path, {"parameters": numbers(5)}, 1)
    path = tmp_path / file.name
    path.unlink()
    with pytest.raises(CheckpointError, match=r"shard-0\.safetensors is missing"):
        shard_file.check(tmp_path, file)
    path.mkdir()
    for read in (lambda: shard_file.check(tmp_path, file), lambda: shard_file.read_state(path)):
        with pytest.raises(CheckpointError, match=r"shard-0\.safetensors cannot be read"):
            read()


def test_a_file_without_a_shard_in_it_is_refused(tmp_path: Path) -> None:
    for metadata in (None, {"shard": "{}"}, {"shard": "no json"}):
        save_file({"parameters": numbers(5)}, tmp_path / "other", metadata)
        with pytest.raises(CheckpointError, match="other cannot be read"):
            shard_file.read_state(tmp_path / "other")


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no folder"):
        shard_file.write(tmp_path / "no folder" / "shard", {"parameters": numbers(5)}, STATE)
