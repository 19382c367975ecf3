# SPDX-License-Identifier: Apache-2.0
"""Jobs on three hosts of which one is cut off or loses its power: what is lost is said, replaced, and does no harm."""

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import distbelief as db
from distbelief.engine.hosts import HostsEngine
from distbelief.events import (
    CheckpointWritten,
    Event,
    LeasesReturned,
    Observation,
    Progress,
    RoleLost,
    RoleStarted,
    ShardRestored,
)
from tests import problems
from tests.hosts import Hosts
from tests.keepers import Subprocesses

pytestmark = pytest.mark.alone


HOSTS = 3
VICTIM = 1
EXAMPLES, EPOCHS = 640, 60
LOST_SECONDS = 2.0
"""From a cut until its roles are reported lost."""


class Scene:
    """Three hosts for roles and one for the coordinator. Listens to a job that runs on them.

    Does `harm` when the job is well under way, and `repair` when what lived on the victim lives elsewhere.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.harm: Callable[[], object]
        self.repair: Callable[[], object] = lambda: None
        self.engine: HostsEngine
        self.heard: list[Observation] = []
        self.victims: set[str] = set()
        """The roles on the victim."""
        self.harmed: float | None = None
        self.repaired: int | None = None
        """Examples that were settled by then."""

    def make_engine(self, job: db.Job, faults: db.Faults | None, costs: Any) -> HostsEngine:
        shards = [f"shard/{index}" for index in range(job.cluster.shards)]
        *addresses, own = self.hosts.addresses
        self.engine = HostsEngine(
            shards, Subprocesses(HOSTS, addresses=addresses, own=own, spawn=self.hosts.popen), faults=faults
        )
        return self.engine

    def of(self, kind: type[Event]) -> list[Any]:
        return [one.event for one in self.heard if isinstance(one.event, kind)]

    def __call__(self, observation: Observation) -> None:
        self.heard.append(observation)
        event = observation.event
        if self.harmed is None and isinstance(event, CheckpointWritten) and event.examples > EXAMPLES:
            self.harmed = observation.seconds
            roles = {event.role for event in self.of(RoleStarted)}
            self.victims = {role for role in roles if self.engine.host_of(role) == f"host{VICTIM}"}
            self.harm()
        if self.harmed is not None and self.repaired is None and isinstance(event, Progress):
            again = {event.role for event in self.of(RoleStarted) if event.incarnation > 0}
            if self.victims <= again and self.of(ShardRestored):
                self.repaired = event.examples
                self.repair()

    def train(self, run: Path) -> None:
        """Train, and check what holds whatever is done to a host."""
        job = problems.job(
            cluster=db.Cluster(replicas=3, shards=3, threads_per_replica=1),
            algorithm=db.Downpour(update_rule=db.adagrad(0.1), warmstart=0, cooldown=0),
            epochs=EPOCHS, checkpoint_seconds=0.5, run=run,
        )  # fmt: skip
        # Computing that takes no time would be over before anything can happen to it.
        faults = db.Faults(slow={f"replica/{index}": 4.0 for index in range(HOSTS)})
        result = db.train(job, view=False, listeners=[self], faults=faults)
        assert self.harmed is not None
        assert self.repaired is not None
        assert self.repaired < EXAMPLES * EPOCHS
        lost = [one for one in self.heard if isinstance(one.event, RoleLost)]
        assert {one.event.role for one in lost if isinstance(one.event, RoleLost)} == self.victims
        assert {role.partition("/")[0] for role in self.victims} >= {"shard", "replica"}
        assert all(one.seconds - self.harmed < LOST_SECONDS for one in lost)
        summary = result.summary
        assert (summary.reason, summary.examples.missing) == ("all epochs finished", 0)
        assert summary.examples.seen == EXAMPLES * EPOCHS
        assert summary.examples.repeated == sum(event.repeated for event in self.of(LeasesReturned))
        told = [fault.text for fault in summary.faults if fault.type == "RoleLost"]
        assert len(told) == len(lost)
        assert all(f"host{VICTIM} was lost" in text for text in told)
        assert (result.test["accuracy"] or 0) > 0.8


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    if reason := Hosts.missing():
        pytest.skip(reason)
    with Hosts(HOSTS + 1) as hosts:
        made = Scene(hosts)
        monkeypatch.setattr(importlib.import_module("distbelief.train"), "engine_of", made.make_engine)
        with hosts.inside(HOSTS):
            yield made


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_lost_in_two_seconds_and_has_ended_before_it_is_reachable_again(
    scene: Scene, tmp_path: Path
) -> None:
    def heal() -> None:
        until = time.monotonic() + 5.0
        while scene.hosts.pids(VICTIM):  # a busy machine takes its time to bury them
            assert time.monotonic() < until
            time.sleep(0.01)
        scene.hosts.heal(VICTIM)

    scene.harm, scene.repair = lambda: scene.hosts.cut(VICTIM), heal
    scene.train(tmp_path / "run")
    assert scene.hosts.pids(VICTIM) == []


@pytest.mark.slow
def test_a_host_that_was_cut_off_and_frozen_writes_nothing_when_it_comes_back(scene: Scene, tmp_path: Path) -> None:
    frozen: list[int] = []

    def cut() -> None:
        scene.hosts.cut(VICTIM)
        frozen.extend(scene.hosts.pids(VICTIM))
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    def heal() -> None:
        scene.hosts.heal(VICTIM)
        for pid in frozen:
            with suppress(ProcessLookupError):  # the keeper, which goes on first, has ended it
                os.kill(pid, signal.SIGCONT)

    scene.harm, scene.repair = cut, heal
    scene.train(tmp_path / "run")
    assert len(frozen) > 3, "keeper, zygote, roles"
    assert scene.hosts.pids(VICTIM) == []


@pytest.mark.slow
def test_a_host_whose_processes_are_all_killed_is_lost_and_the_job_goes_on(scene: Scene, tmp_path: Path) -> None:
    scene.harm = lambda: scene.hosts.kill(VICTIM)
    scene.train(tmp_path / "run")
