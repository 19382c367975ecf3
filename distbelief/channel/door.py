# SPDX-License-Identifier: Apache-2.0
"""Who comes in: the listening sockets of one process, strangers that have yet to prove themselves, and who was refused.

Strangers cost little and not for long: there are a bounded number of them, each for a bounded time, and each can make
us hold no more than one read of bytes.
"""

import contextlib
import errno
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import final

from distbelief.channel.connection import Connection
from distbelief.errors import AuthenticationError, ChannelError, ProtocolError

STRANGERS = 256
"""Connections that may be open without having proved themselves; one more ends the oldest of them."""
STRANGER_SECONDS = 60.0
"""How long a caller may take to prove himself: as long as an honest one that computes meanwhile would wait for an
answer."""
PAUSE_SECONDS = 0.01
"""Until a caller is asked in again for whom there was no descriptor."""

NO_KEY = "did not prove that they are of this job"
MALFORMED = "sent what is no message"
TRUNCATED = "left in the midst of proving themselves"
TOO_MANY = "were more strangers than are let wait"
TOO_SLOW = "did not prove themselves in time"


@final
class Door:
    """Accepts callers and counts those that were refused.

    `admit` makes a connection of a socket, `end` ends one.
    """

    def __init__(
        self, admit: Callable[[socket.socket], Connection], end: Callable[[Connection, ChannelError], None]
    ) -> None:
        self._admit, self._end = admit, end
        self.strangers: deque[tuple[float, Connection]] = deque()
        """(time of arrival, connection), oldest first, whom `sweep` may have to end; those that proved themselves
        meanwhile are let be."""
        self.refused: Counter[str] = Counter()
        """How many connections were refused, by reason."""

    def accept(self, listener: socket.socket) -> None:
        """Take one caller in; where there is no descriptor for him, he waits at the listener."""
        with contextlib.suppress(ConnectionError, BlockingIOError):
            try:
                link, _ = listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if self.strangers:
                    self._end_oldest(TOO_MANY)
                else:
                    time.sleep(PAUSE_SECONDS)  # the listener is ready again at once
                return
            self.strangers.append((time.monotonic(), self._admit(link)))
            if len(self.strangers) > STRANGERS:
                self._end_oldest(TOO_MANY)

    def sweep(self, now: float) -> None:
        """End strangers whose time is over."""
        while self.strangers and (self.strangers[0][1].proved or now - self.strangers[0][0] > STRANGER_SECONDS):
            self._end_oldest(TOO_SLOW)

    def _end_oldest(self, reason: str) -> None:
        _, connection = self.strangers.popleft()
        if not connection.proved and not connection.closed:
            self.refused[reason] += 1
            self._end(connection, AuthenticationError(f"the caller was one of those who {reason}"))

    def count(self, connection: Connection, error: ChannelError) -> None:
        """A connection is about to be ended by `error`; count it if that is a refusal."""
        if isinstance(error, ProtocolError):
            self.refused[MALFORMED] += 1
        elif isinstance(error, AuthenticationError):
            self.refused[NO_KEY] += 1
        elif connection.half_proved:
            self.refused[TRUNCATED] += 1

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self.strangers = deque(item for item in self.strangers if item[1] is not connection)
