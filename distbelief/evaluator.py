# SPDX-License-Identifier: Apache-2.0
"""The evaluator: measures the servers' parameters on held-out data while training goes on.

It fetches like a replica that never pushes, so training does not wait for it, and it uses the mean of the live
replicas' buffers. Where replicas span several processes, the evaluator does: nobody gathers the model. One of its
partitions asks, measures and tells; when it calls the model, the others compute their parts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import msgspec
import torch
from torch import nn

from distbelief.beginning import take_mean_buffers
from distbelief.channel.frames import DTYPES, NAMES
from distbelief.coordinator import Coordinator
from distbelief.data_shard import collect, pair, size_of, to_device
from distbelief.engine.base import COORDINATOR, UNTIL_LOST_SECONDS, Home
from distbelief.errors import ConfigurationError
from distbelief.model_replica import Part, load_parameters, scalar
from distbelief.parameter_server import ParameterServer
from distbelief.parameters import Layout
from distbelief.partition.group import Group

Metric = Callable[[Any, Any], torch.Tensor | float]
Evaluation = Callable[[nn.Module, Any], Mapping[str, torch.Tensor | float]]
EVALUATION_BATCH = 1024
EVALUATION_BYTES = 1 << 26
"""A mini-batch and its output that take more than this are not made larger than those that are trained on."""
POLL_SECONDS = 0.1
INSTEAD = "evaluate=(model, test set) -> metrics"


@dataclass(frozen=True)
class Measures:
    """What to measure on the test set."""

    loss: Callable[[Any, Any], torch.Tensor] | None
    step: Callable[[nn.Module, Any], torch.Tensor] | None
    metrics: Mapping[str, Metric]
    evaluate: Evaluation | None
    batch_size: int
    """Examples of a mini-batch, at the least."""
    largest: int
    """Examples of a mini-batch, as far as they are small."""

    def measure(self, module: nn.Module, dataset: Any, device: torch.device) -> tuple[float | None, dict[str, float]]:
        """(mean loss, metrics) over the data set, weighted by examples; the module is in eval mode meanwhile."""
        module.eval()
        with torch.no_grad():
            if self.evaluate is not None:
                return None, _numbers(self.evaluate(module, dataset))
            sums: dict[str, float] = dict.fromkeys(self.metrics, 0.0)
            loss_sum, size = 0.0, self._at_once(module, dataset, device)
            for start in range(0, len(dataset), size):
                indices = torch.arange(start, min(start + size, len(dataset)))
                batch = to_device(collect(dataset, indices), device)
                if self.step is not None:
                    with torch.enable_grad():  # a step may differentiate, by its input or by parameters
                        loss_sum += float(scalar(self.step(module, batch)).detach()) * len(indices)
                if self.step is None or self.metrics:
                    inputs, target = pair(batch) if self.step is None else pair(batch, "metrics", INSTEAD, more=True)
                    output = module(inputs)
                    if self.step is None and self.loss is not None:
                        loss_sum += float(self.loss(output, target)) * len(indices)
                    for name, metric in self.metrics.items():
                        sums[name] += _number(name, metric(output, target)) * len(indices)
            return loss_sum / len(dataset), {name: value / len(dataset) for name, value in sums.items()}

    def _at_once(self, module: nn.Module, dataset: Any, device: torch.device) -> int:
        """Examples of a mini-batch; how large they and their outputs are, a small one tells."""
        if min(self.largest, len(dataset)) <= self.batch_size:
            return self.batch_size
        batch = to_device(collect(dataset, torch.arange(self.batch_size)), device)
        output = module(pair(batch)[0]) if self.step is None else None
        fitting = EVALUATION_BYTES * self.batch_size // max(1, size_of(batch) + size_of(output))
        return max(self.batch_size, min(self.largest, fitting))


def _numbers(found: Any) -> dict[str, float]:
    """What the user's evaluation returned. Raises ConfigurationError."""
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"Job(evaluate=...) returned a {type(found).__name__}", hint='return metrics, such as {"accuracy": 0.9}'
        )
    return {name: _number(name, value) for name, value in found.items()}


def _number(name: str, value: Any) -> float:
    """What a metric returned, if it is one number. Raises ConfigurationError."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigurationError(
            f"the metric {name} is {shape}, not a number", hint="return the mean over the mini-batch, such as x.mean()"
        ) from error


class Next(msgspec.Struct, array_like=True, frozen=True):
    """What the model is called with next: a tensor of this dtype and shape; nothing, without a dtype."""

    dtype: str = ""
    shape: tuple[int, ...] = ()


@final
class Led(nn.Module):
    """A model of several partitions as the one calls it on which its output comes out; the others follow."""

    def __init__(self, share: nn.Module, group: Group) -> None:
        super().__init__()
        self.share, self._group = share, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output; `x` is told to the others."""
        if not isinstance(x, torch.Tensor) or x.dtype not in NAMES:
            raise ConfigurationError(
                f"the model was called with {getattr(x, 'dtype', type(x).__name__)} during the evaluation",
                hint=f"call a partitioned model with one tensor of {', '.join(NAMES.values())}",
            )
        self._group.tell(Next, Next(NAMES[x.dtype], tuple(x.shape)))
        self._group.share(x.contiguous())
        output: torch.Tensor = self.share(x)
        return output

    def over(self) -> None:
        """Let the others go."""
        self._group.tell(Next, Next())


def follow(share: nn.Module, group: Group) -> None:
    """Compute this partition's part whenever the leading one calls the model, until it is over."""
    while (asked := group.tell(Next, None)).dtype:
        share(group.share(torch.empty(asked.shape, dtype=DTYPES[asked.dtype], device=group.device)))


@final
class Evaluator:
    """The role: asks the coordinator when to evaluate, and tells it what it measured."""

    def __init__(
        self, home: Home, part: Part, layout: Layout, server: ParameterServer, group: Group, dataset: Any,
        measures: Measures,
    ) -> None:  # fmt: skip
        self._home, self._part, self._layout, self._server, self._group = home, part, layout, server, group
        self._dataset, self._measures = dataset, measures
        self._coordinator = home.find(COORDINATOR, Coordinator, UNTIL_LOST_SECONDS)
        self._parameters = home.allocate(layout.length, layout.dtype)

    def run(self) -> None:
        """Evaluate whenever it is due, until there is nothing more to evaluate."""
        while True:
            examples, last = self._due()
            if examples is None:
                if last:
                    return
                self._home.sleep(POLL_SECONDS)
                continue
            started = self._home.now()
            self._server.read(self._parameters).result()
            load_parameters(self._part.parameters, self._layout, self._parameters)
            take_mean_buffers(self._coordinator, self._group.index, self._part.buffers)
            if not self._group.leads:
                with torch.no_grad():
                    follow(self._part.module.eval(), self._group)
                continue
            loss, metrics = self._measure()
            seconds = self._home.now() - started
            self._coordinator.call(Coordinator.evaluated, examples, loss, metrics, seconds).result()

    def _due(self) -> tuple[int | None, bool]:
        """What the coordinator answers, told to all partitions."""
        asks = self._group.leads
        answer = self._coordinator.call(Coordinator.next_evaluation).result() if asks else None
        return self._group.tell(tuple[int | None, bool], answer)

    def _measure(self) -> tuple[float | None, dict[str, float]]:
        if self._group.size == 1:
            return self._measures.measure(self._part.module, self._dataset, self._group.device)
        model = Led(self._part.module, self._group)
        measured = self._measures.measure(model, self._dataset, self._group.device)
        model.over()
        return measured
