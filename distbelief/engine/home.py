# SPDX-License-Identifier: Apache-2.0
"""A role's process, as the role sees it: what all engines have in common whose roles are processes."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from distbelief.channel import memory
from distbelief.channel.base import Future, Promise, Remote, exported_methods
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import BackgroundWork, Kept
from distbelief.channel.peer import Peer
from distbelief.channel.place import Address

R = TypeVar("R")
T = TypeVar("T")

Locate = Callable[[str], Callable[[], Future[Address]]]
"""Of a role's name: what finds the role, at each connection anew."""


class ProcessHome:
    """One process and its endpoint. `locate` finds other roles; `slowness` is how many times longer computing takes.

    Where roles may move, `moves` says how many have done so.
    """

    def __init__(
        self, name: str, incarnation: int, endpoint: Endpoint, locate: Locate, *,
        address: str, slowness: float = 1.0, moves: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.incarnation, self.address = name, incarnation, address
        self._endpoint, self._locate, self._slowness = endpoint, locate, slowness
        self._peers: weakref.WeakSet[Peer[Any]] = weakref.WeakSet()
        self._second: ThreadPoolExecutor | None = None
        """Does background work; begun when there is any."""
        if moves is not None:
            endpoint.attend(self._follower(moves))

    def _follower(self, moves: Callable[[], int]) -> Callable[[], bool]:
        """Looks after each round whether roles have moved, and where those are now that are called from here.

        A host that counts as lost may keep its connections: its kernel goes on when nothing else does.
        """
        seen = 0

        def follow() -> bool:
            nonlocal seen
            if (now := moves()) != seen:
                seen = now
                for peer in list(self._peers):
                    peer.seek_again()
            return False

        return follow

    @property
    def strangers(self) -> Mapping[str, int]:
        """How many callers were refused here, by what they did."""
        return self._endpoint.refused

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait and answer calls meanwhile."""
        until = time.monotonic() + seconds
        self._endpoint.take_in(max(0.0, seconds))
        while (left := until - time.monotonic()) > 0:
            self._endpoint.take_in(left)

    def find(self, role: str, kind: type[R], deadline_seconds: float = 60.0) -> Remote[R]:
        """A reference to another role."""
        peer: Peer[R] = Peer(self._endpoint, self._locate(role), deadline_seconds)
        self._peers.add(peer)
        return peer

    @contextmanager
    def computing(self, examples: int) -> Iterator[None]:
        """Real computing takes its time; a role slowed by script waits after it."""
        begun = time.thread_time()  # not the process's: its second thread reads data
        yield
        if self._slowness > 1.0:
            self.sleep((self._slowness - 1.0) * (time.thread_time() - begun))

    def background(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the role's second thread: one work after another, in the order given."""
        if self._second is None:
            self._second = ThreadPoolExecutor(1, "distbelief-background", lambda: torch.set_num_threads(1))
        return BackgroundWork(work, self._endpoint, self._second.submit)

    def promise(self) -> Promise[Any]:
        """A future that this role completes itself."""
        return Kept(self._endpoint)

    def lend(self, out: torch.Tensor, own: torch.Tensor) -> None:
        """Another host is sent the memory itself; a buffer of this host is filled."""
        self._endpoint.desk.lending.lend(out, own)

    def end_loans(self, own: torch.Tensor) -> None:
        """What another host has still to be sent is copied."""
        self._endpoint.desk.lending.end(own)

    def allocate(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that other processes can map."""
        return memory.allocate(length, dtype)

    def leave(self) -> None:
        """Close the endpoint and give the second thread back."""
        if self._second is not None:
            self._second.shutdown(wait=False, cancel_futures=True)
            self._second = None
        self._endpoint.close()


def life_of(role: Any, endpoint: Endpoint, *, over_tcp: bool) -> Callable[[], None]:
    """What a role's process does from its birth on: the role's own activity, or answering. `over_tcp`: calls may be."""
    endpoint.answer_with(role)
    if over_tcp and not exported_methods(type(role)):
        endpoint.background()

    def serve() -> None:
        while True:
            endpoint.poll(60.0)

    life: Callable[[], None] = getattr(role, "run", serve)
    return life
