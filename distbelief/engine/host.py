# SPDX-License-Identifier: Apache-2.0
"""The keeper of one host of a cluster: one process that forks the host's roles and tells the coordinator of them.

    coordinator                                keeper of a host
      registry  <- join, beat, notes ---------   |  zygote -> role, role, ...
      engine    -- load, start, stop --------->  |  lease: until when the roles may speak

The keeper asks the registry several times a second whether it still counts. When it has had no answer for as long as
its lease lasts, it ends its roles and itself: by then the coordinator starts them elsewhere.
"""

import itertools
import os
import pickle
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast, final

import msgspec
import torch

from distbelief.channel import frames
from distbelief.channel.base import Future, Promise, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import Kept
from distbelief.channel.links import family_of
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Place
from distbelief.channel.wire import Wire
from distbelief.engine.base import UNTIL_LOST_SECONDS, Faults
from distbelief.engine.home import ProcessHome, life_of
from distbelief.engine.lease import Lease
from distbelief.engine.listener import interface_of, listen, listen_over_tcp, name_of
from distbelief.engine.nursery import Nursery
from distbelief.engine.pickles import new_arena, write
from distbelief.engine.registry import Introduction, Nearest, Note, Registry
from distbelief.engine.zygote import Forked
from distbelief.errors import ChannelError, DeadlineExceeded, NotReady, PeerLost

JOIN_SECONDS = 20.0
BEATS = 6
"""Beats that fit in the time after which a host counts as lost."""
LEASE_SHARE = 0.8
"""The keeper counts from when it asked and the coordinator from when it heard; the rest of the time is between them."""


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a keeper must know to take part in a job."""

    key: bytes
    registry: Place
    wire: Wire
    lost_seconds: float
    """A host that is silent for so long is lost."""


@dataclass(frozen=True, kw_only=True)
class HostWiring:
    """What every role of one host knows."""

    host: str
    address: str
    invitation: Invitation
    faults: Faults
    devices: str | None
    """The accelerators that the role may use, with commas between; None for all."""

    def locator(self, endpoint: Endpoint) -> Callable[[str], Callable[[], Any]]:
        """Finds roles by asking the registry at each connection."""
        registry: Peer[Registry] = Peer(
            endpoint, at(self.invitation.registry.nearest(self.host)), UNTIL_LOST_SECONDS
        )  # fmt: skip
        return lambda role: lambda: Nearest(cast(Any, registry.call(Registry.locate, role)), self.host)


def birth(
    name: str, incarnation: int, wiring: HostWiring, factory: Callable[..., Any], arguments: tuple[Any, ...],
    descriptors: list[int],
) -> Callable[[], None]:  # fmt: skip
    """What a fork does first: build the role on the lease and listeners it was given, and return the role's life."""
    # CUDA and NCCL have no other way to be told, and have not begun in this process.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if wiring.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = wiring.devices
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface_of(wiring.address)}"
    os.environ["NCCL_SOCKET_FAMILY"] = family_of(wiring.address).name
    lease = Lease.attach(descriptors[0])
    listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
    invitation = wiring.invitation
    endpoint = Endpoint(invitation.key, listeners=listeners, wire=invitation.wire, permit=lease.obey)
    home = ProcessHome(
        name, incarnation, endpoint, wiring.locator(endpoint), address=wiring.address,
        slowness=wiring.faults.slow.get(name, 1.0), moves=lambda: lease.moves,
    )  # fmt: skip
    return life_of(factory(home, *arguments), endpoint, over_tcp=True)


@final
class Prepared(msgspec.Struct, array_like=True, frozen=True):
    """What came of loading the job on a host: a description of it or an error, pickled."""

    description: bytes
    failure: bytes


def versions() -> dict[str, str]:
    """What must be the same on all hosts of a job."""
    found = {"distbelief": metadata.version("distbelief"), "Python": platform.python_version()}
    return {**found, "torch": str(torch.__version__)}


def path_here(theirs: Sequence[str], own: Sequence[str]) -> list[str]:
    """Where roles of a host import from: the coordinator's folders first, its installation last.

    The host's own installation is between them: it may be an environment that Ray has made for the job.
    """
    library = f"python{sys.version_info.major}{sys.version_info.minor}.zip"  # Python's own begin with it, there or not
    folders = list(itertools.takewhile(lambda each: Path(each).name != library, theirs))
    return list(dict.fromkeys([*folders, *own, *theirs]))


def _why_not(answer: Future[None]) -> str:
    try:
        answer.result()
    except ChannelError as error:
        return str(error)
    return ""


@final
class Host:
    """The keeper of the host `name`, whose address on the cluster's network is `address`."""

    def __init__(self, name: str, address: str, invitation: Invitation, zygote: Forked) -> None:
        self._name, self._address, self._invitation = name, address, invitation
        own = [listen("keeper"), listen_over_tcp(address)]
        self._place = Place(name, *map(name_of, own))
        self._endpoint = Endpoint(invitation.key, role=self, listeners=own, wire=invitation.wire)
        self._registry: Peer[Registry] = Peer(
            self._endpoint, at(invitation.registry.nearest(name)), invitation.lost_seconds
        )
        self._nursery = Nursery(self._endpoint, self._look_at_roles, zygote)
        self._lease = Lease.create()
        self._listeners: dict[str, tuple[socket.socket, socket.socket]] = {}
        self._started: dict[str, int] = {}
        """Role -> the newest incarnation that was started or stopped here."""
        self._main: dict[str, Any] = {}
        self._sizes: list[int] = []
        self._arena: int | None = None
        self._loading: Kept[Prepared] | None = None
        self._living: dict[str, tuple[int, int]] = {}
        """Role -> (incarnation, process id), as the coordinator knows it."""
        self._notes: list[Note] = []
        """What the coordinator has not yet said that it has heard."""
        self._first_note = 0
        self._ended = False

    # the activity

    def serve(self) -> None:
        """Work until the coordinator says that it is over, or is not heard of any more; then end every role."""
        try:
            self._join()
            beat: tuple[float, int, Future[int]] | None = None
            asked = 0.0
            while not self._ended and not self._lease.over:
                if beat is not None and beat[2].done():
                    self._take_answer(*beat)
                    beat = None
                now = time.monotonic()
                if beat is None and (self._notes or now >= asked + self._beat_seconds):
                    asked, count = now, len(self._notes)
                    beat = asked, count, self._registry.call(
                        Registry.beat, self._name, self._first_note, list(self._notes)
                    )  # fmt: skip
                self._endpoint.poll(max(0.001, min(self._beat_seconds, asked + self._beat_seconds - now)))
        except ChannelError:
            return  # given up, or nobody is there
        finally:
            self._nursery.close_zygote()  # at once, as kill -9 would
            self._nursery.close()
            self._endpoint.close()
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.close()

    @property
    def _beat_seconds(self) -> float:
        return self._invitation.lost_seconds / BEATS

    def _join(self) -> None:
        introduction = Introduction(self._name, self._place, versions())
        until = time.monotonic() + JOIN_SECONDS
        while True:
            asked = time.monotonic()
            try:
                self._registry.call(Registry.join, introduction).result()
                break
            except (PeerLost, DeadlineExceeded):
                if time.monotonic() > until:
                    raise
                self._endpoint.poll(0.1)
        self._lease.renew(asked + LEASE_SHARE * self._invitation.lost_seconds, 0)

    def _take_answer(self, asked: float, count: int, answer: Future[int]) -> None:
        """The coordinator has answered a beat, or will not. Raises Fenced when it has given this host up."""
        try:
            moves = answer.result()
        except (PeerLost, DeadlineExceeded):
            return  # the notes come with the next one
        self._lease.renew(asked + LEASE_SHARE * self._invitation.lost_seconds, moves)
        self._first_note += count
        del self._notes[:count]

    def _look_at_roles(self) -> None:
        """Note which roles have begun and which have ended; give the outcome of loading to who waits for it."""
        nursery = self._nursery
        living = {
            role: (nursery.alive[role], pid) for role, pid in nursery.processes.items() if role in nursery.alive
        }  # fmt: skip
        for death in nursery.deaths():
            self._notes.append(Note(death.role, death.incarnation, 0, death.reason, death.failure))
        for role, (incarnation, _) in self._living.items():
            if living.get(role, (-1, 0))[0] != incarnation:
                self._notes.append(Note(role, incarnation, 0))
        for role, (incarnation, pid) in living.items():
            if self._living.get(role) != (incarnation, pid):
                self._notes.append(Note(role, incarnation, pid))
        self._living = living
        if self._loading is not None and nursery.loaded is not None:
            failure = nursery.loaded.failure
            self._loading.keep(Prepared(nursery.loaded.description, b"" if failure is None else pickle.dumps(failure)))
            self._loading = None

    # what the coordinator may ask

    @exported
    def here(self) -> None:
        """Another host tries whether it can call this one."""

    @exported
    def reach(self, others: list[Place]) -> Promise[list[str]]:
        """Call other hosts; the answer is for each why it could not be called, or nothing."""
        wire, told = self._invitation.wire, Kept[list[str]](self._endpoint)
        seconds = wire.connect_seconds + self._invitation.lost_seconds
        peers: list[Peer[Host]] = [Peer(self._endpoint, at(place.nearest(self._name)), seconds) for place in others]
        answers = [peer.call(Host.here) for peer in peers]

        def errand() -> bool:
            if not all(answer.done() for answer in answers):
                return False
            told.keep([_why_not(answer) for answer in answers])
            return True

        self._endpoint.attend(errand)
        return told

    @exported
    def announce(self, main: dict[str, Any], sizes: list[int]) -> None:
        """A job is about to be brought: how to import the user's script, and the sizes of the job's buffers."""
        script = main.get("init_main_from_path")
        if script is not None and not Path(script).exists():
            raise NotReady(f"host {self._name} has no file {script}, the script that was started")
        for name in ("dir", "orig_dir"):
            if name in main and not Path(main[name]).is_dir():
                del main[name]
        main["sys_path"] = path_here(main.get("sys_path", []), sys.path)
        self._main, self._sizes, self._arena = main, sizes, new_arena(sizes)

    @exported
    def take(self, start: int, part: torch.Tensor) -> None:
        """Some bytes of the job, uint8 of shape (k,), which belong at `start` of its arena."""
        assert self._arena is not None
        write(self._arena, start, frames.bytes_of(part))

    @exported
    def load(self) -> Promise[Prepared]:
        """All of the job has been brought: prepare it in a new zygote."""
        assert self._arena is not None
        loading: Kept[Prepared] = Kept(self._endpoint)
        self._loading = loading
        self._nursery.load(self._main, self._sizes, self._arena)
        self._arena = None
        return loading

    @exported
    def start(self, role: str, incarnation: int, payload: bytes, listens: bool) -> Place | None:
        """Fork a role; `payload` is its pickled `birth`. Asking again changes nothing. Returns where it answers."""
        if listens and role not in self._listeners:
            self._listeners[role] = listen(role), listen_over_tcp(self._address)
        listeners = self._listeners.get(role, ())
        if self._started.get(role, -1) < incarnation:
            self._nursery.stop(role)  # an older one: what was to stop it may still be on its way
            self._started[role] = incarnation
            descriptors = self._lease.descriptor, *(listener.fileno() for listener in listeners)
            self._nursery.start(role, incarnation, payload, descriptors)
        return Place(self._name, *map(name_of, listeners)) if listeners else None

    @exported
    def stop(self, role: str, incarnation: int) -> None:
        """End this incarnation of a role; not a death. Asking again changes nothing."""
        # What was to start it may still be on its way, over a connection that broke.
        self._started[role] = max(incarnation, self._started.get(role, -1))
        if self._nursery.alive.get(role) == incarnation:
            self._nursery.stop(role)

    @exported
    def signal(self, role: str, number: int) -> None:
        """Send a role a signal, by script."""
        self._nursery.signal(role, number)

    @exported
    def sees(self, path: str, content: bytes) -> bool:
        """Whether this host finds that content in that file."""
        try:
            return Path(path).read_bytes() == content
        except OSError:
            return False

    @exported
    def end(self) -> None:
        """The job is over."""
        self._ended = True
