# SPDX-License-Identifier: Apache-2.0
"""Downpour with replicas that span several processes (paper, section 3): the same results, the same guarantees."""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import distbelief as db
from distbelief import checkpoint
from distbelief.attempt import attempt
from distbelief.events import Observation, RoleLost, RoleStarted
from distbelief.job import prepare
from distbelief.plan import Plan, on
from tests import problems

pytestmark = pytest.mark.slow


def cluster(partitions: int | Plan, **fields: Any) -> db.Cluster:
    given: dict[str, Any] = {"replicas": 1, "shards": 2, "threads_per_replica": 1, "device": "cpu"}
    return db.Cluster(partitions=partitions, **(given | fields))


def wide_classifier() -> nn.Module:
    # Without a bias before BatchNorm: its gradient is nothing but rounding, which Adagrad would blow up.
    first = nn.Sequential(nn.Linear(12, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))


def awaited(**fields: Any) -> db.Downpour:
    return db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited", **fields)


def in_double(examples: int, seed: int = 0) -> TensorDataset:
    inputs, targets = problems.points(examples, seed).tensors
    return TensorDataset(inputs.double(), targets)


def double_classifier() -> nn.Module:
    return wide_classifier().double()


def trained(tmp_path: Path, partitions: int | Plan, **fields: Any) -> db.Result:
    given: dict[str, Any] = {
        "model": double_classifier, "data": functools.partial(in_double, 320), "algorithm": awaited(),
        "test": functools.partial(in_double, 100, 1), "epochs": 1, "cluster": cluster(partitions),
        "run": tmp_path / f"run{len(list(tmp_path.iterdir()))}",
    }  # fmt: skip
    listeners, faults = fields.pop("listeners", ()), fields.pop("faults", None)
    return db.train(problems.job(**(given | fields)), view=False, listeners=listeners, faults=faults)


def uncut(tmp_path: Path, **fields: Any) -> db.Result:
    """One whole replica that awaits each answer: it takes the same steps in a simulation, without processes."""
    return trained(tmp_path, 1, cluster=cluster(1, engine="simulated"), **fields)


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("partitions", "shards"),
    [(3, 2), (2, 3), (Plan.units(2, {"0": on(1), "3": on(0)}), 1), (Plan.stages(2, microbatches=1), 3)],
)
def test_a_replica_cut_into_partitions_takes_the_steps_of_the_uncut_model(
    partitions: int | Plan, shards: int, tmp_path: Path
) -> None:
    whole = uncut(tmp_path)
    cut = trained(tmp_path, partitions, cluster=cluster(partitions, shards=shards))
    assert distance(cut.model, whole.model) < 1e-11
    assert cut.test["accuracy"] == pytest.approx(whole.test["accuracy"], abs=1e-9)
    assert cut.summary.examples.seen == 320
    assert cut.summary.staleness.p95 == 0


def test_a_model_whose_last_checkpoint_failed_is_not_put_together_from_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoint.commit

    def fails(folder: Any, manifest: Any, buffers: Any, *, durable: bool) -> Any:
        if manifest.examples:
            raise OSError(28, "No space left on device")
        return commit(folder, manifest, buffers, durable=durable)

    monkeypatch.setattr(checkpoint, "commit", fails)
    result = trained(tmp_path, 2)
    assert result.summary.checkpoints.last_failed
    message = f"(?s)^the last checkpoint of {result.run} could not be written, .*\nhint: make room, and go on with "
    with pytest.raises(db.CheckpointError, match=message):
        result.model  # noqa: B018


def test_accruing_clipping_momentum_and_parameter_groups_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    algorithm = awaited(n_push=3, n_fetch=3, clip_norm=0.05, momentum=0.9)
    options: dict[str, Any] = {"algorithm": algorithm, "groups": slower_biases}
    whole, cut = uncut(tmp_path, **options), trained(tmp_path, 2, **options)
    assert distance(cut.model, whole.model) < 1e-11


def slower_biases(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"rate": 0.01} if name.endswith("bias") else {}


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Random inputs and what they are, as an autoencoder learns; each process notes what it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        given = torch.rand(12)
        with (self.folder / str(os.getpid())).open("a") as notes:
            notes.write(f"{index} {given.tolist()}\n")
        return given, given


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.5), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 12))


def test_random_data_are_the_same_on_all_stages_though_one_of_them_drops_states(tmp_path: Path) -> None:
    (notes := tmp_path / "notes").mkdir()
    trained(
        tmp_path, Plan.stages(2), model=dropping, data=Noisy(notes), loss=nn.functional.mse_loss, test=None,
        metrics={}, algorithm=db.Downpour(),
    )  # fmt: skip
    first, second = sorted((path.read_text() for path in notes.iterdir()), key=len)[-2:]
    assert first == second
    assert first.count("\n") == 64


def test_two_replicas_of_two_partitions_on_three_shards_see_every_example_once_and_learn(tmp_path: Path) -> None:
    result = trained(
        tmp_path, 2, cluster=cluster(2, replicas=2, shards=3), epochs=4, data=functools.partial(in_double, 640)
    )
    summary = result.summary
    assert (summary.examples.seen, summary.examples.repeated, summary.examples.missing) == (2560, 0, 0)
    inputs, targets = in_double(200, 1).tensors
    assert problems.accuracy(result.model(inputs), targets) > 0.85


def of(kind: type, heard: list[Observation]) -> list[Any]:
    return [each.event for each in heard if isinstance(each.event, kind)]


@pytest.mark.parametrize("member", ["replica/0/0", "replica/0/1"])
@pytest.mark.parametrize("trouble", ["kill", "hang"])
def test_a_replica_that_loses_a_partition_forms_again_and_the_others_go_on(
    member: str, trouble: str, tmp_path: Path
) -> None:
    moment = 1.0  # the job takes twice as long: each example is waited for
    faults = db.Faults(kill=((moment, member),)) if trouble == "kill" else db.Faults(hang=((moment, 1e9, member),))
    heard: list[Observation] = []
    result = trained(
        tmp_path, 2, cluster=cluster(2, replicas=2, silence_seconds=2.0), epochs=2, listeners=[heard.append],
        data=functools.partial(slow_points, 640), test=None, faults=faults,
    )  # fmt: skip
    assert result.summary.examples.missing == 0
    lost = [event.role for event in of(RoleLost, heard)]
    assert lost
    assert all(role.startswith("replica/0") for role in lost)
    started = {(event.role, event.incarnation) for event in of(RoleStarted, heard)}
    assert {("replica/0/0", 1), ("replica/0/1", 1)} <= started
    assert ("replica/1/0", 1) not in started
    again = next(one.seconds for one in heard if isinstance(one.event, RoleStarted) and one.event.incarnation == 1)
    assert again - moment < 20.0  # on a machine that has other things to do; alone it takes 0.2 s, or the deadline


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 3200), nn.Linear(3200, 3200), nn.Tanh(), nn.Linear(3200, 3)).float()


def slow_single(examples: int) -> TensorDataset:
    inputs, targets = in_double(examples).tensors
    return Slow(inputs.float(), targets)


@pytest.mark.slow
def test_partitions_wait_for_each_other_as_long_as_one_may_wait_for_a_shard_with_much_to_store(tmp_path: Path) -> None:
    heard: list[Observation] = []
    result = trained(
        tmp_path, 2, model=wide, cluster=cluster(2, replicas=1, shards=2, silence_seconds=2.0), epochs=1, test=None,
        data=functools.partial(slow_single, 320), listeners=[heard.append],
        faults=db.Faults(hang=((1.0, 4.5, "shard/1"),)),
    )  # fmt: skip
    assert result.summary.wall_seconds > 4.5
    assert result.summary.examples.missing == 0
    assert not of(RoleLost, heard)


class Slow(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        time.sleep(3e-3)
        return super().__getitem__(index)


def slow_points(examples: int) -> TensorDataset:
    return Slow(*in_double(examples).tensors)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_is_resumed_with_another_number_of_partitions(before: int, after: int, tmp_path: Path) -> None:
    first = trained(tmp_path, before) if before > 1 else uncut(tmp_path)
    job = problems.job(
        model=double_classifier, data=functools.partial(in_double, 320), algorithm=awaited(), test=None, epochs=2,
        cluster=cluster(after, shards=3, engine="local" if after > 1 else "simulated"),
    )  # fmt: skip
    second = db.train(job, resume=first.run, view=False)
    straight = uncut(tmp_path, epochs=2)
    assert second.summary.examples.seen == 640
    assert distance(second.model, straight.model) < 1e-11


def test_a_gradient_that_is_nan_on_one_partition_is_pushed_by_none(tmp_path: Path) -> None:
    result = trained(tmp_path, 2, data=functools.partial(poisoned, 320))
    assert result.summary.refused == 16
    assert all(bool(value.isfinite().all()) for value in result.model.parameters())


def poisoned(examples: int) -> TensorDataset:
    inputs, targets = in_double(examples).tensors
    inputs[7, 3] = float("nan")
    return TensorDataset(inputs, targets)


def by_step(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def per_example(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


def named_targets(examples: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [(x, {"class": target}) for x, target in in_double(examples)]


def other_features(examples: int) -> TensorDataset:
    return TensorDataset(torch.zeros(examples, 7, dtype=torch.float64), torch.zeros(examples, dtype=torch.int64))


class Growing(Dataset[Any]):
    """All mini-batches but the one that is tried are wider."""

    def __len__(self) -> int:
        return 320

    def __getitems__(self, indices: list[int]) -> Any:
        width = 12 if list(indices) == list(range(0, 320, 20)) else 14
        return torch.ones(len(indices), width, dtype=torch.float64), torch.zeros(len(indices), dtype=torch.int64)


def test_a_mini_batch_of_another_shape_than_units_were_planned_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(db.UserCodeError, match=r"cut by units for inputs of shape \[12\], a mini-batch has \[14\]"):
        trained(tmp_path, 2, data=Growing, test=None, metrics={})


def fussy(output: Tensor, target: Tensor) -> Tensor:
    assert ((output < 0.25) | (output > 0.75)).any(), "only outputs of a model"
    return nn.functional.cross_entropy(output, target)


def test_a_loss_may_take_outputs_of_the_model_alone_and_a_test_set_be_smaller_than_a_mini_batch(tmp_path: Path) -> None:
    result = trained(tmp_path, 2, loss=fussy, test=functools.partial(in_double, 10, 1))
    assert result.summary.examples.seen == 320
    assert result.test.keys() == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": None, "step": by_step, "test": None}, "step"),
        ({"cluster": cluster(40)}, "partitions"),
        ({"cluster": cluster(2, memory_bytes=1000)}, r"partition \d of 2 takes [\d,]+ bytes of memory, of 1,000 given"),
        ({"cluster": cluster(1, memory_bytes=1000)}, r"partition 0 of 1 takes 24,656 bytes of memory, of 1,000 given"),
        ({"cluster": cluster(Plan.units(2, {"nothing": on(0)}))}, "nothing"),
        ({"cluster": cluster(Plan.stages(2, microbatches=17))}, "17"),
        ({"cluster": cluster(Plan.stages(9))}, "stages"),
        ({"model": functools.partial(nn.Bilinear, 12, 12, 3)}, "rule"),
        (
            {"data": functools.partial(named_targets, 320), "cluster": cluster(Plan.stages(2))},
            "target .* is a dict, and",
        ),
        ({"test": functools.partial(other_features, 320)}, r"inputs of shape \[12\], a mini-batch has \[7\]\nhint: "),
        ({"loss": per_example}, r"the loss is \[16\], not a scalar"),
        ({"loss": per_example, "cluster": cluster(Plan.stages(2))}, r"the loss is \[16\], not a scalar"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields: dict[str, Any], words: str) -> None:
    data = functools.partial(in_double, 320)
    with pytest.raises(db.ConfigurationError, match=words):
        attempt(
            prepare(problems.job(**({"model": double_classifier, "data": data, "cluster": cluster(2)} | fields)))[0]
        )


def test_what_cannot_be_cut_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError):
        trained(tmp_path, 2, loss=per_example)
    assert not list(tmp_path.iterdir())


def test_a_simulated_engine_with_partitions_is_refused() -> None:
    with pytest.raises(db.ConfigurationError, match="simulated"):
        dataclasses.replace(cluster(2), engine="simulated")


class Attentive(nn.Module):
    """Its projections are boxes of a view of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        # Without biases: the gradient of those of the keys is nothing but rounding, which Adagrad would blow up.
        self.widen, self.out = nn.Linear(12, 48), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 6, bias=False, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x).unflatten(1, (4, 12))
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.out((x + attended).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("algorithm", [awaited(), db.Sandblaster(max_iterations=5, deterministic=True)])
def test_attention_cut_by_heads_takes_the_steps_of_the_uncut_model(algorithm: Any, tmp_path: Path) -> None:
    cut = trained(tmp_path, Plan.units(2), model=Attentive, algorithm=algorithm)
    assert distance(cut.model, uncut(tmp_path, model=Attentive, algorithm=algorithm).model) < 1e-11


def evaluating() -> nn.Module:
    """BatchNorm and Dropout as Sandblaster wants them."""
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(), nn.Tanh(), nn.Linear(24, 3)).double()
    model[1].running_mean += 0.3  # type: ignore[operator]
    return model.eval()


@pytest.mark.parametrize("partitions", [Plan.units(2), Plan.stages(2)], ids=lambda plan: plan.kind)
def test_sandblaster_computes_layers_in_evaluation_as_such_in_partitions_too(partitions: Plan, tmp_path: Path) -> None:
    algorithm = db.Sandblaster(max_iterations=8, deterministic=True)
    cut = trained(tmp_path, partitions, model=evaluating, algorithm=algorithm)
    assert distance(cut.model, uncut(tmp_path, model=evaluating, algorithm=algorithm).model) < 1e-11
    assert float(cut.model[1].running_mean[0]) == 0.3  # type: ignore[index, union-attr]


def lazily() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(24), nn.Tanh(), nn.LazyLinear(3))
    model(torch.zeros(2, 12))
    return model


def test_shapes_that_a_first_call_finds_cannot_be_cut_and_are_found_uncut(tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match="computes with lazy layers while it is built") as caught:
        trained(tmp_path, 2, model=lazily, data=functools.partial(problems.points, 320), test=None)
    assert "hint: give the shapes, such as nn.Linear(16, 32) for nn.LazyLinear(32)" in str(caught.value)
    uncut(tmp_path, model=lazily, data=functools.partial(problems.points, 320), test=None)
