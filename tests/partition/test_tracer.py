# SPDX-License-Identifier: Apache-2.0
"""Laws: what a graph of calls would lose of a forward pass is kept, or refused by name, by units and in stages."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law import check as check_units
from torch import Tensor, nn
from torch.nn import functional

from distbelief.errors import ConfigurationError
from distbelief.partition.stages import stages
from distbelief.partition.units import units

X = torch.linspace(-1, 1, 8 * 6).reshape(8, 6).sin()


class Three(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.features(x))))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Below(Three):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(self.first(x))


class FrozenBelow(Below):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class Masked(Three):
    """A mask that needs no gradient anyway."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positive = (x > 0).to(x.dtype)
        return torch.tanh(self.first(x * positive))


class InHalf(Three):
    def features(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.tanh(self.first(x)).float()


class Sign(torch.autograd.Function):
    """Straight through: the backward is another than that of what the forward calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Straight(Three):
    def features(self, x: Tensor) -> Tensor:
        return Sign.apply(self.first(x))  # type: ignore[no-any-return, no-untyped-call]


class Counting(Three):
    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.first(x)) * min(1.0, self.calls / 20)


class Drawing(Three):
    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) * torch.rand(1).item()


class Alternating(Three):
    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        found = torch.tanh(self.first(x))
        return found if self.calls % 2 else found * 2


class Switching(Three):
    """As many calls, of the same kinds, on the same values."""

    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        found = self.first(x)
        return torch.relu(found) if self.calls % 2 else torch.tanh(found)


class Crossing(Three):
    """The same calls on other values."""

    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        one, other = torch.tanh(self.first(x)), torch.relu(self.first(x))
        return one - other if self.calls % 2 else other - one


class Growing(Three):
    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.first(x)) + x[:, : self.calls].sum(1, keepdim=True)


class Narrowing(Three):
    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.first(x.to(torch.float64 if self.calls % 2 else torch.float32).float()))


class OfASlice(Three):
    def features(self, x: Tensor) -> Tensor:
        found = self.first(x)
        found[:, :4].mul_(3.0)
        return torch.tanh(found)


class Unused(Three):
    def features(self, x: Tensor) -> Tensor:
        found = self.first(x)
        torch.relu_(found)
        return found  # type: ignore[no-any-return]


class Buffered(Three):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        self.steps.add_(1)  # type: ignore[operator]
        return torch.tanh(self.first(x))


class Table(Three):
    """What does not depend on the input, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(16))

    def features(self, x: Tensor) -> Tensor:
        table = self.table + 1.0  # type: ignore[operator]
        table.mul_(2.0)
        return torch.tanh(self.first(x)) + table  # type: ignore[no-any-return]


class Centre(nn.Module):
    """Subtracts the running mean of what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


class Centred(Three):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Centre()

    def features(self, x: Tensor) -> Tensor:
        return self.centre(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class ByType(nn.Module):
    """Looks up what to do with a tensor, as layers of einops look up its framework."""

    def forward(self, x: Tensor) -> Tensor:
        return {Tensor: torch.tanh}[type(x)](x)


class LookedUp(Three):
    def __init__(self) -> None:
        super().__init__()
        self.by_type = ByType()

    def features(self, x: Tensor) -> Tensor:
        return self.by_type(self.first(x))  # type: ignore[no-any-return]


def patched() -> nn.Module:
    model = Three()

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) * 3

    model.middle.forward = types.MethodType(forward, model.middle)  # type: ignore[method-assign]
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the uncut model, for a loss whose weights differ."""
    model = copy.deepcopy(model).train()
    (model(X) * torch.arange(32.0).reshape(8, 4)).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return found | {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def in_two_stages(model: nn.Module) -> dict[str, Tensor]:
    """The same of two stages, one after another in this process; the last buffers are those of both."""
    plan = stages(model, X, 2, 1)
    values = {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())}
    parts = [plan.share(index, values, torch.device("cpu")).train() for index in range(2)]
    (parts[1](parts[0](X)) * torch.arange(32.0).reshape(8, 4)).sum().backward()
    held = {name: each for part in parts for name, each in part.parameters_by_name.items()}  # type: ignore[union-attr]
    found = {name: each.grad for name, each in held.items() if each.grad is not None}
    return found | {name: each for part in parts for name, each in part.buffers_by_name.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "model",
    [Three, FrozenBelow, Masked, Straight, OfASlice, Unused, Centred, LookedUp, patched],
    ids=lambda each: each.__name__,
)
def test_stages_compute_the_gradients_and_buffers_of_the_uncut_model(model: Callable[[], nn.Module]) -> None:
    found, expected = in_two_stages(model()), gradients(model())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


@pytest.mark.parametrize("model", [Three, FrozenBelow, Masked, Straight], ids=lambda each: each.__name__)
def test_units_compute_what_the_uncut_model_computes(model: Callable[[], nn.Module]) -> None:
    check_units(model().double(), X.double(), 2)


NEITHER = {
    "a layer below no_grad": (
        Below,
        "first is called below torch.no_grad",
        r"freeze its parameters with requires_grad_",
    ),
    "autocast": (InHalf, "is called below torch.autocast", "into a module of its own"),
    "a counter": (Counting, "with 0.05, then with 0.1 when it is done again: it counts", "keep counters in buffers"),
    "a number drawn": (Drawing, "when it is done again: it counts, or draws numbers", "draw with torch"),
    "another function": (Switching, "makes other calls when it is done again", "partitions=1"),
    "other values": (Crossing, "makes other calls when it is done again", "partitions=1"),
    "a slice of a counter": (Growing, "with 1, then with 2 when it is done again", "keep counters in buffers"),
    "another dtype": (Narrowing, "torch.float64, then with torch.float32 when it is done again", "partitions=1"),
    "other calls": (Alternating, "makes other calls when it is done again", "partitions=1"),
    "a buffer": (Buffered, "in forward changes steps itself", "put what does it into a module of its own"),
}
UNITS = {
    **NEITHER,
    "a slice": (
        OfASlice,
        "uses a value that mul_ has overwritten in place",
        "use the result of the call, or compute out",
    ),
    "an unused result": (Unused, "uses a value that relu_ has overwritten in place", "compute out of place"),
    "a look-up": (LookedUp, "cannot be followed by units: KeyError", "Plan.stages"),
    "a replaced forward": (patched, "module middle has a forward of its own", "Plan.stages"),
}
STAGES = {**NEITHER, "a table": (Table, "uses a value that mul_ has overwritten in place", "compute out of place")}


@pytest.mark.parametrize("name", UNITS)
def test_units_refuse_by_name_what_they_would_lose(name: str) -> None:
    model, problem, hint = UNITS[name]
    with pytest.raises(ConfigurationError, match=problem) as caught:
        units(model(), X, 2)
    assert hint in str(caught.value).partition("hint: ")[2]


@pytest.mark.parametrize("name", STAGES)
def test_stages_refuse_by_name_what_they_would_lose(name: str) -> None:
    model, problem, hint = STAGES[name]
    with pytest.raises(ConfigurationError, match=problem) as caught:
        stages(model(), X, 2, 1)
    assert hint in str(caught.value).partition("hint: ")[2]


class BelowModel(nn.Module):
    """Its layers have a name that a wrapper might give."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(X.shape[1], 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.model[0](x)
        return self.model[1](x)


@pytest.mark.parametrize("cut", [lambda model: units(model, X, 2), lambda model: stages(model, X, 2, 1)])
def test_layers_are_named_as_the_user_named_them(cut: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^model\.0 is called below"):
        cut(BelowModel())


def test_nothing_of_torch_is_changed_when_a_model_has_been_traced() -> None:
    before = torch.autograd.Function.__dict__["apply"], torch.zeros, torch.is_grad_enabled()
    with pytest.raises(ConfigurationError):
        units(Below(), X, 2)
    stages(Straight(), X, 2, 1)
    assert (torch.autograd.Function.__dict__["apply"], torch.zeros, torch.is_grad_enabled()) == before
    x = torch.tensor([2.0], requires_grad=True)
    Sign.apply(x * 3).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.item() == 3.0
