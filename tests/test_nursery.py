# SPDX-License-Identifier: Apache-2.0
"""Laws of who starts roles: a nursery, and the keeper of a host, with a zygote that the test plays."""

import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest

from distbelief.channel.base import Promise, Remote, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import Kept
from distbelief.channel.peer import Peer, at
from distbelief.channel.place import Place
from distbelief.channel.wire import Wire
from distbelief.engine import nursery as module
from distbelief.engine import zygote
from distbelief.engine.base import Death, Faults
from distbelief.engine.host import LEASE_SHARE, Host, HostWiring, Invitation, Prepared, birth
from distbelief.engine.lease import Lease
from distbelief.engine.listener import LOOPBACK, listen, listen_over_tcp, name_of
from distbelief.engine.nursery import STOP_SECONDS, Nursery
from distbelief.engine.pickles import new_arena
from distbelief.engine.registry import Introduction, Note
from distbelief.errors import Fenced, NotReady, TrainingFailed

NOBODY = 1 << 23
"""No process has this number, nor one above it."""
PATIENT_SECONDS = 20.0
"""On a machine that is busy with other tests a host may be silent for a while."""
LOADED = ("loaded", b"described", None)


class Played:
    """A zygote, as its owner has it; `end` is the zygote's own end of the control socket."""

    def __init__(self, end: socket.socket, control: socket.socket | None = None) -> None:
        self.control, self.end, self.pid = control, end, NOBODY
        self.returncode: int | None = None
        self.waits: list[float | None] = []
        self.killed = False
        end.settimeout(5.0)

    def wait(self, seconds: float | None = None) -> int:
        self.waits.append(seconds)
        if seconds is not None and self.returncode is None:
            raise subprocess.TimeoutExpired("zygote", seconds)
        self.returncode = self.returncode or 0
        return self.returncode

    def kill(self) -> None:
        self.killed = True

    def heard(self) -> Any:
        """The next message, without the payload of a start."""
        message, descriptors = zygote.receive(self.end)
        for descriptor in descriptors:
            os.close(descriptor)
        return message[:3]

    def has_nothing_to_hear(self) -> bool:
        return not select.select([self.end], [], [], 0.0)[0]

    def is_left(self) -> bool:
        return not self.end.recv(1, socket.MSG_PEEK)


class Room:
    """A nursery, and the zygotes that it has begun."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.zygotes, self.changes = endpoint, list[Played](), 0
        self.ended: list[int] = []
        """The groups of processes, by their leaders."""
        self.nursery = Nursery(endpoint, self.note)

    def note(self) -> None:
        self.changes += 1

    def begin(self, arguments: Any, *, pass_fds: list[int], **options: Any) -> Played:
        self.zygotes.append(Played(socket.socket(fileno=os.dup(pass_fds[0]))))
        return self.zygotes[-1]

    def load(self) -> Played:
        """Bring a job, and let the newest zygote hear of it."""
        self.nursery.load({}, [1], new_arena([1]))
        assert self.zygotes[-1].heard()[0] == "load"
        return self.zygotes[-1]

    def say(self, *message: Any) -> None:
        """The newest zygote says this."""
        zygote.send(self.zygotes[-1].end, message)
        self.endpoint.poll(1.0)

    def up(self, role: str, incarnation: int, pid: int) -> None:
        self.nursery.start(role, incarnation, b"", ())
        self.say("started", role, incarnation, pid)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    with closing(Endpoint(b"the key")) as endpoint:
        room = Room(endpoint)
        world = {"Popen": room.begin, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(**world))
        monkeypatch.setattr(module, "end_group", room.ended.append)
        yield room
        room.nursery.close()
        for played in room.zygotes:
            played.end.close()


def test_what_is_asked_before_the_job_is_loaded_is_told_in_order_when_it_is_also_to_the_next_zygote(
    room: Room,
) -> None:
    for incarnation in range(2):
        played = room.load() if not incarnation else room.zygotes[0]
        room.nursery.start("role/0", incarnation, b"", ())
        if incarnation:
            played = room.zygotes[-1]
            assert played.heard()[0] == "load"
        room.nursery.signal("role/0", 19)
        assert played.has_nothing_to_hear()
        assert (room.nursery.loaded, room.nursery.alive) == (None, {"role/0": incarnation})
        room.say(*LOADED)
        assert [played.heard() for _ in range(2)] == [("start", "role/0", incarnation), ("signal", "role/0", 19)]
        assert room.nursery.processes == {"zygote": NOBODY}
        if incarnation:
            room.nursery.signal("role/0", 18)  # what a process has not read ends its connection as broken
        played.end.close()
        room.endpoint.poll(1.0)
        assert room.nursery.deaths() == [Death("role/0", incarnation, "the process that starts roles was killed")]
        assert (room.nursery.alive, room.nursery.processes) == ({}, {})
        assert (played.killed, played.waits) == (True, [0.0, None]), "it is not left a zombie"
        assert not room.endpoint.poll(0.0), "nobody is listened to any more"
    assert room.changes == 4


def test_a_zygote_that_ends_while_it_loads_is_the_outcome(room: Room) -> None:
    room.load()
    room.zygotes[0].returncode = 3
    room.zygotes[0].end.close()
    room.endpoint.poll(1.0)
    assert room.nursery.loaded is not None
    with pytest.raises(TrainingFailed, match=r"ended while it loaded the job \(exit code 3\)"):
        raise room.nursery.loaded.failure or AssertionError


def test_roles_that_wait_for_a_job_that_cannot_be_loaded_again_die_of_that(room: Room) -> None:
    played = room.load()
    room.nursery.start("role/0", 3, b"", ())
    room.say("loaded", b"", TrainingFailed("there is no such file"))
    assert room.nursery.deaths() == [Death("role/0", 3, "the job could not be loaded again", "there is no such file")]
    assert room.nursery.deaths() == []
    assert room.nursery.alive == {}
    assert played.has_nothing_to_hear()


def test_a_role_that_ends_is_a_death_with_its_reason_unless_it_was_stopped_or_its_work_is_over(room: Room) -> None:
    room.load()
    room.say(*LOADED)
    ends = {
        (0, ""): None, (-9, ""): "killed by signal 9", (1, "Traceback"): "exit code 1", (5, ""): "exit code 5",
        (1, zygote.LOST.decode() + "PeerLost"): "PeerLost", (0, zygote.LOST.decode() + "it was ended"): "it was ended",
    }  # fmt: skip
    for incarnation, ((code, failure), reason) in enumerate(ends.items()):
        room.up("role/0", incarnation, NOBODY + 1)
        assert (room.nursery.alive, room.nursery.processes["role/0"]) == ({"role/0": incarnation}, NOBODY + 1)
        room.say("ended", "role/0", incarnation, code, failure)
        assert (room.nursery.alive, room.nursery.processes) == ({}, {"zygote": NOBODY})
        traceback = failure if failure == "Traceback" else None
        assert room.nursery.deaths() == ([Death("role/0", incarnation, reason, traceback)] if reason else [])
    room.up("role/1", 0, NOBODY + 1)
    room.nursery.stop("role/1")
    room.say("ended", "role/1", 0, -9, "")
    room.nursery.stop("role/1")
    assert room.nursery.deaths() == []


def test_what_is_told_of_an_incarnation_that_was_replaced_changes_nothing(room: Room) -> None:
    played = room.load()
    room.say(*LOADED)
    room.nursery.start("role/0", 0, b"", ())
    room.nursery.stop("role/0")
    room.nursery.start("role/0", 1, b"", ())
    orders = [("start", "role/0", 0), ("signal", "role/0", 9), ("start", "role/0", 1)]
    assert [played.heard() for _ in range(3)] == orders
    room.say("started", "role/0", 0, NOBODY + 1)
    assert "role/0" not in room.nursery.processes
    room.say("started", "role/0", 1, NOBODY + 2)
    room.say("ended", "role/0", 0, -9, "")
    assert (room.nursery.alive, room.nursery.processes["role/0"]) == ({"role/0": 1}, NOBODY + 2)
    assert room.nursery.deaths() == []
    room.up("role/0", 2, NOBODY + 3)
    room.say("ended", "role/0", 1, -9, "")
    assert (room.nursery.alive, room.nursery.processes["role/0"]) == ({"role/0": 2}, NOBODY + 3)
    assert room.nursery.deaths() == [Death("role/0", 1, "killed by signal 9")]
    room.nursery.stop("role/0")
    assert "role/0" not in room.nursery.processes, "its number may be another process's soon"


def test_a_job_that_takes_the_place_of_another_one_leaves_nothing_of_it(room: Room) -> None:
    first = room.load()
    room.say(*LOADED)
    room.up("role/0", 0, NOBODY + 1)
    assert first.heard()[0] == "start"
    room.load()
    assert first.is_left()
    assert (first.killed, first.waits) == (True, [0.0, None])
    assert room.ended == [NOBODY, NOBODY + 1], "what user code started in them ends, too"
    room.nursery.close()
    assert room.zygotes[1].waits[0] == STOP_SECONDS, "it ends in order, and user code with it"
    room.nursery.close()


def test_a_zygote_that_was_never_needed_is_ended_too() -> None:
    control, end = socket.socketpair()
    with closing(Endpoint(b"the key")) as endpoint, closing(end):
        played: Any = Played(end, control)
        Nursery(endpoint, first=played).close()
        assert played.is_left()
        assert (played.killed, played.waits) == (True, [STOP_SECONDS, None])


# keepers and roles


class Called:
    """As a peer whose role may have moved."""

    times = 0

    def seek_again(self) -> None:
        self.times += 1


class Idle:
    """A role without an activity; it calls others, and nobody calls it."""

    def __init__(self, home: Any, number: int) -> None:
        self.home, self.number = home, number

    def run(self) -> None:
        """Return, what a role does last."""


@pytest.mark.parametrize("devices", [None, "2,3"])
def test_a_role_is_born_with_its_accelerators_its_hosts_address_and_a_lease_that_it_obeys(
    devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"):
        monkeypatch.setenv(name, "another's")
    registry = Place("driver", "", ("127.0.0.1", 1))
    wiring = HostWiring(
        host="host0", address="127.0.0.1", faults=Faults(slow={"role/0": 3.0}), devices=devices,
        invitation=Invitation(key=b"the key", registry=registry, wire=Wire(), lost_seconds=1.5),
    )  # fmt: skip
    lease, roles, listener = Lease.create(), list[Idle](), listen("role/0")
    assert lease.over
    lease.renew(float("inf"), 3)
    descriptors = [os.dup(lease.descriptor), os.dup(listener.fileno())]
    birth("role/0", 4, wiring, lambda *given: roles.append(Idle(*given)) or roles[-1], (7,), descriptors)()
    home = roles[0].home
    with closing(home._endpoint), closing(listener):
        assert (home.name, home.incarnation, home.address, roles[0].number) == ("role/0", 4, "127.0.0.1", 7)
        assert [each.getsockname() for each in home._endpoint._listeners] == [listener.getsockname()]
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == devices
        assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_FAMILY"]) == ("=lo", "AF_INET")
        assert home._slowness == 3.0
        assert home._endpoint._background is not None, "nobody would answer while it computes"
        peer, ends = Called(), list[tuple[int, int]]()
        home._peers.add(peer)
        for moved, moves in enumerate((3, 4), 1):
            lease.renew(float("inf"), moves)
            home._endpoint.wake()
            wait_until(lambda times=moved: peer.times == times)
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", lambda *sent: ends.append(sent))
            home._endpoint._permit()
            lease.renew(time.monotonic() - 0.001, 4)
            home._endpoint._permit()
        assert ends == [(os.getpid(), signal.SIGKILL)]


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


class Desk:
    """The registry, as a host sees it. While it is `silent` no beat is answered, and who joins is not while `shut`."""

    def __init__(self) -> None:
        self.endpoint: Endpoint
        self.silent, self.shut, self.fenced, self.moves = False, False, False, 0
        self.joins = 0
        self.beats: list[tuple[float, int, list[Note]]] = []
        """(when it was heard, the first note's number, notes)."""
        self.unanswered: list[Kept[int]] = []

    @exported
    def join(self, introduction: Introduction) -> Promise[None]:
        self.joins += 1
        promise: Kept[None] = Kept(self.endpoint)
        if not self.shut:
            promise.keep(None)
        return promise

    @exported
    def beat(self, host: str, first: int, notes: list[Note]) -> Promise[int]:
        if self.fenced:
            raise Fenced(f"host {host} was given up")
        self.beats.append((time.monotonic(), first, notes))
        promise: Kept[int] = Kept(self.endpoint)
        if self.silent:
            self.unanswered.append(promise)
        else:
            promise.keep(self.moves)
        return promise


class House:
    """A keeper, which works in a thread, its coordinator and its zygote."""

    def __init__(self, ending: ExitStack, lost_seconds: float) -> None:
        self.lost_seconds, self.desk = lost_seconds, Desk()
        listeners = [listen("registry"), listen_over_tcp()]
        place = Place("host0", *map(name_of, listeners))
        self.endpoint = self.desk.endpoint = Endpoint(b"the key", role=self.desk, listeners=listeners)
        for each in (self.endpoint, *listeners):
            ending.callback(each.close)
        invitation = Invitation(key=b"the key", registry=place, wire=Wire(), lost_seconds=lost_seconds)
        control, end = socket.socketpair()
        ending.callback(end.close)
        self.zygote: Any = Played(end, control)
        self.host = Host("host0", LOOPBACK, invitation, self.zygote)
        self.keeper: Remote[Host] = Peer(self.endpoint, at(self.host._place.name), 20.0)
        self.thread = threading.Thread(target=self.host.serve)

    def open(self) -> None:
        self.thread.start()
        self.until(lambda: self.desk.beats)

    def until(self, condition: Callable[[], object]) -> None:
        limit = time.monotonic() + 10.0
        while not condition():
            assert time.monotonic() < limit, "it did not happen"
            self.endpoint.poll(0.01)

    def load(self, **main: Any) -> None:
        self.keeper.call(Host.announce, main, [1]).result()
        loading = self.keeper.call(Host.load)
        self.until(lambda: not self.zygote.has_nothing_to_hear())
        assert self.zygote.heard()[0] == "load"
        self.say(*LOADED)
        assert loading.result() == Prepared(b"described", b"")

    def start(self, role: str, incarnation: int) -> Place | None:
        return self.keeper.call(Host.start, role, incarnation, b"", True).result()

    def say(self, *message: Any) -> None:
        zygote.send(self.zygote.end, message)

    def notes(self) -> list[Note]:
        """All that was told, once each."""
        found: list[Note] = []
        for _, first, notes in self.desk.beats:
            found[first:] = notes
        return found

    def close(self) -> None:
        self.desk.silent, self.desk.fenced = False, True
        if self.thread.ident is not None:
            self.keeper.call(Host.end)
            self.until(lambda: not self.thread.is_alive())


@pytest.fixture
def open_house(request: pytest.FixtureRequest) -> Iterator[Callable[[float], House]]:
    with ExitStack() as ending:

        def make(lost_seconds: float) -> House:
            house = House(ending, lost_seconds)
            ending.callback(house.close)
            return house

        yield make


def test_a_host_tells_at_once_who_began_and_who_ended_with_the_reason_first(
    open_house: Callable[[float], House],
) -> None:
    house = open_house(60.0)  # a beat in ten seconds
    house.open()
    house.load()
    started = time.monotonic()
    for incarnation, said in enumerate([(0, ""), (-9, ""), (1, "Traceback")]):
        house.start("role/0", incarnation)
        house.say("started", "role/0", incarnation, NOBODY + 1)
        house.until(lambda number=incarnation: Note("role/0", number, NOBODY + 1) in house.notes())
        house.say("ended", "role/0", incarnation, *said)
        house.until(lambda number=incarnation: Note("role/0", number, 0) in house.notes())
    for incarnation in range(2):  # the second takes the place of the first
        house.start("role/1", incarnation)
        house.say("started", "role/1", incarnation, NOBODY + 2 + incarnation)
        house.until(lambda number=incarnation: Note("role/1", number, NOBODY + 2 + number) in house.notes())
    assert house.notes() == [
        Note("role/0", 0, NOBODY + 1), Note("role/0", 0, 0),
        Note("role/0", 1, NOBODY + 1), Note("role/0", 1, 0, "killed by signal 9"), Note("role/0", 1, 0),
        Note("role/0", 2, NOBODY + 1), Note("role/0", 2, 0, "exit code 1", "Traceback"), Note("role/0", 2, 0),
        Note("role/1", 0, NOBODY + 2), Note("role/1", 0, 0), Note("role/1", 1, NOBODY + 3),
    ]  # fmt: skip
    assert len(house.desk.beats) <= 1 + len(house.notes()), "what was answered is told no more"
    assert time.monotonic() - started < 8.0, "they waited for a beat"


def test_what_a_host_has_noted_is_told_until_it_was_answered_and_its_lease_counts_from_when_it_asked(
    open_house: Callable[[float], House],
) -> None:
    house = open_house(PATIENT_SECONDS)
    house.open()
    house.load()
    house.desk.silent = True
    for number in range(2):
        house.start(f"role/{number}", 0)
        house.say("started", f"role/{number}", 0, NOBODY + 1 + number)
        house.until(lambda alive=number + 1: len(house.host._living) == alive and house.desk.unanswered)
    house.endpoint.poll(0.3)
    house.desk.unanswered[0].keep(4)
    house.until(lambda: len(house.desk.unanswered) == 2)
    lease, heard = house.host._lease, [when for when, _, _ in house.desk.beats[-2:]]
    assert (lease.moves, lease._numbers[0] <= heard[0] + LEASE_SHARE * PATIENT_SECONDS) == (4, True)
    house.desk.unanswered[1].keep(5)
    house.until(lambda: lease.moves == 5)
    assert lease._numbers[0] < heard[1] + 0.9 * PATIENT_SECONDS, "others begin its roles then"
    told = [Note(f"role/{number}", 0, NOBODY + 1 + number) for number in range(2)]
    assert [(first, notes) for _, first, notes in house.desk.beats[-2:]] == [(0, told[:1]), (1, told[1:])]


def test_a_host_that_is_not_answered_ends_its_roles_within_the_time_after_which_it_counts_as_lost(
    open_house: Callable[[float], House],
) -> None:
    house = open_house(1.5)
    house.open()
    house.load()
    house.desk.silent = True
    house.until(lambda: not house.thread.is_alive())
    assert house.zygote.is_left()
    assert (house.zygote.killed, house.zygote.waits[0]) == (True, 0.0), "it was waited for"
    assert house.host._lease.over


def test_a_host_outlives_its_connection_to_the_coordinator(open_house: Callable[[float], House]) -> None:
    house = open_house(PATIENT_SECONDS)
    house.open()
    house.load()
    house.desk.silent = True
    house.start("role/0", 0)
    house.say("started", "role/0", 0, NOBODY + 1)
    house.until(house.notes)
    for connection in list(house.endpoint._connections):
        connection.socket.shutdown(socket.SHUT_RDWR)
    house.desk.silent, before = False, len(house.desk.beats)
    house.until(lambda: len(house.desk.beats) > before)
    assert house.desk.beats[before][1:] == (0, [Note("role/0", 0, NOBODY + 1)])


def test_a_host_tells_why_it_cannot_call_another_one(open_house: Callable[[float], House]) -> None:
    house = open_house(60.0)
    house.open()
    nobody = Place("host1", "", ("127.0.0.1", 1))
    told = house.keeper.call(Host.reach, [house.host._place, nobody]).result()
    assert told[0] == ""
    assert "nothing answers at ('127.0.0.1', 1)" in told[1]


def test_a_host_that_was_given_up_ends_its_roles(open_house: Callable[[float], House]) -> None:
    house = open_house(60.0)
    house.open()
    house.load()
    house.desk.fenced = True
    house.start("role/0", 0)
    house.say("started", "role/0", 0, NOBODY + 1)
    house.until(lambda: not house.thread.is_alive())
    assert house.zygote.heard()[0] == "start"
    assert house.zygote.is_left()


def test_a_host_joins_again_until_it_is_answered_and_has_a_lease_from_then_on(
    open_house: Callable[[float], House],
) -> None:
    house = open_house(0.8)
    house.desk.shut = house.desk.silent = True
    house.thread.start()
    house.until(lambda: house.desk.joins == 2)
    assert house.host._lease.over
    house.desk.shut = False
    house.until(lambda: house.desk.beats)
    assert 0 < house.host._lease._numbers[0] < time.monotonic() + 0.9 * 0.8
    house.until(lambda: not house.thread.is_alive())


def test_only_newer_incarnations_are_started_and_only_the_one_that_is_meant_is_stopped(
    open_house: Callable[[float], House],
) -> None:
    house = open_house(60.0)
    house.open()
    house.load()
    places = [house.start("role/0", incarnation) for incarnation in (1, 0, 1)]
    for incarnation in (0, 2):
        house.keeper.call(Host.stop, "role/0", incarnation).result()
    places.append(house.start("role/0", 2))
    assert house.zygote.heard() == ("start", "role/0", 1)
    assert house.zygote.has_nothing_to_hear()
    places.append(house.start("role/0", 3))
    assert len(set(places)) == 1, "an address outlives who answers there"
    house.keeper.call(Host.stop, "role/0", 3).result()
    house.keeper.call(Host.stop, "role/0", 3).result()
    orders = [("signal", "role/0", 9), ("start", "role/0", 3), ("signal", "role/0", 9)]
    assert [house.zygote.heard() for _ in range(3)] == orders
    assert house.zygote.has_nothing_to_hear()


def test_a_script_that_a_host_does_not_have_is_told(open_house: Callable[[float], House], tmp_path: Any) -> None:
    house = open_house(60.0)
    house.open()
    with pytest.raises(NotReady, match=r"host host0 has no file .*, the script that was started"):
        house.keeper.call(Host.announce, {"init_main_from_path": "/nowhere/train.py"}, [1]).result()
    house.load(dir="/nowhere", orig_dir=str(tmp_path))
    assert "dir" not in house.host._main
    assert house.host._main["orig_dir"] == str(tmp_path)


def test_a_host_sees_a_file_when_it_holds_what_was_written(open_house: Callable[[float], House], tmp_path: Any) -> None:
    house = open_house(60.0)
    house.open()
    (tmp_path / "probe").write_bytes(b"some")
    asked = [(str(tmp_path / "probe"), b"some"), (str(tmp_path / "probe"), b"other"), ("/nowhere/probe", b"some")]
    assert [house.keeper.call(Host.sees, *each).result() for each in asked] == [True, False, False]
