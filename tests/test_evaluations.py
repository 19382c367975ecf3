# SPDX-License-Identifier: Apache-2.0
"""When a job evaluates: at each so many examples, one at a time, and at its end what it led to; how much at once."""

import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief import evaluator
from distbelief.errors import ConfigurationError
from distbelief.evaluations import Evaluations


def finish(evaluations: Evaluations, at: int, examples: int) -> None:
    assert evaluations.finished(at, 0.5, {}, 1.0, examples).examples == at


def test_it_is_due_at_the_next_multiple_and_one_at_a_time() -> None:
    evaluations = Evaluations(100, wanted=True)
    assert evaluations.next(99) == (None, False)
    assert evaluations.next(130) == (130, False)
    assert evaluations.next(250) == (130, False), "the one under way is not begun anew"
    finish(evaluations, 130, 250)
    assert evaluations.next(299) == (None, False)
    assert evaluations.next(300) == (300, False)


def test_a_job_that_goes_on_evaluates_as_many_examples_later() -> None:
    evaluations = Evaluations(100, wanted=True)
    evaluations.begin(1000)
    assert evaluations.next(1099) == (None, False)
    assert evaluations.next(1100) == (1100, False)


def test_the_end_is_evaluated_once() -> None:
    evaluations = Evaluations(100, wanted=True)
    evaluations.begin_last(80)
    assert evaluations.awaited(0.0)
    assert evaluations.next(80) == (80, False)
    finish(evaluations, 80, 80)
    evaluations.begin_last(80)
    assert not evaluations.awaited(0.0), "it has been evaluated there"
    evaluations.end()
    assert evaluations.next(80) == (None, True)


def test_the_end_is_evaluated_once_more_when_a_shard_has_gone_back_since() -> None:
    evaluations = Evaluations(100, wanted=True)
    assert evaluations.next(100) == (100, False)
    finish(evaluations, 100, 100)
    evaluations.spoilt()
    evaluations.begin_last(100)
    assert evaluations.next(100) == (100, False)


def test_the_end_is_evaluated_also_behind_one_that_was_still_under_way() -> None:
    evaluations = Evaluations(100, wanted=True)
    assert evaluations.next(100) == (100, False)
    evaluations.begin_last(180)
    assert evaluations.next(180) == (100, False)
    finish(evaluations, 100, 180)
    assert evaluations.awaited(0.0)
    assert evaluations.next(180) == (180, False)
    finish(evaluations, 180, 180)
    assert not evaluations.awaited(0.0)


def test_the_last_one_is_waited_for_twenty_times_as_long_as_the_slowest() -> None:
    for slowest, limit in [(0.0, 600.0), (45.0, 900.0)]:
        evaluations = Evaluations(100, wanted=True)
        if slowest:
            for seconds in (1.0, slowest, 2.0):
                evaluations.finished(1, None, {}, seconds, 1)
        evaluations.begin_last(5)
        assert evaluations.awaited(7.0)
        assert evaluations.awaited(7.0 + limit - 0.1)
        assert not evaluations.awaited(7.0 + limit)


def test_one_that_was_still_under_way_takes_nothing_from_the_time_of_the_last() -> None:
    evaluations = Evaluations(100, wanted=True)
    evaluations.next(100)
    evaluations.begin_last(180)
    assert evaluations.awaited(0.0)
    assert evaluations.awaited(599.0)
    finish(evaluations, 100, 180)
    assert evaluations.awaited(599.5)
    assert evaluations.awaited(1199.0)
    assert not evaluations.awaited(1199.5)


def test_without_an_evaluator_nothing_is_awaited() -> None:
    evaluations = Evaluations(100, wanted=False)
    evaluations.begin(0, at_once=True)
    evaluations.begin_last(500)
    assert not evaluations.awaited(0.0)
    assert evaluations.next(0) == (None, True)


def test_one_at_the_beginning_leaves_the_others_where_they_were() -> None:
    for begun in (0, 250):
        evaluations = Evaluations(100, wanted=True)
        evaluations.begin(begun, at_once=True)
        seen = []
        for examples in range(begun, begun + 400):
            at, _ = evaluations.next(examples)
            if at is not None and examples % 7 == 0:  # an evaluation takes a few examples
                evaluations.finished(at, 0.5, {}, 1.0, examples)
                seen.append(at)
        assert seen[:2] == [begun, begun + 100]
        assert [at % 100 for at in seen[2:]] == [0] * len(seen[2:])
        assert len(seen) >= 4


def test_what_is_not_finite_is_told_as_not_known() -> None:
    told = Evaluations(100, wanted=True).finished(7, math.inf, {"accuracy": math.nan, "top5": 0.5}, 1.0, 7)
    assert told.loss is None
    assert told.metrics == {"loss": None, "accuracy": None, "top5": 0.5}
    unmeasured = Evaluations(100, wanted=True).finished(7, None, {"top5": 0.5}, 1.0, 7)
    assert (unmeasured.loss, unmeasured.metrics) == (None, {"top5": 0.5})


def measured_at_once(monkeypatch: pytest.MonkeyPatch, wide: int, inputs: Tensor) -> tuple[list[int], float | None]:
    """How many examples a model of so many outputs is given at once, where a megabyte is large; and their mean loss."""
    monkeypatch.setattr(evaluator, "EVALUATION_BYTES", 1 << 20)
    model, given = nn.Linear(inputs.shape[1], wide, bias=False), list[int]()
    nn.init.ones_(model.weight)
    model.register_forward_hook(lambda _, arguments, output: given.append(len(output)))
    data = TensorDataset(inputs, torch.zeros(len(inputs)))
    job = db.Job(model=nn.Identity, loss=lambda output, target: output.mean(), data=data, batch_size=8)
    loss, _ = job.measures.measure(model, data, torch.device("cpu"))
    return given, loss


def test_small_examples_are_measured_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.arange(2000.0).view(-1, 1)
    given, loss = measured_at_once(monkeypatch, 1, inputs)
    assert given == [8, 1024, 976], "the first tells how large they are"
    assert loss == pytest.approx(999.5)


def test_of_fewer_examples_than_a_mini_batch_has_all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_at_once(monkeypatch, 1, torch.arange(5.0).view(-1, 1)) == ([5], 2.0)


def test_a_model_is_measured_as_it_is_used_and_not_as_it_is_trained() -> None:
    data = TensorDataset(torch.ones(20, 1), torch.zeros(20))
    job = db.Job(model=nn.Identity, loss=lambda output, target: output.mean(), data=data, batch_size=8)
    loss, _ = job.measures.measure(nn.Dropout(0.5).train(), data, torch.device("cpu"))
    assert loss == 1.0


@pytest.mark.parametrize(("wide", "long"), [(1, 100_000), (100_000, 1)])
def test_of_large_examples_or_outputs_no_more_are_measured_at_once_than_are_trained_on(
    wide: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, loss = measured_at_once(monkeypatch, wide, torch.arange(20.0).view(-1, 1).expand(-1, long))
    assert given == [8, 8, 8, 4]
    assert loss == pytest.approx(9.5 * long)


def test_of_examples_in_between_as_many_are_measured_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = measured_at_once(monkeypatch, 1, torch.zeros(100, 8190))  # with target and output 32 KiB each
    assert given == [8, 32, 32, 32, 4]


@pytest.mark.parametrize(("found", "shown"), [(torch.ones(2, 3), r"\[2, 3\]"), (None, "NoneType"), ("much", "str")])
def test_a_metric_that_is_no_number_is_named_with_what_it_is(found: object, shown: str) -> None:
    data = TensorDataset(torch.ones(4, 1), torch.zeros(4))
    metrics: dict[str, Any] = {"accuracy": lambda output, target: found}
    job = db.Job(model=nn.Identity, loss=lambda output, target: output.mean(), data=data, test=data, metrics=metrics)
    with pytest.raises(ConfigurationError, match=rf"the metric accuracy is {shown}, not a number\nhint: "):
        job.measures.measure(nn.Identity(), data, torch.device("cpu"))


def test_what_evaluate_may_return_for_a_metric_is_what_a_metric_may_return_to_types_as_in_fact() -> None:
    def evaluate(model: nn.Module, test: TensorDataset) -> dict[str, Tensor]:
        return {"mean": model(test.tensors[0]).mean()}

    measures = db.Job(model=nn.Identity, data=None, loss=nn.functional.mse_loss, test=True, evaluate=evaluate).measures
    test = TensorDataset(torch.arange(5.0))
    assert measures.measure(nn.Identity(), test, torch.device("cpu")) == (None, {"mean": 2.0})
    (evaluation, _) = get_args(get_type_hints(db.Job)["evaluate"])
    assert get_args(get_args(evaluation)[1])[1] == get_args(evaluator.Metric)[1]
