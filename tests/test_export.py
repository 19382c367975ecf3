# SPDX-License-Identifier: Apache-2.0
"""Laws of the export: an ordinary state_dict that `load_state_dict` takes, equal to the trained module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distbelief import checkpoint
from distbelief.buffers import load_buffers
from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.export import INITIAL, STATE, export, state_dict, write_template
from distbelief.parameters import lay_out, trainable
from distbelief.partition.materialise import record
from tests.cuts import Attention, Lines, Vision, buffer_numbers, by_rows, lines, write_checkpoint

NOTHING = torch.empty(0, dtype=torch.float64)


class Everything(nn.Module):
    """Tied and frozen parameters, BatchNorm, and buffers of every kind, in an order that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([1, 2, 3, 4], dtype=torch.int16))
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("cache", torch.rand(3), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("small", torch.rand(4).bfloat16())
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight
        self.same_frozen = self.frozen

    def forward(self, tokens: Tensor) -> Any:
        shift = self.get_buffer("offset") * self.get_buffer("phases").real + self.get_buffer("small")
        return self.out(self.frozen(self.norm(self.embed(tokens)) * self.scale + shift) * self.get_buffer("mask"))


class Detaching(nn.Linear):
    """Hands out detached tensors, in its own order and under names of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"my.{name}": value.detach() for name, value in reversed(super().state_dict(*args, **kwargs).items())}


def detaching() -> nn.Module:
    return Detaching(3, 2)


class Shadowed(nn.Module):
    """A frozen copy of a layer in the memory of the trained one, and two buffers in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(3, 2)
        self.target = nn.Linear(3, 2).requires_grad_(False)
        self.target.weight = nn.Parameter(self.online.weight.data, requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        return self.online(x)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).to(torch.bfloat16)
    module[0].requires_grad_(False)
    return module


def by_size(name: str, parameter: nn.Parameter) -> dict[str, float]:
    """Groups that put the pieces into another order than the state_dict's."""
    return {"weight_decay": 0.0} if parameter.numel() > 6 else {}


def uncut(module: nn.Module) -> Lines:
    return Lines(lay_out(module, by_size), checkpoint.lay_out_buffers(module))


def trained(
    model: Callable[[], nn.Module], run: Path, cut: Callable[[nn.Module], Lines] = uncut, shards: int = 2
) -> nn.Module:
    """A module with values that training made, whose run lies in `run`; the template is of its untrained self."""
    torch.manual_seed(0)
    module = model()
    write_template(run, module)
    vectors = {name: dict(trainable(module)) for name in ("parameters", "sum")}
    buffers = buffer_numbers(module)
    for number, (_, parameter) in enumerate(trainable(module)):
        parameter.data += torch.rand(parameter.shape) + number
    for number, buffer in enumerate(buffers.values()):
        buffer += (buffer > 1) * (number + 0.6)  # means of counters are no whole numbers
    load_buffers(dict(module.named_buffers()), torch.cat([each.reshape(-1) for each in (*buffers.values(), NOTHING)]))
    write_checkpoint(run, module, cut(module), vectors, shards, buffers)
    return module.eval()


@pytest.mark.parametrize("model", [Everything, plain, half_frozen, detaching])
@pytest.mark.parametrize("cut", [uncut, by_rows])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_exported_file_is_the_state_dict_of_the_trained_module_however_it_was_cut(
    model: Callable[[], nn.Module], cut: Callable[[nn.Module], Lines], shards: int, tmp_path: Path
) -> None:
    module, file = trained(model, tmp_path, cut, shards), tmp_path / "model.safetensors"
    count = export(tmp_path, file)
    found, expected = load_file(file), module.state_dict()
    assert set(found) == set(expected)
    assert count == sum(value.numel() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


def test_a_frozen_parameter_in_the_memory_of_a_trained_one_does_not_take_its_place(tmp_path: Path) -> None:
    write_template(tmp_path, Shadowed())
    entries = msgspec.json.decode((tmp_path / STATE).read_bytes())["entries"]
    assert entries["online.weight"]["source"] == "parameters"
    assert entries["target.weight"] == {**entries["online.weight"], "source": "initial", "name": "target.weight"}


def test_what_is_trained_is_written_with_checkpoints_alone(tmp_path: Path) -> None:
    write_template(tmp_path, plain())
    assert load_file(tmp_path / INITIAL) == {}


def test_what_is_handed_out_detached_is_what_is_trained_where_that_lies_in_the_same_memory(tmp_path: Path) -> None:
    class Detached(Shadowed):
        def state_dict(self, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
            return {name: value.detach() for name, value in super().state_dict(*arguments, **options).items()}

    write_template(tmp_path, Detached())
    entries = msgspec.json.decode((tmp_path / STATE).read_bytes())["entries"]
    assert {(entry["source"], entry["name"]) for entry in entries.values()} >= {("parameters", "online.weight")}
    assert entries["target.weight"] == entries["online.weight"]


def test_a_fresh_module_takes_the_export_strictly_and_computes_the_same(tmp_path: Path) -> None:
    module = trained(Everything, tmp_path)
    torch.manual_seed(99)
    fresh = Everything().eval()
    tokens = torch.arange(7)
    assert not torch.equal(fresh(tokens), module(tokens))
    fresh.load_state_dict(state_dict(tmp_path), strict=True)
    assert torch.equal(fresh(tokens), module(tokens))
    assert fresh.out.weight is fresh.embed.weight
    assert "cache" not in state_dict(tmp_path)


def test_the_newest_whole_checkpoint_is_exported(tmp_path: Path) -> None:
    module = plain()
    write_template(tmp_path, module)
    for value in (1.0, 2.0, 3.0):
        values = {name: torch.full_like(parameter, value) for name, parameter in trainable(module)}
        newest, _ = write_checkpoint(tmp_path, module, uncut(module), {"parameters": values})
    (newest / "shard-0.safetensors").write_bytes(b"")
    assert {float(value.mean()) for value in state_dict(tmp_path).values()} == {2.0}


def test_a_run_that_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not say how its model is made"):
        export(tmp_path, tmp_path / "model.safetensors")
    write_template(tmp_path, Everything())
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "model.safetensors")
    trained(Everything, tmp_path)
    with pytest.raises(ConfigurationError, match=r"no folder/model\.safetensors cannot be written") as caught:
        export(tmp_path, tmp_path / "no folder" / "model.safetensors")
    assert str(caught.value).splitlines()[-1].startswith("hint: give a file in a folder that exists")
    for name in (INITIAL, STATE):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-5], b"\xff" + whole, whole.replace(b"float", b"floar").replace(b"F32", b"F23")):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(
                CheckpointError, match=r"does not say how its model is made(.|\n)*\nhint: give the folder"
            ):
                state_dict(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match="does not say how its model is made"):
            state_dict(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert state_dict(tmp_path)


@pytest.mark.parametrize("name", [INITIAL, STATE])
def test_a_flipped_bit_in_any_byte_of_what_a_run_notes_of_its_model_is_noticed(name: str, tmp_path: Path) -> None:
    trained(half_frozen, tmp_path)
    whole = (tmp_path / name).read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not say how its model is made"):
            state_dict(tmp_path)
    (tmp_path / name).write_bytes(whole)
    assert state_dict(tmp_path)


def test_the_initial_values_of_another_run_are_not_taken(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        trained(half_frozen, tmp_path / name)
    torch.manual_seed(1)
    write_template(tmp_path / "other", half_frozen())
    (tmp_path / "other" / INITIAL).replace(tmp_path / "mine" / INITIAL)
    with pytest.raises(CheckpointError, match=r"initial\.safetensors was changed since it was written"):
        state_dict(tmp_path / "mine")


def test_a_run_folder_that_cannot_take_the_template_is_an_os_error(tmp_path: Path) -> None:
    module = plain()
    with pytest.raises(OSError, match="gone"):
        write_template(tmp_path / "gone", module)


@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("model", [Vision, Attention])
def test_a_model_cut_by_units_is_exported_whole_though_nobody_held_it(
    model: Callable[[], nn.Module], partitions: int, tmp_path: Path
) -> None:
    """Frozen layers, views, and buffers that no partition holds have the values of the user's constructor."""
    module = trained(model, tmp_path, lambda module: lines(model, partitions))
    recorded = record(model, 0)
    write_template(tmp_path, recorded.module, recorded.values)
    export(tmp_path, tmp_path / "model.safetensors")
    found, expected = load_file(tmp_path / "model.safetensors"), module.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    trained(Everything, tmp_path)
    file = tmp_path / "files" / "model.safetensors"
    file.parent.mkdir()
    file.write_text("precious")
    write_template(tmp_path, nn.Sequential(Everything()))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 1 elements of 0\.scale"):
        export(tmp_path, file)
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [("model.safetensors", "precious")]
    write_template(tmp_path, Everything())
    export(tmp_path, file)
    assert load_file(file)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt"])
def test_a_name_that_torch_load_would_be_given_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"what is written is safetensors\nhint: name it model.safetensors"):
        export(tmp_path, tmp_path / name)
