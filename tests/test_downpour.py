# SPDX-License-Identifier: Apache-2.0
"""Laws of Downpour SGD, against the plain torch loop."""

import dataclasses
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief import checkpoint, shard_file
from distbelief.coordinator import Coordinator
from distbelief.downpour import AccrueName, DownpourReplica, FetchName
from distbelief.events import Evaluated, LossRose, Observation, Progress, ReplicasReleased
from distbelief.model_replica import ModelReplica
from distbelief.section import Applied, Section, Stamp
from distbelief.update_rule.rule import UpdateRule
from tests import problems

AWAITED = functools.partial(db.Downpour, fetch="awaited")


def trained(job: db.Job, tmp_path: Path, **options: Any) -> db.Result:
    number = len(list(tmp_path.iterdir()))
    return db.train(dataclasses.replace(job, run=tmp_path / f"run{number}"), view=False, **options)


@pytest.mark.parametrize(
    ("engine", "shards"), [("simulated", 1), ("simulated", 2), ("simulated", 5), ("local", 1), ("local", 5)]
)
def test_one_replica_that_awaits_its_fetches_equals_the_plain_loop_bit_for_bit(
    engine: str, shards: int, tmp_path: Path
) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=shards, engine=engine),
        algorithm=AWAITED(update_rule=db.adagrad(0.1)),
        data=functools.partial(problems.points, 330),  # not a multiple of the mini-batch
    )
    reference = problems.fresh_model(job)
    optimizer = torch.optim.Adagrad(reference.parameters(), lr=0.1, fused=True)
    problems.plain_loop(job, optimizer, reference)
    assert problems.same_parameters(trained(job, tmp_path).model, reference)


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (db.sgd(0.1), functools.partial(torch.optim.SGD, lr=0.1, fused=True)),
        (
            db.adagrad(0.1, weight_decay=0.01),
            functools.partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.01, fused=True),
        ),
    ],
)
def test_any_torch_optimizer_in_the_shard_does_what_it_does_in_the_plain_loop(
    rule: db.UpdateRule, optimizer: Any, tmp_path: Path
) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=3, engine="simulated"), algorithm=AWAITED(update_rule=rule)
    )
    reference = problems.fresh_model(job)
    problems.plain_loop(job, optimizer(reference.parameters()), reference)
    assert problems.same_parameters(trained(job, tmp_path).model, reference)


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (db.sgd(0.1, momentum=0.9), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)),
        (db.adam(0.01), functools.partial(torch.optim.Adam, lr=0.01, fused=True)),
        (db.adamw(0.01), functools.partial(torch.optim.AdamW, lr=0.01, fused=True)),
    ],
)
def test_one_with_momentum_does_so_to_rounding(rule: db.UpdateRule, optimizer: Any, tmp_path: Path) -> None:
    """What is left over of a whole vector of the processor is rounded otherwise, and spans are no whole tensors."""
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=3, engine="simulated"), algorithm=AWAITED(update_rule=rule)
    )
    reference = problems.fresh_model(job)
    problems.plain_loop(job, optimizer(reference.parameters()), reference)
    found = trained(job, tmp_path).model
    for one, other in zip(found.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pushing_every_fourth_mini_batch_applies_the_mean_of_four_gradients(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=2, engine="simulated"),
        algorithm=AWAITED(update_rule=db.adagrad(0.1), n_push=4, n_fetch=4),
        data=functools.partial(problems.points, 16 * 42),
    )
    reference = problems.fresh_model(job)
    problems.plain_loop(job, torch.optim.Adagrad(reference.parameters(), lr=0.1), reference, n_push=4)
    result = trained(job, tmp_path).model
    for one, other in zip(result.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pushing_the_sum_is_pushing_the_mean_at_a_rate_as_many_times_as_high(tmp_path: Path) -> None:
    def model(rate: float, accrue: AccrueName) -> nn.Module:
        algorithm = AWAITED(update_rule=db.sgd(rate), n_push=4, n_fetch=4, accrue=accrue)
        cluster = db.Cluster(replicas=1, shards=2, engine="simulated")
        return trained(problems.job(cluster=cluster, algorithm=algorithm), tmp_path).model

    for one, other in zip(model(0.05, "sum").parameters(), model(0.2, "mean").parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_shards_count_the_pushes_mini_batches_and_examples_of_which_they_are(tmp_path: Path) -> None:
    """Of one replica that awaits its fetches none is stale; schedules go by the examples."""
    cluster = db.Cluster(replicas=1, shards=2, engine="simulated")
    run = trained(problems.job(cluster=cluster, algorithm=AWAITED(n_push=4, n_fetch=4)), tmp_path).run
    folder, manifest = checkpoint.newest(run, lambda path, reason: pytest.fail(reason))
    for file in manifest.shards:
        state = shard_file.read_state(folder / file.name)
        assert (state.version, state.mini_batches, state.examples) == (20, 80, 2 * 640)
        assert state.staleness == {0: 20}


def test_parameter_groups_are_those_of_torch(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=3, engine="simulated"),
        algorithm=AWAITED(update_rule=db.sgd(0.1, weight_decay=0.1)),
        groups=no_decay_for_biases,
    )
    reference = problems.fresh_model(job)
    biases = [p for name, p in reference.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in reference.named_parameters() if not name.endswith("bias")]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    problems.plain_loop(job, torch.optim.SGD(groups, lr=0.1, weight_decay=0.1, fused=True), reference)
    assert problems.same_parameters(trained(job, tmp_path).model, reference)


def no_decay_for_biases(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"weight_decay": 0.0} if name.endswith("bias") else {}


def test_the_number_of_shards_never_changes_a_result(tmp_path: Path) -> None:
    # Bandwidth without limit and no jitter: the order of the pushes is then the same for every cut.
    costs = db.Costs(bytes_per_second=1e30, serving_bytes_per_second=1e30, jitter=0.0)
    models = [
        trained(
            problems.job(cluster=db.Cluster(replicas=1, shards=shards, engine="simulated")), tmp_path, costs=costs
        ).model
        for shards in (1, 3)
    ]
    assert problems.same_parameters(*models)


def test_the_same_seed_on_the_simulated_engine_gives_the_same_events_and_parameters(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[list[Observation], nn.Module]:
        heard: list[Observation] = []
        job = problems.job(cluster=db.Cluster(replicas=5, shards=2, engine="simulated"), seed=seed)
        faults = db.Faults(kill=((0.5, "replica/1"), (0.6, "shard/0")), slow={"replica/2": 3.0})
        model = trained(job, tmp_path, faults=faults, listeners=[heard.append]).model
        return heard[1:-1], model  # the first and last event name the run folder

    def timeless(heard: list[Observation]) -> list[str]:
        return [str(one).replace("run0", "run").replace("run1", "run").replace("run2", "run") for one in heard]

    (first, model), (again, same), (other, _) = run(1), run(1), run(2)
    assert timeless(first) == timeless(again)
    assert problems.same_parameters(model, same)
    assert timeless(first) != timeless(other)


@pytest.mark.parametrize(("engine", "n_fetch", "n_push"), [("simulated", 1, 1), ("simulated", 3, 2), ("local", 3, 2)])
def test_every_example_counts_exactly_once_in_an_epoch_without_failure(
    engine: str, n_fetch: int, n_push: int, tmp_path: Path
) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=3, shards=2, engine=engine),
        algorithm=db.Downpour(n_fetch=n_fetch, n_push=n_push),
        data=functools.partial(problems.points, 1001),
    )
    summary = trained(job, tmp_path).summary
    assert (summary.examples.seen, summary.examples.repeated, summary.examples.missing) == (2002, 0, 0)
    assert summary.virtual == (engine == "simulated")


def test_replicas_learn_together(tmp_path: Path) -> None:
    job = problems.job(cluster=db.Cluster(replicas=8, shards=2, engine="simulated"), epochs=12)
    result = trained(job, tmp_path)
    assert (result.test["accuracy"] or 0.0) > 0.9
    assert result.summary.staleness.median > 0


def test_warmstart_lets_one_replica_train_first_and_releases_the_others_in_stages(tmp_path: Path) -> None:
    heard: list[Observation] = []
    job = problems.job(
        cluster=db.Cluster(replicas=8, shards=1, engine="simulated"),
        algorithm=db.Downpour(warmstart=320),
        epochs=4,
    )
    trained(job, tmp_path, listeners=[heard.append])
    released = [one.event for one in heard if isinstance(one.event, ReplicasReleased)]
    assert [event.replicas for event in released] == [2, 4, 8]
    assert released[0].examples >= 320
    first = next(one.event for one in heard if isinstance(one.event, ReplicasReleased))
    assert first.examples < 640


def test_a_loss_that_rises_when_too_many_train_for_the_rate_is_told_and_stands_in_the_summary(tmp_path: Path) -> None:
    def rises(replicas: int, rule: UpdateRule) -> list[LossRose]:
        heard: list[Observation] = []
        cluster = db.Cluster(replicas=replicas, shards=2, engine="simulated")
        job = problems.job(cluster=cluster, algorithm=db.Downpour(update_rule=rule), epochs=12)
        result = trained(job, tmp_path, listeners=[heard.append])
        told = [one.event for one in heard if isinstance(one.event, LossRose)]
        assert [fault.type for fault in result.summary.faults] == ["LossRose"] * len(told)
        return told

    steep = db.sgd(1.0, momentum=0.9)
    assert rises(1, steep) == rises(8, db.adagrad()) == []
    (rise,) = rises(8, steep)
    assert rise.loss > 2 * rise.lowest
    assert rise.replicas > 1


def test_local_steps_of_plain_sgd_between_fetches_follow_the_sequential_loop(tmp_path: Path) -> None:
    # One replica, SGD in the shard and the same rate locally: local steps make its own copy what the shard will be.
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=2, engine="simulated"),
        algorithm=AWAITED(update_rule=db.sgd(0.1), n_fetch=4, n_push=1, local_rate=0.1, backlog=1),
    )
    reference = problems.fresh_model(job)
    problems.plain_loop(job, torch.optim.SGD(reference.parameters(), lr=0.1), reference)
    for one, other in zip(trained(job, tmp_path).model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_clipping_is_that_of_torch(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=2, engine="simulated"),
        algorithm=AWAITED(update_rule=db.sgd(1.0), clip_norm=0.05),
    )
    reference = problems.fresh_model(job)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05) and None)
    problems.plain_loop(job, optimizer, reference)
    for one, other in zip(trained(job, tmp_path).model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_momentum_of_one_replica_is_that_of_torch_with_nesterov(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=2, engine="simulated"),
        algorithm=AWAITED(update_rule=db.sgd(0.05), momentum=0.9),
    )
    reference = problems.fresh_model(job)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    problems.plain_loop(job, optimizer, reference)
    for one, other in zip(trained(job, tmp_path).model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_many_replicas_bear_momentum_of_their_own_where_that_of_the_rule_ruins_training(tmp_path: Path) -> None:
    # At a curvature of 1, rate / (1 - momentum) may be 0.34 for momentum of the rule where pushes are three late, 2.1
    # for that of Downpour.
    def ends_at(momentum: float, rule: UpdateRule) -> float:
        job = db.Job(
            model=Valley, step=lambda model, batch: model(batch), data=torch.zeros(1000, 1), batch_size=1,
            algorithm=db.Downpour(update_rule=rule, momentum=momentum, warmstart=0, cooldown=0),
            cluster=db.Cluster(replicas=4, shards=2, engine="simulated"),
        )  # fmt: skip
        result = trained(job, tmp_path, costs=db.Costs(example_seconds=5e-3))
        return max(parameter.abs().max().item() for parameter in result.model.parameters())

    assert ends_at(0.9, db.sgd(0.1)) < 1e-9
    for nesterov in (False, True):
        assert ends_at(0.0, db.sgd(0.1, momentum=0.9, nesterov=nesterov)) > 1e9


class Valley(nn.Module):
    """A loss of half the square of where it stands, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.ones(4))

    def forward(self, _: Any) -> torch.Tensor:
        return self.place.square().sum() / 2


def test_the_learning_rate_follows_the_examples_applied_whatever_the_number_of_replicas(tmp_path: Path) -> None:
    # A schedule that ends at zero in the second epoch: nothing moves from there on, on any number of replicas.
    for replicas in (1, 4):
        rule = db.sgd(0.1, schedule=db.linear_decay(704, end=0.0))
        one = problems.job(algorithm=AWAITED(update_rule=rule), epochs=1, seed=3)
        cluster = db.Cluster(replicas=replicas, shards=2, engine="simulated")
        heard: list[Observation] = []
        result = trained(
            dataclasses.replace(one, epochs=2, cluster=cluster, evaluate_every=64), tmp_path,
            listeners=[heard.append], costs=db.Costs(example_seconds=5e-3),
        )  # fmt: skip
        late = [o.event for o in heard if isinstance(o.event, Evaluated) and o.event.examples > 704 + 16 * replicas]
        assert len(late) >= 2
        assert len({event.loss for event in late}) == 1
        assert result.test["accuracy"] == late[-1].metrics["accuracy"]


def narrow_points() -> TensorDataset:
    """Far from what the statistics of a layer are in the beginning, mean 0 and variance 1."""
    inputs, targets = problems.points(640).tensors
    return TensorDataset(0.1 * inputs + 1.0, targets)


@pytest.mark.parametrize(("replicas", "engine"), [(1, "simulated"), (8, "local"), (8, "simulated"), (64, "simulated")])
def test_the_statistics_of_batch_norm_in_the_result_are_those_of_its_weights(
    replicas: int, engine: str, tmp_path: Path
) -> None:
    """Replicas that were released late, or left early, have seen few mini-batches, or old parameters."""
    cluster = db.Cluster(replicas=replicas, shards=2, engine=engine)
    job = problems.job(model=problems.normalised_classifier, data=narrow_points, cluster=cluster, epochs=10)
    model = trained(job, tmp_path).model
    with torch.no_grad():
        activations = model[0](narrow_points().tensors[0])
    ratio = model[1].running_var / activations.var(0)
    assert 0.9 < float(ratio.mean()) < 1.1, ratio
    assert torch.all((ratio > 0.6) & (ratio < 1.6)), ratio
    torch.testing.assert_close(model[1].running_mean, activations.mean(0), atol=0.1, rtol=0.1)
    assert int(model[1].num_batches_tracked) > 30


def with_a_table() -> nn.Module:
    """With a large constant buffer, as position tables are."""
    module = problems.classifier()
    module.register_buffer("table", torch.arange(1000.0))
    return module


def buffers_taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """Which replica's buffers the coordinator takes from now on, and what they are."""
    taken: list[tuple[int, torch.Tensor]] = []
    take = Coordinator.take_buffers

    @functools.wraps(take)
    def note(self: Coordinator, replica: int, partition: int, values: torch.Tensor) -> None:
        taken.append((replica, values.clone()))
        take(self, replica, partition, values)

    monkeypatch.setattr(Coordinator, "take_buffers", note)
    return taken


@pytest.mark.parametrize("model", [with_a_table, problems.normalised_classifier])
def test_buffers_travel_when_training_changed_them_and_constant_ones_never(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = buffers_taken(monkeypatch)
    # The second replica is given nothing before the last examples but two mini-batches.
    job = problems.job(model=model, algorithm=db.Downpour(warmstart=1248, cooldown=0))
    result = trained(job, tmp_path, costs=db.Costs(example_seconds=0.01))
    kept = dict(result.model.named_buffers())
    if model is with_a_table:
        assert taken == []
        assert torch.equal(kept["table"], torch.arange(1000.0))
        return
    # 12.8 s of training in mini-batches of 0.16 s, a look at every second one and at the end.
    assert 36 <= len([replica for replica, _ in taken if replica == 0]) <= 42
    # A replica that has not trained has nothing to say.
    assert len([replica for replica, _ in taken if replica == 1]) <= 1
    assert all(values.any() for _, values in taken)
    assert int(kept["1.num_batches_tracked"]) > 0


def counted(module: nn.Module, _: object) -> None:
    if module.training:
        module.get_buffer("counter").add_(1)


def with_a_long_counter() -> nn.Module:
    """With a buffer, much larger than the parameters, that counts mini-batches."""
    module = problems.classifier()
    module.register_buffer("counter", torch.zeros(10_000))
    module.register_forward_pre_hook(counted)
    return module


def test_buffers_that_take_long_to_send_are_sent_more_rarely_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = buffers_taken(monkeypatch)
    job = problems.job(model=with_a_long_counter, cluster=db.Cluster(replicas=1, shards=1, engine="simulated"))
    costs = db.Costs(bytes_per_second=1e5, example_seconds=0.01)  # 0.8 s for the buffers, hundredths for parameters
    result = trained(job, tmp_path, costs=costs)
    assert 2 <= len(taken) <= 3, "in 12.8 s of training"
    assert int(taken[-1][1][0]) == int(result.model.get_buffer("counter")[0]) == result.summary.mini_batches


def test_a_slow_replica_does_not_hold_up_the_others(tmp_path: Path) -> None:
    def seconds(slow: dict[str, float]) -> float:
        job = problems.job(
            cluster=db.Cluster(replicas=4, shards=1, engine="simulated"), epochs=8, algorithm=db.Downpour(warmstart=0)
        )
        return trained(job, tmp_path, faults=db.Faults(slow=slow)).summary.wall_seconds

    even, uneven = seconds({}), seconds({"replica/3": 8.0})
    # Three of four replicas and an eighth of the fourth: 4 / 3.125 = 1.28 times as long, where a barrier would take 8.
    assert uneven < 2.0 * even


def test_a_slow_network_makes_pushes_rarer_instead_of_stopping_training(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=2, shards=1, engine="simulated"), epochs=4, algorithm=db.Downpour(warmstart=0)
    )
    fast = trained(job, tmp_path).summary
    slow = trained(job, tmp_path, costs=db.Costs(latency_seconds=3e-3)).summary
    assert slow.pushes < 0.75 * fast.pushes
    assert slow.examples.missing == slow.examples.repeated == 0


@pytest.mark.parametrize("fetch", ["fresh", "overlapped", "awaited"])
@pytest.mark.parametrize(("n_push", "n_fetch"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 2)])
def test_one_thing_at_a_time_travels_in_the_spare_buffer_and_arrives_as_it_was_sent(
    n_push: int, n_fetch: int, fetch: FetchName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over links on which it takes longer than a mini-batch."""
    taken: dict[tuple[int, int], torch.Tensor] = {}
    sent: dict[int, torch.Tensor] = {}
    alone, alike = list[bool](), list[bool]()

    def push(self: DownpourReplica, inner: Any = DownpourReplica.push) -> None:
        alone.append(self.fetching is None and self.pushing is None)
        inner(self)
        taken[self.index, self.sequence] = self.model.spare.clone()

    def start(self: DownpourReplica, inner: Any = DownpourReplica.start_fetch) -> None:
        inner(self)
        under_way = {id(each) for each in (self.fetching, self.pushing and self.pushing.future) if each is not None}
        alone.append(len(under_way) < 2)

    def apply(self: Section, stamp: Stamp, gradient: torch.Tensor, inner: Any = Section._apply) -> Applied:
        alike.append(torch.equal(gradient, taken.pop((stamp.replica, stamp.sequence))))
        return cast(Applied, inner(self, stamp, gradient))

    def send(self: Section, replica: int, parameters: torch.Tensor, inner: Any = Section.fetch) -> int:
        version = inner(self, replica, parameters)
        sent[parameters.data_ptr()] = parameters.clone()
        return cast(int, version)

    def adopt(self: ModelReplica, inner: Any = ModelReplica.adopt) -> None:
        alike.append(torch.equal(self.spare, sent.pop(self.spare.data_ptr())))
        inner(self)

    monkeypatch.setattr(DownpourReplica, "push", push)
    monkeypatch.setattr(DownpourReplica, "start_fetch", start)
    monkeypatch.setattr(Section, "_apply", apply)
    monkeypatch.setattr(Section, "fetch", send)
    monkeypatch.setattr(ModelReplica, "adopt", adopt)
    algorithm = db.Downpour(n_push=n_push, n_fetch=n_fetch, fetch=fetch, warmstart=0, cooldown=0, backlog=2)
    job = problems.job(cluster=db.Cluster(replicas=2, shards=1, engine="simulated"), algorithm=algorithm)
    summary = trained(job, tmp_path, costs=db.Costs(latency_seconds=7e-3, jitter=0.5)).summary
    assert all(alone)
    assert all(alike)
    assert len(alike) > summary.pushes > 10
    assert not taken
    assert summary.examples.missing == summary.examples.repeated == 0


def test_pushes_and_the_mini_batches_in_them_are_both_counted_even_over_a_shard_that_died(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=1, shards=2, engine="simulated"), algorithm=AWAITED(n_push=4, backlog=2), epochs=3
    )
    summary = trained(job, tmp_path).summary
    assert summary.mini_batches == 3 * 40
    assert 3 * 40 / 8 <= summary.pushes <= 3 * 40 / 4
    slow = dataclasses.replace(job, checkpoint_seconds=0.1)
    lost = trained(slow, tmp_path, costs=db.Costs(example_seconds=2e-3), faults=db.Faults(kill=((2.0, "shard/0"),)))
    assert lost.summary.mini_batches == 3 * 40


def test_two_hundred_replicas_train_on_the_simulated_engine(tmp_path: Path) -> None:
    job = problems.job(
        cluster=db.Cluster(replicas=200, shards=4, engine="simulated"), data=functools.partial(problems.points, 6400),
        epochs=2, algorithm=db.Downpour(warmstart=0, cooldown=0),
    )  # fmt: skip
    heard: list[Observation] = []
    summary = trained(job, tmp_path, listeners=[heard.append], costs=db.Costs(example_seconds=0.02)).summary
    assert summary.examples.seen == 12800
    assert max(one.event.replicas_alive for one in heard if isinstance(one.event, Progress)) == 200


def slow_accuracy(output: torch.Tensor, target: torch.Tensor) -> float:
    time.sleep(0.3)
    return problems.accuracy(output, target)


def noting_where(folder: Path, model: nn.Module, batch: Any) -> torch.Tensor:
    """A step that notes, for each process, where it computes and with how many threads."""
    with (folder / str(os.getpid())).open("a") as notes:
        print(threading.current_thread() is threading.main_thread(), torch.get_num_threads(), file=notes)
    output: torch.Tensor = model(batch[0])
    return nn.functional.cross_entropy(output, batch[1])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_replicas_compute_in_their_main_thread_with_as_many_threads_as_the_cluster_says(
    threads: int, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    cluster = db.Cluster(replicas=2, shards=1, threads_per_replica=threads)
    step = functools.partial(noting_where, notes)
    trained(problems.job(cluster=cluster, loss=None, step=step, test=None, epochs=4), tmp_path)
    lines = [path.read_text().splitlines() for path in notes.iterdir()]
    replicas = [noted for noted in lines if len(noted) > 10]  # the others have only tried a mini-batch
    assert replicas
    assert {line for noted in replicas for line in noted} == {f"True {threads}"}


class Dropping(nn.Module):
    """Drops a third of what its first layer gives, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.drop, self.above = nn.Linear(problems.FEATURES, 64), nn.Dropout(1 / 3), nn.Linear(64, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.relu(self.below(inputs)) + 1.0)
        if self.training == bool((hidden != 0.0).all()):
            raise AssertionError("dropped in a test, or not in training")
        output: torch.Tensor = self.above(hidden)
        return output


@pytest.mark.parametrize("engine", ["simulated", pytest.param("local", marks=pytest.mark.slow)])
def test_a_model_with_dropout_drops_in_training_and_in_no_test(engine: str, tmp_path: Path) -> None:
    job = problems.job(model=Dropping, cluster=db.Cluster(replicas=2, shards=2, engine=engine), epochs=4)
    result = trained(job, tmp_path)
    assert result.summary.examples.seen == 4 * 640
    assert result.test["accuracy"] > 0.8
    result.model.eval()
    inputs, targets = problems.points(200, 1).tensors
    with torch.no_grad():
        assert result.test["accuracy"] == pytest.approx(float(problems.accuracy(result.model(inputs), targets)))


@pytest.mark.slow
def test_what_is_measured_last_is_the_result_though_an_earlier_evaluation_was_still_under_way(tmp_path: Path) -> None:
    measured: list[int] = []

    def listen(observation: Observation) -> None:
        if isinstance(observation.event, Evaluated):
            measured.append(observation.event.examples)

    cluster = db.Cluster(replicas=1, shards=1, threads_per_replica=1)
    job = problems.job(cluster=cluster, metrics={"accuracy": slow_accuracy}, epochs=40, evaluate_every=320)
    result = trained(job, tmp_path, listeners=[listen])
    inputs, targets = problems.points(200, 1).tensors
    with torch.no_grad():
        expected = problems.accuracy(result.model(inputs), targets)
    assert measured[-1] == result.summary.examples.seen == 25_600
    assert 1 < len(measured) < 40, "training waits for no evaluation: of the 80 due, each of 0.3 s, most are left out"
    assert result.test["accuracy"] == pytest.approx(expected)
