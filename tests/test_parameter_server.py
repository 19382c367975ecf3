# SPDX-License-Identifier: Apache-2.0
"""Laws of the parameter server without an engine: calls are encoded and decoded, and run at once in this process."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn, optim

from distbelief import shard_file
from distbelief import update_rule as rules
from distbelief.channel.base import Remote, Signature
from distbelief.engine.insistent import All, Insistent
from distbelief.errors import (
    Behind,
    CheckpointError,
    DeadlineExceeded,
    Fenced,
    NotReady,
    PeerLost,
    ProtocolError,
    RemoteError,
)
from distbelief.parameter_server import ParameterServer, ParameterServerShard, shard_name
from distbelief.parameters import Layout, Piece, Span, cut
from distbelief.progress import Counters
from distbelief.section import LEASES_REMEMBERED, Applied, Awaited, Offer, Stamp
from distbelief.shard_file import ShardFile

LENGTH = 331
START = torch.randn(LENGTH, generator=torch.Generator().manual_seed(5))
RULES = {
    "adagrad": rules.adagrad(0.05),
    "momentum": rules.sgd(0.1, momentum=0.9),
    "adam": rules.adam(0.01),
    "damped with a schedule": rules.adagrad(0.1, schedule=rules.linear_decay(400), damping=0.5),
    "adaptive_revision": rules.adaptive_revision(0.1),
}


@dataclass
class Answer:
    """An answer, or an error, that is here."""

    value: Any = None
    error: Exception | None = None

    def done(self) -> bool:
        return True

    def wait(self, seconds: float) -> bool:
        return True

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class Here(Remote[Any]):
    """A role in this process."""

    def __init__(self, role: Any) -> None:
        self.role = role

    def start(self, signature: Signature, fields: bytes, tensors: list[Tensor]) -> Any:
        value = getattr(self.role, signature.name)(*signature.join(fields, tensors))
        sent = value.result() if hasattr(value, "result") else value
        return Answer(signature.answer_decoder.decode(msgspec.msgpack.encode(sent)))


@dataclass
class FakeHome:
    """A home whose clock moves when somebody sleeps."""

    roles: dict[str, Any] = field(default_factory=dict)
    clock: float = 0.0
    incarnation: int = 0
    strangers: dict[str, int] = field(default_factory=dict)

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    def find(self, role: str, kind: type, deadline_seconds: float = 60.0) -> Any:
        return Here(self.roles[role])

    def background(self, work: Callable[[], Any]) -> Any:
        return Answer(work())

    def lend(self, out: Tensor, own: Tensor) -> None:
        out.copy_(own)

    def end_loans(self, own: Tensor) -> None:
        pass


a_home: Any = FakeHome


def layout(length: int = LENGTH) -> Layout:
    half = length // 2
    pieces = (Piece("a", (half,), Span(0, half)), Piece("b", (length - half,), Span(half, length)))
    return Layout(pieces, torch.float32)


class Servers:
    """All shards, and the replicas' views of them."""

    def __init__(self, rule: Any, shards: int, *, ready: bool = True) -> None:
        self.home, self.spans = a_home(), cut(LENGTH, shards)
        self.shards = [ParameterServerShard(self.home, span, layout(), rule) for span in self.spans]
        self.home.roles = {shard_name(index): shard for index, shard in enumerate(self.shards)}
        if ready:
            for shard, span in zip(self.shards, self.spans, strict=True):
                shard.initialise(0, START[span.start : span.stop])

    def read(self) -> tuple[list[int], Tensor]:
        into = torch.full((LENGTH,), float("nan"))
        return ParameterServer(self.home, self.spans, Span(0, LENGTH)).read(into).result(), into

    def fetch(self, replica: int) -> tuple[list[int], Tensor]:
        into = torch.full((LENGTH,), float("nan"))
        return ParameterServer(self.home, self.spans, Span(0, LENGTH), replica).fetch(into).result(), into

    def push(self, replica: int, sequence: int, base: list[int], gradient: Tensor, incarnation: int = 0) -> list[Any]:
        stamps = [Stamp(replica, incarnation, sequence, version, 32, ((sequence, 32),)) for version in base]
        return ParameterServer(self.home, self.spans, Span(0, LENGTH), replica).push(stamps, gradient).result()

    def snapshot(self, folder: Path) -> list[ShardFile]:
        written = [shard.snapshot(str(folder / f"shard-{i}"), (), True, 0) for i, shard in enumerate(self.shards)]
        return [file for answer in written for file in answer.result()]

    def restore(self, folder: Path, files: list[ShardFile], *, offers: Awaited | None = None) -> None:
        for shard in self.shards:
            shard.restore(str(folder), files, {}, True, offers)

    def state(self) -> dict[str, list[float]]:
        each = [shard._sections[0]._rule.vectors() for shard in self.shards]
        return {name: torch.cat([vectors[name] for vectors in each]).tolist() for name in each[0]}


class ByHand:
    """An update rule without a server, told of every fetch and push."""

    def __init__(self, rule: Any) -> None:
        whole, self.values, self.version = Span(0, LENGTH), START.clone(), 0
        self.bound = rule.bind(self.values, layout().segments(whole), whole)

    def fetch(self, replica: int) -> tuple[list[int], Tensor]:
        self.bound.fetched(replica, self.version)
        return [self.version], self.values

    def push(self, replica: int, sequence: int, base: list[int], gradient: Tensor) -> list[Any]:
        version, self.version = self.version, self.version + 1
        self.bound.apply(gradient, reader=replica, version=version, base_version=base[0], examples=32 * version)
        return [Applied(self.version, version - base[0])]


def gradient(seed: int) -> Tensor:
    return torch.randn(LENGTH, generator=torch.Generator().manual_seed(1000 + seed))


def train(servers: Servers | ByHand, seed: int, pushes: int, sequences: dict[int, int]) -> list[Any]:
    """Three replicas in a random order: each fetches, then pushes from what it fetched, later."""
    draw, base, answers = random.Random(seed), {}, []
    for number in range(pushes):
        replica = draw.randrange(3)
        if replica not in base or draw.random() < 0.5:
            base[replica] = servers.fetch(replica)[0]
        sequences[replica] = sequences.get(replica, 0) + 1
        answers.append(servers.push(replica, sequences[replica], base[replica], gradient(seed * 100 + number)))
    return answers


@pytest.mark.parametrize("same_memory", [False, True])
def test_an_exchange_is_a_push_and_the_fetch_behind_it_however_often_it_is_sent(same_memory: bool) -> None:
    together, apart = Servers(rules.adagrad(0.05), 3), Servers(rules.adagrad(0.05), 3)
    view = ParameterServer(together.home, together.spans, Span(0, LENGTH), 0)
    versions = [0] * 3
    for sequence in range(1, 6):
        gradient = torch.randn(LENGTH, generator=torch.Generator().manual_seed(sequence))
        apart.push(0, sequence, versions, gradient)
        stamps = [Stamp(0, 0, sequence, version, 32, ((sequence, 32),)) for version in versions]
        for _ in range(2):
            sent = gradient.clone()
            into = sent if same_memory else torch.full((LENGTH,), float("nan"))
            versions = view.exchange(stamps, sent, into).result()
            assert versions == [sequence] * 3
            assert torch.equal(into, apart.fetch(0)[1])
    assert together.state() == apart.state()


@pytest.mark.parametrize("seed", range(20))
def test_a_push_is_applied_once_however_often_it_is_sent(seed: int) -> None:
    """Reference: torch.optim over the first arrival of each push."""
    draw, servers = random.Random(seed), Servers(rules.adagrad(0.05), 2)
    parameter = nn.Parameter(START.clone())
    plain = optim.Adagrad([parameter], lr=0.05)
    sent: dict[int, tuple[int, Tensor, list[Any]]] = {}
    repeats = 0
    for number in range(40):
        replica = draw.randrange(3)
        if replica in sent and draw.random() < 0.5:
            sequence, values, answer = sent[replica]
            assert servers.push(replica, sequence, [0, 0], values) == answer
            repeats += 1
            continue
        sequence = sent[replica][0] + 1 if replica in sent else 1
        values = gradient(seed * 100 + number)
        parameter.grad = values.clone()
        plain.step()
        sent[replica] = sequence, values, servers.push(replica, sequence, [0, 0], values)
        versions, found = servers.read()
        assert versions == [number + 1 - repeats] * 2
        torch.testing.assert_close(found, parameter.detach())
    assert repeats > 5
    for (status,) in [shard.status().sections for shard in servers.shards]:
        assert (status.version, status.mini_batches) == (40 - repeats, 40 - repeats)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shards", [1, 2, 5, 64])
def test_any_number_of_shards_equals_the_rule_by_hand_bit_for_bit(rule: str, shards: int) -> None:
    hand, servers = ByHand(RULES[rule]), Servers(RULES[rule], shards)
    for expected, answers in zip(train(hand, 3, 25, {}), train(servers, 3, 25, {}), strict=True):
        assert answers == expected * shards
    assert torch.equal(hand.values, servers.read()[1])
    assert not torch.equal(hand.values, START)


def test_shards_may_apply_the_same_pushes_in_different_orders_each_by_the_rule() -> None:
    pushes, orders = [gradient(0), gradient(1)], [(0, 1), (1, 0)]
    servers, by_hand = Servers(RULES["adam"], 2), [ByHand(RULES["adam"]) for _ in orders]
    for shard, span, order, hand in zip(servers.shards, servers.spans, orders, by_hand, strict=True):
        for replica in order:
            stamp = Stamp(replica, 0, 1, 0, 32, ((replica, 32),))
            shard.push(stamp, pushes[replica][span.start : span.stop])
            hand.push(replica, 1, [0], pushes[replica])
    _, found = servers.read()
    for span, hand in zip(servers.spans, by_hand, strict=True):
        assert torch.equal(found[span.start : span.stop], hand.values[span.start : span.stop])
    assert not torch.equal(by_hand[0].values, by_hand[1].values)


def test_staleness_is_the_pushes_applied_since_the_base_version_was_fetched() -> None:
    servers, draw = Servers(rules.sgd(0.1), 1), random.Random(0)
    base: dict[int, list[int]] = {}
    counted: dict[int, int] = {}
    for version in range(60):
        replica = draw.randrange(4)
        if replica not in base or draw.random() < 0.3:
            base[replica] = servers.fetch(replica)[0]
        staleness = version - base[replica][0]
        counted[staleness] = counted.get(staleness, 0) + 1
        assert servers.push(replica, version + 1, base[replica], gradient(0)) == [Applied(version + 1, staleness)]
    assert servers.shards[0].status().sections[0].staleness == counted
    assert max(counted) > 5


def test_a_fetch_is_one_whole_version_and_stays_as_it_was() -> None:
    servers = Servers(rules.adagrad(0.05), 3)
    history = {0: START.clone()}
    fetched: list[tuple[list[int], Tensor]] = [servers.fetch(0)]
    for version in range(1, 10):
        servers.push(1, version, [version - 1] * 3, gradient(version))
        fetched.append(servers.fetch(0))
        history[version] = fetched[-1][1].clone()
    for versions, found in fetched:
        assert torch.equal(found, history[versions[0]])
        assert len(set(versions)) == 1
    assert len({float(values[0]) for values in history.values()}) == 10


class LateHome(FakeHome):
    """What is lent is read when the loan is ended, as of a body on its way to another host."""

    def __init__(self) -> None:
        super().__init__()
        self.lent: list[tuple[Tensor, Tensor]] = []

    def lend(self, out: Tensor, own: Tensor) -> None:
        self.lent.append((out, own))

    def end_loans(self, own: Tensor) -> None:
        for out, lent in self.lent:
            out.copy_(lent)
        self.lent = []


def test_parameters_that_are_on_their_way_arrive_as_they_were_before_the_next_push_or_offer(tmp_path: Path) -> None:
    home: Any = LateHome()
    first = ParameterServerShard(home, Span(0, LENGTH), layout(), rules.sgd(1.0))
    first.initialise(0, START)
    files = first.snapshot(str(tmp_path / "shard"), (), True, 0).result()
    fetched = torch.full((LENGTH,), float("nan"))
    first.fetch(0, 0, fetched)
    first.push(Stamp(1, 0, 1, 0, 32, ()), gradient(1))
    assert torch.equal(fetched, START)
    second = ParameterServerShard(home, Span(0, LENGTH), layout(), rules.sgd(1.0))
    second.restore(str(tmp_path), files, {}, True, Awaited((0,), 2.0))
    read = torch.full((LENGTH,), float("nan"))
    second.read(0, read)
    second.offer(Offer(0, 0, 1, 32, 1), START - gradient(1))
    assert torch.equal(read, START)


def test_an_incarnation_that_was_fenced_or_replaced_is_refused_and_changes_nothing() -> None:
    servers = Servers(rules.sgd(0.1), 1)
    shard = servers.shards[0]
    servers.push(7, 1, [0], gradient(1))
    servers.push(7, 2, [1], gradient(2))
    assert shard.fence(7, 0) == [{1: 32, 2: 32}]
    assert shard.fence(3, 0) == [{}]
    before = servers.read()[1]
    for replica, sequence in ((7, 2), (7, 3), (3, 1)):
        with pytest.raises(Fenced, match=f"replica {replica} incarnation 0 has been replaced"):
            servers.push(replica, sequence, [2], gradient(3))
    assert torch.equal(servers.read()[1], before)
    servers.push(7, 1, [2], gradient(4), incarnation=1)
    assert shard.fence(7, 0) == [{}]
    with pytest.raises(Fenced):
        servers.push(7, 9, [3], gradient(5))
    assert servers.push(7, 2, [3], gradient(6), incarnation=1) == [Applied(4, 0)]
    # What is said late of an older one lets nobody in again.
    shard.fence(9, 4)
    shard.fence(9, 2)
    with pytest.raises(Fenced):
        servers.push(9, 1, [4], gradient(1), incarnation=3)
    # A newer incarnation fences the older one even where nobody said so.
    servers.push(8, 1, [4], gradient(1), incarnation=4)
    with pytest.raises(Fenced):
        servers.push(8, 2, [5], gradient(2), incarnation=3)
    assert servers.push(8, 2, [5], gradient(3), incarnation=4) == [Applied(6, 0)]


def test_of_each_replica_the_positions_of_its_latest_leases_are_remembered() -> None:
    servers = Servers(rules.sgd(0.1), 1)
    for number in range(1, LEASES_REMEMBERED + 7):
        servers.push(0, number, [0], gradient(0))
    assert servers.shards[0].fence(0, 0) == [dict.fromkeys(range(7, LEASES_REMEMBERED + 7), 32)]


def test_a_vector_of_another_length_is_refused_and_changes_nothing() -> None:
    servers = Servers(rules.sgd(0.1), 1)
    (shard,), short = servers.shards, torch.full((3,), 5.0)
    for call in (
        lambda: shard.fetch(0, 0, short), lambda: shard.push(Stamp(0, 0, 1, 0, 32, ()), short),
        lambda: shard.exchange(Stamp(0, 0, 1, 0, 32, ()), START, short), lambda: shard.offer(Offer(0, 0, 9), short),
    ):  # fmt: skip
        with pytest.raises(ProtocolError, match=r"3 numbers for the section 0\.\.331, which has 331"):
            call()
    assert servers.read()[0] == [0]
    assert torch.equal(servers.read()[1], START)


def test_a_shard_without_parameters_answers_that_it_is_not_ready(tmp_path: Path) -> None:
    servers = Servers(rules.adagrad(0.1), 1, ready=False)
    shard = servers.shards[0]
    calls: list[Callable[[], Any]] = [
        servers.read, lambda: servers.push(0, 1, [0], gradient(0)), lambda: shard.fence(0, 0),
        lambda: shard.snapshot(str(tmp_path / "shard"), (), True, 0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(NotReady, match=r"shard 0\.\.331 waits for its parameters"):
            call()
    assert shard.status().sections[0].version == 0
    shard.initialise(0, START)
    assert torch.equal(servers.read()[1], START)


def test_a_shard_that_cannot_write_says_which_one_it_is_and_where(tmp_path: Path) -> None:
    servers = Servers(rules.adagrad(0.1), 1)
    servers.home.name, servers.home.address = "shard/0", "10.0.0.3"
    with pytest.raises(OSError, match=r"^shard/0 at 10\.0\.0\.3: .*No such file"):
        servers.snapshot(tmp_path / "nowhere")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that whoever reads it is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("shards", "again"), [(1, 3), (3, 1), (3, 3), (2, 5), (5, 2)])
def test_a_restore_on_any_number_of_shards_goes_on_bit_for_bit(
    rule: str, shards: int, again: int, tmp_path: Path
) -> None:
    """Including Adam's step, the schedule's examples and, after the replicas' next fetch, AdaptiveRevision's delays."""
    first, second = Servers(RULES[rule], shards), Servers(RULES[rule], again, ready=False)
    sequences: dict[int, int] = {}
    train(first, 1, 12, sequences)
    second.restore(tmp_path, first.snapshot(tmp_path))
    assert torch.equal(first.read()[1], second.read()[1])
    assert first.state() == second.state()
    assert first.shards[0]._sections[0]._rule.scalars() == second.shards[0]._sections[0]._rule.scalars()
    assert [shard.status().sections[0].mini_batches for shard in second.shards] == [12] * again
    # Another cut knows nothing of single pushes, since a span may hold fewer of them than another did.
    for shard in second.shards:
        kept = first.shards[0]._sections[0]._state.replicas if shards == again else {}
        assert shard._sections[0]._state.replicas == kept
    ours = train(first, 2, 12, dict(sequences))
    theirs = train(second, 2, 12, dict(sequences))
    assert [answer[0] for answer in ours] == [answer[0] for answer in theirs]
    assert torch.equal(first.read()[1], second.read()[1])


@pytest.mark.parametrize("offers", [None, Awaited((1,), 2.0)])
def test_a_checkpoint_that_is_given_again_undoes_nothing(offers: Awaited | None, tmp_path: Path) -> None:
    """Who gave it may not have heard the answer."""
    before, after = Servers(rules.sgd(0.1), 1), Servers(rules.sgd(0.1), 1, ready=False)
    before.push(0, 1, [0], gradient(0))
    files, (shard,) = before.snapshot(tmp_path), after.shards
    assert shard.restore(str(tmp_path), files, {}, True, offers) == [1]
    if offers is not None:
        shard.offer(Offer(1, 0, 1), before.read()[1])
    after.push(0, 2, [1], gradient(1))
    versions, values = after.read()
    assert shard.restore(str(tmp_path), files, {}, True, offers) == [1]
    assert after.fetch(0)[0] == versions == [2]
    assert torch.equal(after.read()[1], values)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pushed", [0, 1])
def test_a_shard_that_was_never_pushed_to_is_restored_beside_one_that_was(pushed: int, tmp_path: Path) -> None:
    first, second = Servers(rules.adam(0.01), 2), Servers(rules.adam(0.01), 3, ready=False)
    span, expected = first.spans[pushed], torch.zeros(LENGTH)
    first.shards[pushed].push(Stamp(0, 0, 1, 0, 32, ()), gradient(1)[span.start : span.stop])
    expected[span.start : span.stop] = first.shards[pushed]._sections[0]._rule.vectors()["exp_avg"]
    second.restore(tmp_path, first.snapshot(tmp_path))
    moments = torch.cat([shard._sections[0]._rule.vectors().get("exp_avg", torch.zeros(len(span)))
                         for shard, span in zip(second.shards, second.spans, strict=True)])  # fmt: skip
    assert torch.equal(moments, expected)
    second.push(0, 2, [1, 1, 1], gradient(2))
    assert second.read()[1].isfinite().all()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("same_cut", [True, False])
def test_a_restored_shard_counts_exactly_the_acknowledged_pushes_that_it_lost(
    seed: int, same_cut: bool, tmp_path: Path
) -> None:
    """In a run that began on another cut, every push since then is lost with the shard; replicas go on counting."""
    draw, old = random.Random(seed), Servers(rules.adagrad(0.1), 1 if same_cut else 2)
    sequences: dict[int, int] = {}
    train(old, seed, draw.randrange(10), sequences)
    files = old.snapshot(tmp_path)
    live, incarnation = old, 0
    if not same_cut:
        live, incarnation, sequences = Servers(rules.adagrad(0.1), 1, ready=False), 1, {}
        live.restore(tmp_path, files)
    lost = draw.randrange(10)
    for _ in range(lost):
        replica = draw.randrange(3)
        sequences[replica] = sequences.get(replica, 0) + 1
        live.push(replica, sequences[replica], [0], gradient(1), incarnation)
    again = Servers(rules.adagrad(0.1), 1, ready=False)
    again.restore(tmp_path, files)
    for replica in draw.sample(range(3), 3):
        # What had been sent and not acknowledged is sent again, some of it twice, and is not lost.
        for _ in range(draw.randint(1, 2)):
            again.push(replica, sequences.get(replica, 0) + 1, [0], gradient(2), incarnation)
    assert again.shards[0].status().sections[0].lost_updates == lost


@dataclass
class Puller:
    """A replica that pushes one-hot gradients under plain SGD, so that each coordinate counts one push of somebody."""

    number: int
    version: int = -1
    fetched: Tensor = field(default_factory=lambda: torch.zeros(LENGTH))
    sequence: int = 0
    unanswered: tuple[Stamp, Tensor] | None = None

    def fetch(self, shard: ParameterServerShard) -> None:
        into = torch.empty(LENGTH)
        self.version, self.fetched = shard.fetch(self.number, 0, into), into

    def begin(self, coordinate: int) -> tuple[Stamp, Tensor]:
        self.sequence += 1
        one = torch.zeros(LENGTH)
        one[coordinate] = 1.0
        self.unanswered = Stamp(self.number, 0, self.sequence, self.version, 32, ()), one
        return self.unanswered

    def repeat(self) -> tuple[Stamp, Tensor]:
        assert self.unanswered is not None
        self.unanswered = msgspec.structs.replace(self.unanswered[0], again=True), self.unanswered[1]
        return self.unanswered

    def offer(self) -> tuple[Offer, Tensor]:
        return Offer(self.number, 0, self.version, 32, 1), self.fetched


def live(shard: ParameterServerShard, pullers: list[Puller], steps: int, draw: random.Random, numbers: Any) -> set[int]:
    """Replicas fetch and push, each push before its next one; answers may be lost. Which pushes are new."""
    new: set[int] = set()
    for _ in range(steps):
        puller = draw.choice(pullers)
        if puller.unanswered is not None:
            shard.push(*puller.repeat())
            puller.unanswered = None
        if puller.version < 0 or draw.random() < 0.5:
            puller.fetch(shard)
        shard.push(*puller.begin(coordinate := next(numbers)))
        new.add(coordinate)
        if draw.random() < 0.8:
            puller.unanswered = None
    return new


@pytest.mark.parametrize("seed", range(150))
def test_a_shard_that_came_back_takes_what_was_fetched_and_no_push_counts_twice(seed: int, tmp_path: Path) -> None:
    draw, numbers, counters = random.Random(seed), itertools.count(), Counters()
    pullers, servers = [Puller(number) for number in range(3)], Servers(rules.sgd(1.0), 1, ready=False)
    servers.shards[0].initialise(0, torch.zeros(LENGTH))
    folder, files, kept = tmp_path, servers.snapshot(tmp_path), 0
    last: set[int] = set()
    deaths, told = draw.randint(1, 3), True
    for life in range(1, deaths + 1):
        (shard,) = servers.shards
        for part in range(2):
            last = live(shard, pullers, draw.randrange(10), draw, numbers)
            if part == 0 and draw.random() < 0.4:
                folder = tmp_path / str(life)
                folder.mkdir()
                files, kept = servers.snapshot(folder), shard.status().sections[0].version
        for puller in pullers:  # what is under way when the shard dies was applied there, or not, or never arrived
            if puller.unanswered is None and puller.version >= 0 and draw.random() < 0.5:
                puller.begin(next(numbers))
        if draw.random() < 0.9:
            counters.update([shard.status()])
        else:
            told = False  # the coordinator does not know what this life had
        servers = Servers(rules.sgd(1.0), 1, ready=False)
        servers.home.incarnation = life
        awaited = draw.sample(range(4), draw.randint(1, 4))
        servers.restore(folder, files, offers=Awaited(tuple(awaited), 2.0))
        counters.restored(0, [kept])
        (shard,) = servers.shards
        with pytest.raises(Behind, match=rf"incarnation {life} came back from a checkpoint at version {kept}"):
            pullers[0].fetch(shard)
        offered = draw.sample(pullers, draw.randint(1, 3))
        for puller in offered:
            shard.offer(*puller.offer())
        if not {puller.number for puller in offered}.issuperset(awaited):
            with pytest.raises(Behind):
                pullers[0].fetch(shard)
            servers.home.clock += 0.3 if any(puller.version >= 0 for puller in offered) else 3.0
        assert shard.status().sections[0].version == max(kept, *(puller.version for puller in offered))
        for puller in draw.sample(pullers, draw.randrange(3)):
            puller.fetch(shard)
            shard.offer(*puller.offer())  # too late
    last = live(shard, pullers, 10, draw, numbers)
    for puller in pullers:
        if puller.unanswered is not None:
            shard.push(*puller.repeat())
    counts = -servers.read()[1][: next(numbers)]
    assert set(counts.tolist()) <= {0.0, 1.0}
    assert all(counts[coordinate] == 1.0 for coordinate in last)
    counters.update([shard.status()])
    missing, unsure = int((counts == 0).sum()), 3 * deaths  # of each replica a push, at each death
    if told:
        assert missing - unsure <= counters.lost_updates <= missing + unsure


@pytest.mark.parametrize("offers", [Awaited((0, 1), 2.0), None])  # None with local_rate, and where numbers are rounded
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_gradient_over_which_a_dead_shard_may_have_answered_is_lost_and_not_applied(
    exchanges: bool, offers: Awaited | None, tmp_path: Path
) -> None:
    before = Servers(rules.sgd(1.0), 1)
    one, two, into = Puller(0), Puller(1), torch.empty(LENGTH)
    for puller in (one, two):
        puller.fetch(before.shards[0])
    files, after = before.snapshot(tmp_path), Servers(rules.sgd(1.0), 1, ready=False)
    one.begin(7)
    if exchanges:  # applied and answered, but for the end: what is sent again begins with parameters
        stamp, sent = one.unanswered or one.begin(7)
        before.shards[0].exchange(stamp, sent, sent)
    after.restore(tmp_path, files, offers=offers)
    for puller in (one, two):
        after.shards[0].offer(*puller.offer())
    stamp, sent = one.repeat()
    after.shards[0].exchange(stamp, sent, into) if exchanges else after.shards[0].push(stamp, sent)
    expected = START.clone()
    expected[7] -= 0.0 if exchanges else 1.0
    assert torch.equal(after.read()[1], expected)
    assert after.shards[0].status().sections[0].lost_updates == int(exchanges)
    # Whom this life has heard of sends again what it alone can have answered.
    one.begin(8)
    stamp, sent = one.repeat()
    after.shards[0].exchange(stamp, sent, into)
    expected[8] -= 1.0
    assert torch.equal(into, expected)
    assert after.shards[0].status().sections[0].lost_updates == int(exchanges)


def test_a_replica_that_has_just_been_started_does_not_end_the_wait_for_another_one(tmp_path: Path) -> None:
    """It has nothing; the other one is in the midst of a mini-batch."""
    before = Servers(rules.sgd(1.0), 1, ready=False)
    before.shards[0].initialise(0, torch.zeros(LENGTH))
    files, at_work = before.snapshot(tmp_path), Puller(0)
    before.shards[0].push(*at_work.begin(7))
    at_work.fetch(before.shards[0])
    after = Servers(rules.sgd(1.0), 1, ready=False)
    after.restore(tmp_path, files, offers=Awaited((0,), 2.0))
    after.shards[0].offer(*Puller(1).offer())
    after.home.clock += 1.9
    with pytest.raises(Behind):
        at_work.fetch(after.shards[0])
    after.shards[0].offer(*at_work.offer())
    at_work.fetch(after.shards[0])
    assert float(after.read()[1][7]) == -1.0


def test_what_was_taken_has_its_squares_in_the_sums_of_adagrad(tmp_path: Path) -> None:
    """Else the steps after it would be as large as the first ones, which have nothing behind them."""
    before = Servers(rules.adagrad(0.1), 1)
    files = before.snapshot(tmp_path)
    for number in range(40):
        before.push(0, number + 1, [number], gradient(number))
    versions, fetched = before.fetch(0)
    after = Servers(rules.adagrad(0.1), 1, ready=False)
    after.restore(tmp_path, files, offers=Awaited((0,), 2.0))
    after.shards[0].offer(Offer(0, 0, versions[0], 32, 1), fetched)
    for servers in (before, after):
        servers.push(0, 41, versions, gradient(40))
    undisturbed, disturbed = ((servers.read()[1] - fetched).abs().mean() for servers in (before, after))
    assert float(disturbed) < 2 * float(undisturbed) < 0.1 / 2


def test_the_squares_of_what_was_taken_are_counted_once_and_are_those_of_the_first_push_after_it(
    tmp_path: Path,
) -> None:
    before = Servers(rules.adagrad(0.1), 1)
    before.push(0, 1, [0], gradient(0))
    files, after = before.snapshot(tmp_path), Servers(rules.adagrad(0.1), 1, ready=False)
    after.restore(tmp_path, files, offers=Awaited((0,), 2.0))
    after.shards[0].offer(Offer(0, 0, 4, 32, 1), START)  # three pushes that the checkpoint does not hold
    for number in range(1, 4):
        after.push(0, 4 + number, [3 + number], gradient(number))
    squares = [gradient(number).square() for number in range(4)]
    expected = squares[0] + 4 * squares[1] + squares[2] + squares[3]
    assert torch.allclose(torch.tensor(after.state()["sum"]), expected)
    (tmp_path / "again").mkdir()
    (file,) = after.snapshot(tmp_path / "again")
    state = shard_file.read_state(tmp_path / "again" / file.name)
    assert (state.version, state.examples, state.mini_batches) == (7, 7 * 32, 7)


def test_the_next_life_knows_that_what_it_restores_may_hold_a_push_without_a_record(tmp_path: Path) -> None:
    first = Servers(rules.sgd(1.0), 1, ready=False)
    first.shards[0].initialise(0, torch.zeros(LENGTH))
    files = first.snapshot(tmp_path)
    one, two = Puller(0), Puller(1)
    two.fetch(first.shards[0])
    first.shards[0].push(*two.begin(7))  # applied; the answer is lost
    one.fetch(first.shards[0])
    second = Servers(rules.sgd(1.0), 1, ready=False)
    second.restore(tmp_path, files, offers=Awaited((0, 1), 2.0))
    second.shards[0].offer(*one.offer())
    second.home.clock += 0.3
    (tmp_path / "again").mkdir()
    again = second.snapshot(tmp_path / "again")  # before the second replica is heard of
    third = Servers(rules.sgd(1.0), 1, ready=False)
    third.restore(tmp_path / "again", again, offers=Awaited((2,), 2.0))
    third.shards[0].offer(*Puller(2).offer())
    third.shards[0].push(*two.repeat())
    assert float(third.read()[1][7]) == -1.0


def taken_after_a_death(folder: Path) -> tuple[list[ShardFile], Servers]:
    """Three pushes, the first in a checkpoint, and the second regained: the third is lost; then the fourth."""
    first, second = Servers(rules.sgd(1.0), 1), Servers(rules.sgd(1.0), 1, ready=False)
    first.push(0, 1, [0], gradient(1))
    files = first.snapshot(folder)
    first.push(0, 2, [1], gradient(2))
    versions, fetched = first.fetch(0)
    first.push(0, 3, versions, gradient(3))
    second.restore(folder, files, offers=Awaited((0,), 2.0))
    second.shards[0].offer(Offer(0, 0, versions[0], 32, 1), fetched)
    second.push(0, 4, [0], gradient(4))
    (folder / "again").mkdir()
    return second.snapshot(folder / "again"), second


@pytest.mark.parametrize("shards", [1, 3])
def test_what_was_lost_and_regained_and_how_stale_pushes_were_is_counted_on_after_a_restore(
    shards: int, tmp_path: Path
) -> None:
    files, before = taken_after_a_death(tmp_path)
    after = Servers(rules.sgd(1.0), shards, ready=False)
    after.restore(tmp_path / "again", files)
    known = before.shards[0].status().sections[0]
    assert (known.lost_updates, known.staleness) == (1, {0: 1, 2: 1})
    for shard in after.shards:
        (status,) = shard.status().sections
        assert status == msgspec.structs.replace(known, regained=0)
    after.push(0, 1, [3] * shards, gradient(5), incarnation=1)
    assert {shard.status().sections[0].lost_updates for shard in after.shards} == {1}


@pytest.mark.parametrize("shards", [1, 3])
def test_after_a_resume_a_push_that_is_sent_again_is_applied(shards: int, tmp_path: Path) -> None:
    """The connection broke on its way. What was taken before, of replicas that are gone, does not hold it."""
    files, _ = taken_after_a_death(tmp_path)
    after = Servers(rules.sgd(1.0), shards, ready=False)
    after.restore(tmp_path / "again", files)
    stamps = [Stamp(1, 1, 1, 3, 32, (), again=True)] * shards
    answers = ParameterServer(after.home, after.spans, Span(0, LENGTH), 1).push(stamps, gradient(5)).result()
    assert answers == [Applied(4, 0)] * shards


def test_what_a_death_loses_of_a_run_that_went_on_from_another_algorithm_is_counted_from_the_start(
    tmp_path: Path,
) -> None:
    files = Servers(rules.adagrad(0.1), 1).snapshot(tmp_path)
    after = Servers(rules.sgd(1.0), 1, ready=False)
    after.shards[0].restore(str(tmp_path), files, {}, False, Awaited((0,), 2.0))
    after.shards[0].offer(Offer(0, 0, -1), START)
    after.home.clock += 2.1
    after.push(0, 3, [0], gradient(3))
    assert after.shards[0].status().sections[0].lost_updates == 2


def test_a_restore_that_cannot_give_the_whole_span_or_is_of_another_rule_says_so(tmp_path: Path) -> None:
    files, servers = Servers(rules.adagrad(0.1), 2).snapshot(tmp_path), Servers(rules.adagrad(0.1), 1, ready=False)
    with pytest.raises(CheckpointError, match=r"\nhint: resume with the rule of the checkpoint"):
        Servers(rules.adam(0.1), 1, ready=False).restore(tmp_path, files)
    for given, message in (([], "lacks 331 of the 331"), (files[:1], "lacks 166 of"), (files, "cannot be read")):
        (tmp_path / files[1].name).write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match=message):
            servers.restore(tmp_path, given)
        with pytest.raises(NotReady):
            servers.read()


@pytest.mark.parametrize(("rule", "vectors"), [(rules.sgd(0.1), 0), (rules.adagrad(0.1), 1), (rules.adam(0.1), 2)])
def test_a_shard_holds_its_span_once_and_once_more_per_vector_of_state(rule: Any, vectors: int) -> None:
    servers = Servers(rule, 3)
    train(servers, 0, 3, {})
    for shard, span in zip(servers.shards, servers.spans, strict=True):
        own = [shard._sections[0]._parameters, *shard._sections[0]._rule.vectors().values()]
        assert [tensor.untyped_storage().nbytes() for tensor in own] == [4 * len(span)] * (1 + vectors)


@pytest.mark.parametrize("error", [PeerLost("gone"), DeadlineExceeded("late"), NotReady("new")])
@pytest.mark.parametrize("poll", [True, False])
def test_a_call_whose_peer_was_lost_is_made_again_until_it_is_answered(error: Exception, poll: bool) -> None:
    home, answers = a_home(), iter([Answer(error=error)] * 3 + [Answer(8)])
    call: Insistent[Any] = Insistent(home, lambda: next(answers))
    while poll and not call.done():
        home.sleep(0.01)
    assert call.result() == call.result() == 8
    assert 0.02 + 0.04 + 0.08 <= home.now() < 0.2


def test_waiting_for_a_lost_call_takes_no_longer_than_asked_for() -> None:
    home = a_home()
    call: Insistent[Any] = Insistent(home, lambda: Answer(error=PeerLost("gone")))
    assert not call.wait(2.0)
    assert 2.0 <= home.now() < 2.2
    both: All[Any] = All(home, [Answer(1), call])
    assert not both.done()
    assert not both.wait(2.0)
    assert 4.0 <= home.now() < 4.3


@pytest.mark.parametrize("error", [Fenced("replaced"), RemoteError("raised")])
def test_an_error_of_the_method_itself_is_raised_at_once(error: Exception) -> None:
    home = a_home()
    call: Insistent[Any] = Insistent(home, lambda: Answer(error=error))
    assert call.done()
    with pytest.raises(type(error)):
        call.result()
    assert home.now() == 0
