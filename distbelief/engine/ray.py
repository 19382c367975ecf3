# SPDX-License-Identifier: Apache-2.0
"""Ray as who finds hosts, reserves room on them and starts one keeper on each; nothing else of a job goes through it.

    address=None          the cluster that this process is connected to; else a Ray of this machine, begun for the job
                          and ended with it
    address="auto"        the cluster that this process runs in, such as that of a Ray job
    address="host:port"   the cluster whose head is there

Ray may take from 12 to 65 seconds to notice that a host is gone; keepers and coordinator notice it themselves.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

import ray
from ray import cloudpickle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distbelief.engine.host import Invitation
from distbelief.engine.keeper import PROGRAM
from distbelief.engine.listener import LOOPBACK
from distbelief.engine.placement import Group, Resources, check_room, next_host, total
from distbelief.engine.ray_connection import CONNECTION
from distbelief.errors import ConfigurationError

FREE_SECONDS = 5.0
ROOM_SECONDS = 10.0
"""Ray reserves room that is free within a second or two."""
PREPARE_SECONDS = 660.0
"""Ray may take ten minutes to make the environment of a job on a host, and one to notice that a host is gone."""
STOP_SECONDS = 5.0


class KeeperActor:
    """Starts the keeper on its host, in a process that shares nothing with Ray's but its end."""

    def up(self) -> None:
        """Ray has made what it makes on its host before."""

    def run(self, program: str, first: str, folders: Sequence[str], text: bytes) -> int:
        """Be there as long as the keeper is; returns its exit code.

        `first` is the PYTHONPATH of who trains. What else is in his path, and in Ray's here, comes after Python's own
        modules: files of the working folder may have their names.
        """
        own = os.pathsep.join(filter(None, (first, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": own}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import sys; sys.path += {[*folders, *sys.path]!r}; {program}"],
            stdin=subprocess.PIPE, start_new_session=True, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(text)
        return process.wait()


class SeatActor:
    """Holds the accelerators of one role."""

    def devices(self) -> list[str]:
        """Which they are, on their host."""
        return [str(each) for each in ray.get_gpu_ids()]


@final
class RayKeepers:
    """See `Keepers` of engine/hosts.py. `groups` are the roles of the job and what they need."""

    def __init__(self, address: str | None, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(CONNECTION.held(address, total(groups)))
            own = ray.get_runtime_context().get_node_id()
            self.host = next(_host_name(node) for node in ray.nodes() if node["NodeID"] == own)
            self._embedded = len(self._nodes()) == 1 and address is None
            self.address = LOOPBACK if self._embedded else ray.util.get_node_ip_address()
            check_room(groups, [node["Resources"] for node in self._nodes().values()])
        except BaseException:
            self._stack.close()
            raise
        self._planned: dict[str, str] = {}
        self._living: dict[str, str] = {}
        self._devices: dict[str, str] = {}
        self._actors: dict[str, tuple[Any, Any]] = {}
        """Host -> the actor, and the future of its keeper's exit code."""
        self._preparing: dict[str, Any] = {}
        """Host -> what is done when its actor is up."""
        self._prepared_by = 0.0

    def _nodes(self) -> dict[str, Any]:
        return {_host_name(node): node for node in ray.nodes() if node["Alive"]}

    # room and keepers

    def begin(self, invitation: Invitation) -> Sequence[str]:
        """Reserve room for every role, and start keepers on the hosts where there is some."""
        # Ray's own processes need not import this package, which takes seconds: they get its actors by value.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._check_free()
        left = defaultdict(Counter, {node["NodeID"]: Counter(node["Resources"]) for node in self._nodes().values()})
        reserved, planned = [], dict[str, str]()
        for group in self._groups:
            room, nodes = self._reserve(group, [*left.values()])
            reserved.append(room)
            planned |= dict(zip(group.roles, nodes, strict=True))
            for node in nodes:
                left[node].subtract(group.each)
        known = {node["NodeID"]: node for node in ray.nodes()}  # also those that have come, or gone, meanwhile
        self._planned = {role: _host_name(known[node]) for role, node in planned.items()}
        self._seat(reserved)
        self._prepared_by = time.monotonic() + PREPARE_SECONDS
        hosts = {_host_name(known[node]): known[node] for node in planned.values()}
        actor = ray.remote(num_cpus=0, max_restarts=0)(KeeperActor)
        for host, node in hosts.items():
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            keeper = actor.options(scheduling_strategy=where).remote()
            address = LOOPBACK if self._embedded else str(node["NodeManagerAddress"])
            text = pickle.dumps((host, address, invitation))
            first = os.environ.get("PYTHONPATH", "")
            self._preparing[host] = keeper.up.remote()
            self._actors[host] = keeper, keeper.run.remote(PROGRAM, first, [*filter(None, sys.path), os.getcwd()], text)
        return [*hosts]

    def _reserve(self, group: Group, left: Sequence[Resources]) -> tuple[PlacementGroup, list[str]]:
        """Room for the group, and by role the id of its node, where the job has `left` so much. ConfigurationError."""
        for strategy in group.strategies(left):
            room = placement_group([dict(group.each)] * len(group.roles), strategy=strategy)
            self._stack.callback(_while_connected, remove_placement_group, room)
            if room.wait(ROOM_SECONDS):
                nodes = placement_group_table(room)["bundles_to_node_id"]
                return room, [nodes[number] for number in range(len(group.roles))]
            remove_placement_group(room)
        free = {host: {name: has.get(name, 0.0) for name in group.each} for host, has in self._free().items()}
        needs = f"each needs {dict(group.each)} on one host; on its hosts are left {free}"
        if group.fitting(free.values()) < len(group.roles):
            raise ConfigurationError(
                f"the cluster has no room for {', '.join(group.roles)} beside the rest of the job: {needs}",
                hint="use fewer replicas or shards, ask less for each, or end other jobs of the cluster",
            )
        raise ConfigurationError(
            f"Ray has reserved no room for {', '.join(group.roles)} within {ROOM_SECONDS:g} s: {needs}",
            hint="look whether all of these hosts answer, since Ray may take a minute to notice that one is gone; then "
            "start the job again",
        )

    def _check_free(self) -> None:
        """Raise ConfigurationError when what is there is taken; what was just given back is not seen at once."""
        until = time.monotonic() + FREE_SECONDS
        while True:
            try:
                check_room(self._groups, [*self._free().values()])
                return
            except ConfigurationError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _free(self) -> dict[str, Resources]:
        free = ray._private.state.available_resources_per_node()
        return {name: free.get(node["NodeID"], {}) for name, node in self._nodes().items()}

    def _seat(self, reserved: Sequence[PlacementGroup]) -> None:
        """Learn from Ray which accelerators belong to which role; an actor for each holds them."""
        asked: dict[str, Any] = {}
        for group, each in zip(self._groups, reserved, strict=True):
            for number, role in enumerate(group.roles):
                if gpus := group.each.get("GPU", 0.0):
                    where = PlacementGroupSchedulingStrategy(each, placement_group_bundle_index=number)
                    seat = ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy=where)(SeatActor).remote()
                    self._stack.callback(_while_connected, ray.kill, seat)
                    asked[role] = seat.devices.remote()
        for role, devices in asked.items():
            try:
                self._devices[role] = ",".join(ray.get(devices, timeout=PREPARE_SECONDS))
            except ray.exceptions.RayError as error:
                raise ConfigurationError(
                    f"host {self._planned[role]} does not take part: {role} got no accelerator: {telling(error)}",
                    hint="start the job again when the host is well, or without it, see docs/clusters.md",
                ) from error

    def preparing(self) -> Collection[str]:
        """Hosts on which Ray has not started anything yet; it may be making the job's environment there."""
        if not ray.is_initialized() or time.monotonic() > self._prepared_by:
            return ()
        self._preparing = {host: up for host, up in self._preparing.items() if not ray.wait([up], timeout=0)[0]}
        return self._preparing

    def complaints(self) -> dict[str, str]:
        """Host -> why its keeper has ended, for those that have."""
        if not ray.is_initialized():  # asked all the same, Ray would connect to whatever it finds
            return dict.fromkeys(self._actors, "Ray was shut down in this process")
        found = {}
        for host, (_, running) in self._actors.items():
            if ray.wait([running], timeout=0)[0]:
                try:
                    code = ray.get(running)
                    found[host] = (
                        f"its keeper ended with exit code {code}; is distbelief installed there?"
                        if code >= 0 else f"its keeper was ended by signal {-code}"
                    )  # fmt: skip
                except ray.exceptions.RayError as error:
                    found[host] = f"its keeper was lost: {telling(error)}"
        return found

    def choose(self, role: str, hosts: Sequence[str]) -> str:
        """Where Ray has reserved room for the role, or, when that host is lost, where the fewest roles are."""
        living = [host for other, host in self._living.items() if other != role]
        self._living[role] = next_host(role, hosts, self._planned, living)
        return self._living[role]

    def devices(self, role: str) -> str | None:
        """The accelerators that Ray has given the role; where it was not planned to be, all of the host."""
        if role not in self._devices:
            return ""
        return self._devices[role] if self._living.get(role) == self._planned.get(role) else None

    def end(self) -> None:
        """End keepers, give back the room, and leave the cluster or end it."""
        try:  # whoever is waited for: Ctrl-C in the meantime must not keep the room
            if self._actors and ray.is_initialized():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.wait([running for _, running in self._actors.values()], num_returns=len(self._actors),
                             timeout=STOP_SECONDS)  # fmt: skip
            for actor, _ in self._actors.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    _while_connected(ray.kill, actor)
        finally:  # a user may have connected elsewhere meanwhile
            self._actors = {}
            self._stack.close()


def _host_name(node: Mapping[str, Any]) -> str:
    """What people know the host by, and the beginning of Ray's own name: a machine may be several nodes of Ray's."""
    return f"{node['NodeManagerAddress']} (node {node['NodeID'][:8]})"


def _while_connected(action: Callable[..., object], *arguments: Any) -> None:
    """Do it, unless the user has shut Ray down: it would connect again, to whatever it finds."""
    if ray.is_initialized():
        action(*arguments)


def telling(error: Exception) -> str:
    """What an error of Ray's says first, and of an environment that could not be made, what the program said last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        return "; ".join([lines[0], *lines[1:][-2:]])
    return lines[0]
