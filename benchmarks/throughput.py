# SPDX-License-Identifier: Apache-2.0
"""Examples per second of the speech model: the plain loop, DistributedDataParallel, and Downpour.

All methods compute the same mini-batches of synthetic frames with one thread in each process. They take turns of a few
seconds; what is compared are ratios to the plain loop, or to DDP, in the same round. Two plain loops at once show what
two processes can reach at most on this machine, whose cores share caches and memory.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks import throughput_peers, throughput_product
from benchmarks.processes import Companion
from benchmarks.table import Measured, Row, Spread, interleave, ratio, table_text, verdict

SLOWDOWN = 4.0
PLAIN, TWO_PLAIN, DDP, DDP_SLOW = (
    "plain loop", "2 plain loops, nothing shared", "DDP, 2 processes", "DDP, 2 processes, one 4x slower",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The smallest ratio of examples per second to those of the method `to`."""

    to: str
    ratio: float

    def __str__(self) -> str:
        return f">= {self.ratio:g} of {self.to}"


@dataclass(frozen=True)
class Way:
    """Downpour with so many replicas; n is n_push and n_fetch, `slow` how many times slower one of them is."""

    replicas: int
    n: int
    slow: float | None
    target: Target | None

    @property
    def name(self) -> str:
        """As the tables call it."""
        replicas = f"Downpour, {self.replicas} replica{'s' if self.replicas > 1 else ''}, n = {self.n}"
        return replicas + (f", one {self.slow:g}x slower" if self.slow else "")


WAYS = (
    Way(1, 1, None, Target(PLAIN, 1.0)),
    Way(1, 4, None, Target(PLAIN, 1.0)),
    Way(2, 1, None, Target(PLAIN, 1.6)),
    Way(2, 4, None, Target(PLAIN, 1.8)),
    Way(2, 1, SLOWDOWN, Target(DDP_SLOW, 4.0)),
    Way(2, 4, SLOWDOWN, Target(DDP_SLOW, 4.0)),
)
TARGET_BATCH_SIZE = 32


@dataclass(frozen=True)
class Plan:
    """How long to measure. No round begins after `budget_seconds` for a batch size."""

    batch_sizes: tuple[int, ...]
    rounds: int
    seconds: float
    budget_seconds: float


FULL = Plan((32, 128), 7, 4.0, 360.0)
QUICK = Plan((32,), 3, 1.0, 25.0)


def run(quick: bool) -> list[Row]:
    """Measure every method at every batch size, print the tables, return a row per method and batch size."""
    return measure_all(QUICK if quick else FULL)


def measure_all(plan: Plan, frames: int = throughput_peers.FRAMES) -> list[Row]:
    """Like `run`, to a given plan and with so many synthetic frames for the baselines."""
    rows: list[Row] = []
    with ExitStack() as opened:
        plain = opened.enter_context(Companion(throughput_peers.plain, frames=frames))
        apart = opened.enter_context(Companion(throughput_peers.two_plain, frames=frames))
        parallel = opened.enter_context(Companion(throughput_peers.data_parallel, frames=frames))
        for batch_size in plan.batch_sizes:
            methods: dict[str, Callable[[], float]] = {
                PLAIN: partial(plain.ask, batch_size, plan.seconds),
                TWO_PLAIN: partial(apart.ask, batch_size, plan.seconds),
                DDP: partial(parallel.ask, batch_size, plan.seconds, 1.0),
                DDP_SLOW: partial(parallel.ask, batch_size, plan.seconds, SLOWDOWN),
            }
            for way in WAYS:
                methods[way.name] = partial(
                    throughput_product.examples_per_second, way.replicas, way.n, batch_size, plan.seconds, way.slow
                )
            measured = interleave(methods, plan.rounds, budget_seconds=plan.budget_seconds)
            rows += _rows(batch_size, measured)
            print(_table(batch_size, measured), flush=True)
    return rows


def is_reached(measured: dict[str, Measured], target: Target | None, name: str) -> bool | None:
    """Whether the median ratio reaches the target; None without a target, False for a method that failed."""
    if target is None:
        return None
    reached = ratio(measured[name], measured[target.to])
    return reached is not None and reached.median >= target.ratio


def _targets(batch_size: int) -> dict[str, Target | None]:
    return {way.name: way.target if batch_size == TARGET_BATCH_SIZE else None for way in WAYS}


def _table(batch_size: int, measured: dict[str, Measured]) -> str:
    targets = _targets(batch_size)
    header = ["method", "examples/s", "range", "to plain loop", "to DDP", "to slow DDP", "target", "reached"]
    lines = []
    for name, one in measured.items():
        rates, target = one.spread, targets.get(name)
        lines.append(
            [
                name,
                f"{rates.median:,.0f}" if rates else "failed",
                f"{rates.low:,.0f}..{rates.high:,.0f}" if rates else "-",
                *(_text(ratio(one, measured[to])) for to in (PLAIN, DDP, DDP_SLOW)),
                str(target or "-"),
                verdict(is_reached(measured, target, name)),
            ]
        )
    rounds = max(len(one.samples) for one in measured.values())
    title = f"speech model 440-512x4-10, batch {batch_size} a replica, median of {rounds} rounds"
    failed = [f"{name}: failed: {one.failure}" for name, one in measured.items() if one.failure]
    return "\n".join([table_text(title, header, lines), *failed])


def _text(quotient: Spread | None) -> str:
    return f"{quotient.median:.2f}" if quotient else "-"


def _rows(batch_size: int, measured: dict[str, Measured]) -> list[Row]:
    targets = _targets(batch_size)
    rows: list[Row] = []
    for name, one in measured.items():
        rates, target = one.spread, targets.get(name)
        quotients = {to: ratio(one, measured[to]) for to in (PLAIN, DDP, DDP_SLOW)}
        rows.append(
            {
                "method": name,
                "batch_size": batch_size,
                "median_examples_per_second": rates.median if rates else None,
                "low_examples_per_second": rates.low if rates else None,
                "high_examples_per_second": rates.high if rates else None,
                "rounds": len(one.samples),
                **{f"ratio to {to}": quotient.median if quotient else None for to, quotient in quotients.items()},
                "target": str(target) if target else None,
                "reached": is_reached(measured, target, name),
                "failure": one.failure,
            }
        )
    return rows
