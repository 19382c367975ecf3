# SPDX-License-Identifier: Apache-2.0
"""Sandblaster L-BFGS: time to the same loss beside torch.optim.LBFGS, a slow replica, overhead, memory of a shard.

All methods start from the same parameters with the same full batch, and stop when they reach the loss that
torch.optim.LBFGS has after some iterations. They take turns, from one start after another: from any one of them a
search may need an evaluation or two more than another, so what is compared is the time from all starts together.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from benchmarks import sandblaster_peers
from benchmarks.memory import held, role_processes
from benchmarks.processes import Companion
from benchmarks.sandblaster_peers import HISTORY, MICRO_BATCH, frames, model
from benchmarks.table import Measured, Row, Spread, interleave, ratio, spread, table_text, verdict
from distbelief.batch_section import BatchSection, Extent, Keeping, Mark
from distbelief.events import CheckpointWritten, Iterated, Observation
from distbelief.lbfgs import Evaluate, Options, Solver, Step
from distbelief.parameters import Span, lay_out

ONE_THREAD, ALL_CORES = "torch.optim.LBFGS, one thread", "torch.optim.LBFGS, all cores"
SLOWDOWN = 4.0
ALLOWED_OVER_IDEAL = 1.3
OVERHEAD_MILLISECONDS = 2.0
EXAMPLES, ITERATIONS = 512, 150
"""Of the small search by which the overhead is measured."""
NUMBER_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    frames: int
    iterations: int
    starts: int
    rounds: int
    overhead_rounds: int
    parameters: int
    """Of the model whose shard is weighed."""


FULL = Plan(32_768, 10, 6, 5, 5, 16_000_000)
QUICK = Plan(4_096, 4, 1, 1, 2, 4_000_000)
TARGETS = {1: 0.9, 2: 1.7}
"""Replicas -> how many times as fast as torch.optim.LBFGS on one thread."""


class Clock:
    """Hears a job: when its first evaluation began, and when which iteration was reached."""

    def __init__(self) -> None:
        self.began = 0.0
        self.iterated: list[tuple[float, int]] = []
        """(seconds, evaluations so far) of every iteration."""
        self.backed_up = 0

    def __call__(self, observation: Observation) -> None:
        """Hear an event."""
        match observation.event:
            case CheckpointWritten() if not self.began:
                self.began = observation.seconds
            case Iterated(evaluations=evaluations, backed_up=backed_up):
                self.iterated.append((observation.seconds, evaluations))
                self.backed_up = backed_up

    @property
    def seconds(self) -> float:
        """From the first evaluation to the last iteration."""
        return self.iterated[-1][0] - self.began

    @property
    def seconds_per_evaluation(self) -> float:
        """After the first iteration, in which processes warm up."""
        (first, before), (last, after) = self.iterated[0], self.iterated[-1]
        return (last - first) / (after - before)


def sandblast(
    count: int, replicas: int, *, seed: int = 1, target: float | None = None, iterations: int = 1000,
    slow: bool = False, backups: bool = True,
) -> Clock:  # fmt: skip
    """Minimise over `count` frames with so many replicas, of one thread each, and shards.

    `slow`: the first replica is four times slower.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        job = db.Job(
            model=model, data=partial(frames, count), loss=nn.functional.cross_entropy,
            algorithm=db.Sandblaster(
                history=HISTORY, max_iterations=iterations, gtol=0.0, ftol=0.0, target=target,
                micro_batch=MICRO_BATCH, backups=backups,
            ),
            cluster=db.Cluster(replicas=replicas, shards=replicas, threads_per_replica=1, device="cpu"), seed=seed,
            run=Path(folder) / "run",
        )  # fmt: skip
        faults = db.Faults(slow={"replica/0": SLOWDOWN}) if slow else None
        db.train(job, view=False, listeners=[clock], faults=faults)
    return clock


def run(quick: bool) -> list[Row]:
    """Measure, print the tables, return a row per measurement."""
    plan = QUICK if quick else FULL
    return [*to_the_same_loss(plan), *with_a_slow_replica(plan), overhead(plan.overhead_rounds), memory(plan)]


@dataclass(frozen=True)
class Start:
    """The parameters that a seed gives, and the loss to reach from there."""

    seed: int
    loss: float


def to_the_same_loss(plan: Plan) -> list[Row]:
    """Seconds to the loss that torch.optim.LBFGS reaches."""
    with ExitStack() as opened:
        peer = opened.enter_context(Companion(sandblaster_peers.torch_lbfgs, count=plan.frames))
        cores = torch.get_num_threads()

        def lowest(seed: int) -> float:
            return peer.ask(seed, cores, plan.iterations, -1.0, deadline_seconds=1200.0)

        def torch_seconds(threads: int, start: Start) -> float:
            return peer.ask(start.seed, threads, 10 * plan.iterations, start.loss, deadline_seconds=1200.0)

        def sandblaster_seconds(replicas: int, start: Start) -> float:
            return sandblast(plan.frames, replicas, seed=start.seed, target=start.loss).seconds

        starts = [Start(seed, lowest(seed)) for seed in range(1, plan.starts + 1)]
        methods = {
            ONE_THREAD: in_turn(partial(torch_seconds, 1), starts),
            ALL_CORES: in_turn(partial(torch_seconds, cores), starts),
            **{_name(replicas): in_turn(partial(sandblaster_seconds, replicas), starts) for replicas in TARGETS},
        }
        measured = interleave(methods, plan.starts)
    asked = {_name(replicas): least for replicas, least in TARGETS.items()}
    rows, lines = [], []
    for name, one in measured.items():
        faster, least = ratio(measured[ONE_THREAD], one), asked.get(name)
        if faster is not None:
            together = sum(measured[ONE_THREAD].samples) / sum(one.samples)
            faster = Spread(together, faster.mean, faster.low, faster.high, faster.count)
        reached = None if least is None else faster is not None and faster.median >= least
        lines.append([name, _seconds(one), str(faster or "-"), f">= {least}" if least else "-", verdict(reached)])
        rows.append(_row("time to the same loss", name, faster, f">= {least}" if least else None, reached, one.failure))
    title = (
        f"speech model, full batch of {plan.frames:,} frames, to the loss of torch.optim.LBFGS after {plan.iterations} "
        f"iterations, from {plan.starts} starts"
    )
    header = ["method", "seconds, median", "times one thread's speed (of the starts)", "asked", "reached"]
    print(table_text(title, header, lines), flush=True)
    return rows


def in_turn(measure: Callable[[Start], float], starts: list[Start]) -> Callable[[], float]:
    """Measures from one start after another, call by call."""
    remaining = iter(starts)
    return lambda: measure(next(remaining))


def with_a_slow_replica(plan: Plan) -> list[Row]:
    """Seconds per evaluation of two replicas, one four times slower, beside the ideal and a static split."""
    methods: dict[str, Callable[[], float]] = {
        "alone": lambda: sandblast(plan.frames, 1, iterations=3).seconds_per_evaluation,
        "with backups": lambda: sandblast(plan.frames, 2, iterations=4, slow=True).seconds_per_evaluation,
        "without backups": lambda: (
            sandblast(plan.frames, 2, iterations=4, slow=True, backups=False).seconds_per_evaluation
        ),
    }
    measured = interleave(methods, plan.rounds)
    # Two that are as fast as the one alone, the second slowed: together they do 1 + 1/4 of its work in its time.
    ideal = 1 / (1 + 1 / SLOWDOWN)
    rows, lines = [], []
    for name in ("with backups", "without backups"):
        quotient = ratio(measured[name], measured["alone"])
        over = None if quotient is None else _scaled(quotient, 1 / ideal)
        reached = None if name != "with backups" else over is not None and over.median <= ALLOWED_OVER_IDEAL
        asked = f"<= {ALLOWED_OVER_IDEAL}" if reached is not None else None
        lines.append([name, _seconds(measured[name]), str(over or "-"), asked or "-", verdict(reached)])
        rows.append(_row("one replica four times slower", name, over, asked, reached, measured[name].failure))
    lines.append(["static split in halves (computed)", "-", f"{SLOWDOWN / 2 / ideal:.2f}", "-", "-"])
    title = "two replicas, one four times slower: an evaluation"
    print(table_text(title, ["portions", "seconds", "times the ideal", "asked", "reached"], lines), flush=True)
    return rows


def small(width: int = 16) -> nn.Module:
    """Hardly anything to compute."""
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4))


def few() -> TensorDataset:
    """So many examples that a search does not reach the bottom."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(EXAMPLES, 16, generator=generator), torch.randint(4, (EXAMPLES,), generator=generator)
    )


def overhead(rounds: int) -> Row:
    """Milliseconds that an evaluation takes longer than its gradient and its shard's part do in one process."""

    def together() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            job = db.Job(
                model=small, data=few, loss=nn.functional.cross_entropy, run=Path(folder) / "run",
                algorithm=db.Sandblaster(
                    history=HISTORY, max_iterations=ITERATIONS, gtol=0.0, ftol=0.0, micro_batch=EXAMPLES
                ),
                cluster=db.Cluster(replicas=1, threads_per_replica=1, device="cpu"),
            )  # fmt: skip
            db.train(job, view=False, listeners=[clock])
        return clock.seconds_per_evaluation

    measured = interleave({"together": together, "one process": in_one_process}, rounds)
    samples = [
        1e3 * (one - plain)
        for one, plain in zip(measured["together"].samples, measured["one process"].samples, strict=True)
    ]
    over = spread(samples)
    reached = over.median <= OVERHEAD_MILLISECONDS
    whole, plain = (1e3 * statistics.median(measured[name].samples) for name in ("together", "one process"))
    print(
        f"\nan evaluation of {EXAMPLES} examples and {sum(p.numel() for p in small().parameters())} parameters: "
        f"{whole:.2f} ms, {plain:.2f} of them gradient and shard; coordinator and channel "
        f"{over.median:.2f} ({over.low:.2f}..{over.high:.2f}); asked: <= {OVERHEAD_MILLISECONDS:g}: {verdict(reached)}",
        flush=True,
    )
    asked = f"<= {OVERHEAD_MILLISECONDS:g} ms"
    return _row("milliseconds per evaluation", "1 replica, 1 shard", over, asked, reached, None)


def in_one_process() -> float:
    """Seconds per evaluation of the same search: solver, section with its files, and gradient in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, (inputs, targets) = small(), few().tensors
    parameters, layout = list(module.parameters()), lay_out(module)
    solver = Solver(Options(HISTORY, ITERATIONS, gtol=0.0, ftol=0.0, single=True))
    section = BatchSection(Span(0, layout.length), layout, Keeping(HISTORY))
    x, version, commands = nn.utils.parameters_to_vector(parameters).detach().clone(), 0, solver.begin()
    section.initialise(x)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            for command in commands:
                match command:
                    case Step():
                        version += 1
                        section.step(version, solver.evaluations, command)
                        slots = () if command.slot is None else (command.slot,)
                        section.write(Path(folder) / "shard.safetensors", slots, durable=False)()
                    case Evaluate():
                        section.trial(version, command.t, x)
                        nn.utils.vector_to_parameters(x, parameters)
                        loss = nn.functional.cross_entropy(module(inputs), targets)
                        gradients = torch.autograd.grad(EXAMPLES * loss, parameters)
                        evaluation = solver.evaluations + 1
                        section.contribute(Mark(evaluation, 0), nn.utils.parameters_to_vector(gradients))
                        commands = solver.tell(loss.item(), section.seal(evaluation, command, Extent(1, EXAMPLES)))
                    case _:
                        return (time.perf_counter() - began) / solver.evaluations


class Weigher:
    """Looks at the shard's memory after each iteration."""

    def __init__(self) -> None:
        self.bytes: list[float] = []

    def __call__(self, observation: Observation) -> None:
        """Hear an event."""
        event = observation.event
        if isinstance(event, Iterated):
            self.bytes.append(held(role_processes()[0]).own)


def broad(width: int) -> nn.Module:
    """One layer of so many weights."""
    return nn.Linear(width, 1000, bias=False)


def noise(width: int) -> TensorDataset:
    """A regression so ill conditioned that it takes more iterations than the history has pairs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, width, generator=generator) * torch.logspace(-2, 0, 16)[:, None]
    return TensorDataset(inputs, torch.randn(16, 1000, generator=generator))


def memory(plan: Plan) -> Row:
    """Bytes of a shard beside span x (2 history + 5) words, what a bare process holds taken away."""

    def weigh(width: int) -> float:
        weigher = Weigher()
        with tempfile.TemporaryDirectory() as folder:
            job = db.Job(
                model=partial(broad, width), data=partial(noise, width), loss=nn.functional.mse_loss,
                algorithm=db.Sandblaster(history=HISTORY, max_iterations=HISTORY + 5, gtol=0.0, ftol=0.0),
                cluster=db.Cluster(replicas=1, device="cpu"), run=Path(folder) / "run",
            )  # fmt: skip
            db.train(job, view=False, listeners=[weigher])
        return weigher.bytes[-1]  # the history is full by then

    width = plan.parameters // 1000
    measured = weigh(width) - weigh(1)
    words = measured / (NUMBER_BYTES * plan.parameters)
    asked = 2 * HISTORY + 5
    reached = words <= 1.02 * asked
    print(
        f"\na shard of {plan.parameters:,} parameters holds {words:.2f} words for each; asked: 2 x {HISTORY} + 5 = "
        f"{asked}: {verdict(reached)}",
        flush=True,
    )
    return _row("words per parameter", "shard", Spread(words, words, words, words, 1), f"<= {asked}", reached, None)


def _name(replicas: int) -> str:
    return f"Sandblaster, {replicas} replica{'s' if replicas > 1 else ''}"


def _seconds(one: Measured) -> str:
    return f"{one.spread.median:.2f}" if one.spread else f"failed: {one.failure}"


def _scaled(spread: Spread, by: float) -> Spread:
    return Spread(spread.median * by, spread.mean * by, spread.low * by, spread.high * by, spread.count)


def _row(
    measure: str, method: str, value: Spread | None, asked: str | None, reached: bool | None, failure: str | None
) -> Row:
    return {
        "measure": measure, "method": method, "median": value.median if value else None,
        "low": value.low if value else None, "high": value.high if value else None,
        "rounds": value.count if value else 0, "asked": asked, "reached": reached, "failure": failure,
    }  # fmt: skip
