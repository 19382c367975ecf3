# SPDX-License-Identifier: Apache-2.0
"""Laws of the update rules as values: what is refused before anything starts, schedules, pickling, printing."""

import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import pytest
import torch
from torch import nn, optim

from distbelief import update_rule as rules
from distbelief.errors import ConfigurationError
from distbelief.parameters import Segment, Span


class Descent(optim.Optimizer):
    """Elementwise: plain steps against the gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad


class ClipsByNorm(Descent):
    """Not elementwise: what one parameter does depends on all the others."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        nn.utils.clip_grad_norm_([parameter for group in self.param_groups for parameter in group["params"]], 1.0)
        super().step()


class Counted(Descent):
    """Knows how often it was made."""

    made = 0

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        Counted.made += 1


class CentresRows(Descent):
    """Not elementwise on matrices only."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() > 1:
                    parameter.grad -= parameter.grad.mean(dim=1, keepdim=True)
        super().step()


class NeedsClosure(Descent):
    """Its step cannot be taken without the loss."""

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class ScheduleFree(Descent):
    """Its parameters are others in training than in tests."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


class KeepsNorms(Descent):
    """Elementwise steps, but state that is neither a number nor one number per parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["ends"] = parameter.detach().view(-1)[[0, -1, 0]].clone()


class KeepsToItself(Descent):
    """Counts its steps in an attribute, and in a state that is of no parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.taken += 1
        self.state[cast(Any, "all")] = {"taken": self.taken}


def test_schedules_pass_through_their_corners_and_travel_by_pickle() -> None:
    rise_and_fall = rules.warmup(100, start=0.5, then=rules.cosine_decay(400, end=0.1))
    assert rise_and_fall(0) == pytest.approx(0.5)
    assert rise_and_fall(200) == pytest.approx(0.55)
    assert rise_and_fall(400) == rise_and_fall(10**9) == pytest.approx(0.1)
    assert rules.linear_decay(10)(10) == 0.0
    assert pickle.loads(pickle.dumps(rise_and_fall)) == rise_and_fall


@pytest.mark.parametrize("schedule", [rules.linear_decay, rules.cosine_decay, rules.warmup])
def test_a_schedule_over_no_examples_is_refused_when_it_is_made(schedule: Callable[[int], Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"to_examples=0 leaves no examples.*\nhint: use 1 or more"):
        schedule(0)
    assert schedule(1)(1) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (rules.adagrad(-0.1), "Invalid learning rate"),
        (rules.adagrad(0.0), "rate 0.0"),
        (rules.sgd(float("nan")), "nan"),
        (rules.sgd(0.1, momentum=float("nan")), "infinite or NaN"),
        (rules.sgd(0.1, nesterov=True), "Nesterov"),
        (rules.adam(betas=(1.0, 0.9)), "Invalid beta"),
        (rules.adagrad(0.1, damping=-1.0), "damping=-1.0"),
        (rules.adagrad(0.1, schedule=cast(Any, len)), "object of type 'int' has no len"),
        (rules.optimizer(optim.RMSprop, speed=3), "speed"),
        (rules.optimizer(optim.LBFGS), "line search"),
        (rules.optimizer(optim.Muon), "matrices"),
        (rules.optimizer(optim.Adafactor), "norm of a whole tensor"),
        (rules.optimizer(optim.SparseAdam), "sparse"),
        (rules.optimizer(ClipsByNorm), "when its parameters are cut in two"),
        (rules.optimizer(CentresRows), "for a matrix"),
        (rules.optimizer(NeedsClosure), "closure"),
        (rules.optimizer(KeepsNorms), "keeps ends"),
        (rules.optimizer(KeepsToItself), "keeps all, taken where no checkpoint would hold it"),
        (rules.optimizer(ScheduleFree), r"wants more than step\(\)"),
        (rules.optimizer(optim.Adam, lr=torch.tensor(0.1)), "rate of Adam is a tensor"),
        (rules.sgd(cast(Any, torch.tensor(0.1))), "rate of sgd is a tensor\nhint: give a float"),
        (rules.optimizer(cast(Any, nn.Linear)), "no subclass"),
        (rules.adaptive_revision(0.0), "rate=0.0"),
        (rules.adaptive_revision(0.1, c=0.0), "c=0.0"),
        (rules.adagrad, "no update rule"),
        (optim.Adam, "no update rule"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(rule: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rules.check(rule)


def test_a_rule_that_divides_by_what_the_parameters_cannot_hold_is_refused() -> None:
    groups = [(("eps", 1e-10),), (("rate", 0.2),)]
    for rule, options, message in (
        (
            rules.adagrad(),
            [],
            r"makes NaN of a gradient of zero in torch\.float16\nhint: use a larger eps",
        ),
        (rules.adam(), [], r"adam\(0\.001\) makes NaN"),
        (rules.adam(eps=1e-4), groups, r"with \{'eps': 1e-10\} makes NaN"),
        (rules.adaptive_revision(0.1), [], r"c=1e-10\) is 0 in torch\.float16"),
    ):
        rules.check(rule, options)
        rules.check(rule, options, dtype=torch.bfloat16)
        with pytest.raises(ConfigurationError, match=message):
            rules.check(rule, options, dtype=torch.float16)
    rules.check(rules.adam(eps=1e-4), groups[1:], dtype=torch.float16)
    rules.check(rules.adam(), [(("eps", 1e-4),)], dtype=torch.float16)  # no parameter has the rule's own


def infinite_later(examples: int) -> float:
    return math.inf if examples > 600 else 1.0


def named_later(examples: int) -> Any:
    return "slow" if examples > 600 else 1.0


def infinite_at_last(examples: int) -> float:
    return math.inf if examples == 999 else 1.0


@pytest.mark.parametrize("rule", [rules.sgd, rules.adaptive_revision])
@pytest.mark.parametrize("kind", [Decimal, Fraction, torch.tensor])
def test_a_schedule_may_answer_any_kind_of_number(rule: Any, kind: Callable[[float], Any]) -> None:
    rules.check(rule(0.1, schedule=lambda examples: kind(0.5)))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (rules.linear_decay(1000, end=-1.0), r"schedule\(510\) of Decay.* is -0\.02.*\nhint: .* the 1,000 examples"),
        (infinite_later, r"schedule\(610\) of .*infinite_later.* is inf"),
        (infinite_at_last, r"schedule\(999\) of .*infinite_at_last.* is inf"),
        (named_later, r"schedule\(610\) of .*named_later.* failed: ValueError"),
    ],
)
@pytest.mark.parametrize("rule", [rules.adagrad, rules.adaptive_revision])
def test_a_schedule_is_tried_all_along_the_job(rule: Any, schedule: Any, message: str) -> None:
    rules.check(rule(0.1, schedule=schedule), (), 500)
    with pytest.raises(ConfigurationError, match=message):
        rules.check(rule(0.1, schedule=schedule), (), 1000)


@pytest.mark.parametrize("rule", [rules.adagrad, rules.adaptive_revision])
@pytest.mark.parametrize(
    "schedule", [rules.cosine_decay(500), rules.warmup(100, 0.0, rules.linear_decay(32)), lambda _: 0]
)
def test_a_schedule_that_is_over_after_half_of_the_job_is_refused_as_one_of_mini_batches(
    rule: Any, schedule: Any
) -> None:
    rules.check(rule(0.1, schedule=rules.warmup(100, 0.0, rules.cosine_decay(510))), (), 1000)
    rules.check(rule(0.1, schedule=rules.cosine_decay(32, end=0.01)), (), 1000)
    with pytest.raises(ConfigurationError, match=r"is 0 from example \d+ on.*\nhint: a schedule counts examples, not"):
        rules.check(rule(0.1, schedule=schedule), (), 1000)


@pytest.mark.parametrize("rule", [rules.adagrad(), rules.sgd(0.1, momentum=0.9), rules.adaptive_revision(0.1)])
def test_an_option_of_a_group_that_the_rule_does_not_know_is_refused_with_the_known_ones(rule: Any) -> None:
    for name in ("speed", "initial_accumulator_value", "fused"):
        with pytest.raises(ConfigurationError, match=rf"sets {name}.*\n.*knows .*c, rate|knows .*weight_decay"):
            rules.check(rule, [(), ((name, 0.1),)])
        with pytest.raises(ConfigurationError, match=f"sets {name}"):
            rule.bind(torch.zeros(3), [Segment(Span(0, 3), ((name, 0.1),))], Span(0, 3))


def test_groups_that_are_out_of_range_or_keep_other_state_are_refused() -> None:
    rules.check(rules.sgd(0.1), [(("lr", 0.0),), (("weight_decay", 0.5),)])
    for group, message in (((("lr", -1.0),), "learning rate"), ((("momentum", 0.9),), "other state")):
        with pytest.raises(ConfigurationError, match=message):
            rules.check(rules.sgd(0.1), [group])
    with pytest.raises(ConfigurationError, match="twice"):
        rules.check(rules.sgd(0.1), [(("lr", 0.1), ("rate", 0.2))])
    with pytest.raises(ConfigurationError, match="c -1"):
        rules.check(rules.adaptive_revision(0.1), [(("c", -1.0),)])


def test_options_are_tried_once_however_many_parameters_have_them() -> None:
    made = []
    for parameters in (1, 1000):
        before = Counted.made
        rules.check(rules.optimizer(Counted), [(("lr", 0.2),)] * parameters + [()] * parameters)
        made.append(Counted.made - before)
    assert made[0] == made[1] > 0


def test_rules_are_equal_after_pickling_and_print_what_differs_from_torch() -> None:
    rule = rules.adagrad(0.05, weight_decay=0.1, damping=0.5, schedule=rules.linear_decay(10))
    assert pickle.loads(pickle.dumps(rule)) == rule
    schedule = "Decay(to_examples=10, end=0.0, shape='linear')"
    assert repr(rule) == f"adagrad(0.05, weight_decay=0.1, schedule={schedule}, damping=0.5)"
    assert repr(rules.optimizer(optim.RMSprop, momentum=0.9)) == "RMSprop(0.01, momentum=0.9)"
    assert repr(rules.adaptive_revision(0.1, c=0.5)) == "adaptive_revision(0.1, c=0.5)"
    assert repr(rules.sgd(0.1, schedule=lambda examples: 1.0)) == "sgd(0.1, schedule=<lambda>)"
    assert repr(rules.adaptive_revision(0.1, c=0.5, schedule=half)) == "adaptive_revision(0.1, c=0.5, schedule=half)"


def half(examples: int) -> float:
    return 0.5
