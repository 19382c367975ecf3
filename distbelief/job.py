# SPDX-License-Identifier: Apache-2.0
"""Job: the value a user writes. What can be wrong with it is said here, before anything starts."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distbelief.checkpoint import lay_out_buffers
from distbelief.checks import check_number, check_whole
from distbelief.cluster import Cluster
from distbelief.data_shard import Collated, collect, kind, to_device
from distbelief.downpour import Downpour
from distbelief.errors import ConfigurationError
from distbelief.evaluator import EVALUATION_BATCH, Evaluation, Measures, Metric
from distbelief.model_partition import CutModel, cut_model
from distbelief.model_replica import Objective, Step, build
from distbelief.parameters import Groups, Layout, trainable
from distbelief.partition.footprint import check_memory, footprints, uncut_footprint
from distbelief.partition.pipeline import preload
from distbelief.partition.stages import StagePlan
from distbelief.repeatable import check_batch
from distbelief.sandblaster import Sandblaster
from distbelief.update_rule import check

_EXAMPLES = {
    "algorithm": "algorithm=Downpour(update_rule=adagrad(0.05))",
    "cluster": "cluster=Cluster(replicas=4)",
    "metrics": 'metrics={"accuracy": accuracy}, where accuracy(output, target) is a function',
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train, the data to train it on, how, and on how many processes."""

    model: Callable[[], nn.Module]
    """Builds an ordinary module; called once in each process, with torch's, NumPy's and Python's random numbers begun
    by `seed`."""
    data: Any
    """A map-style data set, or a function without arguments that builds one."""
    collate: Callable[[Any], Any] | None = None
    """List of examples -> mini-batch, as DataLoader's collate_fn, for `test` too; None stacks what is alike."""
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    """(output, target) -> mean loss over the mini-batch, for mini-batches of (input, target)."""
    step: Step | None = None
    """(model, mini-batch) -> mean loss, instead of `loss`, for mini-batches of any other kind; without `backward`."""
    test: Any = None
    """Held-out data, like `data`; None for no evaluation. Its loss and metrics are means over mini-batches in the data
    set's own order: of `batch_size` under Downpour with `step` or `collate`, where they may depend on the mini-batch,
    else of 1024, or, of large examples or outputs, of as many as take 64 MB, and no fewer than `batch_size`."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Name -> (output, target) -> mean over the mini-batch."""
    evaluate: Evaluation | None = None
    """(model, test set) -> metrics, instead of `loss` and `metrics` on the test set."""
    algorithm: Downpour | Sandblaster = field(default_factory=Downpour)
    """Downpour: asynchronous stochastic gradient descent. Sandblaster: full-batch L-BFGS."""
    cluster: Cluster = field(default_factory=Cluster)
    """How many processes, and where."""
    groups: Groups | None = None
    """(name, parameter) -> options of the update rule that differ for it, such as {"weight_decay": 0.0}."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Examples per mini-batch of one replica."""
    seed: int = 0
    """Of the initial parameters and of the order of the examples."""
    run: Path | str | None = None
    """Folder for checkpoints, events and the summary; None makes one below runs/."""
    checkpoints: str | None = None
    """Where a new run keeps its checkpoints when not all hosts see the run folder: a folder, or a store such as
    "s3://bucket/name" that fsspec knows."""
    evaluate_every: int | None = None
    """Examples between evaluations on the test set; None for once an epoch, under Sandblaster once in ten passes."""
    checkpoint_seconds: float = 60.0
    """Between checkpoints, which are written while training goes on."""
    keep_checkpoints: int = 3
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        check_whole(self, ("epochs", "batch_size", "keep_checkpoints", "seed", "evaluate_every"))
        check_number(self, ("checkpoint_seconds",))
        self._check_kinds()
        for name in ("epochs", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"Job({name}={getattr(self, name)}): at least 1 is needed", hint=f"set {name} to 1 or more"
                )
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigurationError(f"Job(seed={self.seed}) has more than 63 bits", hint="use a smaller number")
        if (self.loss is None) == (self.step is None):
            raise ConfigurationError(
                "a job needs either loss or step" + (", both were given" if self.loss else ", neither was given"),
                hint="give loss=(output, target) -> scalar, or step=(model, batch) -> scalar",
            )
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ConfigurationError(
                f"Job(evaluate_every={self.evaluate_every}) would never evaluate",
                hint="give a number of examples, or None for once an epoch",
            )
        if not self.checkpoint_seconds > 0:
            raise ConfigurationError(
                f"Job(checkpoint_seconds={self.checkpoint_seconds}) must be positive", hint="use for example 60.0"
            )
        if not callable(self.model):
            raise ConfigurationError(
                f"Job(model=...) is a {type(self.model).__name__}, which cannot be called",
                hint="give the class or a function that builds the module, not a string or a state_dict",
            )
        if isinstance(self.model, nn.Module):
            raise ConfigurationError(
                f"Job(model=...) is a {type(self.model).__name__} that is built already",
                hint="give the class, a function or functools.partial that builds it in each process",
            )
        for name in ("metrics", "evaluate", "evaluate_every"):
            if self.test is None and getattr(self, name):
                raise ConfigurationError(
                    f"Job({name}=...) has nothing to be measured on: there is no test set",
                    hint=f"give test=, a data set that is not trained on, or leave {name} out",
                )

    def _check_kinds(self) -> None:
        for name, kinds in (("algorithm", (Downpour, Sandblaster)), ("cluster", (Cluster,)), ("metrics", (Mapping,))):
            given = getattr(self, name)
            if not isinstance(given, kinds):
                raise ConfigurationError(
                    f"Job({name}={given!r}) is a {type(given).__name__}", hint=f"use for example {_EXAMPLES[name]}"
                )
        for name in ("loss", "step", "evaluate", "groups", "collate"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ConfigurationError(
                    f"Job({name}=...) is a {type(given).__name__}, which cannot be called", hint="give a function"
                )
        for name in ("loss", "step"):
            given = getattr(self, name)
            own = [each for each, _ in trainable(given)] if isinstance(given, nn.Module) else []
            if own:
                raise ConfigurationError(
                    f"Job({name}=...) is a {type(given).__name__} with parameters of its own, {own[0]} first, which "
                    "nobody would train",
                    hint="make it a module of the model, and give step=(model, batch) -> loss; or freeze them",
                )
        for name, metric in self.metrics.items():
            if not callable(metric):
                raise ConfigurationError(
                    f"Job(metrics=...) gives {name!r} a {type(metric).__name__}, which cannot be called",
                    hint=f"use for example {_EXAMPLES['metrics']}",
                )
            if name == "loss":
                raise ConfigurationError(
                    "Job(metrics=...) has a metric named loss, which is the name of the loss on the test set",
                    hint="give the metric another name; the loss is measured without being asked for",
                )

    @property
    def objective(self) -> Objective:
        """What to minimise."""
        return Objective(self.loss, self.step)

    @property
    def measures(self) -> Measures:
        """What to measure on the test set."""
        own = isinstance(self.algorithm, Downpour) and (self.step or self.collate)  # full batches are cut anyhow
        largest = self.batch_size if own else EVALUATION_BATCH
        first = min(self.batch_size, largest)
        return Measures(self.loss, self.step, dict(self.metrics), self.evaluate, first, largest)

    @property
    def grouping(self) -> Groups | None:
        """(name, parameter) -> options that the algorithm has for it."""
        return self.algorithm.groups(self.groups) if isinstance(self.algorithm, Sandblaster) else self.groups


@dataclass(frozen=True)
class Prepared:
    """A job whose data sets exist: what roles are started with."""

    job: Job
    data: Any
    test: Any
    layout: Layout
    """Where parameters lie; every process builds the model anew, and it must be the same one."""
    cut: CutModel | None
    """The plan of replicas that span several processes."""


@dataclass(frozen=True)
class Facts:
    """What the coordinator needs to know of a prepared job."""

    layout: Layout
    buffers: Layout
    """Where buffers lie in the vectors that replicas report, per partition."""
    examples: int
    test_examples: int

    def __str__(self) -> str:
        layouts = f"layout {zlib.crc32(repr((self.layout, self.buffers)).encode()):08x}"
        tensors = f"{self.layout.length:,} parameters in {len(self.layout.pieces)} tensors"
        return f"{tensors} ({layouts}), {self.examples:,} examples and {self.test_examples:,} to test on"


def prepare(job: Job) -> tuple[Prepared, Facts]:
    """Build the data sets, and the model for its layout. Raises ConfigurationError, and what the user's code does."""
    data, test = _build_data(job.data, "data"), _build_data(job.test, "test")
    if job.collate is not None:
        data = Collated(data, job.collate)
        test = test if test is None or job.evaluate else Collated(test, job.collate)
    at_once, test_examples = computed_at_once(job, len(data)), 0 if test is None else len(test)
    if job.cluster.plan.partitions > 1:
        sample = sample_of(job, data)
        cut = cut_model(job.model, job.seed, job.grouping, input_of(job, sample), job.cluster.plan)
        if job.cluster.memory_bytes is not None:
            check_memory(footprints(cut.plan, at_once, cut.layout.dtype), job.cluster.memory_bytes)
        _check_algorithm(job, cut.module, cut.layout, len(data), in_stages=isinstance(cut.plan, StagePlan))
        if isinstance(cut.plan, StagePlan):
            _check_target(sample[1])
            preload()
        buffers = lay_out_buffers(cut.module, cut.held_buffers)
        return Prepared(job, data, test, cut.layout, cut), Facts(cut.layout, buffers, len(data), test_examples)
    module, layout = build(job.model, job.seed, job.grouping)
    if job.cluster.memory_bytes is not None:
        check_memory([uncut_footprint(module, layout.length, layout.dtype)], job.cluster.memory_bytes)
    _check_algorithm(job, module, layout, len(data), in_stages=False)
    return Prepared(job, data, test, layout, None), Facts(layout, lay_out_buffers(module), len(data), test_examples)


def sample_of(job: Job, data: Any) -> Any:
    """A mini-batch to try things with, as a replica would have it."""
    return to_device(collect(data, trial(job, data)), torch.device("cpu"))


def trial(job: Job, data: Any) -> torch.Tensor:
    """The examples of the mini-batch that is tried, from all over the data, which may be sorted."""
    size = computed_at_once(job, len(data))
    return torch.arange(size) * len(data) // size


def computed_at_once(job: Job, examples: int) -> int:
    """Examples that a replica computes at once."""
    if isinstance(job.algorithm, Sandblaster) and examples:
        if job.algorithm.batch is not None and job.algorithm.batch >= examples:
            raise ConfigurationError(
                f"Sandblaster(batch={job.algorithm.batch}) is no part of the data, which has {examples} examples",
                hint="use batch=None for all of them, or a smaller batch",
            )
        return job.algorithm.micro_batch_of(job.batch_size, examples)
    if job.batch_size > examples:
        raise ConfigurationError(
            f"a mini-batch of {job.batch_size} examples is larger than the data, which has {examples}",
            hint=f"use batch_size={max(1, examples)} or less" if examples else "give a data set that is not empty",
        )
    return job.batch_size


def _check_algorithm(job: Job, module: nn.Module, layout: Layout, examples: int, *, in_stages: bool) -> None:
    """Raise ConfigurationError where the algorithm does not go with this model."""
    if isinstance(job.algorithm, Sandblaster):
        check_batch(module, layout, job.algorithm.keeping)
        return
    check(job.algorithm.update_rule, [piece.options for piece in layout.pieces], job.epochs * examples, layout.dtype)
    if in_stages and job.algorithm.local_rate is not None:
        raise ConfigurationError(
            f"Downpour(local_rate={job.algorithm.local_rate}) with stages would change parameters between the "
            "micro-batches of a mini-batch",
            hint="use local_rate=None, or cut the model by units",
        )


def input_of(job: Job, sample: Any) -> torch.Tensor:
    """The input of a mini-batch, for which a partitioned model is planned."""
    if job.step is not None:
        raise ConfigurationError(
            f"Job(step=...) with {job.cluster.plan.partitions} partitions: only one of them has the model's output",
            hint="give loss=(output, target) -> scalar instead of step, or use partitions=1",
        )
    if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], torch.Tensor)):
        raise ConfigurationError(
            f"a mini-batch of {job.cluster.plan.partitions} partitions is (input tensor, target), not {kind(sample)}",
            hint="let the data set give (input, target) with one tensor as input, or use partitions=1",
        )
    return sample[0]


def _check_target(target: Any) -> None:
    """Raise ConfigurationError for what cannot be cut into micro-batches."""
    if not isinstance(target, torch.Tensor):
        raise ConfigurationError(
            f"the target of a mini-batch is {kind(target)}, and stages cut it into micro-batches",
            hint="give one tensor as the target, or cut the model by units",
        )


def _check_is_data(data: Any, name: str) -> None:
    """Raise ConfigurationError for what has a length and items, but is no data set all the same."""
    parts = data if isinstance(data, tuple | list) and len(data) in (2, 3) else ()
    lengths = {len(part) if getattr(part, "shape", ()) else 0 for part in parts}
    tensors = len(lengths) == 1 and min(lengths) > len(parts)
    table = hasattr(data, "iloc")  # of pandas, whose items are columns
    keyed = isinstance(data, Mapping) and not hasattr(data, "__getitems__") and 0 not in data
    splits = list(data) if keyed else []
    if splits and all(isinstance(each, Dataset) or hasattr(each, "__getitems__") for each in data.values()):
        raise ConfigurationError(
            f"Job({name}=...) is a {type(data).__name__} of data sets",
            hint=f"give one of its splits, such as data[{('train' if 'train' in splits else splits[0])!r}]",
        )
    if tensors or table or isinstance(data, str | bytes) or keyed:
        what = f"{type(data).__name__} of {len(parts)} tensors" if tensors else type(data).__name__
        raise ConfigurationError(
            f"Job({name}=...) is a {what}, which is no data set",
            hint="give torch.utils.data.TensorDataset(inputs, targets), another map-style data set, or a function that "
            "builds one",
        )


def _build_data(data: Any, name: str) -> Any:
    builds = callable(data) and (isinstance(data, type) or not hasattr(data, "__getitem__"))
    built = data() if builds else data
    if built is None and name == "test":
        return None
    if isinstance(built, DataLoader):
        raise ConfigurationError(
            f"Job({name}=...) is a DataLoader; replicas make mini-batches themselves",
            hint="give its data set, loader.dataset, and batch_size= and collate= to the job; what a sampler of your "
            "own draws is torch.utils.data.Subset(loader.dataset, list(loader.sampler))",
        )
    _check_is_data(built, name)
    indexed = hasattr(built, "__getitem__") and hasattr(built, "__len__")
    if not indexed or isinstance(built, IterableDataset):
        raise ConfigurationError(
            f"Job({name}=...) is a {type(built).__name__}, which has no length or cannot be indexed",
            hint="give a map-style data set (with __len__ and __getitem__), or a function that builds one; of what can "
            "only be iterated over, list(data) is one, if it fits into memory",
        )
    if name == "test" and len(built) == 0:
        raise ConfigurationError("the test set is empty", hint="give test=None for no evaluation")
    return built
