# SPDX-License-Identifier: Apache-2.0
"""Laws of the engine of several hosts: what is lost with a host, and that nothing of it goes on when it comes back."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import children_of
from keepers import Subprocesses, wait_for

import distbelief as db
from distbelief.attempt import attempt
from distbelief.channel.base import Out, Remote, exported
from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import PendingCall
from distbelief.channel.place import Place
from distbelief.channel.secure import Certificate, new_certificate
from distbelief.channel.wire import Wire
from distbelief.engine import hosts
from distbelief.engine.base import Death, Home
from distbelief.engine.host import path_here
from distbelief.engine.hosts import HostsEngine
from distbelief.engine.listener import interface_of
from distbelief.engine.registry import Introduction, Registry
from distbelief.errors import ChannelError, ConfigurationError, Fenced, TrainingFailed, UserCodeError
from distbelief.job import prepare as prepare_job
from tests import problems

pytestmark = pytest.mark.alone

NAMES = [f"role/{index}" for index in range(8)]
NCCL = [found for folder in sys.path for found in Path(folder).glob("nvidia/nccl/lib/libnccl.so.2")][:1]
"""The library, where it is installed."""


def prepare(number: int) -> tuple[int, int]:
    return number, number


def prepare_anywhere() -> tuple[int, int]:
    return 0, os.getpid()


def own_sockets(state: str) -> list[str]:
    """The local addresses of this process's TCP sockets in a state of the kernel's: 01 connected, 0A listening."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{name}")]  # fmt: skip
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    return [fields[1] for fields in lines if fields[3] == state and f"socket:[{fields[9]}]" in links]


class Clerk:
    """A role that answers."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.notes: list[int] = []

    @exported
    def who(self) -> tuple[str, int, int]:
        return self.home.name, self.home.incarnation, os.getpid()

    @exported
    def note(self, number: int) -> None:
        self.notes.append(number)

    @exported
    def noted(self) -> list[int]:
        return self.notes

    @exported
    def mirror(self, values: torch.Tensor, out: Out) -> None:
        out.copy_(values)

    @exported
    def interface(self) -> str:
        """What nccl is told to use here."""
        return os.environ["NCCL_SOCKET_IFNAME"]

    @exported
    def listens(self) -> list[str]:
        """Where other hosts may call this process."""
        return own_sockets("0A")

    @exported
    def nccl_listens(self) -> list[str]:
        """Where this process listens since nccl has made the identifier of a group, which it tells to all others."""
        (library,) = NCCL
        before, identifier = set(own_sockets("0A")), ctypes.create_string_buffer(128)
        assert ctypes.CDLL(str(library)).ncclGetUniqueId(identifier) == 0
        return [address for address in own_sockets("0A") if address not in before]

    @exported
    def distant(self) -> int:
        """How many TCP connections this process has accepted or made."""
        return len(own_sockets("01"))


class Writer:
    """A role that writes to a clerk as often as it can, and is never content."""

    def __init__(self, home: Home, clerk: str) -> None:
        self.home, self.clerk = home, clerk

    def run(self) -> None:
        clerk = self.home.find(self.clerk, Clerk)
        number = 0
        while True:
            with suppress(ChannelError):
                clerk.call(Clerk.note, number).result()
                number += 1


class Pair:
    """Two hosts, an engine, and what was reported dead."""

    def __init__(self) -> None:
        self.keepers = Subprocesses(2)
        self.engine = HostsEngine(NAMES, self.keepers)
        self.engine.load(prepare, 21)
        self.peers: dict[str, Remote[Clerk]] = {}
        self.deaths: list[Death] = []
        self.stopped: list[int] = []

    def find(self, name: str) -> Remote[Clerk]:
        if name not in self.peers:
            self.peers[name] = self.engine.find(name, Clerk, 20.0)
        return self.peers[name]

    def up(self, *names: str, incarnation: int = 0) -> list[int]:
        """Start clerks; the answer is their process ids."""
        for name in names:
            self.engine.start(name, incarnation, Clerk)
        return [self.find(name).call(Clerk.who).result()[2] for name in names]

    def died(self, count: int) -> Callable[[], bool]:
        def have() -> bool:
            self.deaths += self.engine.deaths()
            return len(self.deaths) >= count

        return have

    def everything_on(self, host: int) -> list[int]:
        """The processes of a host: its keeper, the zygote and the roles."""
        keeper = self.keepers.processes[f"host{host}"].pid
        return [keeper, *children_of(keeper)]

    def stop(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self.stopped += pids

    def go_on(self, pids: Sequence[int] = ()) -> None:
        """These, or all that were stopped."""
        for pid in pids or self.stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.stopped = [pid for pid in self.stopped if pids and pid not in pids]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.go_on()
        made.engine.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_host_that_is_lost_while_the_job_is_brought_to_it_has_no_part_in_the_job(tmp_path: Path) -> None:
    keepers = Subprocesses(3)
    with closing(HostsEngine(NAMES, keepers)) as engine:
        engine.gather()
        keepers.processes["host1"].kill()
        engine.load(prepare, 21)
        assert engine.hosts == ("host0", "host2")
        os.kill(keepers.processes["host0"].pid, signal.SIGSTOP)  # its kernel goes on, so no connection breaks
        engine.check_visible(tmp_path)
        keepers.processes["host0"].kill()
        assert engine.hosts == ("host2",)
        engine.start("role/0", 0, Clerk)
        assert engine.find("role/0", Clerk, 20.0).call(Clerk.who).result()[:2] == ("role/0", 0)


def test_a_job_that_no_host_is_left_for_says_so(tmp_path: Path) -> None:
    keepers = Subprocesses(1)
    with closing(HostsEngine(NAMES, keepers)) as engine:
        engine.gather()
        keepers.processes["host0"].kill()
        with pytest.raises(TrainingFailed, match="every host was lost while the job was loaded"):
            engine.load(prepare, 21)


def test_hosts_that_prepare_different_jobs_are_refused_by_what_each_has(tmp_path: Path) -> None:
    with closing(HostsEngine(NAMES, Subprocesses(2))) as engine:
        with pytest.raises(
            ConfigurationError, match=r"hosts prepared different jobs: host0 \d+; host1 \d+\nhint: "
        ) as caught:
            engine.load(prepare_anywhere)
        first, second = re.findall(r"host\d (\d+)", str(caught.value))
        assert first != second


def test_what_is_installed_on_a_host_goes_before_what_is_installed_where_the_coordinator_is() -> None:
    theirs = ["/home/me/job", "/home/me/lib", "/usr/lib/python311.zip", "/usr/lib/python3.11", "/usr/site-packages"]
    own = ["/env/lib/python311.zip", "/env/lib/python3.11", "/env/site-packages", "/home/me/job"]
    library = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    theirs, own = ([each.replace("python311.zip", library) for each in path] for path in (theirs, own))
    assert path_here(theirs, own) == [*theirs[:2], *own[:3], *theirs[2:]]


def numbered(number: int, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """A process of a host that knows its number."""
    return subprocess.Popen(arguments, **options | {"env": {**options["env"], "HOST_NUMBER": str(number)}})


def prepare_on_the_first(number: int) -> tuple[int, int]:
    if os.environ["HOST_NUMBER"] != "0":
        raise ValueError("there is no such file here")
    return number, number


def test_what_one_host_cannot_prepare_is_told_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text(
        "import os\nif os.environ.get('HOST_NUMBER') == '1':\n    import not_there\ndef prepare():\n    return 0, 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with closing(HostsEngine(NAMES, Subprocesses(2, spawn=numbered))) as engine:
        message = r"host host1: what the job is made of cannot be imported: No module named 'not_there'\nhint: keep the"
        with pytest.raises(ConfigurationError, match=message):
            engine.load(__import__("own_module").prepare)
    message = r"(?s)^Traceback.*no such file here.*on host host1$"
    engine = HostsEngine(NAMES, Subprocesses(2, spawn=numbered))
    with closing(engine), pytest.raises(UserCodeError, match=message):
        engine.load(prepare_on_the_first, 21)


def test_each_host_tries_the_store_of_the_checkpoints_before_anything_starts() -> None:
    with closing(HostsEngine(NAMES, Subprocesses(2))) as engine:
        message = "(?s)host host0: checkpoints cannot be kept at nosuch://bucket/run: .*hint: .* each host the package"
        with pytest.raises(ConfigurationError, match=message):
            engine.load(
                prepare_job,
                problems.job(checkpoints="nosuch://bucket/run", cluster=db.Cluster(engine="ray")),
                attempt=attempt,
            )


@pytest.mark.slow
def test_roles_of_one_host_share_memory_and_others_are_called_over_tcp(pair: Pair) -> None:
    pair.up(*NAMES[:3])
    before = [pair.find(name).call(Clerk.distant).result() for name in NAMES[:3]]
    pair.engine.start(NAMES[4], 0, Writer, NAMES[0])
    wait_for(pair.engine, lambda: pair.find(NAMES[0]).call(Clerk.noted).result())
    assert pair.find(NAMES[0]).call(Clerk.distant).result() == before[0], "host0 calls host0"
    pair.engine.start(NAMES[5], 0, Writer, NAMES[2])
    wait_for(pair.engine, lambda: pair.find(NAMES[2]).call(Clerk.noted).result())
    assert pair.find(NAMES[2]).call(Clerk.distant).result() == before[2] + 1, "host1 calls host0"
    values, out = torch.randn(1000), torch.empty(1000)
    pair.find(NAMES[1]).call(Clerk.mirror, values, out).result()
    assert torch.equal(values, out)
    assert {pair.find(name).call(Clerk.interface).result() for name in NAMES[:3]} == {"=lo"}


@pytest.mark.slow
def test_roles_listen_at_their_hosts_address_only(pair: Pair) -> None:
    pair.up(*NAMES[:2])
    for name in NAMES[:2]:
        (address,) = pair.find(name).call(Clerk.listens).result()
        assert address.startswith("0100007F:")  # 127.0.0.1


@pytest.mark.slow
@pytest.mark.skipif(not NCCL, reason="pip install nvidia-nccl-cu12, which needs no accelerator to listen")
def test_nccl_listens_where_its_host_is_called_and_nowhere_else(pair: Pair) -> None:
    pair.up(*NAMES[:2])
    # Of its own accord nccl takes the loopback interface last, and these hosts are called at 127.0.0.1.
    for name in NAMES[:2]:
        (address,) = pair.find(name).call(Clerk.nccl_listens).result()
        assert address.startswith("0100007F:")  # 127.0.0.1


@pytest.mark.slow
def test_when_a_keeper_is_killed_its_roles_die_within_two_seconds_and_live_on_elsewhere(pair: Pair) -> None:
    pids = pair.up(*NAMES[:4])
    pair.keepers.processes["host1"].kill()
    started = time.monotonic()
    wait_for(pair.engine, pair.died(2))
    assert time.monotonic() - started < 2.0
    assert sorted(death.role for death in pair.deaths) == [NAMES[1], NAMES[3]]
    assert all("host1 was lost" in death.reason and death.failure is None for death in pair.deaths)
    assert not is_alive(pids[1])
    assert not is_alive(pids[3])
    assert pair.engine.hosts == ("host0",)
    again = pair.up(NAMES[1], NAMES[3], incarnation=1)
    assert pair.engine.host_of(NAMES[1]) == "host0"
    assert not set(again) & set(pids)
    assert pair.engine.deaths() == []


@pytest.mark.slow
@pytest.mark.parametrize("keeper_alone", [False, True], ids=["the whole host", "its keeper alone"])
def test_a_host_that_was_silent_writes_nothing_when_it_goes_on_and_ends(pair: Pair, keeper_alone: bool) -> None:
    own = pair.up(NAMES[0])
    pair.engine.start(NAMES[1], 0, Writer, NAMES[0])
    clerk = pair.find(NAMES[0])
    wait_for(pair.engine, lambda: len(clerk.call(Clerk.noted).result()) > 3)
    everything = pair.everything_on(1)
    assert len(everything) == 3, "keeper, zygote, role"
    # Stopped between its last look at the time and the kernel it would still say one thing, as over a slow line: let
    # it wait for an answer.
    pair.stop(own)
    pair.engine.sleep(0.1)
    pair.stop(everything[:1] if keeper_alone else everything)
    pair.go_on(own)
    started = time.monotonic()
    wait_for(pair.engine, pair.died(1))
    assert time.monotonic() - started < 2.0
    written = clerk.call(Clerk.noted).result()
    pair.engine.start(NAMES[2], 1, Clerk)
    pair.engine.sleep(0.3)
    pair.go_on()
    wait_for(pair.engine, lambda: not any(map(is_alive, everything)), 3.0)
    assert clerk.call(Clerk.noted).result() == written


@pytest.mark.slow
def test_who_calls_a_role_of_a_silent_host_finds_the_next_incarnation_long_before_the_deadline(pair: Pair) -> None:
    pair.up(NAMES[1])
    clerk = pair.find(NAMES[1])
    clerk.call(Clerk.who).result()
    pair.stop(pair.everything_on(1))
    started = time.monotonic()
    lost = clerk.call(Clerk.who)
    wait_for(pair.engine, pair.died(1))
    pair.engine.start(NAMES[1], 1, Clerk)
    with pytest.raises(ChannelError, match="elsewhere now"):
        lost.result()
    assert clerk.call(Clerk.who).result()[1] == 1
    assert time.monotonic() - started < 4.0


@pytest.mark.slow
def test_a_role_that_is_stopped_while_the_connection_to_its_keeper_breaks_ends_all_the_same(pair: Pair) -> None:
    pids = pair.up(*NAMES[:2])
    for host, name in enumerate(NAMES[:2]):
        connection = pair.engine._keeper_peers[f"host{host}"]._connection
        assert connection is not None
        connection.socket.shutdown(socket.SHUT_RDWR)  # as a network ends it that was away for a while
        pair.engine.stop(name)
    pair.engine.start(NAMES[0], 1, Clerk)
    wait_for(pair.engine, lambda: not any(map(is_alive, pids)), 3.0)
    wait_for(pair.engine, lambda: pair.engine.deaths() == [] and NAMES[0] in pair.engine.processes)
    assert pair.find(NAMES[0]).call(Clerk.who).result()[1] == 1


@pytest.mark.slow
def test_when_no_host_is_left_nothing_can_be_started(pair: Pair) -> None:
    for process in pair.keepers.processes.values():
        process.kill()
    wait_for(pair.engine, lambda: pair.engine.deaths() or not pair.engine.hosts)
    with pytest.raises(TrainingFailed, match="no host is left"):
        pair.engine.start(NAMES[0], 0, Clerk)


@pytest.mark.slow
def test_hosts_of_other_versions_are_refused_and_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = hosts.versions()
    monkeypatch.setattr(hosts, "versions", lambda: {**own, "torch": "1.0"})
    message = re.escape(f"host host0 has torch {own['torch']}, the coordinator's, driver, has 1.0")
    is_refused(Subprocesses(2), message)


@pytest.mark.slow
def test_a_host_that_cannot_take_part_is_named_with_the_reason() -> None:
    is_refused(
        Subprocesses(2, addresses=["127.0.0.1", "192.0.2.1"]), "host1 does not take part: .* exit code 1\nhint: start"
    )


def is_refused(keepers: Subprocesses, message: str) -> None:
    """Load a job on these hosts, which is refused; those that have joined end by themselves, and soon."""
    with closing(HostsEngine(NAMES, keepers)) as engine:
        with pytest.raises(ConfigurationError, match=message):
            engine.load(prepare, 21)
        started = time.monotonic()
        engine.close()
        assert time.monotonic() - started < 4.0, "they were waited for and killed"


@pytest.mark.slow
def test_a_host_that_another_one_cannot_call_is_refused_and_both_are_named_unless_it_is_gone() -> None:
    nobody = Place("host1", "", ("127.0.0.1", 1))
    with closing(HostsEngine(NAMES, Subprocesses(2), lost_seconds=1.0)) as engine:
        engine.gather()
        engine._hosts["host1"] = Introduction("host1", nobody, hosts.versions())
        message = r"host host0 cannot call host host1: nothing answers at \('127.0.0.1', 1\): .*refused\nhint: let all"
        with pytest.raises(ConfigurationError, match=message):
            engine._check_calls()
        engine._keeper_peers = {"host1": engine._keeper(engine._hosts["host1"])}
        with pytest.raises(ConfigurationError, match=r"host driver cannot call host host1: nothing answers .*\nhint"):
            engine._check_calls()
        engine._keepers.processes["host1"].kill()
        engine._check_calls()
        assert engine.hosts == ("host0",)


@pytest.mark.slow
def test_a_host_has_its_time_to_come_once_its_keepers_process_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GATHER_SECONDS", 0.1)
    keepers = Subprocesses(2)
    monkeypatch.setattr(keepers, "preparing", lambda: keepers.names)
    with closing(HostsEngine(NAMES, keepers)) as engine:
        engine.gather()
        assert engine.hosts == ("host0", "host1")


@pytest.mark.slow
def test_a_job_that_is_interrupted_while_it_says_farewell_ends_its_keepers_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keepers = Subprocesses(2)
    engine = HostsEngine(NAMES, keepers)
    engine.gather()
    processes = [*keepers.processes.values()]
    with monkeypatch.context() as patched:
        patched.setattr(PendingCall, "wait", lambda call, seconds: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    assert [process.poll() is None for process in processes] == [False, False]
    assert own_sockets("0A") == []


def test_a_host_that_comes_when_the_job_is_over_is_told_so() -> None:
    with closing(Endpoint(b"the key")) as endpoint:
        registry = Registry(endpoint)
        early, late = (Introduction(name, Place("", "", ("127.0.0.1", 1)), {}) for name in ("early", "late"))
        registry.join(early)
        assert registry.end() == {"early": early}
        with pytest.raises(Fenced, match="host late has come when the job was over"):
            registry.join(late)


@pytest.mark.slow
def test_a_folder_that_a_host_does_not_see_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.engine.check_visible(tmp_path)
    monkeypatch.setattr(Path, "resolve", lambda path: Path("/nowhere") / path.name)
    with pytest.raises(ConfigurationError, match="host host0 does not see the folder"):
        pair.engine.check_visible(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""
    assert interface_of("2001:db8::1") == ""


@pytest.mark.slow
@pytest.mark.skipif(not interface_of("::1"), reason="this machine's loopback interface has no address of IPv6")
@pytest.mark.parametrize("certificate", [None, new_certificate()])
def test_hosts_may_have_addresses_of_ipv6(certificate: Certificate | None) -> None:
    keepers = Subprocesses(2, addresses=["::1", "::1"], own="::1")
    with closing(HostsEngine(NAMES, keepers, wire=Wire(certificate=certificate))) as engine:
        engine.load(prepare, 21)
        for name in NAMES[:2]:
            engine.start(name, 0, Clerk)
        engine.start(NAMES[3], 0, Writer, NAMES[0])
        peers = [engine.find(name, Clerk, 20.0) for name in NAMES[:2]]
        for peer in peers:
            (address,) = peer.call(Clerk.listens).result()
            assert address.startswith("0" * 24 + "01000000:")  # ::1
            assert peer.call(Clerk.interface).result() == "=lo"
            values, out = torch.randn(1000), torch.empty(1000)
            peer.call(Clerk.mirror, values, out).result()
            assert torch.equal(values, out)
        wait_for(engine, lambda: peers[0].call(Clerk.noted).result())


COORDINATOR_SCRIPT = """
from keepers import Subprocesses
from test_engine_hosts import Clerk, HostsEngine, NAMES, prepare

keepers = Subprocesses(2)
engine = HostsEngine(NAMES, keepers)
engine.load(prepare, 21)
for name in NAMES[:4]:
    engine.start(name, 0, Clerk)
pids = [engine.find(name, Clerk).call(Clerk.who).result()[2] for name in NAMES[:4]]
print(*pids, *(process.pid for process in keepers.processes.values()), flush=True)
engine.sleep(600.0)
"""


@pytest.mark.slow
def test_when_the_coordinators_process_is_killed_no_host_keeps_anything() -> None:
    folders = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", COORDINATOR_SCRIPT], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": folders},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 6
        process.kill()
    until = time.monotonic() + 5.0
    while any(map(is_alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.02)
