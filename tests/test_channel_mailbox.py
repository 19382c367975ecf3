# SPDX-License-Identifier: Apache-2.0
"""Laws of mailboxes: every parcel arrives once, in order and whole; who dies or hangs is noticed; nothing is left."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distbelief.channel import mailbox
from distbelief.channel.mailbox import RING_BYTES, Mailbox, meet, settle
from distbelief.channel.spin import Spin
from distbelief.errors import DeadlineExceeded, PeerLost
from tests.partition.threads import side_by_side

Work = Callable[[dict[int, Mailbox]], None]


def together(*works: Work, seconds: float = 20.0) -> None:
    """Each work with its mailboxes, in a thread of its own; the first error if one raises."""
    store = dist.HashStore()

    def run(index: int) -> None:
        boxes = meet(store, index, len(works), seconds)
        try:
            works[index](boxes)
        finally:
            for box in boxes.values():
                box.close()

    side_by_side(len(works), run)


def parcel(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("own_core", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_parcels_of_any_size_arrive_in_their_order_both_ways_at_once(
    processes: int, seed: int, own_core: bool
) -> None:  # fmt: skip
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 7, 4096, 100_000, RING_BYTES - 1, RING_BYTES, 2 * RING_BYTES + 5]) for _ in range(12)]

    def work(boxes: dict[int, Mailbox]) -> None:
        (me,) = {*range(processes)} - boxes.keys()
        pause, spin = random.Random(me), Spin(own_core)
        for number, length in enumerate(lengths):
            arrivals = {other: torch.empty(length, dtype=torch.uint8) for other in boxes}
            for other, box in boxes.items():
                box.receive(arrivals[other])
                box.send(parcel(1000 * number + 10 * me + other, length))
            time.sleep(pause.choice([0, 0, 0.003]))
            settle(boxes.values(), 10.0, spin)
            for other, arrival in arrivals.items():
                assert torch.equal(arrival, parcel(1000 * number + 10 * other + me, length))

    together(*[work] * processes)


def test_many_parcels_may_be_on_their_way_before_the_first_is_taken() -> None:
    count = 2000  # far more than the socket holds of what is told

    def send(boxes: dict[int, Mailbox]) -> None:
        for number in range(count):
            boxes[1].send(torch.tensor([number]))
        settle(boxes.values(), 20.0, Spin(False))

    def take(boxes: dict[int, Mailbox]) -> None:
        time.sleep(0.3)
        arrivals = torch.full((count, 1), -1)
        for number in range(count):
            boxes[0].receive(arrivals[number])
        settle(boxes.values(), 20.0, Spin(False))
        assert torch.equal(arrivals[:, 0], torch.arange(count))

    together(send, take)


@pytest.mark.parametrize("unread", [False, True])
def test_what_was_sent_before_the_sender_left_arrives_and_nothing_after_it(unread: bool) -> None:
    sent, told, left = threading.Event(), threading.Event(), threading.Event()

    def send(boxes: dict[int, Mailbox]) -> None:
        boxes[1].send(torch.ones(3))
        sent.set()
        told.wait(10)
        boxes[1].close()
        left.set()

    def take(boxes: dict[int, Mailbox]) -> None:
        sent.wait(10)
        if unread:
            boxes[0]._tell()
        told.set()
        left.wait(10)
        arrival, missing = torch.zeros(3), torch.zeros(3)
        boxes[0].receive(arrival)
        settle(boxes.values(), 10.0, Spin(False))
        assert arrival.tolist() == [1.0, 1.0, 1.0]
        boxes[0].receive(missing)
        with pytest.raises(PeerLost, match="closed the connection"):
            settle(boxes.values(), 10.0, Spin(False))

    together(send, take)


FOREVER = """
import sys
import torch
import torch.distributed as dist
from distbelief.channel.mailbox import meet, settle
from distbelief.channel.spin import Spin
spin = Spin(True)
box = meet(dist.FileStore(sys.argv[1], 2), 1, 2, 20.0)[0]
while True:
    arrival = torch.empty(1000)
    box.receive(arrival)
    box.send(arrival)
    settle([box], 100.0, spin)
"""


@contextmanager
def child(store: Path) -> Iterator[int]:
    """A process that is the second of two, and swaps for ever."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", FOREVER, str(store)], env=environment) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_killed_process_is_noticed_at_once_and_a_stopped_one_within_the_deadline(tmp_path: Path) -> None:
    with child(tmp_path / "store") as number:
        box, spin = meet(dist.FileStore(str(tmp_path / "store"), 2), 0, 2, 20.0)[1], Spin(True)

        def swap(seconds: float) -> None:
            box.receive(torch.empty(1000))
            box.send(torch.ones(1000))
            settle([box], seconds, spin)

        [swap(10.0) for _ in range(20)]
        os.kill(number, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="nothing came within"):  # after what it had sent before
            [swap(0.5) for _ in range(3)]
        assert 0.4 < time.monotonic() - started < 3
        os.kill(number, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerLost):
            swap(30.0)
        assert time.monotonic() - started < 3
        box.close()


def test_who_has_closed_it_himself_is_told_so_at_the_next_parcel() -> None:
    def work(boxes: dict[int, Mailbox]) -> None:
        for box in boxes.values():
            box.close()
            box.receive(torch.empty(3))
        with pytest.raises(PeerLost):
            settle(boxes.values(), 10.0, Spin(False))

    together(work, work)


def test_there_are_none_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["one", "one", "another"])
    monkeypatch.setattr(mailbox, "_here", lambda: next(names))
    found: list[int] = []
    together(*[lambda boxes: found.append(len(boxes))] * 3)
    assert found == [0, 0, 0]


def test_who_never_comes_is_noticed_and_a_stranger_is_no_partition() -> None:
    store = dist.HashStore()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("")
        silent.listen()
        store.set("mailbox/1", f"{mailbox._here()} {silent.getsockname().hex()}")
        with pytest.raises(DeadlineExceeded, match="not all of 2 processes came within"):
            meet(store, 0, 2, 0.3)
    with pytest.raises(PeerLost, match="one of 2 processes left while they met"):
        meet(store, 0, 2, 0.3)


@pytest.mark.parametrize(
    ("words", "error"),
    [(None, DeadlineExceeded), (b"", PeerLost), (b"\0\0\0\0", PeerLost)],
    ids=["none", "an end", "half"],
)
def test_who_comes_and_does_not_introduce_himself_is_no_partition(words: bytes | None, error: type[Exception]) -> None:
    store = dist.HashStore()
    store.set("mailbox/0", f"{mailbox._here()} 00")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:

        def come() -> None:
            caller.connect(bytes.fromhex(store.get("mailbox/1").decode().split()[1]))
            if words is not None:
                caller.send(words)

        coming = threading.Thread(target=come)
        coming.start()
        with pytest.raises(error):
            meet(store, 1, 2, 0.5)
        coming.join()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_is_refused() -> None:
    names, name = os.pipe()
    number = os.fork()
    if not number:
        try:
            os.setuid(65534)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind("")
            listener.listen()
            os.write(name, listener.getsockname())
            listener.accept()
            time.sleep(10)
        finally:
            os._exit(0)
    try:
        store = dist.HashStore()
        store.set("mailbox/1", f"{mailbox._here()} {os.read(names, 100).hex()}")
        with pytest.raises(PeerLost, match="another user"):
            meet(store, 0, 2, 10.0)
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        os.close(names)
        os.close(name)
