# SPDX-License-Identifier: Apache-2.0
"""Push + fetch of n parameters through two processes, beside the floor and beside other ways to do it.

The floor is one fused Adagrad pass and one memcpy over n in one process: less cannot be done. TCP has a floor of its
own, a bare socket that carries n floats each way between two cores, as a replica and a shard have them.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import push_fetch_peers, push_fetch_product
from benchmarks.processes import Companion, CompanionFailed, timed
from benchmarks.table import Beside, Measured, Row, Spread, duration, interleave, ratio, spread, table_text, verdict

SIZES = (1_000, 100_000, 1_000_000, 10_000_000, 42_000_000)
QUICK_SIZES = (1_000, 1_000_000, 10_000_000)
RATIO_TARGETS = {1_000_000: 1.6, 10_000_000: 1.15, 42_000_000: 1.15}
SECONDS_TARGETS = {1_000: 250e-6}
TCP_RATIO_TARGET = 1.3

FLOOR, PRODUCT, PRODUCT_TCP = "floor", "distbelief", "distbelief tcp"
PRODUCT_ASLEEP = "distbelief, cores shared"
"""As in jobs of more processes than cores, where nobody looks before he sleeps."""
BARE_SOCKET, ECHO_TCP = "bare socket, a core each", "distbelief tcp, no optimizer"
BARE_ANYWHERE = "bare socket, anywhere"
RPC, RAY, GLOO = "torch rpc", "ray", "gloo"


class Peer:
    """A baseline in a companion, which is started again after it failed."""

    def __init__(self, start: Callable[[], Companion]) -> None:
        """Start the companion at once, so that all of them start side by side."""
        self._start = start
        self._companion: Companion | None = start()

    def wait_until_ready(self) -> None:
        """Wait for the companion, but leave a failure to the first measurement."""
        if self._companion is not None:
            with suppress(CompanionFailed):
                self._companion.wait_until_ready()

    def measure(self, parameters: int, calls: int) -> float:
        """Seconds per push+fetch. Raises CompanionFailed."""
        self._companion = self._companion or self._start()
        try:
            return self._companion.ask(parameters, calls)
        except CompanionFailed:
            self.close()
            raise

    def close(self) -> None:
        """End the companion."""
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.close()


@dataclass(frozen=True)
class Comparison:
    """All methods at one number of parameters."""

    parameters: int
    measured: dict[str, Measured]
    ratios: dict[str, Spread]
    """Of the methods timed beside what they are compared with."""

    def verdict(self, method: str) -> "Verdict":
        """`method` against the floor it belongs to."""
        is_echo = method == ECHO_TCP
        measured = self.measured[method]
        above = None if measured.failure else self.ratios.get(method) or ratio(measured, self.measured[FLOOR])
        target = TCP_RATIO_TARGET if is_echo else RATIO_TARGETS.get(self.parameters) if method == PRODUCT else None
        seconds = SECONDS_TARGETS.get(self.parameters) if method == PRODUCT else None
        if target is not None:
            return Verdict(above, f"<= {target:g}", above is not None and above.median <= target)
        if seconds is not None:
            times = measured.spread
            return Verdict(above, f"<= {duration(seconds)}", times is not None and times.median <= seconds)
        return Verdict(above, None, None)


@dataclass(frozen=True)
class Verdict:
    """A ratio to the floor, what it (or the time) should be, and whether it is."""

    ratio: Spread | None
    target: str | None
    reached: bool | None

    def cells(self) -> list[str]:
        """As three cells of a table."""
        return [str(self.ratio) if self.ratio else "-", self.target or "-", verdict(self.reached)]


def run(quick: bool, sizes: tuple[int, ...] = ()) -> list[Row]:
    """Measure every size, print the tables, return a row per size and method."""
    sizes = sizes or (QUICK_SIZES if quick else SIZES)
    torch.set_num_threads(1)
    # Both directions of several rounds: Ray frees objects late.
    store_bytes = max(200_000_000, 64 * max(sizes))
    comparisons = []
    with ExitStack() as opened:
        peers = {
            RPC: Peer(lambda: Companion(push_fetch_peers.rpc)),
            RAY: Peer(lambda: Companion(push_fetch_peers.ray, pauses=False, object_store_bytes=store_bytes)),
            GLOO: Peer(lambda: Companion(push_fetch_peers.gloo)),
            BARE_SOCKET: Peer(lambda: Companion(push_fetch_peers.bare_socket)),
            BARE_ANYWHERE: Peer(lambda: Companion(push_fetch_peers.bare_socket, anywhere=True)),
        }
        for peer in peers.values():
            opened.callback(peer.close)
        for peer in peers.values():
            peer.wait_until_ready()
        for parameters in sizes:
            comparisons.append(compare(parameters, peers, quick))
            print(f"measured {parameters:,} parameters", flush=True)
    print(_tables(comparisons))
    return [row for comparison in comparisons for row in _rows(comparison)]


def compare(parameters: int, peers: Mapping[str, Peer], quick: bool) -> Comparison:
    """Time all methods at `parameters` side by side: every one of them once in each round."""
    calls = max(1, min(300 if quick else 1000, 30_000_000 // parameters))
    rounds = 4 if quick else 31 if parameters <= 1_000_000 else 15
    product, echo = push_fetch_product.product, push_fetch_product.echo
    with ExitStack() as opened:
        call_floor = push_fetch_peers.Floor(parameters)

        def floor() -> float:
            return timed(call_floor, calls)

        def bare_socket() -> float:
            return peers[BARE_SOCKET].measure(parameters, calls)

        beside = {
            PRODUCT: Beside(_opened(opened, lambda: product(parameters, "shared_memory"), calls), floor),
            PRODUCT_ASLEEP: Beside(
                _opened(opened, lambda: product(parameters, "shared_memory", own_cores=False), calls), floor
            ),
            PRODUCT_TCP: Beside(_opened(opened, lambda: product(parameters, "tcp"), calls), floor),
            ECHO_TCP: Beside(_opened(opened, lambda: echo(parameters, "tcp"), calls), bare_socket),
        }
        measures = {name: partial(peer.measure, parameters, calls) for name, peer in peers.items()}
        ours: dict[str, Callable[[], float]] = {FLOOR: floor, **beside}
        # The peers would take most of a quick run; they sit out its later rounds.
        together = 2 if quick else rounds
        measured = interleave({**ours, **measures}, together)
        if together < rounds:
            working = {name: method for name, method in ours.items() if not measured[name].failure}
            later = interleave(working, rounds - together)
            measured |= {name: measured[name].then(later[name]) for name in working}
        return Comparison(
            parameters, measured, {name: spread(one.ratios) for name, one in beside.items() if one.ratios}
        )


def _opened(
    stack: ExitStack, method: Callable[[], AbstractContextManager[push_fetch_product.Measure]], calls: int
) -> Callable[[], float]:
    """Enter `method` now; where that fails, its measurement fails instead of the benchmark."""
    try:
        measure = stack.enter_context(method())
    except Exception as error:
        return lambda failure=error: _raise(failure)  # type: ignore[misc]
    return lambda: measure(calls)


def _raise(error: Exception) -> float:
    raise error


def _tables(comparisons: list[Comparison]) -> str:
    names = [FLOOR, PRODUCT, PRODUCT_ASLEEP, PRODUCT_TCP, RPC, RAY, GLOO]
    header = ["parameters", *names, "distbelief / floor", "target", "reached"]
    lines = [
        [f"{one.parameters:,}", *(_time(one.measured[name]) for name in names), *one.verdict(PRODUCT).cells()]
        for one in comparisons
    ]
    text = table_text("push + fetch through two processes (median)", header, lines)
    names = [BARE_ANYWHERE, BARE_SOCKET, ECHO_TCP]
    header = ["parameters", *names, "ratio", "target", "reached"]
    lines = [
        [f"{one.parameters:,}", *(_time(one.measured[name]) for name in names), *one.verdict(ECHO_TCP).cells()]
        for one in comparisons
    ]
    text += "\n" + table_text("one tensor each way over TCP loopback (median)", header, lines)
    failed = [
        f"{name} at {one.parameters:,}: failed: {measured.failure}"
        for one in comparisons
        for name, measured in one.measured.items()
        if measured.failure
    ]
    return "\n".join([text, *([""] if failed else []), *failed])


def _time(measured: Measured) -> str:
    times = measured.spread
    return duration(times.median) if times else "failed"


def _rows(comparison: Comparison) -> list[Row]:
    rows: list[Row] = []
    for name, measured in comparison.measured.items():
        times, verdict = measured.spread, comparison.verdict(name)
        rows.append(
            {
                "parameters": comparison.parameters,
                "method": name,
                "median_seconds": times.median if times else None,
                "low_seconds": times.low if times else None,
                "high_seconds": times.high if times else None,
                "repetitions": times.count if times else 0,
                "ratio_to": BARE_SOCKET if name == ECHO_TCP else FLOOR,
                "ratio": verdict.ratio.median if verdict.ratio else None,
                "target": verdict.target,
                "reached": verdict.reached,
                "failure": measured.failure,
            }
        )
    return rows
