# SPDX-License-Identifier: Apache-2.0
"""Who is where, and who is still there: what the hosts of a cluster tell the coordinator, and roles ask of it.

It answers in a thread of its own, since a coordinator that is busy must not look dead to its hosts. It only notes what
it hears; what follows from it, the coordinator's engine decides.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import final

import msgspec

from distbelief.channel.base import Future, Promise, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import Kept
from distbelief.channel.place import Address, Place
from distbelief.errors import Fenced


@final
class Introduction(msgspec.Struct, array_like=True, frozen=True):
    """What a host says of itself when its keeper is up."""

    host: str
    place: Place
    """Of the keeper."""
    versions: dict[str, str]
    """Of what must be the same on all hosts."""


@final
class Note(msgspec.Struct, array_like=True, frozen=True):
    """One thing that happened on a host: a role has a process (`pid`), or has ended without being told to (0)."""

    role: str
    incarnation: int
    pid: int
    reason: str = ""
    failure: str | None = None


@dataclass
class HostRecord:
    """What is known of one host."""

    introduction: Introduction
    heard: float
    taken: int = 0
    """How many of its notes have arrived."""
    lost: bool = False
    notes: list[Note] = field(default_factory=list)
    """Those that the engine has not seen."""


@final
class Registry:
    """The role. `endpoint` answers for it; everything else may be called from the coordinator's thread."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._hosts: dict[str, HostRecord] = {}
        self._places: dict[str, Place] = {}
        self._latest: dict[str, Place] = {}
        """Where each role lives or has lived."""
        self._sought: dict[str, list[Promise[Place]]] = {}
        self._moves = 0
        self._over = False

    # what keepers and roles may call

    @exported
    def join(self, introduction: Introduction) -> None:
        """A keeper is up. Raises Fenced when the job is over already."""
        with self._lock:
            if self._over:
                raise Fenced(f"host {introduction.host} has come when the job was over")
            self._hosts.setdefault(introduction.host, HostRecord(introduction, time.monotonic()))

    @exported
    def beat(self, host: str, first: int, notes: list[Note]) -> int:
        """A host is there. `first` is the number of the first of its notes, which come until they were answered.

        Returns how many roles have changed their place so far. Raises Fenced when the host was given up.
        """
        with self._lock:
            record = self._hosts.get(host)
            if record is None or record.lost:
                raise Fenced(f"host {host} was given up; its roles live elsewhere")
            record.heard = time.monotonic()
            record.notes += notes[record.taken - first :]
            record.taken = max(record.taken, first + len(notes))  # one of a broken connection may come late
            return self._moves

    @exported
    def locate(self, role: str) -> Promise[Place]:
        """Where a role lives; answered when it does."""
        promise: Promise[Place] = Kept(self._endpoint)
        self.seek(role, promise)
        return promise

    # what the engine asks

    @property
    def moves(self) -> int:
        """How many roles have changed their place so far."""
        return self._moves

    def seek(self, role: str, promise: Promise[Place]) -> None:
        """Keep the promise when it is known where the role lives."""
        with self._lock:
            place = self._places.get(role)
            if place is None:
                self._sought.setdefault(role, []).append(promise)
                return
        promise.keep(place)

    def settle(self, role: str, place: Place) -> None:
        """A role lives here now."""
        with self._lock:
            self._moves += self._latest.get(role, place) != place
            self._places[role] = self._latest[role] = place
            sought = self._sought.pop(role, [])
        for promise in sought:
            promise.keep(place)

    def unsettle(self, role: str) -> None:
        """A role lives nowhere until further notice."""
        with self._lock:
            self._places.pop(role, None)

    def joined(self) -> dict[str, Introduction]:
        """The hosts that are not lost."""
        with self._lock:
            return {name: record.introduction for name, record in self._hosts.items() if not record.lost}

    def end(self) -> dict[str, Introduction]:
        """The job is over: the hosts that are to be told. Who comes later is told when it joins."""
        with self._lock:
            self._over = True
        return self.joined()

    def hear(self) -> list[tuple[str, Note]]:
        """(host, what happened there) since last asked, in order for each host."""
        with self._lock:
            found = [(name, note) for name, record in self._hosts.items() for note in record.notes]
            for record in self._hosts.values():
                record.notes = []
            return found

    def give_up_silent(self, seconds: float) -> list[str]:
        """The hosts that have been silent for so long, from now on lost."""
        with self._lock:
            now = time.monotonic()
            silent = [name for name, record in self._hosts.items() if not record.lost and now - record.heard > seconds]
            for name in silent:
                self._hosts[name].lost = True
            return silent

    def give_up(self, host: str) -> None:
        """This host is lost."""
        with self._lock:
            self._hosts[host].lost = True


@final
class Nearest:
    """The future of an address: where a caller on `host` reaches what `place` will be."""

    def __init__(self, place: Future[Place], host: str) -> None:
        self._place, self._host = place, host

    def done(self) -> bool:
        """Whether the place is known."""
        return self._place.done()

    def wait(self, seconds: float) -> bool:
        """Wait for the place, at most so long."""
        return self._place.wait(seconds)

    def result(self) -> Address:
        """Wait for the address."""
        return self._place.result().nearest(self._host)
