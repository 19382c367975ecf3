# SPDX-License-Identifier: Apache-2.0
"""A role at an address, as its callers see it."""

from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch

from distbelief.channel.base import Future, Remote, Signature
from distbelief.channel.connection import Connection
from distbelief.channel.endpoint import Address, Endpoint
from distbelief.channel.futures import PendingCall
from distbelief.errors import ChannelError

R = TypeVar("R")


@final
@dataclass(eq=False)
class Peer(Remote[R]):
    """A role at an address. Connects on the first call and again after the connection broke."""

    endpoint: Endpoint
    address: Address
    deadline_seconds: float = 60.0
    _connection: Connection | None = None

    def start(self, signature: Signature, fields: bytes, tensors: list[torch.Tensor]) -> Future[Any]:
        """Send a call over the connection of this peer, making one if there is none."""
        connection = self._connection
        if connection is None or connection.socket.fileno() < 0:
            try:
                self._connection = connection = self.endpoint.connect(self.address)
            except ChannelError as error:
                failed = PendingCall(self.endpoint, signature, [], 0.0)
                failed.settle(error=error)
                return failed
        return self.endpoint.start(connection, signature, fields, tensors, self.deadline_seconds)
