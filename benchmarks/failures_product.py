# SPDX-License-Identifier: Apache-2.0
"""The product's rows: whole jobs on the local engine in which something is killed for real, to the last example."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from benchmarks.processes import alive, descendants
from benchmarks.throughput_peers import CLASSES, INPUTS, acoustic_model, synthetic_frames
from distbelief.events import Observation, Progress, RoleLost, RoleStarted, ShardRestored
from distbelief.report.files import read_events

TEST_FRAMES = 4096
REPLICAS = SHARDS = 2
CHECKPOINT_SECONDS = 1.0
POLL_SECONDS = 0.01


def frames(count: int, skipped: int = 0) -> TensorDataset:
    """Random inputs float32 (count, 440) whose classes int64 (count,) a model can learn, after those `skipped`."""
    inputs = synthetic_frames(skipped + count)[0][skipped:]
    directions = torch.randn(INPUTS, CLASSES, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, (inputs @ directions).argmax(1))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of right answers."""
    return (output.argmax(1) == target).float().mean()


def job(run: Path, count: int, epochs: int) -> db.Job:
    """The speech model on so many frames, with a checkpoint every second."""
    return db.Job(
        model=acoustic_model, loss=nn.functional.cross_entropy, metrics={"accuracy": accuracy},
        data=functools.partial(frames, count), test=functools.partial(frames, TEST_FRAMES, count),
        algorithm=db.Downpour(update_rule=db.adagrad(0.01)),
        cluster=db.Cluster(replicas=REPLICAS, shards=SHARDS, threads_per_replica=1, device="cpu"),
        epochs=epochs, checkpoint_seconds=CHECKPOINT_SECONDS, run=run,
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    seconds: float
    """From the first example to the end."""
    back_seconds: float | None
    """From the first loss to when whoever was lost works again."""
    seen: int
    missing: int
    repeated: int
    lost_updates: int
    pushes: int
    accuracy: float
    losses: int


def disturbed(count: int, epochs: int, faults: db.Faults) -> Outcome:
    """Train with these faults."""
    heard: list[Observation] = []
    with tempfile.TemporaryDirectory() as folder:
        result = db.train(job(Path(folder) / "run", count, epochs), faults=faults, listeners=[heard.append], view=False)
    begun = next(one.seconds for one in heard if isinstance(one.event, Progress) and one.event.examples)
    return _outcome(result, heard[-1].seconds - begun, _back(heard))


def _outcome(result: db.Result, seconds: float, back_seconds: float | None) -> Outcome:
    summary, examples = result.summary, result.summary.examples
    return Outcome(
        seconds, back_seconds, examples.seen, examples.missing, examples.repeated, summary.lost_updates,
        summary.pushes, result.test["accuracy"] or 0.0, sum(fault.type == "RoleLost" for fault in summary.faults),
    )  # fmt: skip


def _back(heard: Sequence[Observation]) -> float | None:
    """A shard is back when it has its parameters again, a replica when its process is started."""
    lost = next((one for one in heard if isinstance(one.event, RoleLost)), None)
    if lost is None:
        return None
    assert isinstance(lost.event, RoleLost)
    role = lost.event.role
    for one in heard[heard.index(lost) + 1 :]:
        match one.event:
            case ShardRestored(shard=shard) if role == f"shard/{shard}":
                return one.seconds - lost.seconds
            case RoleStarted(role=started) if started == role and role.startswith("replica"):
                return one.seconds - lost.seconds
    return None


def coordinator_killed(count: int, epochs: int) -> tuple[Outcome, float]:
    """Kill -9 of the user's own process after a third of the job, and then resume; (outcome, seconds until none was
    left). The outcome's seconds are those from the first example to the death and from there to the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        program = f"from benchmarks.failures_product import *; db.train(job(Path({str(run)!r}), {count}, {epochs}))"
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path}
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, env=environment) as process:
            seen = _wait_for(run, count * epochs // 3, process)
            others = descendants(process.pid)
            process.send_signal(signal.SIGKILL)
        died = time.monotonic()
        while any(alive(pid, started) for pid, started in others.items()):
            time.sleep(POLL_SECONDS)
        gone_seconds = time.monotonic() - died
        working: list[float] = []

        def listen(observation: Observation) -> None:
            if isinstance(observation.event, Progress) and observation.event.examples_per_second:
                working.append(time.monotonic())

        result = db.train(job(run, count, epochs), resume=run, listeners=[listen], view=False)
        return _outcome(result, seen + time.monotonic() - died, working[0] - died), gone_seconds


def _wait_for(run: Path, examples: int, process: "subprocess.Popen[bytes]") -> float:
    """Wait until so many examples are behind a job; seconds since its first one."""
    while process.poll() is None:
        if (run / "events.jsonl").exists():
            heard = read_events(run / "events.jsonl")
            told = [(one.seconds, one.event.examples) for one in heard if isinstance(one.event, Progress)]
            if told and told[-1][1] >= examples:
                return told[-1][0] - next(seconds for seconds, seen in told if seen)
        time.sleep(POLL_SECONDS)
    raise RuntimeError("the job ended before it could be killed")
