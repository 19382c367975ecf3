# SPDX-License-Identifier: Apache-2.0
"""Laws of what users write: what cannot work is refused before anything starts, in their numbers, with a way out."""

import dataclasses
import pickle
import re
import resource
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import distbelief as db
from distbelief.engine.local import LocalEngine
from distbelief.engines import engine_of
from distbelief.job import Facts, prepare
from distbelief.launch import job_of
from distbelief.leases import Release
from distbelief.model_replica import pick_device
from distbelief.parameters import lay_out
from distbelief.partition.group import Group
from distbelief.roles import site_of
from distbelief.roster import EVALUATOR
from tests.problems import classifier, job, points

cross_entropy = nn.functional.cross_entropy


def refused(call: Callable[[], object]) -> str:
    """The message of the refusal; it ends with what to do."""
    with pytest.raises(db.ConfigurationError) as caught:
        call()
    problem, hint = str(caught.value).split("\nhint: ")
    assert problem
    assert hint
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    return str(caught.value)


def refused_by_train(folder: Path, **fields: Any) -> str:
    """The message of a job that is refused, having left nothing behind."""
    run = folder / "run"
    message = refused(lambda: db.train(job(run=run, **fields), view=False))
    assert not run.exists()
    return message


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (partial(db.Cluster, replicas=0), "Cluster(replicas=0): a job needs at least 1"),
        (partial(db.Cluster, replicas=-4), "replicas=-4"),
        (partial(db.Cluster, shards=0), "Cluster(shards=0)"),
        (partial(db.Cluster, threads_per_replica=0), "threads_per_replica=0"),
        (partial(db.Cluster, silence_seconds=0.0), "silence_seconds=0.0"),
        (partial(db.Cluster, silence_seconds=-1.0), "silence_seconds=-1.0"),
        (partial(db.Downpour, n_fetch=0), "Downpour(n_fetch=0)"),
        (partial(db.Downpour, n_push=-2), "Downpour(n_push=-2)"),
        (partial(db.Downpour, backlog=0), "Downpour(backlog=0)"),
        (partial(db.Downpour, warmstart=-1), "warmstart=-1"),
        (partial(db.Downpour, refusals=-1), "refusals=-1"),
        (partial(db.Downpour, clip_norm=0.0), "Downpour(clip_norm=0.0) must be positive"),
        (partial(db.Downpour, clip_norm=float("nan")), "clip_norm=nan"),
        (partial(db.Downpour, local_rate=-0.1), "local_rate=-0.1"),
        (partial(db.Downpour, momentum=1.0), "Downpour(momentum=1.0) is not in [0, 1)"),
        (partial(db.Downpour, momentum=-0.5), "momentum=-0.5"),
        (partial(db.Downpour, momentum=float("nan")), "momentum=nan"),
        (partial(db.Downpour, local_rate=0.1, n_fetch=3, n_push=2), "n_fetch=3, n_push=2"),
        (partial(job, epochs=0), "Job(epochs=0)"),
        (partial(job, batch_size=-1), "Job(batch_size=-1)"),
        (partial(job, keep_checkpoints=0), "Job(keep_checkpoints=0)"),
        (partial(job, evaluate_every=0), "evaluate_every=0"),
        (
            partial(job, test=None, metrics={"accuracy": cross_entropy}),
            "Job(metrics=...) has nothing to be measured on",
        ),
        (partial(job, test=None, evaluate=cross_entropy), "Job(evaluate=...) has nothing to be measured on"),
        (partial(job, test=None, evaluate_every=100), "Job(evaluate_every=...) has nothing to be measured on"),
        (partial(job, checkpoint_seconds=0.0), "checkpoint_seconds=0.0"),
        (partial(job, checkpoint_seconds=float("nan")), "checkpoint_seconds=nan"),
        (partial(job, loss=None), "neither was given"),
        (partial(job, step=lambda model, batch: None), "both were given"),
        (partial(job, model=classifier()), "Sequential that is built already"),
        (partial(job, model="Net"), "str, which cannot be called"),
    ],
)
def test_a_value_that_cannot_work_is_refused_when_it_is_made(build: Callable[[], object], said: str) -> None:
    assert said in refused(build)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: db.Job(model=classifier, data=[], loss=cross_entropy, epochs=1.5), "Job(epochs=1.5) is not a whole"),
        (lambda: job(batch_size="32"), "Job(batch_size='32') is not a whole number"),
        (lambda: job(seed=None), "Job(seed=None) is not a whole number"),
        (lambda: job(evaluate_every=True), "Job(evaluate_every=True) is not a whole number"),
        (lambda: job(checkpoint_seconds="60"), "Job(checkpoint_seconds='60') is not a number"),
        (lambda: job(algorithm=db.adam()), "Job(algorithm=adam(0.001)) is a TorchRule"),
        (lambda: job(algorithm=db.Downpour), "is a type\nhint: use for example algorithm=Downpour("),
        (lambda: job(cluster=4), "Job(cluster=4) is a int"),
        (lambda: job(metrics=cross_entropy), "is a function\nhint: use for example metrics={"),
        (lambda: job(metrics={"accuracy": 0.5}), "gives 'accuracy' a float, which cannot be called"),
        (lambda: job(metrics={"loss": cross_entropy}), "has a metric named loss"),
        (lambda: job(groups={"weight_decay": 0.0}), "Job(groups=...) is a dict, which cannot be called"),
        (lambda: db.Cluster(replicas=2.5), "Cluster(replicas=2.5) is not a whole number"),  # type: ignore[arg-type]
        (lambda: db.Cluster(shards="2"), "Cluster(shards='2') is not a whole number"),  # type: ignore[arg-type]
        (lambda: db.Cluster(partitions="2"), "Cluster(partitions='2') is not a whole"),  # type: ignore[arg-type]
        (lambda: db.Cluster(lost_seconds="2"), "Cluster(lost_seconds='2') is not a number"),  # type: ignore[arg-type]
        (lambda: db.Downpour(n_push=1.0), "Downpour(n_push=1.0) is not a whole number"),  # type: ignore[arg-type]
        (lambda: db.Downpour(clip_norm="1"), "Downpour(clip_norm='1') is not a number"),  # type: ignore[arg-type]
        (lambda: db.Sandblaster(history="9"), "Sandblaster(history='9') is not a whole"),  # type: ignore[arg-type]
        (lambda: db.Sandblaster(gtol=None), "Sandblaster(gtol=None) is not a number"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_kind_is_refused_by_the_name_of_its_field(build: Callable[[], object], said: str) -> None:
    assert said in refused(build)


def complex_model() -> nn.Module:
    return nn.Linear(12, 3, dtype=torch.complex64)


def test_more_shards_than_a_process_may_have_sockets_are_refused_with_both_reasons() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with pytest.raises(db.ConfigurationError) as caught:
            LocalEngine([f"shard/{index}" for index in range(250)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    message = "there are no sockets for 250 shards: Too many open files\nhint: use fewer shards"
    assert str(caught.value).startswith(message)


def test_more_processes_than_may_have_files_open_are_refused_and_a_limit_that_may_be_raised_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, raised = [40, 64], []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, now: raised.append(now))
    message = refused_by_train(tmp_path, cluster=db.Cluster(replicas=24, shards=2))
    assert re.match(r"Cluster\(replicas=24, partitions=1, shards=2\) may need 1\d\d open files .*, and 64 are", message)
    assert raised == []
    limits[1] = 4096
    engine_of(job(cluster=db.Cluster(replicas=24, shards=2)), None, None).close()
    ((soft, hard),) = raised
    assert 100 < soft < 200
    assert hard == 4096


def test_a_file_whose_name_cannot_be_imported_is_refused_with_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "01.digits.py").write_text("job = None")
    assert "for example to 01_digits.py" in refused(lambda: job_of(tmp_path / "01.digits.py"))


def no_module() -> None:
    """Forgets to return it."""


def lambda_free_pair() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 12), torch.zeros(64, dtype=torch.int64)


def test_what_hosts_are_told_to_have_prepared_differs_wherever_it_does() -> None:
    layout = lay_out(classifier())
    weighted = lay_out(classifier(), lambda name, parameter: {"weight_decay": 0.1})
    facts = [Facts(each, buffers, 640, 200) for each in (layout, weighted) for buffers in (layout, weighted)]
    assert len({str(each) for each in facts}) == 4
    assert "259 parameters in 4 tensors (layout " in str(facts[0])
    assert str(facts[0]).endswith("), 640 examples and 200 to test on")


def test_numbers_of_numpy_and_mappings_from_0_on_are_taken(tmp_path: Path) -> None:
    given = job(epochs=np.int64(1), evaluate_every=np.int32(100), checkpoint_seconds=np.float32(0.5))
    assert [type(each) for each in (given.epochs, given.evaluate_every, given.checkpoint_seconds)] == [int, int, float]
    examples = dict(enumerate(points(64)))
    assert db.Cluster(memory_bytes=8e9).memory_bytes == 8e9  # type: ignore[arg-type]
    result = db.train(job(data=examples, epochs=1, run=tmp_path / "run"), view=False)
    assert result.summary.examples.seen == 64


def per_example_metric(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(1) == target


def test_what_is_no_data_set_no_module_or_no_number_is_refused_by_what_it_is(tmp_path: Path) -> None:
    tensors = (torch.randn(64, 12), torch.zeros(64, dtype=torch.int64))
    for fields, said in (
        (
            {"data": tensors},
            "Job(data=...) is a tuple of 2 tensors, which is no data set\nhint: give torch.utils.data.Tensor",
        ),
        ({"test": "mnist"}, "Job(test=...) is a str, which is no data set"),
        ({"data": {"x": tensors[0]}}, "Job(data=...) is a dict, which is no data set"),
        ({"data": lambda_free_pair}, "Job(data=...) is a tuple of 2 tensors, which is no data set"),
        ({"model": complex_model}, "parameter weight has dtype torch.complex64; the flat vector holds floating-point"),
        ({"model": no_module}, "the job's model is a NoneType, not a torch.nn.Module"),
        ({"metrics": {"right": per_example_metric}}, "the metric right is [16], not a number"),
    ):
        assert said in refused_by_train(tmp_path, **fields)


def test_values_are_frozen_equal_by_their_fields_and_travel_by_pickle() -> None:
    for value in (db.Cluster(replicas=3), db.Downpour(n_push=2, update_rule=db.adam()), job()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.replicas = 7  # type: ignore[misc, union-attr]
    for value in (db.Cluster(replicas=3), db.Downpour(n_push=2, update_rule=db.adam())):
        assert pickle.loads(pickle.dumps(value)) == value == dataclasses.replace(value)
    assert pickle.loads(pickle.dumps(job())).cluster == job().cluster


def test_more_shards_than_parameters_are_refused_with_both_numbers(tmp_path: Path) -> None:
    message = refused_by_train(tmp_path, cluster=db.Cluster(shards=300, engine="simulated"))
    assert "cannot cut 259 parameters into 300 shards" in message
    assert "hint: use Cluster(shards=259) or fewer" in message


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(tmp_path: Path) -> None:
    message = refused_by_train(tmp_path, batch_size=641)
    assert "a mini-batch of 641 examples is larger than the data, which has 640" in message
    assert "use batch_size=640 or less" in message
    assert "is not empty" in refused_by_train(tmp_path, data=partial(points, 0))


def frozen() -> nn.Module:
    return classifier().requires_grad_(False)


def doubly_owned() -> nn.Module:
    module = classifier()
    module.other = nn.Linear(12, 16, bias=False)
    module.other.weight = nn.Parameter(module[0].weight.data)  # type: ignore[index]
    return module


def mixed() -> nn.Module:
    module = classifier()
    module.other = nn.Linear(2, 2).double()
    return module


def test_models_without_a_flat_vector_are_refused_by_the_names_of_their_parameters(tmp_path: Path) -> None:
    assert "Sequential has no trainable parameters" in refused_by_train(tmp_path, model=frozen)
    message = refused_by_train(tmp_path, model=doubly_owned)
    assert "parameters 0.weight and other.weight are different views of the same memory" in message
    message = refused_by_train(tmp_path, model=mixed)
    assert "parameter other.weight has dtype torch.float64, 0.weight has torch.float32" in message


def per_example(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


def as_number(output: Tensor, target: Tensor) -> float:
    return float(nn.functional.cross_entropy(output, target).detach())


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape(tmp_path: Path) -> None:
    assert "the loss is [16], not a scalar" in refused_by_train(tmp_path, loss=per_example)
    assert "the loss is float, not a scalar" in refused_by_train(tmp_path, loss=as_number)


class Stream(IterableDataset[Any]):
    """Data without length and index."""

    def __iter__(self) -> Any:
        return iter([])


def test_data_that_cannot_be_indexed_are_refused_by_their_type(tmp_path: Path) -> None:
    for data, said in ((Stream(), "Job(data=...) is a Stream"), (None, "NoneType"), (partial(int, 3), "is a int")):
        assert said in refused_by_train(tmp_path, data=data)
    assert "Job(test=...) is a Stream" in refused_by_train(tmp_path, test=Stream())
    assert "the test set is empty" in refused_by_train(tmp_path, test=[])


class Ready(TensorDataset):
    """A data set class that needs no arguments."""

    def __init__(self) -> None:
        super().__init__(*points(40).tensors)


@pytest.mark.parametrize(
    "data", [points(40), partial(points, 40), Ready, Ready(), [points(40)[index] for index in range(40)]]
)
def test_data_may_be_a_data_set_a_list_or_whatever_builds_one(data: Any) -> None:
    prepared, facts = prepare(job(data=data, test=None))
    assert (facts.examples, len(prepared.data), facts.test_examples) == (40, 40, 0)
    assert facts.layout.length == 259


class Unpicklable(TensorDataset):
    """A data set with an open file."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle '_io.TextIOWrapper' object")


@pytest.mark.parametrize(
    "fields",
    [
        {"data": Unpicklable(torch.zeros(40, 12), torch.zeros(40, dtype=torch.int64))},
        {"model": partial(classifier, threading.Lock())},
        {"metrics": {"accuracy": partial(cross_entropy, weight=(each for each in "abc"))}},
    ],
)
def test_what_cannot_reach_other_processes_is_refused_before_one_starts(fields: dict[str, Any], tmp_path: Path) -> None:
    message = refused_by_train(tmp_path, cluster=db.Cluster(engine="local"), **fields)
    assert f"Job({next(iter(fields))}=...) cannot be handed to other processes" in message
    assert "give data as a function that builds the data set, and leave files, locks and generators out" in message


def test_a_run_folder_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("mine")
    built = partial(pytest.fail, "the data were built before")
    message = refused(lambda: db.train(job(run=tmp_path, data=built), view=False))
    assert f"the run folder {tmp_path} exists" in message
    assert f"distbelief resume {tmp_path}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.txt"]


def data_of_another_job(run: Path) -> TensorDataset:
    (run / "checkpoints").mkdir(parents=True)
    return points(40)


def test_a_run_folder_that_another_job_was_quicker_to_make_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    message = refused(lambda: db.train(job(run=run, data=partial(data_of_another_job, run)), view=False))
    assert f"the run folder {run} exists" in message
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


def test_a_run_folder_that_cannot_be_written_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    message = refused(lambda: db.train(job(run=tmp_path / "file" / "run"), view=False))
    assert "cannot be written" in message
    assert "Not a directory" in message


@pytest.mark.parametrize("listeners", [print, [3], {"on_event": print}])
def test_listeners_that_are_no_list_of_functions_are_refused_before_anything_starts(
    listeners: Any, tmp_path: Path
) -> None:
    said = refused(lambda: db.train(job(run=tmp_path / "run"), listeners=listeners, view=False))
    assert f"distbelief.train(listeners={listeners!r}) is no list of functions" in said
    assert not (tmp_path / "run").exists()


def test_a_result_shows_what_it_came_to_and_none_of_what_it_keeps(tmp_path: Path) -> None:
    shown = repr(db.train(job(run=tmp_path / "run", epochs=1), view=False))
    assert shown.startswith("Result(summary=Summary(")
    assert shown.endswith(f", run={tmp_path / 'run'!r})")


def test_a_resume_without_a_run_says_so(tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "none", "is no run folder"), (tmp_path, "holds no complete checkpoint")):
        with pytest.raises(db.CheckpointError, match=said):
            db.train(job(), resume=folder, view=False)


def raises_in_data() -> TensorDataset:
    raise FileNotFoundError("my/recordings.tar")


def raises_in_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 0 - 5))


def raises_in_loss(output: Tensor, target: Tensor) -> Tensor:
    return output @ target


@pytest.mark.parametrize(
    ("fields", "function", "error"),
    [
        ({"data": raises_in_data}, "raises_in_data", "my/recordings.tar"),
        ({"model": raises_in_model}, "raises_in_model", "negative dimension -5"),
        ({"loss": raises_in_loss}, "raises_in_loss", "size mismatch"),
    ],
)
def test_a_function_of_the_user_that_raises_is_shown_with_its_own_traceback_first(
    fields: dict[str, Any], function: str, error: str, tmp_path: Path
) -> None:
    with pytest.raises(db.UserCodeError) as caught:
        db.train(job(run=tmp_path / "run", **fields), view=False)
    message = str(caught.value)
    assert message.startswith("Traceback (most recent call last)")
    assert f", in {function}\n" in message
    assert error in message
    assert not (tmp_path / "run").exists()


HERE = False


def built_wider(built: Path, number: int) -> nn.Module:
    """Wider from the time on that it is built for the `number`th time, in whatever process."""
    with built.open("ab") as file:
        file.write(b".")
    return nn.Linear(12, 3 + (built.stat().st_size >= number))


def built_wider_here() -> nn.Module:
    return nn.Linear(12, 3 + HERE)


@pytest.mark.parametrize(
    ("model", "refusal"),
    [
        (partial(built_wider, number=2), db.ConfigurationError),
        (built_wider_here, db.ConfigurationError),
        (partial(built_wider, number=4), db.UserCodeError),
    ],
    ids=["tried", "here", "in a role"],
)
def test_a_model_that_is_another_one_each_time_it_is_built_is_refused_by_the_parameters_that_differ(
    model: Callable[..., nn.Module], refusal: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HERE", True)
    if isinstance(model, partial):
        model = partial(model, tmp_path / "built")
    with pytest.raises(refusal) as caught:
        db.train(job(model=model, cluster=db.Cluster(replicas=2, shards=2), run=tmp_path / "run"), view=False)
    message = str(caught.value)
    assert "the job's model is another one each time it is built: " in message
    assert "weight has shape [4, 12], before [3, 12]; bias has shape [4], before [3]\nhint: " in message
    assert (tmp_path / "run").exists() == (refusal is db.UserCodeError)


def test_warmstart_and_cooldown_are_derived_from_the_examples_and_the_replicas() -> None:
    assert Release.planned(1_000_000, 16, 4, None, None) == Release(20_000, 20_000)
    assert Release.planned(40_000, 16, 4, None, None) == Release(1600, 1600)  # a hundred mini-batches of 16
    assert Release.planned(1000, 16, 4, None, None) == Release(100, 100)  # but no more than a tenth
    assert Release.planned(1_000_000, 16, 1, None, None) == Release(0, 0)
    assert Release.planned(1000, 16, 4, 7, 0) == Release(7, 0)


def test_threads_are_shared_among_replicas_and_never_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbelief.cluster.available_cores", lambda: 8)
    assert db.Cluster(threads_per_replica=3).threads == 3
    assert [db.Cluster(replicas=replicas).threads for replicas in (1, 2, 4, 7, 10_000)] == [7, 3, 1, 1, 1]


def test_by_default_parameters_are_fetched_and_gradients_pushed_with_each_mini_batch() -> None:
    assert (db.Downpour().n_fetch, db.Downpour().n_push) == (1, 1)


@pytest.mark.parametrize(
    ("cluster", "own"),
    [
        (db.Cluster(replicas=4, shards=3), True),  # one thread each
        (db.Cluster(replicas=4, shards=4), False),
        (db.Cluster(replicas=2, shards=1), True),  # three threads each
        (db.Cluster(replicas=2, shards=2), False),
        (db.Cluster(replicas=1, partitions=6, shards=1), True),
        (db.Cluster(replicas=1, partitions=7, shards=1), False),
        (db.Cluster(replicas=2, shards=1, threads_per_replica=4), False),
        (db.Cluster(replicas=9, partitions=4, shards=9, engine="ray", address="auto", cpus_per_replica=4), True),
        (db.Cluster(replicas=2, partitions=4, engine="ray", address="auto", cpus_per_replica=3), False),
        (db.Cluster(partitions=2, engine="ray", address="auto", cpus_per_replica=4, threads_per_replica=3), False),
        (db.Cluster(replicas=1, engine="ray", cpus_per_replica=1), False),  # of a Ray that counts no cores
    ],
)
def test_who_has_a_core_of_eight_for_himself(
    cluster: db.Cluster, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("distbelief.cluster.available_cores", lambda: 8)
    assert cluster.own_cores == own


def test_a_partition_of_a_replica_has_its_core_and_the_evaluators_share_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores in (3, 4):
        monkeypatch.setattr("distbelief.cluster.available_cores", lambda: cores)  # noqa: B023 - asked at once
        cluster = db.Cluster(replicas=1, partitions=2, shards=1)
        sites = [site_of(cluster, name, torch.device("cpu"), "::1") for name in ("replica/0", EVALUATOR)]
        assert [site.own_core for site in sites] == [cores == 4, False]
        assert [Group(None, 0, 1, site)._spin._own_core for site in sites] == [cores == 4, False]
        assert {(site.address, site.device.type, site.own_device) for site in sites} == {("::1", "cpu", False)}


@pytest.mark.parametrize(
    ("named", "devices", "own"),
    [(None, [0, 1, 2, 3], True), ("cuda", [0, 1, 2, 3], True), ("cuda:1", [1, 1, 1, 1], False)],
)
def test_processes_of_replicas_take_the_accelerators_in_turn_unless_one_is_named(
    named: str | None, devices: list[int], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [pick_device(named, index) for index in range(4)] == [torch.device("cuda", index) for index in devices]
    cluster = db.Cluster(replicas=2, partitions=2, device=named)
    assert cluster.own_devices(4) == own
    assert not cluster.own_devices(3)
    on_ray = db.Cluster(engine="ray", partitions=2, gpus_per_replica=2, device=named)
    assert on_ray.own_devices(1) == own
    assert pick_device("cpu", 2) == torch.device("cpu")
