# SPDX-License-Identifier: Apache-2.0
"""Time per mini-batch of one model replica over K processes, beside one process and beside other ways to cut a model.

Forward and backward, one thread in each process, all on this machine: a locally connected net, and the paper's acoustic
model at several widths. Beside the times, the elements that cross boundaries in a mini-batch: what the plan says, and
what the partitions count. All methods take turns; what is compared are ratios within a round.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks import partition_peers, partition_product
from benchmarks.partition_peers import LOCAL
from benchmarks.processes import Baseline, Companion
from benchmarks.table import Measured, Row, Spread, duration, interleave, ratio, table_text, verdict
from distbelief.cluster import available_cores

ONE, TENSOR, PIPELINE = "one process", "torch tensor parallel", "torch pipelining"
WIDTHS = (512, 1024, 2048, 2560)
TARGET_WIDTH, TARGET_BATCH_SIZE = 2048, 256
LOCAL_SPEEDUP, DENSE_SPEEDUP, TENSOR_PARITY = 1.8, 1.3, 0.9
"""Asked of two partitions: times as fast as one process; and as tensor parallelism."""


@dataclass(frozen=True)
class Case:
    """A model and the size of its mini-batches."""

    model: str
    batch_size: int

    @property
    def targets(self) -> dict[str, float]:
        """How many times as fast as each of these methods two partitions should be."""
        if self.model == LOCAL:
            return {ONE: LOCAL_SPEEDUP}
        is_target = self == Case(f"speech {TARGET_WIDTH}", TARGET_BATCH_SIZE)
        return {ONE: DENSE_SPEEDUP, TENSOR: TENSOR_PARITY} if is_target else {}

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}"


@dataclass(frozen=True)
class Plan:
    """What to measure and how often: `steps` mini-batches in each round."""

    cases: tuple[Case, ...]
    rounds: int
    steps: int


FULL = Plan((Case(LOCAL, 32), *(Case(f"speech {width}", size) for width in WIDTHS for size in (128, 256))), 7, 4)
QUICK = Plan((Case(LOCAL, 32), Case(f"speech {TARGET_WIDTH}", TARGET_BATCH_SIZE)), 3, 2)


def run(quick: bool) -> list[Row]:
    """Measure every case, print the tables, return a row per case and method."""
    return measure_all(QUICK if quick else FULL)


def measure_all(plan: Plan) -> list[Row]:
    """Like `run`, to a given plan."""
    rows: list[Row] = []
    for case in plan.cases:
        measured, traffic = _measure(case, plan)
        rows += _rows(case, measured, traffic)
        print(_table(case, measured, traffic), flush=True)
    return rows


def units_of(partitions: int) -> str:
    """What the tables call the product's rows."""
    return f"distbelief, K = {partitions}"


def partition_counts() -> list[int]:
    """1, 2, 4, ... as far as each has a core, but always 1 and 2."""
    return [1, 2, *(2**power for power in range(2, 6) if 2**power <= available_cores())]


Traffic = dict[str, tuple[int, int]]
"""Elements per mini-batch, predicted and counted, of each of the product's rows."""


def _measure(case: Case, plan: Plan) -> tuple[dict[str, Measured], Traffic]:
    with ExitStack() as opened:

        def start(baseline: Baseline, **more: int) -> Companion:
            given = {"model": case.model, "batch_size": case.batch_size, **more}
            return opened.enter_context(Companion(baseline, **given))

        methods: dict[str, Callable[[], float]] = {ONE: partial(start(partition_peers.one_process).ask, plan.steps)}
        traffic: Traffic = {}
        for partitions in partition_counts():
            product = start(partition_product.by_units, partitions=partitions)
            predicted, counted = (product.ask(question, 1) for question in ("predicted", "counted"))
            traffic[units_of(partitions)] = (round(predicted), round(counted))
            methods[units_of(partitions)] = partial(product.ask, "seconds", plan.steps)
        peers = {PIPELINE: partition_peers.pipelining}
        if case.model != LOCAL:
            peers[TENSOR] = partition_peers.tensor_parallel
        for name, baseline in peers.items():
            methods[name] = partial(start(baseline, partitions=2).ask, plan.steps)
        return interleave(methods, plan.rounds), traffic


def speedup(measured: dict[str, Measured], name: str, over: str) -> Spread | None:
    """How many times as fast `name` is as `over`."""
    return ratio(measured[over], measured[name])


def is_reached(case: Case, measured: dict[str, Measured], name: str) -> bool | None:
    """Whether two partitions are as fast as asked; None for other methods, and where nothing is asked."""
    if name != units_of(2) or not case.targets:
        return None
    speedups = [(speedup(measured, name, over), asked) for over, asked in case.targets.items()]
    return all(found is not None and found.median >= asked for found, asked in speedups)


def _table(case: Case, measured: dict[str, Measured], traffic: Traffic) -> str:
    header = ["method", "time", "range", "speed-up", "of tensor parallel", "predicted", "counted", "asked", "reached"]
    lines = []
    for name, one in measured.items():
        times = one.spread
        asked = case.targets if name == units_of(2) else {}
        lines.append(
            [
                name,
                duration(times.median) if times else "failed",
                f"{duration(times.low)}..{duration(times.high)}" if times else "-",
                str(speedup(measured, name, ONE) or "-"),
                _text(speedup(measured, name, TENSOR)) if TENSOR in measured else "-",
                *(f"{number:,}" for number in traffic.get(name, ())),
                *["-"] * (0 if name in traffic else 2),
                ", ".join(f">= {times:g} of {over}" for over, times in asked.items()) or "-",
                verdict(is_reached(case, measured, name)),
            ]
        )
    rounds = max(len(one.samples) for one in measured.values())
    title = f"{case}: forward and backward, median of {rounds} rounds; elements that cross boundaries in a mini-batch"
    failed = [f"{name}: failed: {one.failure}" for name, one in measured.items() if one.failure]
    return "\n".join([table_text(title, header, lines), *failed])


def _text(quotient: Spread | None) -> str:
    return f"{quotient.median:.2f}" if quotient else "-"


def _rows(case: Case, measured: dict[str, Measured], traffic: Traffic) -> list[Row]:
    rows: list[Row] = []
    for name, one in measured.items():
        times = one.spread
        quotients = {over: speedup(measured, name, over) for over in (ONE, TENSOR) if over in measured}
        predicted, counted = traffic.get(name, (None, None))
        asked = case.targets if name == units_of(2) else {}
        rows.append(
            {
                "model": case.model,
                "batch_size": case.batch_size,
                "method": name,
                "median_seconds": times.median if times else None,
                "low_seconds": times.low if times else None,
                "high_seconds": times.high if times else None,
                "rounds": len(one.samples),
                **{f"speed-up over {over}": found.median if found else None for over, found in quotients.items()},
                "predicted_elements": predicted,
                "counted_elements": counted,
                "target": ", ".join(f">= {times:g} of {over}" for over, times in asked.items()) or None,
                "reached": is_reached(case, measured, name),
                "failure": one.failure,
            }
        )
    return rows
