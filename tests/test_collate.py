# SPDX-License-Identifier: Apache-2.0
"""Mini-batches that the user makes of examples: sequences of different lengths, as every DataLoader takes them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

import distbelief as db
from distbelief.attempt import attempt
from distbelief.data_shard import Collated, DataShard, collect, epoch_order, first, to_device
from distbelief.engine.simulated import SimulatedEngine
from distbelief.job import prepare
from distbelief.leases import Lease
from tests import problems

LONGEST = 9


class Sequences:
    """Sequences of 1 to 9 numbers; the label says whether their sum is positive."""

    def __init__(self, examples: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, LONGEST + 1, (examples,), generator=generator)
        self.sequences = [torch.randn(int(length), 1, generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.sequences[index], int(self.sequences[index].sum() > 0)


def padded(examples: list[tuple[torch.Tensor, int]]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    sequences, labels = zip(*examples, strict=True)
    lengths = torch.tensor([len(each) for each in sequences])
    return (pad_sequence(list(sequences), batch_first=True), lengths), torch.tensor(labels)


def packed(examples: list[tuple[torch.Tensor, int]]) -> tuple[PackedSequence, torch.Tensor]:
    sequences, labels = zip(*examples, strict=True)
    return pack_sequence(list(sequences), enforce_sorted=False), torch.tensor(labels)


class OfPadded(nn.Module):
    """Says of each sequence what its last state says."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(1, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        sequences, lengths = batch
        states, _ = self.cell(sequences)
        return self.out(states[torch.arange(len(lengths)), lengths - 1])  # type: ignore[no-any-return]


class OfPacked(OfPadded):
    """The same of a packed mini-batch."""

    def forward(self, batch: Any) -> torch.Tensor:
        _, last = self.cell(batch)
        return self.out(last[0])  # type: ignore[no-any-return]


def job(**fields: Any) -> db.Job:
    given: dict[str, Any] = {
        "model": OfPadded, "collate": padded, "data": functools.partial(Sequences, 640), "batch_size": 16,
        "test": functools.partial(Sequences, 1100, 1), "algorithm": db.Downpour(update_rule=db.adagrad(0.05)),
        "epochs": 6, "cluster": db.Cluster(replicas=2, shards=2, engine="simulated"),
    }  # fmt: skip
    return problems.job(**(given | fields))


@pytest.mark.parametrize(
    ("engine", "model", "collate"),
    [("local", OfPadded, padded), ("simulated", OfPadded, padded), ("simulated", OfPacked, packed)],
)
def test_sequences_of_different_lengths_are_learnt_and_each_counts_once(
    engine: Any, model: type[nn.Module], collate: Any, tmp_path: Path
) -> None:
    cluster = db.Cluster(replicas=2, shards=2, engine=engine)
    result = db.train(job(model=model, collate=collate, cluster=cluster, run=tmp_path / "run"), view=False)
    examples = result.summary.examples
    assert (examples.seen, examples.repeated, examples.missing) == (6 * 640, 0, 0)
    with torch.no_grad():
        held_out = Sequences(1100, 1)
        batch, labels = collate([held_out[index] for index in range(1100)])
        reached = problems.accuracy(result.model(batch), labels)
    assert result.test["accuracy"] == pytest.approx(float(reached), abs=1e-6)
    assert float(reached) > 0.85


def test_the_mini_batches_are_those_of_a_data_loader_with_that_function() -> None:
    data = Sequences(100)
    shard = DataShard(SimulatedEngine(), Collated(data, padded), 16, 3)
    found = [batch for _, _, batch in shard.mini_batches(Lease(0, 1, 0, 100))]
    expected = list(DataLoader(data, 16, sampler=epoch_order(100, 3, 1).tolist(), collate_fn=padded))  # type: ignore[arg-type]
    assert len(found) == len(expected) == 7
    for ((tokens, lengths), labels), ((own_tokens, own_lengths), own_labels) in zip(found, expected, strict=True):
        assert torch.equal(tokens, own_tokens)
        assert torch.equal(lengths, own_lengths)
        assert torch.equal(labels, own_labels)


def test_a_data_set_that_is_asked_for_many_at_once_is_collated_from_its_answer() -> None:
    class Many(Sequences):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

        def __getitem__(self, index: int) -> Any:
            return self.sequences[index], 7

    (_, lengths), labels = collect(Collated(Many(20), padded), torch.tensor([3, 5]))
    assert lengths.tolist() == [len(Sequences(20)[index][0]) for index in (3, 5)]
    assert labels.tolist() == [7, 7]


def test_the_first_examples_of_a_collated_data_set_are_collated() -> None:
    few = first(Collated(Sequences(20), padded), 3)
    assert len(few) == 3
    assert collect(few, torch.arange(3))[0][1].tolist() == [len(Sequences(20)[index][0]) for index in range(3)]
    assert len(first(Sequences(5), 8)) == 5


def test_sandblaster_computes_the_mean_of_collated_mini_batches(tmp_path: Path) -> None:
    algorithm = db.Sandblaster(max_iterations=15, micro_batch=100)
    result = db.train(job(algorithm=algorithm, run=tmp_path / "run"), view=False)
    data = Sequences(640)
    batch, labels = padded([data[index] for index in range(640)])
    with torch.no_grad():
        whole = float(nn.functional.cross_entropy(result.model(batch), labels))
    assert result.summary.loss == pytest.approx(whole, rel=1e-5)
    assert whole < 0.55


def examples_at_once(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(len(target))


@pytest.mark.parametrize(
    ("fields", "mean"),
    [
        ({}, (1088 * 16 + 12 * 12) / 1100),
        ({"algorithm": db.Sandblaster(max_iterations=1)}, (1024 * 1024 + 76 * 76) / 1100),
    ],
)
def test_mini_batches_that_the_user_makes_are_as_large_in_tests_as_in_training_unless_data_are_cut_anyhow(
    fields: Any, mean: float, tmp_path: Path
) -> None:
    result = db.train(job(metrics={"size": examples_at_once}, epochs=1, run=tmp_path / "run", **fields), view=False)
    assert result.test["size"] == pytest.approx(mean)


def summed(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize(("model", "collate"), [(OfPadded, padded), (OfPacked, packed)])
def test_a_sum_over_a_collated_mini_batch_is_no_mean(model: type[nn.Module], collate: Any, tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match="it is not their mean"):
        db.train(
            job(model=model, collate=collate, loss=summed, algorithm=db.Sandblaster(), run=tmp_path / "run"), view=False
        )


def sizes(model: nn.Module, test: Any) -> dict[str, float]:
    return {"kind": float(isinstance(test, Sequences)), "examples": float(len(test))}


def test_an_evaluation_of_ones_own_gets_the_data_set_itself(tmp_path: Path) -> None:
    result = db.train(job(evaluate=sizes, metrics={}, epochs=1, run=tmp_path / "run"), view=False)
    assert result.test == {"kind": 1.0, "examples": 1100.0}


def test_without_it_the_message_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        db.DistbeliefError, match=r"16 examples cannot be put together as a mini-batch: .*equal size"
    ) as e:
        db.train(job(collate=None, run=tmp_path / "run"), view=False)
    assert "hint: give Job(collate=...), a function of a list of examples, as DataLoader's collate_fn" in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [[7, 4096, 5], [4096, 7]])
def test_an_example_that_is_none_is_told_by_its_number(order: list[int]) -> None:
    examples = {index: (torch.zeros(2), index) for index in (5, 7)} | {4096: None}
    with pytest.raises(db.ConfigurationError, match=r"^the data set gives None for example 4,096\nhint: leave such"):
        collect(examples, torch.tensor(order))


def test_a_function_that_raises_is_shown_by_its_traceback_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(db.UserCodeError, match="in padded"):
        db.train(job(data=TensorDataset(torch.zeros(640)), run=tmp_path / "run"), view=False)
    assert not (tmp_path / "run").exists()


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(db.ConfigurationError, match=r"Job\(collate=\.\.\.\) is a int, which cannot be called"):
        job(collate=3)


def test_what_can_be_moved_moves_itself_to_the_device() -> None:
    batch, labels = to_device(packed([Sequences(4)[index] for index in range(4)]), torch.device("meta"))
    assert isinstance(batch, PackedSequence)
    assert (batch.data.device.type, batch.batch_sizes.device.type, labels.device.type) == ("meta", "cpu", "meta")


@pytest.mark.parametrize("micro_batch", [100, 640])
def test_the_loss_of_a_collated_job_in_partitions_is_tried_on_outputs(micro_batch: int) -> None:
    algorithm, cluster = db.Sandblaster(micro_batch=micro_batch), db.Cluster(partitions=2)
    prepared, _ = prepare(problems.job(collate=default_collate, algorithm=algorithm, cluster=cluster))
    attempt(prepared)
    summed = dataclasses.replace(prepared.job, loss=functools.partial(nn.functional.cross_entropy, reduction="sum"))
    with pytest.raises(db.ConfigurationError, match="not their mean"):
        attempt(dataclasses.replace(prepared, job=summed))
