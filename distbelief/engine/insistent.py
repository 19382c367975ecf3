# SPDX-License-Identifier: Apache-2.0
"""Futures made of futures: a call that is made again until it is answered, and several answers as one."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, final

from distbelief.channel.base import Future
from distbelief.engine.base import Home
from distbelief.errors import ChannelError, DeadlineExceeded, NotReady, PeerLost

T = TypeVar("T")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 0.1
"""Before a call is made again; each pause is twice as long as the one before it."""


@final
class Insistent(Generic[T]):
    """A call that is made again until it is answered: for calls whose repetition is harmless.

    It has no end of its own: how long a role may say nothing, and whether it is replaced, the coordinator decides.
    `lost` hears why it is to be made again.
    """

    def __init__(
        self, home: Home, make: Callable[[], Future[T]], lost: Callable[[ChannelError], object] = lambda error: None
    ) -> None:  # fmt: skip
        self._home, self._make, self._lost = home, make, lost
        self._again, self._pause = 0.0, FIRST_PAUSE_SECONDS
        self._future: Future[T] | None = make()
        self._value: T
        self._error: Exception | None = None
        self._settled = False

    def done(self) -> bool:
        """Whether the answer is here; makes the call again when the peer was lost."""
        if self._settled:
            return True
        if self._future is None and self._home.now() >= self._again:
            self._future = self._make()
        if self._future is not None and self._future.done():
            self._take()
        return self._settled

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long."""
        until = self._home.now() + seconds
        while not self.done() and (left := until - self._home.now()) > 0:
            if self._future is None:
                self._home.sleep(min(left, max(0.0, self._again - self._home.now())))
            else:
                self._future.wait(left)
        return self._settled

    def result(self) -> T:
        """Wait for the answer. Raises what is no loss of the peer."""
        while not self.wait(60.0):
            continue
        if self._error is not None:
            raise self._error
        return self._value

    def _take(self) -> None:
        assert self._future is not None
        try:
            self._value = self._future.result()
            self._settled = True
        except (PeerLost, DeadlineExceeded, NotReady) as error:
            self._future, self._again = None, self._home.now() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            self._lost(error)
        except Exception as error:
            self._error, self._settled = error, True


@final
class All(Generic[T]):
    """The answers of several futures, in order."""

    def __init__(self, home: Home, futures: Sequence[Future[T]]) -> None:
        self._home, self._futures = home, futures

    def done(self) -> bool:
        """Whether all are done."""
        # Each is asked, since asking makes a lost call again.
        return all([future.done() for future in self._futures])  # noqa: C419

    def outstanding(self) -> list[int]:
        """The positions of those that are not done."""
        return [position for position, future in enumerate(self._futures) if not future.done()]

    def wait(self, seconds: float) -> bool:
        """Wait for all, at most so long."""
        until = self._home.now() + seconds
        return all([future.wait(max(0.0, until - self._home.now())) for future in self._futures])  # noqa: C419

    def result(self) -> list[T]:
        """Wait for all; raises the first error."""
        return [future.result() for future in self._futures]
