# SPDX-License-Identifier: Apache-2.0
"""Push + fetch between two hosts, over an open link and over shaped ones, beside a bare socket and Ray."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import network_peers
from benchmarks.processes import Companion
from benchmarks.table import Measured, Row, Spread, duration, interleave, ratio, spread, table_text, verdict
from tests.hosts import Hosts

OPEN_PARAMETERS = 42_000_000
BARE, PRODUCT, ECHO, RAY = "bare socket", "distbelief", "distbelief, no optimizer", "ray"
BARE_TARGET, RAY_TARGET = 0.8, 3.0
LINE_TARGET = 0.95
SHAPED = {100e6: 2_500_000, 1e9: 25_000_000}
"""Bits per second -> parameters: a push and a fetch take some two seconds."""
SEGMENT_BYTES, HEADER_BYTES = 1448, 66
"""Of TCP with time stamps on Ethernet: what a line carries of data, and what beside it."""

Methods = dict[str, Callable[[int, int], float]]


@dataclass(frozen=True)
class Comparison:
    """All methods over one link; `bits_per_second` is None for an open one."""

    bits_per_second: float | None
    parameters: int
    measured: dict[str, Measured]

    def of(self, name: str, to: str) -> Spread | None:
        """How many times as fast `name` is as `to`."""
        return ratio(self.measured[to], self.measured[name])

    def payload(self, name: str) -> Spread | None:
        """The share of the line rate that parameters and gradients take, while they travel in one direction."""
        one = self.measured[name]
        if self.bits_per_second is None or one.failure:
            return None
        return spread([2 * 32 * self.parameters / seconds / self.bits_per_second for seconds in one.samples])

    def line(self, name: str) -> Spread | None:
        """The share of the line rate that is used, with the headers of TCP, IP and Ethernet."""
        payload, whole = self.payload(name), 1 + HEADER_BYTES / SEGMENT_BYTES
        if payload is None:
            return None
        return Spread(
            payload.median * whole, payload.mean * whole, payload.low * whole, payload.high * whole, payload.count
        )


def measure(quick: bool) -> list[Row]:
    """Measure every link, print the tables, return a row per link and method."""
    with methods(OPEN_PARAMETERS, None, with_ray=True) as found:
        calls, rounds = (1, 3) if quick else (2, 15)
        asked = {name: partial(method, OPEN_PARAMETERS, calls) for name, method in found.items()}
        comparisons = [Comparison(None, OPEN_PARAMETERS, interleave(asked, rounds))]
    print(_open_table(comparisons[0]), flush=True)
    for rate, parameters in list(SHAPED.items())[: 1 if quick else None]:
        with methods(parameters, rate, with_ray=False) as found:
            asked = {name: partial(method, parameters, 1) for name, method in found.items()}
            comparisons.append(Comparison(rate, parameters, interleave(asked, 1 if quick else 5)))
    print(_shaped_table(comparisons[1:]), flush=True)
    return [row for comparison in comparisons for row in _rows(comparison)]


@contextmanager
def methods(parameters: int, bits_per_second: float | None, *, with_ray: bool) -> Iterator[Methods]:
    """Every way between two fresh hosts, each with a side in either."""
    with ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        hosts = opened.enter_context(Hosts(2))  # whose processes end before their folder does
        if bits_per_second is not None:
            hosts.shape(0, bits_per_second)
        near, far = hosts.addresses

        def companion(host: int, *arguments: object, **options: object) -> Companion:
            made = Companion(*arguments, pauses=False, entering=hosts.entering(host), **options)  # type: ignore[arg-type]
            return opened.enter_context(made)

        token = secrets.token_hex(32)
        serving = [
            companion(1, network_peers.bare_far, address=far),
            companion(1, network_peers.product_far, address=far, parameters=parameters),
        ]
        if with_ray:
            # Both directions of several rounds: Ray frees objects late.
            settings = dict(os.environ) | network_peers.ray_settings(token)
            hosts.start_ray(Path(folder), cpus=2, store_bytes=max(80 << 20, 16 * 4 * parameters), env=settings)
        for one in serving:
            one.wait_until_ready()
        calling = {
            BARE: companion(0, network_peers.bare_near, address=far),
            PRODUCT: companion(0, network_peers.product_near, address=near, far=far, parameters=parameters),
            ECHO: companion(0, network_peers.echo_near, address=near, far=far, parameters=parameters),
        }
        if with_ray:
            calling[RAY] = companion(0, network_peers.ray_near, address=near, port=hosts.RAY_PORT, token=token)
        yield {name: one.ask for name, one in calling.items()}


def _open_table(comparison: Comparison) -> str:
    header = ["method", "median", "range", "GB/s each way", f"speed to {BARE}", f"speed to {RAY}", "asked", "reached"]
    lines = []
    for name, one in comparison.measured.items():
        times = one.spread
        lines.append(
            [
                name,
                duration(times.median) if times else "failed",
                f"{duration(times.low)}..{duration(times.high)}" if times else "-",
                f"{8 * comparison.parameters / times.median / 1e9:.2f}" if times else "-",
                str(comparison.of(name, BARE) or "-"),
                str(comparison.of(name, RAY) or "-"),
                f">= {BARE_TARGET:g} and >= {RAY_TARGET:g}" if name == PRODUCT else "-",
                verdict(_reached(comparison, name)),
            ]
        )
    title = f"push + fetch of {comparison.parameters:,} parameters between two hosts, open link"
    return "\n".join([table_text(title, header, lines), *_failures(comparison)])


def _shaped_table(comparisons: list[Comparison]) -> str:
    header = [
        "line",
        "parameters",
        "method",
        "median",
        "of the line",
        "of the line, headers counted",
        "asked",
        "reached",
    ]
    lines = []
    for comparison in comparisons:
        for name, one in comparison.measured.items():
            times = one.spread
            lines.append(
                [
                    f"{(comparison.bits_per_second or 0) / 1e6:,.0f} Mbit/s",
                    f"{comparison.parameters:,}",
                    name,
                    f"{times.median:.3f} s" if times else "failed",
                    _percent(comparison.payload(name)),
                    _percent(comparison.line(name)),
                    f">= {LINE_TARGET:.0%}" if name == PRODUCT else "-",
                    verdict(_reached(comparison, name)),
                ]
            )
    title = "push, then fetch, over shaped links"
    return "\n".join([table_text(title, header, lines), *(line for one in comparisons for line in _failures(one))])


def _percent(share: Spread | None) -> str:
    return f"{share.median:.1%} ({share.low:.1%}..{share.high:.1%})" if share else "-"


def _failures(comparison: Comparison) -> list[str]:
    return [f"{name}: failed: {one.failure}" for name, one in comparison.measured.items() if one.failure]


def _reached(comparison: Comparison, name: str) -> bool | None:
    if name != PRODUCT:
        return None
    if comparison.bits_per_second is not None:
        line = comparison.line(name)
        return line is not None and line.median >= LINE_TARGET
    bare, ray = comparison.of(name, BARE), comparison.of(name, RAY)
    return None not in (bare, ray) and bare.median >= BARE_TARGET and ray.median >= RAY_TARGET  # type: ignore[union-attr]


def _rows(comparison: Comparison) -> list[Row]:
    rows: list[Row] = []
    for name, one in comparison.measured.items():
        times, payload, line = one.spread, comparison.payload(name), comparison.line(name)
        to = {other: comparison.of(name, other) for other in (BARE, RAY) if other in comparison.measured}
        rows.append(
            {
                "measured": "push + fetch",
                "bits_per_second": comparison.bits_per_second,
                "parameters": comparison.parameters,
                "method": name,
                "median_seconds": times.median if times else None,
                "low_seconds": times.low if times else None,
                "high_seconds": times.high if times else None,
                "repetitions": times.count if times else 0,
                **{f"speed to {other}": speed.median if speed else None for other, speed in to.items()},
                "share_of_line_rate": payload.median if payload else None,
                "share_of_line_rate_with_headers": line.median if line else None,
                "reached": _reached(comparison, name),
                "failure": one.failure,
            }
        )
    return rows
