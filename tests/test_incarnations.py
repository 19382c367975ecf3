# SPDX-License-Identifier: Apache-2.0
"""Laws of the roles of a job through their deaths, on an engine that only notes what it is told."""

from typing import Any

import pytest

from distbelief.engine.base import Death
from distbelief.errors import TrainingFailed, UserCodeError
from distbelief.events import AnyEvent, RoleLost, RoleStarted
from distbelief.incarnations import Incarnations
from distbelief.roster import RoleSpec

NAMES = ["shard/0", "replica/0", "replica/1"]
FIRST = 5


class Noted:
    """What is started, stopped, dead and told."""

    def __init__(self, names: list[str] = NAMES) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.dead: list[Death] = []
        self.heard: list[AnyEvent] = []
        self.specs = [RoleSpec(name, dict, (name,)) for name in names]
        engine: Any = self
        self.roles = Incarnations(engine, self.specs, FIRST, self.heard.append)

    def start(self, name: str, incarnation: int, factory: Any, *arguments: Any) -> None:
        self.done.append(("start", name, incarnation, factory, *arguments))

    def stop(self, name: str) -> None:
        self.done.append(("stop", name))

    def deaths(self) -> list[Death]:
        dead, self.dead = self.dead, []
        return dead

    def replace(self, examples: int = 0) -> list[Death]:
        """Who died; each is given up and started again."""
        died = []
        for death in self.roles.deaths(examples):
            died.append(death)
            spec = self.specs[NAMES.index(death.role)]
            self.roles.give_up([spec])
            self.roles.start([spec])
        return died


def test_what_is_left_of_the_dead_is_stopped_before_its_next_incarnation_is_started_and_told_as_back() -> None:
    world = Noted()
    world.roles.start(world.specs[:1])
    death = Death("shard/0", FIRST, "killed by signal 9")
    world.dead.append(death)
    assert world.replace() == [death]
    begun = ("start", "shard/0")
    assert world.done == [
        (*begun, FIRST, dict, "shard/0"), ("stop", "shard/0"), (*begun, FIRST + 1, dict, "shard/0")
    ]  # fmt: skip
    assert world.heard == [
        RoleStarted(role="shard/0", incarnation=FIRST),
        RoleLost(role="shard/0", incarnation=FIRST, reason=death.reason),
        RoleStarted(role="shard/0", incarnation=FIRST + 1, again=True),
    ]  # fmt: skip


def test_numbers_of_incarnations_tell_who_was_replaced_and_are_never_given_twice() -> None:
    world = Noted()
    assert world.roles.replaced(NAMES) == {}
    assert world.roles.next == FIRST + 1
    for incarnation in (FIRST, FIRST + 1):
        world.dead.append(Death("replica/1", incarnation, "gone"))
        world.replace()
        assert world.roles.replaced(NAMES[1:]) == {1: incarnation}
    assert [world.roles.of(name) for name in NAMES] == [FIRST, FIRST, FIRST + 2]
    assert world.roles.next == FIRST + 3


def test_the_death_of_an_incarnation_that_was_replaced_is_no_news() -> None:
    world = Noted()
    world.dead += [Death("shard/0", FIRST, "gone"), Death("shard/0", FIRST, "found dead again")]
    assert [death.reason for death in world.replace()] == ["gone"]
    assert world.replace() == []


def test_who_is_ended_is_stopped_and_found_dead_with_the_reason_in_its_turn() -> None:
    world = Noted()
    world.roles.end("replica/0", FIRST, "not heard of for 60 s")
    world.dead.append(Death("shard/0", FIRST, "gone"))
    assert world.done == [("stop", "replica/0")]
    died = world.roles.deaths(0)
    assert next(died) == Death("replica/0", FIRST, "not heard of for 60 s")
    world.roles.end("replica/1", FIRST, "of no use any more")  # what a death leads to
    assert [death.role for death in died] == ["shard/0", "replica/1"]


@pytest.mark.parametrize(("names", "limit"), [(NAMES, 9), (NAMES[:1], 8)])
def test_deaths_without_an_example_in_between_end_the_job_when_there_were_more_than_three_for_each_role(
    names: list[str], limit: int
) -> None:
    world = Noted(names)
    for examples in (0, 1):  # with an example in between they are counted anew
        for _ in range(limit):
            world.dead.append(Death("shard/0", world.roles.of("shard/0"), "killed by signal 9"))
            assert world.replace(examples)
    world.dead.append(Death("shard/0", world.roles.of("shard/0"), "killed by signal 9"))
    said = rf"{limit + 1} roles died without .* the last was shard/0 \(killed by signal 9\)\.\nhint: look for lack"
    with pytest.raises(TrainingFailed, match=said):
        world.replace(1)
    assert isinstance(world.heard[-1], RoleLost)


def test_an_exception_of_the_users_code_ends_the_job_and_names_the_role() -> None:
    world = Noted()
    world.dead.append(Death("replica/0", FIRST, "", "Traceback\nValueError: no"))
    with pytest.raises(UserCodeError, match=r"Traceback\nValueError: no\nreplica/0 raised the exception above"):
        world.replace()
