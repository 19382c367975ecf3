# SPDX-License-Identifier: Apache-2.0
"""Which incarnation of each role is the present one: roles are started, given up, and found dead here."""

from collections.abc import Callable, Iterator, Sequence

from distbelief import events
from distbelief.engine.base import Death, Engine
from distbelief.errors import TrainingFailed, UserCodeError
from distbelief.leases import Failures
from distbelief.roster import RoleSpec


class Incarnations:
    """The roles of a job through all their deaths. A death of an incarnation that is not the present one is no news."""

    def __init__(
        self, engine: Engine, roles: Sequence[RoleSpec], first: int, emit: Callable[[events.AnyEvent], None]
    ) -> None:
        """All roles begin at the incarnation `first`."""
        self._engine, self._emit = engine, emit
        self._present = {spec.name: first for spec in roles}
        self._first = first
        self._failures = Failures(limit=max(8, 3 * len(roles)))
        self._dead: list[Death] = []

    def of(self, role: str) -> int:
        """The present incarnation of a role, which runs or is about to be started."""
        return self._present[role]

    @property
    def next(self) -> int:
        """Higher than every incarnation there has been."""
        return max(self._present.values()) + 1

    def replaced(self, roles: Sequence[str]) -> dict[int, int]:
        """By the index of the role, the newest incarnation that is given up, for those that died at least once."""
        newest = {index: self._present[role] - 1 for index, role in enumerate(roles)}
        return {index: incarnation for index, incarnation in newest.items() if incarnation >= self._first}

    def start(self, members: Sequence[RoleSpec]) -> None:
        """Start the present incarnation of each of these roles."""
        for member in members:
            incarnation = self._present[member.name]
            self._engine.start(member.name, incarnation, member.factory, *member.arguments)
            again = incarnation > self._first
            self._emit(events.RoleStarted(role=member.name, incarnation=incarnation, again=again))

    def give_up(self, members: Sequence[RoleSpec]) -> None:
        """End what is left of these roles; the next incarnation of each is the present one from now on."""
        for member in members:
            self._engine.stop(member.name)
            self._present[member.name] += 1

    def end(self, role: str, incarnation: int, reason: str) -> None:
        """End a role that is of no use any more; it is found dead with this reason."""
        self._engine.stop(role)
        self._dead.append(Death(role, incarnation, reason))

    def deaths(self, examples: int) -> Iterator[Death]:
        """Who died since this was asked; what a death leads to may lead to more of them.

        `examples` are those applied by now. Raises UserCodeError when a role died of an exception in the user's code,
        and TrainingFailed when one role after another dies and no example is finished in between.
        """
        self._dead.extend(self._engine.deaths())
        while self._dead:
            death = self._dead.pop(0)
            if death.incarnation != self._present[death.role]:
                continue
            if death.failure is not None:
                raise UserCodeError(f"{death.failure}\n{death.role} raised the exception above; the job was stopped")
            self._emit(events.RoleLost(role=death.role, incarnation=death.incarnation, reason=death.reason))
            if self._failures.died(examples):
                raise TrainingFailed(
                    f"{self._failures.limit + 1} roles died without an example being finished in between; the last was "
                    f"{death.role} ({death.reason}).\n"
                    "hint: look for lack of memory (dmesg), and for examples that crash a library; then resume the run"
                )
            yield death
