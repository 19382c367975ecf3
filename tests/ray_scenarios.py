# SPDX-License-Identifier: Apache-2.0
"""What test_engine_ray.py looks at, in a process of its own: jobs on a Ray of two hosts, one after another.

The answer is one JSON object on the last line: scenario -> what came of it.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

import distbelief as db
from distbelief.channel import frames
from distbelief.channel.base import exported
from distbelief.engine.base import Home
from distbelief.engine.hosts import HostsEngine
from distbelief.engine.placement import Group
from distbelief.engine.ray import RayKeepers
from distbelief.errors import DistbeliefError
from distbelief.events import RoleLost, RoleStarted
from tests import problems

RUN = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def cluster(**fields: Any) -> db.Cluster:
    given: dict[str, Any] = {
        "engine": "ray",
        "address": "auto",
        "replicas": 2,
        "shards": 2,
        "device": "cpu",
        "lost_seconds": 8.0,
    }
    return db.Cluster(**(given | fields))


def summary_of(name: str, **fields: Any) -> dict[str, Any]:
    """Train a job and say what came of it."""
    heard: list[Any] = []
    seen: list[Callable[[], None]] = []

    def listen(observation: Any) -> None:
        heard.append(observation.event)
        for action in seen:
            action()

    job = problems.job(run=RUN / name, **({"cluster": cluster()} | fields))
    result = db.train(job, view=False, listeners=[listen])
    return {
        "reason": result.summary.reason, "test": result.test, "missing": result.summary.examples.missing,
        "repeated": result.summary.examples.repeated,
        "files": sorted(path.name for path in (RUN / name).iterdir()),
        "lost": [event.reason for event in heard if isinstance(event, RoleLost)],
        "started": sum(isinstance(event, RoleStarted) for event in heard),
        "parameters": [float(value.double().sum()) for value in result.model.state_dict().values()],
        "values": torch.cat([value.flatten() for value in result.model.state_dict().values()]).tolist(),
    }  # fmt: skip


class Wiretap:
    """Counts what passes on the loopback interface and begins a frame that is not encrypted; None without the right."""

    def __init__(self) -> None:
        self.frames: int | None = 0
        try:
            self._line = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        except PermissionError:
            self.frames = None
            return
        self._line.bind(("lo", 0))
        self._line.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        assert self.frames is not None
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self.frames += frames.MAGIC in self._line.recv(1 << 16)

    def __enter__(self) -> "Wiretap":
        if self.frames is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.frames is not None:
            self._over.set()
            self._thread.join()
            self._line.close()


def downpour() -> dict[str, Any]:
    with Wiretap() as wiretap:
        told = summary_of("downpour")
    return told | {"frames": wiretap.frames}


def encrypted_and_rounded() -> dict[str, Any]:
    """One replica, and a shard on either host, so that one of them is beyond the wire."""
    algorithm = db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited")
    with Wiretap() as wiretap:
        told = summary_of(
            "encrypted",
            algorithm=algorithm,
            cluster=cluster(replicas=1, tls=True, wire="bfloat16"),
            test=None,
            epochs=1,
        )
    return told | {"frames": wiretap.frames}


def partitioned() -> dict[str, Any]:
    """Each replica needs both hosts: four cores for two partitions, where no host has more than three."""
    algorithm = db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited")
    return summary_of(
        "partitioned", algorithm=algorithm, cluster=cluster(replicas=1, partitions=2, cpus_per_replica=4.0, shards=1),
        test=None, epochs=1,
    )  # fmt: skip


def sandblaster() -> dict[str, Any]:
    """On the cluster that this process is connected to, by its address."""
    address = ray.get_runtime_context().gcs_address
    return summary_of("sandblaster", algorithm=db.Sandblaster(max_iterations=5), cluster=cluster(address=address))


class Clerk:
    """A role that says where it is and what it may use."""

    def __init__(self, home: Home) -> None:
        self.home = home

    @exported
    def where(self) -> tuple[str, str, str]:
        return self.home.name, self.home.address, os.environ.get("CUDA_VISIBLE_DEVICES", "")


def nothing() -> tuple[None, None]:
    return None, None


def placed(*groups: Group) -> dict[str, Any]:
    """Role -> host and devices."""
    roles = [role for group in groups for role in group.roles]
    keepers = RayKeepers("auto", groups)
    engine = HostsEngine(roles, keepers)
    try:
        engine.load(nothing)
        for role in roles:
            engine.start(role, 0, Clerk)
        said = {role: engine.find(role, Clerk).call(Clerk.where).result() for role in roles}
        return {role: (engine.host_of(role), said[role][2]) for role in roles}
    finally:
        engine.close()


def placement() -> dict[str, Any]:
    return placed(
        Group(("shard/0", "shard/1"), {"CPU": 1.0}, spread=True), Group(("a/0", "a/1"), {"CPU": 1.0}),
        Group(("fast/0",), {"fast": 1.0}), Group(("gpu/0", "gpu/1"), {"GPU": 1.0}),
    )  # fmt: skip


def scattered() -> dict[str, Any]:
    """Three pairs on two hosts of three cores: what is left for the last pair is one core on each."""
    return placed(*(Group((f"{name}/0", f"{name}/1"), {"CPU": 1.0}) for name in "abc"))


def refused(make: Callable[[], Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        make()
    except DistbeliefError as error:
        return {"kind": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started}
    return {}


def refusals() -> dict[str, Any]:
    job = functools.partial(problems.job, run=RUN / "refused")
    return {
        "room": refused(lambda: db.train(job(cluster=cluster(replicas=50)), view=False)),
        "gpus": refused(lambda: db.train(job(cluster=cluster(gpus_per_replica=8.0)), view=False)),
        "custom": refused(lambda: db.train(job(cluster=cluster(resources={"tpu": 1.0})), view=False)),
        "left": [path.name for path in RUN.glob("refused*")],
    }


def lost_host() -> dict[str, Any]:
    """The second host is ended while a job runs on both."""
    heard: list[Any] = []
    ended: list[float] = []

    def listen(observation: Any) -> None:
        heard.append(observation)
        name = type(observation.event).__name__
        if not ended and name == "Progress" and observation.event.examples > 1000:
            ended.append(observation.seconds)
            second.remove_node(nodes[1], allow_graceful=False)

    job = problems.job(
        run=RUN / "lost", data=functools.partial(problems.points, 6400), epochs=2, checkpoint_seconds=0.5,
        cluster=cluster(lost_seconds=3.0),
    )  # fmt: skip
    # Slowed, so that the job outlasts the loss.
    result = db.train(
        job, view=False, listeners=[listen], faults=db.Faults(slow={"replica/0": 10.0, "replica/1": 10.0})
    )
    lost = [one for one in heard if isinstance(one.event, RoleLost)]
    return {
        "reason": result.summary.reason, "missing": result.summary.examples.missing, "ended": bool(ended),
        "lost": [(one.event.role, one.event.reason) for one in lost],
        "hosts": len({one.event.reason for one in lost}),
        "again": [one.event.role for one in heard if isinstance(one.event, RoleStarted) and one.event.incarnation],
        "lost_updates": result.summary.lost_updates, "test": result.test,
    }  # fmt: skip


SCENARIOS = [downpour, encrypted_and_rounded, partitioned, sandblaster, placement, scattered, refusals, lost_host]

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"include_dashboard": False, "object_store_memory": 80 << 20}
    second = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 3, "num_gpus": 2})
    nodes = [second.head_node, second.add_node(**options, num_cpus=3, resources={"fast": 1.0})]
    ray.init(address=second.address, configure_logging=False)
    wanted = sys.argv[2:]
    told: dict[str, Any] = {}
    try:
        for scenario in SCENARIOS:
            if not wanted or scenario.__name__ in wanted:
                started = time.monotonic()
                told[scenario.__name__] = scenario()
                print(scenario.__name__, time.monotonic() - started, told[scenario.__name__], file=sys.stderr)
    finally:
        ray.shutdown()
        second.shutdown()
    print(json.dumps(told))
