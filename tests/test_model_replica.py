# SPDX-License-Identifier: Apache-2.0
"""Laws of a model replica's flat buffers, against ordinary autograd on an ordinary module."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from distbelief import gradient_place
from distbelief.buffers import SentBuffers, flat_buffers, load_buffers
from distbelief.errors import ConfigurationError, ProtocolError
from distbelief.model_replica import (
    ModelReplica,
    Objective,
    build,
    load_parameters,
    whole,
)
from distbelief.parameters import Layout
from distbelief.partition.group import Group

OBJECTIVE = Objective(nn.functional.mse_loss)


@pytest.fixture(autouse=True, params=["copied", "in place"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How gradients of linear layers get into the flat gradient."""
    if request.param == "in place":
        monkeypatch.setattr(gradient_place, "LARGE_NUMBERS", 1)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def flat_parameters(parameters: dict[str, nn.Parameter], layout: Layout) -> Tensor:
    """The parameters as one new vector of shape (n,)."""
    return torch.cat([parameters[piece.name].detach().reshape(-1) for piece in layout.pieces])


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers())


class Tied(nn.Module):
    """One matrix used twice, one frozen layer, one parameter that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 2)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, inputs: Tensor) -> Any:
        return self.out(self.second(self.frozen(self.first(inputs)).tanh()).tanh())


class Again(nn.Module):
    """One layer used around itself, where autograd goes through the inner use in a pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Any:
        once = self.layer(inputs).tanh()
        for _ in range(2):
            once = checkpoint.checkpoint(self.layer, once, use_reentrant=True).tanh()
        return self.out(self.layer(once).tanh())


class SometimesUsed(nn.Module):
    """Its second layer takes part only when the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Any:
        return self.always(inputs) + (self.sometimes(inputs) if inputs[0, 0] > 0 else 0)


class Sparse(nn.Module):
    """Its embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Any:
        return self.out(self.embed(inputs[:, :2].abs().long().clamp(max=8)).sum(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 2)
    )


def channels_last() -> nn.Module:
    return convolutional().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def doubled() -> nn.Module:
    return perceptron().double()


MODELS = [perceptron, Tied, Again, SometimesUsed, convolutional, doubled, Sparse, channels_last]
ROUNDED = (Sparse, channels_last)
"""Torch adds up sparse gradients, and convolves in another memory format, in another order."""


def biases_apart(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"weight_decay": 0.0} if name.endswith("bias") else {}


class Replica:
    """A replica beside an ordinary copy of its module; `host` are the buffers it asked for."""

    def __init__(self, model: Callable[[], nn.Module] = perceptron) -> None:
        self.host: list[Tensor] = []
        self.module, self.layout = build(model, 3, biases_apart)
        self.plain = copy.deepcopy(self.module)
        self.initial = flat_parameters(parameters_of(self.module), self.layout)
        self.it = ModelReplica(
            whole(self.module),
            self.layout,
            OBJECTIVE.differentiate,
            torch.device("cpu"),
            self.allocate,
            Group(None, 0, 1),
        )
        self.it.spare.copy_(self.initial)
        self.it.adopt()

    @property
    def accruing(self) -> Tensor:
        (one,) = (each for each in self.host if each is not self.it.spare and each is not self.it.fetched)
        return one

    def allocate(self, length: int, dtype: torch.dtype) -> Tensor:
        self.host.append(torch.zeros(length, dtype=dtype))
        return self.host[-1]

    def plain_gradient(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of the gradients that autograd leaves in the ordinary copy; zero where it leaves none."""
        self.plain.zero_grad()
        for batch in batches:
            OBJECTIVE(self.plain, batch).backward()  # type: ignore[no-untyped-call]
        return flat_gradient(self.plain, self.layout)


def flat_gradient(module: nn.Module, layout: Layout) -> Tensor:
    named = parameters_of(module)
    parts = [named[piece.name].grad for piece in layout.pieces]
    return torch.cat([
        torch.zeros(len(piece.span), dtype=layout.dtype) if part is None else part.to_dense().reshape(-1)
        for part, piece in zip(parts, layout.pieces, strict=True)
    ])  # fmt: skip


def batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, 7, 8, generator=generator, dtype=dtype)
    return [(3 * each[:, :6].contiguous(), each[:, 6:].contiguous()) for each in numbers]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("mean", [True, False])
def test_the_accrued_gradient_is_that_of_autograd(model: Callable[[], nn.Module], count: int, mean: bool) -> None:
    replica = Replica(model)
    dtype, rounded = replica.layout.dtype, model in ROUNDED
    for seed in range(3):
        given = batches(count, dtype, seed)
        for number, batch in enumerate(given):
            assert replica.it.accrued == number
            loss = replica.it.compute(batch)
            assert not loss.requires_grad
        gradient = replica.it.take_gradient(mean=mean, clip_norm=None)
        assert gradient is not None
        expected = replica.plain_gradient(given) / (count if mean else 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-5 * rounded, atol=1e-6 * rounded)
        assert gradient.any()
    assert torch.equal(flat_parameters(parameters_of(replica.module), replica.layout), replica.initial)


@pytest.mark.parametrize("model", MODELS)
def test_a_mini_batch_counts_as_much_as_its_weight_says(model: Callable[[], nn.Module]) -> None:
    replica = Replica(model)
    for weights in ((3.0, 1.0, 0.5), (1.0, 4.0, 2.0)):
        given = batches(len(weights), replica.layout.dtype, seed=int(weights[0]))
        for batch, weight in zip(given, weights, strict=True):
            replica.it.compute(batch, weight)
        gradient = replica.it.take_gradient(mean=False, clip_norm=None)
        assert gradient is not None
        parts = [weight * replica.plain_gradient([batch]) for batch, weight in zip(given, weights, strict=True)]
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-5)


def test_a_parameter_without_a_part_in_the_loss_has_gradient_zero_whatever_the_buffer_held() -> None:
    replica = Replica(SometimesUsed)
    (positive, target), negative = batches(1)[0], batches(1)[0]
    positive[0, 0], negative[0][0, 0] = 1.0, -1.0
    views = replica.layout.views
    for with_it, without in (([], [negative]), ([(positive, target)], [negative]), ([], [negative]), ([], [negative])):
        for batch in [*without, *with_it]:
            replica.it.compute(batch)
        gradient = replica.it.take_gradient(mean=False, clip_norm=None)
        assert gradient is not None
        assert bool(views(gradient)["sometimes.weight"].any()) == bool(with_it)
        assert views(gradient)["always.weight"].any()


@pytest.mark.parametrize("adopts", [True, False])
def test_everything_lies_in_three_host_buffers_and_autograd_keeps_nothing(adopts: bool) -> None:
    replica = Replica(Tied)
    assert [(len(buffer), buffer.dtype) for buffer in replica.host] == [(replica.layout.length, torch.float32)] * 3
    views = replica.layout.views
    for _ in range(5):
        parameters = parameters_of(replica.module)
        used, third = replica.it.fetched.data_ptr(), replica.accruing.data_ptr()
        for name, view in views(replica.it.fetched).items():
            assert parameters[name].data_ptr() == view.data_ptr()
            assert parameters[name].is_contiguous()
        replica.it.compute(batches(1)[0])
        assert all(parameter.grad is None for parameter in replica.module.parameters())
        gradient = replica.it.take_gradient(mean=True, clip_norm=None)
        assert gradient is replica.it.spare
        assert gradient.data_ptr() == third
        if adopts:
            gradient.copy_(replica.initial)  # a shard answers where it has read the gradient
            replica.it.adopt()
            assert (replica.it.fetched.data_ptr(), replica.it.spare.data_ptr()) == (third, used)
        else:
            assert replica.it.fetched.data_ptr() == used
    assert len(replica.host) == 3


def test_a_gradient_that_was_taken_stays_untouched_while_the_next_one_accrues() -> None:
    replica = Replica()
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(6):
        for batch in batches(3, seed=seed):
            replica.it.compute(batch)
            if kept:
                taken, copied = kept[-1]
                assert torch.equal(taken, copied)
        gradient = replica.it.take_gradient(mean=True, clip_norm=None)
        assert gradient is not None
        kept.append((gradient, gradient.clone()))
    assert len({gradient.data_ptr() for gradient, _ in kept}) == 2


def test_what_is_discarded_leaves_the_gradient_that_was_taken_and_no_trace_in_the_next_one() -> None:
    replica, given = Replica(), batches(3)
    replica.it.compute(given[0])
    taken = replica.it.take_gradient(mean=True, clip_norm=None)
    assert taken is not None
    kept = taken.clone()
    replica.it.compute(given[1])
    replica.it.discard()
    assert replica.it.accrued == 0
    assert torch.equal(taken, kept)
    replica.it.compute(given[2])
    assert torch.equal(taken, kept)
    gradient = replica.it.take_gradient(mean=False, clip_norm=None)
    assert gradient is not None
    assert torch.equal(gradient, replica.plain_gradient(given[2:]))


def test_backward_makes_the_first_gradient_of_a_large_weight_where_it_is_accrued() -> None:
    replica = Replica()
    layer, made = replica.module.get_submodule("0"), list[int]()

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        assert output.grad_fn is not None
        output.grad_fn.register_hook(lambda given, _: made.extend(
            each.data_ptr() for each in given if each is not None and each.shape in [(5, 6), (6, 5)]
        ))  # fmt: skip

    layer.register_forward_hook(note)
    for _ in range(6):
        place = replica.layout.views(replica.accruing)["0.weight"].data_ptr()
        for batch in batches(2):
            replica.it.compute(batch)
        in_place = gradient_place.LARGE_NUMBERS == 1
        assert [found == place for found in made] == [in_place, False]
        made.clear()
        assert replica.it.take_gradient(mean=True, clip_norm=None) is not None


def test_a_fetch_fills_the_spare_buffer_unseen_until_it_is_adopted() -> None:
    replica = Replica(Tied)
    parameters = list(replica.module.parameters())
    tied, inputs = replica.module.get_parameter("first.weight"), batches(1)[0]
    for number in range(4):
        expected = Objective(nn.functional.mse_loss)(replica.plain, inputs).detach()
        replica.it.spare.fill_(0.1 * number)
        assert torch.equal(replica.it.compute(inputs), expected)
        replica.it.adopt()
        flat = torch.full((replica.layout.length,), 0.1 * number)
        load_parameters(parameters_of(replica.plain), replica.layout, flat)
        assert torch.equal(flat_parameters(parameters_of(replica.module), replica.layout),
                           flat_parameters(parameters_of(replica.plain), replica.layout))  # fmt: skip
    assert all(now is before for now, before in zip(replica.module.parameters(), parameters, strict=True))
    assert replica.module.get_parameter("second.weight") is tied


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_not_given_and_spoils_nothing_after_it(bad: float) -> None:
    replica = Replica()
    good = batches(2)
    replica.it.compute(good[0])
    replica.it.compute((good[1][0], torch.full((7, 2), bad)))
    assert replica.it.take_gradient(mean=True, clip_norm=1.0) is None
    assert replica.it.accrued == 0
    for _ in range(2):
        replica.it.compute(good[0])
        gradient = replica.it.take_gradient(mean=True, clip_norm=None)
        assert gradient is not None
        assert torch.equal(gradient, replica.plain_gradient(good[:1]))


def test_a_finite_gradient_whose_sum_overflows_is_given() -> None:
    replica = Replica()
    replica.it.compute(batches(1)[0])
    for buffer in replica.host[2:]:
        buffer.fill_(3e38)
    gradient = replica.it.take_gradient(mean=True, clip_norm=None)
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient.sum().isfinite()


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e6])
def test_clipping_is_that_of_torch(clip_norm: float) -> None:
    replica = Replica()
    given = batches(3)
    for batch in given:
        replica.it.compute(batch)
    gradient = replica.it.take_gradient(mean=True, clip_norm=clip_norm)
    replica.plain_gradient(given)
    for parameter in replica.plain.parameters():
        assert parameter.grad is not None
        parameter.grad /= 3
    before = flat_gradient(replica.plain, replica.layout)
    nn.utils.clip_grad_norm_(replica.plain.parameters(), clip_norm)
    assert gradient is not None
    torch.testing.assert_close(gradient, flat_gradient(replica.plain, replica.layout))
    assert torch.equal(gradient, before) == (clip_norm == 1e6)


def halved() -> nn.Module:
    return perceptron().half()


@pytest.mark.parametrize(("model", "large"), [(perceptron, 3e38), (halved, 6e4), (doubled, 1e9)])
def test_a_gradient_whose_norm_its_type_does_not_hold_is_clipped_to_the_norm(
    model: Callable[[], nn.Module], large: float
) -> None:
    replica = Replica(model)
    replica.it.compute(batches(1, replica.layout.dtype)[0])
    for buffer in replica.host[2:]:
        buffer.fill_(large)
    gradient = replica.it.take_gradient(mean=True, clip_norm=0.5)
    assert gradient is not None
    assert float(torch.linalg.vector_norm(gradient.double())) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_momentum_is_that_of_torch_with_nesterov_and_comes_after_clipping(clip_norm: float | None) -> None:
    replica, initial = Replica(), None
    replica.it.momentum = 0.9
    plain = torch.optim.SGD(replica.plain.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for seed in range(5):
        initial = flat_parameters(parameters_of(replica.plain), replica.layout)
        replica.it.spare.copy_(initial)
        replica.it.adopt()
        given = batches(2, seed=seed)
        for batch in given:
            replica.it.compute(batch)
        gradient = replica.it.take_gradient(mean=False, clip_norm=clip_norm)
        assert gradient is not None
        replica.plain_gradient(given)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(replica.plain.parameters(), clip_norm)
        plain.step()
        found = flat_parameters(parameters_of(replica.plain), replica.layout)
        torch.testing.assert_close(initial - gradient, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoilt", [float("nan"), 3e38])
def test_momentum_begins_anew_after_a_gradient_that_is_not_finite_or_would_not_be_with_it(spoilt: float) -> None:
    replica, given = Replica(), batches(1)
    replica.it.momentum = 0.9
    for taken in range(3):
        replica.it.compute(given[0])
        if taken == 1:
            replica.accruing.fill_(spoilt)
        gradient = replica.it.take_gradient(mean=True, clip_norm=None)
        assert (gradient is None) == (taken == 1)
        if gradient is not None:
            torch.testing.assert_close(gradient, 1.9 * replica.plain_gradient(given))


@pytest.mark.parametrize("model", [perceptron, Tied, Sparse, convolutional])
def test_local_steps_are_those_of_sgd_and_the_gradient_is_what_they_walked(model: Callable[[], nn.Module]) -> None:
    replica, rate = Replica(model), 0.05
    replica.it.local_rate = rate
    plain = torch.optim.SGD(replica.plain.parameters(), lr=rate)
    walked = torch.zeros(replica.layout.length)
    for batch in batches(6):
        loss = OBJECTIVE(replica.plain, batch)
        plain.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        walked += flat_gradient(replica.plain, replica.layout)
        plain.step()
        torch.testing.assert_close(replica.it.compute(batch), loss.detach())
    found = flat_parameters(parameters_of(replica.module), replica.layout)
    torch.testing.assert_close(found, flat_parameters(parameters_of(replica.plain), replica.layout))
    gradient = replica.it.take_gradient(mean=False, clip_norm=None)
    torch.testing.assert_close(gradient, walked)
    assert not torch.equal(found, replica.initial)
    replica.it.spare.copy_(replica.initial)
    replica.it.adopt()
    assert torch.equal(flat_parameters(parameters_of(replica.module), replica.layout), replica.initial)


class Buffers(nn.Module):
    """Buffers of every kind, one of them shared, one of them absent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.tensor(2**53 - 1))
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))
        self.register_buffer("phases", torch.polar(torch.ones(2, 2), torch.arange(4.0).view(2, 2)))
        self.register_buffer("back", torch.polar(torch.ones(2), torch.arange(2.0)).conj())
        self.register_buffer("small", torch.randn(3).bfloat16(), persistent=False)
        self.register_buffer("bound", torch.tensor([-float("inf"), 1.0]))
        self.register_buffer("none", None)
        self.norm.register_buffer("shared", self.get_buffer("small"))


def test_all_buffers_survive_the_way_through_one_flat_vector() -> None:
    module = Buffers()
    for number in range(3):
        module.norm(torch.randn(5, 3) * number)
    flat, before = flat_buffers(buffers_of(module)), {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert flat.dtype == torch.float64
    assert len(flat) == 3 + 3 + 1 + 1 + 4 + 8 + 4 + 3 + 2
    for buffer in module.buffers():
        buffer.zero_()
    load_buffers(buffers_of(module), flat)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == before[name].dtype
    assert int(module.norm.num_batches_tracked) == 3  # type: ignore[arg-type]


def test_counters_of_a_mean_are_rounded_and_statistics_are_not() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for count in range(4):
        other(torch.full((3, 2), float(count)))
    mean = torch.stack([flat_buffers(buffers_of(one)), flat_buffers(buffers_of(other))]).mean(0) + 0.6 * (
        flat_buffers(buffers_of(one)) == 0
    )
    load_buffers(buffers_of(one), mean)
    assert int(one.num_batches_tracked) == 3  # type: ignore[arg-type]
    torch.testing.assert_close(one.running_var, (1 + other.running_var) / 2)  # type: ignore[operator]


def test_the_mean_is_of_the_buffers_of_replicas_at_work_and_outlives_those_who_sent_them() -> None:
    sent, initial = SentBuffers([torch.tensor([7.0])], 3), torch.tensor([1.0])
    assert sent.mean(3)[0].tolist() == [7.0], "before anybody has sent"
    sent.take(0, 0, initial)
    initial.fill_(100.0)  # the memory that it came in is used again
    sent.take(1, 0, torch.tensor([3.0]))
    sent.take(2, 0, torch.tensor([8.0]))
    assert [sent.mean(at_work)[0].tolist() for at_work in (3, 2, 1)] == [[4.0], [2.0], [1.0]]
    sent.lose(0, 2)
    assert sent.mean(2)[0].tolist() == [3.0]
    sent.lose(1, 2)
    assert sent.mean(2)[0].tolist() == [3.0], "of who was there last; the idle one has older ones"
    sent.take(2, 0, torch.tensor([9.0]))
    assert sent.mean(2)[0].tolist() == [9.0], "of who has sent since, though it is not at work"


def test_a_replica_gives_and_takes_its_buffers_while_it_trains() -> None:
    replica = Replica(convolutional)
    replica.it.compute(batches(1)[0])
    OBJECTIVE(replica.plain, batches(1)[0])
    assert torch.equal(replica.it.buffers(), flat_buffers(buffers_of(replica.plain)))
    load_buffers(replica.it.part.buffers, torch.arange(9.0, dtype=torch.float64))
    assert torch.equal(flat_buffers(buffers_of(replica.module)), torch.arange(9.0, dtype=torch.float64))


@pytest.mark.parametrize("model", MODELS)
def test_a_vector_loaded_into_a_module_is_read_back_and_frozen_parameters_stay(model: Callable[[], nn.Module]) -> None:
    module, layout = build(model, 1, biases_apart)
    frozen = [parameter.clone() for parameter in module.parameters() if not parameter.requires_grad]
    flat = torch.arange(layout.length, dtype=layout.dtype)
    load_parameters(parameters_of(module), layout, flat)
    assert torch.equal(flat_parameters(parameters_of(module), layout), flat)
    left = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    assert all(torch.equal(now, before) for now, before in zip(left, frozen, strict=True))


def test_buffers_of_another_size_or_kind_are_refused_and_the_mean_is_as_it_was() -> None:
    sent, own = SentBuffers([torch.zeros(2, dtype=torch.float64)], 2), torch.ones(2, dtype=torch.float64)
    sent.take(0, 0, own)
    for other in (own[:0], own[:1], own.float()):
        with pytest.raises(ProtocolError, match=r"for the buffers of partition 0, which are 2 of torch\.float64"):
            sent.take(1, 0, other)
    assert torch.equal(sent.mean(2)[0], own)


def test_the_initial_values_are_those_of_the_seed() -> None:
    models = [build(perceptron, seed, None) for seed in (1, 1, 2)]
    built = [flat_parameters(parameters_of(module), layout) for module, layout in models]
    torch.manual_seed(1)
    assert torch.equal(built[0], nn.utils.parameters_to_vector(perceptron().parameters()).detach())
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_a_step_replaces_model_and_loss_and_gets_the_batch_as_it_is() -> None:
    module, batch = perceptron(), {"x": torch.ones(2, 6)}
    stepped = Objective(None, lambda model, given: model(given["x"]).sum())
    assert torch.equal(stepped(module, batch), module(batch["x"]).sum())


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.zeros(7, 2), r"\[7, 2\]"), (torch.zeros(0), r"\[0\]"), (0.5, "float"), (None, "NoneType")],
)
def test_a_loss_that_is_no_scalar_is_refused_with_its_shape(value: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the loss is {said}, not a scalar") as caught:
        Objective(lambda output, target: value)(perceptron(), batches(1)[0])
    assert str(caught.value).splitlines()[-1].startswith("hint: return the mean")


@pytest.mark.parametrize(
    ("value", "hint"),
    [({"loss": torch.zeros(())}, 'output["loss"]'), (SimpleNamespace(loss=torch.zeros(())), "output.loss")],
)
def test_what_holds_a_loss_is_refused_with_the_hint_to_return_that(value: Any, hint: str) -> None:
    with pytest.raises(ConfigurationError, match="not a scalar") as caught:
        Objective(None, lambda model, batch: value)(perceptron(), batches(1)[0])
    assert str(caught.value).endswith(f"hint: return its loss alone: {hint}")


@pytest.mark.parametrize("several", [{"boxes": torch.zeros(()), "labels": torch.zeros(())}, (torch.zeros(()), 3)])
def test_several_losses_are_refused_with_the_hint_to_return_one_number(several: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"the loss is {type(several).__name__}, not a scalar") as caught:
        Objective(None, lambda model, batch: several)(perceptron(), batches(1)[0])
    assert str(caught.value).endswith("hint: return the loss alone, or the sum where these are several")
