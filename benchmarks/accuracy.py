# SPDX-License-Identifier: Apache-2.0
"""Frame accuracy of the speech example after equal examples: the plain loop, and Downpour with ever more replicas.

Downpour runs with its default settings, for real and, where the machine has too few cores, on the simulated engine.
There the times of mini-batches are exponentially distributed, so that the order of pushes is random, and shards answer
at once, as if there were as many of them as it takes: mean staleness is then the number of other replicas.
"""

import contextlib
import inspect
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

import distbelief as db
from benchmarks.table import Measured, Row, interleave, standing, table_text, verdict
from distbelief.cluster import EngineName
from examples import speech

METRIC = "frame_accuracy"
PLAIN = "plain loop"
SHARDS = 2
SEEDS = (0, 1, 2)
COSTS = db.Costs(jitter=1.0, serving_bytes_per_second=1e12)


@dataclass(frozen=True)
class Way:
    """Downpour with so many replicas on an engine; `margin` is how far below the plain loop's seeds it may end."""

    replicas: int
    engine: EngineName
    margin: float = 0.0

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"Downpour, {self.replicas} replica{'s' if self.replicas > 1 else ''}, {self.engine}"


WAYS = (
    Way(1, "local"),
    Way(2, "local"),
    Way(4, "local"),
    Way(4, "simulated"),
    Way(16, "simulated"),
    Way(64, "simulated", margin=0.015),
)


def run(data: str, quick: bool) -> list[Row]:
    """Train every way with every seed on the recordings at `data`, print the table, return a row per way.

    Quick: one seed, one epoch over every tenth frame; it shows that everything runs, the accuracies mean nothing.
    """
    job = speech_job(data, quick)
    seeds = SEEDS[:1] if quick else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        measured = {PLAIN: _each_seed(PLAIN, seeds, partial(plain_accuracy, job))}
        for way in WAYS:
            measured[way.name] = _each_seed(way.name, seeds, partial(downpour_accuracy, job, way, Path(folder)))
    print(_table(measured, job, quick))
    return _rows(measured, quick)


def _each_seed(name: str, seeds: Sequence[int], train: Callable[[int], float]) -> Measured:
    """The accuracies of a way, one for each seed; a failure ends the way."""
    remaining = iter(seeds)
    measured = interleave({name: lambda: train(next(remaining))}, len(seeds))[name]
    accuracies = " ".join(f"{accuracy:.4f}" for accuracy in measured.samples)
    print(f"{name}: {accuracies}" + (f" failed: {measured.failure}" if measured.failure else ""), flush=True)
    return measured


def speech_job(data: str, quick: bool) -> db.Job:
    """The speech example on the recordings at `data`, read; quick: one epoch over every tenth frame."""
    job = speech.job(data)
    train, test = job.data(), job.test()
    if quick:
        train = Subset(train, range(0, len(train), 10))
    return replace(job, data=train, test=test, epochs=1 if quick else 3, batch_size=32)


def plain_accuracy(job: db.Job, seed: int) -> float:
    """Train `job`'s model in one process with its rule's optimizer and no distbelief; returns the test accuracy."""
    torch.manual_seed(seed)
    model: torch.nn.Module = job.model()
    rule: Any = job.algorithm.update_rule
    fused = {"fused": True} if "fused" in inspect.signature(rule.optimizer).parameters else {}
    optimizer = rule.optimizer(model.parameters(), **dict(rule.options), **fused)
    dataset: Any = job.data
    for _ in range(job.epochs):
        for indices in torch.randperm(len(dataset)).split(job.batch_size):  # type: ignore[no-untyped-call]
            inputs, targets = dataset.__getitems__(indices.tolist())
            optimizer.zero_grad()
            job.loss(model(inputs), targets).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(speech.evaluate(model, job.test)[METRIC])


def downpour_accuracy(job: db.Job, way: Way, folder: Path, seed: int) -> float:
    """Train `job` as `way` says into a run folder below `folder`; returns the test accuracy."""
    cluster = db.Cluster(replicas=way.replicas, shards=SHARDS, engine=way.engine, device="cpu")
    run = folder / f"{way.replicas}-{way.engine}-{seed}"
    with contextlib.redirect_stdout(io.StringIO()):
        result = db.train(replace(job, cluster=cluster, seed=seed, run=run), costs=COSTS)
    return float(result.test[METRIC])


def title(job: db.Job) -> str:
    """What the accuracies of a table are."""
    epochs = f"{job.epochs} epoch{'s' if job.epochs > 1 else ''}"
    return f"frame accuracy after {epochs} of {len(job.data):,} frames, batch 32"


def _table(measured: dict[str, Measured], job: db.Job, quick: bool) -> str:
    lines = []
    for row in _rows(measured, quick):
        failed = row["failure"] is not None
        accuracies = ["failed", "-"] if failed else [f"{row['mean']:.4f}", f"{row['low']:.4f}..{row['high']:.4f}"]
        lines.append([str(row["method"]), *accuracies, str(row["standing"] or "-"), verdict(row["reached"])])
    text = table_text(title(job), ["method", "mean", "range", "to the plain loop's range", "reached"], lines)
    return text + ("\nquick: too short to judge accuracy by" if quick else "")


def _rows(measured: dict[str, Measured], quick: bool) -> list[Row]:
    margins = {way.name: way.margin for way in WAYS}
    plain = measured[PLAIN].spread
    rows: list[Row] = []
    for name, one in measured.items():
        accuracies = one.spread
        judged = name in margins and not quick
        where = standing(accuracies, plain, margins[name]) if judged and accuracies and plain else None
        rows.append(
            {
                "method": name,
                "mean": accuracies.mean if accuracies else None,
                "low": accuracies.low if accuracies else None,
                "high": accuracies.high if accuracies else None,
                "seeds": len(one.samples),
                "standing": where,
                "reached": where not in (None, "below") if judged else None,
                "failure": one.failure,
            }
        )
    return rows
