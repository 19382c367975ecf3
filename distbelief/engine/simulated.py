# SPDX-License-Identifier: Apache-2.0
"""Every role in one process, one at a time, in an order drawn from a seed, under a virtual clock.

The roles are the very ones that run on other engines, and they really compute; only time is modelled. Calls take
latency + bytes / bandwidth, a role serves one call after another, a mini-batch takes its modelled time, deaths and
hangs follow a script. The same seed gives the same events and the same parameters, bit for bit.

Exported methods run in the thread of the user, which is also the scheduler. A role's own activity has a thread to keep
its stack in, and runs only while it holds the baton; it hands the baton back exactly where it waits.
"""

import heapq
import itertools
import math
import random
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, final

import msgspec
import torch

from distbelief.channel.base import RAISED_AS_IS, Future, Promise, Remote, Signature, exported_methods
from distbelief.engine.base import COORDINATOR, Death, Faults
from distbelief.engine.listener import LOOPBACK
from distbelief.engine.pickles import SHARED
from distbelief.engine.virtual import Activity, Answer, Costs, held_lock
from distbelief.errors import (
    DistbeliefError,
    PeerLost,
    ProtocolError,
    RemoteError,
    UserCodeError,
)

R = TypeVar("R")
T = TypeVar("T")


@final
@dataclass
class _Call:
    """A call on its way."""

    signature: Signature
    fields: bytes
    tensors: list[torch.Tensor]
    answer: Answer


class SimulatedHome:
    """A role's place in the simulation."""

    def __init__(self, name: str, incarnation: int, engine: "SimulatedEngine") -> None:
        self.name, self.incarnation, self._engine = name, incarnation, engine
        self.address = LOOPBACK
        self.strangers: dict[str, int] = {}
        self.role: Any = None
        self.methods: dict[str, Callable[..., Any]] = {}
        self.alive = True
        self.activity: Activity | None = None
        self.queue: deque[_Call] = deque()
        self.serving: _Call | None = None
        self.promised: list[_Call] = []
        """Calls that the role will answer later."""

    def now(self) -> float:
        """Virtual seconds."""
        return self._engine.clock

    def sleep(self, seconds: float) -> None:
        """Wait in virtual time."""
        self._engine.wait(None, self._engine.clock + seconds)

    def find(self, role: str, kind: type[R], deadline_seconds: float = 60.0) -> Remote[R]:
        """A reference to another role."""
        return _SimulatedRemote(role, deadline_seconds, self._engine)

    @contextmanager
    def computing(self, examples: int) -> Iterator[None]:
        """Charge the modelled time of a mini-batch."""
        yield
        engine = self._engine
        hanging = engine.hangs_until(self.name) - engine.clock
        slowness = engine.faults.slow.get(self.name, 1.0)
        self.sleep(hanging + engine.jittered(examples * engine.costs.example_seconds) * slowness)

    def background(self, work: Callable[[], T]) -> Future[T]:
        """Do it at once; files take no virtual time."""
        answer = Answer(self._engine, float("inf"), "background work")
        try:
            answer.settle(work())
        except Exception as error:
            answer.settle(error=error)
        return answer

    def promise(self) -> Promise[Any]:
        """A future that this role completes itself."""
        return Answer(self._engine, math.inf, "a promise")

    def lend(self, out: torch.Tensor, own: torch.Tensor) -> None:
        """Nothing travels: filled at once."""
        out.copy_(own)

    def end_loans(self, own: torch.Tensor) -> None:
        """There are none."""

    def allocate(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory."""
        return torch.zeros(length, dtype=dtype)


@final
class _SimulatedRemote(Remote[R]):
    def __init__(self, role: str, deadline_seconds: float, engine: "SimulatedEngine") -> None:
        self._role, self._deadline_seconds, self._engine = role, deadline_seconds, engine
        self._arrives = 0.0

    def start(self, signature: Signature, fields: bytes, tensors: list[torch.Tensor]) -> Future[Any]:
        engine = self._engine
        answer = Answer(engine, engine.clock + self._deadline_seconds, signature.name)
        call = _Call(signature, fields, tensors, answer)
        size = sum(t.nbytes for t, (_, out) in zip(tensors, signature.kinds, strict=True) if not out)
        # Calls of one caller to one role arrive in the order they were made.
        earliest = math.nextafter(self._arrives, math.inf)
        self._arrives = max(earliest, engine.clock + engine.transfer_seconds(size))
        engine.at(self._arrives, lambda: engine.arrive(self._role, call))
        return answer


@final
class SimulatedEngine(SimulatedHome):
    """The scheduler; the coordinator's activity is the thread that uses it."""

    def __init__(self, seed: int = 0, *, costs: Costs | None = None, faults: Faults | None = None) -> None:
        super().__init__(COORDINATOR, 0, self)
        self.costs, self.faults = costs or Costs(), faults or Faults()
        self.clock = 0.0
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what is exported runs here, and more would only wait for each other
        self.baton = held_lock()
        self.current: Activity | None = None
        self._random = random.Random(seed)
        self._agenda: list[tuple[float, float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._homes: dict[str, SimulatedHome] = {COORDINATOR: self}
        self._letterboxes: dict[str, list[_Call]] = {}
        """Calls that arrived while their role was down; they wait as in a socket's backlog."""
        self._deaths: list[Death] = []
        self._shared: Any = None
        self._serving_depth = 0
        self._activities: list[Activity] = []
        self._waited: dict[Answer, None] = {}
        """A dict for its order, which must not depend on addresses in memory."""
        self.at(1.0, self._end_missed_deadlines)
        for seconds, role in self.faults.kill:
            self.at(seconds, lambda role=role: self._die(role))  # type: ignore[misc]

    # time

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something at a moment of virtual time; moments that coincide are ordered by the seed."""
        heapq.heappush(self._agenda, (max(seconds, self.clock), self._random.random(), next(self._count), action))

    def jittered(self, seconds: float) -> float:
        """A time with the model's random variation."""
        if not self.costs.jitter:
            return seconds
        variance = self.costs.jitter**2
        return seconds * self._random.gammavariate(1.0 / variance, variance)

    def transfer_seconds(self, size_bytes: int) -> float:
        """How long a message with so many bytes of tensors travels."""
        return self.jittered(self.costs.latency_seconds + size_bytes / self.costs.bytes_per_second)

    def wait(self, answer: Answer | None, until: float) -> None:
        """Let others go on until the answer is there or the moment has come."""
        if self._serving_depth:
            raise RuntimeError("an exported method must not wait for a future; return it or let the activity wait")
        activity = self.current
        if answer is not None:
            self._waited[answer] = None
        if activity is not None:
            if answer is None:
                self.at(until, activity.run_until_it_waits)
            else:
                answer.waiter = activity
                if until < answer.deadline:
                    self.at(until, lambda: self._stop_waiting(activity, answer))
            activity.wait()
        elif answer is not None:
            if until < answer.deadline:
                self.at(until, lambda: None)
            while not answer.done() and self.clock < until:
                self._next()
        else:
            reached: list[bool] = []
            self.at(until, lambda: reached.append(True))
            while not reached:
                self._next()
        if answer is not None:
            self._waited.pop(answer, None)

    def _stop_waiting(self, activity: Activity, answer: Answer) -> None:
        if answer.waiter is activity:
            answer.waiter = None
            activity.run_until_it_waits()

    def _end_missed_deadlines(self) -> None:
        """Once a second: a deadline needs no event of its own."""
        for answer in list(self._waited):
            answer.done()
        self.at(self.clock + 1.0, self._end_missed_deadlines)

    def resume(self, activity: Activity) -> None:
        """Let an activity go on as soon as the scheduler is free."""
        self.at(self.clock, activity.run_until_it_waits)

    def _next(self) -> None:
        self.clock, _, _, action = heapq.heappop(self._agenda)
        action()

    # calls

    def arrive(self, role: str, call: _Call) -> None:
        """A call has reached its role."""
        home = self._homes.get(role)
        if home is None or (home.role is None and home is not self):
            self._letterboxes.setdefault(role, []).append(call)
            return
        home.queue.append(call)
        if home.serving is None:
            self._serve(home)

    def _serve(self, home: SimulatedHome) -> None:
        if not home.queue:
            return
        call = home.serving = home.queue.popleft()
        size = sum(tensor.nbytes for tensor in call.tensors)
        seconds = self.jittered(size / self.costs.serving_bytes_per_second)
        self.at(max(self.clock, self.hangs_until(home.name)) + seconds, lambda: self._answer(home, call))

    def hangs_until(self, role: str) -> float:
        """The end of the hang that the role is in by script; now, if it is in none."""
        return max([until for start, until, name in self.faults.hang if name == role and start <= self.clock < until],
                   default=self.clock)  # fmt: skip

    def _answer(self, home: SimulatedHome, call: _Call) -> None:
        if not home.alive:
            return
        # A caller that has given up has its memory back, so the call must not run any more.
        if not call.answer.done():
            value, error = self._run(home, call)
            if isinstance(value, Answer):
                home.promised.append(call)
                value.then(lambda: self._keep(home, call, value))
            else:
                self._reply(call, value, error)
        home.serving = None
        self._serve(home)

    def _keep(self, home: SimulatedHome, call: _Call, promise: Answer) -> None:
        """A promise that answers a call is complete."""
        if home.alive:
            home.promised.remove(call)
            self._reply(call, *self._guarded(partial(self._encoded, call.signature, promise.result)))

    def _reply(self, call: _Call, value: Any, error: Exception | None) -> None:
        size = sum(t.nbytes for t, (_, out) in zip(call.tensors, call.signature.kinds, strict=True) if out)
        self.at(self.clock + self.transfer_seconds(size), lambda: call.answer.settle(value, error))

    def _run(self, home: SimulatedHome, call: _Call) -> tuple[Any, Exception | None]:
        """(what the method answers, or the promise of it; what it raised)."""

        def run() -> Any:
            method = home.methods.get(call.signature.name)
            if method is None:
                raise ProtocolError(f"{type(home.role).__name__} exports no method {call.signature.name!r}")
            flat = [tensor.view(-1) for tensor in call.tensors]
            value = method(home.role, *call.signature.join(call.fields, flat))
            if isinstance(value, Answer) and not value.done():
                return value
            return self._encoded(call.signature, value.result if isinstance(value, Answer) else lambda: value)

        self._serving_depth += 1
        try:
            return self._guarded(run)
        finally:
            self._serving_depth -= 1

    def _encoded(self, signature: Signature, outcome: Callable[[], Any]) -> Any:
        """The answer as it arrives: through the encoding of the wire, checked against the method's annotations."""
        try:
            return signature.answer_decoder.decode(signature.fields_encoder.encode(outcome()))
        except msgspec.ValidationError as error:
            raise ProtocolError(f"answer to {signature.name}: {error}") from error

    def _guarded(self, run: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """(the outcome, what was raised as a caller sees it)."""
        try:
            return run(), None
        except RAISED_AS_IS as error:
            return None, error
        except Exception as error:
            return None, RemoteError("".join(traceback.format_exception(error)))

    # the engine

    def answer(self, role: object) -> None:
        """Let `role` answer calls to the coordinator."""
        self.role, self.methods = role, exported_methods(type(role))

    def load(
        self, prepare: Callable[..., tuple[Any, T]], *arguments: Any, attempt: Callable[[Any], object] | None = None
    ) -> T:
        """Prepare in this process."""
        try:
            self._shared, description = prepare(*arguments)
            if attempt is not None:
                attempt(self._shared)
        except DistbeliefError:
            raise
        except Exception as error:
            raise UserCodeError("".join(traceback.format_exception(error))) from error
        return description

    def start(self, name: str, incarnation: int, factory: Callable[..., Any], *arguments: Any) -> None:
        """Start a role after the modelled start-up time."""
        home = self._homes[name] = SimulatedHome(name, incarnation, self)
        given = [self._shared if argument is SHARED else argument for argument in arguments]
        self.at(self.clock + self.jittered(self.costs.start_seconds), lambda: self._birth(home, factory, given))

    def _birth(self, home: SimulatedHome, factory: Callable[..., Any], arguments: list[Any]) -> None:
        if not home.alive:
            return

        def life() -> None:
            home.role = role = factory(home, *arguments)
            home.methods = exported_methods(type(role))
            for call in self._letterboxes.pop(home.name, []):
                self.arrive(home.name, call)
            if hasattr(home.role, "run"):
                home.role.run()
                self._end(home)

        def failed(reason: str, failure: str | None) -> None:
            self._end(home)
            self._deaths.append(Death(home.name, home.incarnation, reason, failure))

        home.activity = Activity(self, life, failed)
        self._activities.append(home.activity)
        home.activity.run_until_it_waits()

    def _die(self, name: str) -> None:
        home = self._homes.get(name)
        if home is None or not home.alive:
            return
        self._end(home)
        self.at(
            self.clock + self.jittered(self.costs.death_seconds),
            lambda: self._deaths.append(Death(home.name, home.incarnation, "killed by signal 9")),
        )

    def _end(self, home: SimulatedHome) -> None:
        """The role is gone: its callers lose it, its activity unwinds."""
        home.alive = False
        if self._homes.get(home.name) is home:
            del self._homes[home.name]
        lost = [*home.queue, *([home.serving] if home.serving else []), *home.promised]
        for call in lost:
            error = PeerLost(f"{home.name} died")
            settle = partial(call.answer.settle, error=error)
            self.at(self.clock + self.costs.latency_seconds, settle)
        if home.activity is not None and home.activity is not self.current:
            self.at(self.clock, home.activity.kill)

    def stop(self, name: str) -> None:
        """End a role; not a death."""
        home = self._homes.get(name)
        if home is not None:
            self._end(home)

    def deaths(self) -> list[Death]:
        """Deaths noticed since last asked."""
        deaths, self._deaths = self._deaths, []
        return deaths

    def close(self) -> None:
        """End every activity."""
        torch.set_num_threads(self._threads)
        for activity in self._activities:
            activity.kill()
        self._agenda.clear()
        self._homes.clear()
