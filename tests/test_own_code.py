# SPDX-License-Identifier: Apache-2.0
"""Replicas import the user's files again: what is another one there than here is told."""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import distbelief as db
from distbelief.own_code import changes, checksums
from tests import problems

pytestmark = pytest.mark.slow  # most of them import torch in another process

ROOT = Path(__file__).parents[1]
FILE = """
import torch
from torch import nn
from tests import problems

WIDTH, WEIGHT, NAME, UNUSED = 16, torch.ones(3), "a", 1

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

    def forward(self, x):
        return super().forward(x) if x.ndim in {1, 2, 3} else None

def net():
    return Net()

def loss(output, target):
    return nn.functional.cross_entropy(output, target, weight=WEIGHT)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "own_module.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("own_module")
    del sys.modules["own_module"]


def told(module: ModuleType, text: str = FILE) -> list[str]:
    """What differs between the module as it is here and what another process makes of such a file."""
    functions = {"model": module.net, "loss": functools.partial(module.loss)}
    Path(str(module.__file__)).write_text(text)
    program = "import own_module as m, distbelief.own_code as o; print(o.checksums({'model': m.net, 'loss': m.loss}))"
    path = os.pathsep.join([str(Path(str(module.__file__)).parent), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"}
    there = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return changes(functions, eval(there))


def test_nothing_is_told_of_a_file_that_is_the_same_one(module: ModuleType) -> None:
    assert told(module) == []
    moved = "\n\n# a comment\n" + FILE
    assert told(module, moved) == [], "lines may move"
    module.__dict__["LATER"], module.__dict__["UNUSED"] = 3, 2
    assert told(module) == [], "what no function uses, or what is only here"


@pytest.mark.parametrize(("before", "after"), [("nn.Tanh()", "nn.ReLU()"), ("return Net()", "return Net().eval()")])
def test_a_file_that_was_changed_since_it_was_imported_is_named(before: str, after: str, module: ModuleType) -> None:
    (change,) = told(module, FILE.replace(before, after))
    assert change.startswith(f"{module.__file__} is not what this process imported")
    assert "importlib.reload" in change


@pytest.mark.parametrize("name", ["WIDTH", "WEIGHT"])
def test_a_global_that_was_set_since_is_named(name: str, module: ModuleType) -> None:
    setattr(module, name, {"WIDTH": 8, "WEIGHT": torch.tensor([1.0, 0.0, 0.0])}[name])
    (change,) = told(module)
    assert change.startswith(f"{name} in {module.__file__} has another value in the replicas")


def test_functions_of_packages_are_not_looked_at() -> None:
    assert checksums({"model": torch.nn.Linear, "loss": torch.nn.functional.cross_entropy, "print": print}) == ()
    assert [name for name, _ in checksums({"net": problems.classifier})] == ["net"]


def test_a_job_whose_file_was_changed_is_trained_with_a_warning(module: ModuleType, tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=1, shards=1, threads_per_replica=1)
    job = problems.job(model=module.net, loss=module.loss, cluster=cluster, run=tmp_path / "run")
    Path(str(module.__file__)).write_text(FILE.replace("nn.Tanh()", "nn.ReLU()"))
    with pytest.warns(RuntimeWarning, match=r"own_module\.py is not what this process imported"):
        assert db.train(job, view=False).summary.examples.missing == 0
