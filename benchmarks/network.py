# SPDX-License-Identifier: Apache-2.0
"""Between hosts: how fast the channel carries parameters, and what slow links cost a job.

Hosts are network namespaces of this machine (tests/hosts.py). They share its cores, and a link costs what the kernel's
copying costs; a shaped link has the rate of a real one.
"""

from benchmarks import network_training, network_transfer
from benchmarks.table import Row
from tests.hosts import Hosts


def run(data: str | None, quick: bool) -> list[Row]:
    """Measure, print the tables, return a row per method. Without recordings at `data` no speech is learned.

    Quick: parameters are carried, and no jobs are run.
    """
    if reason := Hosts.missing():
        raise SystemExit(reason)
    rows = network_transfer.measure(quick)
    if quick:
        print("\nquick: nothing is trained over slow links")
        return rows
    rows += network_training.one_slow_link()
    if data is None:
        print("\nwithout --data PATH of the recordings: no comparison with DistributedDataParallel")
        return rows
    return rows + network_training.speech(data)
