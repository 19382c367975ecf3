# SPDX-License-Identifier: Apache-2.0
"""Sandblaster when processes die, hang or are started again, and what it hands over to Downpour and takes from it."""

import dataclasses
import functools
import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.channel.base import Future, Remote, Signature
from distbelief.checkpoint import complete, read_manifest
from distbelief.checkpoint_writer import CheckpointWriter
from distbelief.engine.virtual import Answer
from distbelief.errors import PeerLost
from distbelief.events import (
    BatchProgress,
    CheckpointFailed,
    CheckpointWritten,
    Evaluated,
    EvaluationLost,
    Iterated,
    JobFinished,
    Observation,
    RoleLost,
    SearchBegun,
    ShardRestored,
)
from distbelief.lbfgs import Step, Stop
from distbelief.parameter_server import ParameterServerShard
from distbelief.sandblaster_coordinator import SandblasterCoordinator
from tests import problems
from tests.killer import Killer, nth
from tests.test_sandblaster import gradient_at_the_end, job, of_kind, points, trained

LIMIT = 12
Disturb = Callable[[SandblasterCoordinator], None]


def path_of(heard: list[Observation]) -> list[tuple[float, float]]:
    """(loss, step) of every iteration, the last time it was taken."""
    taken = {event.iteration: (event.loss, event.t) for event in of_kind(heard, Iterated)}
    return [taken[iteration] for iteration in sorted(taken)]


class Undisturbed(NamedTuple):
    """A job of LIMIT iterations in which nothing goes wrong."""

    path: list[tuple[float, float]]
    parameters: Tensor


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    _, heard = trained(job(run, algorithm={"max_iterations": LIMIT, "deterministic": True}))
    return Undisturbed(path_of(heard), gradient_at_the_end(run)[0])


@pytest.mark.parametrize("role", ["shard/0", "shard/1", "replica/1"])
@pytest.mark.parametrize("moment", [0.205, 0.22, 0.24, 0.26, 0.28])
def test_a_death_costs_at_most_the_evaluation_under_way_and_changes_no_step(
    role: str, moment: float, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    _, heard = trained(
        job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}),
        faults=db.Faults(kill=((moment, role),)),
    )
    assert len(of_kind(heard, RoleLost)) == 1
    under_way = role.startswith("shard") and moment > 0.23  # before, the first checkpoint was not written
    assert len(of_kind(heard, EvaluationLost)) == (1 if under_way else 0)
    # The point, the pairs and the search are where they were: every step is that of the undisturbed job.
    assert path_of(heard) == undisturbed.path
    (finished,) = of_kind(heard, JobFinished)
    assert finished.round_trips <= finished.evaluations + len(of_kind(heard, EvaluationLost))


@pytest.mark.parametrize("role", ["shard/0", "shard/1"])
def test_a_shard_that_dies_while_an_interrupted_job_ends_is_not_written_a_step_behind_the_others(
    role: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(coordinator: SandblasterCoordinator) -> None:
        coordinator.interrupted = "Ctrl-C"
        coordinator.engine._die(role)  # type: ignore[attr-defined]

    at_step(5, monkeypatch, after=die)
    made = job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True})
    _, before = trained(made)
    assert of_kind(before, JobFinished)[0].reason == "Ctrl-C"
    assert of_kind(before, RoleLost)[0].role == role
    _, after = trained(made, resume=tmp_path / "run")
    torch.testing.assert_close(
        torch.tensor(path_of([*before, *after])), torch.tensor(undisturbed.path), rtol=1e-9, atol=1e-12
    )


def at_step(
    iteration: int, monkeypatch: pytest.MonkeyPatch, before: Disturb = lambda _: None, after: Disturb = lambda _: None
) -> None:
    """Around the order of the step that ends this iteration, when it is first given."""
    order, disturbed = SandblasterCoordinator._step, []

    def step(coordinator: SandblasterCoordinator, ordered: Step) -> None:
        this = ordered.commit and coordinator.solver.iteration == iteration and not disturbed
        if this:
            disturbed.append(iteration)
            before(coordinator)
        order(coordinator, ordered)
        if this:
            after(coordinator)

    monkeypatch.setattr(SandblasterCoordinator, "_step", step)


class Cut(Remote[ParameterServerShard]):
    """A shard whose connection breaks at these calls, before or after they have come there; it lives on."""

    def __init__(self, shard: Remote[ParameterServerShard], engine: Any, lost: tuple[str, ...], arrives: bool) -> None:
        self.shard, self.engine, self.lost, self.arrives = shard, engine, lost, arrives

    def start(self, signature: Signature, fields: bytes, tensors: list[Tensor]) -> Future[Any]:
        if signature.name not in self.lost:
            return self.shard.start(signature, fields, tensors)
        if self.arrives:
            self.shard.start(signature, fields, tensors)
        answer = Answer(self.engine, math.inf, signature.name)
        answer.settle(error=PeerLost("the connection broke"))
        return answer


def cut_at_step(
    iteration: int, shard: int, lost: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, *, arrives: bool = False,
    interrupt: bool = False,
) -> None:  # fmt: skip
    def cut(coordinator: SandblasterCoordinator) -> None:
        coordinator.shards[shard] = Cut(coordinator.shards[shard], coordinator.engine, lost, arrives)
        if interrupt:
            coordinator.interrupted = "Ctrl-C"

    def heal(coordinator: SandblasterCoordinator) -> None:
        coordinator.shards[shard] = cast(Cut, coordinator.shards[shard]).shard

    at_step(iteration, monkeypatch, cut, heal)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("lost", [("step",), ("step", "snapshot"), ("snapshot",)], ids="-".join)
@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("iteration", [0, 5, LIMIT])
def test_a_step_that_a_cut_connection_swallows_costs_an_evaluation_at_most_and_changes_no_step(
    shard: int, lost: tuple[str, ...], arrives: bool, iteration: int, undisturbed: Undisturbed, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cut_at_step(iteration, shard, lost, monkeypatch, arrives=arrives)
    result, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}))
    assert not of_kind(heard, RoleLost)
    assert len(of_kind(heard, EvaluationLost)) <= 1
    assert path_of(heard) == undisturbed.path
    assert heard[-1].seconds < 10.0, "nobody waits for a step that never comes"
    parameters, _ = gradient_at_the_end(tmp_path / "run")
    assert torch.equal(nn.utils.parameters_to_vector(result.model.parameters()), parameters)
    assert torch.equal(parameters, undisturbed.parameters)


@pytest.mark.parametrize("lost", [("step",), ("step", "snapshot")], ids="-".join)
def test_a_step_swallowed_while_an_interrupted_job_ends_is_not_written_down_as_made(
    lost: tuple[str, ...], undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at_step(5, 1, lost, monkeypatch, interrupt=True)
    made = job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True})
    result, before = trained(made)
    assert not result.summary.checkpoints.last_failed
    assert of_kind(before, JobFinished)[0].reason == "Ctrl-C"
    assert before[-1].seconds < 10.0
    _, after = trained(made, resume=tmp_path / "run")
    torch.testing.assert_close(
        torch.tensor(path_of([*before, *after])), torch.tensor(undisturbed.path), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("role", ["shard/0", "shard/1"])
def test_a_shard_that_dies_while_replicas_leave_comes_back_at_the_last_point(
    role: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wind_down = SandblasterCoordinator.wind_down

    def die(coordinator: SandblasterCoordinator) -> None:
        coordinator.engine._die(role)  # type: ignore[attr-defined]
        wind_down(coordinator)

    monkeypatch.setattr(SandblasterCoordinator, "wind_down", die)
    cut_at_step(LIMIT, 0, ("snapshot",), monkeypatch)  # so no checkpoint has the point but the last one
    result, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}))
    assert [lost.role for lost in of_kind(heard, RoleLost)] == [role]
    assert of_kind(heard, JobFinished)[0].reason == f"the limit of {LIMIT} iterations was reached"
    parameters, _ = gradient_at_the_end(tmp_path / "run")
    assert torch.equal(parameters, undisturbed.parameters)
    assert torch.equal(nn.utils.parameters_to_vector(result.model.parameters()), parameters)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("lost", [("snapshot",), ()], ids=["a step behind", "at the point"])
@pytest.mark.parametrize("iteration", [1, 5])
def test_a_shard_that_dies_and_is_back_while_a_checkpoint_is_completed_is_noticed(
    shard: int, lost: tuple[str, ...], iteration: int, undisturbed: Undisturbed, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """After every shard has made the step, and before any replica has contributed."""
    cut_at_step(iteration, shard, lost, monkeypatch)
    finish, died = SandblasterCoordinator._finish_writing, []

    def finish_while_it_dies(coordinator: SandblasterCoordinator) -> None:
        due = coordinator.solver.iteration == iteration and not died
        if due:
            died.append(shard)
            assert coordinator._stepping is not None
            coordinator._stepping.result()
        finish(coordinator)
        if due:
            coordinator.engine._die(f"shard/{shard}")  # type: ignore[attr-defined]
            while not of_kind(heard, ShardRestored):
                coordinator.tick()

    monkeypatch.setattr(SandblasterCoordinator, "_finish_writing", finish_while_it_dies)
    made = job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True})
    heard: list[Observation] = []
    db.train(made, view=False, listeners=[heard.append])
    assert [event.role for event in of_kind(heard, RoleLost)] == [f"shard/{shard}"]
    assert len(of_kind(heard, EvaluationLost)) == 1
    assert path_of(heard) == undisturbed.path
    assert torch.equal(gradient_at_the_end(tmp_path / "run")[0], undisturbed.parameters)


@pytest.mark.parametrize("seconds", [60.0, 1e-6], ids=["passing", "durable"])
def test_the_checkpoint_that_a_shard_is_being_given_is_not_removed_meanwhile(
    seconds: float, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written its part of the next one, which is completed before it can be reached."""
    finish, died = SandblasterCoordinator._finish_writing, []

    def finish_while_it_dies(coordinator: SandblasterCoordinator) -> None:
        writing = coordinator._writing_down
        if coordinator.solver.iteration != 5 or died or writing is None:
            finish(coordinator)
            return
        writing.answers.result()
        died.append(cut := Cut(coordinator.shards[1], coordinator.engine, ("restore",), False))
        coordinator.shards[1] = cut
        coordinator.engine._die("shard/1")  # type: ignore[attr-defined]
        for _ in range(3):  # it is found dead, and the newest checkpoint is looked for
            coordinator.tick()
        finish(coordinator)
        cut.lost = ()

    monkeypatch.setattr(SandblasterCoordinator, "_finish_writing", finish_while_it_dies)
    limits = {"max_iterations": LIMIT, "deterministic": True}
    _, heard = trained(job(tmp_path / "run", algorithm=limits, checkpoint_seconds=seconds, keep_checkpoints=1))
    assert died
    assert len(of_kind(heard, ShardRestored)) == 1
    assert path_of(heard) == undisturbed.path
    assert len(complete(tmp_path / "run")) == 1


def test_a_shard_that_dies_when_it_has_said_that_it_is_at_the_last_point_is_asked_again(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is back a step behind before the others have said where they are."""
    cut_at_step(LIMIT, 0, ("snapshot",), monkeypatch)
    sections, died = SandblasterCoordinator._sections, []

    def said_before_it_died(coordinator: SandblasterCoordinator) -> Any:
        said = sections(coordinator)
        if isinstance(coordinator.solver.state.asked, Stop) and not died:
            died.append("shard/0")
            coordinator.engine._die("shard/0")  # type: ignore[attr-defined]
            while not of_kind(heard, ShardRestored):
                coordinator.tick()
        return said

    monkeypatch.setattr(SandblasterCoordinator, "_sections", said_before_it_died)
    heard: list[Observation] = []
    made = job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True})
    db.train(made, view=False, listeners=[heard.append])
    assert died
    assert of_kind(heard, JobFinished)[0].reason == f"the limit of {LIMIT} iterations was reached"
    assert torch.equal(gradient_at_the_end(tmp_path / "run")[0], undisturbed.parameters)


@pytest.mark.parametrize("role", ["shard/0", "shard/1"])
@pytest.mark.parametrize("seconds", [0.0001, 0.0005, 0.001, 0.01, 0.05, 0.1001])
def test_a_shard_that_dies_again_while_it_is_being_restored_changes_no_step(
    role: str, seconds: float, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, deaths = SandblasterCoordinator._restore_shard, []

    def restore_and_die(coordinator: SandblasterCoordinator, index: int) -> None:
        restore(coordinator, index)
        engine: Any = coordinator.engine
        deaths.append(engine.clock)
        if len(deaths) == 1:
            engine.at(engine.clock + seconds, lambda: engine._die(role))

    monkeypatch.setattr(SandblasterCoordinator, "_restore_shard", restore_and_die)
    at_step(5, monkeypatch, after=lambda coordinator: coordinator.engine._die(role))  # type: ignore[attr-defined]
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}))
    assert len(of_kind(heard, RoleLost)) == len(deaths) == 2
    assert len(of_kind(heard, EvaluationLost)) == len(of_kind(heard, ShardRestored)) == 1
    assert path_of(heard) == undisturbed.path


def test_the_pairs_of_a_step_whose_checkpoint_failed_are_in_the_next_one(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at_step(5, 1, ("snapshot",), monkeypatch)
    at_step(7, monkeypatch, after=lambda coordinator: coordinator.engine._die("shard/1"))  # type: ignore[attr-defined]
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}))
    assert of_kind(heard, CheckpointFailed)
    assert len(of_kind(heard, ShardRestored)) == 1
    assert path_of(heard) == undisturbed.path


@pytest.mark.parametrize(("seconds", "durable"), [(60.0, 2), (1e-6, LIMIT + 3)])
def test_the_first_and_the_last_point_outlive_the_machine_and_one_in_so_many_seconds(
    seconds: float, durable: int, tmp_path: Path
) -> None:
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT}, checkpoint_seconds=seconds))
    written = of_kind(heard, CheckpointWritten)
    assert len(written) == durable
    assert written[-1].examples == of_kind(heard, JobFinished)[0].seen > written[0].examples == 0


def test_each_step_writes_down_the_one_pair_that_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, written = CheckpointWriter.begin, []

    def noted(writer: CheckpointWriter, note: Any, slots: Any = (), **options: Any) -> Any:
        written.append(list(slots))
        return begin(writer, note, slots, **options)

    monkeypatch.setattr(CheckpointWriter, "begin", noted)
    trained(job(tmp_path / "run", algorithm={"max_iterations": 9, "history": 4}))
    # Before the first step, at it, which has no pair, and at each one after it; at the end all.
    assert written == [[], [], *([slot % 4] for slot in range(9)), [0, 1, 2, 3]]


def test_checkpoints_that_are_behind_and_pairs_that_were_replaced_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lie, files = tmp_path / "run", list[int](), list[int]()

    def finish(self: SandblasterCoordinator, inner: Any = SandblasterCoordinator._finish_writing) -> None:
        inner(self)
        lie.append(len(complete(run)))
        files.append(
            len({file.name for file in read_manifest(complete(run)[0]).shards if file.partial}) if lie[-1] else 0
        )

    monkeypatch.setattr(SandblasterCoordinator, "_finish_writing", finish)
    trained(job(run, algorithm={"max_iterations": 12, "history": 4}))
    assert max(lie) == 2, "the first, which outlives the machine, and the newest"
    assert max(files) == 4 * 2, "of two shards"


def test_the_examples_that_are_told_never_exceed_those_whose_gradients_are_added_up(tmp_path: Path) -> None:
    slow = {f"replica/{replica}": 200.0 for replica in range(3)}
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": 4}), faults=db.Faults(slow=slow))
    told = [event.examples for event in of_kind(heard, BatchProgress)]
    assert len(told) > 5
    assert told == sorted(told)
    assert told[-1] == of_kind(heard, JobFinished)[0].seen


def test_an_evaluation_that_is_lost_is_no_rate_below_zero(tmp_path: Path) -> None:
    slow = {f"replica/{replica}": 1000.0 for replica in range(3)}
    made = job(tmp_path / "run", algorithm={"max_iterations": 3, "backups": False})
    _, heard = trained(made, faults=db.Faults(slow=slow, kill=((3.0, "shard/1"),)))
    told = of_kind(heard, BatchProgress)
    assert any(after.examples < before.examples for before, after in itertools.pairwise(told))
    assert min(event.examples_per_second for event in told) == 0


def test_who_waits_for_a_slow_replica_is_not_taken_to_hang(tmp_path: Path) -> None:
    made = job(tmp_path / "run", algorithm={"max_iterations": 3, "backups": False}, cluster={"silence_seconds": 3.0})
    _, heard = trained(made, faults=db.Faults(slow={"replica/1": 10_000.0}))
    assert not of_kind(heard, RoleLost)
    taken = [observation.seconds for observation in heard if isinstance(observation.event, Iterated)]
    assert max(after - before for before, after in itertools.pairwise(taken)) > 2 * 3.0


def test_a_replica_that_hangs_is_given_up_after_the_time_that_the_job_says(tmp_path: Path) -> None:
    made = job(tmp_path / "run", algorithm={"max_iterations": 12, "backups": False}, cluster={"silence_seconds": 3.0})
    _, heard = trained(made, faults=db.Faults(hang=((0.33, 1e6, "replica/1"),)))
    assert [event.reason for event in of_kind(heard, RoleLost)] == ["not heard of for 3 s"]
    assert heard[-1].seconds < 10.0


def test_replicas_stay_until_the_last_step_is_known_to_have_been_made(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait are looked at, as when one more asks, while shards go back from a step that one has not made."""
    cut_at_step(LIMIT, 1, ("step",), monkeypatch)
    gather, asked = SandblasterCoordinator._gather, []

    def gather_while_one_asks(coordinator: SandblasterCoordinator) -> None:
        if isinstance(coordinator.solver.state.asked, Stop) and not asked:
            while len(coordinator._waiting) < len(coordinator.replicas):
                coordinator.engine.sleep(1e-3)
            asked.append(len(coordinator._waiting))
            coordinator._offer()
        gather(coordinator)

    monkeypatch.setattr(SandblasterCoordinator, "_gather", gather_while_one_asks)
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT, "deterministic": True}))
    assert asked > [0]
    assert path_of(heard) == undisturbed.path
    assert heard[-1].seconds < 10.0


def test_without_deaths_there_is_one_round_trip_per_evaluation(tmp_path: Path) -> None:
    _, heard = trained(job(tmp_path / "run", algorithm={"max_iterations": 40}))
    (finished,) = of_kind(heard, JobFinished)
    assert finished.round_trips == finished.evaluations > 40


@pytest.mark.slow
@pytest.mark.parametrize("role", ["shard/0", "replica/0", "zygote"])
def test_kill_9_of_a_process_changes_no_step(
    role: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(monkeypatch, role, nth(Iterated, 4))
    heard: list[Observation] = []
    disturbed = job(
        tmp_path / "run", cluster={"engine": "local"}, algorithm={"max_iterations": LIMIT, "deterministic": True}
    )
    db.train(disturbed, view=False, listeners=[heard.append, killer])
    assert killer.killed
    assert of_kind(heard, RoleLost)
    for ours, expected in zip(path_of(heard), undisturbed.path, strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("replicas", [3, 1])
def test_a_run_that_was_cut_short_resumes_where_it_was(replicas: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    short = job(tmp_path / "run", algorithm={"max_iterations": 5, "deterministic": True})
    _, before = trained(short)
    _, after = trained(
        dataclasses.replace(
            short, algorithm=dataclasses.replace(short.algorithm, max_iterations=LIMIT),
            cluster=db.Cluster(replicas=replicas, shards=3, engine="simulated"),
        ),
        resume=tmp_path / "run",
    )  # fmt: skip
    both = path_of([*before, *after])
    assert [event.iteration for event in of_kind(after, Iterated)] == list(range(6, LIMIT + 1))
    torch.testing.assert_close(torch.tensor(both), torch.tensor(undisturbed.path), rtol=1e-9, atol=1e-12)
    # What is counted goes on, too: examples of all evaluations, one of all data each.
    (finished,) = of_kind(after, JobFinished)
    assert finished.seen == finished.evaluations * 60
    assert finished.round_trips >= finished.evaluations
    assert of_kind(after, BatchProgress)[0].backed_up >= of_kind(before, BatchProgress)[-1].backed_up > 0
    rates = [event.examples_per_second for event in of_kind(after, BatchProgress)]
    assert max(rates) < 2 * max(event.examples_per_second for event in of_kind(before, BatchProgress))
    assert of_kind(after, Iterated)[0].examples > of_kind(before, Iterated)[-1].examples


@pytest.mark.parametrize("limits", [{"max_iterations": 4}, {"max_evaluations": 6}])
def test_what_a_search_that_met_a_limit_offers_goes_beyond_it(limits: dict[str, int], tmp_path: Path) -> None:
    limited = job(tmp_path / "run", algorithm={"max_iterations": 50} | limits)
    first = trained(limited)[0].summary
    more = eval(first.resume_command, {"distbelief": db, "dataclasses": dataclasses, "job": limited}).summary
    assert first.batch.iterations + 2 <= more.batch.iterations < 50


def test_another_objective_takes_the_parameters_and_begins_its_own_search(tmp_path: Path) -> None:
    first = job(tmp_path / "run", algorithm={"max_iterations": 8})
    begun, before = trained(first)
    penalised = dataclasses.replace(first.algorithm, l1=0.05)
    _, heard = trained(dataclasses.replace(first, algorithm=penalised), resume=tmp_path / "run")
    taken = of_kind(heard, Iterated)
    assert [event.iteration for event in taken] == list(range(1, 9))
    assert not of_kind(heard, SearchBegun), "nothing of the search before is doubted, as nothing of it is taken"
    weights = sum(value.abs().sum().item() for name, value in begun.model.named_parameters() if "weight" in name)
    assert taken[0].loss < of_kind(before, Iterated)[-1].loss + 0.05 * weights


def test_checkpoints_of_iterations_are_kept_as_few_as_the_job_says(tmp_path: Path) -> None:
    trained(job(tmp_path / "run", algorithm={"max_iterations": LIMIT}, keep_checkpoints=2))
    assert len(complete(tmp_path / "run")) == 2


def test_a_downpour_run_goes_on_as_sandblaster_and_back(tmp_path: Path) -> None:
    first = problems.job(run=tmp_path / "run", epochs=1)
    begun = db.train(first, view=False)
    second = dataclasses.replace(first, algorithm=db.Sandblaster(max_iterations=10, micro_batch=64))
    polished, heard = trained(second, resume=tmp_path / "run")
    losses = [event.loss for event in of_kind(heard, Iterated)]
    with torch.no_grad():
        start = float(first.objective(begun.model, first.data().tensors))
        end = float(first.objective(polished.model, first.data().tensors))
    assert losses[0] < start
    assert end == pytest.approx(losses[-1], rel=1e-5)
    third = dataclasses.replace(first, algorithm=db.Downpour(update_rule=db.sgd(1e-6)), epochs=1)
    again, _ = trained(third, resume=tmp_path / "run")
    with torch.no_grad():
        assert float(first.objective(again.model, first.data().tensors)) == pytest.approx(end, rel=1e-2)
    assert again.summary.examples.seen >= 640


def test_held_out_data_is_measured_meanwhile_once_in_ten_passes_and_at_the_end(tmp_path: Path) -> None:
    result, heard = trained(
        problems.job(run=tmp_path / "run", algorithm=db.Sandblaster(max_iterations=30, micro_batch=64))
    )
    first, second, *_ = (event.examples for event in of_kind(heard, Evaluated))
    assert 10 * 640 <= first < 12 * 640 < 20 * 640 <= second
    assert of_kind(heard, Evaluated)[-1].examples == result.summary.examples.seen
    assert (result.test["accuracy"] or 0.0) > 0.9


def wide(width: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(problems.FEATURES, width), nn.Tanh(), nn.Linear(width, problems.CLASSES)).double()


def double_points() -> Any:
    inputs, targets = problems.points(96).tensors
    return torch.utils.data.TensorDataset(inputs.double(), targets)


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [db.Plan.units(2), db.Plan.stages(2, microbatches=4)])
def test_replicas_of_several_partitions_take_the_same_steps(partitions: db.Plan, tmp_path: Path) -> None:
    def run(name: str, cluster: db.Cluster) -> list[tuple[float, float]]:
        algorithm = db.Sandblaster(max_iterations=8, micro_batch=16, gtol=0.0)
        given = problems.job(
            run=tmp_path / name, model=wide, data=double_points, test=None, metrics={}, algorithm=algorithm,
            cluster=cluster,
        )  # fmt: skip
        _, heard = trained(given)
        return path_of(heard)

    whole = run("whole", db.Cluster(replicas=2, shards=2, engine="simulated"))
    parts = run("parts", db.Cluster(replicas=2, shards=3, partitions=partitions))
    assert len(whole) == 8
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-7, atol=1e-9)


def cross_entropy_until(limit: float, output: Tensor, target: Tensor) -> Tensor:
    """NaN as soon as the outputs are large."""
    loss = nn.functional.cross_entropy(output, target)
    return loss if float(output.detach().abs().max()) < limit else loss * torch.nan


def test_a_trial_that_is_not_finite_shortens_the_step(tmp_path: Path) -> None:
    _, heard = trained(
        job(tmp_path / "run", loss=functools.partial(cross_entropy_until, 3.0), algorithm={"max_iterations": 60})
    )
    losses = [event.loss for event in of_kind(heard, Iterated)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    (finished,) = of_kind(heard, JobFinished)
    assert finished.evaluations > len(losses) + 1


def test_a_start_that_is_not_finite_ends_the_job_naming_the_examples(tmp_path: Path) -> None:
    with pytest.raises(db.TrainingFailed, match=r"examples \d+ to \d+.* NaN or infinite at the starting point"):
        trained(job(tmp_path / "run", loss=functools.partial(cross_entropy_until, 1e-9)))


class Deadly(torch.utils.data.Dataset[Any]):
    """Ends the process that reads example 40."""

    def __len__(self) -> int:
        return len(points())

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return points()[index]


@pytest.mark.slow
def test_a_portion_with_which_every_replica_dies_is_named_and_ends_the_job(tmp_path: Path) -> None:
    deadly = job(tmp_path / "run", data=Deadly, cluster={"engine": "local", "replicas": 2})
    with pytest.raises(db.TrainingFailed, match="one replica after another died computing examples 35 to 41"):
        trained(deadly)


class Bad(Deadly):
    """Cannot read example 40."""

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            raise ValueError("example 40 is broken")
        return points()[index]


def test_a_portion_that_cannot_be_computed_is_named_with_the_users_traceback(tmp_path: Path) -> None:
    with pytest.raises(db.UserCodeError, match=r"(?s)example 40 is broken.*while computing examples 35 to 41"):
        trained(job(tmp_path / "run", data=Bad))


def other_points() -> TensorDataset:
    inputs, targets = points().tensors
    return TensorDataset(inputs, (targets + 1) % 3)


def squares_of_outputs(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - nn.functional.one_hot(target, 3)).square().mean()


def small_weights(name: str, parameter: nn.Parameter) -> dict[str, float]:
    return {"l2": 1.0}


@pytest.mark.parametrize("first_limit", [3, 400])
@pytest.mark.parametrize("change", [{"data": other_points}, {"loss": squares_of_outputs}, {"groups": small_weights}])
def test_a_search_that_is_resumed_with_other_data_or_another_loss_begins_anew_and_says_so(
    first_limit: int, change: dict[str, Any], tmp_path: Path
) -> None:
    limits = {"gtol": 1e-2, "deterministic": True}
    first = job(tmp_path / "run", algorithm=limits | {"max_iterations": first_limit})
    begun, _ = trained(first)
    algorithm = dataclasses.replace(first.algorithm, max_iterations=20)
    other = dataclasses.replace(first, algorithm=algorithm, **change)
    result, heard = trained(other, resume=tmp_path / "run")
    (said,) = of_kind(heard, SearchBegun)
    assert said.loss_before == pytest.approx(begun.summary.loss)
    (finished,) = of_kind(heard, JobFinished)
    assert [event.iteration for event in of_kind(heard, Iterated)][:2] == [1, 2]
    assert finished.loss < of_kind(heard, Iterated)[0].loss
    inputs, targets = other.data().tensors
    with torch.no_grad():
        penalty = sum(value.square().sum() for value in result.model.parameters()) / 2 if other.groups else 0.0
        now = other.objective.of(result.model(inputs), targets) + penalty
    assert result.summary.loss == pytest.approx(float(now), rel=1e-6), "it is what is minimised now"


@pytest.mark.parametrize("first_limit", [3, 400])
def test_a_search_that_is_resumed_with_the_same_data_goes_on_and_says_nothing(first_limit: int, tmp_path: Path) -> None:
    first = job(tmp_path / "run", algorithm={"gtol": 1e-2, "max_iterations": first_limit})
    begun, _ = trained(first)
    algorithm = dataclasses.replace(first.algorithm, max_iterations=400)
    cluster = db.Cluster(replicas=1, shards=1, engine="simulated")
    result, heard = trained(dataclasses.replace(first, algorithm=algorithm, cluster=cluster), resume=tmp_path / "run")
    assert not of_kind(heard, SearchBegun)
    assert result.summary.batch.converged
    if first_limit == 400:
        assert problems.same_parameters(begun.model, result.model)
        assert not of_kind(heard, Iterated)


def resumed(tmp_path: Path, first_limit: int, limit: int, **change: Any) -> list[Observation]:
    """What is heard of a search that is resumed with something else."""
    first = job(tmp_path / "run", algorithm={"gtol": 1e-2, "deterministic": True, "max_iterations": first_limit})
    if not (tmp_path / "run").exists():
        trained(first)
    algorithm = dataclasses.replace(first.algorithm, max_iterations=limit)
    _, heard = trained(dataclasses.replace(first, algorithm=algorithm, **change), resume=tmp_path / "run")
    return heard


@pytest.mark.parametrize(("first_limit", "limit"), [(3, 20), (400, 420)])
def test_a_shard_that_dies_when_a_search_has_begun_anew_does_not_bring_back_the_one_before(
    first_limit: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[Step] = []
    carry_out = SandblasterCoordinator._step

    def step(self: SandblasterCoordinator, order: Step) -> None:
        first_of_the_new = bool(self.solver.state.last) and order.commit and not died and self._begun > 0
        carry_out(self, order)
        if first_of_the_new:
            died.append(order)
            cast(Any, self.engine)._die("shard/0")

    monkeypatch.setattr(SandblasterCoordinator, "_step", step)
    heard = resumed(tmp_path, first_limit, limit, data=other_points)
    assert died
    assert of_kind(heard, EvaluationLost)
    assert of_kind(heard, SearchBegun)
    (finished,) = of_kind(heard, JobFinished)
    assert [event.iteration for event in of_kind(heard, Iterated)][-1] == finished.iterations > 3
    assert finished.loss == of_kind(heard, Iterated)[-1].loss


@pytest.mark.parametrize("first_limit", [3, 400])
def test_a_search_that_is_interrupted_before_its_point_is_confirmed_does_not_say_how_it_ended_before(
    first_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(tmp_path / "run", algorithm={"gtol": 1e-2, "deterministic": True, "max_iterations": first_limit})
    trained(first)
    evaluate = SandblasterCoordinator._evaluate

    def interrupted(self: SandblasterCoordinator, trial: Any) -> Any:
        self.interrupted = "stopped by SIGINT"
        return evaluate(self, trial)

    monkeypatch.setattr(SandblasterCoordinator, "_evaluate", interrupted)
    heard = resumed(tmp_path, first_limit, 420, data=other_points)
    (finished,) = of_kind(heard, JobFinished)
    assert (finished.reason, finished.converged, finished.loss) == ("stopped by SIGINT", False, None)
    monkeypatch.setattr(SandblasterCoordinator, "_evaluate", evaluate)
    assert of_kind(resumed(tmp_path, first_limit, 420, data=other_points), SearchBegun)


def unknown_points() -> TensorDataset:
    inputs, targets = points().tensors
    inputs[50] = math.nan
    return TensorDataset(inputs, targets)


def test_a_search_that_is_resumed_where_the_loss_is_not_finite_names_the_examples(tmp_path: Path) -> None:
    with pytest.raises(db.TrainingFailed, match=r"examples \d+ to \d+, or its gradient, is NaN or infinite"):
        resumed(tmp_path, 3, 20, data=unknown_points)
