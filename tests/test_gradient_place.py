# SPDX-License-Identifier: Apache-2.0
"""Laws of gradients that backward writes into the flat gradient: the numbers of autograd, and nobody else's memory."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distbelief import gradient_place
from distbelief.gradient_place import PlacingLinear, write_in_place

Model = Callable[[], nn.Module]
FEATURES = 6


@pytest.fixture(autouse=True)
def _small_weights_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_place, "LARGE_NUMBERS", 1)


class Twice(nn.Module):
    """The same layer used twice, and its weight by another layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES, bias=False)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.other(self.layer(self.layer(x).tanh()).tanh()))


class Recomputed(nn.Module):
    """Its middle is computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2)
        self.middle = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        again = checkpoint.checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(torch.tanh(again))


class Scaled(nn.Linear):
    """Computes something else than what it derives from."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def changed_in_place() -> nn.Module:
    """What its layers yield is changed where it lies."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Hardtanh(inplace=True))


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def frozen_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].bias.requires_grad_(False)
    return model


def frozen_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    model[2].weight.requires_grad_(False)
    return model


MODELS: list[Model] = [
    layers, frozen_bias, frozen_weight, changed_in_place, Twice, lambda: Recomputed(False), lambda: Recomputed(True),
    lambda: nn.Sequential(Scaled(FEATURES, 3), nn.Linear(3, 3)),
]  # fmt: skip


class Placed:
    """A model whose gradients have places, beside an ordinary copy of it."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.ordinary = copy.deepcopy(self.model)
        self.places = {
            parameter: torch.full_like(parameter, 7.0, requires_grad=False) for parameter in self.model.parameters()
        }
        self.asked: set[nn.Parameter] = set()
        write_in_place(self.model, {parameter: self._asking(parameter) for parameter in self.places})

    def _asking(self, parameter: nn.Parameter) -> gradient_place.Place:
        def ask() -> Tensor | None:
            if parameter in self.asked:
                return None
            self.asked.add(parameter)
            return self.places[parameter].view(parameter.shape)

        return ask

    def in_place(self) -> list[bool]:
        """Per parameter, whether its gradient is what lies in its place."""
        return [
            parameter.grad is not None and parameter.grad.data_ptr() == place.data_ptr()
            for parameter, place in self.places.items()
        ]

    def untouched(self) -> bool:
        return all(bool((place == 7.0).all()) for place in self.places.values())

    def check(self) -> None:
        """The gradients, and that of the input, are those of the ordinary copy, bit for bit."""
        for own, other in zip(self.model.parameters(), self.ordinary.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            assert own.grad is None or torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The same random input twice."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(*shape, FEATURES, generator=generator).to(dtype)
    yield given.clone().requires_grad_()
    yield given.clone().requires_grad_()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(), (1,), (9,), (4, 7), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_ordinary_layers_bit_for_bit(
    model: Model, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    placed = Placed(model, dtype)
    found = []
    for module, x in zip((placed.model, placed.ordinary), inputs(*shape, dtype=dtype), strict=True):
        output = module(x)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
    placed.check()


def test_weights_have_their_gradients_in_place_and_nothing_is_copied_there() -> None:
    placed = Placed(layers)
    x, _ = inputs(9)
    placed.model(x).sum().backward()
    assert placed.in_place() == [len(parameter.shape) == 2 for parameter in placed.places]


def test_only_the_first_of_several_gradients_is_written_in_place() -> None:
    placed = Placed(layers)
    one, other = inputs(9)
    for module, x in ((placed.model, one), (placed.ordinary, other)):
        for _ in range(3):
            module(x).square().sum().backward()
    placed.check()
    assert any(placed.in_place())


def test_a_weight_used_twice_is_added_up_outside_of_its_place() -> None:
    placed = Placed(Twice)
    one, other = inputs(9)
    placed.model(one).sum().backward()
    placed.ordinary(other).sum().backward()
    placed.check()
    assert placed.in_place() == [False, False]


def test_who_asks_for_gradients_gets_memory_of_its_own() -> None:
    placed = Placed(layers)
    one, other = inputs(9)
    given = torch.autograd.grad(placed.model(one).square().sum(), list(placed.model.parameters()))
    expected = torch.autograd.grad(placed.ordinary(other).square().sum(), list(placed.ordinary.parameters()))
    assert all(map(torch.equal, given, expected))
    assert placed.untouched()


def test_a_gradient_with_a_history_is_that_of_ordinary_layers() -> None:
    """The penalty on the norm of the gradient, differentiated once more."""
    placed = Placed(layers)
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        loss = module(x).square().sum()
        given = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        (loss + torch.stack([gradient.square().sum() for gradient in given]).sum()).backward()
    placed.check()


def test_backward_towards_some_of_the_weights_leaves_the_others_places_alone() -> None:
    placed = Placed(layers)
    one, other = inputs(9)
    placed.model(one).sum().backward(inputs=[placed.model[2].weight])
    placed.ordinary(other).sum().backward(inputs=[placed.ordinary[2].weight])
    placed.check()
    assert placed.asked <= {placed.model[2].weight}


@pytest.mark.parametrize("how", ["before forward", "before backward", "when it is accumulated"])
def test_a_hook_that_looks_at_a_gradient_may_keep_it(how: str) -> None:
    placed = Placed(layers)
    kept: list[Tensor] = []
    weight = placed.model[0].weight
    if how == "before forward":
        weight.register_hook(kept.append)
    weight.register_post_accumulate_grad_hook(lambda parameter: None)  # a replica's own
    x, _ = inputs(9)
    output = placed.model(x)
    if how == "before backward":
        weight.register_hook(kept.append)
    if how == "when it is accumulated":
        weight.register_post_accumulate_grad_hook(lambda parameter: kept.append(parameter.grad))
    output.sum().backward()
    assert kept[0].data_ptr() != placed.places[weight].data_ptr()
    assert not placed.in_place()[0]
    assert any(placed.in_place())


def test_gradients_of_the_input_alone_take_no_more_work_than_with_ordinary_layers() -> None:
    placed = Placed(layers)
    found = []
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        loss = module(x).square().sum()
        with FlopCounterMode(display=False) as counter:
            (given,) = torch.autograd.grad(loss, [x])
        found.append((counter.get_total_flops(), given))
    assert found[0][0] == found[1][0] > 0
    assert torch.equal(found[0][1], found[1][1])
    assert placed.untouched()


def test_a_weight_may_change_before_backward_where_the_layer_does_not_need_it_any_more() -> None:
    placed = Placed(lambda: nn.Linear(FEATURES, 5))
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        loss = module(x.detach()).square().sum()
        with torch.no_grad():
            module.weight.mul_(2)
        loss.backward()
    placed.check()


class Doubling(Tensor):
    """What linear layers make of it is twice of what they make of others."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [each.as_subclass(Tensor) if isinstance(each, cls) else each for each in args]
        found = function(*plain, **(kwargs or {}))
        return 2 * found if function is nn.functional.linear else found


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "compressed": Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x[:4], x[4:]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[:4], x[4:]], layout=torch.jagged),
    "derived": lambda x: x.as_subclass(Doubling),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support:UserWarning", "ignore:The PyTorch API of nested:UserWarning"
)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_no_plain_tensors_go_the_ordinary_way(kind: str) -> None:
    placed = Placed(lambda: nn.Linear(FEATURES, 5))
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        output = module(INPUTS[kind](x.detach()))
        (torch.nested.to_padded_tensor(output, 0.0) if output.is_nested else output).square().sum().backward()
    placed.check()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_gradients_that_are_accumulated_with_a_history_are_memory_of_their_own() -> None:
    placed = Placed(layers)
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        module(x).square().sum().backward(create_graph=True)
    placed.check()
    assert placed.untouched()
    assert all(parameter.grad.requires_grad for parameter in placed.places if parameter.grad is not None)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_forward_derivatives_are_those_of_ordinary_layers() -> None:
    placed = Placed(layers)
    found = []
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            found.append(forward_ad.unpack_dual(module(dual)).tangent)
    assert torch.equal(*found)


def test_under_autocast_layers_are_ordinary() -> None:
    placed = Placed(layers)
    for module, x in zip((placed.model, placed.ordinary), inputs(9), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    placed.check()
    assert placed.untouched()


def test_functional_transforms_see_ordinary_layers() -> None:
    placed = Placed(layers)
    values = dict(placed.model.named_parameters())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.as_tensor(torch.func.functional_call(placed.model, given, (x,))).square().sum()

    one, other = inputs(9)
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, one.detach())
    placed.ordinary(other).square().sum().backward()
    for name, parameter in placed.ordinary.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(per_example[name].sum(0), parameter.grad)
    assert placed.untouched()


@pytest.mark.filterwarnings("default:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_has_the_gradients_of_ordinary_layers() -> None:
    placed = Placed(layers)
    compiled = torch.compile(placed.model, backend="eager", fullgraph=True)
    one, other = inputs(9)
    compiled(one).square().sum().backward()
    placed.ordinary(other).square().sum().backward()
    placed.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_no_places(copied: Callable[[nn.Module], nn.Module]) -> None:
    placed = Placed(layers)
    other = copied(placed.model)
    x, _ = inputs(9)
    other(x).square().sum().backward()
    assert placed.untouched()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_layers_with_small_weights_and_those_that_derive_from_linear_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradient_place, "LARGE_NUMBERS", 5 * FEATURES)
    model = Placed(lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Linear(5, 5), Scaled(5, 6))).model
    assert [type(layer) for layer in model] == [PlacingLinear, nn.Linear, Scaled]


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    placed = Placed(layers)
    x, _ = inputs(9)
    with torch.no_grad():
        assert placed.model(x).grad_fn is None
    with torch.inference_mode():
        assert placed.model(x).grad_fn is None
