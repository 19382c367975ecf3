# SPDX-License-Identifier: Apache-2.0
"""The part of a model that one process of a replica runs (paper, section 3).

    layers      0 | 0 | 0 0 | 1        units: each layer cut, only the states that cross a boundary travel
                1 | 1 | 1 1 | 1        stages: consecutive layers, micro-batches in a pipeline

`units` plans a model cut by units; its Blueprint says who owns what and makes the share that a partition runs.
"""
