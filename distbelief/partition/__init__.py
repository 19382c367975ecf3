# SPDX-License-Identifier: Apache-2.0
"""The part of a model that one process of a replica runs (paper, section 3).

    layers      0 | 0 | 0 0 | 1        units: each layer cut, only the states that cross a boundary travel
                1 | 1 | 1 1 | 1        stages: consecutive layers, micro-batches in a pipeline

units         plans a model cut by units; its Blueprint makes the share that a partition runs
walk          the calls of a forward pass, each by its rule, to steps
site          what a rule is asked, and what it answers
rules         a rule for each kind of layer
box, division boxes of units, and who holds which
flow          what travels between steps
exchange      states that cross a boundary, forward and back
share         what one partition computes

stages        plans a model cut into stages
stage_cuts    where they begin
forward_pass  the forward pass as a row of steps
pipeline      the stages at work, on micro-batches
staging       their group where they share an accelerator

tracer, trace the calls of a forward pass, followed without computing them
balance       the work of each call, and a fair cut of it
footprint     what a partition holds in memory
tape, materialise  initial values of a model that no process holds whole
group         the partitions of one replica, as one of them sees them
"""
