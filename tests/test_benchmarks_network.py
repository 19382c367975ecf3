# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmark between hosts, and that every way it compares carries something."""

import pytest

from benchmarks import network_peers, network_training, network_transfer
from benchmarks.network_transfer import BARE, ECHO, PRODUCT, Comparison
from benchmarks.processes import Companion
from benchmarks.table import Measured
from tests.hosts import Hosts


def test_the_share_of_a_line_counts_both_ways_and_once_with_the_headers() -> None:
    # 1,250,000 numbers are 40 Mbit; there and back at 100 Mbit/s take 0.8 s when nothing else is on the line.
    comparison = Comparison(100e6, 1_250_000, {PRODUCT: Measured((1.0, 0.8, 1.6))})
    payload, line = comparison.payload(PRODUCT), comparison.line(PRODUCT)
    assert payload is not None
    assert line is not None
    assert [payload.low, payload.median, payload.high] == pytest.approx([0.5, 0.8, 1.0])
    assert line.median == pytest.approx(0.8 * 1514 / 1448)
    assert Comparison(None, 1, {PRODUCT: Measured((1.0,))}).line(PRODUCT) is None


@pytest.mark.parametrize(
    ("mini_batch_seconds", "chosen"),
    # A million numbers are 32 Mbit: 3.2 s there and back at 20 Mbit/s, which four times n_push mini-batches must hide.
    [(1.0, (1, "float32")), (0.1, (8, "float32")), (0.05, (16, "float32")), (0.04, (16, "bfloat16"))],
)
def test_a_link_is_hidden_by_the_least_n_push_and_numbers_are_narrowed_only_when_it_gets_large(
    mini_batch_seconds: float, chosen: tuple[int, str]
) -> None:
    assert network_training.hiding(1_000_000, mini_batch_seconds, 20e6) == chosen


def test_where_links_are_scarce_computing_takes_about_a_sixth_of_an_exchange() -> None:
    assert network_training.exchanging(1_000_000, 0.32 / 6 / 8, 100e6) == (8, "bfloat16")
    assert network_training.exchanging(1_000_000, 10.0, 100e6) == (1, "bfloat16")


@pytest.mark.slow
def test_the_product_and_the_bare_socket_carry_parameters_between_hosts() -> None:
    if reason := Hosts.missing():
        pytest.skip(reason)
    with network_transfer.methods(10_000, 1e9, with_ray=False) as methods:
        assert methods.keys() == {BARE, PRODUCT, ECHO}
        for measure in methods.values():
            assert 0 < measure(10_000, 2) < 1


@pytest.mark.slow
def test_data_parallel_takes_steps_between_hosts_with_either_kind_of_numbers() -> None:
    if reason := Hosts.missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        members = [
            Companion(
                network_peers.data_parallel, pauses=False, entering=hosts.entering(host), head=hosts.addresses[0],
                rank=host, hosts=2,
            )
            for host in (0, 1)
        ]  # fmt: skip
        try:
            assert all(0 < members[0].ask(8, 2, hook) < 5 for hook in network_training.HOOKS)
        finally:
            for member in members:
                member.close()
