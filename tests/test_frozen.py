# SPDX-License-Identifier: Apache-2.0
"""What training may not change of a model: it is neither lost nor undone, or something is said."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distbelief as db
from distbelief.frozen import Frozen
from tests import problems


class Followed(nn.Module):
    """A layer, and a frozen copy that `follow` is given after so many mini-batches, and after each one then."""

    follow: Callable[[nn.Module, nn.Module], Any]

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layer = nn.Linear(problems.FEATURES, problems.CLASSES)
        self.copy = copy.deepcopy(self.layer).requires_grad_(False)
        self.after, self.calls = after, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > self.after:
                type(self).follow(self.copy, self.layer)
        output: Tensor = self.layer(x) + self.copy(x)
        return output


@torch.no_grad()
def average(copy: nn.Module, layer: nn.Module) -> None:
    for one, other in zip(copy.parameters(), layer.parameters(), strict=True):
        one.mul_(0.5).add_(other + 0.1, alpha=0.5)


def scale(copy: Any, layer: nn.Module) -> None:
    copy.weight.data.mul_(0.9)


def replace(copy: Any, layer: nn.Module) -> None:
    copy.weight = nn.Parameter(torch.ones_like(copy.weight), requires_grad=False)


def unfreeze(copy: nn.Module, layer: nn.Module) -> None:
    copy.requires_grad_()


def nothing(copy: nn.Module, layer: nn.Module) -> None:
    for parameter in layer.parameters():  # as where one of two models trains the other
        parameter.requires_grad_(False).requires_grad_()
    for parameter in copy.parameters():
        parameter.data = parameter.data.clone()


def following(how: Any, after: int) -> Callable[[], nn.Module]:
    kind = type("Followed", (Followed,), {"follow": staticmethod(how)})
    return lambda: kind(after)


CHANGED = "computing the loss changes the frozen parameter copy.weight"


@pytest.mark.parametrize(
    ("how", "said", "hint"),
    [
        (average, CHANGED, "register_buffer"),
        (scale, CHANGED, "register_buffer"),
        (replace, CHANGED, "register_buffer"),
        (unfreeze, "parameter copy.weight was frozen when the job began and requires a gradient now", "two jobs"),
    ],
)
@pytest.mark.parametrize(("after", "error"), [(0, db.ConfigurationError), (30, db.UserCodeError)])
def test_a_frozen_parameter_that_training_changes_or_unfreezes_is_named_whenever_that_happens(
    how: Any, said: str, hint: str, after: int, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        db.train(problems.job(model=following(how, after), run=tmp_path / "run"), view=False)
    assert said in str(caught.value)
    assert hint in str(caught.value).partition("hint: ")[2]


def clip(copy: nn.Module, layer: Any) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.1, 0.1)


def begin(copy: Any, layer: nn.Module) -> None:
    copy.shift = nn.Parameter(torch.zeros(problems.CLASSES))


def begin_anew(copy: nn.Module, layer: Any) -> None:
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))


def measure(copy: nn.Module, layer: nn.Module) -> None:
    copy.register_buffer("mean", torch.zeros(problems.FEATURES))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (clip, "computing the loss changes parameter layer.weight itself"),
        (begin, "parameter copy.shift was not there when the job began"),
        (begin_anew, "parameter layer.weight is another one than when the job began"),
        (measure, "buffer copy.mean was not there when the job began"),
    ],
)
@pytest.mark.parametrize(("after", "error"), [(0, db.ConfigurationError), (30, db.UserCodeError)])
def test_what_training_writes_past_the_shards_or_adds_to_the_model_is_named_whenever_that_happens(
    how: Any, said: str, after: int, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        db.train(problems.job(model=following(how, after), run=tmp_path / "run"), view=False)
    assert said in str(caught.value)


def stepping() -> nn.Module:
    """Its gradients are stepped with as soon as they are there, and dropped, to save memory."""
    model = problems.classifier()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: step_once(optimizer))
    return model


def step_once(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def test_a_hook_that_takes_the_step_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(db.UserCodeError, match="leave the optimizer's steps to the job"):
        db.train(problems.job(model=stepping, run=tmp_path / "run"), view=False)


def test_sandblaster_names_it_too(tmp_path: Path) -> None:
    job = problems.job(
        model=following(average, 30), algorithm=db.Sandblaster(max_iterations=30, micro_batch=64, gtol=0.0, ftol=0.0),
        run=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(db.UserCodeError, match=CHANGED):
        db.train(job, view=False)


def test_frozen_parameters_that_only_move_are_of_no_concern(tmp_path: Path) -> None:
    job = problems.job(model=following(nothing, 0), run=tmp_path / "run")
    assert db.train(job, view=False).test["accuracy"] > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.bool])
def test_the_bits_of_all_kinds_of_numbers_are_compared_and_nan_is_itself(dtype: torch.dtype) -> None:
    module = nn.Module()
    values = torch.tensor([[0.0, 1.0, float("nan")], [1.0, 2.0, 3.0]]).to(dtype)
    module.some = nn.Parameter(values.t(), requires_grad=False)
    module.one = nn.Parameter(values[0, 0].clone(), requires_grad=False)
    frozen = Frozen(module)
    frozen.check(closely=True)
    with torch.no_grad():
        module.some.copy_(values.t().clone())
    frozen.check(closely=False)
    module.one.data.fill_(1)
    frozen.check(closely=False)  # torch tells nobody
    with pytest.raises(db.ConfigurationError, match="the frozen parameter one"):
        frozen.check(closely=True)


def test_a_frozen_parameter_that_torch_has_yet_to_conjugate_or_negate_is_compared_too() -> None:
    module = nn.Module()
    module.back = nn.Parameter(torch.tensor([1 + 2j]).conj(), requires_grad=False)
    module.below = nn.Parameter(torch.tensor([1 + 2j]).conj().imag, requires_grad=False)
    frozen = Frozen(module)
    frozen.check(closely=True)
    module.below.data.fill_(1)
    with pytest.raises(db.ConfigurationError, match="the frozen parameter below"):
        frozen.check(closely=True)


def test_frozen_parameters_whose_bits_cannot_be_read_are_let_be() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.inferred = nn.Parameter(torch.ones(2), requires_grad=False)
    module.nowhere = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    Frozen(module).check(closely=True)
