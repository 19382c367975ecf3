# SPDX-License-Identifier: Apache-2.0
"""Laws of processes that are forked from one another: what each has for itself."""

import functools
import os
import random
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.channel.base import exported
from distbelief.engine import zygote
from distbelief.engine.base import Death, Home
from distbelief.engine.local import LocalEngine
from distbelief.engine.pickles import SHARED
from distbelief.errors import PeerLost
from tests import problems
from tests.killer import Killer, settled

NAMES = ["role/0", "role/1", "role/2"]


def open_file(path: str) -> tuple[Any, bytes]:
    """As a function that builds a data set: it leaves a file open, and has read from it."""
    file = open(path, "rb")  # noqa: SIM115
    return file, file.read(10)


def tell_where(file: Any) -> None:
    """As an attempt: it moves on in the file."""
    assert file.read(10) == b"\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13"


class Reader:
    """A role that reads a file."""

    def __init__(self, home: Home, file: Any, ends: bool = False) -> None:
        self.home, self.file, self.ends = home, file, ends

    @exported
    def read(self, start: int, count: int) -> bytes:
        self.file.seek(start)
        return bytes(self.file.read(count))

    @exported
    def start_another(self) -> int:
        return subprocess.Popen(["sleep", "600"]).pid

    def run(self) -> None:
        if self.ends:
            os._exit(0)
        self.home.sleep(60.0)


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    with closing(LocalEngine(NAMES)) as engine:
        yield engine


def test_roles_read_a_file_that_was_open_before_them_each_at_a_place_of_its_own(
    engine: LocalEngine, tmp_path: Path
) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(index % 251 for index in range(1_000_000)))
    assert engine.load(open_file, str(path), attempt=tell_where) == bytes(range(10))
    for name in NAMES:
        engine.start(name, 0, Reader, SHARED)
    readers = [engine.find(name, Reader) for name in NAMES]
    draws = random.Random(0)
    for _ in range(50):
        starts = [draws.randrange(900_000) for _ in readers]
        said = [reader.call(Reader.read, start, 50_000) for reader, start in zip(readers, starts, strict=True)]
        for start, answer in zip(starts, said, strict=True):
            assert answer.result() == bytes(index % 251 for index in range(start, start + 50_000))


def test_a_role_that_something_in_it_ends_is_a_death_whatever_its_exit_code(
    engine: LocalEngine, tmp_path: Path
) -> None:
    (tmp_path / "numbers").write_bytes(bytes(20))
    engine.load(open_file, str(tmp_path / "numbers"))
    engine.start(NAMES[0], 0, Reader, SHARED, True)
    deaths: list[Death] = []
    until = engine.now() + 10.0
    while not deaths and engine.now() < until:
        engine.sleep(0.01)
        deaths += engine.deaths()
    assert deaths == [Death(NAMES[0], 0, "something in it ended it, with exit code 0", None)]


def test_what_a_role_has_started_ends_with_the_role_and_not_with_the_job_only(
    engine: LocalEngine, tmp_path: Path
) -> None:
    (tmp_path / "numbers").write_bytes(bytes(20))
    engine.load(open_file, str(tmp_path / "numbers"))
    engine.start(NAMES[0], 0, Reader, SHARED)
    started = Path(f"/proc/{engine.find(NAMES[0], Reader).call(Reader.start_another).result()}")
    assert started.exists()
    engine.stop(NAMES[0])
    until = engine.now() + 5.0
    while started.exists():
        assert engine.now() < until
        engine.sleep(0.01)


def test_a_job_outlives_the_thread_that_loaded_it(engine: LocalEngine, tmp_path: Path) -> None:
    (tmp_path / "numbers").write_bytes(bytes(range(20)))
    thread = threading.Thread(target=engine.load, args=(open_file, str(tmp_path / "numbers")))
    thread.start()
    thread.join()
    time.sleep(0.05)
    engine.start(NAMES[0], 0, Reader, SHARED)
    answer = engine.find(NAMES[0], Reader).call(Reader.read, 3, 2)
    while not answer.done():
        assert engine.deaths() == []
        engine.sleep(0.01)
    assert answer.result() == bytes([3, 4])


class Drawn(TensorDataset):
    """Notes who has drawn which random numbers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(*problems.points(320).tensors)
        self.folder = folder

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        with (self.folder / f"{os.getpid()}").open("a") as file:
            file.write(f"{numpy.random.random()} {random.random()} {float(torch.rand(()))}\n")
        return super().__getitem__(index)


@pytest.mark.slow
def test_replicas_draw_other_random_numbers_of_torch_numpy_and_python_than_each_other(tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=3, shards=1, threads_per_replica=1)
    algorithm = db.Downpour(warmstart=0, cooldown=0)
    (tmp_path / "drawn").mkdir()
    job = problems.job(
        data=functools.partial(Drawn, tmp_path / "drawn"), test=None, cluster=cluster, algorithm=algorithm, epochs=4,
        run=tmp_path / "run",
    )  # fmt: skip
    faults = db.Faults(slow={f"replica/{index}": 3.0 for index in range(3)})
    db.train(job, view=False, faults=faults)
    draws = [path.read_text().split() for path in (tmp_path / "drawn").iterdir()]
    drawing = [numbers for numbers in draws if len(numbers) > 3 * 16]
    assert len(drawing) == 3, "not all replicas had something to do"
    numbers = [number for numbers in draws for number in numbers]
    assert len(set(numbers)) == len(numbers)


def twice(number: int) -> int:
    return 2 * number


class Pooled(TensorDataset):
    """Starts a pool, and another program, when it is first asked."""

    pool: ProcessPoolExecutor | None = None

    def __init__(self) -> None:
        super().__init__(*problems.points(320).tensors)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1)
            subprocess.Popen(["sleep", "600"])
        assert self.pool.submit(twice, index).result() == 2 * index
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["nobody", "replica/0", "zygote"])
def test_processes_that_user_code_starts_in_a_role_end_with_it(
    killed: str, tmp_path: Path, leaks: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = db.Cluster(replicas=2, shards=1, threads_per_replica=1)
    job = problems.job(data=Pooled, test=None, cluster=cluster, epochs=10, run=tmp_path / "run")
    killer = [] if killed == "nobody" else [Killer(monkeypatch, killed, settled(640))]
    result = db.train(job, view=False, listeners=killer, faults=db.Faults(slow={"replica/0": 3.0, "replica/1": 3.0}))
    assert result.summary.examples.missing == 0
    assert bool(result.summary.faults) == (killed != "nobody")
    assert not leaks()


def test_who_begins_with_ended_children_ignored_trains_all_the_same(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        cluster = db.Cluster(replicas=1, shards=1, threads_per_replica=1)
        result = db.train(problems.job(cluster=cluster, epochs=1, test=None, run=tmp_path / "run"), view=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert result.summary.reason == "all epochs finished"


TRIALS = """
import os, socket, sys, threading, time, warnings
from distbelief.engine import forks, trial
from distbelief.errors import TrainingFailed, UserCodeError

forks.heed_no_terminations()
owner, end = socket.socketpair()
trial.LONG_SECONDS = 0.2

def starts_another() -> None:
    if os.fork() == 0:
        time.sleep(600)  # and holds all that its parent had open

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    trial.try_apart(starts_another, owner)
    assert not told
    trial.try_apart(lambda: time.sleep(1.5), owner)
assert "trying one mini-batch has taken 0.2 s" in str(told[0].message), told
def raises_what_has_no_encoding() -> None:
    raise TrainingFailed(lambda: None)

own = os.getpid()
try:
    trial.try_apart(raises_what_has_no_encoding, owner)
except UserCodeError as error:
    assert "ended with exit code 1, before anything was trained" in str(error), error
except Exception:
    os.kill(own, 9)  # the fork has gone on

begun = time.monotonic()
threading.Timer(0.5, end.shutdown, [socket.SHUT_RDWR]).start()
try:
    trial.try_apart(lambda: time.sleep(600), owner)
except trial.OwnerGone:
    assert time.monotonic() - begun < 5
else:
    raise AssertionError("it went on")
"""


@pytest.mark.slow
def test_a_trial_waits_for_nobody_else_says_if_it_takes_long_and_is_over_whatever_it_raises() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRIALS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_where_the_machine_has_no_process_to_spare_a_role_dies_of_that_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    ours, theirs = socket.socketpair()
    started = zygote.Zygote(theirs)
    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(zygote, "FORK_PAUSES", (0.01, 0.01))
    zygote.send(ours, ("start", "replica/0", 3, b""), (ours.fileno(),))
    started._obey(*zygote.receive(theirs))
    said, _ = zygote.receive(ours)
    problem = "could not be started: [Errno 11] Resource temporarily unavailable"
    assert said == ("ended", "replica/0", 3, 1, zygote.LOST.decode() + problem)
    for each in (ours, theirs, started._selector):
        each.close()


@dataclass
class Owned:
    """A zygote of this process, its owner's end, and what stands for its forks."""

    ours: socket.socket
    zygote: zygote.Zygote
    forks: list[subprocess.Popen[bytes]]

    def order(self, *message: Any) -> None:
        zygote.send(self.ours, message, (self.zygote._control.fileno(),) if message[0] == "start" else ())
        self.zygote._obey(*zygote.receive(self.zygote._control))

    def said(self) -> Any:
        return zygote.receive(self.ours)[0]


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Owned]:
    ours, theirs = socket.socketpair()
    ours.settimeout(5.0)
    owned = Owned(ours, zygote.Zygote(theirs), [])

    def fork() -> int:
        owned.forks.append(subprocess.Popen(["sleep", "600"]))
        return owned.forks[-1].pid

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(zygote, "FORK_PAUSES", (0.01, 0.01, 0.01))
    yield owned
    for fork_ in owned.forks:
        fork_.kill()
        fork_.wait()
    for descriptor in [each for watch, child in owned.zygote._children.items() for each in (watch, child[3])]:
        os.close(descriptor)
    for each in (ours, theirs, owned.zygote._selector):
        each.close()


def test_a_role_that_cannot_be_watched_is_ended_and_tried_again_and_nothing_of_it_is_left(
    owned: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = os.pidfd_open

    def scarce(pid: int) -> int:
        if len(owned.forks) < 3:
            raise OSError(24, "Too many open files")
        return watch(pid)

    monkeypatch.setattr(os, "pidfd_open", scarce)
    owned.order("start", "replica/0", 3, b"")
    pids = [fork.pid for fork in owned.forks]
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False, True]
    assert owned.said() == ("started", "replica/0", 3, pids[2])
    owned.order("signal", "replica/1", signal.SIGKILL)
    owned.order("start", "replica/1", 0, b"")
    owned.order("signal", "replica/1", signal.SIGKILL)
    assert owned.said() == ("started", "replica/1", 0, owned.forks[3].pid)
    ended = [key.fd for key, _ in owned.zygote._selector.select(5.0)]
    assert [owned.zygote._children[fd][0] for fd in ended] == ["replica/1"]
    owned.order("signal", "replica/0", signal.SIGKILL)
    for child in list(owned.zygote._children):
        owned.zygote._bury(child)
    assert [owned.said() for _ in range(2)] == [("ended", "replica/0", 3, -9, ""), ("ended", "replica/1", 0, -9, "")]


def test_a_zygote_does_not_wait_for_a_process_that_a_role_has_left_and_that_holds_its_report(owned: Owned) -> None:
    read_end, write_end = os.pipe()
    role, left = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "2"], pass_fds=[write_end])
    owned.forks += [role, left]
    os.close(write_end)
    watch = os.pidfd_open(role.pid)
    owned.zygote._children[watch] = ("replica/0", 0, role.pid, read_end)
    owned.zygote._selector.register(watch, selectors.EVENT_READ)
    owned.zygote._bury(watch)
    assert left.poll() is None
    reason = "something in it ended it, with exit code 0"
    assert owned.said() == ("ended", "replica/0", 0, 0, zygote.LOST.decode() + reason)


def test_a_zygote_never_waits_for_its_owner_and_tries_nothing_again_when_it_is_gone(owned: Owned) -> None:
    for number in range(5_000):
        owned.zygote._tell("started", "role", 0, number)
    assert owned.zygote._outbox
    for number in range(5_000):
        while not select.select([owned.ours], [], [], 0.0)[0]:
            ((_, events),) = owned.zygote._selector.select(5.0)
            assert events & selectors.EVENT_WRITE
            owned.zygote._flush()
        assert owned.said() == ("started", "role", 0, number)
    assert owned.zygote._selector.select(0.0) == [], "there is nothing left to say"
    zygote.send(owned.ours, ("start", "replica/0", 3, b""))
    owned.ours.close()
    with pytest.raises(EOFError):
        owned.zygote._obey(*zygote.receive(owned.zygote._control))
    assert len(owned.forks) == 1


def test_messages_arrive_whole_in_whatever_pieces() -> None:
    ours, theirs = socket.socketpair()
    whole, (kept, end) = ("loaded", b"x" * 1_000_000, None), socket.socketpair()
    zygote.send(kept, ("signal", "role", 9))
    pieces = end.recv(1000)

    def say() -> None:
        for start in range(len(pieces)):
            ours.sendall(pieces[start : start + 1])
            time.sleep(0.0005)
        zygote.send(ours, whole)
        ours.sendall(pieces[:-1])
        ours.close()

    with closing(theirs), closing(kept), closing(end):
        thread = threading.Thread(target=say)
        thread.start()
        assert zygote.receive(theirs)[0] == ("signal", "role", 9)
        assert zygote.receive(theirs)[0] == whole
        with pytest.raises(EOFError):
            zygote.receive(theirs)
        thread.join()


def test_the_last_words_of_a_role_fit_and_are_those_that_say_most(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(zygote, "open_files_anew", lambda: None)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def last_words(error: BaseException) -> bytes:
        def build() -> Callable[[], None]:
            raise error

        zygote.run_role(build, write_end)
        return os.read(read_end, 1 << 20)

    assert last_words(ValueError("x" * 1_000_000 + "here")).endswith(b"xxxhere\n")
    assert last_words(PeerLost("shard/0 is gone" + "x" * 5_000))[:26] == b"\0PeerLost: shard/0 is gone"
    assert codes == [1, 1]
    os.close(read_end)
    os.close(write_end)
