# SPDX-License-Identifier: Apache-2.0
"""What is lost when something dies: scripted on the simulated engine, real kill -9 on the local one."""

import contextlib
import dataclasses
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import children_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief import checkpoint, export, roster, shard_file
from distbelief.channel.door import NO_KEY
from distbelief.coordinator import Coordinator
from distbelief.events import (
    AnyEvent,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointWritten,
    EpochFinished,
    Evaluated,
    JobFinished,
    JobStarted,
    JobStopping,
    LeasesReturned,
    Listener,
    Observation,
    Progress,
    PushRefused,
    RoleLost,
    RoleStarted,
    ShardRestored,
)
from distbelief.report.files import read_summary
from tests import problems
from tests.killer import Killer, nth, settled

ROOT = Path(__file__).parents[1]


def trained(
    job: db.Job, tmp_path: Path, more: Sequence[Callable[[Observation], None]] = (), **options: Any
) -> tuple[db.Result, list[Observation]]:
    heard: list[Observation] = []
    number = len(list(tmp_path.iterdir()))
    job = dataclasses.replace(job, run=tmp_path / f"run{number}")
    result = db.train(job, view=False, listeners=[heard.append, *more], **options)
    return result, heard


@pytest.fixture(autouse=True)
def heeding() -> Iterator[None]:
    """Ctrl-C is heeded, also where the tests run in the background of a shell, which begins them to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def of(kind: type, heard: list[Observation]) -> list[Any]:
    return [one.event for one in heard if isinstance(one.event, kind)]


SLOW = db.Costs(example_seconds=2e-3)
"""Virtual times in which a job takes seconds, so that scripted moments fall into the middle of it."""


def simulated(**fields: Any) -> db.Job:
    cluster = db.Cluster(replicas=4, shards=3, engine="simulated", silence_seconds=5.0)
    return problems.job(**({"cluster": cluster, "epochs": 6, "algorithm": db.Downpour(warmstart=0)} | fields))


@pytest.mark.parametrize("seed", range(12))
def test_losing_any_process_at_any_moment_neither_hangs_the_job_nor_loses_an_example(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    roles = ["replica/0", "replica/1", "replica/2", "replica/3", "shard/0", "shard/1", "shard/2", "evaluator"]
    moments = torch.rand(5, generator=generator) * 2.0 + 0.3
    kills = tuple(
        (float(moment), roles[int(torch.randint(len(roles), (1,), generator=generator))]) for moment in moments
    )
    job = simulated(seed=seed, checkpoint_seconds=0.4)
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=kills), costs=SLOW)
    summary = result.summary
    assert summary.reason == "all epochs finished"
    assert (summary.examples.seen, summary.examples.missing) == (640 * 6, 0)
    lost = of(RoleLost, heard)
    assert lost
    returned = of(LeasesReturned, heard)
    assert len(returned) == sum(event.role.startswith("replica") for event in lost)
    assert summary.examples.repeated == sum(event.repeated for event in returned)
    assert summary.examples.repeated == sum(event.repeated for event in of(EpochFinished, heard))


def test_a_dead_replica_is_replaced_and_only_its_unacknowledged_examples_can_repeat(tmp_path: Path) -> None:
    result, heard = trained(simulated(), tmp_path, faults=db.Faults(kill=((0.8, "replica/2"),)), costs=SLOW)
    (returned,) = of(LeasesReturned, heard)
    assert returned.replica == 2
    # What can repeat is one push that some shards had applied: 16 examples.
    assert result.summary.examples.repeated in (0, 16)
    starts = [event for event in of(RoleStarted, heard) if event.role == "replica/2"]
    assert [event.incarnation for event in starts] == [0, 1]
    assert result.summary.examples.missing == 0


def test_a_dead_shard_comes_back_with_what_replicas_have_fetched_and_loses_a_few_updates(tmp_path: Path) -> None:
    job = simulated(checkpoint_seconds=1e6)  # only the first checkpoint, before training
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=((0.8, "shard/1"),)), costs=SLOW)
    (restored,) = of(ShardRestored, heard)
    assert (restored.shard, restored.version) == (1, 0)
    # Of each of the four replicas the push that was under way, and what nobody had fetched yet; of some 70 before it.
    assert result.summary.lost_updates <= 8
    assert result.summary.examples.missing == 0
    assert (result.test["accuracy"] or 0) > 0.8


@pytest.mark.parametrize("before_the_end", [0.3, 0.25, 0.22, 0.2, 0.18, 0.15, 0.1, 0.05])
def test_whenever_a_shard_dies_the_test_is_of_the_model_that_is_returned(before_the_end: float, tmp_path: Path) -> None:
    undisturbed, _ = trained(simulated(), tmp_path, costs=SLOW)
    moment = undisturbed.summary.wall_seconds - before_the_end
    result, _ = trained(simulated(), tmp_path, faults=db.Faults(kill=((moment, "shard/1"),)), costs=SLOW)
    inputs, targets = problems.points(200, 1).tensors
    with torch.no_grad():
        assert result.test["accuracy"] == pytest.approx(
            float(problems.accuracy(result.model(inputs), targets)), abs=1e-6
        )


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_death_of_the_only_replica_at_work_keeps_the_statistics_of_batch_norm(
    replicas: int, tmp_path: Path
) -> None:
    cluster = db.Cluster(replicas=replicas, shards=2, engine="simulated")
    algorithm = db.Downpour(warmstart=10_000)  # the others have nothing to do
    job = problems.job(model=problems.normalised_classifier, cluster=cluster, algorithm=algorithm, epochs=6)
    kill = ((5.0, "replica/0"),)
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=kill), costs=SLOW)
    assert len(of(RoleLost, heard)) == 1
    assert int(result.model[1].num_batches_tracked) > 0.9 * 6 * 640 / 16  # type: ignore[index]


def test_who_is_left_last_and_dies_is_followed_by_one_with_its_statistics_not_with_those_of_who_left_before(
    tmp_path: Path,
) -> None:
    cluster = db.Cluster(replicas=2, shards=2, engine="simulated")
    algorithm = db.Downpour(warmstart=0, cooldown=2400)
    job = problems.job(model=problems.normalised_classifier, cluster=cluster, algorithm=algorithm, epochs=6)
    undisturbed, _ = trained(job, tmp_path, costs=SLOW)
    kill = ((undisturbed.summary.wall_seconds - 1.0, "replica/0"),)
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=kill), costs=SLOW)
    assert len(of(RoleLost, heard)) == 1
    counted, expected = (int(each.model[1].num_batches_tracked) for each in (result, undisturbed))  # type: ignore[index]
    assert counted > 0.9 * expected


@pytest.mark.parametrize(("local_rate", "wire"), [(1e-3, "float32"), (None, "bfloat16")])
def test_where_nothing_that_was_fetched_can_be_used_the_updates_since_the_checkpoint_are_lost(
    local_rate: float | None, wire: Any, tmp_path: Path
) -> None:
    """After local steps a replica has other parameters than it fetched, and what was rounded is not what shards had."""
    job = simulated(checkpoint_seconds=1e6, algorithm=db.Downpour(warmstart=0, local_rate=local_rate))
    job = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, wire=wire))
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=((0.8, "shard/1"),)), costs=SLOW)
    # Every push acknowledged before the death is lost from that span: 0.6 s of four replicas at 32 ms a mini-batch.
    assert 30 <= result.summary.lost_updates <= 90
    told = [event.lost_updates for event in of(Progress, heard)]
    assert (told[0], told[-1]) == (0, result.summary.lost_updates)
    assert min(number for number in told if number) >= 30  # meanwhile, for who looks at a run that is not over
    assert result.summary.examples.missing == 0


def test_what_was_lost_and_refused_before_a_run_is_resumed_is_told_after_it(tmp_path: Path) -> None:
    """Also on other shards, whose files tell of the losses of those before."""
    algorithm = db.Downpour(warmstart=0, local_rate=1e-3, refusals=1000)
    job = simulated(checkpoint_seconds=1e6, algorithm=algorithm, model=Poisoned)
    first, _ = trained(job, tmp_path, faults=db.Faults(kill=((0.8, "shard/1"),)), costs=SLOW)
    assert first.summary.lost_updates >= 30
    assert first.summary.refused > 0
    before = first.summary
    more = dataclasses.replace(job, epochs=job.epochs + 1)
    for shards in (2, 3):
        more = dataclasses.replace(
            more, epochs=more.epochs + 1, cluster=dataclasses.replace(job.cluster, shards=shards)
        )
        heard: list[Observation] = []
        result = db.train(more, resume=first.run, view=False, listeners=[heard.append])
        (begun,) = of(JobStarted, heard)
        assert begun.resumed_refused == before.refused
        assert result.summary.lost_updates == first.summary.lost_updates
        assert result.summary.refused >= first.summary.refused + 16
        before = result.summary


def test_a_shard_with_much_to_store_may_be_busy_for_long_and_so_may_the_replicas_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(roster, "SHARD_BYTES_PER_SECOND", 1.0)  # a shard of some 340 bytes
    faults = db.Faults(hang=((0.6, 200.6, "shard/1"),))
    result, heard = trained(simulated(checkpoint_seconds=0.4), tmp_path, faults=faults, costs=SLOW)
    assert result.summary.wall_seconds > 200
    assert not of(RoleLost, heard)
    assert not of(CheckpointFailed, heard)
    assert result.summary.examples.missing == result.summary.examples.repeated == 0


def test_a_replica_that_hangs_is_ended_though_a_shard_is_busy_again_and_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(roster, "SHARD_BYTES_PER_SECOND", 1.0)
    busy = tuple((start, start + 3.4, "shard/1") for start in range(3, 400, 4))
    faults = db.Faults(hang=((0.8, 1e6, "replica/2"), *busy))
    result, heard = trained(simulated(), tmp_path, faults=faults, costs=SLOW)
    lost = [one for one in heard if isinstance(one.event, RoleLost)]
    assert {one.event.role for one in lost if isinstance(one.event, RoleLost)} == {"replica/2"}
    assert lost[0].seconds < 60
    assert result.summary.examples.missing == 0


@pytest.mark.parametrize("seed", range(6))
def test_one_shard_has_applied_each_example_once_however_replicas_die_and_the_job_breaks_off(
    seed: int, tmp_path: Path
) -> None:
    class BrokenOff(Exception):
        pass

    draws = random.Random(seed)
    job = simulated(
        cluster=db.Cluster(replicas=4, shards=1, engine="simulated"), checkpoint_seconds=0.1, run=tmp_path / "run",
        algorithm=db.Downpour(warmstart=0, n_push=draws.choice([1, 3])), epochs=4,
    )  # fmt: skip
    for resume in (None, tmp_path / "run"):
        kills = tuple((draws.uniform(0.3, 1.5), f"replica/{draws.randrange(4)}") for _ in range(3))
        written, last = 0, draws.randint(2, 6)

        def break_off(observation: Observation, last: int = last) -> None:
            nonlocal written
            written += isinstance(observation.event, CheckpointWritten)
            if written == last:
                raise BrokenOff

        with contextlib.suppress(BrokenOff):
            db.train(
                job, resume=resume, view=False, listeners=[break_off], faults=db.Faults(kill=kills), costs=SLOW
            )  # fmt: skip
    result = db.train(job, resume=tmp_path / "run", view=False, costs=SLOW)
    assert (result.summary.examples.missing, result.summary.examples.repeated) == (0, 0)
    folder, manifest = checkpoint.newest(tmp_path / "run", lambda path, reason: None)
    (file,) = manifest.shards
    assert shard_file.read_state(folder / file.name).examples == 640 * 4


def test_a_shard_that_hangs_is_ended_and_restored_while_replicas_wait(tmp_path: Path) -> None:
    faults = db.Faults(hang=((0.6, 12.0, "shard/1"),))
    result, heard = trained(simulated(checkpoint_seconds=0.4), tmp_path, faults=faults, costs=SLOW)
    assert {event.role for event in of(RoleLost, heard)} == {"shard/1"}
    assert of(ShardRestored, heard)
    assert result.summary.examples.missing == 0


def test_a_shard_that_hangs_at_the_end_does_not_cost_the_last_checkpoint(tmp_path: Path) -> None:
    undisturbed, _ = trained(simulated(test=None), tmp_path, costs=SLOW)
    moment = undisturbed.summary.wall_seconds - 0.03
    job = simulated(test=None, checkpoint_seconds=1e6)
    result, heard = trained(job, tmp_path, faults=db.Faults(hang=((moment, 60.0, "shard/1"),)), costs=SLOW)
    assert {event.role for event in of(RoleLost, heard)} == {"shard/1"}
    assert of(ShardRestored, heard)
    assert result.summary.lost_updates == result.summary.pushes == 640 * 6 / 16  # nobody is left who has what it had
    _, manifest = checkpoint.newest(result.run, lambda path, reason: None)
    assert manifest.examples == result.summary.examples.seen == 640 * 6
    names = [name for name, _ in result.model.named_parameters()]
    assert all(torch.equal(export.state_dict(result.run)[name], result.model.state_dict()[name]) for name in names)


def test_a_checkpoint_that_a_shard_is_about_to_read_is_not_removed_though_a_newer_one_is_complete(
    tmp_path: Path,
) -> None:
    # The checkpoint begun at 0.65 has shard 1 before that dies at 1.1, and is complete when shard 0 goes on at 1.2,
    # while shard 1, which has been given the one before, begins again at 1.35. Only one is kept.
    cluster = db.Cluster(replicas=2, shards=2, engine="simulated", silence_seconds=5.0)
    job = simulated(cluster=cluster, checkpoint_seconds=0.4, keep_checkpoints=1)
    faults = db.Faults(hang=((0.6, 1.2, "shard/0"),), kill=((1.1, "shard/1"),))
    costs = db.Costs(example_seconds=2e-3, jitter=0.0)
    result, heard = trained(job, tmp_path, faults=faults, costs=costs)
    written = [one.seconds for one in heard if isinstance(one.event, CheckpointWritten)]
    (restored,) = [one for one in heard if isinstance(one.event, ShardRestored)]
    assert [seconds for seconds in written if 1.15 < seconds < restored.seconds]
    assert of(CheckpointRejected, heard) == []  # a checkpoint under way is not a damaged one
    assert result.summary.examples.missing == 0
    assert len(list((result.run / "checkpoints").iterdir())) == 1


def test_a_shard_that_dies_while_the_last_checkpoint_is_written_comes_back_from_it_and_no_more_are_kept_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Coordinator.begin_checkpoint

    def disturbed(coordinator: Coordinator, *given: Any, **options: Any) -> Any:
        writing = begin(coordinator, *given, **options)
        if coordinator.stopping and not heard_of(coordinator.engine):
            # One has written its file when it dies; it is found dead, and not restored, when the other has written.
            now = coordinator.engine.now()
            coordinator.engine.faults = db.Faults(hang=((now, now + 1.0, "shard/0"),))  # type: ignore[attr-defined]
            coordinator.engine.at(now + 0.9, lambda: coordinator.engine._die("shard/1"))  # type: ignore[attr-defined]
        return writing

    def heard_of(engine: Any) -> bool:
        return bool(engine.faults.hang)

    monkeypatch.setattr(Coordinator, "begin_checkpoint", disturbed)
    cluster = db.Cluster(replicas=2, shards=2, engine="simulated")
    job = simulated(cluster=cluster, test=None, checkpoint_seconds=1e6, keep_checkpoints=1)
    result, heard = trained(job, tmp_path, costs=SLOW)
    assert [event.role for event in of(RoleLost, heard)] == ["shard/1"]
    assert len(of(CheckpointWritten, heard)) == 2
    (restored,) = of(ShardRestored, heard)
    assert restored.version == result.summary.pushes
    assert result.summary.lost_updates == 0
    assert len(list((result.run / "checkpoints").iterdir())) == 1


def test_a_job_that_is_not_tested_has_no_evaluator(tmp_path: Path) -> None:
    _, heard = trained(simulated(test=None, epochs=1), tmp_path)
    assert {event.role.split("/")[0] for event in of(RoleStarted, heard)} == {"replica", "shard"}


def test_without_failure_no_update_is_lost_and_nothing_repeats(tmp_path: Path) -> None:
    result, heard = trained(simulated(), tmp_path, costs=SLOW)
    assert result.summary.lost_updates == result.summary.examples.repeated == 0
    assert of(RoleLost, heard) == []


def test_a_replica_that_hangs_is_given_up_and_replaced(tmp_path: Path) -> None:
    result, heard = trained(simulated(), tmp_path, faults=db.Faults(hang=((0.8, 1e6, "replica/1"),)), costs=SLOW)
    (lost,) = of(RoleLost, heard)
    assert lost.role == "replica/1"
    assert "not heard of for" in lost.reason
    assert result.summary.examples.missing == 0


def test_a_job_whose_roles_die_without_progress_stops_and_says_so(tmp_path: Path) -> None:
    kills = tuple((0.5 + 0.3 * number, f"replica/{replica}") for number in range(60) for replica in range(4))
    with pytest.raises(db.TrainingFailed, match=r"25 roles died without an example being finished.*\n.*hint"):
        trained(simulated(), tmp_path, faults=db.Faults(kill=kills), costs=db.Costs(example_seconds=1.0))


class Poisoned(nn.Module):
    """Its gradient is NaN for about one mini-batch in ten, while the loss stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = problems.classifier()

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.inner(inputs)
        if inputs[0, 0] > 1.3:
            output = output + 0.0 * torch.sqrt(output - output.detach())
        return output


def test_a_gradient_that_is_not_finite_is_refused_and_counted_and_harms_nothing(tmp_path: Path) -> None:
    job = simulated(model=Poisoned, algorithm=db.Downpour(refusals=1000))
    result, _ = trained(job, tmp_path)
    assert result.summary.refused >= 16
    assert result.summary.examples.missing == 0
    assert all(bool(torch.isfinite(value).all()) for value in result.model.state_dict().values())


def test_what_was_refused_beyond_the_checkpoint_that_a_run_goes_on_from_is_counted_once(tmp_path: Path) -> None:
    def breaks_off(observation: Observation) -> None:
        if isinstance(observation.event, PushRefused) and observation.seconds > 0.6:
            raise InterruptedError

    job = simulated(model=Poisoned, algorithm=db.Downpour(refusals=1000), run=tmp_path / "run", checkpoint_seconds=1e6)
    with pytest.raises(InterruptedError):
        db.train(job, view=False, listeners=[breaks_off], costs=SLOW)
    assert read_summary(tmp_path / "run" / "summary.json").refused > 0
    heard: list[Observation] = []
    again = db.train(job, resume=tmp_path / "run", view=False, listeners=[heard.append], costs=SLOW)
    refused = sum(event.examples for event in of(PushRefused, heard))
    assert (again.summary.refused, of(JobFinished, heard)[0].refused) == (refused, refused)
    assert of(JobStarted, heard)[0].resumed_refused == 0


@pytest.mark.parametrize("seed", range(3))
def test_an_example_is_applied_or_counted_as_refused_whoever_dies_right_after(seed: int, tmp_path: Path) -> None:
    draws = random.Random(seed)
    kills = tuple((draws.uniform(0.3, 1.5), f"replica/{draws.randrange(4)}") for _ in range(6))
    job = simulated(
        model=Poisoned, algorithm=db.Downpour(warmstart=0, refusals=1000), seed=seed, test=None,
        cluster=db.Cluster(replicas=4, shards=1, engine="simulated"),
    )  # fmt: skip
    result, heard = trained(job, tmp_path, faults=db.Faults(kill=kills), costs=SLOW)
    assert of(RoleLost, heard)
    assert result.summary.examples.missing == result.summary.examples.repeated == 0
    folder, manifest = checkpoint.newest(result.run, lambda path, reason: None)
    (file,) = manifest.shards
    assert shard_file.read_state(folder / file.name).examples + result.summary.refused == 640 * 6


def test_too_many_refused_pushes_stop_the_job_naming_replica_and_step(tmp_path: Path) -> None:
    job = simulated(model=Poisoned, algorithm=db.Downpour(refusals=3))
    with pytest.raises(
        db.TrainingFailed, match=r"4 pushes were refused, the limit is 3; the last by replica \d at its step \d+: "
    ):
        trained(job, tmp_path)


def raising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Raises for all mini-batches but that which is tried before anything starts."""
    tried = torch.arange(len(target)) * 640 // len(target)  # from all over the data
    if not torch.equal(target, problems.points(640).tensors[1][tried]):
        raise ZeroDivisionError("the user's own mistake")
    return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize("engine", ["simulated", "local"])
def test_the_traceback_of_a_user_function_comes_first(engine: str, tmp_path: Path) -> None:
    job = problems.job(loss=raising_loss, test=None, cluster=db.Cluster(replicas=2, engine=engine))
    with pytest.raises(db.UserCodeError) as caught:
        trained(job, tmp_path)
    text = str(caught.value)
    assert text.startswith("Traceback")
    assert "the user's own mistake" in text
    assert "replica/" in text


class SlowAndBroken(TensorDataset):
    """Takes its time for each mini-batch, and does not get past the sixth."""

    asked = 0

    def __getitems__(self, indices: list[int]) -> Any:
        time.sleep(0.005)
        self.asked += 1
        if self.asked > 6:
            raise ZeroDivisionError(f"the user's own mistake, met by {threading.current_thread().name}")
        return self[indices]


def slow_and_broken() -> SlowAndBroken:
    return SlowAndBroken(*problems.points(640).tensors)


def test_the_traceback_of_a_data_set_comes_first_though_another_thread_met_it(tmp_path: Path) -> None:
    job = problems.job(data=slow_and_broken, test=None, cluster=db.Cluster(replicas=2, engine="local"))
    with pytest.raises(db.UserCodeError) as caught:
        trained(job, tmp_path)
    text = str(caught.value)
    assert text.startswith("Traceback")
    assert ", in __getitems__\n" in text
    assert "the user's own mistake, met by distbelief-background" in text
    assert "replica/" in text


@pytest.mark.slow
def test_when_all_stand_still_for_longer_than_a_replica_may_be_silent_nobody_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "PATIENCE", 1.0)
    stopped: list[int] = []

    def stop_all(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished) and observation.event.epoch == 5 and not stopped:
            stopped.extend(children_of(os.getpid()))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(1.5)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    cluster = db.Cluster(replicas=4, threads_per_replica=1, silence_seconds=1.0)
    job = problems.job(cluster=cluster, epochs=10, algorithm=db.Downpour(warmstart=0))
    _, heard = trained(job, tmp_path, [stop_all])
    assert stopped
    assert of(RoleLost, heard) == []


def test_a_disk_that_fills_up_keeps_the_job_and_the_previous_checkpoint(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        heard: list[Observation] = []
        filler = (small / "filler").open("wb", buffering=0)

        def fill(observation: Observation) -> None:
            heard.append(observation)
            if 0.8 < observation.seconds < 1.6:
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(b"0" * 4096)
            elif observation.seconds > 1.6:
                filler.truncate(0)

        job = dataclasses.replace(simulated(checkpoint_seconds=0.3), run=small / "run")
        with filler, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # events may be missing from the full disk
            result = db.train(job, view=False, listeners=[fill], costs=SLOW)
        failed = of(CheckpointFailed, heard)
        assert failed
        assert "No space left" in failed[0].reason
        assert result.summary.examples.missing == 0
        assert result.summary.checkpoints.failed == len(failed)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_change_of_the_working_folder_does_not_split_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(tmp_path)

    def wander(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished):
            os.chdir(other)

    result = db.train(dataclasses.replace(simulated(), run=Path("run")), view=False, listeners=[wander])
    assert list(other.iterdir()) == []
    assert result.run == tmp_path / "run"
    assert checkpoint.newest(result.run, lambda *damaged: None)[1].examples == result.summary.examples.planned
    assert read_summary(result.run / "summary.json") == result.summary
    assert result.summary.resume_command.endswith("resume='run')")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, if it is there
@pytest.mark.filterwarnings("ignore:.*TensorBoard is told no more")
def test_a_run_folder_that_is_moved_meanwhile_is_not_made_anew(tmp_path: Path) -> None:
    def move(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished) and (tmp_path / "run0").exists():
            (tmp_path / "run0").rename(tmp_path / "moved")

    with pytest.warns(RuntimeWarning, match="summary.json was not written"):
        result, heard = trained(simulated(), tmp_path, [move])
    assert "run0 is gone: it was removed or renamed" in of(CheckpointFailed, heard)[-1].reason
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert result.summary.checkpoints.last_failed
    assert (result.summary.export_command, result.summary.resume_command) == ("", "")


def test_a_run_folder_that_was_emptied_offers_no_command_that_would_fail(tmp_path: Path) -> None:
    def empty(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished):
            for path in (tmp_path / "run0").glob("*.json"):
                path.unlink()

    result, _ = trained(simulated(), tmp_path, [empty])
    assert (result.summary.export_command, result.summary.resume_command) == ("", "")


def frozen_table() -> nn.Module:
    """A classifier beside two megabytes that are not trained."""
    module = problems.classifier()
    module.table = nn.Parameter(torch.zeros(500_000), requires_grad=False)
    return module


def test_a_disk_without_room_for_what_a_run_begins_with_is_said_before_any_role_starts(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    heard: list[Observation] = []
    try:
        with pytest.raises(db.ConfigurationError, match=r"run cannot be written: .*\nhint: give run=") as caught:
            db.train(simulated(model=frozen_table, run=tmp_path / "run"), view=False, listeners=[heard.append])
        assert "No space left" in str(caught.value)
        assert heard == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# the local engine: real processes, real signals


def big_local(**fields: Any) -> db.Job:
    cluster = db.Cluster(replicas=3, shards=2, threads_per_replica=1)
    data = functools.partial(problems.points, 6400)
    return problems.job(**({"cluster": cluster, "data": data, "epochs": 10, "checkpoint_seconds": 0.5} | fields))


@pytest.mark.slow
def test_killing_replicas_and_shards_for_real_loses_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = {"replica/1": 4_000, "shard/0": 10_000, "replica/0": 16_000, "evaluator": 22_000}
    killers = [Killer(monkeypatch, role, settled(examples)) for role, examples in victims.items()]
    faults = db.Faults(slow={f"replica/{index}": 6.0 for index in range(3)})
    result, heard = trained(big_local(epochs=5), tmp_path, faults=faults, more=killers)
    assert all(killer.killed for killer in killers)
    assert {event.role for event in of(RoleLost, heard)} >= set(victims)
    assert (result.summary.examples.seen, result.summary.examples.missing) == (32000, 0)
    assert len(of(ShardRestored, heard)) == 1
    assert (result.test["accuracy"] or 0) > 0.9


@pytest.mark.slow
def test_killing_the_process_that_starts_roles_loses_no_example(tmp_path: Path) -> None:
    heard: list[Observation] = []
    killed: list[int] = []

    def kill(observation: Observation) -> None:
        heard.append(observation)
        if isinstance(observation.event, Progress) and observation.event.examples > 3200 and not killed:
            zygotes = [pid for pid in descendants(os.getpid()) if parent_of(pid) == os.getpid()]
            killed.extend(zygotes)
            for pid in zygotes:
                os.kill(pid, signal.SIGKILL)

    job = dataclasses.replace(big_local(epochs=3), run=tmp_path / "run")
    slow = {f"replica/{index}": 4.0 for index in range(3)}
    result = db.train(job, view=False, listeners=[kill], faults=db.Faults(slow=slow))
    assert len(killed) == 1
    assert len(of(RoleLost, heard)) >= 6
    assert len(of(ShardRestored, heard)) == 2
    assert (result.summary.examples.seen, result.summary.examples.missing) == (6400 * 3, 0)


@pytest.mark.slow
def test_the_coordinator_answers_while_it_reads_checkpoints_for_a_shard_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the newest checkpoint turns into a pipe, which gives nothing before somebody writes to it."""
    heard: list[Observation] = []
    pipes: list[Path] = []
    meanwhile: list[Observation] = []

    def listen(observation: Observation) -> None:
        heard.append(observation)
        if isinstance(observation.event, RoleLost):
            pipes.extend(Path(of(CheckpointWritten, heard)[-1].path).glob("shard-1*"))
            pipes[0].unlink()
            os.mkfifo(pipes[0])
        elif isinstance(observation.event, Progress) and pipes and len(meanwhile) < 4:
            meanwhile.append(observation)
            if len(meanwhile) == 4:
                assert not of(ShardRestored, heard)
                os.close(os.open(pipes[0], os.O_WRONLY | os.O_NONBLOCK))

    killer = Killer(monkeypatch, "shard/1", nth(CheckpointWritten, 2))
    slow = {f"replica/{index}": 8.0 for index in range(3)}
    job = big_local(epochs=4, run=tmp_path / "run", checkpoint_seconds=0.3, test=None, algorithm=db.Downpour(n_push=8))
    result = db.train(job, view=False, listeners=[listen, killer], faults=db.Faults(slow=slow))
    assert len(meanwhile) == 4
    assert len(of(CheckpointFailed, heard)) <= 1  # one may have been under way
    (rejected,) = of(CheckpointRejected, heard)
    assert rejected.path == str(pipes[0].parent)
    assert len(of(ShardRestored, heard)) == 1
    assert result.summary.examples.missing == 0


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_replacement_joins_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = Killer(monkeypatch, "replica/1", settled(6_000))
    faults = db.Faults(slow={f"replica/{i}": 8.0 for i in range(3)})
    _, heard = trained(big_local(epochs=4), tmp_path, faults=faults, more=[killer])
    lost = next(one.seconds for one in heard if isinstance(one.event, RoleLost))
    back = next(
        one.seconds
        for one in heard
        if isinstance(one.event, RoleStarted) and one.event.role == "replica/1" and one.event.incarnation == 1
    )
    assert back - lost < 3.0


SCRIPT = """
import sys, functools
import distbelief as db
from tests import problems

def job():
    return problems.job(
        cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1),
        data=functools.partial(problems.points, 6400), epochs=1000, checkpoint_seconds=0.2, run=sys.argv[1])

if __name__ == "__main__":
    db.train(job(), faults=db.Faults(slow={"replica/0": 4.0, "replica/1": 4.0}))
"""


def started(tmp_path: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A job in a process of its own, two checkpoints into its training."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(run)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "00000001" / "manifest.json").exists():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    return process, run


def descendants(pid: int) -> set[int]:
    """The live processes below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    def lives(pid: int) -> bool:
        try:
            return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if lives(pid)}


@pytest.mark.slow
def test_when_the_coordinator_is_killed_every_role_ends_within_ten_seconds_and_the_run_resumes(tmp_path: Path) -> None:
    process, run = started(tmp_path)
    roles = descendants(process.pid)
    assert len(roles) == 6  # the zygote, two replicas, two shards, the evaluator
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while alive(roles) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(roles)

    _, manifest = checkpoint.newest(run, lambda path, reason: None)
    epochs = manifest.examples // 6400 + 2
    job = big_local(cluster=db.Cluster(replicas=3, shards=3), epochs=epochs)
    result = db.train(job, resume=run, view=False)
    assert result.summary.examples.seen == 6400 * epochs
    assert result.summary.examples.missing == 0


def own_listeners() -> list[str]:
    """The Unix sockets at which the coordinator and the shards of a job of this process are called."""
    links = [Path(entry.path) for entry in os.scandir("/proc/self/fd")]
    inodes = {os.readlink(link)[8:-1] for link in links if link.is_symlink() and "socket:" in os.readlink(link)}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    # What a listener has accepted has its name, too, and belongs to the role.
    named = [line[6:] for line in lines if len(line) > 7 and line[7].startswith("@distbelief-")]
    return sorted({name for inode, name in named if inode in inodes})


@pytest.mark.slow
def test_strangers_are_refused_and_counted_though_a_shard_that_refused_one_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knocked: list[str] = []

    def knock(observation: Observation) -> None:
        if isinstance(observation.event, Progress if not knocked else ShardRestored):
            for name in own_listeners():
                stranger = opened.enter_context(socket.socket(socket.AF_UNIX))
                stranger.connect("\0" + name[1:])
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4)
                knocked.append(name.split("-")[2])

    killer = Killer(monkeypatch, "shard/0", settled(8_000))
    faults = db.Faults(slow={f"replica/{index}": 6.0 for index in range(3)})
    with contextlib.ExitStack() as opened:
        result, heard = trained(big_local(epochs=4), tmp_path, more=[knock, killer], faults=faults)
    assert sorted(knocked) == sorted(["coordinator", "shard/0", "shard/1"] * 2)
    assert len(of(ShardRestored, heard)) == 1
    assert result.summary.strangers == {NO_KEY: 6}
    assert result.summary.examples.missing == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_job_stopped_at_any_moment_goes_on_without_losing_an_example_and_repeats_only_what_deaths_have_cost(
    seed: int, tmp_path: Path
) -> None:
    draws = random.Random(seed)
    roles = ["replica/0", "replica/1", "replica/2", "replica/3", "shard/0", "shard/1", "shard/2", "evaluator"]
    kills = tuple((draws.uniform(0.0, 2.0), draws.choice(roles)) for _ in range(5))
    last = draws.randint(1, 30)
    heard: list[Observation] = []

    def stop(observation: Observation) -> None:
        heard.append(observation)
        if len(heard) == last:
            signal.raise_signal(signal.SIGINT)

    algorithm = db.Downpour(warmstart=0, n_push=draws.choice([1, 3]))
    job = simulated(seed=seed, checkpoint_seconds=0.4, algorithm=algorithm, run=tmp_path / "run")
    result = db.train(job, view=False, listeners=[stop], faults=db.Faults(kill=kills), costs=SLOW)
    assert result.summary.reason == "stopped by SIGINT"
    assert of(CheckpointWritten, heard)
    result = db.train(job, resume=tmp_path / "run", view=False, costs=SLOW)
    summary = result.summary
    assert (summary.examples.seen, summary.examples.missing) == (640 * 6, 0)
    assert summary.examples.repeated == sum(event.repeated for event in of(LeasesReturned, heard))


@pytest.mark.parametrize("algorithm", [db.Downpour(), db.Sandblaster()], ids=["downpour", "sandblaster"])
def test_ctrl_c_before_training_has_begun_stops_the_job_though_the_first_replica_dies(
    algorithm: db.Downpour | db.Sandblaster, tmp_path: Path
) -> None:
    def interrupt(observation: Observation) -> None:
        if observation.event == RoleStarted(role="shard/0", incarnation=0):
            signal.raise_signal(signal.SIGINT)
        assert observation.seconds < 60

    faults = db.Faults(kill=((0.1, "replica/0"), (0.15, "shard/1")))
    result, heard = trained(simulated(algorithm=algorithm), tmp_path, more=[interrupt], faults=faults)
    assert {"replica/0", "shard/1"} <= {event.role for event in of(RoleLost, heard)}
    assert result.summary.reason == "stopped by SIGINT"
    assert of(CheckpointWritten, heard)


@pytest.mark.parametrize("algorithm", [db.Downpour(), db.Sandblaster()], ids=["downpour", "sandblaster"])
@pytest.mark.parametrize("at", [JobStarted, Evaluated])
def test_a_listener_ends_a_job_as_ctrl_c_does_and_says_why(
    algorithm: db.Downpour | db.Sandblaster, at: type[AnyEvent], tmp_path: Path
) -> None:
    job = simulated(algorithm=algorithm, run=tmp_path / "run", evaluate_every=64)
    heard: list[Observation] = []
    result = db.train(job, view=False, listeners=[ending(at), heard.append])
    assert of(at, heard), "who listens behind it hears what it heard"
    assert result.summary.reason == "stopped by a listener: it is good enough"
    assert result.summary.checkpoints.written
    assert not of(RoleLost, heard)
    whole = db.train(job, resume=tmp_path / "run", view=False).summary
    assert (whole.examples.repeated, whole.examples.missing) == (0, 0)
    if isinstance(algorithm, db.Downpour):
        assert whole.examples.seen == 640 * 6


def test_a_listener_that_would_end_a_job_when_it_has_ended_changes_nothing(tmp_path: Path) -> None:
    result, _ = trained(simulated(), tmp_path, more=[ending(JobFinished)])
    assert result.summary.reason == "all epochs finished"


def ending(at: type[AnyEvent]) -> Listener:
    def end(observation: Observation) -> None:
        if isinstance(observation.event, at):
            raise StopIteration("it is good enough")

    return end


def test_ctrl_c_while_a_finished_job_writes_its_summary_changes_nothing(tmp_path: Path) -> None:
    def interrupt(observation: Observation) -> None:
        if isinstance(observation.event, JobFinished):
            signal.raise_signal(signal.SIGINT)

    result, _ = trained(simulated(epochs=1), tmp_path, more=[interrupt])
    assert result.summary.reason == "all epochs finished"
    assert read_summary(result.run / "summary.json") == result.summary


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        (db.Downpour(), "all epochs finished"),
        (db.Sandblaster(max_iterations=2), "the limit of 2 iterations was reached"),
    ],
    ids=["downpour", "sandblaster"],
)
def test_ctrl_c_while_the_replicas_of_a_finished_job_leave_does_not_call_it_stopped(
    algorithm: db.Downpour | db.Sandblaster, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wind_down = Coordinator.wind_down

    def interrupted(self: Coordinator, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        wind_down(self, **options)

    monkeypatch.setattr(Coordinator, "wind_down", interrupted)
    result, heard = trained(simulated(algorithm=algorithm, epochs=1), tmp_path)
    assert result.summary.reason == reason
    assert not of(JobStopping, heard)


def test_a_signal_that_whoever_began_the_process_lets_it_ignore_is_ignored(tmp_path: Path) -> None:
    def interrupt(observation: Observation) -> None:
        if isinstance(observation.event, CheckpointWritten):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result, _ = trained(simulated(epochs=1), tmp_path, more=[interrupt])
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
    assert result.summary.reason == "all epochs finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGINT, "every process"), (signal.SIGTERM, "every process"), (signal.SIGHUP, "the coordinator")],
)
def test_a_signal_to_stop_takes_a_checkpoint_and_stops_cleanly(number: int, told: str, tmp_path: Path) -> None:
    """Service managers send SIGTERM to each process of a job; SIGHUP goes to the session of the terminal alone."""
    before = signal.signal(number, signal.default_int_handler)  # who began the tests may have it ignored, as nohup does
    try:
        process, run = started(tmp_path)
    finally:
        signal.signal(number, before)
    roles = descendants(process.pid)
    if told == "every process":
        for pid in roles:
            os.kill(pid, number)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"stopped by {signal.Signals(number).name}" in output
    assert not alive(roles)
    _, manifest = checkpoint.newest(run, lambda path, reason: None)
    summary = read_summary(run / "summary.json")
    assert summary.reason == f"stopped by {signal.Signals(number).name}"
    assert (summary.faults, summary.lost_updates) == ((), 0)
    # A clean stop settles everything that was pushed: what is on disk is what was seen, and nothing will repeat.
    assert manifest.examples == summary.examples.seen
    assert summary.examples.repeated == 0


STUCK = """
import time
from pathlib import Path
import distbelief as db
from tests import problems

def loss(output, target):
    if Path("go").exists():
        Path("stuck").touch()
        time.sleep(600)
    return problems.nn.functional.cross_entropy(output, target)

job = problems.job(loss=loss, cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1), epochs=1000, run="run")
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_command_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STUCK)
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief", "train", "script.py"], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def until(there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)

    def told(event: str) -> bool:
        events = tmp_path / "run" / "events.jsonl"
        return events.exists() and event in events.read_text()

    try:
        until(lambda: told("EpochFinished"))
        (tmp_path / "go").touch()
        until((tmp_path / "stuck").exists)
        roles = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        until(lambda: told("JobStopping"))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert len(roles) == 6
    assert not alive(roles)
