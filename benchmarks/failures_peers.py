# SPDX-License-Identifier: Apache-2.0
"""What the ways that torch brings do when one of their processes dies or stands still.

Each trains the speech model with mini-batches of 32. Baselines yield `measure(...)`, seconds or a count.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import push_fetch_peers
from benchmarks.processes import forked
from benchmarks.throughput_peers import Loop, acoustic_model, prepare_forks, synthetic_frames

BATCH_SIZE = 32
STEPS = 300
SNAPSHOT_SECONDS = 1.0
"""As often as the product writes a checkpoint here."""
ELASTIC_SECONDS = 4
"""How long elastic training goes on before a worker dies."""
PARAMETERS = 1_000_000
FRAMES = 20_000


@contextmanager
def data_parallel(steps: int = STEPS) -> Iterator[Callable[[float], float]]:
    """DistributedDataParallel on two gloo processes, with torch's own time limits.

    Yields `measure(still_seconds)`, seconds of the longest step while one process is stopped for so long; with 0
    it is killed instead, and the answer is seconds from then to the exception in the other. Each after so many steps.
    """
    prepare_forks()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder, forked(_second, folder) as second:
        pid: Any = second.recv()
        loop = _join(f"file://{folder}/gloo", 0)
        try:
            yield lambda seconds: _stand_still(loop, pid, steps, seconds) if seconds else _die(loop, pid, steps)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _join(address: str, rank: int) -> Loop:
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    return Loop(DistributedDataParallel(acoustic_model(), gradient_as_bucket_view=True), synthetic_frames(FRAMES))


def _second(folder: str, connection: Any) -> None:
    connection.send(os.getpid())
    loop = _join(f"file://{folder}/gloo", 1)
    while True:
        loop.step(BATCH_SIZE)


def _stand_still(loop: Loop, pid: int, steps: int, seconds: float) -> float:
    _longest(loop, steps)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    timer.start()
    waited = _longest(loop, steps)
    timer.join()
    return waited


def _longest(loop: Loop, steps: int) -> float:
    """Seconds of the longest of some steps."""
    moments = [time.perf_counter()]
    for _ in range(steps):
        loop.step(BATCH_SIZE)
        moments.append(time.perf_counter())
    return max(later - earlier for earlier, later in pairwise(moments))


def _die(loop: Loop, pid: int, steps: int) -> float:
    for _ in range(steps):
        loop.step(BATCH_SIZE)
    os.kill(pid, signal.SIGKILL)
    return _until_it_raises(lambda: loop.step(BATCH_SIZE))


def _until_it_raises(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    try:
        while True:
            call()
    except RuntimeError:
        return time.perf_counter() - start


@contextmanager
def server(steps: int = STEPS) -> Iterator[Callable[[], float]]:
    """A parameter server over torch.distributed.rpc, as torch's tutorials have it.

    Yields `measure()`, seconds from a kill -9 of the server, after so many exchanges, to the exception in the worker.
    """
    from torch.distributed import rpc as torch_rpc

    with tempfile.TemporaryDirectory() as folder, forked(_serve, folder) as process:
        pid: Any = process.recv()
        push_fetch_peers.join_rpc(folder, "client", 0)
        gradient = push_fetch_peers.client_gradient(PARAMETERS)

        def measure() -> float:
            for _ in range(steps):
                push_fetch_peers.rpc_push_fetch(gradient)
            os.kill(pid, signal.SIGKILL)
            return _until_it_raises(lambda: push_fetch_peers.rpc_push_fetch(gradient))

        yield measure
        torch_rpc.shutdown(graceful=False)  # the other one is dead


def _serve(folder: str, connection: Any) -> None:
    connection.send(os.getpid())
    push_fetch_peers.join_rpc(folder, "shard", 1)
    signal.pause()


@contextmanager
def elastic(seconds: int = ELASTIC_SECONDS) -> Iterator[Callable[[], float]]:
    """DistributedDataParallel under torchrun, which starts all workers again from the script's snapshot of each second.

    A worker is killed after so many seconds. Yields `measure()`, seconds from then until they are where they were.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", __name__, folder]
        # With the store that torch 2.13 shares by default, workers read the addresses of the dead and the job fails.
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with subprocess.Popen(command, env=environment) as process:
            try:
                _steps(folder, 0, seconds)
                os.kill(int((Path(folder) / "worker").read_text()), signal.SIGKILL)
                died = time.time()
                last, _ = _steps(folder, 0)[-1]
                again = _steps(folder, 1, SNAPSHOT_SECONDS + 0.5)
            finally:
                process.terminate()
        yield lambda: next(moment for number, moment in again if number > last) - died


def _steps(folder: str, life: int, seconds: float = 0.0) -> list[tuple[int, float]]:
    """(number, moment) of the steps that the first worker has taken in a life, once it has taken some for `seconds`."""
    path, until = Path(folder) / f"steps{life}", time.monotonic() + 60
    while time.monotonic() < until:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        steps = [(int(number), float(moment)) for number, moment in (line.split() for line in lines)]
        if steps and steps[-1][1] - steps[0][1] >= seconds:
            return steps
        time.sleep(0.05)
    raise RuntimeError(f"the workers took no step in their life {life}")


def _work(folder: Path) -> None:
    """One worker of elastic training."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if rank == 1:
        (folder / "worker").write_text(str(os.getpid()))
    loop, snapshot = _join("env://", rank), folder / "snapshot"
    step, due = 0, time.monotonic() + SNAPSHOT_SECONDS
    if snapshot.exists():
        saved = torch.load(snapshot)
        step = saved["step"]
        loop.model.load_state_dict(saved["model"])
        loop.optimizer.load_state_dict(saved["optimizer"])
    with (folder / f"steps{os.environ['TORCHELASTIC_RESTART_COUNT']}").open("a", buffering=1) as told:
        while True:
            loop.step(BATCH_SIZE)
            step += 1
            if rank == 0:
                told.write(f"{step} {time.time()}\n")
            if rank == 0 and time.monotonic() >= due:
                state = {"step": step, "model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict()}
                torch.save(state, snapshot.with_suffix(".new"))
                snapshot.with_suffix(".new").replace(snapshot)
                due = time.monotonic() + SNAPSHOT_SECONDS


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
