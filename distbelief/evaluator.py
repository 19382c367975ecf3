# SPDX-License-Identifier: Apache-2.0
"""The evaluator: measures the servers' parameters on held-out data while training goes on.

It fetches like a replica that never pushes, so training does not wait for it, and it uses the mean of the live
replicas' buffers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from distbelief.coordinator import Coordinator
from distbelief.data_shard import collect, to_device
from distbelief.engine.base import COORDINATOR, COORDINATOR_SECONDS, Home
from distbelief.model_replica import flat_buffers, load_buffers, load_parameters
from distbelief.parameter_server import ParameterServer
from distbelief.parameters import Layout

Metric = Callable[[Any, Any], torch.Tensor | float]
EVALUATION_BATCH = 1024
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Measures:
    """What to measure on the test set."""

    loss: Callable[[Any, Any], torch.Tensor] | None
    step: Callable[[nn.Module, Any], torch.Tensor] | None
    metrics: Mapping[str, Metric]
    evaluate: Callable[[nn.Module, Any], Mapping[str, float]] | None
    batch_size: int = EVALUATION_BATCH

    def measure(self, module: nn.Module, dataset: Any, device: torch.device) -> tuple[float | None, dict[str, float]]:
        """(mean loss, metrics) over the data set, weighted by examples; the module is in eval mode meanwhile."""
        module.eval()
        with torch.no_grad():
            if self.evaluate is not None:
                return None, {name: float(value) for name, value in self.evaluate(module, dataset).items()}
            sums: dict[str, float] = dict.fromkeys(self.metrics, 0.0)
            loss_sum = 0.0
            for start in range(0, len(dataset), self.batch_size):
                indices = torch.arange(start, min(start + self.batch_size, len(dataset)))
                batch = to_device(collect(dataset, indices), device)
                if self.step is not None:
                    loss_sum += float(self.step(module, batch)) * len(indices)
                if self.step is None or self.metrics:
                    output, target = module(batch[0]), batch[1]
                    if self.step is None and self.loss is not None:
                        loss_sum += float(self.loss(output, target)) * len(indices)
                    for name, metric in self.metrics.items():
                        sums[name] += float(metric(output, target)) * len(indices)
            return loss_sum / len(dataset), {name: value / len(dataset) for name, value in sums.items()}


@final
class Evaluator:
    """The role: asks the coordinator when to evaluate, and tells it what it measured."""

    def __init__(
        self, home: Home, module: nn.Module, layout: Layout, server: ParameterServer, dataset: Any, measures: Measures
    ) -> None:
        self._home, self._module, self._layout, self._server = home, module, layout, server
        self._dataset, self._measures = dataset, measures
        self._coordinator = home.find(COORDINATOR, Coordinator, COORDINATOR_SECONDS)
        self._parameters = home.allocate(layout.length, layout.dtype)

    def run(self) -> None:
        """Evaluate whenever it is due, until there is nothing more to evaluate."""
        device = next(self._module.parameters()).device
        while True:
            examples, last = self._coordinator.call(Coordinator.next_evaluation).result()
            if examples is None:
                if last:
                    return
                self._home.sleep(POLL_SECONDS)
                continue
            started = self._home.now()
            self._server.fetch(self._parameters).result()
            load_parameters(self._module, self._layout, self._parameters)
            buffers = flat_buffers(self._module)
            if len(buffers):
                self._coordinator.call(Coordinator.mean_buffers, buffers).result()
                load_buffers(self._module, buffers)
            loss, metrics = self._measures.measure(self._module, self._dataset, device)
            seconds = self._home.now() - started
            self._coordinator.call(Coordinator.evaluated, examples, loss, metrics, seconds).result()
