# SPDX-License-Identifier: Apache-2.0
"""What the simulated engine is made of: its times, its futures, and activities that run one at a time."""

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from distbelief.errors import ChannelError, DeadlineExceeded

if TYPE_CHECKING:
    from distbelief.engine.simulated import SimulatedEngine


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long things take in the simulation, in seconds."""

    latency_seconds: float = 50e-6
    """One way of a call or an answer, without its tensors."""
    bytes_per_second: float = 1e12
    """Bandwidth of tensors between any two roles; the default is shared memory, where they do not travel."""
    serving_bytes_per_second: float = 10e9
    """How fast a shard works through the tensors of a call: one fused optimizer pass measured 9.7e9."""
    example_seconds: float = 125e-6
    """Forward and backward for one example."""
    jitter: float = 0.3
    """Each time is multiplied by a gamma-distributed factor of mean 1 and this standard deviation: 0 is a clockwork, 1
    (exponential) makes the order of the replicas' pushes random."""
    start_seconds: float = 0.2
    """From the start of a role until it works."""
    death_seconds: float = 0.05
    """From a death until others notice."""


class Killed(BaseException):
    """Ends the thread of an activity that was killed."""


@final
class Answer:
    """A future of the simulation."""

    def __init__(self, engine: "SimulatedEngine", deadline: float, what: str) -> None:
        self._engine, self.deadline, self._what = engine, deadline, what
        self._value: Any = None
        self._error: Exception | None = None
        self._settled = False
        self.waiter: Activity | None = None
        self._then: list[Callable[[], None]] = []

    def settle(self, value: Any = None, error: Exception | None = None) -> None:
        """Complete the future, unless it is done already."""
        if self._settled:
            return
        self._value, self._error, self._settled = value, error, True
        if self.waiter is not None:
            self._engine.resume(self.waiter)
            self.waiter = None
        for action in self._then:
            self._engine.at(self._engine.clock, action)

    def keep(self, value: Any) -> None:
        """Complete a promise."""
        self.settle(value)

    def then(self, action: Callable[[], None]) -> None:
        """Do something as soon as it is complete and the scheduler is free."""
        self._then.append(action)

    def done(self) -> bool:
        """Whether the answer is here, or its deadline has passed."""
        if not self._settled and self._engine.now() >= self.deadline:
            self.settle(error=DeadlineExceeded(f"{self._what} was not answered in time"))
        return self._settled

    def wait(self, seconds: float) -> bool:
        """Wait for the answer, at most so long."""
        if not self.done():
            self._engine.wait(self, self._engine.clock + seconds)
        return self.done()

    def result(self) -> Any:
        """Wait for the answer."""
        if not self.done():
            self._engine.wait(self, self.deadline)
        if self._error is not None:
            raise self._error
        return self._value


def held_lock() -> threading.Lock:
    """A baton that somebody will hand over: acquiring waits for the release. A tenth of the time of a Semaphore."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@final
class Activity:
    """A role's own activity: a thread that runs only while it holds the baton."""

    def __init__(
        self, engine: "SimulatedEngine", life: Callable[[], None], failed: Callable[[str, str | None], None]
    ) -> None:
        self._engine, self._life, self._failed = engine, life, failed
        self._turn = held_lock()
        self.killed = self.over = False
        self._thread = threading.Thread(target=self._run, name="distbelief-simulated", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._turn.acquire()
        torch.set_num_threads(1)
        try:
            self._life()
        except Killed:
            pass
        except ChannelError as error:
            self._failed(f"{type(error).__name__}: {error}", None)
        except BaseException as error:
            self._failed("exit code 1", "".join(traceback.format_exception(error)))
        self.over = True
        self._engine.baton.release()

    def run_until_it_waits(self) -> None:
        """Called by the scheduler: hand over the baton and take it back."""
        if self.over:
            return
        self._engine.current = self
        self._turn.release()
        self._engine.baton.acquire()
        self._engine.current = None

    def wait(self) -> None:
        """Called by the activity: hand the baton back until resumed."""
        if self.killed:
            raise Killed  # unwinding, it must not wait for anything
        self._engine.baton.release()
        self._turn.acquire()
        if self.killed:
            raise Killed

    def kill(self) -> None:
        """Called by the scheduler: unwind the thread."""
        self.killed = True
        self.run_until_it_waits()
        self._thread.join()
