# SPDX-License-Identifier: Apache-2.0
"""Laws of files written part by part: an ordinary safetensors file, whatever it holds and in whatever order."""

import io
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors import safe_open
from safetensors.torch import load_file

from distbelief import tensor_file
from distbelief.errors import ConfigurationError
from distbelief.tensor_file import DTYPES

Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def values(kinds: Kinds) -> dict[str, torch.Tensor]:
    """Any bits that are a value of the dtype."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
        for name, (dtype, shape) in kinds.items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, also where a dtype knows no equality."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def test_every_dtype_of_the_format_and_every_shape_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    shapes = [(), (0,), (7,), (3, 5), (2, 0, 4)]
    kinds = {f"{name} {shape}": (dtype, shape) for name, dtype in DTYPES.items() for shape in shapes}
    given = values(kinds)
    with tensor_file.create(tmp_path / "file", kinds, {"who": "me"}) as file:
        for name in reversed(list(given)):
            file.write(name, given[name])
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert opened.metadata() == {"who": "me"}
        assert set(opened.keys()) == set(given)
        assert all(same(opened.get_tensor(name), value) for name, value in given.items())
        assert {name: DTYPES[opened.get_slice(name).get_dtype()] for name in given} == {
            name: dtype for name, (dtype, _) in kinds.items()
        }


def test_each_tensor_begins_at_a_multiple_of_its_elements_size_so_that_a_mapped_file_can_be_used(
    tmp_path: Path,
) -> None:
    for length in range(1, 9):  # of a name, so of the header
        kinds = {"x" * length: (torch.int8, (3,)), "half": (torch.float16, (1,)), "wide": (torch.float64, (2,))}
        with tensor_file.create(tmp_path / "file", kinds):
            pass
        written = (tmp_path / "file").read_bytes()
        first = 8 + int.from_bytes(written[:8], "little")
        header = json.loads(written[8:first])
        assert [(first + header[name]["data_offsets"][0]) % kinds[name][0].itemsize for name in kinds] == [0, 0, 0]


def test_a_file_that_gives_a_few_bytes_at_a_time_is_read_as_a_whole(tmp_path: Path) -> None:
    class Slow(io.FileIO):
        def readinto(self, into: Any) -> int:
            return super().readinto(memoryview(into)[:10]) or 0

    given = torch.randn(50)
    with tensor_file.create(tmp_path / "file", {"a": (given.dtype, given.shape)}) as file:
        file.write("a", given)
    with Slow(tmp_path / "file") as slow:
        assert torch.equal(tensor_file.TensorReader(slow).read("a", slice(3, 47)), given[3:47])  # type: ignore[arg-type]


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with tensor_file.create(tmp_path / "file", {"a": (torch.float32, (1 << 16,))}):
        pass
    with (tmp_path / "file").open("rb") as file:
        reader = tensor_file.TensorReader(file)
        os.truncate(tmp_path / "file", 1 << 17)
        with pytest.raises(ValueError, match="it ends within a"):
            reader.read("a", slice(None))


def test_what_torch_has_yet_to_conjugate_or_negate_is_written_as_it_is_seen(tmp_path: Path) -> None:
    back = torch.tensor([1 + 2j, 3 - 4j]).conj()
    given = {"back": back, "below": back.imag, "in a row": back[:1].imag}
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in given.items()}
    with tensor_file.create(tmp_path / "file", kinds) as file:
        for name, value in given.items():
            file.write(name, value)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], value) for name, value in given.items())


def test_what_is_not_written_is_zero_and_nothing_at_all_is_a_file_too(tmp_path: Path) -> None:
    with tensor_file.create(tmp_path / "file", {"a": (torch.float32, (2, 3)), "b": (torch.int8, (3,))}) as file:
        file.write("a", torch.tensor([1.0, 2.0]), 3)
    found = load_file(tmp_path / "file")
    assert found["a"].tolist() == [[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]
    assert found["b"].tolist() == [0, 0, 0]
    with tensor_file.create(tmp_path / "empty", {}):
        pass
    assert load_file(tmp_path / "empty") == {}


@given(some.data())
@settings(max_examples=50, deadline=None)
def test_parts_in_any_order_make_the_whole(tmp_path_factory: pytest.TempPathFactory, data: some.DataObject) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    tensor = torch.arange(data.draw(some.integers(1, 30)), dtype=torch.float64)
    edges = sorted({0, len(tensor), *data.draw(some.lists(some.integers(0, len(tensor)), max_size=5))})
    with tensor_file.create(path, {"odd": (torch.int8, (3,)), "whole": (tensor.dtype, tensor.shape)}) as file:
        for start, stop in data.draw(some.permutations(list(itertools.pairwise(edges)))):
            file.write("whole", tensor[start:stop], start)
    assert torch.equal(load_file(path)["whole"], tensor)


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no folder"), tensor_file.create(tmp_path / "no folder" / "file", {}):
        pass
    kinds = {"spin": (torch.complex128, (3,))}
    with (
        pytest.raises(ConfigurationError, match=r"spin has dtype torch\.complex128(.|\n)*hint: convert it to one of"),
        tensor_file.create(tmp_path / "file", kinds),
    ):
        pass
    assert not (tmp_path / "file").exists()
