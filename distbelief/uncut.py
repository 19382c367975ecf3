# SPDX-License-Identifier: Apache-2.0
"""The model as the user's process has it: whole, or, where no process may hold it whole, on the meta device."""

from pathlib import Path
from typing import final

from torch import nn

from distbelief.buffers import flat_buffers, load_buffers
from distbelief.coordinator import Coordinator
from distbelief.draws import draws_kept
from distbelief.engine.base import Engine
from distbelief.errors import CheckpointError
from distbelief.export import Values, state_dict
from distbelief.job import Facts, Job
from distbelief.model_partition import initial_buffers
from distbelief.model_replica import build, load_parameters
from distbelief.parameter_server import ParameterServer
from distbelief.parameters import Span
from distbelief.partition.materialise import record


@final
class Uncut:
    """The user's model: its structure, its initial buffers, and what became of it."""

    def __init__(self, job: Job, facts: Facts) -> None:
        self._job, self._facts = job, facts
        self.values: Values | None = None
        """Gives single tensors of a model on the meta device."""
        if job.cluster.plan.partitions == 1:
            self.module, _ = build(job.model, job.seed, job.grouping, facts.layout)
            self.buffers = [flat_buffers(dict(self.module.named_buffers()))]
        else:
            recorded = record(job.model, job.seed)
            self.module, self.values = recorded.module, recorded.values
            self.buffers = initial_buffers(recorded, facts.buffers)

    def load(self, engine: Engine, coordinator: Coordinator, spans: list[Span]) -> None:
        """Take what was trained into the module, if it is here."""
        if self.values is None:
            flat = engine.allocate(self._facts.layout.length, self._facts.layout.dtype)
            coordinator.wait(ParameterServer(engine, spans, Span(0, len(flat))).read(flat))
            load_parameters(dict(self.module.named_parameters()), self._facts.layout, flat)
            load_buffers(dict(self.module.named_buffers()), coordinator.buffers()[0])

    def trained(self, run: Path, *, kept: bool) -> nn.Module:
        """The trained module; one that was in parts is put together from the last checkpoint, if that was `kept`.

        Raises CheckpointError.
        """
        if self.values is None:
            return self.module
        if not kept:
            raise CheckpointError(
                f"the last checkpoint of {run} could not be written, and a model in partitions is put together from "
                f"it\nhint: make room, and go on with distbelief.train(job, resume={str(run)!r})"
            )
        with draws_kept():
            module = self._job.model()
        module.load_state_dict(state_dict(run))
        return module
