# SPDX-License-Identifier: Apache-2.0
"""A role, as its callers see it, wherever it answers at the moment."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import torch

from distbelief.channel.base import Future, Remote, Signature
from distbelief.channel.connection import Connection
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import PendingCall, Settled
from distbelief.channel.place import Address
from distbelief.errors import ChannelError

R = TypeVar("R")


def at(address: Address) -> Callable[[], Future[Address]]:
    """What a peer is located by that always answers at the same address."""
    return lambda: Settled(address)


@final
@dataclass(eq=False)
class Peer(Remote[R]):
    """A role that `locate` finds: asked on the first call, and again after the connection broke.

    Calls made before the role is found wait for it, in their order and within their deadlines.
    """

    endpoint: Endpoint
    locate: Callable[[], Future[Address]]
    deadline_seconds: float = 60.0
    _connection: Connection | None = None
    _address: Address | None = None
    _sought: Future[Address] | None = None
    _waiting: list[tuple[PendingCall, bytes]] = field(default_factory=list)

    def start(self, signature: Signature, fields: bytes, tensors: list[torch.Tensor]) -> Future[Any]:
        """Send a call over the connection of this peer, making one if there is none."""
        pending = PendingCall(self.endpoint, signature, tensors, self.deadline_seconds)
        with self.endpoint.lock:
            if self._connection is not None and not self._connection.closed:
                self.endpoint.start(self._connection, pending, fields)
                return pending
            self._waiting.append((pending, fields))
            if self._sought is None:
                self._sought = self.locate()
                if not self._found():
                    self.endpoint.attend(self._found)
        return pending

    def seek_again(self) -> None:
        """The role may live elsewhere now; where it does, the connection to its old place ends."""
        connection = self._connection
        if connection is None or connection.closed:
            return
        sought, before = self.locate(), self._address

        def compare() -> bool:
            if connection.closed:
                return True
            if not sought.done():
                return False
            with contextlib.suppress(ChannelError):
                if sought.result() != before:
                    self.endpoint.end(connection, "the role lives elsewhere now")
            return True

        self.endpoint.attend(compare)

    def _found(self) -> bool:
        """Whether the search is over: the waiting calls have gone out or failed, or all were given up."""
        assert self._sought is not None
        self._waiting = [(pending, fields) for pending, fields in self._waiting if not pending.settled]
        if self._waiting and not self._sought.done():
            return False
        sought, self._sought = self._sought, None
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return True
        try:
            self._address = sought.result()
            self._connection = self.endpoint.connect(self._address)
        except ChannelError as error:
            for pending, _ in waiting:
                pending.settle(error=error)
            return True
        for pending, fields in waiting:
            self.endpoint.start(self._connection, pending, fields)
        return True
