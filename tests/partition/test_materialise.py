# SPDX-License-Identifier: Apache-2.0
"""Law: whatever is wanted of a model, it is bit for bit what plain construction with the seed gives."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from distbelief.errors import ConfigurationError
from distbelief.partition.materialise import AT_WORK_BYTES, Recorded, record

BUDGETS = [0, 2000, AT_WORK_BYTES]
"""Everything is given back; some; nothing."""


def layers() -> nn.Module:
    return nn.ModuleList(
        [nn.Linear(5, 7), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.LayerNorm((3, 5)), nn.GroupNorm(2, 6),
         nn.Embedding(9, 4, padding_idx=2), nn.LSTM(5, 6, 2, bidirectional=True), nn.MultiheadAttention(12, 3),
         nn.Bilinear(3, 4, 5), nn.ConvTranspose1d(3, 4, 2), nn.PReLU()]
    )  # fmt: skip


def transformer() -> nn.Module:
    """Copies a layer that was initialised, then draws every weight anew."""
    return nn.Transformer(16, 4, 2, 2, 32, batch_first=True)


def drawn_again() -> nn.Module:
    """Every way of drawing, over values that were drawn before."""

    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.dirac_(module.weight)
            nn.init.xavier_normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.01, b=0.03)
            nn.init.orthogonal_(module.weight, gain=0.5)
            module.weight.data[1:3].mul_(2.0)
            nn.init.sparse_(module.weight[2:], 0.4)

    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 30))).apply(draw)


class Tables(nn.Module):
    """Values computed, copied, and shared by parameters, buffers and attributes."""

    def __init__(self) -> None:
        super().__init__()
        place = torch.zeros(30, 16)
        angle = torch.arange(30.0)[:, None] * torch.exp(torch.arange(0, 16, 2) * (-math.log(1e4) / 16))
        place[:, 0::2], place[:, 1::2] = torch.sin(angle), torch.cos(angle)
        self.register_buffer("place", place)
        self.register_buffer("later", torch.ones(20, 20).triu(1).bool(), persistent=False)
        self.register_buffer("turns", torch.polar(torch.ones(4, 30), torch.rand(4, 30)).conj())
        self.register_buffer("downs", self.get_buffer("turns").imag[1:])
        self.constant = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.given = nn.Parameter(torch.from_numpy(np.linspace(0, 1, 50)).float() * 3, requires_grad=False)
        self.read = nn.Parameter(torch.frombuffer(bytearray(range(64)), dtype=torch.int16).clone(), requires_grad=False)
        self.first = nn.Linear(16, 30)
        self.tied = nn.Linear(16, 30)
        self.tied.weight = self.first.weight
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.norm.weight.add_(torch.randn(16) * self.first.weight[:16, :16].mean())
            self.first.weight[0] = self.first.weight[1:].sum(0)
        self.scale = torch.sqrt(torch.tensor(64.0))
        together = torch.randn(40)
        self.left, self.right = nn.Parameter(together[:20]), nn.Parameter(together.view(2, 20)[1])
        self.copies = nn.ModuleList(copy.deepcopy(self.norm) for _ in range(2))
        self.wide = nn.Parameter(torch.randn(4, 6, dtype=torch.float32).t())


class Choices(nn.Module):
    """Looks at the values while it is built, and at memory past all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        depth = 2 + int(self.one.weight.argmax()) % 3 + int(bool(self.one.weight[0, 0] > 0))
        rates = [rate.item() for rate in torch.linspace(0, 0.5, depth)] + torch.rand(3).tolist()
        self.more = nn.ModuleList(nn.Linear(8, 2) for _ in rates)
        for rate, layer in zip(rates, self.more, strict=True):
            nn.init.normal_(layer.weight, std=rate)
        mine = torch.empty(8, 8)
        mine.numpy()[:] = np.arange(64).reshape(8, 8) * self.one.weight.detach().numpy()[0, 0]
        self.mine = nn.Parameter(mine)
        self.kept = nn.Parameter(self.one.weight[self.one.weight > 0])
        self.register_buffer("copied", copy.deepcopy(self.one.weight.data * 2))
        mine.numpy()[0] = 7.0


class Generators(nn.Module):
    """Random numbers of other generators and other seeds beside those of the process."""

    def __init__(self) -> None:
        super().__init__()
        own = torch.Generator().manual_seed(5)
        self.a, self.b = nn.Parameter(torch.randn(30, generator=own)), nn.Parameter(torch.randn(30))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.c = nn.Parameter(torch.empty(7, 5).uniform_(generator=own) + torch.rand(5))
        self.d = nn.Parameter(torch.randn(9) + torch.randperm(9) + torch.bernoulli(torch.full((9,), 0.3)))
        self.e = nn.Parameter(torch.poisson(torch.rand(20) * 5) + nn.functional.dropout(torch.ones(20), 0.5))
        torch.manual_seed(torch.initial_seed() + 1)
        self.f = nn.Parameter(torch.multinomial(torch.rand(10), 4).float())


def double() -> nn.Module:
    """Another default dtype, for a while."""
    torch.set_default_dtype(torch.float64)
    try:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half())
    finally:
        torch.set_default_dtype(torch.float32)


def parametrized() -> nn.Module:
    """Weights computed from others, which the constructor tries."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 6)),
        parametrizations.spectral_norm(nn.Linear(6, 5)),
        parametrizations.orthogonal(nn.Linear(5, 5)),
    )


MODELS = [layers, transformer, drawn_again, Tables, Choices, Generators, double, parametrized]


def named(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def plain(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    return one.dtype == other.dtype and one.shape == other.shape and one.equal(other)


def whole(recorded: Recorded, names: object) -> dict[str, Tensor]:
    return dict(recorded.values(dict.fromkeys(names)))  # type: ignore[call-overload]


@pytest.mark.parametrize("at_work_bytes", BUDGETS)
@pytest.mark.parametrize("build", MODELS)
def test_values_are_those_of_plain_construction(build: Callable[[], nn.Module], at_work_bytes: int) -> None:
    for seed in (0, 4):
        expected = named(plain(build, seed))
        found = whole(record(build, seed, at_work_bytes), expected)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert same(found[name], value.detach()), name
            if value.nbytes == value.untyped_storage().nbytes():
                assert found[name].stride() == value.stride(), name


@pytest.mark.parametrize("build", MODELS)
def test_the_module_is_the_plain_one_without_content(build: Callable[[], nn.Module]) -> None:
    expected, found = plain(build, 1), record(build, 1, 0).module
    assert str(found) == str(expected)
    for (name, tensor), (expected_name, value) in zip(named(found).items(), named(expected).items(), strict=True):
        assert name == expected_name
        assert tensor.is_meta
        assert (type(tensor), tensor.shape, tensor.dtype) == (type(value), value.shape, value.dtype)
        assert (tensor.stride(), tensor.requires_grad) == (value.stride(), value.requires_grad)
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert found.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("build", MODELS)
def test_a_box_is_that_part_of_the_uncut_value(build: Callable[[], nn.Module]) -> None:
    expected = {name: value for name, value in named(plain(build, 2)).items() if value.dim()}
    recorded = record(build, 2, 0)
    for parts in (2, 3):
        pieces: dict[str, list[Tensor]] = {name: [] for name in expected}
        for part in range(parts):
            wanted = {}
            for name, value in expected.items():
                edges = [value.shape[-1] * edge // parts for edge in (part, part + 1)]
                box = (*((0, length) for length in value.shape[:-1]), (edges[0], edges[1]))
                wanted[name] = (tuple(value.shape), box)
            for name, value in recorded.values(wanted):
                pieces[name].append(value)
        for name, value in expected.items():
            assert same(torch.cat(pieces[name], dim=-1), value.detach()), name
            assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces[name])


def test_a_box_may_be_of_another_view_of_the_shape() -> None:
    expected = plain(transformer, 0).get_parameter("encoder.layers.0.self_attn.in_proj_weight").detach()
    wanted = {"encoder.layers.0.self_attn.in_proj_weight": ((3, 16, 16), ((0, 3), (4, 8), (0, 16)))}
    ((_, found),) = record(transformer, 0, 0).values(wanted)
    assert same(found, expected.view(3, 16, 16)[:, 4:8])


def test_tensors_that_are_attributes_have_values_too() -> None:
    recorded = record(Tables, 0, 0)
    assert recorded.module.scale.is_meta
    assert float(whole(recorded, ["scale"])["scale"]) == 8.0


def test_what_is_one_parameter_stays_one() -> None:
    module = record(Tables, 0, 0).module
    assert module.get_parameter("tied.weight") is module.get_parameter("first.weight")
    left, right = module.get_parameter("left"), module.get_parameter("right")
    assert left.untyped_storage()._cdata == right.untyped_storage()._cdata


def test_marks_on_parameters_are_kept() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.decay = 0.5  # type: ignore[assignment]
        return layer

    assert record(build, 0).module.get_parameter("weight").decay == 0.5


def test_random_numbers_and_dtype_of_the_process_stay_where_they_are() -> None:
    before = torch.get_rng_state()
    recorded = record(Generators, 3, 0)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in recorded.values(dict.fromkeys("abcdef")):
        assert torch.equal(torch.get_rng_state(), before)
    whole(record(double, 0, 0), ["0.weight"])
    assert torch.get_default_dtype() == torch.float32


def test_a_recorded_model_runs_on_meta() -> None:
    module = record(layers, 0, 0).module
    assert module[6](torch.empty(3, 5, device="meta"))[0].shape == (3, 12)
    tables = record(Tables, 0, 0).module
    assert (tables.first(torch.empty(2, 16, device="meta")) * tables.scale).shape == (2, 30)


class Draws(TorchDispatchMode):
    """Counts the tensors that are drawn while it is entered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.uniform_.default
        return func(*args, **kwargs or {})


def test_nothing_is_drawn_but_what_is_wanted() -> None:
    recorded = record(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))), 0, 0)
    with Draws() as draws:
        whole(recorded, ["7.weight", "7.bias", "12.bias"])
    assert draws.count == 3


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.masks = [torch.ones(3), torch.zeros(3)]


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.ones(1000)
        self.scale = lambda x: x * weight
        self.one = nn.Parameter(torch.ones(1))


def test_tensors_in_a_list_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"Sequential keeps tensors in 1\.masks, a list") as caught:
        record(lambda: nn.Sequential(nn.Linear(2, 2), Listed()), 0)
    assert "register_buffer" in caught.value.hint


def test_tensors_in_a_closure_are_refused_when_their_memory_was_given_back() -> None:
    with pytest.raises(ConfigurationError, match="Closed keeps 4000 bytes of tensors that are no attribute") as caught:
        record(Closed, 0, 0)
    assert "register_buffer" in caught.value.hint
    assert record(Closed, 0).module.scale(torch.ones(1000)).sum() == 1000


def with_parameter_hook() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.register_hook(lambda gradient: 2 * gradient)
    return model


def with_accumulated_hook() -> nn.Module:
    model = nn.Linear(2, 2)
    model.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.ReLU()))


@pytest.mark.filterwarnings("default:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (with_parameter_hook, "parameter weight has hooks, which its parts would not call"),
        (with_accumulated_hook, "parameter bias has hooks, which its parts would not call"),
        (lambda: nn.LazyLinear(3), r"parameter weight is lazy"),
        (scripted, r"module 1 is a script of torch\.jit"),
    ],
)
def test_what_no_part_would_have_is_refused_by_name(build: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        record(build, 0)
    assert caught.value.hint


def test_what_the_constructor_raises_is_raised() -> None:
    def build() -> nn.Module:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        record(build, 0)


LARGE = """
import resource, sys, torch
from torch import nn
from distbelief.partition.materialise import record

def build():
    layers = nn.Sequential(*(nn.Linear(1024, 2048) for _ in range(64)))
    for layer in layers[1::16]:
        nn.init.trunc_normal_(layer.weight)
    return layers

torch.set_num_threads(1)
torch.rand(8, 8) @ torch.rand(8, 8)
held = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[1]),) * 2)
if sys.argv[2] == "plain":
    torch.manual_seed(0)
    named = dict(build().named_parameters())
else:
    named = dict(record(build, 0).values({"63.weight": None, "17.weight": ((2048, 1024), ((0, 2), (0, 1024)))}))
print(named["63.weight"].double().sum().item().hex(), named["17.weight"][:2].double().sum().item().hex())
"""


@pytest.mark.slow
def test_a_model_larger_than_the_memory_is_built_within_it() -> None:
    """64 layers of 8 MiB. Beside 64 MiB for those at work and a drawn layer with its temporaries: the wanted boxes."""

    def outcome(mebibytes: int, how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LARGE, str(mebibytes << 20), how]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=100)

    assert outcome(200, "plain").returncode != 0
    without_limit, limited = outcome(1 << 20, "plain"), outcome(200, "recorded")
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == without_limit.stdout
