# SPDX-License-Identifier: Apache-2.0
"""Laws: stages one after another are the uncut model, in training and in evaluation, wherever it is cut."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from staged_models import MODELS, Block, Decoder, check, loss, make, mini_batch, of, perceptron, plain
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from distbelief.errors import ConfigurationError
from distbelief.partition.materialise import record
from distbelief.partition.stages import StagePlan, stages

ROOT = Path(__file__).parents[2]
Together = Callable[[str, int], None]
"""Run a task of `staged_models` as a replica of so many processes."""


def in_processes(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that uses the program, which takes seconds to start."""
    return pytest.mark.slow(pytest.mark.xdist_group("stages")(test))


@pytest.fixture(scope="module")
def program() -> Iterator["subprocess.Popen[str]"]:
    """The program `staged_models`, which has imported what its replicas need."""
    running = subprocess.Popen(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("staged_models.py"))], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with running:
        try:
            yield running
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


@pytest.fixture
def together(program: "subprocess.Popen[str]", tmp_path: Path) -> Together:
    def run(task: str, partitions: int) -> None:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(json.dumps([str(tmp_path), partitions, task]) + "\n")
        program.stdin.flush()
        assert program.stdout.readline() == "0\n", Path(tmp_path, "told").read_text()

    return run


@in_processes
@pytest.mark.parametrize("partitions", [1, 2, 3, 4])
def test_a_replica_in_stages_computes_what_the_uncut_model_does(partitions: int, together: Together) -> None:
    together("trains", partitions)


@in_processes
def test_so_does_one_whose_stages_meet_in_host_memory_as_on_one_accelerator(together: Together) -> None:
    together("trains through host memory", 2)


@in_processes
def test_hooks_see_parts_of_the_mean(together: Together) -> None:
    together("hooks", 2)


@in_processes
def test_partitions_listen_on_this_machine_only(together: Together) -> None:
    together("listens", 2)


@in_processes
def test_the_loss_of_a_partition_is_noticed(together: Together) -> None:
    together("dies", 3)


@in_processes
def test_a_partition_that_hangs_is_noticed_within_the_deadline(together: Together) -> None:
    together("hangs", 2)


# planning


def planned(model: nn.Module, partitions: int, shape: Sequence[int], **options: Any) -> StagePlan:
    return stages(model, torch.empty(8, *shape), partitions, options.pop("microbatches", 2), **options)


def in_turn(plan: StagePlan, build: Callable[[], nn.Module]) -> nn.Sequential:
    """All stages in this process, one after another."""
    return nn.Sequential(*(make(plan, partition, build) for partition in range(plan.partitions)))


@pytest.mark.parametrize("partitions", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_one_after_another_are_the_model(name: str, partitions: int) -> None:
    uncut, (x, target) = plain(name, torch.float64), mini_batch(name, 8, torch.float64)
    plan = stages(uncut, x, partitions, 2)
    chain = in_turn(plan, of(name, torch.float64))
    for step in range(2):
        for model in (uncut, chain):
            model.train().zero_grad()
            loss(model(x), target).backward()  # type: ignore[no-untyped-call]
        for stage in chain:
            for parameter_name, parameter in stage.parameters_by_name.items():
                if parameter.requires_grad:
                    check(parameter.grad, uncut.get_parameter(parameter_name).grad, f"{parameter_name}, step {step}")
            for buffer_name, buffer in stage.buffers_by_name.items():
                assert buffer.equal(uncut.get_buffer(buffer_name))
        check(chain.eval()(x), uncut.eval()(x), "output")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_stage_and_every_stage_some(name: str) -> None:
    model = plain(name, torch.float32)
    plan = stages(model, mini_batch(name, 8, torch.float32)[0], 3, 2)
    trainable = {each: value for each, value in model.named_parameters() if value.requires_grad}
    owned = [piece for partition in range(3) for piece in plan.pieces(partition)]
    assert sorted(piece.name for piece in owned) == sorted(trainable)
    for piece in owned:
        assert piece.full_shape == tuple(trainable[piece.name].shape)
        assert piece.box == tuple((0, length) for length in piece.full_shape)
    frozen = [piece.name for partition in range(3) for piece in plan.frozen(partition)]
    assert sorted(frozen) == sorted(each for each, value in model.named_parameters() if not value.requires_grad)
    buffers = [piece.name for partition in range(3) for piece in plan.buffers(partition)]
    assert sorted(set(buffers)) == sorted(each for each, _ in model.named_buffers())
    assert all(numbers.parameters for numbers in plan.numbers)


def test_a_transformer_is_cut_between_its_blocks() -> None:
    x = mini_batch("decoder", 8, torch.float32)[0]
    assert stages(Decoder(), x, 2, 2).layers == (
        ("letter", "blocks.0", "blocks.1"), ("blocks.2", "score.0", "score.1")
    )  # fmt: skip
    assert [layers[-1] for layers in stages(Decoder(), x, 3, 2).layers] == ["blocks.0", "blocks.1", "score.1"]


def test_stages_are_balanced_by_operations_and_what_is_sent() -> None:
    model = nn.Sequential(*(nn.Linear(width, width) for width in [64] * 6))
    assert [len(layers) for layers in planned(model, 3, [64]).layers] == [2, 2, 2]
    numbers = planned(model, 2, [64]).numbers
    assert [each.operations for each in numbers] == [3 * 2 * 64 * 64] * 2
    assert [each.parameters for each in numbers] == [3 * (64 * 64 + 64)] * 2
    assert [(each.elements_in, each.elements_out) for each in numbers] == [(0, 64), (64, 0)]
    narrow = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 64))
    assert [len(layers) for layers in planned(narrow, 2, [8]).layers] == [2, 1]


NAMED = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))


@pytest.mark.parametrize(
    ("cuts", "lengths"),
    [(["0", "3"], [3, 3]), (["0-1", "2-5"], [2, 4]), (["0", "1", "5"], [1, 4, 1]), (["0", "2-3", "4"], [2, 2, 2])],
)
def test_stages_begin_where_they_are_told_to(cuts: list[str], lengths: list[int]) -> None:
    plan = planned(NAMED, len(cuts), [3], cuts=cuts)
    assert [len(layers) for layers in plan.layers] == lengths


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        (["0", "nine"], "module 'nine', which Sequential has not"),
        (["0", "3", "4"], "3 stages are named for 2 partitions"),
        (["3", "1"], "1 does not come after 3"),
        (["0-1", "3"], r"stage 0 to 1: 2\.weight would belong to it, too"),
        (["0-4", "3"], "stage 0 to 4: what it ends with is beyond it"),
        (["1", "3"], r"the first stage, which is to begin with 1: 0\.weight would belong to it, too"),
    ],
)
def test_names_that_make_no_stages_are_refused(cuts: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        planned(NAMED, 2, [3], cuts=cuts)
    assert str(caught.value).splitlines()[-1].startswith("hint: ")


class Nested(nn.Module):
    """All layers inside one module of the user's, which also draws; and something before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(x))


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for layer in self.layers:
            x = functional.dropout(torch.tanh(layer(x)) * times, 0.5, self.training)
        return x


def test_a_module_that_is_more_than_a_fair_share_is_looked_into() -> None:
    plan = planned(Nested(), 3, [8])
    assert [len(layers) for layers in plan.layers] == [2, 2, 3]


def test_a_module_that_is_named_in_part_is_looked_into() -> None:
    plan = planned(Nested(), 2, [8], cuts=["inside.layers.0", "inside.layers.2"])
    assert plan.layers[0] == ("inside.layers.0", "inside.layers.1")


def test_blocks_that_need_no_cut_stay_whole() -> None:
    model = nn.Sequential(*(Block(8) for _ in range(4)))
    assert planned(model, 2, [6, 8]).layers == (("0", "1"), ("2", "3"))
    halves = planned(nn.Sequential(Block(8)), 2, [6, 8]).layers
    assert halves == (("0.norm", "0.mix", "0.join"), ("0.feed_norm", "0.feed.0", "0.feed.1", "0.feed.2"))


def test_functions_know_whether_they_train() -> None:
    torch.manual_seed(0)
    uncut = Nested()
    chain = in_turn(planned(uncut, 3, [8]), Nested)
    x = torch.randn(5, 8)
    check(chain.eval()(x), uncut.eval()(x), "output in evaluation")
    chain.train()
    assert not torch.equal(chain(x), chain(x))
    outputs = []
    for model in (uncut.train(), chain):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert torch.equal(*outputs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.middle, self.score = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.score.weight = self.byte.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.middle(self.byte(x)))


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        return self.four(self.three(self.two(first)) + first)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.two(self.one(x)))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.two(x)


class TiedSkipping(nn.Module):
    """Nothing can be cut before `two`; before `three` its tied parameter alone is in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.three.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.one(x) + self.two(x))


class Fickle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if self.training else self.one(self.two(x))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return self.two(x), x


class Computing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("build", "partitions", "said"),
    [
        (Tied, 2, r"Tied can be cut into at most 1 stages, not 2; .* parameter byte\.weight is used before and after"),
        (Twice, 2, r"at most 1 stages, not 2; .* parameter one\.weight is used before and after"),
        (TiedSkipping, 2, r"at most 1 stages, not 2; before three, .* parameter one\.weight is used before and after"),
        (
            Skipping,
            4,
            "at most 3 stages, not 4; before three, for example, the output of one and the output of two would",
        ),
        (Fickle, 2, "Fickle calls other layers in evaluation than in training"),
        (perceptron, 6, "at most 5 stages, not 6"),
        (Choosing, 2, "the forward pass of Choosing cannot be followed: TraceError"),
        (Unused, 2, r"parameter three\.weight takes no part in the forward pass"),
        (Pairs, 1, "Pairs returns a tuple"),
        (Computing, 2, "computes with a tensor that is neither a parameter nor a buffer"),
    ],
)
def test_a_model_that_cannot_be_cut_says_why(build: Callable[[], nn.Module], partitions: int, said: str) -> None:
    shape, dtype = ([12] if build is perceptron else [4]), torch.long if build is Tied else torch.float32
    with pytest.raises(ConfigurationError, match=said) as caught:
        stages(build(), torch.zeros(8, *shape, dtype=dtype), partitions, 2)
    assert str(caught.value).splitlines()[-1].startswith("hint: ")


def hooked(name: str, forward: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4))
    if forward:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model.get_submodule(name).register_full_backward_hook(lambda module, before, after: None)
    return model


def test_hooks_of_modules_that_are_looked_into_are_refused_and_those_of_steps_are_not() -> None:
    for name, said in (("", "the model itself has backward hooks"), ("1", "module 1 has backward hooks")):
        with pytest.raises(ConfigurationError, match=said) as caught:
            planned(hooked(name), 2, [4])
        assert "partitions=1" in caught.value.hint
    assert planned(hooked("0"), 2, [4]).partitions == 2


class Halting(nn.Sequential):
    """Its statistics are those that it was given, as when a model that was trained before is trained on."""

    def train(self, mode: bool = True) -> "Halting":
        super().train(mode)
        self[1].eval()
        return self


class Closed(Halting):
    """The same as a step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_mode_that_a_module_around_gives_a_step_is_refused_and_that_within_a_step_is_kept() -> None:
    def build(kind: type[Halting]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4))

    with pytest.raises(ConfigurationError, match=r"train\(True\) leaves module 0\.1 in evaluation") as caught:
        planned(build(Halting), 2, [4])
    assert "partitions=1" in caught.value.hint
    x = torch.randn(8, 4)
    kept = partial(build, Closed)
    torch.testing.assert_close(in_turn(planned(kept(), 2, [4]), kept)(x), kept().train()(x))


@pytest.mark.parametrize("name", ["", "0", "1", "1.1"])
def test_forward_hooks_are_a_part_of_the_stages_that_they_are_in(name: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return hooked(name, forward=True)

    x = torch.randn(8, 4)
    torch.testing.assert_close(in_turn(planned(build(), 2, [4]), build)(x), build()(x))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def test_a_pruned_layer_says_how_to_make_it_an_ordinary_one() -> None:
    with pytest.raises(ConfigurationError, match=r"^0\.weight is made anew before each forward pass") as caught:
        planned(record(pruned, 0).module, 2, [12]).pieces(0)
    assert "prune.remove" in caught.value.hint


def test_named_cuts_through_two_values_or_a_tied_parameter_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no stage can begin with three: the output of one and") as caught:
        planned(Skipping(), 2, [4], cuts=["one", "three"])
    assert "begin it with another module" in caught.value.hint
    with pytest.raises(
        ConfigurationError, match=r"no stage can begin with score: parameter byte\.weight is used before"
    ):
        stages(Tied(), torch.zeros(8, 4, dtype=torch.long), 2, 2, cuts=["byte", "score"])


def test_a_mini_batch_too_small_for_the_micro_batches_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="a mini-batch of 8 examples cannot be cut into 9 micro-batches"
    ) as caught:
        planned(perceptron(), 2, [12], microbatches=9)
    assert "8 micro-batches" in caught.value.hint
    with pytest.raises(ConfigurationError, match="stage 1 cannot compute on a micro-batch of 1: Expected more than 1"):
        planned(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), 2, [3], microbatches=8)


@pytest.mark.parametrize(
    ("planned_for", "microbatches", "examples", "count"),
    [(32, 8, 32, 8), (32, 8, 20, 5), (32, 8, 7, 1), (32, 8, 6, 1), (30, 8, 30, 6), (7, 4, 7, 1), (32, 8, 64, 8),
     (32, 8, 3, 1), (32, 8, 1, 1), (32, 8, 9, 1), (32, 8, 15, 3), (5, 5, 3, 3)],
)  # fmt: skip
def test_micro_batches_are_equal_and_no_smaller_than_planned(
    planned_for: int, microbatches: int, examples: int, count: int
) -> None:
    plan = stages(perceptron(), torch.empty(planned_for, 12), 2, microbatches)
    assert plan.micro_batches(examples) == count


def test_a_stage_computes_on_the_memory_it_is_given() -> None:
    plan = planned(NAMED, 2, [3])
    values = {piece.name: torch.ones(piece.full_shape) for piece in plan.pieces(1)}
    stage = plan.share(1, values, torch.device("cpu"))
    for name, value in values.items():
        assert stage.parameters_by_name[name].data_ptr() == value.data_ptr()
    assert not any(parameter.is_meta for parameter in stage.parameters())


def test_a_plan_makes_stages_that_share_nothing() -> None:
    plan = planned(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), 2, [3])
    ones, zeros = (
        plan.share(0, {piece.name: make_(piece.full_shape) for piece in (*plan.pieces(0), *plan.buffers(0))},
                   torch.device("cpu"))
        for make_ in (torch.ones, torch.zeros)
    )  # fmt: skip
    one, other = ({id(module) for module in stage.modules()} for stage in (ones, zeros))
    assert not one & other
    assert not torch.equal(ones(torch.ones(2, 3)), zeros(torch.ones(2, 3)))
