# SPDX-License-Identifier: Apache-2.0
"""Laws of the rules: whatever the layer and the cut, gradient, evaluation and buffers are those of the uncut model."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from law import check, error, run
from torch import Tensor, nn
from torch.nn import functional

from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d
from distbelief.partition.units import units
from distbelief.plan import Cut, channels, grid, on, rows

PARTITIONS = [1, 2, 3, 4, 9]


class Residual(nn.Module):
    """Convolutions whose results are added to a projection of their input."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.b = nn.Conv2d(out_channels, out_channels, 3, padding="same", groups=4)
        self.skip = nn.Conv2d(channels, out_channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.skip(x)
        x = self.relu(self.norm(self.a(x)))
        x = self.b(x)
        x += identity
        return self.relu(x)


class ResidualNet(nn.Module):
    """Two residual blocks between a stem and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = Residual(8, 20), Residual(20, 8)
        self.pool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.pool(self.one(functional.relu(self.stem(x)))))
        return self.fc(x.view(x.size(0), -1))


class Gates(nn.Module):
    """Sums and products of layers that are cut in different ways, or not at all, and of parameters by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 40), nn.Linear(12, 40), nn.Linear(40, 20)
        self.scale, self.shift = nn.Parameter(torch.rand(40)), nn.Parameter(torch.rand(1, 1))
        self.register_buffer("offset", torch.rand(40))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), torch.sigmoid(self.b(x))
        y = a * b + self.offset
        y = y * self.scale - self.shift / 3
        z = self.c(functional.gelu(y))
        return torch.where(z > 0, z, 0.1 * z) + y[:, :20] * y.mean(1, keepdim=True)


class Reader(nn.Module):
    """Tokens through an embedding, attention and a feed-forward network."""

    def __init__(self, *, padded: bool) -> None:
        super().__init__()
        self.padded, width = padded, 24
        self.token, self.position = nn.Embedding(11, width, padding_idx=0), nn.Embedding(7, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.score = nn.Linear(width, 11)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position(torch.arange(text.shape[1], device=text.device))
        hidden = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool, device=text.device).triu(1)
        y = self.norm(x)
        padding = (text == 0) & (text != text[:, :1]) if self.padded else None
        seen, _ = self.attention(y, y, y, key_padding_mask=padding, attn_mask=hidden, need_weights=False)
        x = x + seen
        return self.score(x + self.feed(self.feed_norm(x)))


class Attending(nn.Module):
    """Queries of one sequence and keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 40), nn.Linear(6, 40, bias=False)
        self.attention = nn.MultiheadAttention(40, 4, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.query(x[:, :3]), self.key(x), torch.tanh(self.key_values(x)))[0]

    def key_values(self, x: Tensor) -> Tensor:
        return torch.cat([x] * 7, 2)[:, :, :40]


class Heads(nn.Module):
    """Attention by hand: reshapes, transposes, and the function."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.join = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(x).view(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.join(seen.transpose(1, 2).flatten(2))


def vision() -> nn.Module:
    """The paper's kind of net: untied filters, L2 pooling, local contrast normalisation, three times over."""
    return nn.Sequential(
        LocallyConnected2d(2, 8, 26, 5, 1, 2), L2Pool2d(2), LocalContrastNorm2d(8, 5),
        LocallyConnected2d(8, 6, 13, 4, 2, 1), nn.Tanh(), nn.AvgPool2d(3, 1, 1), LocalContrastNorm2d(6, 3, 0.5),
        LocallyConnected2d(6, 8, (6, 6), (3, 2), bias=False), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(160, 5),
    )  # fmt: skip


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 41), nn.Sigmoid(), nn.Linear(41, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Dropout(0.0), nn.Linear(64, 37), nn.LeakyReLU(0.2, inplace=True), nn.LayerNorm(37), nn.Linear(37, 3),
    )  # fmt: skip


def convolutions() -> nn.Module:
    # Behind a smooth function the norm would leave nearly nothing of the gradient of what shifts all, but its rounding.
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Hardtanh(-0.3, 0.3),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(24, 18, 2, dilation=2, groups=6, bias=False),
        nn.InstanceNorm2d(18, affine=True), nn.Conv2d(18, 20, 3, padding=1, padding_mode="circular"), nn.SiLU(),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(40, 7),
    )  # fmt: skip


def sounds() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(16), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(16 * 5, 6),
    )  # fmt: skip


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 12, 3, padding=1), nn.Softplus(), nn.BatchNorm3d(12), nn.MaxPool3d(2),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


def normed_planes() -> nn.Module:
    """Layers that want whole planes or whole rows behind layers that are cut over them."""
    return nn.Sequential(
        LocallyConnected2d(2, 10, 8, 3, 1, 1), nn.BatchNorm2d(10), nn.ReLU(),
        LocallyConnected2d(10, 9, 8, 3), nn.LayerNorm([9, 6, 6]), nn.Conv2d(9, 12, 3), LocalContrastNorm2d(12, 3),
        nn.Unflatten(1, (3, 4)), nn.Flatten(2), nn.LayerNorm(64), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip


def images(channels: int, *plane: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, channels, *plane)


def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (dense, lambda: torch.randn(40, 10)),
    "vision": (vision, images(2, 26, 26)),
    "residual": (ResidualNet, images(3, 12, 12)),
    "convolutions": (convolutions, images(3, 17, 16)),
    "sounds": (sounds, images(4, 20)),
    "volumes": (volumes, images(1, 4, 4, 4)),
    "normed planes": (normed_planes, images(2, 8, 8)),
    "gates": (Gates, images(12)),
    "reader": (lambda: Reader(padded=False), tokens),
    "padded reader": (lambda: Reader(padded=True), tokens),
    "attending": (Attending, images(5, 6)),
    "heads": (Heads, images(6, 12)),
}


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model, sample = MODELS[name]
    x = sample()
    return model().to(dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("partitions", PARTITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_computes_what_the_uncut_one_computes(name: str, partitions: int) -> None:
    check(*make(name, torch.float64), partitions)


@pytest.fixture
def as_exact(name: str) -> Iterator[None]:
    """The uncut model `dense` sums as two threads do: on one, its gradient is 1.01e-6 from that of its parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if name == "dense" else 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_exact")
@pytest.mark.parametrize("partitions", PARTITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_in_single_precision_too(name: str, partitions: int) -> None:
    check(*make(name, torch.float32), partitions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_over_units_of_several_partitions_is_as_exact_in_16_bits_as_over_those_of_one(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 4)).to(dtype)
    x, weight = 500 * torch.randn(6, 8).to(dtype), torch.ones(6, 4, dtype=dtype)
    expected = model(x).detach()
    found = run(model, x, weight, units(model, x, 2, {"0": rows(), "1": rows()})).output
    assert error(found, expected) < torch.finfo(dtype).eps


class Phases(nn.Module):
    """The product of one complex layer with the conjugate of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (torch.view_as_complex(layer(x).view(x.shape[0], 4, 2)) for layer in (self.a, self.b))
        return self.c(torch.view_as_real(a * b.conj()).flatten(1))


@pytest.mark.parametrize("first", [0, 1])
def test_complex_states_cross_between_partitions_and_so_do_their_gradients(first: int) -> None:
    torch.manual_seed(1)
    cuts = {"a": on(first), "b": on(1 - first), "c": on(1)}
    check(Phases().double(), torch.randn(5, 6, dtype=torch.float64), 2, cuts)


@pytest.mark.parametrize(
    ("name", "partitions", "cuts"),
    [
        ("dense", 2, {"0": on(0), "2": on(0), "6": on(1), "9": on(1)}),
        ("dense", 3, {"0": rows(), "2": on(2), "3": on(0), "6": rows(), "8": on(1)}),
        ("vision", 4, {"0": grid(2, 2), "3": grid(4, 1), "7": grid(1, 4), "10": on(3)}),
        ("vision", 3, {"0": grid(3, 1), "1": channels(), "2": on(1), "3": on(0), "5": grid(1, 3), "8": on(2)}),
        ("vision", 9, {"0": grid(3, 3), "1": grid(1, 9), "3": grid(3, 3), "5": channels()} | {"5": on(8)}),
        ("residual", 4, {"stem": grid(2, 2), "one.a": grid(4, 1), "one.b": grid(2, 2), "two": on(1), "fc": rows()}),
        ("residual", 2, {"stem": on(0), "one": on(0), "one.b": channels(), "two": on(1), "pool": on(0)}),
        ("residual", 3, {"one.a": channels(), "one.norm": on(1), "one.skip": grid(1, 3), "two.skip": on(0)}),
        ("convolutions", 4, {"0": grid(2, 2), "2": grid(2, 2), "4": channels(), "5": grid(2, 2), "7": on(2)}),
        ("convolutions", 2, {"2": channels(), "4": grid(1, 2), "9": on(0)}),
        ("normed planes", 2, {"0": on(0), "3": grid(2, 1), "4": on(1), "6": grid(1, 2)}),
        ("gates", 2, {"a": on(0), "b": on(1), "c": rows()}),
        ("reader", 2, {"token": on(0), "attention": on(1), "feed": on(0), "norm": rows(), "score": rows()}),
        ("reader", 4, {"attention": rows(), "feed_norm": on(2), "feed.0": on(2)}),
        ("heads", 2, {"mix": on(0), "join": on(1)}),
    ],
)
def test_so_does_one_that_is_cut_by_hand(name: str, partitions: int, cuts: Mapping[str, Cut]) -> None:
    check(*make(name, torch.float64), partitions, cuts)
