# SPDX-License-Identifier: Apache-2.0
"""Laws of the simulated engine: the seed decides everything, and virtual time follows the costs."""

import gc
import hashlib
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import torch

from distbelief.channel import memory
from distbelief.channel.base import Out, exported
from distbelief.engine.base import COORDINATOR, Death, Faults, Home
from distbelief.engine.simulated import SimulatedEngine
from distbelief.engine.virtual import Costs
from distbelief.errors import DeadlineExceeded, PeerLost, RemoteError

EXACT = Costs(
    latency_seconds=0.001, bytes_per_second=1e6, serving_bytes_per_second=4e6, example_seconds=0.01,
    jitter=0.0, start_seconds=0.5, death_seconds=0.05,
)  # fmt: skip


class Store:
    """Holds a vector that others read and change."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.vector = torch.zeros(1000)
        self.calls: list[tuple[int, float]] = []

    @exported
    def change(self, who: int, gradient: torch.Tensor) -> float:
        self.calls.append((who, self.home.now()))
        self.vector.mul_(0.9).sub_(gradient)
        return self.home.now()

    @exported
    def read(self, out: Out) -> float:
        out.copy_(self.vector)
        return self.home.now()

    @exported
    def history(self) -> list[tuple[int, float]]:
        return self.calls


class Worker:
    """Reads, computes and changes, again and again."""

    def __init__(self, home: Home, index: int, steps: int) -> None:
        self.home, self.index, self.steps = home, index, steps
        self.generator = torch.Generator().manual_seed(index)

    def run(self) -> None:
        store = self.home.find("store", Store, 5.0)
        vector = self.home.allocate(1000, torch.float32)
        for _ in range(self.steps):
            try:
                store.call(Store.read, vector).result()
                with self.home.computing(32):
                    gradient = torch.sin(vector) + torch.randn(1000, generator=self.generator)
                store.call(Store.change, self.index, gradient).result()
            except (PeerLost, DeadlineExceeded):
                self.home.sleep(0.1)


class Absent:
    """Waits for roles that are not there, many at once."""

    def __init__(self, home: Home, index: int) -> None:
        self.home, self.index = home, index

    def run(self) -> None:
        for _ in range(3):
            try:
                self.home.find(f"nobody/{self.index}", Store, 2.5).call(Store.history).result()
            except DeadlineExceeded:
                self.home.find("store", Store).call(Store.change, self.index, torch.zeros(1)).result()


def prepare() -> tuple[None, None]:
    return None, None


@pytest.fixture
def engines() -> Iterator[Callable[..., SimulatedEngine]]:
    made: list[SimulatedEngine] = []

    def make(*arguments: Any, **options: Any) -> SimulatedEngine:
        made.append(SimulatedEngine(*arguments, **options))
        made[-1].load(prepare)
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def story(seed: int, roles: int = 8, steps: int = 30, seconds: float = 6.0) -> tuple[list[tuple[int, float]], Any, str]:
    """What happened in a run with deaths, hangs, slow roles and missed deadlines: calls, deaths, and the bits left."""
    faults = Faults(slow={"worker/1": 3.0}, kill=((0.24, "worker/2"), (0.27, "store")), hang=((0.6, 0.7, "store"),))
    with closing(SimulatedEngine(seed, faults=faults)) as engine:
        engine.load(prepare)
        engine.start("store", 0, Store)
        for index in range(roles):
            engine.start(f"worker/{index}", 0, Worker, index, steps)
            engine.start(f"absent/{index}", 0, Absent, index)
        deaths: list[tuple[Death, float]] = []
        while engine.now() < seconds:
            for death in engine.deaths():
                deaths.append((death, engine.now()))
                factory: Any = (Store,) if death.role == "store" else (Worker, 2, steps)
                engine.start(death.role, death.incarnation + 1, *factory)
            engine.sleep(0.05)
        store = engine.find("store", Store)
        history = store.call(Store.history).result()
        vector = torch.zeros(1000)
        store.call(Store.read, vector).result()
    return history, deaths, hashlib.sha256(vector.numpy().tobytes()).hexdigest()


# the seed


def test_the_same_seed_gives_the_same_calls_clocks_deaths_and_bits() -> None:
    first = story(7)
    assert story(7) == first
    assert len(first[0]) > 50
    assert {death.role for death, _ in first[1]} == {"worker/2", "store"}


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(who for who, _ in story(seed)[0]) for seed in range(4)}
    assert len(orders) == 4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    """Addresses and hashes of strings differ between processes; nothing may depend on them."""
    code = "from test_engine_simulated import story; print(story(7))"
    folders = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), *sys.path])
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert said == {str(story(7))}


def test_every_schedule_of_a_seed_obeys_the_order_of_each_caller() -> None:
    class Chatter:
        def __init__(self, home: Home, index: int) -> None:
            self.home, self.index = home, index

        def run(self) -> None:
            store = self.home.find("store", Store)
            futures = [
                store.call(Store.change, 100 * self.index + number, torch.zeros(1000 if number % 3 == 0 else 1))
                for number in range(10)
            ]
            for future in futures:
                future.result()

    orders = set()
    for seed in range(5):
        with closing(SimulatedEngine(seed, costs=Costs(jitter=0.9))) as engine:
            engine.load(prepare)
            engine.start("store", 0, Store)
            for index in range(4):
                engine.start(f"chatter/{index}", 0, Chatter, index)
            engine.sleep(2.0)
            calls = [who for who, _ in engine.find("store", Store).call(Store.history).result()]
        for index in range(4):
            assert [who for who in calls if who // 100 == index] == [100 * index + number for number in range(10)]
        orders.add(tuple(calls))
    assert len(orders) == 5


# virtual time


def test_a_call_takes_its_latency_its_bytes_and_its_serving(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines(costs=EXACT)
    engine.start("store", 0, Store)
    engine.sleep(1.0)
    store = engine.find("store", Store)
    gradient = torch.zeros(1000)
    # There: 1 ms + 4000 bytes at 1 MB/s. Serving: 4000 bytes at 4 MB/s. Back: 1 ms.
    served = store.call(Store.change, 0, gradient).result()
    assert served == pytest.approx(1.0 + 0.001 + 0.004 + 0.001)
    assert engine.now() == pytest.approx(served + 0.001)
    # There: 1 ms. Serving: as before. Back: 1 ms + 4000 bytes.
    started = engine.now()
    served = store.call(Store.read, gradient).result()
    assert served == pytest.approx(started + 0.001 + 0.001)
    assert engine.now() == pytest.approx(served + 0.001 + 0.004)


def test_a_role_serves_one_call_after_another(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines(costs=EXACT)
    engine.start("store", 0, Store)
    engine.sleep(1.0)
    # Calls of different callers travel side by side and queue at the store.
    futures = [engine.find("store", Store).call(Store.change, 0, torch.zeros(1000)) for _ in range(5)]
    served = sorted(future.result() for future in futures)
    assert served == pytest.approx([1.0 + 0.005 + 0.001 * (number + 1) for number in range(5)])


def test_roles_start_and_die_and_compute_in_their_modelled_time(engines: Callable[..., SimulatedEngine]) -> None:
    moments: list[float] = []

    class Computing:
        def __init__(self, home: Home) -> None:
            self.home = home

        def run(self) -> None:
            moments.append(self.home.now())
            with self.home.computing(32):
                pass
            moments.append(self.home.now())
            self.home.sleep(1000.0)

    engine = engines(costs=EXACT, faults=Faults(slow={"slow": 3.0}, kill=((2.0, "usual"),)))
    for name in ("usual", "slow"):
        engine.start(name, 0, Computing)
    noticed = None
    while noticed is None:
        engine.sleep(0.001)
        noticed = engine.now() if engine.deaths() else None
    assert sorted(moments) == pytest.approx([0.5, 0.5, 0.5 + 32 * 0.01, 0.5 + 32 * 0.01 * 3.0])
    assert noticed == pytest.approx(2.05, abs=0.0011)


def test_a_hanging_role_serves_after_its_hang(engines: Callable[..., SimulatedEngine]) -> None:
    hangs = ((1.0, 3.0, "store"), (1.2, 2.0, "store"), (0.5, 9.0, "another"))
    engine = engines(costs=EXACT, faults=Faults(hang=hangs))
    engine.start("store", 0, Store)
    engine.sleep(1.5)
    assert engine.find("store", Store).call(Store.change, 0, torch.zeros(1000)).result() == pytest.approx(3.001)


def test_a_hanging_role_computes_after_its_hang_and_then_as_long_as_ever(
    engines: Callable[..., SimulatedEngine],
) -> None:
    moments: list[float] = []

    class Computing:
        def __init__(self, home: Home) -> None:
            self.home = home

        def run(self) -> None:
            for _ in range(3):
                with self.home.computing(50):
                    pass
                moments.append(self.home.now())
            self.home.sleep(1000.0)

    engine = engines(costs=EXACT, faults=Faults(hang=((0.9, 3.0, "role"),)))
    engine.start("role", 0, Computing)
    engine.sleep(5.0)
    assert moments == pytest.approx([1.0, 3.5, 4.0])


def test_a_call_that_is_being_served_when_its_role_dies_is_not_run(engines: Callable[..., SimulatedEngine]) -> None:
    stores: list[Store] = []

    def store(home: Home) -> Store:
        stores.append(Store(home))
        return stores[-1]

    engine = engines(costs=EXACT, faults=Faults(kill=((1.0055, "store"),)))
    engine.start("store", 0, store)
    engine.sleep(1.0)
    with pytest.raises(PeerLost):  # it arrives after 5 ms, and would be served a millisecond later
        engine.find("store", Store).call(Store.change, 0, torch.zeros(1000)).result()
    engine.sleep(1.0)
    assert [each.calls for each in stores] == [[]]


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
def test_jitter_is_the_standard_deviation_of_times_whose_mean_stays(
    jitter: float, engines: Callable[..., SimulatedEngine]
) -> None:
    engine = engines(3, costs=Costs(jitter=jitter))
    factors = torch.tensor([engine.jittered(1.0) for _ in range(20_000)])
    assert float(factors.min()) >= 0.0
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(factors.std()) == pytest.approx(jitter, abs=0.03)


def test_virtual_hours_take_no_time(engines: Callable[..., SimulatedEngine]) -> None:
    engine, started = engines(), time.monotonic()
    engine.sleep(3600.0)
    assert engine.now() == 3600.0
    assert time.monotonic() - started < 2.0


def test_a_deadline_is_missed_at_most_a_second_late(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines()
    for seconds in (0.3, 2.5, 60.0):
        started = engine.now()
        with pytest.raises(DeadlineExceeded):
            engine.find("nobody", Store, seconds).call(Store.history).result()
        assert seconds <= engine.now() - started <= seconds + 1.0


def test_a_role_that_waits_for_what_never_comes_goes_on_at_its_deadline(
    engines: Callable[..., SimulatedEngine],
) -> None:
    engine = engines()
    engine.start("store", 0, Store)
    engine.start("absent", 0, Absent, 7)
    engine.sleep(12.0)
    calls = engine.find("store", Store).call(Store.history).result()
    assert [who for who, _ in calls] == [7, 7, 7]
    assert all(2.5 < after[1] - before[1] < 3.6 for before, after in pairwise([(7, 0.2), *calls]))


def test_an_answer_that_comes_when_nobody_waits_for_it_any_more_disturbs_no_later_wait(
    engines: Callable[..., SimulatedEngine],
) -> None:
    moments: list[float] = []

    class Impatient:
        def __init__(self, home: Home) -> None:
            self.home = home

        def run(self) -> None:
            answer = self.home.find("store", Store).call(Store.change, 0, torch.zeros(1000))
            for seconds in (0.0005, 0.001):
                assert not answer.wait(seconds)
            before = self.home.now()
            self.home.sleep(10.0)
            moments.extend((before, self.home.now()))
            assert self.home.find("store", Store).call(Store.history).wait(5.0)
            before = self.home.now()
            self.home.sleep(20.0)
            moments.append(self.home.now() - before)
            self.home.sleep(1000.0)

    engine = engines(costs=EXACT)
    engine.start("store", 0, Store)
    engine.sleep(1.0)
    engine.start("impatient", 0, Impatient)
    engine.sleep(50.0)
    assert moments == pytest.approx([1.5015, 11.5015, 20.0])


def test_an_answer_that_has_been_waited_for_is_let_go(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines()
    engine.start("store", 0, Store)
    answer = engine.find("store", Store).call(Store.history)
    assert answer.result() == []
    kept = weakref.ref(answer)
    del answer
    gc.collect()
    assert kept() is None


def test_a_late_answer_writes_nothing_into_the_callers_memory(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines(costs=EXACT)
    out = torch.full((1000,), 5.0)
    future = engine.find("store", Store, 0.2).call(Store.read, out)
    with pytest.raises(DeadlineExceeded):
        future.result()
    engine.start("store", 0, Store)
    engine.sleep(2.0)
    assert out.eq(5.0).all()
    assert engine.find("store", Store).call(Store.read, out).result() > 0.0
    assert out.eq(0.0).all()


# scale, and the end


def test_200_roles_work_in_one_process(engines: Callable[..., SimulatedEngine]) -> None:
    engine = engines(5)
    engine.start("store", 0, Store)
    for index in range(200):
        engine.start(f"worker/{index}", 0, Worker, index, 2)
    engine.sleep(3.0)
    calls = engine.find("store", Store).call(Store.history).result()
    assert sorted(who for who, _ in calls) == sorted(list(range(200)) * 2)
    assert engine.deaths() == []


def test_no_thread_is_left_after_closing_whatever_the_roles_were_doing() -> None:
    class Stubborn:
        """Waits for ever, and once more when it is ended."""

        def __init__(self, home: Home) -> None:
            self.home = home

        def run(self) -> None:
            try:
                self.home.find(COORDINATOR, Store, 1e9).call(Store.history)
                self.home.sleep(1e9)
            finally:
                self.home.sleep(1e9)

    class Unborn(Stubborn):
        def __init__(self, home: Home) -> None:
            home.sleep(1e9)

    engine = SimulatedEngine()
    engine.load(prepare)
    for index in range(5):
        engine.start(f"stubborn/{index}", 0, Stubborn)
        engine.start(f"unborn/{index}", 0, Unborn)
    engine.sleep(1.0)
    engine.start("late", 0, Stubborn)
    assert any(thread.name == "distbelief-simulated" for thread in threading.enumerate())
    engine.stop("stubborn/0")
    engine.close()
    assert not any(thread.name == "distbelief-simulated" for thread in threading.enumerate())


def test_what_is_simulated_computes_in_one_thread_and_who_simulates_has_his_own_back() -> None:
    found: list[int] = []

    def build() -> tuple[None, None]:
        found.append(torch.get_num_threads())
        torch.set_num_threads(2)  # as scripts do
        return None, None

    class Computing:
        def __init__(self, home: Home) -> None: ...

        def run(self) -> None:
            found.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with closing(SimulatedEngine()) as engine:
            engine.load(build)
            engine.start("role", 0, Computing)
            engine.sleep(1.0)
        assert found == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_of_the_user_in_a_role_does_not_reach_the_scheduler(engines: Callable[..., SimulatedEngine]) -> None:
    class Exits:
        def __init__(self, home: Home) -> None: ...

        def run(self) -> None:
            raise SystemExit(3)

    engine = engines()
    engine.start("exits", 0, Exits)
    engine.sleep(1.0)
    (death,) = engine.deaths()
    assert "SystemExit: 3" in (death.failure or "")


def test_a_role_that_raises_while_it_is_ended_leaves_the_next_incarnation_alone(
    engines: Callable[..., SimulatedEngine],
) -> None:
    class Clinging:
        def __init__(self, home: Home) -> None:
            self.home = home

        def run(self) -> None:
            try:
                self.home.sleep(1000.0)
            finally:
                raise ValueError("what is to be closed is not there any more")

    engine = engines()
    engine.start("store", 0, Clinging)
    engine.sleep(1.0)
    engine.stop("store")
    engine.start("store", 1, Store)
    assert engine.find("store", Store, 5.0).call(Store.history).result() == []


def test_a_role_may_not_be_waited_for_by_what_it_answers(engines: Callable[..., SimulatedEngine]) -> None:
    class Selfish:
        def __init__(self, home: Home) -> None:
            self.home = home

        @exported
        def ask(self) -> None:
            self.home.find("selfish", Selfish).call(Selfish.ask).result()

    engine = engines()
    engine.start("selfish", 0, Selfish)
    with pytest.raises(RemoteError, match="must not wait for a future"):
        engine.find("selfish", Selfish).call(Selfish.ask).result()


def test_memory_of_the_simulation_is_ordinary_memory(engines: Callable[..., SimulatedEngine]) -> None:
    assert memory.find(engines().allocate(10, torch.float32)) is None
