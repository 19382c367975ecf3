# SPDX-License-Identifier: Apache-2.0
"""Laws of processes that are forked from one another: what each has for itself."""

import functools
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
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
begun = time.monotonic()
threading.Timer(0.5, end.shutdown, [socket.SHUT_RDWR]).start()
try:
    trial.try_apart(lambda: time.sleep(600), owner)
except trial.OwnerGone:
    assert time.monotonic() - begun < 5
else:
    raise AssertionError("it went on")
"""


def test_the_trial_of_a_mini_batch_waits_for_nobody_but_itself_and_its_owner_and_says_that_it_takes_long() -> None:
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
