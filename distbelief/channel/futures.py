# SPDX-License-Identifier: Apache-2.0
"""Futures of one process: the answer to a call over a connection, a promise, and work that a thread does beside."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

import msgspec
import torch

from distbelief.channel.base import RAISED_AS_IS, Signature
from distbelief.channel.codec import Part
from distbelief.channel.connection import Connection
from distbelief.channel.frames import Answer, Failure
from distbelief.errors import ProtocolError, RemoteError

if TYPE_CHECKING:
    from distbelief.channel.endpoint import Endpoint

T = TypeVar("T")
_RAISED_AS_IS = {kind.__name__: kind for kind in RAISED_AS_IS}


@final
class PendingCall:
    """A future whose answer is on its way over a connection."""

    def __init__(self, endpoint: "Endpoint", signature: Signature, tensors: list[torch.Tensor], seconds: float) -> None:
        self.signature = signature
        self.tensors = tensors
        """The call's tensors, kept alive and untouched until it is done."""
        self.parts: Sequence[Part] = ()
        """The memory of those of them that travel in the body of the answer."""
        self.connection: Connection | None = None
        self._endpoint = endpoint
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._value: Any = None
        self._error: Exception | None = None
        self.settled = False

    def take(self, header: Answer | Failure) -> None:
        """Complete the future with what the callee says."""
        if isinstance(header, Failure):
            kind = _RAISED_AS_IS.get(header.kind)
            self.settle(error=kind(header.message) if kind else RemoteError(header.message))
            return
        try:
            self.settle(self.signature.answer_decoder.decode(header.value))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.settle(error=ProtocolError(f"answer to {self.signature.name}: {error}"))

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        """Complete the future, unless it is done already."""
        if self.settled:
            return
        self._value, self._error, self.settled = value, error, True
        self.tensors, self.parts = [], ()

    def done(self) -> bool:
        """Whether the answer is here, taking in what has arrived."""
        if not self.settled:
            self._endpoint.take_in(0.0)
            if not self.settled and time.monotonic() > self._deadline:
                self._endpoint.give_up(self, f"{self.signature.name} was not answered within {self._seconds:g} s")
        return self.settled

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long."""
        until = min(self._deadline, time.monotonic() + seconds)
        while not self.settled and (left := until - time.monotonic()) > 0:
            self._endpoint.take_in(min(0.5, left), lambda: self.settled)
        return self.done()

    def result(self) -> Any:
        """Wait for the answer."""
        while not self.settled:
            self.wait(self._seconds)
        if self._error is not None:
            raise self._error
        return self._value


@final
@dataclass(frozen=True)
class Settled(Generic[T]):
    """A future that has been done from the beginning."""

    value: T

    def done(self) -> bool:
        """It is."""
        return True

    def wait(self, seconds: float) -> bool:
        """There is nothing to wait for."""
        return True

    def result(self) -> T:
        """The value."""
        return self.value


@final
class Kept(Generic[T]):
    """A promise of this process: see `Promise`."""

    def __init__(self, endpoint: "Endpoint") -> None:
        self._endpoint = endpoint
        self._values: list[T] = []

    def keep(self, value: T) -> None:
        """Complete the future, unless it is done already."""
        if not self._values:
            self._values.append(value)
            self._endpoint.wake()

    def done(self) -> bool:
        """Whether it is kept."""
        return bool(self._values)

    def wait(self, seconds: float) -> bool:
        """Wait until it is kept, at most so long."""
        until = time.monotonic() + seconds
        while not self._values and (left := until - time.monotonic()) > 0:
            self._endpoint.take_in(left, lambda: bool(self._values))
        return bool(self._values)

    def result(self) -> T:
        """Wait until it is kept."""
        while not self.wait(1.0):
            continue
        return self._values[0]


@final
class BackgroundWork:
    """A future of work that a thread does beside the role; an exported method may return it as its answer.

    `begin` is handed a function and has a thread run it.
    """

    def __init__(
        self, work: Callable[[], Any], endpoint: "Endpoint", begin: Callable[[Callable[[], None]], object]
    ) -> None:
        self._work = work
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._endpoint = endpoint
        self._finished = threading.Event()
        begin(self._run)

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:  # SystemExit too: whoever waits must hear of it
            self._error = error
        self._finished.set()
        self._endpoint.wake()

    def done(self) -> bool:
        """Whether the work has ended."""
        return self._finished.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait for the work to end, at most so long."""
        until = time.monotonic() + seconds
        while not self._finished.is_set() and (left := until - time.monotonic()) > 0:
            self._endpoint.take_in(min(0.1, left), self._finished.is_set)
        return self._finished.is_set()

    def result(self) -> Any:
        """Wait for the outcome; raises what the work raised."""
        while not self.wait(1.0):
            continue
        if self._error is not None:
            raise self._error
        return self._outcome
