# SPDX-License-Identifier: Apache-2.0
"""The hosts that the tests of clusters stand on: their links have the rate asked, a cut is silent, nothing stays."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Hosts

pytestmark = pytest.mark.alone

SEGMENT_BYTES, HEADER_BYTES = 1448, 66  # of TCP with time stamps on Ethernet

RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 9000))
print(flush=True)
line, _ = server.accept()
wanted, left = int(sys.argv[2]), int(sys.argv[2])
began = time.monotonic()
line.sendall(b"go")
while left > 0:
    left -= len(line.recv(1 << 16))
print((wanted - left) / (time.monotonic() - began))
"""
SEND = """
import socket, sys
line = socket.create_connection((sys.argv[1], 9000))
line.recv(2)
while True:
    line.sendall(bytes(1 << 16))
"""
ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 9000))
print(flush=True)
while True:
    line, _ = server.accept()
    while data := line.recv(100):
        line.sendall(data)
"""
ASK = """
import socket, sys

def attempt(what):
    try:
        what()
        print("answered", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
def call():
    kept.append(socket.create_connection((sys.argv[1], 9000), timeout=0.5))
def talk():
    kept[0].sendall(b"x")
    assert kept[0].recv(1)
kept = []
for line in sys.stdin:
    attempt({"call": call, "talk": talk}[line.strip()])
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := Hosts.missing():
        pytest.skip(reason)
    with Hosts(3) as made:
        yield made


def payload_bits_per_second(hosts: Hosts, sender: int, receiver: int, count: int) -> float:
    """Over the first `count` bytes."""
    there = hosts.python(
        receiver, "-S", "-c", RECEIVE, hosts.addresses[receiver], str(count), stdout=subprocess.PIPE, text=True
    )
    assert there.stdout is not None
    there.stdout.readline()
    hosts.python(sender, "-S", "-c", SEND, hosts.addresses[receiver], stderr=subprocess.DEVNULL)
    said, _ = there.communicate(timeout=20)
    return 8 * float(said)


@pytest.mark.slow
@pytest.mark.parametrize("bits_per_second", [20e6, 100e6, 1e9])
def test_a_shaped_link_carries_what_was_asked_in_either_direction(hosts: Hosts, bits_per_second: float) -> None:
    hosts.shape(0, bits_per_second)
    on_the_line, a_second_of_it = (SEGMENT_BYTES + HEADER_BYTES) / SEGMENT_BYTES, round(bits_per_second / 8)
    for sender, receiver in ((0, 1), (1, 0)):
        measured = []
        while not measured or (measured[-1] != pytest.approx(bits_per_second, rel=0.05) and len(measured) < 4):
            measured.append(payload_bits_per_second(hosts, sender, receiver, a_second_of_it) * on_the_line)
            hosts.kill(sender)
        assert measured[-1] == pytest.approx(bits_per_second, rel=0.05), measured


def test_a_cut_is_silent_and_ends_when_it_is_healed(hosts: Hosts) -> None:
    there = hosts.python(0, "-S", "-c", ECHO, hosts.addresses[0], stdout=subprocess.PIPE, text=True)
    assert there.stdout is not None
    there.stdout.readline()
    here = hosts.python(
        1, "-S", "-c", ASK, hosts.addresses[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(what: str) -> str:
        assert here.stdin is not None
        assert here.stdout is not None
        here.stdin.write(what + "\n")
        here.stdin.flush()
        return str(here.stdout.readline().strip())

    assert [ask("call"), ask("talk")] == ["answered", "answered"]
    hosts.cut(0)
    assert [ask("talk"), ask("call")] == ["TimeoutError", "TimeoutError"]
    hosts.heal(0)
    assert ask("call") == "answered"
    until = time.monotonic() + 10
    while ask("talk") != "answered":  # the connection from before the cut, at its kernel's next attempt
        assert time.monotonic() < until


def test_hosts_share_no_address_no_socket_name_and_no_process(hosts: Hosts) -> None:
    program = (
        "import os, socket; s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'distbelief-hosts');"
        "t = socket.create_server(('127.0.0.1', 9000)); print(socket.gethostname(), flush=True); input()"
    )
    both = [
        hosts.python(number, "-S", "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in (0, 1)
    ]
    assert [process.stdout.readline().strip() for process in both if process.stdout] == ["host0", "host1"]
    assert [len(hosts.pids(number)) for number in (0, 1, 2)] == [1, 1, 0]
    hosts.kill(0)
    assert both[0].wait(10) == -signal.SIGKILL
    assert both[1].poll() is None


def test_a_thread_can_be_inside_of_a_host_for_a_while(hosts: Hosts) -> None:
    outside = socket.if_nameindex()
    with hosts.inside(2):
        assert [name for _, name in socket.if_nameindex()] == ["lo", "eth0"]
        with socket.create_server((hosts.addresses[2], 9000)) as server, hosts.inside(1):
            socket.create_connection(server.getsockname()).close()
    assert socket.if_nameindex() == outside


def test_hosts_end_with_the_process_that_made_them_even_when_it_is_killed() -> None:
    if reason := Hosts.missing():
        pytest.skip(reason)
    links = socket.if_nameindex()
    program = (
        "import subprocess, sys, time; from tests.hosts import Hosts\n"
        "with Hosts(2) as hosts:\n"
        "    hosts.popen(0, ['sh', '-c', 'setsid sleep 100 & sleep 100'])\n"
        "    while len(hosts.pids(0)) < 3: time.sleep(0.01)\n"
        "    print(*hosts.pids(0), flush=True)\n"
        "    if sys.argv[1] == 'raise': raise ValueError('on purpose')\n"
        "    time.sleep(100)\n"
    )
    for ending in ("raise", "kill"):
        maker = subprocess.Popen(
            [sys.executable, "-c", program, ending],
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert maker.stdout is not None
        pids = maker.stdout.readline().split()
        assert len(pids) == 3
        if ending == "kill":
            os.kill(maker.pid, signal.SIGKILL)
        _, said = maker.communicate(timeout=20)
        assert ("on purpose" in said) == (ending == "raise")
        until = time.monotonic() + 5
        while any(Path("/proc", pid).exists() for pid in pids):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert socket.if_nameindex() == links
