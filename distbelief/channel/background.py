# SPDX-License-Identifier: Apache-2.0
"""A thread that polls an endpoint while its owner computes.

Who waits polls himself meanwhile: what arrives would otherwise pass from one thread to another, which takes longer than
a small call. While somebody waits the thread is not even woken: it sleeps on an epoll of its own, which then does not
watch the endpoint's.
"""

import select
import threading
from collections.abc import Callable
from typing import Any, final

import torch

from distbelief.channel.watch import Watch

_ROUND_SECONDS = 0.2
"""How often the thread looks whether it is to end."""
_OWNER_SECONDS = 0.5
"""The longest round of who waits: other threads of the owner may have begun something meanwhile that takes time."""
_OTHERS_SECONDS = 0.05
"""How often who waits looks himself while another thread of the owner polls."""
_END_SECONDS = 1.0
"""How long the end waits at most for another thread of the owner that polls."""


@final
class Background:
    """The thread of one endpoint.

    `sockets` is readable when one of the endpoint's is ready, `poll` is its round, which waits for that at most so many
    seconds, and `patience` says how long it may be put off. `lock` is held by whoever uses the connections.
    """

    def __init__(
        self, sockets: Watch[Any], poll: Callable[[float], object], patience: Callable[[], float],
        lock: threading.RLock,
    ) -> None:  # fmt: skip
        self._sockets, self._poll, self._patience, self._lock = sockets, poll, patience, lock
        self._polled = threading.Condition(lock)
        self._owner_polls = False
        self._ended = False
        self._epoll = select.epoll()
        self._epoll.register(sockets, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="distbelief-channel", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread."""
        return threading.current_thread() is self._thread

    def wait(self, seconds: float, there: Callable[[], bool]) -> None:
        """The owner waits up to `seconds` for something to happen; not at all where what he awaits is `there`."""
        with self._lock:
            if there():  # it may have come while this thread waited for the lock
                return
            if self._owner_polls or self._ended:
                self._polled.wait(min(seconds, _OTHERS_SECONDS))
                return
            self._owner_polls = True
            self._epoll.unregister(self._sockets)
        try:
            self._poll(min(seconds, _OWNER_SECONDS))
        finally:
            with self._lock:
                self._epoll.register(self._sockets, select.EPOLLIN)
                self._owner_polls = False
                self._polled.notify_all()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while not self._ended:
            self._epoll.poll(min(_ROUND_SECONDS, self._patience()))
            with self._lock:
                if not self._owner_polls:
                    self._poll(0.0)
                    self._polled.notify_all()

    def end(self, wake: Callable[[], None]) -> None:
        """End the thread, and the poll of another one that waits; `wake` makes either look."""
        with self._lock:
            self._ended = True
            wake()
            self._polled.wait_for(lambda: not self._owner_polls, _END_SECONDS)
        self._thread.join()
        self._epoll.close()
