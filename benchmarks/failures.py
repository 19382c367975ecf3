# SPDX-License-Identifier: Apache-2.0
"""What a death costs: whole jobs to the last example, undisturbed and with something killed, beside torch's own ways.

All jobs train on the same frames, so that what a death costs in time is the difference to the undisturbed job of the
same round.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import distbelief as db
from benchmarks import failures_peers as peers
from benchmarks.failures_product import REPLICAS, SHARDS, Outcome, coordinator_killed, disturbed
from benchmarks.processes import Baseline, Companion, CompanionFailed
from benchmarks.table import Cell, Measured, Row, interleave, spread, table_text
from benchmarks.throughput_peers import FRAMES

ROUNDS, EPOCHS, MOMENT_SECONDS, STILL_SECONDS = 5, 2, 4.0, 3.0
QUICK_FRAMES, QUICK_MOMENT_SECONDS, QUICK_STILL_SECONDS = 8_000, 0.4, 0.5
UNDISTURBED = "nothing"
COORDINATOR = "the coordinator is killed, and the run resumed"
ROLES = [f"{kind}/{index}" for kind, count in (("replica", REPLICAS), ("shard", SHARDS)) for index in range(count)]
PATIENCE_SECONDS = 60.0
"""How long a method we compare with may take to notice."""


@dataclass
class Scenario:
    """Jobs in which the same happens, and what became of each."""

    train: Callable[[], Outcome]
    outcomes: list[Outcome] = field(default_factory=list)

    def __call__(self) -> float:
        """Train once more; seconds from the first example to the end."""
        self.outcomes.append(self.train())
        return self.outcomes[-1].seconds


def run(quick: bool) -> list[Row]:
    """Train with every kind of death, print the tables, return their rows."""
    count, epochs, rounds = (QUICK_FRAMES, 1, 1) if quick else (FRAMES, EPOCHS, ROUNDS)
    moment = QUICK_MOMENT_SECONDS if quick else MOMENT_SECONDS
    still = QUICK_STILL_SECONDS if quick else STILL_SECONDS
    gone: list[float] = []
    draws = random.Random(0)

    def by_fault(**faults: tuple[object, ...]) -> Scenario:
        return Scenario(lambda: disturbed(count, epochs, db.Faults(**faults)))  # type: ignore[arg-type]

    def kill_the_coordinator() -> Outcome:
        outcome, seconds = coordinator_killed(count, epochs)
        gone.append(seconds)
        return outcome

    def kill_each_second() -> Outcome:
        kills = tuple((moment + second, draws.choice(ROLES)) for second in range(60))
        return disturbed(count, epochs, db.Faults(kill=kills))

    scenarios = {
        UNDISTURBED: by_fault(),
        "a replica is killed": by_fault(kill=((moment, "replica/0"),)),
        "a shard is killed": by_fault(kill=((moment, "shard/0"),)),
        COORDINATOR: Scenario(kill_the_coordinator),
    }
    if quick:
        print("quick: nothing stands still, and nothing is killed again and again")
    else:
        scenarios[f"a replica stands still for {still:g} s"] = by_fault(hang=((moment, moment + still, "replica/0"),))
        scenarios["any of them is killed each second"] = Scenario(kill_each_second)
    measured = interleave(scenarios, rounds)
    rows = [_row(what, one, scenarios[what].outcomes, measured[UNDISTURBED]) for what, one in measured.items()]
    print(
        _table(
            rows, f"{REPLICAS} replicas, {SHARDS} shards, {epochs} x {count:,} frames, medians of {rounds} jobs each"
        )
    )
    if gone:
        print(f"{COORDINATOR}: no process was left after {max(gone):.2f} s")
    others = [_ask(peer, rounds) for peer in _peers(still)]
    lines = [[str(row["what"]), str(row["text"]), str(row["comes"])] for row in others]
    print(table_text("torch's own ways, two processes", ["what happens", "seconds", "what comes of it"], lines))
    return [*rows, {"what": "seconds until no process was left", "seconds": max(gone, default=None)}, *others]


def _row(what: str, one: Measured, outcomes: Sequence[Outcome], undisturbed: Measured) -> Row:
    more = [disturbed - without for disturbed, without in zip(one.samples, undisturbed.samples, strict=False)]
    back = [outcome.back_seconds for outcome in outcomes if outcome.back_seconds is not None]
    return {
        "what": what,
        "jobs": len(outcomes),
        "seconds": statistics.median(one.samples) if one.samples else None,
        "more_seconds": statistics.median(more) if more else None,
        "more_seconds_low": min(more, default=None),
        "more_seconds_high": max(more, default=None),
        "losses": max((outcome.losses for outcome in outcomes), default=None),
        "back_seconds": statistics.median(back) if back else None,
        "missing": max((outcome.missing for outcome in outcomes), default=None),
        "repeated": max((outcome.repeated for outcome in outcomes), default=None),
        "lost_updates": max((outcome.lost_updates for outcome in outcomes), default=None),
        "pushes": max((outcome.pushes for outcome in outcomes), default=None),
        "accuracy": statistics.fmean(outcome.accuracy for outcome in outcomes) if outcomes else None,
        "failure": one.failure,
    }


def _table(rows: Sequence[Row], title: str) -> str:
    header = ["what happens", "seconds", "more", "range", "deaths", "back after", "missing", "repeated", "updates lost",
              "of", "accuracy"]  # fmt: skip
    lines = [
        [
            str(row["what"]), _text(row["seconds"], ".1f"), _text(row["more_seconds"], "+.1f"),
            f"{_text(row['more_seconds_low'], '+.1f')}..{_text(row['more_seconds_high'], '+.1f')}",
            _text(row["losses"], "d"), _text(row["back_seconds"], ".2f"), _text(row["missing"], ",d"),
            _text(row["repeated"], ",d"), _text(row["lost_updates"], ",d"), _text(row["pushes"], ",d"),
            _text(row["accuracy"], ".3f"),
        ]
        for row in rows
    ]  # fmt: skip
    failed = [f"{row['what']}: failed: {row['failure']}" for row in rows if row["failure"]]
    return "\n".join([table_text(title, header, lines), *failed])


def _text(value: Cell, form: str) -> str:
    return "-" if value is None else format(value, form)


@dataclass(frozen=True)
class Peer:
    """A way of torch's, what happens to it, what is asked for the seconds that it costs, and what comes of it."""

    what: str
    baseline: Baseline
    question: tuple[float, ...]
    comes: str


def _peers(still_seconds: float) -> Sequence[Peer]:
    parallel = "DistributedDataParallel"
    return (
        Peer(f"{parallel}: a process stands still for {still_seconds:g} s", peers.data_parallel, (still_seconds,),
             "the other waits; so much more"),
        Peer(f"{parallel}: a process is killed", peers.data_parallel, (0.0,),
             "an exception in the other; the job is over"),
        Peer(f"{parallel} under torchrun: a process is killed", peers.elastic, (),
             "both start again, from the script's snapshot of each second"),
        Peer("a parameter server over torch rpc: it is killed", peers.server, (),
             "an exception in the worker; the parameters are lost"),
    )  # fmt: skip


def _ask(peer: Peer, rounds: int) -> Row:
    found: list[float] = []
    try:
        for _ in range(rounds):
            with Companion(peer.baseline, pauses=False) as companion:
                found.append(companion.ask(*peer.question, deadline_seconds=PATIENCE_SECONDS))
    except CompanionFailed as error:
        return {"what": peer.what, "seconds": None, "text": "-", "comes": f"failed: {error}"}
    seconds = spread(found)
    return {
        "what": peer.what, "seconds": seconds.median, "low": seconds.low, "high": seconds.high, "text": str(seconds),
        "comes": peer.comes,
    }  # fmt: skip
