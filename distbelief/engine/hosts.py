# SPDX-License-Identifier: Apache-2.0
"""The engine of several hosts: the coordinator's process, and one keeper on each host that forks the roles there.

Who starts the keepers, and which role should live where, is the affair of `Keepers`: Ray's, or a test's. A host that is
silent for a while counts as lost, and with it all roles that lived there; they are started again where hosts are left.
Calls travel as everywhere: between roles of one host through shared memory, otherwise over TCP.
"""

import contextlib
import functools
import pickle
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from distbelief.channel.authenticate import new_key
from distbelief.channel.base import Future
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import Kept
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Place
from distbelief.channel.wire import Wire
from distbelief.engine.base import COORDINATOR, UNTIL_LOST_SECONDS, Death, Faults
from distbelief.engine.home import ProcessHome
from distbelief.engine.host import Host, HostWiring, Invitation, Prepared, birth, versions
from distbelief.engine.insistent import Insistent
from distbelief.engine.listener import listen, listen_over_tcp, name_of
from distbelief.engine.pickles import Luggage, Pickler, pack, places
from distbelief.engine.registry import Introduction, Nearest, Registry
from distbelief.engine.script import Script
from distbelief.errors import ChannelError, ConfigurationError, DistbeliefError, NotReady, PeerLost, TrainingFailed

T = TypeVar("T")

LOST_SECONDS = 1.5
GATHER_SECONDS = 60.0
FAREWELL_SECONDS = 1.0
"""How long keepers are given to hear that the job is over; one that was never called has still to be connected to."""
PART_BYTES = 16 << 20
"""The job travels to a host in parts of this size."""


class Keepers(Protocol):
    """Who starts one keeper on each host of the job, and ends them."""

    host: str
    """The name of the coordinator's own host."""
    address: str
    """Its address on the network that the hosts share."""

    def begin(self, invitation: Invitation) -> Sequence[str]:
        """Start the keepers; returns at once, with the names of their hosts. Raises ConfigurationError."""

    def preparing(self) -> Collection[str]:
        """Hosts on which the keeper's process has still to be made."""

    def complaints(self) -> dict[str, str]:
        """Host -> why its keeper has ended, for those that have."""

    def choose(self, role: str, hosts: Sequence[str]) -> str:
        """Which of these hosts, which are the living ones, the role should be started on."""

    def devices(self, role: str) -> str | None:
        """The accelerators that this role, where it was chosen to be, may use, with commas between; None for all."""

    def end(self) -> None:
        """End every keeper, however it is; what was never begun is fine."""


class HostsEngine(ProcessHome):
    """Starts, watches and ends the roles of one job on the hosts of `keepers`.

    `listening` names the roles that answer calls. A host that is silent for `lost_seconds` is lost.
    """

    def __init__(
        self, listening: Sequence[str], keepers: Keepers, *, faults: Faults | None = None, wire: Wire | None = None,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:  # fmt: skip
        key, wire = new_key(), wire or Wire()

        def endpoint(role: str) -> tuple[Endpoint, Place]:
            over_tcp, beside = listen_over_tcp(keepers.address), listen(role)
            place = Place(keepers.host, name_of(beside), name_of(over_tcp))
            return Endpoint(key, listeners=[beside, over_tcp], wire=wire), place

        own, own_place = endpoint(COORDINATOR)
        self._desk, registry_place = endpoint("registry")
        self._registry = registry = Registry(self._desk)
        super().__init__(
            COORDINATOR, 0, own, self._locate_role, address=keepers.address, moves=lambda: registry.moves
        )  # fmt: skip
        self._registry.settle(COORDINATOR, own_place)
        self._desk.answer_with(self._registry)
        self._desk.background()
        self._keepers, self._listening = keepers, frozenset(listening)
        self._invitation = Invitation(key=key, registry=registry_place, wire=wire, lost_seconds=lost_seconds)
        self._faults, self._script = faults or Faults(), Script(faults or Faults())
        self._keeper_peers: dict[str, Peer[Host]] = {}
        self._hosts: dict[str, Introduction] = {}
        """The living ones."""
        self._alive: dict[str, tuple[int, str]] = {}
        """Role -> (incarnation, host)."""
        self._deaths: list[Death] = []
        self._closed = False
        self.processes: dict[str, int] = {}
        """Process id of each live role, as its host counts them."""

    def _locate_role(self, role: str) -> Callable[[], Nearest]:
        def locate() -> Nearest:
            promise: Kept[Place] = Kept(self._endpoint)
            self._registry.seek(role, promise)
            return Nearest(promise, self._keepers.host)

        return locate

    @property
    def hosts(self) -> tuple[str, ...]:
        """The living hosts."""
        return tuple(self._hosts)

    def host_of(self, role: str) -> str | None:
        """The host that a living role was started on."""
        return self._alive[role][1] if role in self._alive else None

    def answer(self, role: object) -> None:
        """Let `role` answer calls to the coordinator."""
        self._endpoint.answer_with(role)

    # the hosts

    def gather(self) -> None:
        """Start the keepers and wait until they are there. Raises ConfigurationError."""
        expected = self._keepers.begin(self._invitation)
        until = dict.fromkeys(expected, time.monotonic() + GATHER_SECONDS)
        while missing := [host for host in expected if host not in self._registry.joined()]:
            until |= dict.fromkeys(self._keepers.preparing(), time.monotonic() + GATHER_SECONDS)
            complaints = self._keepers.complaints()
            for host in missing:
                if host in complaints or time.monotonic() > until[host]:
                    registry = ":".join(map(str, self._invitation.registry.address))
                    silence = f"it has not reached the coordinator at {registry} within {GATHER_SECONDS:g} s"
                    raise ConfigurationError(
                        f"host {host} does not take part: {complaints.get(host, silence)}",
                        hint="start the job again when the host is well, or without it, see docs/clusters.md"
                        if host in complaints
                        else "look whether hosts may connect to each other on all TCP ports, see docs/clusters.md",
                    )
            self.sleep(0.02)
        joined = self._registry.joined()
        self._hosts = {host: joined[host] for host in expected}
        self._keeper_peers = {host: self._keeper(introduction) for host, introduction in self._hosts.items()}
        self._check_versions()
        self._check_calls()

    def _keeper(self, introduction: Introduction) -> Peer[Host]:
        return Peer(self._endpoint, at(introduction.place.nearest(self._keepers.host)), UNTIL_LOST_SECONDS)

    def _check_versions(self) -> None:
        own = versions()
        for host, introduction in self._hosts.items():
            for name, version in introduction.versions.items():
                if version != own[name]:
                    raise ConfigurationError(
                        f"host {host} has {name} {version}, the coordinator's, {self._keepers.host}, has {own[name]}",
                        hint="install the same versions on all hosts, for example by the same image",
                    )

    def _check_calls(self) -> None:
        """Raise ConfigurationError where a host cannot be called by another, whose roles would wait for ever."""
        places = [introduction.place for introduction in self._hosts.values()]
        answers: dict[str, Any] = {host: peer.call(Host.reach, places) for host, peer in self._keeper_peers.items()}
        self._await(answers)
        failed = []
        for host, answer in answers.items():
            try:
                told = answer.result() if answer.done() else []
                failed += [(host, place.host, why) for place, why in zip(places, told, strict=False) if why]
            except PeerLost as error:
                failed.append((self._keepers.host, host, str(error)))
        until = time.monotonic() + self._invitation.lost_seconds
        while failed and time.monotonic() < until:  # a host that is gone has no part in the job
            self._watch_hosts()
            self.sleep(0.02)
        for one, other, why in failed:
            if other in self._hosts and one in (*self._hosts, self._keepers.host):
                raise ConfigurationError(
                    f"host {one} cannot call host {other}: {why}",
                    hint="let all hosts connect to each other on all TCP ports, see docs/clusters.md",
                )

    def check_visible(self, folder: Path) -> None:
        """Raise ConfigurationError unless every host sees what is written to this folder."""
        probe, content = folder / "probe", secrets.token_bytes(16)
        probe.write_bytes(content)
        try:
            answers = {
                host: peer.call(Host.sees, str(probe.resolve()), content) for host, peer in self._keeper_peers.items()
            }
            self._await(answers)
            for host, answer in answers.items():
                if self._last([answer], host) is False:
                    raise ConfigurationError(
                        f"host {host} does not see the folder {folder}, to which shards write checkpoints",
                        hint="give checkpoints=... on storage that all hosts share: a folder, or a URL such as s3://bucket/run",
                    )
        finally:
            probe.unlink()

    def _lose(self, host: str, reason: str) -> None:
        del self._hosts[host]
        for role, (incarnation, where) in list(self._alive.items()):
            if where == host:
                self._end(role, Death(role, incarnation, reason))

    # the job

    def load(
        self, prepare: Callable[..., tuple[Any, T]], *arguments: Any, attempt: Callable[[Any], object] | None = None
    ) -> T:
        """Bring the job to every host and prepare it there."""
        luggage = pack(prepare, arguments, attempt, here=False)
        if not self._hosts:
            self.gather()
        loading = {host: self._bring(luggage, self._keeper_peers[host]) for host in self._hosts}
        self._await({host: answers[-1] for host, answers in loading.items()})
        answered = {host: self._prepared(answers, host) for host, answers in loading.items()}
        prepared = {host: each for host, each in answered.items() if each is not None}
        if not prepared:
            raise TrainingFailed("every host was lost while the job was loaded")
        for host, each in prepared.items():
            if each.failure:
                failure: DistbeliefError = pickle.loads(each.failure)
                elsewhere = {*prepared} != {self._keepers.host}
                self.close()
                raise _of_host(host, failure) if elsewhere else failure
        described: dict[str, T] = {host: pickle.loads(each.description) for host, each in prepared.items()}
        first = next(iter(described))
        for host, result in described.items():
            if result != described[first]:
                self.close()
                raise ConfigurationError(
                    f"hosts prepared different jobs: {first} {described[first]}; {host} {result}",
                    hint="give all hosts the same files, environment and versions of packages",
                )
        return described[first]

    def _bring(self, luggage: Luggage, peer: Peer[Host]) -> list[Future[Any]]:
        answers: list[Future[Any]] = [peer.call(Host.announce, luggage.main, luggage.sizes)]
        answers += [peer.call(Host.take, start, part) for start, part in _parts(luggage)]
        return [*answers, peer.call(Host.load)]

    def _prepared(self, answers: Sequence[Future[Any]], host: str) -> Prepared | None:
        try:
            prepared: Prepared | None = self._last(answers, host)
        except NotReady as error:
            self.close()
            raise ConfigurationError(
                str(error),
                hint="keep the script in a folder that all hosts share, or submit it as a Ray job with a working_dir",
            ) from error
        return prepared

    def _await(self, answers: Mapping[str, Future[Any]]) -> None:
        """Wait for what the hosts answer, except those that are lost meanwhile."""
        while any(host in self._hosts and not answer.done() for host, answer in answers.items()):
            self._watch_hosts()
            self.sleep(0.02)

    def _last(self, answers: Sequence[Future[Any]], host: str) -> Any:
        """The last of these answers of a host, when all are there; None when it is lost, by now at the latest."""
        if host not in self._hosts:
            return None
        try:
            return [answer.result() for answer in answers][-1]
        except PeerLost as error:
            self._registry.give_up(host)
            self._lose(host, f"host {host} was lost: {error}")
            return None

    # roles

    def start(self, name: str, incarnation: int, factory: Callable[..., Any], *arguments: Any) -> None:
        """Have a keeper fork a process for the role."""
        if not self._hosts:
            raise TrainingFailed("no host is left to start roles on\nhint: resume the run when there are hosts again")
        self._script.begin(time.monotonic())
        host = self._keepers.choose(name, self.hosts)
        self._alive[name] = incarnation, host
        wiring = HostWiring(
            host=host, address=self._hosts[host].place.address[0], invitation=self._invitation, faults=self._faults,
            devices=self._keepers.devices(name),
        )  # fmt: skip
        payload = Pickler.dumps(functools.partial(birth, name, incarnation, wiring, factory, arguments))
        order = self._keeper_peers[host].call
        answer = Insistent(
            self, functools.partial(order, Host.start, name, incarnation, payload, name in self._listening)
        )  # fmt: skip

        def errand() -> bool:
            if self._alive.get(name) != (incarnation, host):
                return True
            if not answer.done():
                return False
            try:
                if (place := answer.result()) is not None:
                    self._registry.settle(name, place)
            except ChannelError as error:
                self._end(name, Death(name, incarnation, f"host {host} could not start it: {error}"))
            return True

        self._endpoint.attend(errand)

    def stop(self, name: str) -> None:
        """Kill the role's process; not a death."""
        if name in self._alive:
            incarnation, host = self._alive[name]
            self._end(name, None)
            answer = Insistent(self, functools.partial(self._keeper_peers[host].call, Host.stop, name, incarnation))
            self._endpoint.attend(lambda: host not in self._hosts or answer.done())

    def signal(self, name: str, number: int) -> None:
        """Send a role a signal."""
        self._keeper_peers[self._alive[name][1]].call(Host.signal, name, number)

    def deaths(self) -> list[Death]:
        """Roles that ended since last asked, those of lost hosts among them; also where scripted kills happen."""
        self._watch_hosts()
        for host, note in self._registry.hear():
            if self._alive.get(note.role) != (note.incarnation, host):
                continue
            if note.pid:
                self.processes[note.role] = note.pid
            elif note.reason:
                self._end(note.role, Death(note.role, note.incarnation, note.reason, note.failure))
            else:
                self._end(note.role, None)
        for role, number in self._script.due(time.monotonic(), self.processes):
            self.signal(role, number)
        deaths, self._deaths = self._deaths, []
        return deaths

    def _end(self, role: str, death: Death | None) -> None:
        self._registry.unsettle(role)
        del self._alive[role]
        self.processes.pop(role, None)
        if death is not None:
            self._deaths.append(death)

    def _watch_hosts(self) -> None:
        seconds = self._invitation.lost_seconds
        for host in self._registry.give_up_silent(seconds):
            self._lose(host, f"host {host} was lost: it has been silent for {seconds:g} s")

    def close(self) -> None:
        """End every role, every keeper and close every socket."""
        if self._closed:
            return
        self._closed, self._hosts = True, {}
        with contextlib.ExitStack() as ending:  # all of it, though Ctrl-C ends the wait
            for end in (self._desk.close, self.leave, self._keepers.end):
                ending.callback(end)
            farewells = [
                (self._keeper_peers.get(host) or self._keeper(introduction)).call(Host.end)
                for host, introduction in self._registry.end().items()
            ]
            until = time.monotonic() + FAREWELL_SECONDS
            for farewell in farewells:
                farewell.wait(until - time.monotonic())


def _of_host(host: str, failure: DistbeliefError) -> DistbeliefError:
    """The failure, with where it happened."""
    if isinstance(failure, ConfigurationError):
        return ConfigurationError(f"host {host}: {failure.problem}", hint=failure.hint)
    return type(failure)(f"{failure}\non host {host}")


def _parts(luggage: Luggage) -> Iterator[tuple[int, torch.Tensor]]:
    """(where it belongs in the arena, uint8 of shape (k,) in the luggage's own memory)."""
    for start, buffer in zip(places(luggage.sizes), luggage.buffers, strict=False):
        flat = buffer.cast("B")
        for offset in range(0, len(flat), PART_BYTES):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch has no read-only tensors; this one is only sent
                yield start + offset, torch.frombuffer(flat[offset : offset + PART_BYTES], dtype=torch.uint8)
