# SPDX-License-Identifier: Apache-2.0
"""Which sockets of a process are ready, and whom that concerns: epoll itself, as `selectors` costs 3 us more a look."""

import contextlib
import select
from typing import Generic, TypeVar, final

T = TypeVar("T")
READABLE: int = select.EPOLLIN
WRITABLE: int = select.EPOLLOUT


@final
class Watch(Generic[T]):
    """Descriptors, and what was said of each: whom it concerns when it is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._concerned: dict[int, T] = {}

    def over(self, descriptor: int, events: int, concerned: T) -> None:
        """Look for these events, no others, from now on."""
        if descriptor in self._concerned:
            self._epoll.modify(descriptor, events)
        else:
            self._concerned[descriptor] = concerned
            self._epoll.register(descriptor, events)

    def end(self, descriptor: int) -> None:
        """Look for none any more; it may be closed already."""
        del self._concerned[descriptor]
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)

    def ready(self, seconds: float) -> list[tuple[T | None, int]]:
        """Whom it concerns and which events, as soon as there are some, at the latest after so many seconds."""
        # Looked up at once: what is served first may close a descriptor, and another one take its number.
        return [(self._concerned.get(descriptor), events) for descriptor, events in self._epoll.poll(seconds)]

    def fileno(self) -> int:
        """Readable when something is ready."""
        return self._epoll.fileno()

    def close(self) -> None:
        """End all; the descriptors are their owners'."""
        self._epoll.close()
