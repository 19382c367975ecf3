# SPDX-License-Identifier: Apache-2.0
"""How connections come to a second stream: their caller asks for it once, and both ends join it to the first.

    calling   -> accepting  on a connection like any other, proved in the same way, Join with the first one's identity
    accepting -> calling    the same Join; from then on the caller may send wide frames on the first and is answered so

The identity is the challenge of the first one's proof: both of its ends know it.
"""

import functools
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import final

from distbelief.channel import frames
from distbelief.channel.connection import Connection
from distbelief.channel.frames import Join
from distbelief.channel.place import Address
from distbelief.channel.second_stream import StreamThread
from distbelief.channel.secure import SecureLink
from distbelief.errors import PeerLost, ProtocolError


@final
class Widening:
    """Second streams of the connections of one process. `wake` is called when there is news of one, from any thread.

    `permit` as an Endpoint's.
    """

    def __init__(self, wake: Callable[[], None], permit: Callable[[], None]) -> None:
        self._wake = wake
        self._thread = StreamThread(permit)
        self._news: deque[Connection] = deque()
        self._addresses: dict[Connection, Address] = {}
        """Where those lead to whose second stream has not been asked for."""
        self._seconds: dict[Connection, Connection] = {}
        """Those that are to be the second stream of others: which, of which."""

    def may_widen(self, connection: Connection, address: Address) -> None:
        """A connection was made to this address."""
        self._addresses[connection] = address

    def ask(self, connection: Connection, connect: Callable[[Address], Connection]) -> tuple[Connection, bytes] | None:
        """Begin to make a second stream: the connection that is to be it, and what is to be said there.

        Nothing where that cannot be, or has been tried: one stream has to do.
        """
        if not connection.proved or connection not in self._addresses:
            return None
        try:
            second = connect(self._addresses.pop(connection))
        except (PeerLost, OSError):
            return None
        self._seconds[second] = connection
        self._addresses.pop(second)
        return second, frames.encode(Join(connection.identity))

    def first_of(self, second: Connection, join: Join, connections: Collection[Connection]) -> Connection:
        """Whose second stream one of the `connections` is to be.

        Raises PeerLost when that has ended, ProtocolError when it cannot be one.
        """
        if second.shares_memory or second.second is not None:
            raise ProtocolError("a peer offered a connection as a second stream that cannot be one")
        known = [self._seconds[second]] if second in self._seconds else connections
        for first in known:
            alive = first in connections and first is not second and first.proved and first.second is None
            if alive and first.identity == join.identity:
                return first
        raise PeerLost("the connection whose second stream this was to be has ended")

    def asked_for(self, second: Connection) -> bool:
        """Whether it is this side that asked for it."""
        return second in self._seconds

    def widen(self, first: Connection, link: socket.socket | SecureLink) -> None:
        """From now on `first` has a second stream, by this socket."""
        first.second = self._thread.serve(link, functools.partial(self._tell, first))

    def _tell(self, connection: Connection) -> None:
        self._news.append(connection)
        self._wake()

    def news(self) -> Iterator[Connection]:
        """Connections whose second stream has received what it was to receive, or has broken."""
        while self._news:
            yield self._news.popleft()

    def forget(self, connection: Connection) -> list[Connection]:
        """A connection has ended, or was one no more; those that were to be its second stream are of no use now."""
        self._addresses.pop(connection, None)
        self._seconds.pop(connection, None)
        return [second for second, first in self._seconds.items() if first is connection]

    def close(self) -> None:
        """End the thread, after all connections."""
        self._thread.close()
