# SPDX-License-Identifier: Apache-2.0
"""Downpour SGD: replicas that push gradients and fetch parameters without waiting for each other (paper, section 4.1).

The replica's loop below is the paper's listing (appendix). Where the paper is silent: the first fetch is awaited; a
push is the mean over the mini-batches it accrued; buffers are swapped, never zeroed under the sender; a push or fetch
that is still under way when the next push is due makes pushes rarer, up to a bound, before it makes the replica wait.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

import torch

from distbelief.beginning import IDLE_SECONDS, give_parameters, take_mean_buffers
from distbelief.channel.base import Future
from distbelief.checks import check_number, check_whole
from distbelief.data_shard import DataShard
from distbelief.downpour_coordinator import DownpourCoordinator
from distbelief.engine.base import COORDINATOR, UNTIL_LOST_SECONDS, Home
from distbelief.errors import ConfigurationError, Fenced
from distbelief.leases import Lease
from distbelief.model_replica import ModelReplica
from distbelief.parameter_server import ParameterServer
from distbelief.roster import Granted, Refusal
from distbelief.section import Applied, Offer, Stamp
from distbelief.tally import Tally
from distbelief.update_rule import UpdateRule, adagrad

FetchName = Literal["fresh", "overlapped", "awaited"]
AccrueName = Literal["mean", "sum"]

REPORT_SECONDS = 0.25
BUFFERS_SECONDS = 0.25
"""Evaluations and checkpoints use buffers that may be so old, or a longer mini-batch, with newer parameters."""
BUFFERS_SHARE = 0.05
"""Of a replica's time goes into sending buffers at the most: large ones are sent more rarely."""


@dataclass(frozen=True, kw_only=True)
class Downpour:
    """Asynchronous stochastic gradient descent on sharded parameter servers."""

    update_rule: UpdateRule = field(default_factory=adagrad)
    """How a shard turns a pushed gradient into new parameters."""
    n_fetch: int = 1
    """A replica fetches parameters every so many mini-batches."""
    n_push: int = 1
    """A replica pushes its accrued gradient every so many mini-batches."""
    fetch: FetchName = "fresh"
    """`overlapped`: compute while a fetch is under way, and adopt it when it is there at the next mini-batch.
    `fresh`: wait for it first, but no longer than half a mini-batch takes.
    `awaited`: wait for it however long it takes."""
    accrue: AccrueName = "mean"
    """What a push holds of the gradients of its mini-batches."""
    warmstart: int | None = None
    """Examples that one replica trains on before the others are released in stages; None derives it, 0 is none."""
    cooldown: int | None = None
    """Examples that one replica trains on at the end, the others leaving in stages; None derives it, 0 is none."""
    local_rate: float | None = None
    """Rate of a local gradient step after each mini-batch, for n_fetch > 1; None for none."""
    momentum: float = 0.0
    """Nesterov momentum of a replica's own pushes, as torch.optim.SGD(nesterov=True) has it; 0 for none. Many replicas
    bear it better than the update rule's, which sums what all of them push (DANA-Slim: Hakimi et al., 2019)."""
    clip_norm: float | None = None
    """Largest 2-norm of a pushed gradient; larger ones are scaled down."""
    backlog: int = 4
    """While a push is under way, accrue at most so many times n_push mini-batches before waiting for it."""
    refusals: int = 10
    """Stop the job after more than so many pushes refused for a gradient that is not finite.

    One such mini-batch spoils what was accrued with it: the whole push is refused, up to n_push * backlog mini-batches.
    """

    def __post_init__(self) -> None:
        check_whole(self, ("n_fetch", "n_push", "warmstart", "cooldown", "backlog", "refusals"))
        check_number(self, ("local_rate", "momentum", "clip_norm"))
        for name, known in (("fetch", get_args(FetchName)), ("accrue", get_args(AccrueName))):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"Downpour({name}={getattr(self, name)!r}) is not known", hint=f"use one of {', '.join(known)}"
                )
        for name in ("n_fetch", "n_push", "backlog"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"Downpour({name}={getattr(self, name)}) would never happen", hint=f"set {name} to 1 or more"
                )
        if min(self.warmstart or 0, self.cooldown or 0, self.refusals) < 0:
            raise ConfigurationError(
                f"Downpour(warmstart={self.warmstart}, cooldown={self.cooldown}, refusals={self.refusals}): "
                "counts cannot be negative",
                hint="use 0 or more, or None for warmstart and cooldown to derive them",
            )
        for name in ("clip_norm", "local_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"Downpour({name}={value}) must be positive", hint=f"use {name}=None for none")
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(
                f"Downpour(momentum={self.momentum}) is not in [0, 1)", hint="use 0.9, or 0 for none"
            )
        if self.local_rate is not None and self.n_fetch % self.n_push:
            raise ConfigurationError(
                f"Downpour(local_rate={self.local_rate}, n_fetch={self.n_fetch}, n_push={self.n_push}): a fetch would "
                "discard local steps that were not pushed",
                hint=f"make n_fetch a multiple of n_push={self.n_push}",
            )


@final
@dataclass
class Pushing:
    """A push under way and what it settles."""

    future: Future[list[Applied]] | Future[list[int]]
    portions: tuple[tuple[int, int], ...]


@final
class DownpourReplica:
    """One model replica: leases, mini-batches, fetches and pushes."""

    def __init__(
        self, home: Home, index: int, model: ModelReplica, data: DataShard, server: ParameterServer,
        downpour: Downpour,
    ) -> None:  # fmt: skip
        self.home, self.index, self.model, self.data, self.server = home, index, model, data, server
        self.downpour, self.group = downpour, model.group
        self.coordinator = home.find(COORDINATOR, DownpourCoordinator, UNTIL_LOST_SECONDS)
        self.versions: list[int] = []
        self.base_versions: list[int] = []
        self.asked: Future[Granted]
        """The answer to the latest request for a lease, where this partition leads."""
        self.fetching: Future[list[int]] | None = None
        self.due = False
        """Whether a fetch is to be started as soon as the spare buffer is free."""
        self.pushing: Pushing | None = None
        self.sequence = 0
        self.portions: dict[int, int] = {}
        """Lease -> position reached by what is accrued and not pushed."""
        self.examples = 0
        """Examples accrued and not pushed."""
        self.buffers: list[torch.Tensor] = []
        """The module's buffers as the coordinator last knew them."""
        self.report = Tally(home.now())
        self.reporting: Future[bool] | None = None
        self.told_to_stop = self.stopping = False
        self.carried: list[tuple[int, int]] = []
        """What this partition's acknowledged pushes carried; settled when the other partitions' are acknowledged."""
        self.pushed = 0, 0
        """Examples and mini-batches of the latest push."""
        model.local_rate, model.momentum, server.held = downpour.local_rate, downpour.momentum, self.held

    def run(self) -> None:
        """Train until the coordinator has no more examples or says stop (paper, appendix, "Downpour SGD client")."""
        n_fetch, n_push = self.downpour.n_fetch, self.downpour.n_push
        step = 0
        self.load_buffers()
        give_parameters(self.home, self.coordinator, self.index, self.server, self.model.spare)
        self.due = True
        self.start_fetch()
        self.adopt(math.inf)
        try:
            for lease in self.leases():
                for position, examples, batch in self.data.mini_batches(lease, self.upcoming):
                    self.adopt(self.patience())
                    self.compute(batch, examples, lease, position)
                    step += 1
                    pushes = self.model.accrued >= n_push and self.may_push()
                    self.adopt(0.0)
                    self.due |= step % n_fetch == 0 and self.fetching is None
                    if pushes:
                        self.push()
                    self.start_fetch()
                    self.send_report(REPORT_SECONDS)
                    if self.stopping:
                        break
        except Fenced:
            return  # this incarnation was given up as dead and has been replaced

    def held(self, position: int) -> tuple[Offer, torch.Tensor]:
        """What was fetched of a shard, for one that came back from a checkpoint."""
        version = self.versions[position] if self.versions else -1
        offer = Offer(self.index, self.home.incarnation, version, *self.pushed, self.group.index)
        return offer, self.model.fetched

    # leases

    def leases(self) -> Iterator[Lease]:
        """Leases to work on; the next one is asked for while this one is computed."""
        self.ask()
        idle = False
        while not self.stopping:
            answer = self.granted()
            if answer.finished:
                break
            if answer.lease is None:
                # Nothing to hand out now: others may die, so wait with everything pushed and settled.
                self.flush()
                self.home.sleep(IDLE_SECONDS)
                self.ask()
                idle = True
                continue
            if idle:
                self.load_buffers()  # those that it has are of parameters of long ago
                self.due = True
                self.start_fetch()
                self.adopt(math.inf)
            self.ask()
            idle = False
            yield answer.lease
        self.flush()
        if self.group.leads:
            self.coordinator.call(DownpourCoordinator.leave, self.index, self.home.incarnation).result()

    def upcoming(self) -> Lease | None:
        """The lease after this one, if it has been granted and the other partitions need not be told of it."""
        return self.asked.result().lease if self.group.size == 1 and self.asked.done() else None

    def ask(self) -> None:
        """Ask for the next lease."""
        if self.group.leads:
            settled, self.report.settled = tuple(self.report.settled), []
            self.asked = self.coordinator.call(DownpourCoordinator.lease, self.index, self.home.incarnation, settled)

    def granted(self) -> Granted:
        """The answer, told to all partitions."""
        return self.group.tell(Granted, self.asked.result() if self.group.leads else None)

    # the three weakly synchronised activities

    def start_fetch(self) -> None:
        """Start fetching into the spare buffer, if a fetch is due, and no push is under way there."""
        if not self.due:
            return
        if self.pushing is not None and (self.patience() == math.inf or self.pushing.future.done()):
            self.settle(self.pushing)
        if self.pushing is None:
            self.fetching, self.due = self.server.fetch(self.model.spare), False

    def adopt(self, seconds: float) -> None:
        """Switch to the fetched parameters, if they are here within `seconds`."""
        if self.fetching is None:
            return
        if seconds == math.inf or (self.fetching.wait(seconds) if seconds else self.fetching.done()):
            self.versions = self.fetching.result()
            self.fetching = None
            self.model.adopt()

    def patience(self) -> float:
        """How long to wait for a fetch before computing on the parameters that are here."""
        if self.downpour.fetch == "awaited":
            return math.inf
        return self.report.mini_batch_seconds / 2 if self.downpour.fetch == "fresh" else 0.0

    def compute(self, batch: Any, examples: int, lease: Lease, position: int) -> None:
        """Accrue the gradient of one mini-batch."""
        if self.model.accrued == 0:
            self.base_versions = self.versions
        started = self.home.now()
        with self.home.computing(examples):
            loss = self.model.compute(batch)
        self.examples += examples
        self.portions[lease.identifier] = position
        self.report.count(loss, examples, self.home.now() - started)

    def may_push(self) -> bool:
        """Whether the spare buffer is free, here and in the other partitions, so that they push after the same steps.

        Waits for the push or fetch that is under way there when too much is accrued meanwhile.
        """
        full = self.model.accrued >= self.downpour.n_push * self.downpour.backlog
        if self.pushing is not None and (full or self.pushing.future.done()):
            self.settle(self.pushing)
        self.adopt(math.inf if full else 0.0)
        return self.all_settled()

    def all_settled(self) -> bool:
        """Settle what was carried if no partition waits for a push; whether none waits for a push or a fetch."""
        pushing, fetching, self.stopping = self.group.any(
            self.pushing is not None, self.fetching is not None, self.told_to_stop or self.stopping
        )
        if not pushing:
            self.report.settled.extend(self.carried)
            self.carried = []
        return not (pushing or fetching)

    def push(self) -> None:
        """Start pushing what is accrued; where a fetch is due, the same call brings it."""
        portions, mini_batches = tuple(self.portions.items()), self.model.accrued
        gradient = self.model.take_gradient(mean=self.downpour.accrue == "mean", clip_norm=self.downpour.clip_norm)
        if gradient is None:
            reason = "the gradient is NaN or infinite"
            self.report.refused.append(Refusal(self.report.mini_batches_ever, self.examples, reason))
            self.carried.extend(portions)
            self.all_settled()  # nothing is under way, so they settle now; told at once, they are counted whoever dies
            self.send_report(0.0)
        else:
            self.sequence += 1
            self.pushed = self.examples, mini_batches
            who = (self.index, self.home.incarnation, self.sequence)
            stamps = [
                Stamp(*who, base, self.examples, portions, mini_batches, self.group.index)
                for base in self.base_versions
            ]
            if self.due:
                self.fetching, self.due = self.server.exchange(stamps, gradient, gradient), False
                self.pushing = Pushing(self.fetching, portions)
            else:
                self.pushing = Pushing(self.server.push(stamps, gradient), portions)
        self.portions, self.examples = {}, 0

    def settle(self, pushing: Pushing) -> None:
        """Wait for a push and note what it settles."""
        pushing.future.result()
        self.pushing = None
        self.carried.extend(pushing.portions)

    def flush(self) -> None:
        """Push the remainder, wait for every acknowledgement, and report."""
        if self.pushing is not None or self.model.accrued or self.carried:  # while the job waits for what they settle
            self.model.frozen.check(closely=True)
        if self.pushing is not None:
            self.settle(self.pushing)
        self.adopt(math.inf)
        if self.model.accrued:
            self.push()
        if self.pushing is not None:
            self.settle(self.pushing)
        self.all_settled()
        self.send_buffers(0.0)
        self.send_report(0.0)
        self.hear()

    # towards the coordinator

    def send_report(self, seconds: float) -> None:
        """Report, unless the last report is younger than `seconds` or not answered yet."""
        now = self.home.now()
        if now - self.report.sent < seconds or (seconds and self.reporting and not self.reporting.done()):
            return
        self.hear()
        self.model.frozen.check(closely=False)
        message = self.report.take(self.index, self.home.incarnation, now)
        if self.group.leads:
            self.reporting = self.coordinator.call(DownpourCoordinator.report, message)
        self.send_buffers(BUFFERS_SECONDS)

    def hear(self) -> None:
        """Take the answer to the last report: whether to stop."""
        if self.reporting is not None:
            self.told_to_stop |= self.reporting.result()
            self.reporting = None

    def send_buffers(self, seconds: float) -> None:
        """Send BatchNorm statistics and counters if they changed, unless that was done less than `seconds` ago.

        Until then this replica has no part in the mean: its buffers are the ones that it was given, or constants.
        """
        now, pause = self.home.now(), max(seconds, self.report.buffers_took / BUFFERS_SHARE)
        if seconds and now - self.report.buffers_sent < pause:
            return
        self.report.buffers_sent = now
        own = self.model.part.buffers.values()
        if not all(map(torch.equal, own, self.buffers)):
            self.buffers = [buffer.clone() for buffer in own]
            given = self.model.buffers()
            self.coordinator.call(DownpourCoordinator.take_buffers, self.index, self.group.index, given).result()
        self.report.buffers_took = self.home.now() - now

    def load_buffers(self) -> None:
        """Begin with the mean of the buffers of replicas at work."""
        take_mean_buffers(self.coordinator, self.group.index, self.model.part.buffers)
        self.buffers = [buffer.clone() for buffer in self.model.part.buffers.values()]
