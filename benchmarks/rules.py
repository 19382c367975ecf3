# SPDX-License-Identifier: Apache-2.0
"""Frame accuracy of the speech example by update rule: what asynchrony costs each, beside a plain loop of the same one.

The plain loop takes torch's optimizer with the same options; Downpour runs with its default settings on the simulated
engine, as in `accuracy`. A rule's rate is the one with which the plain loop ends best with seed 0, of rates a factor of
about three apart: none was chosen for many replicas. Nothing is timed, so as many trainings run at once as there are
cores.
"""

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import distbelief as db
from benchmarks.accuracy import PLAIN, SEEDS, Way, downpour_accuracy, plain_accuracy, speech_job, title
from benchmarks.table import Measured, Row, cores, one_line, table_text
from distbelief.update_rule.rule import UpdateRule

RULES: tuple[UpdateRule, ...] = (
    db.adagrad(0.01),
    db.sgd(0.3),
    db.sgd(0.03, momentum=0.9),
    db.adam(0.001),
    db.optimizer(torch.optim.RMSprop, lr=0.001),
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
            (rule, way): [pool.submit(accuracy, data, quick, rule, way, seed) for seed in seeds]
            for rule in RULES
            for way in WAYS
        }
        for rule in RULES:
            measured = [collected(trained[rule, way]) for way in WAYS]
            found = [row(rule, way, one, measured[0]) for way, one in zip(WAYS, measured, strict=True)]
            rows += found
            lines.append([str(rule), *map(_cell, found)])
            print(*lines[-1], sep="  ", flush=True)
    header = ["rule", *(PLAIN if way is None else f"{way.replicas} replicas" for way in WAYS)]
    print(table_text(f"{title(speech_job(data, quick))}, mean and range", header, lines))
    return rows


def accuracy(data: str, quick: bool, rule: UpdateRule, way: Way | None, seed: int) -> float:
    """Train the speech example once with `rule`; returns the test accuracy. `way` is None for the plain loop."""
    job = replace(_job(data, quick), algorithm=db.Downpour(update_rule=rule))
    if way is None:
        return plain_accuracy(job, seed)
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


def row(rule: UpdateRule, way: Way | None, measured: Measured, plain: Measured) -> Row:
    accuracies, reference = measured.spread, plain.spread
    return {
        "rule": repr(rule),
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
