# SPDX-License-Identifier: Apache-2.0
"""Laws of the coordinator, with real shards on the simulated engine and replicas that do what no replica should."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distbelief as db
from distbelief import adagrad, checkpoint
from distbelief.downpour_coordinator import DownpourCoordinator
from distbelief.engine.base import COORDINATOR, Faults, Home
from distbelief.engine.simulated import SimulatedEngine
from distbelief.errors import ChannelError
from distbelief.events import (
    AnyEvent,
    EpochFinished,
    Evaluated,
    JobFinished,
    Observation,
    Progress,
    RoleLost,
    RoleStarted,
    ShardRestored,
)
from distbelief.leases import Leases, Release
from distbelief.parameter_server import ParameterServerShard, shard_name
from distbelief.parameters import Layout, Piece, Span
from distbelief.report.files import read_events
from distbelief.roster import (
    Granted,
    Refusal,
    ReplicaRecord,
    Report,
    RoleSpec,
    Settings,
    awaited_offers,
    replica_name,
    silent_replicas,
)
from distbelief.section import Awaited, Stamp
from distbelief.training_loss import Losses
from tests import problems

LENGTH = 70
LAYOUT = Layout((Piece("all", (LENGTH,), Span(0, LENGTH)),), torch.float32)


class CutOff:
    """A replica that, once replaced, goes on pushing as its first incarnation, a thousand times a second."""

    def __init__(self, home: Home, outcomes: list[tuple[float, str]]) -> None:
        self.home, self.outcomes = home, outcomes
        self.shard = home.find(shard_name(0), ParameterServerShard, 5.0)

    def run(self) -> None:
        gradient = torch.ones(LENGTH)
        coordinator = self.home.find(COORDINATOR, DownpourCoordinator)
        while coordinator.call(DownpourCoordinator.wants_parameters, 0).result():
            self.shard.call(ParameterServerShard.initialise, 0, torch.zeros(LENGTH)).result()
            self.home.sleep(0.05)
        while self.home.now() < 3.0:
            stamp = Stamp(0, 0, int(1e6 * self.home.now()), 0, 1, ())
            try:
                self.shard.call(ParameterServerShard.push, stamp, gradient).result()
                outcome = "applied"
            except ChannelError as error:
                outcome = type(error).__name__
            self.outcomes.append((self.home.now(), outcome))
            self.home.sleep(1e-3)
        coordinator.call(DownpourCoordinator.leave, 0, self.home.incarnation).result()


def coordinator(engine: Any, run: Path, outcomes: list[tuple[float, str]], heard: list[Any]) -> DownpourCoordinator:
    """One shard, one such replica."""
    settings = Settings(
        run=run, replicas=[[RoleSpec(replica_name(0), CutOff, (outcomes,))]],
        shards=[RoleSpec(shard_name(0), ParameterServerShard, (Span(0, LENGTH), LAYOUT, adagrad(0.1)))],
        evaluator=(), checkpoint_seconds=1e6, keep_checkpoints=1, evaluate_examples=1,
        offers=True, silence_seconds=60.0, shard_silence_seconds=60.0, refusals=0, incarnation=0,
    )  # fmt: skip
    module = nn.Linear(LENGTH, 1, bias=False)
    manifest = checkpoint.manifests(module, LAYOUT, Layout((), torch.float64), rule="", seed=0)

    def emit(event: AnyEvent) -> None:
        heard.append((engine.now(), event))

    leases = Leases(100, 10, 1)
    buffers = [torch.empty(0, dtype=torch.float64)]
    return DownpourCoordinator(engine, settings, buffers, manifest, emit, leases, Release())


def test_a_restored_shard_refuses_the_incarnations_that_it_has_forgotten_were_replaced(tmp_path: Path) -> None:
    for seed in range(3):
        outcomes: list[tuple[float, str]] = []
        heard: list[tuple[float, Any]] = []
        # The checkpoint that the shard comes back from is older than the death of the replica.
        faults = Faults(kill=((0.7, replica_name(0)), (1.5, shard_name(0))))
        with closing(SimulatedEngine(seed, faults=faults)) as engine:
            (tmp_path / f"run{seed}").mkdir()
            center = coordinator(engine, tmp_path / f"run{seed}", outcomes, heard)
            engine.answer(center)
            engine.at(3.0, lambda center=center: setattr(center, "interrupted", "enough"))  # type: ignore[misc]
            center.start(None)
            assert center.run() == "enough"
        replaced = max(seconds for seconds, event in heard if isinstance(event, RoleStarted) and event.role[0] == "r")
        (restored,) = [seconds for seconds, event in heard if isinstance(event, ShardRestored)]
        assert "applied" in {outcome for seconds, outcome in outcomes if seconds < replaced}
        late = [outcome for seconds, outcome in outcomes if seconds > replaced]
        assert set(late) - {"PeerLost"} == {"Fenced", "NotReady"}
        assert "Fenced" in {outcome for seconds, outcome in outcomes if seconds > restored}


class EnoughError(Exception):
    """What a user stops a job with."""


@pytest.mark.parametrize(
    ("kind", "after"), [(Evaluated, 1), (Evaluated, 1280), (EpochFinished, 1), (Progress, 1280), (JobFinished, 1280)]
)
def test_what_a_listener_raises_ends_the_job_and_no_role_is_blamed(kind: type, after: int, tmp_path: Path) -> None:
    settled = 0

    def hear(observation: Observation) -> None:
        nonlocal settled
        settled = getattr(observation.event, "examples", settled)
        if isinstance(observation.event, kind) and settled >= after:
            raise EnoughError

    with pytest.raises(EnoughError):
        db.train(problems.job(run=tmp_path / "run"), listeners=[hear], view=False)
    told = [observation.event for observation in read_events(tmp_path / "run" / "events.jsonl")]
    assert not [event for event in told if isinstance(event, RoleLost)]
    assert isinstance(told[-1], JobFinished)
    assert told[-1].reason == ("all epochs finished" if kind is JobFinished else "failed: EnoughError")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reason"] == told[-1].reason


def test_a_replica_is_silent_after_twenty_of_its_slowest_mini_batches_and_once_for_each_such_time() -> None:
    quick, slow, new, left = (ReplicaRecord(2, 100.0, seconds) for seconds in (0.1, 3.0, 0.0, 0.1))
    left.left = True
    replicas = [quick, slow, new, left]

    def silent(now: float) -> list[tuple[int, int, float]]:
        return list(silent_replicas(replicas, now, 10.0))

    assert silent(110.0) == []
    assert silent(110.5) == [(0, 2, 10.0)]
    assert silent(120.0) == []
    assert silent(160.5) == [(0, 2, 10.0), (1, 2, 60.0)]
    quick.heard = slow.heard = 700.0
    assert silent(700.5) == [(2, 2, 600.0)], "it may be building its model until then"


def test_offers_are_awaited_from_those_who_live_for_as_long_as_two_of_their_slowest_mini_batches() -> None:
    records = [ReplicaRecord(0, 0.0, seconds) for seconds in (0.5, 3.0, 9.0, 20.0)]
    records[2].alive, records[3].left = False, True
    assert awaited_offers(records) == Awaited((0, 1), 7.0)
    assert awaited_offers(records[2:]) == Awaited((), 1.0)


def test_as_many_replicas_are_given_leases_as_are_released_and_who_leaves_gives_his_back(tmp_path: Path) -> None:
    with closing(SimulatedEngine(0)) as engine:
        plain = coordinator(engine, tmp_path, [], [])
        roles = [[RoleSpec(replica_name(index), CutOff, ([],))] for index in range(4)]
        settings = dataclasses.replace(plain.settings, replicas=roles)
        buffers = [torch.empty(0, dtype=torch.float64)]
        manifest, leases = plain.writer._manifest, Leases(100, 10, 1)
        center = DownpourCoordinator(engine, settings, buffers, manifest, lambda event: None, leases, Release(10, 0))
        assert center.lease(0, 0, ()) == Granted(None, False), "before there is a checkpoint"
        center.begun = True
        given = [[center.lease(replica, 0, ()).lease is not None for replica in range(4)]]
        for identifier in (0, 1):
            leases.settle(0, identifier, 100)
            given.append([center.lease(replica, 0, ()).lease is not None for replica in range(4)])
        assert given == [[True, False, False, False], [True, True, False, False], [True, True, True, True]]
        held = {lease.identifier for lease in leases.unsettled()}
        center.leave(3, 0)
        returned = leases.next(0)
        assert returned is not None
        assert returned.identifier in held, "before new ones"


def test_what_replicas_refused_is_in_the_audit_and_in_the_next_checkpoint(tmp_path: Path) -> None:
    with closing(SimulatedEngine(0)) as engine:
        center = coordinator(engine, tmp_path, [], [])
        for examples in (16, 8):
            center.report(Report(0, 0, (), Losses(), 0.0, (Refusal(3, examples, "it is NaN"),)))
        assert center.finished("", "", "").refused == center.work()["leases"].refused == 24
