# SPDX-License-Identifier: Apache-2.0
"""Sandblaster for an objective of one's own: a sum over portions of data, without a module, a loss or targets.

It builds the job that a user of modules would write, so everything that is true of jobs is true here.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from distbelief.cluster import Cluster
from distbelief.data_shard import kind
from distbelief.errors import ConfigurationError
from distbelief.events import JobFinished, Observation
from distbelief.job import Job
from distbelief.launch import Launch
from distbelief.model_replica import scalar
from distbelief.parameters import Groups
from distbelief.sandblaster import Sandblaster
from distbelief.train import train

ONE = "x"
"""The name of the parameter where there is one only."""
WORDS = "the function returned", "return the sum over the examples of the portion, for example losses.sum()"


@dataclass(frozen=True)
class Minimum:
    """What `minimize` found."""

    parameters: Any
    """As they were given: a tensor, or a dict of tensors; new ones, on the CPU."""
    value: float
    """Of the sum over all data, penalties included; NaN where it ended before that was known. With `batch` it is what
    the last batch says of it: the mean over that, times the number of examples; `gradient_norm` likewise."""
    gradient_norm: float
    """The largest entry of its gradient there, as penalties and bounds reduce it; NaN likewise."""
    converged: bool
    reason: str
    """Why it stopped, as a sentence."""
    iterations: int
    evaluations: int


def point(start: Mapping[str, Tensor]) -> nn.ParameterDict:
    """The parameters as a module, so that they can be cut, fetched and written down."""
    held = nn.ParameterDict()
    for name, value in start.items():  # all at once they would be sorted
        held[name] = nn.Parameter(value.clone())
    return held


@dataclass(frozen=True)
class Share:
    """What the sum over all data would be if all of it were as a portion is: its mean over portions is the sum."""

    function: Callable[..., Tensor]
    examples: int
    """Of all data."""
    single: bool
    """Whether there is one parameter, without a name."""
    data: str
    """"none", "tensor" or "tuple": what a portion is."""

    def __call__(self, point: nn.Module, batch: Any) -> Tensor:
        """The loss as a job wants it."""
        assert isinstance(point, nn.ParameterDict)
        x = point[ONE] if self.single else dict(point.items())
        first = next((each for each in tree_leaves(batch) if isinstance(each, Tensor) and each.ndim), None)
        if first is None:
            raise ConfigurationError(
                f"a portion of minimize(data=...) is {kind(batch)}, in which no tensor tells the number of examples",
                hint="let the data set give tensors, or dicts or tuples of them",
            )
        if self.data == "none":
            return scalar(self.function(x), *WORDS)
        share = scalar(self.function(x, first if self.data == "tensor" else batch), *WORDS)
        return share * (self.examples / len(first))


def minimize(
    function: Callable[..., Tensor],
    parameters: Tensor | Mapping[str, Tensor],
    *,
    data: Any = None,
    algorithm: Sandblaster | None = None,
    cluster: Cluster | None = None,
    groups: Groups | None = None,
    run: Path | str | None = None,
    resume: Path | str | None = None,
    view: bool = False,
) -> Minimum:
    """Find a minimum of F(x) = sum over all data of function + l2/2 |x|_2^2 + l1 |x|_1, by L-BFGS.

    `function(x, portion)` returns the scalar sum over the examples of a portion, in a way that torch can
    differentiate; x has the form of `parameters`, the starting point, which is copied. `data` is a tensor or a tuple of
    tensors with examples along the first dimension, or a map-style data set whose mini-batches are the portions;
    without data, `function(x)` is the objective. Replicas are other processes, which import a script: the call stands
    below `if __name__ == "__main__"`.

    The loss of the job is F: l1, l2, gtol, ftol and target of `algorithm` are on its scale, and penalties are of every
    parameter. ftol=0.0 leaves the end to gtol. `run` keeps checkpoints and events in a folder, from which `resume` goes
    on; without it they are removed at the end. `view` shows the job. Raises what `train` raises.
    """
    algorithm = algorithm or Sandblaster()
    if not isinstance(algorithm, Sandblaster):
        raise ConfigurationError(
            f"minimize(algorithm=...) is a {type(algorithm).__name__}", hint="give a Sandblaster, or leave it out"
        )
    if run is not None and resume is not None:
        raise ConfigurationError(
            f"minimize(run={str(run)!r}, resume={str(resume)!r}) names two folders", hint="leave run out to go on"
        )
    if cluster is not None and cluster.plan.partitions > 1:
        raise ConfigurationError(
            f"minimize(cluster=...) has {cluster.plan.partitions} partitions, and a function cannot be cut",
            hint="use partitions=1, or train a module with a Job",
        )
    _check_start(parameters)
    start = {ONE: parameters} if isinstance(parameters, Tensor) else dict(parameters)
    portion, built = _data(data)
    count = len(built)
    if count == 0:
        raise ConfigurationError("minimize(data=...) is empty", hint="give at least one example, or data=None")
    heard: list[JobFinished] = []

    def hear(observation: Observation) -> None:
        if isinstance(observation.event, JobFinished):
            heard.append(observation.event)

    with contextlib.ExitStack() as stack:
        folder, call = run or resume, "distbelief.minimize(..., resume={run!r})"
        if folder is None:
            folder, call = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run", ""
        job = Job(
            model=partial(point, {name: value.detach().cpu() for name, value in start.items()}),
            data=built,
            step=Share(function, count, isinstance(parameters, Tensor), portion),
            algorithm=algorithm,
            cluster=cluster or Cluster(replicas=1),
            groups=_Penalised(algorithm.l1, algorithm.l2, groups),
            run=folder,
        )
        result = train(job, resume=resume, view=view, listeners=[hear], launch=Launch(call=call))
        found = {name: value.detach().clone() for name, value in result.model.named_parameters()}
    (finished,) = heard
    return Minimum(
        parameters=found[ONE] if isinstance(parameters, Tensor) else found,
        value=math.nan if finished.loss is None else finished.loss,
        gradient_norm=math.nan if finished.gradient is None else finished.gradient,
        converged=finished.converged,
        reason=finished.reason,
        iterations=finished.iterations,
        evaluations=finished.evaluations,
    )


def _check_start(parameters: object) -> None:
    """Raise ConfigurationError for what is no starting point."""
    if not isinstance(parameters, Tensor | Mapping):
        raise ConfigurationError(
            f"minimize(parameters=...) is a {type(parameters).__name__}",
            hint="give the starting point as a tensor, such as torch.zeros(3), or as a dict of tensors",
        )
    named: Mapping[Any, Any] = {ONE: parameters} if isinstance(parameters, Tensor) else parameters
    taken = nn.ParameterDict()
    for name, value in named.items():
        if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
            raise ConfigurationError(
                f"minimize(parameters=...) has a key {name!r}",
                hint="name parameters by strings without dots, and not as torch names what its modules have",
            )
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ConfigurationError(
                f"the starting point {'of minimize' if named is not parameters else name} is of {found}",
                hint="give floating-point tensors, such as value.double()",
            )
    if len(kinds := {value.dtype for value in named.values()}) > 1:
        raise ConfigurationError(
            f"minimize(parameters=...) has tensors of {' and '.join(sorted(map(str, kinds)))}",
            hint="give all of them one dtype, such as value.double()",
        )
    if not sum(value.numel() for value in named.values()):
        raise ConfigurationError("minimize(parameters=...) is empty", hint="give at least one number to begin from")


@dataclass(frozen=True)
class _Penalised:
    """Every parameter is penalised, vectors too, unless the user's groups say otherwise."""

    l1: float
    l2: float
    own: Groups | None

    def __call__(self, name: str, parameter: nn.Parameter) -> dict[str, float]:
        given = {} if self.own is None else dict(self.own(name, parameter))
        return {"l1": self.l1, "l2": self.l2} | given


def _data(data: Any) -> tuple[str, Any]:
    """What a portion is, and the data set of them."""
    if data is None:
        return "none", TensorDataset(torch.zeros(1))
    parts = (data,) if isinstance(data, Tensor) else data if isinstance(data, tuple | list) else ()
    if isinstance(data, Mapping) or any(isinstance(part, Tensor) and not part.ndim for part in parts):
        raise _no_data(f"is a {type(data).__name__} of {'tensors' if isinstance(data, Mapping) else 'single numbers'}")
    if isinstance(data, tuple) and not all(isinstance(part, Tensor) for part in parts):
        raise _no_data(f"is a tuple of {' and '.join(sorted({type(part).__name__ for part in parts}))}")
    if isinstance(data, Tensor):
        return "tensor", TensorDataset(data)
    if parts and all(isinstance(part, Tensor) for part in parts):
        lengths = sorted({len(part) for part in parts})
        if len(lengths) != 1:
            raise ConfigurationError(
                f"minimize(data=...) has tensors of {' and '.join(map(str, lengths))} examples",
                hint="give tensors of the same length along their first dimension",
            )
        return "tuple", TensorDataset(*parts)
    return "tuple", data() if callable(data) and not hasattr(data, "__getitem__") else data


def _no_data(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"minimize(data=...) {what}",
        hint="give a tensor, such as torch.from_numpy(x), or a tuple of tensors with examples along the first "
        "dimension, or a map-style data set",
    )
