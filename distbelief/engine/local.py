# SPDX-License-Identifier: Apache-2.0
"""The embedded engine: every role is a process of this machine, forked from one zygote.

The coordinator lives in the user's process and polls; a role's process polls whenever the role waits. Listening
sockets are made here and handed to roles, so an address outlives the process that answers at it: a call to a role that
is being replaced waits in the socket's backlog. Unix sockets use the abstract namespace, TCP the loopback address;
neither leaves a file.
"""

import functools
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distbelief.channel.authenticate import new_key
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.peer import at
from distbelief.channel.place import Address
from distbelief.cluster import TransportName
from distbelief.engine.base import COORDINATOR, Death, Faults
from distbelief.engine.home import ProcessHome, life_of
from distbelief.engine.listener import LOOPBACK, listen, listen_over_tcp, name_of
from distbelief.engine.nursery import Nursery
from distbelief.engine.pickles import Pickler, pack
from distbelief.engine.script import Script
from distbelief.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True)
class Wiring:
    """What every process of one job knows."""

    key: bytes
    addresses: dict[str, Address]
    faults: Faults
    own_cores: frozenset[str]
    """Names of the roles that have a core of their own."""


def _birth(
    name: str, incarnation: int, wiring: Wiring, factory: Callable[..., Any], arguments: tuple[Any, ...],
    descriptors: list[int],
) -> Callable[[], None]:  # fmt: skip
    """What a fork does first: build the role on the listeners it was given, and return the role's life."""
    listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    endpoint = Endpoint(wiring.key, listeners=listeners, own_core=name in wiring.own_cores)
    role = factory(LocalHome(name, incarnation, wiring, endpoint), *arguments)
    return life_of(role, endpoint, over_tcp=not isinstance(wiring.addresses[COORDINATOR], str))


class LocalHome(ProcessHome):
    """A role's process, where every role has had its address from the beginning."""

    def __init__(self, name: str, incarnation: int, wiring: Wiring, endpoint: Endpoint) -> None:
        super().__init__(
            name, incarnation, endpoint, lambda role: at(wiring.addresses[role]),
            address=LOOPBACK, slowness=wiring.faults.slow.get(name, 1.0),
        )  # fmt: skip


class LocalEngine(LocalHome):
    """Starts, watches and ends the processes of one job.

    `listening` names the roles that answer calls, `own_cores` those that have a core of their own.
    """

    def __init__(
        self,
        listening: Sequence[str],
        *,
        transport: TransportName = "shared_memory",
        faults: Faults | None = None,
        own_cores: Iterable[str] = (),
    ) -> None:
        names = (COORDINATOR, *listening)
        self._listeners: dict[str, socket.socket] = {}
        try:
            for name in names:
                self._listeners[name] = listen_over_tcp() if transport == "tcp" else listen(name)
        except OSError as error:
            for listener in self._listeners.values():
                listener.close()
            raise ConfigurationError(
                f"there are no sockets for {len(listening):,} shards: {error.strerror}",
                hint="use fewer shards, or allow this process more open files (ulimit -n)",
            ) from error
        addresses = {name: name_of(listener) for name, listener in self._listeners.items()}
        self._wiring = Wiring(new_key(), addresses, faults or Faults(), frozenset(own_cores))
        endpoint = Endpoint(self._wiring.key, listeners=[self._listeners[COORDINATOR]])
        super().__init__(COORDINATOR, 0, self._wiring, endpoint)
        self._nursery = Nursery(endpoint)
        self._script = Script(self._wiring.faults)

    @property
    def processes(self) -> dict[str, int]:
        """Process id of each live role, and of the zygote."""
        return self._nursery.processes

    def answer(self, role: object) -> None:
        """Let `role` answer calls to the coordinator."""
        self._endpoint.answer_with(role)

    def load(
        self, prepare: Callable[..., tuple[Any, T]], *arguments: Any, attempt: Callable[[Any], object] | None = None
    ) -> T:
        """Pickle the job into a new zygote and prepare it there."""
        luggage = pack(prepare, arguments, attempt, here=True)
        self._nursery.load(luggage.main, luggage.sizes, luggage.arena())
        while self._nursery.loaded is None:
            self._endpoint.take_in(1.0)
        loaded = self._nursery.loaded
        if loaded.failure is not None:
            self.close()
            raise loaded.failure
        result: T = pickle.loads(loaded.description)
        return result

    def start(self, name: str, incarnation: int, factory: Callable[..., Any], *arguments: Any) -> None:
        """Fork a process for the role."""
        birth = functools.partial(_birth, name, incarnation, self._wiring, factory, arguments)
        listener = self._listeners.get(name)
        self._script.begin(time.monotonic())
        self._nursery.start(
            name, incarnation, Pickler.dumps(birth), (listener.fileno(),) if listener is not None else ()
        )

    def stop(self, name: str) -> None:
        """Kill the role's process; not a death."""
        self._nursery.stop(name)

    def deaths(self) -> list[Death]:
        """Roles that ended since last asked; also where scripted kills happen."""
        for role, number in self._script.due(time.monotonic(), self.processes):
            self._nursery.signal(role, number)
        return self._nursery.deaths()

    def close(self) -> None:
        """End every process and close every socket."""
        self._nursery.close()
        self.leave()
        for listener in self._listeners.values():
            listener.close()
