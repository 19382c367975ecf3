# SPDX-License-Identifier: Apache-2.0
"""The engine seam: where roles live and die.

A role is a plain class whose constructor takes its `Home` first. Its exported methods answer calls; its `run` method,
if it has one, is its own activity and the role ends when it returns. An activity waits only for futures and for
`Home.sleep`; while it waits, its exported methods may be called. Exported methods never wait.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from distbelief.channel.base import Future, Promise, Remote

R = TypeVar("R")
T = TypeVar("T")

COORDINATOR = "coordinator"
UNTIL_LOST_SECONDS = 1e6
"""Deadline of calls that end with the peer only: the coordinator may be paused (Ctrl-Z), and when it dies, roles end by
themselves; a shard may be busy with a checkpoint, or far away, and when it hangs the coordinator ends it."""


class Home(Protocol):
    """The engine as one role sees it."""

    @property
    def name(self) -> str:
        """The role's name, such as "replica/3"."""

    @property
    def incarnation(self) -> int:
        """How many times the role was started before."""

    @property
    def address(self) -> str:
        """The address at which other hosts of the job reach this one; loopback where there are none."""

    @property
    def strangers(self) -> Mapping[str, int]:
        """How many callers were refused here, by what they did."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Wait; meanwhile exported methods are answered."""

    def find(self, role: str, kind: type[R], deadline_seconds: float = 60.0) -> Remote[R]:
        """A reference to another role of the job by name; the name is resolved at each connection."""

    def computing(self, examples: int) -> AbstractContextManager[None]:
        """Within it the role computes a mini-batch of so many examples.

        The simulated engine charges modelled time for it; a role slowed by script waits at its end.
        """

    def background(self, work: Callable[[], T]) -> Future[T]:
        """Do blocking work (a file to disk) beside the role."""

    def promise(self) -> Promise[Any]:
        """A future that this role completes itself."""

    def lend(self, out: torch.Tensor, own: torch.Tensor) -> None:
        """For an exported method: fill its `Out` argument with the role's own memory, both of one shape (n,).

        The copy may be spared. So `own` is not changed from then on before `end_loans` was called with this tensor.
        """

    def end_loans(self, own: torch.Tensor) -> None:
        """The role is about to change `own`. Cheap when nothing of it is lent; never waits."""

    def allocate(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed CPU tensor of shape (length,) that calls to roles of this host hand over without a copy."""


@dataclass(frozen=True)
class Death:
    """A role that ended without being told to."""

    role: str
    incarnation: int
    reason: str
    failure: str | None = None
    """The traceback, when the role's own code or the user's raised; None when the process was ended from outside."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Trouble by script, for tests, benchmarks and scale studies; every engine follows it."""

    slow: Mapping[str, float] = field(default_factory=dict)
    """Role -> how many times longer its computing takes: the processor time of the thread that computes. That others
    hold its core meanwhile is slowed no further, and neither is what an accelerator takes."""
    kill: tuple[tuple[float, str], ...] = ()
    """(seconds after the start, role): end it as kill -9 would."""
    hang: tuple[tuple[float, float, str], ...] = ()
    """(from, until, role) in seconds after the start: stop it as kill -STOP would, and let it go on."""


class Engine(Home, Protocol):
    """The coordinator's view: it lives in the user's process and starts all other roles."""

    def load(
        self, prepare: Callable[..., tuple[Any, T]], *arguments: Any, attempt: Callable[[Any], object] | None = None
    ) -> T:
        """Run `prepare(*arguments)` where roles are born and keep its first result there for arguments named SHARED.

        `attempt`, given that first result, is what roles will do, tried once where it can harm none of them: only what
        it raises comes of it. Returns the second result. Raises a DistbeliefError that they raised, and UserCodeError
        for anything else.
        """

    def answer(self, role: object) -> None:
        """Let `role` answer calls to the coordinator."""

    def start(self, name: str, incarnation: int, factory: Callable[..., Any], *arguments: Any) -> None:
        """Start `factory(home, *arguments)` as the role `name`. Returns at once; calls to the role wait for it."""

    def stop(self, name: str) -> None:
        """End a role for good, as kill -9 would; it does not count as a death."""

    def deaths(self) -> list[Death]:
        """The roles that ended by themselves since this was last asked; one whose `run` returned is not among them."""

    def close(self) -> None:
        """End every role and give back everything: processes, sockets, memory."""
