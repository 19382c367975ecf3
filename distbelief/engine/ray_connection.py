# SPDX-License-Identifier: Apache-2.0
"""This process's connection to Ray, of which there is one at a time: the user's own, or one that jobs share.

The first job that needs it begins it, the last one ends it. Who names another cluster meanwhile is refused.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import final

import ray
from ray._private.services import canonicalize_bootstrap_address, find_node_ids
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined, unused-ignore]

from distbelief.engine import reaper
from distbelief.engine.placement import Resources
from distbelief.errors import ConfigurationError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""The head of a cluster answers within milliseconds."""
STORE_BYTES = 80 << 20
"""Of an embedded Ray: its object store is not used, and this is about the least that it takes."""
LOGICAL_CORES = 10_000
"""Of an embedded Ray: the roles of all jobs that share it share the real ones."""
SOCKET_CHARACTERS = 107 - len(
    "/distbelief-ray-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""The longest folder in which Ray's sockets have a path that the kernel takes."""

_FAILURES = (OSError, RuntimeError, ValueError, ray.exceptions.RayError)
"""What ray.init raises where there is no cluster, or none can be begun."""


@final
class Connection:
    """The connection, and how many jobs use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs = 0
        self._stack = contextlib.ExitStack()
        """Leaves what was begun here; the user's own is not ours to end."""

    @contextlib.contextmanager
    def held(self, address: str | None, asked: Resources) -> Iterator[None]:
        """Be connected for a job that asks for so much. Raises ConfigurationError."""
        with self._lock:
            if not ray.is_initialized():
                self._stack.close()
                with contextlib.ExitStack() as begun:
                    _begin(begun, address, asked)
                    self._stack = begun.pop_all()
            elif address not in (None, "auto"):
                _check_same(str(address))
            self._jobs += 1
        try:
            yield
        finally:
            with self._lock:
                self._jobs -= 1
                if not self._jobs:
                    self._stack.close()


CONNECTION = Connection()


def _begin(stack: contextlib.ExitStack, address: str | None, asked: Resources) -> None:
    """Connect; the stack leaves. Raises ConfigurationError."""
    if address is None:
        stack.enter_context(_embedded(asked))
        return
    if address != "auto":
        _cluster_at(address)  # Ray would try for minutes where something else answers, or where no node of its own is
        if not find_node_ids():
            raise ConfigurationError(
                f"Cluster(engine='ray', address={address!r}): the cluster is there, but this machine is no host of it",
                hint=f"run `ray start --address={address}` here before, start the program on a host of the cluster, or "
                "hand it to the cluster with `ray job submit`",
            )
    stack.callback(ray.shutdown)  # of what was begun halfway, too: it would be taken for the user's own
    try:
        ray.init(address=address, namespace=_namespace(), configure_logging=False, log_to_driver=True)
    except _FAILURES as error:
        raise _no_cluster(address, error) from error


def _check_same(address: str) -> None:
    """Raise ConfigurationError where the address is not that of the cluster that this process is connected to."""
    own = ray.get_runtime_context().gcs_address
    if _cluster_at(address) != _cluster_at(own):
        raise ConfigurationError(
            f"Cluster(engine='ray', address={address!r}): this process is connected to another cluster, {own}, by "
            "ray.init() or by another job",
            hint="leave address out to train on the cluster that this process is connected to, or call ray.shutdown() "
            "before",
        )


def _cluster_at(address: str) -> str:
    """The identity of the cluster whose head is there, by its own word. Raises ConfigurationError."""
    if "://" in address:
        raise ConfigurationError(
            f"Cluster(engine='ray', address={address!r}): Ray's client does not lead to hosts",
            hint="train on a host of the cluster, or in a Ray job, and give the address of the head as host:port",
        )
    try:
        place = canonicalize_bootstrap_address(address)
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error
    if place is None:
        raise _no_cluster(address, "this machine knows of none")
    _check_reachable(address, place)
    answer: Future[str] = Future()

    def ask() -> None:
        try:
            answer.set_result(GcsClient(address=place).cluster_id.hex())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="asks for the cluster", daemon=True).start()
    try:
        return answer.result(ANSWER_SECONDS)
    except TimeoutError as error:
        raise _no_cluster(
            address, f"what listens at {place} has not answered as Ray within {ANSWER_SECONDS:g} s"
        ) from error
    except Exception as error:
        raise _no_cluster(address, error) from error


def _check_reachable(address: str, place: str) -> None:
    """Raise ConfigurationError at once when nothing listens there; Ray would try for a long while."""
    host, _, port = place.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Cluster(engine='ray', address={address!r}): no host reachable at {place}: {error}",
            hint="give the address of the cluster's head as host:port, for example 10.0.0.1:6379",
        ) from error


def _no_cluster(address: str, reason: object) -> ConfigurationError:
    return ConfigurationError(
        f"Cluster(engine='ray', address={address!r}): no cluster there: {reason}",
        hint="start one with `ray start --head`, give the address of its head as host:6379, or leave address out for a "
        "Ray of this machine; where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or "
        "RAY_AUTH_TOKEN) before this program starts",
    )


def _namespace() -> str:
    return f"distbelief-{secrets.token_hex(8)}"


def _read_environment_anew() -> None:
    """Ray has read the environment when it was imported, and a token when it first needed one."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _embedded(asked: Resources) -> Iterator[None]:
    """A Ray of this machine. Its processes end with the thread that began them, so that is not the one of some job."""
    main = threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(1) as lasting, contextlib.ExitStack() as stack:
        try:
            if main:
                _begin_embedded(stack, asked)
            else:
                lasting.submit(_begin_embedded, stack, asked).result()
        except _FAILURES as error:
            raise ConfigurationError(
                f"Cluster(engine='ray'): no Ray could be begun on this machine: {error}",
                hint="look for room on the disk and in memory, or use engine='local', which needs no Ray",
            ) from error
        yield


def _begin_embedded(stack: contextlib.ExitStack, asked: Resources) -> None:
    """Begin it; the stack ends it."""
    folder = tempfile.mkdtemp(prefix="distbelief-ray-", dir=folder_of_sockets())
    reaping = subprocess.Popen([sys.executable, reaper.__file__], stdin=subprocess.PIPE, start_new_session=True)
    assert reaping.stdin is not None
    stack.callback(reaping.wait)
    stack.callback(reaping.stdin.close)
    stack.callback(_read_environment_anew)
    stack.callback(ray.shutdown)
    mark = f"DISTBELIEF_RAY={secrets.token_hex(8)}"
    reaping.stdin.write(f"{mark}\n{folder}\n{os.getpid()}\n".encode())
    reaping.stdin.flush()
    others = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU")}
    with _environment({
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0", **dict([mark.split("=")]),
    }):  # fmt: skip
        _read_environment_anew()
        ray.init(
            address="local", namespace=_namespace(), include_dashboard=False, configure_logging=False,
            num_cpus=LOGICAL_CORES, resources=others or None, object_store_memory=STORE_BYTES, _temp_dir=folder,
        )  # fmt: skip


def folder_of_sockets() -> Path:
    """Where Ray's files and sockets may be: in the folder for temporary files, where its path is short enough."""
    usual = Path(tempfile.gettempdir())
    return usual if len(os.fsencode(usual.resolve())) <= SOCKET_CHARACTERS else Path("/tmp")


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Ray has no other way to be told these; the processes that it begins meanwhile keep them."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
