# SPDX-License-Identifier: Apache-2.0
"""Laws of `distbelief plan`: what it prints is what the partitions hold and do, and nothing is started for it."""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distbelief import cli
from distbelief.errors import ConfigurationError
from distbelief.partition.footprint import Footprint, check_memory, footprints
from distbelief.partition.stages import stages
from distbelief.partition.units import units
from distbelief.report.plan import LayerRow, PartitionRow, PlanTable, balance, plan_text, scaled
from distbelief.report.plan_picture import plan_picture, rectangles, shown

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import distbelief as db
from distbelief.plan import Plan, grid, on, rows
from tests.test_plan_command import Vision

def examples():
    return TensorDataset(torch.randn(8, 3, 16, 16), torch.randint(10, (8,)))

def job(partitions: int = 1, by_hand: str = "") -> db.Job:
    return db.Job(
        model=Vision, loss=nn.functional.cross_entropy, data=examples, batch_size=4,
        cluster=db.Cluster(partitions=eval(by_hand) if by_hand else partitions),
    )
"""


class Vision(nn.Sequential):
    """A convolution by channels, pooling, two linear layers of which the last is small; and its FLOPs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16 * 8 * 8, 32), nn.Tanh(), nn.Linear(32, 10),
        )  # fmt: skip


PARAMETERS = sum(parameter.numel() for parameter in Vision().parameters())
SAMPLE = torch.zeros(4, 3, 16, 16)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs `distbelief plan` on the script and returns what it prints; a SystemExit leaves with the error's text."""
    (tmp_path / "plan_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["distbelief", "plan", "plan_script.py", *arguments])
        cli.command()
        return capsys.readouterr().out

    yield command
    sys.modules.pop("plan_script", None)


def partition_rows(text: str) -> list[list[str]]:
    """The cells of the lines that begin with a number, one per partition."""
    return [re.split(r"\s{2,}", line) for line in text.splitlines() if re.match(r"\d+\s", line)]


def test_the_table_has_a_line_per_partition_and_their_parameters_are_those_of_the_model(
    plan: Callable[..., str], tmp_path: Path
) -> None:
    told = plan("--cluster.partitions", "4")
    rows = partition_rows(told)[:4]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert sum(int(row[1].replace(",", "")) for row in rows) == PARAMETERS
    assert "Vision, cut by units for 4 partitions and mini-batches of 4" in told
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["plan_script.py"]


def test_the_table_says_how_each_layer_is_cut(plan: Callable[..., str]) -> None:
    told = " ".join(plan("--by-hand", "Plan.units(4, {'4': on(2)})").split())
    assert "0 448 16 x 16 x 16 4 parts of 4" in told
    assert "4 32,800 32 on 2" in told
    assert "6 330 10 on 2" in told, "a small layer goes to who has its input"


def test_a_number_of_partitions_on_the_command_line_replaces_the_plan_of_the_file(plan: Callable[..., str]) -> None:
    assert "3 partitions" in plan("--by-hand", "Plan.units(3)")
    assert "2 partitions" in plan("--by-hand", "Plan.units(3)", "--cluster.partitions", "2")


def test_the_plan_of_a_search_over_all_data_is_for_as_many_examples_as_it_computes_at_once(
    plan: Callable[..., str],
) -> None:
    cut = "--cluster.partitions", "2"
    assert plan(*cut, "--algorithm", "sandblaster") == plan(*cut, "--batch-size", "8")


def test_a_plan_in_stages_is_told_so(plan: Callable[..., str]) -> None:
    told = plan("--by-hand", "Plan.stages(['0', '4'], microbatches=2)")
    rows = partition_rows(told)[:2]
    assert "cut by stages for 2 partitions" in told
    assert sum(int(row[1].replace(",", "")) for row in rows) == PARAMETERS
    assert [row[6] for row in rows] == ["2", "2"], "a message per micro-batch"
    crossing = scaled(4 * 16 * 8 * 8, "B")
    assert [row[4:6] for row in rows] == [["0 B", crossing], [crossing, "0 B"]]


@pytest.mark.parametrize("partitions", [2, 3])
def test_the_flops_of_all_partitions_are_those_of_the_uncut_model(partitions: int) -> None:
    model = Vision().to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(4, 3, 16, 16, device="meta"))
    assert sum(one.operations for one in units(model, SAMPLE, partitions).numbers) == counter.get_total_flops() // 4
    assert sum(one.operations for one in stages(model, SAMPLE, 2, 2).numbers) == counter.get_total_flops() // 4


def test_what_leaves_arrives_and_each_message_is_counted_on_both_sides() -> None:
    for numbers in (units(Vision(), SAMPLE, 3).numbers, stages(Vision(), SAMPLE, 2, 2).numbers):
        assert sum(one.elements_in for one in numbers) == sum(one.elements_out for one in numbers) > 0
        assert sum(one.messages_in for one in numbers) == sum(one.messages_out for one in numbers) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one process holds the whole model: there is nothing to plan\nhint: say how many processes"),
        (["--by-hand", "Plan.units(2, {'conv1': rows()})"], "the plan cuts 'conv1', but Vision has no module of that"),
        (["--cluster.partitions", "40"], "partitions"),
        (["--cluster.partitions", "2", "--cluster.memory-bytes", "100000"], "of 100,000 given"),
        (["--cluster.partitions", "2", "--picture", "missing/plan.png"], "give a path in a folder that is there"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_reason(
    arguments: list[str], said: str, plan: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(*arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert said in told
    assert "\nhint: " in told


def test_without_a_file_the_command_says_how_to_call_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distbelief", "plan"])
    with pytest.raises(SystemExit):
        cli.command()
    assert "hint: distbelief plan FILE.py --cluster.partitions 4" in capsys.readouterr().err


# memory


def test_partitions_that_do_not_fit_the_given_memory_are_refused_and_those_that_just_fit_are_not() -> None:
    held = (Footprint(800, 40, 160), Footprint(2000, 0, 500), Footprint(600, 0, 900))
    check_memory(held, 2500)
    message = r"partition 1 of 3 takes 2,500 bytes of memory, of 2,499 given: .*\nhint: .* micro_batch"
    with pytest.raises(ConfigurationError, match=message):
        check_memory(held, 2499)


def test_a_footprint_is_three_buffers_of_the_parameters_what_is_frozen_and_the_buffers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)).double()
    model[2].requires_grad_(False)
    (held,) = footprints(units(model, torch.zeros(4, 8, dtype=torch.float64), 1), 4, torch.float64)
    trained, frozen, buffers = 8 * 16 + 16 + 2 * 16, 16 * 8 + 8, 2 * 16 + 1
    assert held.parameters == 3 * 8 * trained
    assert held.kept == 8 * (frozen + buffers)


def kept_by_autograd(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside parameters and the mini-batch."""
    known = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers(), x)]
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if all(tensor.untyped_storage() is not storage for storage in known):
            known.append(tensor.untyped_storage())
            kept += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return kept


def test_the_states_of_a_plan_are_no_less_than_what_autograd_keeps_and_less_than_thrice_that() -> None:
    model, x = Vision(), torch.randn(4, 3, 16, 16)
    kept = kept_by_autograd(model, x)
    by_units = footprints(units(model, x, 1), 4, torch.float32)[0].states
    in_stages = sum(one.states for one in footprints(stages(model, x, 2, 2), 4, torch.float32))
    assert kept <= by_units < 3 * kept
    assert kept <= in_stages < 3 * kept


# the picture


def test_the_boxes_of_a_picture_cover_each_layer_once() -> None:
    rows = [LayerRow(layer.name, layer.shape, layer.boxes) for layer in units(Vision(), SAMPLE, 3).layers]
    assert rows
    for row in rows:
        drawn = [rectangle for _, rectangle in rectangles(row)]
        assert sum(width * height for _, _, width, height in drawn) == pytest.approx(1)
        for one, other in itertools.combinations(drawn, 2):
            across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
            down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
            assert min(across, down) <= 1e-9, "boxes of two partitions overlap"


def test_a_plane_in_tiles_is_drawn_as_it_lies() -> None:
    boxes = tuple(((0, 3), rows, columns) for rows in ((0, 6), (6, 8)) for columns in ((0, 2), (2, 8)))
    drawn = rectangles(LayerRow("conv", (3, 8, 8), boxes))
    assert drawn[1] == (1, (0.25, 0.0, 0.75, 0.75))
    assert drawn[2] == (2, (0.0, 0.75, 0.25, 0.25))


def test_layers_cut_as_the_one_before_are_left_out_of_the_picture() -> None:
    layers = [LayerRow(name, (8,), (((0, 4),), ((4, 8),)), count) for name, count in (("fc", 9), ("relu", 0))]
    assert [layer.name for layer in shown(layers)] == ["fc"]
    many = [*layers, LayerRow("gather", (8,), (None, ((0, 8),)))] * 20
    assert {layer.name for layer in shown(many)} == {"fc"}


def test_the_picture_is_a_png_file(plan: Callable[..., str]) -> None:
    pytest.importorskip("matplotlib")
    told = plan("--cluster.partitions", "9", "--picture", "plan.png")
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert told.rstrip().endswith("plan.png")


def test_a_picture_without_matplotlib_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'distbelief\[plots\]'"):
        plan_picture(PlanTable("Net", "units", 1, (), ()), Path("plan.png"))


# words


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ((((0, 4), (0, 6)), None), "on 0"),
        ((((0, 4), (0, 6)), ((0, 4), (0, 6))), "whole on each"),
        ((((0, 4), (0, 2)), ((0, 4), (2, 6)), None), "2 parts of 2..4, none on 2"),
        (tuple(((r, r + 2), (c, c + 3)) for r in (0, 2) for c in (0, 3)), "2 x 2 tiles of 2 x 3"),
        ((((0, 4), (0, 6)),), "whole"),
    ],
)
def test_a_cut_is_told_in_words(boxes: Any, told: str) -> None:
    table = PlanTable("Net", "units", 1, (), (LayerRow("fc", (4, 6), boxes),))
    assert re.split(r"\s{2,}", cut_line(table))[-1] == told


def cut_line(table: PlanTable) -> str:
    """The last line of the table, of a plan without partitions' rows."""
    row = PartitionRow(1, 1, 1, 0.0, 0.0, 0)
    return plan_text(PlanTable(table.model, table.kind, 1, (row,), table.layers)).splitlines()[-1]


def test_amounts_have_three_digits_and_a_prefix() -> None:
    told = [scaled(number, "B") for number in (0, 7, 999, 999.6, 1234, 45_678, 2_500_000_000, 7e15)]
    assert told == ["0 B", "7 B", "999 B", "1 kB", "1.23 kB", "45.7 kB", "2.5 GB", "7e+03 TB"]


def test_balance_is_the_mean_over_the_largest() -> None:
    assert balance([2, 2, 2]) == 1
    assert balance([1, 2, 3]) == pytest.approx(2 / 3)
    assert balance([0, 0]) == 1
