# SPDX-License-Identifier: Apache-2.0
"""Laws of one replica's examples, against torch's DataLoader over the epoch's permutation."""

import random
import threading
import time
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from conftest import threads
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from distbelief import data_shard
from distbelief.data_shard import DataShard, collect, epoch_order, to_device
from distbelief.engine.base import Home
from distbelief.engine.local import LocalEngine
from distbelief.engine.simulated import SimulatedEngine
from distbelief.errors import ConfigurationError
from distbelief.job import prepare
from distbelief.leases import Lease, Leases
from tests import problems

EXAMPLES, BATCH, SEED = 53, 4, 9
INPUTS = torch.arange(EXAMPLES * 3.0).view(EXAMPLES, 3)
TARGETS = torch.arange(EXAMPLES) * 10


class Pair(NamedTuple):
    """An example with names."""

    image: torch.Tensor
    label: int


class Mapped(Dataset[Any]):
    """A map-style data set that makes an example of an index."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Batched(Mapped):
    """One that is asked for many examples at once, and would notice otherwise."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("asked example by example")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert all(type(index) is int for index in indices)
        return [self.make(index) for index in indices]


def pair(index: int) -> tuple[torch.Tensor, int]:
    return INPUTS[index], int(TARGETS[index])


def named(index: int) -> dict[str, Any]:
    return {"tokens": INPUTS[index], "length": index, "name": f"example {index}"}


def pair_of_names(index: int) -> Pair:
    return Pair(*pair(index))


DATA = {
    "a TensorDataset": TensorDataset(INPUTS, TARGETS),
    "a Subset": Subset(TensorDataset(torch.cat([INPUTS - 1, INPUTS]), torch.cat([TARGETS, TARGETS])),
                       range(EXAMPLES, 2 * EXAMPLES)),
    "a list": [pair(index) for index in range(EXAMPLES)],
    "pairs": Mapped(pair),
    "lone tensors": Mapped(INPUTS.__getitem__),
    "numbers": Mapped(float),
    "dictionaries": Mapped(named),
    "named pairs": Mapped(pair_of_names),
    "many at once": Batched(pair),
    "a Subset of many at once": Subset(Batched(pair), range(EXAMPLES)),
}  # fmt: skip


def flat(batch: Any) -> list[Any]:
    """The leaves of a batch; DataLoader gives a list where the data set gave a tuple."""
    if isinstance(batch, dict):
        return [leaf for key in sorted(batch) for leaf in [key, *flat(batch[key])]]
    return [leaf for part in batch for leaf in flat(part)] if isinstance(batch, tuple | list) else [batch]


def equal(one: Any, other: Any) -> bool:
    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(params=["local", "simulated"])
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    """Where a replica lives; no process is started."""
    with closing(LocalEngine([]) if request.param == "local" else SimulatedEngine()) as engine:
        yield engine


@pytest.fixture
def beside() -> Iterator[Home]:
    """A home with a second thread."""
    with closing(LocalEngine([])) as engine:
        yield engine


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("always_ahead", [False, True])
def test_the_batches_of_all_leases_are_those_of_a_data_loader_over_the_permutation(
    kind: str, always_ahead: bool, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    if always_ahead:
        monkeypatch.setattr(data_shard, "PREFETCH_SECONDS", -1.0)
    data: Any = DATA[kind]
    leases, shard = Leases(EXAMPLES, 3 * BATCH, 2), DataShard(home, data, BATCH, SEED)
    found: list[Any] = []
    order = list(iter(lambda: leases.next(0), None))
    for number, lease in enumerate(order):
        known = order[number + 1] if number + 1 < len(order) and number % 2 else None
        found += [batch for _, _, batch in shard.mini_batches(lease, lambda known=known: known)]  # type: ignore[misc]
    expected = [
        batch
        for epoch in range(2)
        for batch in DataLoader(data, BATCH, sampler=epoch_order(EXAMPLES, SEED, epoch).tolist())
    ]
    assert len(found) == len(expected) == 2 * 14
    for batch, reference in zip(found, expected, strict=True):
        assert equal(batch, reference)
    assert not equal(found[0], found[14])


def test_a_named_pair_stays_one_on_the_way_to_a_device() -> None:
    batch = to_device(collect(DATA["named pairs"], torch.tensor([3, 5])), torch.device("cpu"))
    assert isinstance(batch, Pair)
    assert batch.label.tolist() == [30, 50]  # type: ignore[attr-defined]


def test_everything_in_a_batch_reaches_the_device_and_what_is_no_tensor_stays() -> None:
    batch = {"x": (INPUTS, [TARGETS]), "names": ["a", "b"], "more": OrderedDict(count=3), "pair": Pair(INPUTS, 1)}
    moved = to_device(batch, torch.device("meta"))
    assert [leaf.device.type for leaf in flat(moved) if isinstance(leaf, torch.Tensor)] == ["meta"] * 3
    assert (moved["names"], moved["more"], moved["pair"].label) == (["a", "b"], {"count": 3}, 1)


class Named(dict[str, Any]):
    """Whose items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]  # a KeyError for what is not there, as careless classes raise


class Titled(dict[str, Any]):
    """Made of something else than its items."""

    def __init__(self, title: str = "a title", **items: Any) -> None:
        super().__init__(**items)
        self.title = title


def test_a_dict_of_ones_own_kind_stays_one_on_the_way_to_a_device() -> None:
    moved = to_device(Named(x=INPUTS, count=3), torch.device("meta"))
    assert (moved.x.device.type, moved.count) == ("meta", 3)
    assert to_device(Titled(x=INPUTS), torch.device("cpu")).title == "a title"
    counted = to_device(defaultdict(list, x=INPUTS), torch.device("meta"))
    assert (counted["x"].device.type, counted["y"]) == ("meta", [])


def test_a_tuple_of_tensors_from_getitems_is_the_batch_itself() -> None:
    class Tensors(Batched):
        def __getitems__(self, indices: list[int]) -> Any:
            return INPUTS[indices], TARGETS[indices]

    shard = DataShard(SimulatedEngine(), Tensors(None), BATCH, SEED)
    given = [batch for _, _, batch in shard.mini_batches(Lease(0, 0, 0, EXAMPLES))]
    for inputs, targets in given:
        assert torch.equal(inputs[:, 0] / 3 * 10, targets.float())
    assert torch.equal(torch.cat([targets for _, targets in given]), TARGETS[epoch_order(EXAMPLES, SEED, 0)])


def test_a_mapping_of_tensors_that_is_asked_for_many_at_once_is_the_batch_itself_of_its_kind() -> None:
    class Table(UserDict[str, torch.Tensor]):
        """As a TensorDict: it has columns by name, and rows by number."""

        def __contains__(self, key: object) -> bool:
            assert isinstance(key, str), "names alone"
            return key in self.data

        def __len__(self) -> int:
            return EXAMPLES

        def __getitem__(self, key: Any) -> Any:
            return self.data[key] if isinstance(key, str) else self.__getitems__(key)

        def __getitems__(self, indices: Any) -> Any:
            return Table({name: tensor[indices] for name, tensor in self.data.items()})

    table = Table(x=INPUTS, y=TARGETS)
    prepared, _ = prepare(problems.job(data=table, step=lambda model, batch: model(batch["x"]).mean(), loss=None))
    batch = collect(prepared.data, torch.tensor([7, 3]))
    assert type(batch) is Table
    assert torch.equal(batch["y"], torch.tensor([70, 30]))


def test_sparse_tensors_of_a_data_set_become_a_sparse_mini_batch() -> None:
    inputs, targets = collect(TensorDataset(INPUTS.to_sparse(), TARGETS), torch.tensor([7, 3]))
    assert inputs.is_sparse
    assert torch.equal(inputs.to_dense(), INPUTS[[7, 3]])
    assert targets.tolist() == [70, 30]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(0, EXAMPLES))])
def test_what_the_data_set_raises_names_the_example(wrap: Any) -> None:
    def broken(index: int) -> tuple[torch.Tensor, int]:
        if index in (17, 30):
            raise OSError("image file is truncated")
        return pair(index)

    told = r"^image file is truncated\nraised for example 30 of the data set\nhint: mend the example, or leave it out"
    with pytest.raises(OSError, match=told):
        collect(wrap(Mapped(broken)), torch.tensor([5, 30, 17]))


def test_what_is_followed_by_another_error_names_no_example() -> None:
    """A connection that broke, and afterwards is closed for all examples."""
    asked: list[int] = []

    def broken(index: int) -> Any:
        asked.append(index)
        raise OSError("the connection broke" if len(asked) == 1 else "it is closed")

    with pytest.raises(OSError, match="the connection broke") as raised:
        collect(Mapped(broken), torch.arange(3))
    assert asked == [0, 0]
    assert not hasattr(raised.value, "__notes__")


def test_what_is_raised_once_only_names_no_example() -> None:
    errors = [OSError("timed out")]

    def flaky(index: int) -> tuple[torch.Tensor, int]:
        if errors:
            raise errors.pop()
        return pair(index)

    with pytest.raises(OSError, match="timed out") as caught:
        collect(Mapped(flaky), torch.tensor([5, 30]))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (
            {"x": INPUTS[0, :2], "y": 1},
            r"stack expects each tensor to be equal size, but got \[3\] at entry 0 and \[2\]",
        ),
        ({"x": INPUTS[0]}, "only one of them has 'y'"),
    ],
)
def test_examples_that_do_not_go_together_are_named(odd: dict[str, Any], said: str) -> None:
    data = Mapped(lambda index: odd if index == 17 else {"x": INPUTS[index], "y": 1})
    words = rf"^4 examples cannot be put together as a mini-batch: examples 5 and 17: {said}"
    with pytest.raises(ConfigurationError, match=words):
        collect(data, torch.tensor([5, 30, 17, 2]))


class Fewer(Mapped):
    """Leaves an example out, and has as many as it is said to have."""

    length = EXAMPLES

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices if index != 5]


def test_a_data_set_that_gives_fewer_examples_than_it_is_asked_for_is_refused() -> None:
    given = Fewer(pair)
    assert len(collect(given, torch.tensor([1, 2, 3]))[1]) == 3
    with pytest.raises(ConfigurationError, match="was asked for 3 examples and gave 2\nhint: let __getitems__"):
        collect(given, torch.tensor([4, 5, 6]))


@pytest.mark.parametrize("now", [EXAMPLES - 1, EXAMPLES + 1])
def test_a_data_set_whose_length_changes_is_refused_in_the_next_epoch(now: int) -> None:
    given = Fewer(pair)
    shard = DataShard(SimulatedEngine(), given, 1, SEED)
    for epoch in (0, 0):
        list(shard.mini_batches(Lease(0, epoch, 0, 1)))
    given.length = now
    with pytest.raises(ConfigurationError, match=f"had {EXAMPLES} examples at the beginning and has {now} now"):
        list(shard.mini_batches(Lease(1, 1, 0, 1)))


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, 4, 7)
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, 4, 7))
    assert torch.equal(order.sort().values, torch.arange(1000))
    others = [epoch_order(1000, seed, epoch) for seed in (4, 5) for epoch in (7, 8) if (seed, epoch) != (4, 7)]
    assert not any(torch.equal(order, other) for other in others)
    assert torch.initial_seed() == 2


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as long as the data."""
    drawn: list[int] = []
    monkeypatch.setattr(data_shard, "epoch_order", lambda *given: drawn.append(given[-1]) or epoch_order(*given))
    shard = DataShard(SimulatedEngine(), TensorDataset(TARGETS), BATCH, SEED)
    for lease in (Lease(0, 0, 0, 12), Lease(1, 0, 12, 20), Lease(2, 1, 0, 12)):
        list(shard.mini_batches(lease))
    assert drawn == [0, 1]


def test_a_returned_lease_of_an_earlier_epoch_begins_where_it_was_left() -> None:
    shard = DataShard(SimulatedEngine(), TensorDataset(TARGETS), BATCH, SEED)
    list(shard.mini_batches(Lease(9, 1, 0, 8)))
    rest = list(shard.mini_batches(Lease(2, 0, 22, 32)))
    assert [(position, examples) for position, examples, _ in rest] == [(26, 4), (30, 4), (32, 2)]
    seen = torch.cat([batch[0] for _, _, batch in rest])
    assert torch.equal(seen, TARGETS[epoch_order(EXAMPLES, SEED, 0)[22:32]])


class Slow(Mapped):
    """A data set that takes its time, and notes by which thread it was asked and whether by two at once."""

    def __init__(self, seconds: float) -> None:
        super().__init__(pair)
        self.seconds = seconds
        self.begun: list[threading.Event] = [threading.Event() for _ in range(2 * 14)]
        self.threads: list[str] = []
        self._busy = threading.Lock()

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert self._busy.acquire(blocking=False), "asked by two at once"
        self.begun[len(self.threads)].set()
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        self._busy.release()
        return [self.make(index) for index in indices]


def test_while_a_mini_batch_is_computed_the_next_one_is_prepared_even_that_of_the_next_lease(beside: Home) -> None:
    data = Slow(3 * data_shard.PREFETCH_SECONDS)
    shard, order = DataShard(beside, data, BATCH, SEED), [Lease(0, 0, 0, 8), Lease(1, 0, 8, 10), Lease(7, 1, 20, 31)]
    number = 0
    for lease, following in zip(order, [*order[1:], None], strict=True):
        for position, examples, batch in shard.mini_batches(lease, lambda following=following: following):  # type: ignore[misc]
            number += 1
            last = following is None and position == lease.stop
            assert data.begun[number].wait(0.05 if last else 10.0) != last
            expected = epoch_order(EXAMPLES, SEED, lease.epoch)[position - examples : position]
            assert torch.equal(batch[1], TARGETS[expected])
    assert number == len(data.threads) == 6
    assert len(set(data.threads[1:])) == 1
    assert data.threads[1].startswith("distbelief-background")


def test_what_was_prepared_for_a_lease_that_did_not_come_is_left_out(beside: Home) -> None:
    shard = DataShard(beside, Slow(3 * data_shard.PREFETCH_SECONDS), BATCH, SEED)
    promised, came = Lease(1, 0, 4, 8), Lease(2, 1, 0, 6)
    list(shard.mini_batches(Lease(0, 0, 0, 4), lambda: promised))
    found = torch.cat([batch[1] for _, _, batch in shard.mini_batches(came)])
    assert torch.equal(found, TARGETS[epoch_order(EXAMPLES, SEED, 1)[:6]])


def test_a_data_set_in_memory_is_asked_by_the_replicas_own_thread_alone(beside: Home) -> None:
    shard = DataShard(beside, TensorDataset(INPUTS, TARGETS), BATCH, SEED)
    before = threads()
    assert len(list(shard.mini_batches(Lease(0, 0, 0, EXAMPLES)))) == 14
    assert threads() == before


def test_partitions_draw_the_same_numbers_for_a_mini_batch_whatever_their_models_draw(beside: Home) -> None:
    def noisy(index: int) -> torch.Tensor:
        time.sleep(data_shard.PREFETCH_SECONDS)
        return torch.tensor([torch.rand(()), numpy.random.random(), random.random(), float(index)])

    def epoch(model_draws: int) -> list[torch.Tensor]:
        shard, found = DataShard(beside, Mapped(noisy), BATCH, SEED, draws=3), []
        for lease in (Lease(0, 0, 0, 24), Lease(1, 1, 0, 24)):
            for _, _, batch in shard.mini_batches(lease):
                found.append(batch)
                torch.rand(model_draws)
        return found

    one, other = epoch(0), epoch(7)
    assert all(map(torch.equal, one, other))
    assert len(torch.cat(one)[:, :3].unique()) == 3 * 2 * 24, "of every mini-batch others, also in the next epoch"


def test_the_model_draws_on_as_if_the_data_set_of_a_partition_had_drawn_nothing(beside: Home) -> None:
    shard = DataShard(beside, Mapped(lambda index: torch.rand(3)), BATCH, SEED, draws=3)
    torch.manual_seed(SEED)
    drawn = [torch.rand(2) for _ in shard.mini_batches(Lease(0, 0, 0, 12))]
    torch.manual_seed(SEED)
    assert torch.equal(torch.cat(drawn), torch.rand(6))


def test_a_data_set_that_one_thread_may_ask_is_asked_by_that_one_and_it_is_said_once(beside: Home) -> None:
    asked: list[str] = []

    class Bound(Slow):
        """As a connection of sqlite3."""

        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(threading.current_thread().name)
            if asked[-1] != asked[0]:
                raise ValueError("made in another thread")
            return super().__getitems__(indices)

    shard = DataShard(beside, Bound(3 * data_shard.PREFETCH_SECONDS), BATCH, SEED)
    with pytest.warns(RuntimeWarning, match="made in another thread.*and not in the first") as said:
        found = torch.cat([batch[1] for _, _, batch in shard.mini_batches(Lease(0, 0, 0, 5 * BATCH))])
    assert torch.equal(found, TARGETS[epoch_order(EXAMPLES, SEED, 0)[: 5 * BATCH]])
    assert len(said) == 1
    assert [name == asked[0] for name in asked] == [True, False, True, True, True, True]


@pytest.mark.parametrize("error", [ValueError("broken image"), SystemExit("no more")])
def test_what_the_data_set_raises_is_raised_at_its_mini_batch_and_not_before(beside: Home, error: Exception) -> None:
    class Broken(Slow):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            if len(self.threads) == 3:
                raise error
            return super().__getitems__(indices)

    data = Broken(3 * data_shard.PREFETCH_SECONDS)
    batches = DataShard(beside, data, BATCH, SEED).mini_batches(Lease(0, 0, 0, EXAMPLES))
    for _ in range(3):
        next(batches)
    with pytest.raises(type(error), match=str(error)) as caught:
        next(batches)
    assert caught.traceback[-1].name == "__getitems__"
