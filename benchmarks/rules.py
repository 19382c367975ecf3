# SPDX-License-Identifier: Apache-2.0
"""Frame accuracy of the speech example by update rule: what asynchrony costs each, beside a plain loop of the same one.

The plain loop takes torch's optimizer with the same options; Downpour runs with its default settings otherwise on the
simulated engine, as in `accuracy`. Momentum is once the rule's and once each replica's. A rule's rate is the one with
which the plain loop ends best with seed 0, of rates a factor of about three apart: none was chosen for many replicas.
Nothing is timed, so as many trainings run at once as there are cores.
"""

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

import distbelief as db
from benchmarks.accuracy import PLAIN, SEEDS, Way, downpour_accuracy, plain_accuracy, speech_job, title
from benchmarks.table import Measured, Row, cores, one_line, table_text
from distbelief.update_rule.rule import UpdateRule


@dataclass(frozen=True)
class Case:
    """What the plain loop trains by, and if that is another rule, by what Downpour does so with its `momentum`."""

    plain: UpdateRule
    shards: UpdateRule | None = None
    momentum: float = 0.0

    def __str__(self) -> str:
        return repr(self.plain) if self.shards is None else f"Downpour({self.shards!r}, momentum={self.momentum})"


CASES = (
    Case(db.adagrad(0.01)),
    Case(db.sgd(0.3)),
    Case(db.sgd(0.03, momentum=0.9)),
    Case(db.sgd(0.03, momentum=0.9, nesterov=True), db.sgd(0.03), momentum=0.9),
    Case(db.adam(0.001)),
    Case(db.optimizer(torch.optim.RMSprop, lr=0.001)),
)
WAYS = (None, Way(4, "simulated"), Way(16, "simulated"), Way(64, "simulated"))
"""None is the plain loop."""


def run(data: str, quick: bool) -> list[Row]:
    """Train by every rule in every way with every seed on the recordings at `data`, print the table, return its rows.

    Quick: one seed, one epoch over every tenth frame; it shows that everything runs, the accuracies mean nothing.
    """
    seeds = SEEDS[:1] if quick else SEEDS
    rows: list[Row] = []
    lines = []
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        trained = {
            (case, way): [pool.submit(accuracy, data, quick, case, way, seed) for seed in seeds]
            for case in CASES
            for way in WAYS
        }
        for case in CASES:
            measured = [collected(trained[case, way]) for way in WAYS]
            found = [row(case, way, one, measured[0]) for way, one in zip(WAYS, measured, strict=True)]
            rows += found
            lines.append([str(case), *map(_cell, found)])
            print(*lines[-1], sep="  ", flush=True)
    header = ["rule", *(PLAIN if way is None else f"{way.replicas} replicas" for way in WAYS)]
    print(table_text(f"{title(speech_job(data, quick))}, mean and range", header, lines))
    return rows


def accuracy(data: str, quick: bool, case: Case, way: Way | None, seed: int) -> float:
    """Train the speech example once; returns the test accuracy. `way` is None for the plain loop."""
    job = _job(data, quick)
    if way is None:
        return plain_accuracy(replace(job, algorithm=db.Downpour(update_rule=case.plain)), seed)
    job = replace(job, algorithm=db.Downpour(update_rule=case.shards or case.plain, momentum=case.momentum))
    with tempfile.TemporaryDirectory() as folder:
        return downpour_accuracy(job, way, Path(folder), seed)


@cache
def _job(data: str, quick: bool) -> db.Job:
    torch.set_num_threads(1)
    return speech_job(data, quick)


def collected(futures: Sequence[Future[float]]) -> Measured:
    """What a training of each seed gave, or the reason of the first that failed."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    return Measured((), one_line(errors[0])) if errors else Measured(tuple(future.result() for future in futures))


def row(case: Case, way: Way | None, measured: Measured, plain: Measured) -> Row:
    accuracies, reference = measured.spread, plain.spread
    return {
        "rule": str(case),
        "method": PLAIN if way is None else way.name,
        "mean": accuracies.mean if accuracies else None,
        "low": accuracies.low if accuracies else None,
        "high": accuracies.high if accuracies else None,
        "seeds": len(measured.samples),
        "lost": reference.mean - accuracies.mean if accuracies and reference else None,
        "failure": measured.failure,
    }


def _cell(row: Row) -> str:
    return "failed" if row["failure"] else f"{row['mean']:.4f} ({row['low']:.4f}..{row['high']:.4f})"
