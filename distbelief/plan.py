# SPDX-License-Identifier: Apache-2.0
"""How a user asks for a model to be cut over the partitions of a replica (paper, section 3).

    Cluster(partitions=4)                                                             automatic
    Cluster(partitions=Plan.units(4, {"conv1": grid(2, 2), "fc6": rows(), "fc8": on(3)}))
    Cluster(partitions=Plan.stages(4, microbatches=8))

grid(2, 2)      tiles of the plane          |-----|-----|
rows()          output units                |  0  |  1  |
channels()      channels, whole planes      |-----|-----|
on(3)           the whole layer on one      |  2  |  3  |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distbelief.errors import ConfigurationError

CutName = Literal["grid", "rows", "channels", "on"]
PlanName = Literal["automatic", "units", "stages"]


@dataclass(frozen=True)
class Cut:
    """How one layer is divided among the partitions of a replica; made by `grid`, `rows`, `channels`, `on`."""

    kind: CutName
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.numbers))})"


def grid(rows: int, columns: int) -> Cut:
    """Cut the plane into tiles, `rows` times `columns` of them, one for each partition, row by row."""
    return Cut("grid", (rows, columns))


def rows() -> Cut:
    """Cut the output units (rows of a linear layer's weight, columns of an embedding, heads of an attention)."""
    return Cut("rows")


def channels() -> Cut:
    """Cut the channels; a grouped convolution between its groups."""
    return Cut("channels")


def on(partition: int) -> Cut:
    """Leave the layer whole, on one partition."""
    return Cut("on", (partition,))


@dataclass(frozen=True)
class Plan:
    """How many processes one model replica spans, and how the model is cut over them."""

    partitions: int
    kind: PlanName = "automatic"
    """`automatic`: by units where every layer with parameters has a rule, else in stages."""
    layers: tuple[tuple[str, Cut], ...] = ()
    """Units: name of a layer -> its cut; layers without one are cut automatically."""
    starts: tuple[str, ...] = ()
    """Stages: the module that each begins with, or the modules that each consists of; none to balance them."""
    microbatches: int | None = None
    """Stages: equal parts of a mini-batch that follow each other through the stages; None for four per stage."""

    def __post_init__(self) -> None:
        if self.partitions < 1:
            raise ConfigurationError(
                f"a replica cannot span {self.partitions} partitions", hint="use 1 or more; 1 leaves the model whole"
            )
        if self.microbatches is not None and self.microbatches < 1:
            raise ConfigurationError(
                f"Plan.stages(microbatches={self.microbatches}) leaves nothing to compute", hint="use 1 or more"
            )

    @classmethod
    def units(cls, partitions: int, layers: Mapping[str, Cut] | None = None) -> "Plan":
        """The paper's way: the units of each layer are cut among the partitions."""
        return cls(partitions, "units", tuple((layers or {}).items()))

    @classmethod
    def stages(cls, stages: int | Sequence[str], microbatches: int | None = None) -> "Plan":
        """Runs of consecutive layers: so many, balanced; or named, as ["features", "layers.3", "head"]."""
        if isinstance(stages, int):
            return cls(stages, "stages", microbatches=microbatches)
        return cls(len(stages), "stages", starts=tuple(stages), microbatches=microbatches)
