# SPDX-License-Identifier: Apache-2.0
"""Laws of the export: an ordinary state_dict that `load_state_dict` takes, equal to the trained module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distbelief import checkpoint, shard_file
from distbelief.errors import CheckpointError, ConfigurationError
from distbelief.export import FROZEN, STATE, export, state_dict, write_template
from distbelief.model_replica import flat_buffers, flat_parameters, load_buffers, load_parameters
from distbelief.parameters import Layout, cut, lay_out
from distbelief.portions import LeaseState
from distbelief.shard_file import ShardState


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


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).to(torch.bfloat16)
    module[0].requires_grad_(False)
    return module


def by_size(name: str, parameter: nn.Parameter) -> dict[str, float]:
    """Groups that put the pieces into another order than the state_dict's."""
    return {"weight_decay": 0.0} if parameter.numel() > 6 else {}


def write_run(run: Path, module: nn.Module, layout: Layout, parameters: Tensor, buffers: Tensor, shards: int) -> Path:
    """A run folder with one checkpoint, as a job leaves it behind."""
    write_template(run, module, layout)
    folder, files = checkpoint.next_folder(run), []
    for index, span in enumerate(cut(layout.length, shards)):
        path, state = folder / f"shard-{index}.safetensors", ShardState(start=span.start, stop=span.stop)
        shard_file.write(path, {"parameters": parameters[span.start : span.stop]}, state)
        files.append(shard_file.seal(path, state))
    manifest = checkpoint.Manifest(
        format=checkpoint.FORMAT, fingerprint=layout.fingerprint(), dtype=str(layout.dtype), rule="", seed=0,
        pieces={piece.name: piece.shape for piece in layout.pieces}, incarnation=1, examples=0,
        leases=LeaseState(1, 1, 0, (), 0), shards=files,
    )  # fmt: skip
    checkpoint.commit(folder, manifest, buffers)
    return folder


def trained(model: Callable[[], nn.Module], run: Path, shards: int = 2) -> nn.Module:
    """A module with values that training made, whose run lies in `run`; the template is of its untrained self."""
    torch.manual_seed(0)
    module = model()
    layout = lay_out(module, by_size)
    parameters = flat_parameters(module, layout) + torch.arange(layout.length) / 7
    buffers = flat_buffers(module)
    buffers += (buffers > 1) * (torch.arange(len(buffers)) + 0.6)
    write_run(run, module, layout, parameters.to(layout.dtype), buffers, shards)
    load_parameters(module, layout, parameters)
    load_buffers(module, buffers)
    return module.eval()


@pytest.mark.parametrize("model", [Everything, plain, half_frozen])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_exported_file_is_the_state_dict_of_the_trained_module(
    model: Callable[[], nn.Module], shards: int, tmp_path: Path
) -> None:
    module, file = trained(model, tmp_path, shards), tmp_path / "model.safetensors"
    count = export(tmp_path, file)
    found, expected = load_file(file), module.state_dict()
    assert set(found) == set(expected)
    assert count == sum(value.numel() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)


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
    layout = lay_out(module)
    for value in (1.0, 2.0, 3.0):
        newest = write_run(tmp_path, module, layout, torch.full((layout.length,), value), torch.empty(0).double(), 1)
    (newest / "shard-0.safetensors").write_bytes(b"")
    assert {float(value.mean()) for value in state_dict(tmp_path).values()} == {2.0}


def test_a_run_that_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "model.safetensors")
    trained(Everything, tmp_path)
    with pytest.raises(ConfigurationError, match=r"no folder/model\.safetensors cannot be written") as caught:
        export(tmp_path, tmp_path / "no folder" / "model.safetensors")
    assert str(caught.value).splitlines()[-1].startswith("hint: give a file in a folder that exists")
    for name in (FROZEN, STATE):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-5])
        with pytest.raises(CheckpointError, match="does not say how its model is made"):
            state_dict(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match="does not say how its model is made"):
            state_dict(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert state_dict(tmp_path)


def test_a_run_folder_that_cannot_take_the_template_is_an_os_error(tmp_path: Path) -> None:
    module = plain()
    with pytest.raises(OSError, match="gone"):
        write_template(tmp_path / "gone", module, lay_out(module))
