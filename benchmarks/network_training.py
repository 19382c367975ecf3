# SPDX-License-Identifier: Apache-2.0
"""Training over slow links: one slow link among four, and Downpour beside DistributedDataParallel over four of them.

The hosts share this machine's cores. With one slow link, every mini-batch is therefore prolonged by a pause, so that
four replicas fit into them as if every host had cores of its own; the comparison with DistributedDataParallel is of
both as they are.
"""

import math
import time
from contextlib import ExitStack
from functools import partial

import torch

import distbelief as db
from benchmarks import network_jobs, network_peers
from benchmarks.network_jobs import RATE
from benchmarks.processes import Companion
from benchmarks.table import Measured, Row, Spread, interleave, spread, table_text, verdict
from benchmarks.throughput_peers import Loop, acoustic_model, synthetic_frames
from distbelief.cluster import WireDtype
from tests.hosts import Hosts

BATCH_SIZE = 32
REPLICAS = 4
SLOW_LINK, SLOWDOWN = 20e6, 6.0
SHARE_TARGET = 0.9
SPEECH_LINK = 100e6
ACCURACY, SPEEDUP_TARGET = 0.85, 5.0
BYTES: dict[WireDtype, int] = {"float32": 4, "bfloat16": 2}
SEEDS, EPOCHS = (0, 1, 2), 4
REVISION_RATE, LOCAL_RATE, WARMSTART = 0.02, 0.2, 2_000
"""Of Downpour, chosen by simulating other seeds: the rule that tolerates delays allows the rarest exchanges."""
DDP_BATCH_SIZES = (32, 128)
HOOKS = ("float32", "float16")
DDP = "DistributedDataParallel"


def exchange_seconds(parameters: int, dtype: WireDtype, bits_per_second: float) -> float:
    """A push and a fetch of all parameters, one after the other."""
    return 2 * 8 * BYTES[dtype] * parameters / bits_per_second


def hiding(parameters: int, mini_batch_seconds: float, bits_per_second: float) -> tuple[int, WireDtype]:
    """(n_push, numbers on the wire) with which a link is not waited for: numbers as they are if 16 mini-batches do.

    A replica goes on computing while a push is under way, up to `backlog` times n_push mini-batches.
    """
    wanted: dict[WireDtype, float] = {
        dtype: exchange_seconds(parameters, dtype, bits_per_second) / mini_batch_seconds / db.Downpour().backlog
        for dtype in BYTES
    }
    dtype: WireDtype = "float32" if wanted["float32"] <= 16 else "bfloat16"
    return max(1, 1 << (round(wanted[dtype] + 0.5) - 1).bit_length()), dtype


def exchanging(parameters: int, mini_batch_seconds: float, bits_per_second: float) -> tuple[int, WireDtype]:
    """(n_push, numbers on the wire) where replicas wait for their exchanges and the links are what is scarce.

    Parameters stay fresh when computing takes little of each exchange: a sixth where a replica has a core for itself.
    """
    dtype: WireDtype = "bfloat16"
    wanted = exchange_seconds(parameters, dtype, bits_per_second) / mini_batch_seconds / 6
    return max(1, 1 << round(math.log2(max(1.0, wanted)))), dtype


def mini_batch_seconds() -> float:
    """Of the plain loop on one core."""
    torch.set_num_threads(1)
    loop = Loop(acoustic_model(), synthetic_frames(2_000))
    for _ in range(10):
        loop.step(BATCH_SIZE)
    started = time.perf_counter()
    for _ in range(100):
        loop.step(BATCH_SIZE)
    return (time.perf_counter() - started) / 100


def parameters_of_the_model() -> int:
    """How many numbers travel."""
    return sum(parameter.numel() for parameter in acoustic_model().parameters())


# one slow link


def one_slow_link() -> list[Row]:
    """Four replicas, one of them behind a slow link, beside what a replica alone does on either link."""
    alone = mini_batch_seconds()
    n, dtype = hiding(parameters_of_the_model(), SLOWDOWN * alone, SLOW_LINK)
    algorithm = db.Downpour(
        update_rule=db.adagrad(RATE), n_push=n, n_fetch=n, fetch="overlapped", warmstart=0, cooldown=0
    )
    slow = REPLICAS - 1
    with Hosts(REPLICAS + 2) as hosts:
        hosts.shape(slow, SLOW_LINK)
        rate = partial(
            network_jobs.examples_per_second, hosts, algorithm=algorithm, dtype=dtype, pause=(SLOWDOWN - 1) * alone,
            seconds=25.0,
        )  # fmt: skip
        open_link, slow_link, together = "alone, open link", f"alone, {_line(SLOW_LINK)}", "all four"
        measured = interleave(
            {
                open_link: partial(rate, [0]),
                slow_link: partial(rate, [slow]),
                together: partial(rate, list(range(REPLICAS))),
            },
            3,
        )
    share = _share(measured[together], measured[open_link], measured[slow_link])
    reached = share is not None and share.median >= SHARE_TARGET
    lines = [
        [name, f"{one.spread.median:,.0f}" if one.spread else "failed", *(
            [str(share or "-"), f">= {SHARE_TARGET:g}", verdict(reached)] if name == together else ["-"] * 3
        )]
        for name, one in measured.items()
    ]  # fmt: skip
    title = (
        f"one of four links at {_line(SLOW_LINK)}: n_push = n_fetch = {n}, {dtype} on the wire, mini-batches "
        f"prolonged {SLOWDOWN:g} times"
    )
    header = ["replicas", "examples/s", "of the sum of what each does alone", "asked", "reached"]
    print(table_text(title, header, lines), *_failures(measured), sep="\n", flush=True)
    return [
        {
            "measured": "one slow link",
            "method": name,
            "n_push": n,
            "wire": dtype,
            "median_examples_per_second": one.spread.median if one.spread else None,
            "share_of_sum": share.median if share and name == together else None,
            "reached": reached if name == together else None,
            "failure": one.failure,
        }
        for name, one in measured.items()
    ]


def _share(together: Measured, open_link: Measured, slow_link: Measured) -> Spread | None:
    if together.failure or open_link.failure or slow_link.failure:
        return None
    rounds = zip(together.samples, open_link.samples, slow_link.samples, strict=True)
    return spread([all_of_them / ((REPLICAS - 1) * fast + slow) for all_of_them, fast, slow in rounds])


# speech


def speech(data: str) -> list[Row]:
    """The time to an accuracy over four slow links, for several seeds, none of which the settings were chosen by.

    DistributedDataParallel would take ten minutes for each: what is measured is its step over these links, and how many
    steps it takes to the accuracy, on one process with the whole mini-batch. It takes fewer with larger ones.
    """
    n, dtype = exchanging(parameters_of_the_model(), mini_batch_seconds(), SPEECH_LINK)
    algorithm = db.Downpour(
        update_rule=db.adaptive_revision(REVISION_RATE), n_push=n, n_fetch=n, fetch="awaited", local_rate=LOCAL_RATE,
        warmstart=WARMSTART, cooldown=0,
    )  # fmt: skip
    step_seconds = _step_seconds(40)
    finishes = []
    for seed in SEEDS:
        with Hosts(REPLICAS + 2) as hosts:
            for host in range(REPLICAS):
                hosts.shape(host, SPEECH_LINK)
            finishes.append(
                network_jobs.speech_seconds(hosts, data, ACCURACY, algorithm, dtype, epochs=EPOCHS, seed=seed)
            )
    ours = [finish.seconds for finish in finishes]
    told = ", ".join(f"{finish.examples:,} (best {finish.best:.3f})" for finish in finishes)
    notes = [
        f"Downpour, n_push = n_fetch = {n}, awaited, local_rate {LOCAL_RATE:g}, adaptive_revision: examples {told}"
    ]
    lines = [["Downpour", str(BATCH_SIZE), dtype, *(_seconds(one) for one in ours), "-", "-", "-"]]
    rows: list[Row] = [_row("Downpour", BATCH_SIZE, dtype, ours, None, None)]
    for batch_size in DDP_BATCH_SIZES:
        steps = [
            network_jobs.plain_steps(data, ACCURACY, REPLICAS * batch_size, epochs=EPOCHS, seed=seed) for seed in SEEDS
        ]
        notes.append(f"{DDP}, {batch_size} a process: steps {', '.join(map(str, steps))}")
        for hook in HOOKS:
            seconds = step_seconds[batch_size, hook]
            notes[-1] += f", {seconds:.3f} s each ({hook})"
            theirs = [count * seconds if count else None for count in steps]
            pairs = [(one, own) for one, own in zip(theirs, ours, strict=True) if one is not None]
            slower = spread([one / own if own else 0.0 for one, own in pairs]) if pairs else None
            asked = (batch_size, hook) == (BATCH_SIZE, "float32")
            reached = (slower is not None and slower.median >= SPEEDUP_TARGET and None not in ours) if asked else None
            lines.append(
                [DDP, str(batch_size), hook, *(_seconds(one) for one in theirs), str(slower or "-"),
                 f">= {SPEEDUP_TARGET:g}" if asked else "-", verdict(reached)]
            )  # fmt: skip
            rows.append(_row(DDP, batch_size, hook, theirs, slower, reached))
    title = f"speech to {ACCURACY:.0%} frame accuracy over four links of {_line(SPEECH_LINK)}"
    header = ["method", "mini-batch", "on the wire", *(f"seed {seed}" for seed in SEEDS)]
    print(table_text(title, [*header, "times that of Downpour", "asked", "reached"], lines))
    print(*notes, sep="\n", flush=True)
    return rows


def _step_seconds(steps: int) -> dict[tuple[int, str], float]:
    """(mini-batch of a process, numbers on the wire) -> seconds of a step of DistributedDataParallel."""
    with Hosts(REPLICAS) as hosts, ExitStack() as opened:
        for host in range(REPLICAS):
            hosts.shape(host, SPEECH_LINK)
        members = [
            opened.enter_context(
                Companion(
                    network_peers.data_parallel, pauses=False, entering=hosts.entering(host),
                    head=hosts.addresses[0], rank=host, hosts=REPLICAS,
                )
            )
            for host in range(REPLICAS)
        ]  # fmt: skip
        for member in members:
            member.wait_until_ready()
        return {
            (batch_size, hook): members[0].ask(batch_size, steps, hook)
            for batch_size in DDP_BATCH_SIZES
            for hook in HOOKS
        }


def _row(
    method: str, batch_size: int, wire: str, seconds: list[float | None], slower: Spread | None, reached: bool | None
) -> Row:
    return {
        "measured": "speech", "method": method, "batch_size": batch_size, "wire": wire,
        **{f"seconds, seed {seed}": one for seed, one in zip(SEEDS, seconds, strict=False)},
        "times_downpour": slower.median if slower else None, "reached": reached, "failure": None,
    }  # fmt: skip


def _seconds(seconds: float | None) -> str:
    return f"{seconds:.0f} s" if seconds else "not reached"


def _line(bits_per_second: float) -> str:
    return f"{bits_per_second / 1e6:,.0f} Mbit/s"


def _failures(measured: dict[str, Measured]) -> list[str]:
    return [f"{name}: failed: {one.failure}" for name, one in measured.items() if one.failure]
