# SPDX-License-Identifier: Apache-2.0
"""Figure 1 of the paper: a five-layer locally connected network on four machines.

Only the nodes with edges that cross a partition boundary have their state sent, and each of them once per machine.
"""

import itertools

import pytest
import torch
from law import check
from torch import nn

from distbelief.layers import LocallyConnected2d
from distbelief.partition.box import tiles
from distbelief.plan import grid

KERNELS = ((5, 1), (3, 1), (3, 2), (3, 1), (3, 1))
"""Kernel and stride of each layer."""

Place = tuple[int, int]


def figure_1() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels, plane = 3, (23, 23)
    for kernel, stride in KERNELS:
        layer = LocallyConnected2d(channels, 4, plane, kernel, stride, kernel // 2)
        layers += [layer, nn.Tanh()]
        channels, plane = 4, layer.out_plane
    return nn.Sequential(*layers)


def places(rows: tuple[int, int], columns: tuple[int, int]) -> set[Place]:
    return set(itertools.product(range(*rows), range(*columns)))


def counted_pairs(model: nn.Sequential, parts: tuple[int, int]) -> list[tuple[int, int]]:
    """States sent and received by each machine, by listing every unit that some unit of another machine has an edge to.

    The input is read by everybody, not sent; the output is gathered on the last machine.
    """
    machines = parts[0] * parts[1]
    layers = [layer for layer in model if isinstance(layer, LocallyConnected2d)]
    sent, received = [0] * machines, [0] * machines
    for below, layer in itertools.pairwise(layers):
        owned = [places(*box) for box in tiles(below.out_plane, parts) if box is not None]
        for machine, box in enumerate(tiles(layer.out_plane, parts)):
            assert box is not None
            edges = {
                (row * layer.stride[0] - layer.padding[0] + u, column * layer.stride[1] - layer.padding[1] + v)
                for row, column in places(*box)
                for u, v in places((0, layer.kernel_size[0]), (0, layer.kernel_size[1]))
            }
            for other in range(machines):
                if other != machine:
                    crossing = layer.in_channels * len(edges & owned[other])
                    sent[other], received[machine] = sent[other] + crossing, received[machine] + crossing
    for machine, box in enumerate(tiles(layers[-1].out_plane, parts)):
        assert box is not None
        if machine != machines - 1:
            output = layers[-1].out_channels * len(places(*box))
            sent[machine], received[-1] = sent[machine] + output, received[-1] + output
    return list(zip(sent, received, strict=True))


@pytest.mark.parametrize("parts", [(2, 2), (3, 3), (1, 3), (4, 1), (1, 1)])
def test_a_state_crosses_to_a_machine_once_however_many_edges_do(parts: tuple[int, int]) -> None:
    model = figure_1()
    cuts = {name: grid(*parts) for name, layer in model.named_modules() if isinstance(layer, LocallyConnected2d)}
    blueprint = check(model.double(), torch.randn(4, 3, 23, 23, dtype=torch.float64), parts[0] * parts[1], cuts)
    assert [(n.elements_out, n.elements_in) for n in blueprint.numbers] == counted_pairs(model, parts)


def test_the_four_machines_of_the_figure_talk_to_their_diagonal_neighbours_too() -> None:
    pairs = counted_pairs(figure_1(), (2, 2))
    halo = sum(sent for sent, _ in pairs) - 3 * 4 * 6 * 6
    assert halo == 988
