# SPDX-License-Identifier: Apache-2.0
"""How a role begins that computes with the model: with the buffers of those that live, and parameters on shards."""

from collections.abc import Mapping
from typing import Any

import torch

from distbelief.buffers import flat_buffers, load_buffers
from distbelief.channel.base import Remote
from distbelief.coordinator import Coordinator
from distbelief.engine.base import Home
from distbelief.parameter_server import ParameterServer

IDLE_SECONDS = 0.05


def take_mean_buffers(coordinator: Remote[Any], partition: int, buffers: Mapping[str, torch.Tensor]) -> None:
    """Fill `buffers`, those of one partition of the model, with the mean over the replicas at work."""
    values = flat_buffers(buffers)
    if len(values):
        coordinator.call(Coordinator.mean_buffers, partition, values).result()
        load_buffers(buffers, values)


def give_parameters(
    home: Home, coordinator: Remote[Any], replica: int, server: ParameterServer, parameters: torch.Tensor
) -> None:
    """Give the shards the initial parameters, shape (n,), for as long as they want them: nobody else holds them."""
    while coordinator.call(Coordinator.wants_parameters, replica).result():
        server.initialise(parameters).result()
        home.sleep(IDLE_SECONDS)
