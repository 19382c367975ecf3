# SPDX-License-Identifier: Apache-2.0
"""Downpour with replicas x partitions x shards on the examples: a locally connected net, a deep net, a transformer.

Each example trains as it stands, but on little data; speech and text are those beside the checkout, if they are there.
"""

import dataclasses
import functools
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, default_collate

import distbelief as db
from distbelief import cli, launch
from distbelief.report import read_summary
from tests import problems

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[2] / "shared" / "data"
RECORDINGS, TEXT = SHARED / "fsdd-recordings.tar", SHARED / "tinyshakespeare.txt"
EXAMPLES = ("digits", "speech", "shakespeare")
MINI_BATCHES = 10


def little(name: str, folder: Path) -> list[str]:
    """Options of the example that make it small. Skips where its data are missing."""
    if name == "digits":
        return ["--untied", "--channels", "8"]
    source = RECORDINGS if name == "speech" else TEXT
    if not source.exists():
        pytest.skip(f"{source.name} is not beside this checkout")
    if name == "speech":
        with tarfile.open(source) as archive:
            chosen = [m for m in archive if m.name.endswith(("_jackson_0.wav", "_jackson_5.wav", "_theo_5.wav"))]
            archive.extractall(folder / "recordings", chosen, filter="data")
        return ["--data", str(folder / "recordings"), "--width", "64"]
    excerpt = folder / "excerpt.txt"
    excerpt.write_bytes(source.read_bytes()[:60_000])
    return ["--text", str(excerpt), "--length", "32", "--width", "32", "--layers", "1"]


def job_of(name: str, options: list[str]) -> db.Job:
    """The example's job with these options."""
    given: dict[str, Any] = {"untied": True} if "--untied" in options else {}
    words = [word for word in options if word != "--untied"]
    for option, value in zip(words[::2], words[1::2], strict=True):
        given[option.removeprefix("--")] = int(value) if value.isdecimal() else value
    return launch.job_of(problems.EXAMPLES / f"{name}.py")(**given)


class InDouble(Dataset[tuple[Tensor, Tensor]]):
    """Another data set, with its floating point numbers in double precision."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.source[index]
        return inputs.double() if inputs.is_floating_point() else inputs, target


def double_model(model: Callable[[], nn.Module]) -> nn.Module:
    return model().double()


def double_data(data: Callable[[], Any], examples: int) -> Any:
    return InDouble(Subset(data(), range(examples)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_in_partitions_ends_with_the_parameters_of_the_uncut_one(name: str, tmp_path: Path) -> None:
    """Within 1e-9, in double precision.

    A sum over the states that a layer reads adds up its parts in another order where they come from two partitions: a
    relative error near 1e-16. Adagrad and AdamW divide gradients by their size, so where a gradient is zero but for
    such rounding (a key's bias, of which attention does not depend) its error is divided by eps, 1e-8 or 1e-10.
    """
    job = job_of(name, little(name, tmp_path))
    job = dataclasses.replace(
        job, model=functools.partial(double_model, job.model), test=None, metrics={}, evaluate=None, epochs=1,
        data=functools.partial(double_data, job.data, MINI_BATCHES * job.batch_size),
        algorithm=dataclasses.replace(job.algorithm, fetch="awaited"),
    )  # fmt: skip
    found = []
    for partitions in (1, 2):
        # A whole replica that awaits each answer takes the same steps in a simulation.
        cluster = db.Cluster(
            replicas=1, partitions=partitions, shards=3, threads_per_replica=1, device="cpu",
            engine="simulated" if partitions == 1 else "local",
        )  # fmt: skip
        run = tmp_path / f"run{partitions}"
        result = db.train(dataclasses.replace(job, cluster=cluster, run=run), view=False)
        assert result.summary.mini_batches == MINI_BATCHES
        found.append(result.model.state_dict())
    initial = problems.fresh_model(job).state_dict()
    for key, value in found[0].items():
        torch.testing.assert_close(
            found[1][key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key} {text}"
        )
    moved = max(float((value - initial[key]).abs().max()) for key, value in found[0].items())
    assert moved > 1e-3


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_replicas_of_two_partitions_on_three_shards_learn_an_example_from_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = little(name, tmp_path)
    job = job_of(name, options)
    epochs = {"digits": 1, "speech": 3, "shakespeare": 3}[name]
    cluster = ["--cluster.replicas", "2", "--cluster.partitions", "2", "--cluster.shards", "3"]
    words = [*options, *cluster, "--cluster.threads-per-replica", "1", "--cluster.device", "cpu"]
    words += ["--epochs", str(epochs), "--run", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["distbelief", "train", str(problems.EXAMPLES / f"{name}.py"), *words])
    cli.command()
    summary = read_summary(tmp_path / "run" / "summary.json")
    assert summary.examples.seen == epochs * len(job.data())
    assert (summary.examples.repeated, summary.examples.missing) == (0, 0)
    assert (summary.replicas, summary.shards) == (2, 3)
    inputs, targets = default_collate([job.data()[index] for index in range(job.batch_size)])
    with torch.no_grad():
        before = float(job.loss(problems.fresh_model(job)(inputs), targets))
    assert summary.loss < before * 0.6, before
