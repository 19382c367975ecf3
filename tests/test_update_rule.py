# SPDX-License-Identifier: Apache-2.0
"""Laws of the update rules, against plain torch.optim loops and the papers' formulas."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from distbelief import update_rule as rules
from distbelief.errors import CheckpointError
from distbelief.parameters import Options, Segment, Span, cut

optim = torch.optim
EVEN = 640
"""A length without a tail: there the plain fused optimizers take every element through the same code."""


class Shards:
    """Some shards under one rule, driven as a parameter server drives them."""

    def __init__(
        self, rule: Any, start: Tensor, shards: int = 1, groups: Sequence[tuple[int, Options]] | None = None
    ) -> None:
        self.values, self.version, self.examples = start.clone(), 0, 0
        self.spans = cut(len(start), shards)
        self.parts = [self.values[span.start : span.stop].clone() for span in self.spans]
        self.bound = [
            rule.bind(part, segments(groups or [(len(start), ())], span), span)
            for part, span in zip(self.parts, self.spans, strict=True)
        ]

    def push(self, gradient: Tensor, reader: int = 0, base: int | None = None, examples: int = 32) -> None:
        base = self.version if base is None else base
        for bound, span in zip(self.bound, self.spans, strict=True):
            bound.apply(gradient[span.start : span.stop], reader=reader, version=self.version, base_version=base,
                        examples=self.examples)  # fmt: skip
        self.version, self.examples = self.version + 1, self.examples + examples
        self.values = torch.cat(self.parts)

    def fetch(self, reader: int) -> int:
        for bound in self.bound:
            bound.fetched(reader, self.version)
        return self.version

    def saved(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        each = [bound.vectors() for bound in self.bound]
        return {name: torch.cat([vectors[name] for vectors in each]) for name in each[0]}, self.bound[0].scalars()

    def restore(self, other: "Shards") -> None:
        vectors, scalars = other.saved()
        self.version, self.examples = other.version, other.examples
        for part, bound, span in zip(self.parts, self.bound, self.spans, strict=True):
            part.copy_(other.values[span.start : span.stop])
            bound.load({name: vector[span.start : span.stop] for name, vector in vectors.items()}, scalars)


def segments(groups: Sequence[tuple[int, Options]], span: Span) -> list[Segment]:
    starts = [0, *(stop for stop, _ in groups)]
    whole = [Segment(Span(start, stop), options) for start, (stop, options) in zip(starts, groups, strict=False)]
    cuts = [Segment(segment.span.overlap(span), segment.options) for segment in whole]
    return [segment for segment in cuts if len(segment.span)]


def numbers(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(length: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [numbers(length, 100 + step, dtype) * 3.0 ** (step % 3 - 1) for step in range(count)]


def plain(make: Any, start: Tensor, pushed: list[Tensor]) -> Tensor:
    """The ordinary loop of one process."""
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for gradient in pushed:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


class Signed(optim.Optimizer):
    """A user's own optimizer: sign descent with momentum that scribbles into the gradient and rebinds its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter not in self.state:
                        self.state[parameter] = {"m": torch.zeros_like(parameter), "n": 0}
                    state = self.state[parameter]
                    parameter.grad.mul_(0.5)
                    state["m"] = 0.9 * state["m"] + parameter.grad
                    state["n"] += 1
                    parameter.sub_(state["m"].sign() * group["lr"] / state["n"])


class Counting(optim.Optimizer):
    """A user's own that counts its steps in its parameter groups, and weighs the next one with what it counted."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["taken"] += 1
            group["weight"] = 0.5 * group.get("weight", 1.0) + group["lr"]
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["weight"] / group["taken"])


class Halved(optim.Adam):
    """A user's own on top of one of torch's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        return super().step(closure)


RULES = {
    "adagrad": (rules.adagrad(0.05), partial(optim.Adagrad, lr=0.05, fused=True)),
    "adagrad with everything": (
        rules.adagrad(0.1, initial_accumulator=0.1, eps=1e-6, weight_decay=0.01),
        partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1, eps=1e-6, weight_decay=0.01, fused=True),
    ),
    "sgd": (rules.sgd(0.1, weight_decay=0.1), partial(optim.SGD, lr=0.1, weight_decay=0.1)),
    "sgd with momentum": (
        rules.sgd(0.1, momentum=0.9, nesterov=True),
        partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    ),
    "adam": (rules.adam(0.01), partial(optim.Adam, lr=0.01, fused=True)),
    "adamw": (rules.adamw(0.01), partial(optim.AdamW, lr=0.01, fused=True)),
    "amsgrad": (rules.optimizer(optim.Adam, amsgrad=True), partial(optim.Adam, amsgrad=True, fused=True)),
    "rmsprop": (
        rules.optimizer(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
        partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    ),
    "adadelta": (rules.optimizer(optim.Adadelta), optim.Adadelta),
    "adamax": (rules.optimizer(optim.Adamax), optim.Adamax),
    "nadam": (rules.optimizer(optim.NAdam), optim.NAdam),
    "radam": (rules.optimizer(optim.RAdam, lr=0.1), partial(optim.RAdam, lr=0.1)),
    "asgd": (rules.optimizer(optim.ASGD), optim.ASGD),
    "rprop": (rules.optimizer(optim.Rprop), optim.Rprop),
    "a user's own Adam": (rules.optimizer(Halved, lr=0.05), partial(Halved, lr=0.05)),
    "a user's own that counts": (rules.optimizer(Counting, lr=0.05), partial(Counting, lr=0.05)),
    "a user's own": (rules.optimizer(Signed, lr=0.05), partial(Signed, lr=0.05)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rule_on_any_number_of_shards_equals_the_plain_loop_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    rule, make = RULES[name]
    rules.check(rule)
    start, pushed = numbers(EVEN, 0, dtype), gradients(EVEN, 6, dtype)
    expected = plain(make, start, pushed)
    assert not torch.equal(expected, start)
    for count in (1, 2, 3, 7):
        shards = Shards(rule, start, count)
        for gradient in pushed:
            shards.push(gradient)
        assert torch.equal(shards.values, expected), f"{count} shards"


@pytest.mark.parametrize("name", ["adagrad", "adagrad with everything", "sgd"])
@pytest.mark.parametrize("length", [1, 37, 1003, 5003])
def test_adagrad_and_sgd_equal_the_plain_loop_on_any_length(name: str, length: int) -> None:
    rule, make = RULES[name]
    start, pushed = numbers(length, 0), gradients(length, 6)
    shards = Shards(rule, start)
    for gradient in pushed:
        shards.push(gradient)
    assert torch.equal(shards.values, plain(make, start, pushed))


@pytest.mark.parametrize("name", RULES)
def test_no_rule_asks_for_an_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps on the CPU; a context made where roles are forked from would keep them from using theirs."""
    for asked in ("current_accelerator", "is_available"):
        monkeypatch.setattr(torch.accelerator, asked, lambda **_: pytest.fail("asked for an accelerator"))
    rule = RULES[name][0]
    rules.check(rule)
    shards = Shards(rule, torch.ones(200), 2)
    shards.push(torch.ones(200))


@pytest.mark.parametrize("name", [*RULES, "adaptive revision"])
def test_the_cut_never_changes_the_result(name: str) -> None:
    rule = RULES[name][0] if name in RULES else rules.adaptive_revision(0.1)
    for length in (7, 129, 1003, 10_007):
        start, pushed = numbers(length, 1), gradients(length, 7)
        results = []
        for count in (1, 2, 3, 7):
            shards = Shards(rule, start, count)
            base = shards.fetch(0)
            for step, gradient in enumerate(pushed):
                shards.push(gradient, base=base)
                base = shards.fetch(0) if step % 3 == 2 else base
            results.append(shards.values)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("count", [1, 3])
def test_groups_with_other_weight_decay_and_rate_equal_the_parameter_groups_of_torch(count: int) -> None:
    groups: list[tuple[int, Options]] = [(200, ()), (301, (("weight_decay", 0.0),)), (500, (("rate", 0.01),))]
    start, pushed = numbers(500, 2), gradients(500, 5)
    shards = Shards(rules.adagrad(0.1, weight_decay=0.3), start, count, groups)
    parameters = [nn.Parameter(part.clone()) for part in torch.split(start, [200, 101, 199])]
    options: list[dict[str, float]] = [{}, {"weight_decay": 0.0}, {"lr": 0.01}]
    torch_groups = [{"params": [parameter], **extra} for parameter, extra in zip(parameters, options, strict=True)]
    optimizer = optim.Adagrad(torch_groups, lr=0.1, weight_decay=0.3, fused=True)
    for gradient in pushed:
        shards.push(gradient)
        for parameter, part in zip(parameters, torch.split(gradient, [200, 101, 199]), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    assert torch.equal(shards.values, torch.cat([parameter.detach() for parameter in parameters]))


def test_the_schedule_multiplies_the_rate_as_a_function_of_the_examples_applied() -> None:
    shards = Shards(rules.sgd(0.5, schedule=rules.linear_decay(100, end=0.2)), torch.zeros(3, dtype=torch.float64))
    expected = 0.0
    for factor in (1.0, 0.6, 0.2, 0.2):
        shards.push(torch.ones(3, dtype=torch.float64), examples=50)
        expected -= 0.5 * factor
        assert shards.values.tolist() == pytest.approx([expected] * 3, rel=1e-12)


def test_no_step_is_taken_where_the_schedule_has_no_answer_however_often_it_is_asked() -> None:
    rule = rules.sgd(0.5, schedule=lambda examples: cast(Any, "slow"))
    shards = Shards(rule, torch.zeros(3, dtype=torch.float64))
    for _ in range(2):
        with pytest.raises(ValueError, match="slow"):
            shards.push(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_damping_divides_the_rate_by_a_power_of_one_plus_the_staleness(damping: float) -> None:
    shards = Shards(rules.sgd(1.0, damping=damping), torch.zeros(2, dtype=torch.float64))
    steps = []
    for base in (0, 0, 0, 2, 9):
        before = shards.values
        shards.push(torch.ones(2, dtype=torch.float64), base=base)
        steps.append(float((before - shards.values)[0]))
    assert steps == pytest.approx([(1 + staleness) ** -damping for staleness in (0, 1, 2, 1, 0)], rel=1e-12)


@pytest.mark.parametrize("length", [500, 10_007])
@pytest.mark.parametrize("name", [*RULES, "adaptive revision"])
def test_saved_state_loaded_on_another_cut_goes_on_bit_for_bit(name: str, length: int) -> None:
    rule = RULES[name][0] if name in RULES else rules.adaptive_revision(0.1)
    start, pushed = numbers(length, 3), gradients(length, 8)
    straight = Shards(rule, start, 2)
    for pushes_before in (0, 4):
        # Load into shards that have stepped before, and into fresh ones.
        for stepped in (False, True):
            other = Shards(rule, start, 3)
            if stepped:
                other.push(pushed[7])
            straight = Shards(rule, start, 2)
            for gradient in pushed[:pushes_before]:
                straight.push(gradient)
            other.restore(straight)
            for gradient in pushed[pushes_before:]:
                straight.push(gradient)
                other.push(gradient)
            assert torch.equal(other.values, straight.values)
            assert other.saved()[1] == straight.saved()[1]
            for vector, expected in zip(other.saved()[0].values(), straight.saved()[0].values(), strict=True):
                assert torch.equal(vector, expected)


def test_the_state_has_torch_names_and_numbers_that_differ_between_groups_survive_a_new_cut() -> None:
    adam = Shards(rules.adam(), numbers(70, 4))
    assert adam.saved() == ({}, {})
    adam.push(numbers(70, 5))
    vectors, scalars = adam.saved()
    assert set(vectors) == {"exp_avg", "exp_avg_sq"}
    assert scalars == {"step": 1.0}
    groups: list[tuple[int, Options]] = [(90, (("lr", 0.5),)), (200, ())]
    for rule in (rules.optimizer(optim.ASGD, lr=0.1, lambd=0.1), rules.optimizer(Counting, lr=0.1)):
        start, pushed = numbers(200, 4), gradients(200, 6)
        first, second = Shards(rule, start, 1, groups), Shards(rule, start, 3, groups)
        for gradient in pushed[:3]:
            first.push(gradient)
        second.restore(first)
        for gradient in pushed[3:]:
            first.push(gradient)
            second.push(gradient)
        assert torch.equal(first.values, second.values)


def test_the_state_of_another_rule_is_refused() -> None:
    adam = Shards(rules.adam(), numbers(70, 4))
    adam.push(numbers(70, 5))
    for rule in (rules.adagrad(), rules.sgd(0.1), rules.adaptive_revision(0.1)):
        with pytest.raises(CheckpointError, match="exp_avg"):
            Shards(rule, numbers(70, 4)).restore(adam)


@pytest.mark.parametrize("name", [*RULES, "maximize", "adaptive revision"])
def test_a_pushed_gradient_is_neither_changed_nor_kept(name: str) -> None:
    others = {
        "maximize": rules.optimizer(optim.Adagrad, maximize=True, weight_decay=0.1),
        "adaptive revision": rules.adaptive_revision(0.1),
    }
    rule = RULES[name][0] if name in RULES else others[name]
    kept, overwritten = Shards(rule, numbers(100, 0)), Shards(rule, numbers(100, 0))
    for gradient in gradients(100, 3):
        memory = gradient.clone()
        kept.push(gradient)
        overwritten.push(memory)
        assert torch.equal(memory, gradient)
        memory.fill_(torch.nan)
    assert torch.equal(kept.values, overwritten.values)


def test_adaptive_revision_without_delay_is_adagrad_with_c_inside_the_root() -> None:
    start, pushed = numbers(300, 0, torch.float64), gradients(300, 6, torch.float64)
    shards = Shards(rules.adaptive_revision(0.1, c=0.5), start, 2)
    for gradient in pushed:
        shards.fetch(0)
        shards.push(gradient)
    total, expected = torch.zeros_like(start), start.clone()
    for gradient in pushed:
        total += gradient**2
        expected -= 0.1 * gradient / (total + 0.5).sqrt()
    torch.testing.assert_close(shards.values, expected, rtol=1e-12, atol=1e-14)


def test_pushes_of_one_sign_from_one_base_are_one_step_with_their_sum() -> None:
    start, pushed = numbers(50, 0, torch.float64), [g.abs() for g in gradients(50, 5, torch.float64)]
    shards = Shards(rules.adaptive_revision(0.1, c=0.25), start)
    base = shards.fetch(0)
    for gradient in pushed:
        shards.push(gradient, base=base)
    total = torch.stack(pushed).sum(0)
    z = 0.25 + total**2
    torch.testing.assert_close(shards.saved()[0]["z"], z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shards.values, start - 0.1 * total / z.sqrt(), rtol=1e-12, atol=1e-13)


def test_adaptive_revision_with_delays_follows_the_paper_and_its_memory_stays_bounded() -> None:
    replicas, length, a, c = 5, 20, 0.3, 0.01
    groups: list[tuple[int, Options]] = [(12, ()), (20, (("rate", 0.1),))]
    rates = torch.tensor([a] * 12 + [0.1] * 8, dtype=torch.float64)
    w = numbers(length, 0, torch.float64)
    shards = Shards(rules.adaptive_revision(a, c), w, 1, groups)
    total, z, z_max = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    history = {0: total.clone()}
    bases = dict.fromkeys(range(replicas), shards.fetch(0))
    order = torch.randint(replicas, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    delays, live = [], 0
    for reader in range(1, replicas):
        bases[reader] = shards.fetch(reader)
    for version, (reader, g) in enumerate(zip(order, gradients(length, 400, torch.float64), strict=True)):
        delays.append(version - bases[reader])
        shards.push(g, reader=reader, base=bases[reader])
        unseen = total - history[bases[reader]]
        old = rates / (z_max + c).sqrt()
        z += g**2 + 2 * g * unseen
        z_max = torch.maximum(z_max, z)
        rate = rates / (z_max + c).sqrt()
        w = w - rate * g + (old - rate) * unseen
        total = total + g
        history[version + 1] = total
        torch.testing.assert_close(shards.values, w, rtol=1e-9, atol=1e-11)
        if version % 3:
            bases[reader] = shards.fetch(reader)
        live = max(live, len(shards.bound[0]._sums._sums))
    assert max(delays) > replicas
    assert 1 < live <= 2 * replicas
    for reader in range(replicas):
        shards.bound[0].forget(reader)
    assert not shards.bound[0]._sums._sums


def test_a_reader_that_never_pushes_cannot_fill_the_memory_and_an_unknown_base_is_the_next_known() -> None:
    start, pushed = torch.zeros(4, dtype=torch.float64), gradients(4, 30, torch.float64)
    shards = Shards(rules.adaptive_revision(0.1, c=1.0), start)
    for gradient in pushed[:-1]:
        shards.fetch(7)
        shards.push(gradient)
    assert len(shards.bound[0]._sums._sums) <= 8
    before = shards.saved()[0]["z"].clone()
    shards.bound[0].forget(7)
    shards.push(pushed[-1], base=0)
    torch.testing.assert_close(shards.saved()[0]["z"], before + pushed[-1] ** 2)
