# SPDX-License-Identifier: Apache-2.0
"""The contract of every engine. It names none: a new engine is one line in ENGINES."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from conftest import Settle
from keepers import Subprocesses

from distbelief.channel.base import Future, Out, Promise, Remote, exported
from distbelief.engine.base import COORDINATOR, Death, Engine, Faults, Home
from distbelief.engine.hosts import HostsEngine
from distbelief.engine.local import LocalEngine
from distbelief.engine.pickles import SHARED
from distbelief.engine.placement import Group
from distbelief.engine.simulated import SimulatedEngine
from distbelief.errors import (
    ConfigurationError,
    DeadlineExceeded,
    Fenced,
    NotReady,
    PeerLost,
    ProtocolError,
    RemoteError,
    UserCodeError,
)

ROLES = [f"role/{index}" for index in range(100)]
SLOW_ROLE = ROLES[-1]


def kill_process(engine: LocalEngine, role: str) -> None:
    while role not in engine.processes:
        engine.sleep(0.01)
    os.kill(engine.processes[role], signal.SIGKILL)


PATIENT_SECONDS = 10.0
"""On a machine that is busy with other tests a host may be silent for a while; lost hosts have tests elsewhere."""


def on_two_hosts(**options: Any) -> HostsEngine:
    return HostsEngine(ROLES, Subprocesses(2), lost_seconds=PATIENT_SECONDS, **options)


def on_ray() -> HostsEngine:
    from distbelief.engine.ray import RayKeepers

    keepers = RayKeepers(None, [Group(tuple(ROLES), {"CPU": 0.01}, spread=True)])
    return HostsEngine(ROLES, keepers, lost_seconds=PATIENT_SECONDS)


@dataclass(frozen=True)
class Kind:
    """How to make an engine, and how to end one of its roles from outside."""

    make: Callable[..., Any]
    kill: Callable[[Any, str], None]
    quick: bool = True
    """Whether a test may make an engine of its own, which takes a second or two."""


ENGINES = {
    "local, shared memory": Kind(partial(LocalEngine, ROLES, own_cores=ROLES), kill_process),
    "local, TCP": Kind(partial(LocalEngine, ROLES, transport="tcp"), kill_process),
    "two hosts": Kind(on_two_hosts, lambda engine, role: engine.signal(role, signal.SIGKILL)),
    "ray": Kind(on_ray, lambda engine, role: engine.signal(role, signal.SIGKILL), quick=False),
    "simulated": Kind(SimulatedEngine, lambda engine, role: engine.at(engine.clock, lambda: engine._die(role))),
}


# what is prepared, and roles


class Facts(msgspec.Struct):
    """What the coordinator learns from preparing."""

    doubled: int


def prepare(number: int) -> tuple[dict[str, int], Facts]:
    return {"number": number}, Facts(2 * number)


def prepare_badly(error: Exception) -> tuple[None, None]:
    raise error


def attempt_badly(prepared: dict[str, int]) -> None:
    """Raises by what was prepared."""
    if prepared["number"] == 1:
        raise ValueError("a bug")
    if prepared["number"] == 2:
        raise ConfigurationError("40 shards are too many", hint="use 12")


class Clerk:
    """A role that answers."""

    def __init__(self, home: Home, prepared: dict[str, int] | None = None, other: str = "") -> None:
        self.home, self.prepared, self.other = home, prepared, other
        self.notes: list[int] = []
        self.promised: list[Promise[int]] = []

    @exported
    def who(self) -> tuple[str, int]:
        return self.home.name, self.home.incarnation

    @exported
    def number(self) -> int:
        assert self.prepared is not None
        return self.prepared["number"]

    @exported
    def note(self, number: int) -> list[int]:
        self.notes.append(number)
        return self.notes

    @exported
    def divide(self, by: int) -> float:
        return 1 / by

    @exported
    def refuse(self, not_ready: bool) -> None:
        raise (NotReady if not_ready else Fenced)("these are the reasons")

    @exported
    def mirror(self, values: torch.Tensor, out: Out) -> int:
        out.copy_(values)
        return len(values)

    @exported
    def dawdle(self, values: torch.Tensor, out: Out) -> None:
        time.sleep(0.2)

    @exported
    def promise_a_number(self) -> int:
        return "a word"  # type: ignore[return-value]

    @exported
    def sleep(self) -> None:
        self.home.sleep(0.1)

    @exported
    def wait(self) -> Any:
        return self.home.find(self.other, Clerk).call(Clerk.who).result()

    @exported
    def work(self, number: int) -> Future[int]:
        return self.home.background(lambda: 100 // number)

    @exported
    def later(self) -> Promise[int]:
        """Answered when `tell` is called."""
        self.promised.append(self.home.promise())
        return self.promised[-1]

    @exported
    def tell(self, number: int) -> int:
        for promise in self.promised:
            promise.keep(number)
        return len(self.promised)


class Stranger(Clerk):
    """Has a method that a Clerk lacks."""

    @exported
    def unknown(self) -> None: ...


class Caller:
    """A role with an activity: calls the coordinator and another role, and ends."""

    def __init__(self, home: Home, other: str, fail: bool = False) -> None:
        self.home, self.other, self.fail = home, other, fail

    def run(self) -> None:
        center = self.home.find(COORDINATOR, Center)
        values, out = (self.home.allocate(100, torch.float32) for _ in range(2))
        values.fill_(2.0)
        count = self.home.find(self.other, Clerk).call(Clerk.mirror, values, out).result()
        started = self.home.now()
        self.home.sleep(0.05)
        slept = self.home.now() - started
        center.call(Center.report, self.home.name, [float(count), float(out.sum()), slept]).result()
        if self.fail:
            raise ValueError("the user's code has a bug")


class Waiter:
    """A role that waits for an answer thrice: not at all, too short, and long enough."""

    def __init__(self, home: Home, other: str) -> None:
        self.home, self.other = home, other

    def run(self) -> None:
        future = self.home.find(self.other, Clerk).call(Clerk.who)
        numbers = []
        for seconds in (0.0, 0.05, 20.0):
            started = self.home.now()
            numbers += [float(future.wait(seconds)), self.home.now() - started]
            self.home.find(COORDINATOR, Center).call(Center.report, self.home.name, numbers).result()


class Sleeper:
    """A role whose activity never ends, and which answers meanwhile."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def run(self) -> None:
        while True:
            self.home.sleep(3600.0)

    @exported
    def who(self) -> tuple[str, int]:
        return self.home.name, self.home.incarnation


class Stubborn:
    """A role that tries to go on waiting when it is ended."""

    def __init__(self, home: Home, silent: str) -> None:
        self.home, self.silent = home, silent

    def run(self) -> None:
        try:
            self.home.find(self.silent, Clerk, 3600.0).call(Clerk.who).result()
        finally:
            self.home.sleep(3600.0)


class Computing:
    """A role that computes 400 examples in a twentieth of a second of processor time and reports what comes on top."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def run(self) -> None:
        seconds = []
        for _ in range(4):
            with self.home.computing(400):
                begun = time.thread_time()
                while time.thread_time() - begun < 0.05:
                    pass
                computed = self.home.now()  # a busy machine lets it take longer, which is slowed no further
            seconds.append(self.home.now() - computed)
        self.home.find(COORDINATOR, Center).call(Center.report, self.home.name, seconds).result()


class Unborn:
    """A role whose constructor raises."""

    def __init__(self, home: Home, error: Exception | None = None) -> None:
        raise error or KeyError("the user's model has a bug")


class Bereft:
    """A role that somebody it needs is gone for."""

    def __init__(self, home: Home) -> None: ...

    def run(self) -> None:
        raise PeerLost("shard/0 is gone")


class Center:
    """The coordinator's role."""

    def __init__(self) -> None:
        self.reports: dict[str, list[float]] = {}

    @exported
    def report(self, role: str, numbers: list[float]) -> None:
        self.reports[role] = numbers


# the stage


class Stage:
    """An engine, with names that no earlier test has used."""

    def __init__(self, kind: Kind, engine: Engine, names: Iterator[str]) -> None:
        self.kind, self.engine, self._names = kind, engine, names
        self.started: list[str] = []
        self.deaths: list[Death] = []
        self.center = Center()
        engine.answer(self.center)

    def name(self) -> str:
        return next(self._names)

    def start(self, factory: Callable[..., Any], *arguments: Any, name: str = "", incarnation: int = 0) -> str:
        name = name or self.name()
        self.started.append(name)
        self.engine.start(name, incarnation, factory, *arguments)
        return name

    def find(self, name: str, deadline_seconds: float = 20.0) -> Remote[Clerk]:
        return self.engine.find(name, Clerk, deadline_seconds)

    def up(self, factory: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        """Start a role that answers `who`, and wait until it does."""
        name = self.start(factory, *arguments, **options)
        self.find(name).call(Clerk.who).result()
        return name

    def kill(self, name: str) -> None:
        self.kind.kill(self.engine, name)

    def until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        limit = self.engine.now() + seconds
        while not condition():
            assert self.engine.now() < limit, "it did not happen"
            self.engine.sleep(0.01)

    def died(self) -> list[Death]:
        """All deaths so far of roles that were started here; an earlier test's may be reported late."""
        self.deaths += [death for death in self.engine.deaths() if death.role in self.started]
        return self.deaths

    def end(self) -> None:
        for name in self.started:
            self.engine.stop(name)
        self.engine.sleep(0.01)


SLOW = {"two hosts": [pytest.mark.slow]}
if "ray" not in sys.modules:  # gRPC keeps what it has opened: test_engine_ray.py runs these in a process of their own
    del ENGINES["ray"]


# In a group each, so that one engine is made for all of its tests, and not one in each worker.
KINDS = [
    pytest.param(name, marks=[pytest.mark.xdist_group(f"contract on {name}"), *SLOW.get(name, ())]) for name in ENGINES
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return ENGINES[request.param]


@pytest.fixture
def quick_kind(kind: Kind) -> Kind:
    if not kind.quick:
        pytest.skip("each Ray takes seconds to begin; what runs on it is tried with the other kind of hosts")
    return kind


@pytest.fixture(scope="module")
def shared_engine(kind: Kind) -> Iterator[tuple[Engine, Iterator[str]]]:
    """One engine for the tests that do not end it, because starting one takes a second."""
    options = {"faults": Faults(slow={SLOW_ROLE: 4.0})} if kind.quick else {}
    with closing(kind.make(**options)) as engine:
        assert engine.load(prepare, 21, attempt=attempt_badly) == Facts(42), "an attempt that goes well leaves nothing"
        engine.background(lambda: None).result()  # the thread that works in the background is there before the tests
        yield engine, iter(ROLES[:-1])


@pytest.fixture
def stage(kind: Kind, shared_engine: tuple[Engine, Iterator[str]], settle: list[Settle]) -> Iterator[Stage]:
    engine, names = shared_engine
    made = Stage(kind, engine, names)
    yield made
    made.end()
    settle.append(lambda: engine.sleep(0.01))


@pytest.fixture
def own_stage(quick_kind: Kind) -> Iterator[Callable[..., Stage]]:
    """A stage whose engine the test may close or trouble by script."""
    engines: list[Any] = []

    def make(**options: Any) -> Stage:
        engines.append(quick_kind.make(**options))
        engines[-1].load(prepare, 21)
        return Stage(quick_kind, engines[-1], iter(ROLES))

    yield make
    for engine in engines:
        engine.close()


# calls


def test_a_role_answers_at_its_name(stage: Stage) -> None:
    names = [stage.start(Clerk, incarnation=index) for index in range(3)]
    futures = [stage.find(name).call(Clerk.who) for name in names]
    assert [future.result() for future in futures] == [(name, index) for index, name in enumerate(names)]


def test_what_was_prepared_reaches_the_roles_as_the_shared_argument(stage: Stage) -> None:
    name = stage.start(Clerk, SHARED)
    assert stage.find(name).call(Clerk.number).result() == 21


def test_calls_of_one_caller_run_in_the_order_they_were_made(stage: Stage) -> None:
    clerk = stage.find(stage.start(Clerk))
    futures = [clerk.call(Clerk.note, number) for number in range(50)]
    assert [future.result() for future in futures] == [list(range(number + 1)) for number in range(50)]
    assert all(future.done() for future in futures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("length", [0, 1, 1001])
def test_tensors_that_the_engine_allocates_are_handed_over(stage: Stage, dtype: torch.dtype, length: int) -> None:
    clerk = stage.find(stage.start(Clerk))
    values, out = stage.engine.allocate(length, dtype), stage.engine.allocate(length, dtype)
    assert not values.any()
    values.copy_(torch.arange(length) % 7)
    assert clerk.call(Clerk.mirror, values, out).result() == length
    assert torch.equal(values, out)
    part = torch.zeros(5, dtype=dtype)
    if length > 20:
        clerk.call(Clerk.mirror, values[10:15], part).result()
        assert torch.equal(part, values[10:15])


def test_a_role_with_an_activity_calls_others_and_the_coordinator_and_its_end_is_no_death(stage: Stage) -> None:
    clerk = stage.start(Clerk)
    caller = stage.start(Caller, clerk)
    stage.until(lambda: caller in stage.center.reports)
    count, total, slept = stage.center.reports[caller]
    assert (count, total) == (100.0, 200.0)
    assert slept > 0.0499
    stage.engine.sleep(0.3)
    assert stage.died() == []


def test_a_role_answers_while_its_activity_waits(stage: Stage) -> None:
    name = stage.start(Sleeper)
    assert stage.find(name).call(Clerk.who).result() == (name, 0)


def test_background_work_is_an_answer(stage: Stage) -> None:
    clerk = stage.find(stage.start(Clerk))
    answer: Any = clerk.call(Clerk.work, 4).result()
    assert answer == 25
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        clerk.call(Clerk.work, 0).result()
    assert stage.engine.background(lambda: 5).result() == 5


def test_a_promise_is_an_answer_that_comes_when_it_is_kept_and_not_before(stage: Stage) -> None:
    clerk = stage.find(stage.up(Clerk))
    pending = [clerk.call(Clerk.later) for _ in range(3)]
    assert clerk.call(Clerk.note, 1).result() == [1], "others are answered meanwhile"
    stage.engine.sleep(0.1)
    assert [answer.done() for answer in pending] == [False] * 3
    assert clerk.call(Clerk.tell, 5).result() == 3
    assert [answer.result() for answer in pending] == [5] * 3
    assert clerk.call(Clerk.tell, 6).result() == 3, "a promise that is kept stays as it is"
    assert [answer.result() for answer in pending] == [5] * 3


def test_a_promise_ends_with_the_role_that_made_it(stage: Stage) -> None:
    name = stage.up(Clerk)
    pending = stage.find(name).call(Clerk.later)
    stage.find(name).call(Clerk.who).result()
    stage.kill(name)
    with pytest.raises(PeerLost):
        pending.result()
    stage.until(stage.died)


def test_background_works_are_done_one_after_another_by_one_thread(stage: Stage) -> None:
    engine = stage.engine
    done: list[tuple[int, int]] = []

    def work(number: int) -> int:
        time.sleep(0.01 * (3 - number))
        done.append((number, threading.get_ident()))
        return number

    futures = [engine.background(partial(work, number)) for number in range(3)]
    assert [future.result() for future in reversed(futures)] == [2, 1, 0]
    assert [number for number, _ in done] == [0, 1, 2]
    assert len({thread for _, thread in done}) == 1


def test_waiting_for_an_answer_ends_when_it_is_there_or_the_time_is_up(stage: Stage) -> None:
    name = stage.name()
    future = stage.find(name).call(Clerk.who)
    waiter = stage.start(Waiter, name)
    stage.until(lambda: len(stage.center.reports.get(waiter, [])) == 4)
    started = stage.engine.now()
    assert not future.wait(0.05)
    assert 0.0499 < stage.engine.now() - started < 1.0
    stage.start(Clerk, name=name)
    assert future.wait(20.0)
    assert future.done()
    assert future.result() == (name, 0)
    stage.until(lambda: len(stage.center.reports[waiter]) == 6)
    none, at_once, too_short, seconds, enough, long = stage.center.reports[waiter]
    assert (none, too_short, enough) == (0.0, 0.0, 1.0)
    assert at_once < 0.04 < 0.0499 < seconds < 1.0
    assert long < 5.0


def test_time_never_goes_back_and_sleeping_takes_at_least_as_long_as_asked(stage: Stage) -> None:
    moments = [stage.engine.now()]
    for seconds in (0.0, 0.001, 0.03, -1.0):
        stage.engine.sleep(seconds)
        moments.append(stage.engine.now())
        assert moments[-1] - moments[-2] > seconds - 1e-6
    assert moments == sorted(moments)


# mistakes


def test_a_method_that_raises_gives_its_traceback_to_the_caller(stage: Stage) -> None:
    clerk = stage.find(stage.start(Clerk))
    with pytest.raises(RemoteError, match=r"(?s)in divide.*ZeroDivisionError"):
        clerk.call(Clerk.divide, 0).result()
    assert clerk.call(Clerk.divide, 2).result() == 0.5
    assert stage.died() == []


@pytest.mark.parametrize("kind_of_error", [Fenced, NotReady])
def test_an_error_that_callers_act_on_comes_back_as_itself(stage: Stage, kind_of_error: type[Exception]) -> None:
    clerk = stage.find(stage.start(Clerk))
    with pytest.raises(kind_of_error, match=r"^these are the reasons$"):
        clerk.call(Clerk.refuse, kind_of_error is NotReady).result()


def test_wrong_arguments_wrong_answers_and_unknown_methods_are_protocol_errors(stage: Stage) -> None:
    clerk = stage.find(stage.start(Clerk))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (Clerk.note, ("one",)), (Clerk.promise_a_number, ()), (Stranger.unknown, ())
    ]  # fmt: skip
    for method, arguments in calls:
        with pytest.raises(ProtocolError, match=method.__name__):
            clerk.call(method, *arguments).result()
    assert clerk.call(Clerk.note, 1).result() == [1]


@pytest.mark.parametrize("method", [Clerk.sleep, Clerk.wait])
def test_a_method_that_waits_is_an_error(stage: Stage, method: Any) -> None:
    other = stage.start(Clerk)
    clerk = stage.find(stage.start(Clerk, None, other))
    with pytest.raises(RemoteError, match="must not wait for a future"):
        clerk.call(method).result()


def test_a_call_to_a_role_that_is_not_there_ends_at_its_deadline(stage: Stage) -> None:
    started = stage.engine.now()
    with pytest.raises(DeadlineExceeded, match="who was not answered"):
        stage.find(stage.name(), 0.2).call(Clerk.who).result()
    assert 0.2 <= stage.engine.now() - started < 2.0


# life and death


def test_a_role_that_raises_is_a_death_with_its_traceback(stage: Stage) -> None:
    clerk = stage.start(Clerk)
    names = [stage.start(Caller, clerk, True, incarnation=3), stage.start(Unborn)]
    stage.until(lambda: len(stage.died()) == 2)
    deaths = {death.role: death for death in stage.deaths}
    assert deaths[names[0]].incarnation == 3
    assert "ValueError: the user's code has a bug" in (deaths[names[0]].failure or "")
    assert "in run" in (deaths[names[0]].failure or "")
    assert 'KeyError: "the user\'s model has a bug"' in (deaths[names[1]].failure or "")


def test_a_role_that_raises_what_no_encoding_has_is_told_all_the_same_and_the_others_go_on(stage: Stage) -> None:
    clerk = stage.up(Clerk)
    name = stage.start(Unborn, OSError("no label for h\udcf6he.wav"))  # as Python has names of files that are no text
    stage.until(stage.died)
    assert stage.find(clerk).call(Clerk.note, 1).result() == [1]
    (death,) = stage.died()
    assert (death.role, death.reason) == (name, "exit code 1")
    assert "OSError: no label for h" in (death.failure or "")
    assert "he.wav" in (death.failure or "")


def test_a_role_that_loses_whom_it_needs_is_a_death_that_is_no_error_of_the_users(stage: Stage) -> None:
    name = stage.start(Bereft)
    stage.until(stage.died)
    assert stage.died() == [Death(name, 0, "PeerLost: shard/0 is gone", None)]


def test_a_killed_role_is_a_death_without_a_traceback_and_is_reported_once(stage: Stage) -> None:
    for factory in (Clerk, Sleeper):
        name = stage.up(factory, incarnation=2)
        stage.kill(name)
        before = stage.engine.now()
        stage.until(stage.died)
        assert stage.engine.now() - before < 2.0
        stage.engine.sleep(0.2)
        assert stage.died() == [Death(name, 2, "killed by signal 9", None)]
        stage.deaths.clear()


def test_a_stopped_role_is_no_death(stage: Stage) -> None:
    for factory in (Clerk, Sleeper):
        stage.engine.stop(stage.up(factory))
        stage.engine.stop(stage.start(factory))
    stage.engine.stop(stage.name())
    stage.engine.sleep(0.5)
    assert stage.died() == []


def test_the_next_incarnation_answers_at_the_same_name(stage: Stage) -> None:
    name = stage.up(Clerk)
    clerk = stage.find(name)
    for incarnation in (1, 2, 3):
        if incarnation == 2:
            stage.engine.stop(name)
        else:
            stage.kill(name)
            stage.until(stage.died)
            stage.deaths.clear()
        stage.engine.sleep(0.1)
        stage.start(Clerk, name=name, incarnation=incarnation)
        assert answered(stage, lambda: clerk.call(Clerk.who)) == (name, incarnation)


def answered(stage: Stage, make: Callable[[], Future[Any]]) -> Any:
    """The answer to a call that is made again when the peer was lost, as callers do."""
    while True:
        try:
            return make().result()
        except PeerLost:
            stage.engine.sleep(0.01)


def test_a_call_in_the_middle_of_which_its_role_dies_is_lost_soon(stage: Stage) -> None:
    name = stage.start(Clerk)
    clerk = stage.find(name)
    assert clerk.call(Clerk.who).result() == (name, 0)
    values = torch.zeros(16 << 20)
    futures = [clerk.call(Clerk.dawdle, values, values), clerk.call(Clerk.who)]
    stage.engine.sleep(0.003)
    assert not futures[0].done()
    stage.kill(name)
    started = stage.engine.now()
    for future in futures:
        with pytest.raises(PeerLost):
            future.result()
    assert stage.engine.now() - started < 2.0


def test_a_call_made_while_its_role_is_down_is_answered_by_the_next_incarnation(stage: Stage) -> None:
    name = stage.up(Clerk)
    stage.kill(name)
    stage.until(stage.died)
    future = stage.find(name).call(Clerk.who)
    stage.engine.sleep(0.1)
    assert not future.done()
    stage.start(Clerk, name=name, incarnation=1)
    assert future.result() == (name, 1)


def test_a_role_can_be_started_and_stopped_at_once_many_times(stage: Stage) -> None:
    name = stage.name()
    for incarnation in range(10):
        stage.start(Clerk, name=name, incarnation=incarnation)
        if incarnation < 9:
            stage.engine.stop(name)
    # An earlier one may answer before it is ended.
    stage.until(lambda: answered(stage, lambda: stage.find(name).call(Clerk.who)) == (name, 9))
    stage.engine.sleep(0.2)
    assert stage.died() == []


# loading and closing


@pytest.mark.slow
def test_what_preparing_raises_is_raised_by_load(quick_kind: Kind) -> None:
    with (
        closing(quick_kind.make()) as engine,
        pytest.raises(UserCodeError, match=r"(?s)in prepare_badly.*ValueError: a bug"),
    ):
        engine.load(prepare_badly, ValueError("a bug"))
    with closing(quick_kind.make()) as engine, pytest.raises(ConfigurationError) as caught:
        engine.load(prepare_badly, ConfigurationError("40 shards are too many", hint="use 12"))
    where = "host host0: " if quick_kind is ENGINES["two hosts"] else ""  # of several hosts it is told which
    assert (caught.value.problem, caught.value.hint) == (f"{where}40 shards are too many", "use 12")


@pytest.mark.slow
def test_what_an_attempt_raises_is_raised_by_load(quick_kind: Kind) -> None:
    with (
        closing(quick_kind.make()) as engine,
        pytest.raises(UserCodeError, match=r"(?s)in attempt_badly.*ValueError: a bug"),
    ):
        engine.load(prepare, 1, attempt=attempt_badly)
    with closing(quick_kind.make()) as engine, pytest.raises(ConfigurationError, match="40 shards are too many"):
        engine.load(prepare, 2, attempt=attempt_badly)


@pytest.mark.slow
def test_closing_ends_roles_whatever_they_do(own_stage: Callable[..., Stage], leaks: Callable[[], list[str]]) -> None:
    stage = own_stage()
    for factory in (Clerk, Sleeper):
        stage.up(factory)
    stage.start(Stubborn, stage.name())
    stage.start(Caller, stage.name())
    pending = stage.find(stage.name(), 3600.0).call(Clerk.who)
    stage.engine.sleep(0.3)
    stage.start(Clerk)
    started = time.monotonic()
    stage.engine.close()
    assert time.monotonic() - started < 3.0
    del pending
    assert leaks() == []


def test_an_engine_can_be_closed_twice_and_before_anything_was_started(quick_kind: Kind) -> None:
    engine = quick_kind.make()
    engine.close()
    engine.close()


# trouble by script


@pytest.mark.slow
def test_a_slow_role_computes_as_many_times_longer_as_the_script_says(quick_kind: Kind, stage: Stage) -> None:
    names = [stage.start(Computing, name=SLOW_ROLE), stage.start(Computing)]
    stage.until(lambda: len(stage.center.reports) == 2)
    slow, usual = (sum(stage.center.reports[name]) for name in names)
    # Four mini-batches of a twentieth of a second, each three times as long again.
    assert 0.5 < slow - usual < 0.9


@pytest.mark.slow
def test_a_role_dies_when_the_script_says(own_stage: Callable[..., Stage]) -> None:
    stage = own_stage(faults=Faults(kill=((1.5, ROLES[0]), (1.6, ROLES[2]))))
    started = stage.engine.now()
    names = [stage.up(Clerk) for _ in range(2)]
    assert stage.died() == []
    stage.until(stage.died)
    assert stage.engine.now() - started >= 1.5
    stage.engine.sleep(0.3)
    assert stage.died() == [Death(names[0], 0, "killed by signal 9", None)]
    assert stage.find(names[1]).call(Clerk.who).result() == (names[1], 0)


@pytest.mark.slow
def test_a_role_is_silent_for_as_long_as_the_script_says_and_then_goes_on(own_stage: Callable[..., Stage]) -> None:
    stage = own_stage(faults=Faults(hang=((1.0, 2.5, ROLES[0]),)))
    started = stage.engine.now()
    name = stage.up(Clerk)
    stage.until(lambda: stage.died() or stage.engine.now() - started > 1.3)
    with pytest.raises(DeadlineExceeded):
        stage.find(name, 0.3).call(Clerk.note, 1).result()
    future = stage.find(name).call(Clerk.note, 2)
    stage.until(lambda: stage.died() or future.done())
    assert 2 in future.result()
    assert stage.engine.now() - started >= 2.4
    assert stage.died() == []


@pytest.mark.slow
def test_many_roles_are_started_at_once(own_stage: Callable[..., Stage]) -> None:
    stage = own_stage()
    names = [stage.start(Clerk, SHARED) for _ in ROLES]
    futures = [stage.find(name).call(Clerk.number) for name in names]
    assert [future.result() for future in futures] == [21] * len(names)
    for name in itertools.islice(names, 0, None, 2):
        stage.kill(name)
    stage.until(lambda: len(stage.died()) == len(names) // 2, 20.0)
