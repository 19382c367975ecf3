# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one machine: namespaces of network, processes and names, and links that can be shaped and cut.

    host0            host1            host2
    10.77.0.1        10.77.0.2        10.77.0.3     each its own loopback, processes and abstract Unix sockets
      eth0             eth0             eth0
       |                |                |
    +--p0---------------p1---------------p2--+      a bridge in a namespace of its own
    +----------------------------------------+

Nothing has a name in the machine's own namespaces, so nothing can be left there: every namespace lives as long as its
first process, which the kernel ends when the process that made the hosts ends, however that happened; and with it all
processes of that host.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

_BEGIN = "echo; exec env --ignore-signal=CHLD sleep infinity"
"""A first process that waits for no child: the kernel buries those that it inherits."""
_SECONDS = 20.0
_RAY_SECONDS = 60.0
_CLONE_NEWNET = 0x40000000


@final
class Hosts:
    """So many hosts on one bridge. A context manager; see `missing` for where it cannot work."""

    RAY_PORT = 6379

    def __init__(self, count: int) -> None:
        self.addresses = [f"10.77.0.{1 + number}" for number in range(count)]
        self._first: list[subprocess.Popen[str]] = []
        """The first process of each host and, last, of the bridge's namespace."""
        self._pids: list[int] = []
        """Their ids, as this process sees them."""
        self._inside: list[subprocess.Popen[Any]] = []

    @staticmethod
    def missing() -> str | None:
        """Why hosts cannot be made here; None when they can."""
        try:
            with Hosts(1) as hosts:
                hosts.shape(0, 1e9)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or "").strip()
            return f"hosts in namespaces need root and iproute2: {said or error}"
        return None

    def __enter__(self) -> "Hosts":
        try:
            for number in range(len(self.addresses)):
                self._unshare("--uts", "--pid", "--fork", "--kill-child", "--mount-proc", name=f"host{number}")
            self._unshare()
            self._wire()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of every host, and the hosts."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for process in (*self._inside, *self._first):
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._first, self._pids, self._inside = [], [], []

    # inside of a host

    def popen(self, host: int, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a program in a host; `options` as those of subprocess.Popen.

        What is returned is the process outside that waits for the program. It ends as the program ends.
        """
        process = subprocess.Popen([*self.entering(host), *arguments], **options)
        self._inside.append(process)
        return process

    def python(self, host: int, *arguments: str, **options: Any) -> "subprocess.Popen[Any]":
        """Start this Python in a host, importing what this process can import."""
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        environment = options.pop("env", dict(os.environ)) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return self.popen(host, [sys.executable, *arguments], env=environment, **options)

    def start_ray(
        self, folder: Path, *, cpus: int, store_bytes: int, takes_jobs: bool = False, **options: Any
    ) -> None:  # fmt: skip
        """Start a Ray node in each host, the head in the first, and wait until they are up.

        `folder` is where Ray makes files and sockets, so its path is short; each host gets one of its own there. Where
        it `takes_jobs`, they are submitted to port 8265 of the head. `options` as those of subprocess.Popen. Raises
        OSError.
        """
        for host in range(len(self.addresses)):
            self._run(host, "mount", "-t", "tmpfs", "tmpfs", str(folder))
        dashboard = [f"--include-dashboard={str(takes_jobs).lower()}", f"--dashboard-host={self.addresses[0]}"]
        head = ["--head", f"--port={self.RAY_PORT}", *dashboard, f"--temp-dir={folder}"]
        joins = [f"--address={self.addresses[0]}:{self.RAY_PORT}"]
        for some, where in (((0,), head), (range(1, len(self.addresses)), joins)):
            starting = [self._begin_ray(host, where, cpus, store_bytes, options) for host in some]
            for node in starting:
                said, _ = node.communicate(timeout=_RAY_SECONDS)
                if node.returncode:
                    raise OSError(f"ray start ended with {node.returncode}: {said}")

    def _begin_ray(
        self, host: int, where: Sequence[str], cpus: int, store_bytes: int, options: dict[str, Any]
    ) -> "subprocess.Popen[Any]":
        program = [str(Path(sys.executable).parent / "ray"), "start", *where, "--disable-usage-stats"]
        own = [f"--node-ip-address={self.addresses[host]}", f'--resources={{"host{host}": 1}}']
        given = [f"--num-cpus={cpus}", f"--object-store-memory={store_bytes}"]
        return self.popen(
            host, [*program, *own, *given],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Sockets that this thread makes meanwhile, and those of programs that it starts, are of the host."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        theirs = os.open(f"/proc/{self._pids[host]}/ns/net", os.O_RDONLY)
        try:
            _enter(theirs)
            yield
        finally:
            _enter(own)
            os.close(own)
            os.close(theirs)

    def pids(self, host: int) -> list[int]:
        """The living processes of a host other than its first, as this process sees them."""
        namespace, found = os.readlink(f"/proc/{self._pids[host]}/ns/pid"), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if os.readlink(folder / "ns/pid") == namespace and not dead:
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
        return [pid for pid in found if pid != self._pids[host]]

    def kill(self, host: int) -> None:
        """Kill -9 of everything in a host, as when its power is lost but its address stays."""
        while pids := self.pids(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # links

    def shape(self, host: int, bits_per_second: float, burst_bytes: int | None = None) -> None:
        """Limit what a host sends and what it receives. The burst is 5 ms of the rate, and some packets at least."""
        burst = burst_bytes or max(round(bits_per_second / 8 * 0.005), 16_000)
        limit = ("tbf", "rate", f"{round(bits_per_second)}bit", "burst", str(burst), "latency", "50ms")
        self._run(host, "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)
        self._run(-1, "tc", "qdisc", "replace", "dev", f"p{host}", "root", *limit)

    def cut(self, host: int) -> None:
        """Take a host off the bridge: what it sends and what is sent to it vanishes without a word."""
        self._run(-1, "ip", "link", "set", f"p{host}", "nomaster")

    def heal(self, host: int) -> None:
        """Undo `cut`."""
        self._run(-1, "ip", "link", "set", f"p{host}", "master", "bridge")

    # making

    def _unshare(self, *more: str, name: str = "") -> None:
        begin = (f"hostname {name}; " if name else "") + _BEGIN
        first = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *more, "sh", "-c", begin],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._first.append(first)
        assert first.stdout is not None
        if not first.stdout.readline():
            _, said = first.communicate(timeout=_SECONDS)
            raise subprocess.CalledProcessError(first.returncode, "unshare", stderr=said)
        below = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        self._pids.append(int(below[0]) if more else first.pid)

    def _wire(self) -> None:
        self._run(-1, "ip", "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        self._run(-1, "ip", "link", "set", "bridge", "up")
        for number, address in enumerate(self.addresses):
            pid = str(self._pids[number])
            self._run(-1, "ip", "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", pid)
            self._run(-1, "ip", "link", "set", f"p{number}", "master", "bridge", "up")
            self._run(number, "ip", "link", "set", "lo", "up")
            self._run(number, "ip", "link", "set", "eth0", "address", _hardware(number), "up")
            self._run(number, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            # As behind a router, a host that is cut off is not found out by the kernel asking who has its address.
            for other, neighbour in enumerate(self.addresses):
                if other != number:
                    to = ("to", neighbour, "dev", "eth0", "lladdr", _hardware(other), "nud", "permanent")
                    self._run(number, "ip", "neighbour", "replace", *to)

    def entering(self, host: int) -> list[str]:
        """The beginning of a command whose rest runs in a host."""
        spaces = ["--net"] if host < 0 else ["--net", "--uts", "--pid", "--mount"]
        # A signal that ends the process that enters must end the program inside as well.
        return ["nsenter", f"--target={self._pids[host]}", *spaces, "setpriv", "--pdeathsig", "KILL"]

    def _run(self, host: int, *arguments: str) -> None:
        subprocess.run([*self.entering(host), *arguments], check=True, capture_output=True, text=True, timeout=_SECONDS)


def _enter(network: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(network, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _hardware(number: int) -> str:
    return f"02:00:0a:4d:00:{1 + number:02x}"
