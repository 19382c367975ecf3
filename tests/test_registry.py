# SPDX-License-Identifier: Apache-2.0
"""Laws of the registry: what is known of hosts and roles, whatever is lost or comes late on its way."""

from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest

from distbelief.channel.endpoint import Endpoint
from distbelief.channel.futures import Kept
from distbelief.channel.place import Place
from distbelief.engine import registry as module
from distbelief.engine.registry import Introduction, Note, Registry
from distbelief.errors import Fenced

HERE, THERE = (Place(host, host, ("127.0.0.1", 1)) for host in ("host0", "host1"))


class Scene:
    """A registry that two hosts have joined, and its clock."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.registry, self.clock = endpoint, Registry(endpoint), 0.0
        self.hosts = {place.host: Introduction(place.host, place, {}) for place in (HERE, THERE)}

    def sought(self, role: str) -> Kept[Place]:
        promise: Kept[Place] = Kept(self.endpoint)
        self.registry.seek(role, promise)
        return promise


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with closing(Endpoint(b"the key")) as endpoint:
        scene = Scene(endpoint)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: scene.clock))
        for introduction in scene.hosts.values():
            scene.registry.join(introduction)
        yield scene


def test_every_note_of_a_host_is_heard_once_and_in_order_though_beats_are_told_again_and_come_late(
    scene: Scene,
) -> None:
    notes = [Note(f"role/{number}", 0, number) for number in range(8)]
    beats = [(0, 2), (0, 3), (0, 2), (3, 5), (0, 3), (3, 5), (5, 8), (3, 6)]
    heard = []
    for first, stop in beats:
        scene.registry.beat("host0", first, notes[first:stop])
        scene.registry.beat("host1", first, [])
        heard += scene.registry.hear()
    assert heard == [("host0", note) for note in notes]


def test_a_host_that_was_given_up_is_told_so_whenever_it_comes_back_even_by_joining_again(scene: Scene) -> None:
    scene.registry.give_up("host0")
    scene.registry.join(scene.hosts["host0"])
    assert scene.registry.joined() == {"host1": scene.hosts["host1"]}
    for host in ("host0", "unknown"):
        with pytest.raises(Fenced, match=f"host {host} was given up"):
            scene.registry.beat(host, 0, [Note("role/0", 0, 1)])
    assert scene.registry.hear() == []
    assert scene.registry.end() == {"host1": scene.hosts["host1"]}, "who is lost is not waited for"


def test_a_host_is_given_up_once_when_it_was_silent_for_longer_than_that(scene: Scene) -> None:
    scene.clock = 1.0
    scene.registry.beat("host0", 0, [])
    scene.registry.join(scene.hosts["host1"])
    scene.clock = 1.5
    assert scene.registry.give_up_silent(1.5) == []
    scene.clock = 1.6
    assert scene.registry.give_up_silent(1.5) == ["host1"]
    assert scene.registry.give_up_silent(1.5) == []
    assert scene.registry.joined() == {"host0": scene.hosts["host0"]}
    with pytest.raises(Fenced):
        scene.registry.beat("host1", 0, [])


def test_a_role_is_found_where_it_lives_now_and_who_asks_meanwhile_waits(scene: Scene) -> None:
    registry = scene.registry
    early = scene.sought("role/0")
    assert not early.done()
    registry.settle("role/0", HERE)
    assert (early.result(), scene.sought("role/0").result()) == (HERE, HERE)
    registry.unsettle("role/0")
    meanwhile = [scene.sought("role/0") for _ in range(2)]
    assert not any(each.done() for each in meanwhile)
    registry.settle("role/0", THERE)
    assert [each.result() for each in meanwhile] == [THERE, THERE]
    assert (early.result(), scene.sought("role/0").result()) == (HERE, THERE)


def test_hosts_are_told_how_many_roles_live_elsewhere_than_before(scene: Scene) -> None:
    registry, told = scene.registry, []
    for place in (HERE, HERE, THERE, THERE, HERE):
        registry.settle("role/0", place)
        told.append(registry.beat("host0", 0, []))
        registry.unsettle("role/0")
        assert registry.moves == told[-1]
    assert told == [0, 0, 1, 1, 2]
