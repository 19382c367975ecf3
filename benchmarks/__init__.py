# SPDX-License-Identifier: Apache-2.0
"""Measurements of distbelief beside the floor that physics sets and beside other ways to do the same work.

    python -m benchmarks push_fetch|throughput|accuracy|memory|partition|figure_3 [--json FILE] [--quick]

Files named `*_peers.py` hold what we compare with, files named `*_product.py` hold distbelief's own rows.
"""
