# SPDX-License-Identifier: Apache-2.0
"""Sandblaster L-BFGS: replicas compute one large batch together, shards hold the history (paper, section 4.2).

The replica's loop below is the paper's listing (appendix, "Sandblaster: process portions"): ask for a small portion of
the batch, fetch the trial once per evaluation, compute, send the gradient to every shard, ask for the next. What
the coordinator does with the answers is in sandblaster_coordinator.py and lbfgs.py.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, cast, final

import torch
from torch import nn

from distbelief.batch_section import Keeping
from distbelief.beginning import give_parameters, take_mean_buffers
from distbelief.bundles import BUNDLES_PER_REPLICA, DETERMINISTIC_BUNDLES, Batches, Portions, cut_bundles
from distbelief.channel.base import Future
from distbelief.checks import check_number, check_whole
from distbelief.data_shard import DataShard
from distbelief.engine.base import COORDINATOR, UNTIL_LOST_SECONDS, Home
from distbelief.errors import ConfigurationError, Fenced
from distbelief.lbfgs import Options
from distbelief.leases import Lease
from distbelief.model_replica import ModelReplica
from distbelief.parameter_server import ParameterServer
from distbelief.parameters import Groups
from distbelief.sandblaster_coordinator import SandblasterCoordinator
from distbelief.tasks import Done, Task, Work

BUNDLES_PER_BATCH = 16
"""Of a batch that is not all data; it does not depend on the number of replicas, which may change."""
MICRO_BATCH = 1024
"""Examples computed at once where the user has not said."""


@dataclass(frozen=True, kw_only=True)
class Sandblaster:
    """Full-batch L-BFGS with its vectors on the parameter server shards.

    The objective is the mean loss over all examples, plus l2/2 |x|_2^2 + l1 |x|_1; tolerances are on that scale.
    """

    history: int = 10
    """Pairs of steps and gradient changes that the direction is made of; each costs two vectors on the shards."""
    max_iterations: int = 200
    """Steps before it stops."""
    max_evaluations: int = 10_000
    """Passes over the batch before it stops."""
    gtol: float = 1e-5
    """Stop when no entry of the gradient, as penalties and bounds reduce it, is larger."""
    ftol: float | None = None
    """Stop when three decreases of the loss in a row are at most ftol max(|loss|, 1); None: 1e-9, in float32 1e-7."""
    target: float | None = None
    """Stop when the loss, penalties included, is no higher."""
    l2: float = 0.0
    """Of parameters with two or more dimensions; Job.groups says otherwise: {"l2": 0.1}."""
    l1: float = 0.0
    """Likewise. It makes parameters exactly zero (OWL-QN)."""
    bounds: tuple[float | None, float | None] | None = None
    """(lowest, highest) value of every parameter; Job.groups may differ: {"low": 0.0}."""
    micro_batch: int | None = None
    """Examples that a replica computes at once; None: Job.batch_size, but at least 1024 where the data has them."""
    batch: int | None = None
    """Examples of one batch, for data too many for a pass per step; None: all. Batches then share `overlap` of their
    examples with the next one, on which gradients are compared (Berahas et al., 2016); gtol, ftol and target are of no
    use, as no two losses are of the same examples."""
    overlap: float = 0.25
    """Share of a batch that the next one has, too, where `batch` is given."""
    backups: bool = True
    """Whether an idle replica computes a copy of the slowest portion."""
    deterministic: bool = False
    """Whether results are the same bit for bit, whatever the number of replicas and whoever was slow or died, where
    they compute with as many threads (`Cluster.threads_per_replica`). Shards then keep what comes before its turn."""
    history_in_bfloat16: bool = False
    """Halves the memory of the history, for some more evaluations."""

    def __post_init__(self) -> None:
        check_whole(self, ("history", "max_iterations", "max_evaluations", "micro_batch", "batch"))
        check_number(self, ("gtol", "ftol", "target", "l2", "l1", "overlap"))
        for name in ("history", "max_iterations", "max_evaluations"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"Sandblaster({name}={getattr(self, name)}): at least 1 is needed", hint=f"set {name} to 1 or more"
                )
        for name in ("l1", "l2", "gtol"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"Sandblaster({name}={getattr(self, name)}) must be 0 or positive", hint=f"use {name}=0.0 for none"
                )
        if self.ftol is not None and not 0 <= self.ftol < math.inf:
            raise ConfigurationError(
                f"Sandblaster(ftol={self.ftol}) must be 0 or positive",
                hint="use ftol=None for the default, 0.0 for none",
            )
        if self.target is not None and math.isnan(self.target):
            raise ConfigurationError("Sandblaster(target=nan) is never reached", hint="use target=None for none")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigurationError(
                f"Sandblaster(micro_batch={self.micro_batch}) computes nothing", hint="use 1 or more, or None"
            )
        if self.batch is not None and self.batch < BUNDLES_PER_BATCH:
            raise ConfigurationError(
                f"Sandblaster(batch={self.batch}): a batch is of {BUNDLES_PER_BATCH} portions, of an example at least",
                hint=f"give {BUNDLES_PER_BATCH} examples or more, or None for all",
            )
        if not 0 < self.overlap <= 0.5:
            raise ConfigurationError(
                f"Sandblaster(overlap={self.overlap}) is not between 0 and 0.5", hint="use for example 0.25"
            )
        if self.batch is not None and (self.l1 or self.bounds is not None):
            raise ConfigurationError(
                f"Sandblaster(batch={self.batch}) with l1 or bounds: there is no rule for batches that change",
                hint="use batch=None, or l2",
            )
        pair = (None, None) if self.bounds is None else self.bounds
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(it, Real | None) for it in pair)):
            raise ConfigurationError(
                f"Sandblaster(bounds={self.bounds}) is no pair of numbers",
                hint="give (lowest, highest) of all parameters, None for no bound; groups= may give each parameter "
                'bounds of its own: {"low": 0.0, "high": 1.0}',
            )
        low, high = self.limits
        if not low < high:
            raise ConfigurationError(
                f"Sandblaster(bounds={self.bounds}) leave nothing between them", hint="give (lower, higher), or None"
            )
        if self.l1 and self.bounds is not None:
            raise ConfigurationError(
                f"Sandblaster(l1={self.l1}, bounds={self.bounds}): there is no rule for both at once",
                hint="use l1=0.0 or bounds=None; with parameters that are never negative, add l1 * x to the loss",
            )

    @property
    def limits(self) -> tuple[float, float]:
        """The bounds as numbers."""
        low, high = self.bounds or (None, None)
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def keeping(self) -> Keeping:
        """What shards keep."""
        low, high = self.limits
        return Keeping(
            self.history, self.history_in_bfloat16, self.batch is not None, self.deterministic, self.l2, self.l1, low,
            high,
        )  # fmt: skip

    def groups(self, own: Groups | None) -> Groups | None:
        """The user's groups, with parameters of one dimension, such as biases, free of penalties unless they say."""
        return _Unpenalised(own) if self.l1 or self.l2 else own

    def options(self, dtype: torch.dtype, bends: bool) -> Options:
        """For the solver; `bends` where any parameter has L1 or a bound."""
        single = torch.finfo(dtype).bits < 64
        limits = self.history, self.max_iterations, self.max_evaluations
        search: Literal["wolfe", "backtracking", "overlapping"] = "backtracking" if bends else "wolfe"
        if self.batch is not None:
            search = "overlapping"
        return Options(*limits, self.gtol, self.ftol, self.target, single, search)

    def micro_batch_of(self, batch_size: int, examples: int) -> int:
        """Examples computed at once; a batch that is not all data is at least so many bundles of them."""
        most = examples if self.batch is None else self.batch // BUNDLES_PER_BATCH
        return min(most, self.micro_batch or max(batch_size, MICRO_BATCH))

    def work(self, examples: int, batch_size: int, replicas: int, seed: int) -> Work:
        """The bundles of the data, and which of them are in which batch."""
        objective = f"l1={self.l1} l2={self.l2} bounds={self.bounds} batch={self.batch} overlap={self.overlap}"
        micro_batch = self.micro_batch_of(batch_size, examples)
        if self.batch is None:
            count = DETERMINISTIC_BUNDLES if self.deterministic else BUNDLES_PER_REPLICA * replicas
            bundles = cut_bundles(examples, micro_batch, count)
            return Work(Portions(bundles, replicas, backups=self.backups), Batches(len(bundles)), objective)
        bundles = cut_bundles(examples, micro_batch, examples * BUNDLES_PER_BATCH // self.batch)
        shared = max(1, round(self.overlap * BUNDLES_PER_BATCH))
        batches = Batches(len(bundles), BUNDLES_PER_BATCH, shared, seed)
        return Work(Portions(bundles, replicas, backups=self.backups), batches, objective)


@dataclass(frozen=True)
class _Unpenalised:
    own: Groups | None

    def __call__(self, name: str, parameter: nn.Parameter) -> dict[str, float]:
        free = {"l2": 0.0, "l1": 0.0} if parameter.ndim < 2 else {}
        return free | dict(self.own(name, parameter) if self.own else {})


@final
@dataclass
class Contributing:
    """A contribution under way."""

    future: Future[list[bool]] | None
    """None for one that is not finite, and was not sent."""
    done: Done


@final
class SandblasterReplica:
    """One model replica: bundles, trials and contributions."""

    def __init__(
        self, home: Home, index: int, model: ModelReplica, data: DataShard, server: ParameterServer,
    ) -> None:  # fmt: skip
        self.home, self.index, self.model, self.data, self.server = home, index, model, data, server
        self.group = model.group
        self.coordinator = home.find(COORDINATOR, SandblasterCoordinator, UNTIL_LOST_SECONDS)
        self.asked: Future[Task]
        """The answer to the latest request for a task, where this partition leads."""
        self.evaluation = 0
        """The evaluation whose trial is here."""
        self.contributing: Contributing | None = None

    def run(self) -> None:
        """Compute portions until the coordinator has no more (paper, appendix)."""
        take_mean_buffers(self.coordinator, self.group.index, self.model.part.buffers)  # computing changes none
        give_parameters(self.home, self.coordinator, self.index, self.server, self.model.spare)
        self.ask()
        try:
            while (task := self.next_task()) is not None:
                assert task.bundle is not None
                if task.mark.evaluation != self.evaluation:
                    self.fetch(task)
                self.ask()  # for the bundle after this one
                computed = self.compute(task)
                if computed is not None:
                    self.contribute(task, *computed)
            if self.group.leads:
                self.coordinator.call(SandblasterCoordinator.leave, self.index, self.home.incarnation).result()
        except Fenced:
            return  # this incarnation was given up as dead and has been replaced

    # tasks

    def ask(self) -> None:
        """Ask for the next task."""
        if self.group.leads:
            answer = self.coordinator.call(SandblasterCoordinator.next_task, self.index, self.home.incarnation)
            self.asked = cast(Future[Task], answer)

    def next_task(self) -> Task | None:
        """The next bundle to compute, with nothing left under way where there is none yet; None at the end."""
        while True:
            if not self.group.any(self.group.leads and self.asked.done())[0]:
                self.settle()
            task = self.told()
            if task.over:
                self.settle()
                return None
            if task.bundle is not None:
                return task
            self.ask()

    def told(self) -> Task:
        """The answer, told to all partitions."""
        return self.group.tell(Task, self.asked.result() if self.group.leads else None)

    # the work

    def fetch(self, task: Task) -> None:
        """Switch the model to the trial, once nothing is under way in the buffer that takes it."""
        self.settle()
        self.server.trial(task.version, task.t, self.model.spare).result()
        self.model.adopt()
        self.evaluation = task.mark.evaluation

    def compute(self, task: Task) -> tuple[float, float] | None:
        """Accrue the gradient of the loss summed over a bundle's examples; (that sum, what it took in seconds).

        None when the evaluation has ended meanwhile, without it.
        """
        bundle = task.bundle
        assert bundle is not None
        begun = self.home.now()
        losses: list[tuple[torch.Tensor, int]] = []
        try:
            for _, examples, batch in self.data.mini_batches(Lease(bundle.index, 0, bundle.start, bundle.stop)):
                with self.home.computing(examples):
                    losses.append((self.model.compute(batch, weight=float(examples)), examples))
                if self.superseded(task):
                    self.model.discard()
                    return None
        except Exception as error:
            error.add_note(f"while computing examples {bundle.start} to {bundle.stop - 1}")
            raise
        return math.fsum(float(loss) * examples for loss, examples in losses), self.home.now() - begun

    def superseded(self, task: Task) -> bool:
        """Whether the next task is one of a later evaluation; partitions do not interrupt each other to find out."""
        if self.group.size > 1 or not self.asked.done():
            return False
        following = self.asked.result()
        return following.over or following.mark.evaluation > task.mark.evaluation

    def contribute(self, task: Task, loss_sum: float, seconds: float) -> None:
        """Start sending the bundle's gradient, once the one before is with every shard."""
        self.model.frozen.check(closely=False)
        self.settle()
        assert task.bundle is not None
        gradient = self.model.take_gradient(mean=False, clip_norm=None)
        future = None if gradient is None else self.server.contribute(task.mark, gradient)
        done = Done(task.mark.evaluation, task.bundle.index, math.nan if gradient is None else loss_sum, seconds)
        self.contributing = Contributing(future, done)

    def settle(self) -> None:
        """Wait until the contribution is with every shard, from every partition, and tell the coordinator."""
        contributing, self.contributing = self.contributing, None
        if contributing is None:
            return
        if contributing.future is not None:
            contributing.future.result()
        self.group.any(True)
        if self.group.leads:
            self.coordinator.call(
                SandblasterCoordinator.finish, self.index, self.home.incarnation, contributing.done
            ).result()
