# SPDX-License-Identifier: Apache-2.0
"""Laws of one replica's examples, against torch's DataLoader over the epoch's permutation."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from distbelief.data_shard import DataShard, collect, epoch_order, to_device
from distbelief.portions import Lease, Leases

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


@pytest.mark.parametrize("kind", DATA)
def test_the_batches_of_all_leases_are_those_of_a_data_loader_over_the_permutation(kind: str) -> None:
    data: Any = DATA[kind]
    leases, shard = Leases(EXAMPLES, 3 * BATCH, 2), DataShard(data, BATCH, SEED)
    found: list[Any] = []
    while lease := leases.next(0):
        found += [batch for _, _, batch in shard.mini_batches(lease)]
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


def test_a_tuple_of_tensors_from_getitems_is_the_batch_itself() -> None:
    class Tensors(Batched):
        def __getitems__(self, indices: list[int]) -> Any:
            return INPUTS[indices], TARGETS[indices]

    for _, _, batch in DataShard(Tensors(None), BATCH, SEED).mini_batches(Lease(0, 0, 0, EXAMPLES)):
        assert torch.equal(batch[0][:, 0] / 3 * 10, batch[1].float())


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, 4, 7)
    torch.manual_seed(2)
    assert torch.equal(order, epoch_order(1000, 4, 7))
    assert torch.equal(order.sort().values, torch.arange(1000))
    others = [epoch_order(1000, seed, epoch) for seed in (4, 5) for epoch in (7, 8) if (seed, epoch) != (4, 7)]
    assert not any(torch.equal(order, other) for other in others)
    assert torch.initial_seed() == 2


def test_a_returned_lease_of_an_earlier_epoch_begins_where_it_was_left() -> None:
    shard = DataShard(TensorDataset(TARGETS), BATCH, SEED)
    list(shard.mini_batches(Lease(9, 1, 0, 8)))
    rest = list(shard.mini_batches(Lease(2, 0, 22, 32)))
    assert [(position, examples) for position, examples, _ in rest] == [(26, 4), (30, 4), (32, 2)]
    seen = torch.cat([batch[0] for _, _, batch in rest])
    assert torch.equal(seen, TARGETS[epoch_order(EXAMPLES, SEED, 0)[22:32]])
