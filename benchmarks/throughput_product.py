# SPDX-License-Identifier: Apache-2.0
"""The product's rows: whole jobs on the local engine, measured between two moments of steady training."""

import tempfile
from itertools import pairwise
from pathlib import Path

from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from benchmarks.throughput_peers import acoustic_model, synthetic_frames
from distbelief.events import Observation, Progress

SETTLE_SECONDS = 1.0


def frames() -> TensorDataset:
    """The peers' data, built where the replicas are forked."""
    return TensorDataset(*synthetic_frames())


class Stopwatch:
    """Listens to a job, and ends it when it has seen enough."""

    def __init__(self, seconds: float) -> None:
        """Measure over `seconds`, after training has settled."""
        self._seconds = seconds
        self._seen: list[tuple[float, int]] = []

    def __call__(self, observation: Observation) -> None:
        """Note the examples of each progress event."""
        event = observation.event
        if not isinstance(event, Progress) or not event.examples:
            return
        self._seen.append((observation.seconds, event.examples))
        if observation.seconds - self._seen[0][0] > SETTLE_SECONDS + self._seconds:
            self._seconds = float("inf")
            raise StopIteration("enough was seen")

    def rate(self) -> float:
        """Examples per second between the first and last progress after training has settled.

        Only events that tell of some count: a slow link settles many examples at once and then none for a while.
        """
        told = [later for earlier, later in pairwise(self._seen[:-1]) if later[1] > earlier[1]]
        settled = [moment for moment in told if moment[0] - self._seen[0][0] >= SETTLE_SECONDS]
        (start, before), (stop, after) = settled[0], settled[-1]
        return (after - before) / (stop - start)


def examples_per_second(replicas: int, n: int, batch_size: int, seconds: float, slow: float | None) -> float:
    """Downpour with n_push = n_fetch = `n` and overlapped fetches; the last replica computes `slow` times longer."""
    stopwatch = Stopwatch(seconds)
    with tempfile.TemporaryDirectory() as folder:
        job = db.Job(
            model=acoustic_model, loss=nn.functional.cross_entropy, data=frames,
            algorithm=db.Downpour(
                update_rule=db.adagrad(0.01), n_fetch=n, n_push=n, fetch="overlapped", warmstart=0, cooldown=0
            ),
            cluster=db.Cluster(replicas=replicas, shards=1, threads_per_replica=1, device="cpu"),
            epochs=1000, batch_size=batch_size, checkpoint_seconds=1e6, run=Path(folder) / "run",
        )  # fmt: skip
        faults = db.Faults(slow={} if slow is None else {f"replica/{replicas - 1}": slow})
        db.train(job, faults=faults, listeners=[stopwatch], view=False)
    return stopwatch.rate()
