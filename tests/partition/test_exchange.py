# SPDX-License-Identifier: Apache-2.0
"""Laws of the exchange: everybody gets what he needs, forward and back are adjoint, nothing hangs."""

import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from threads import together
from torch import Tensor
from torch.nn import functional

from distbelief.channel import mailbox
from distbelief.errors import ConfigurationError, DeadlineExceeded, PeerLost
from distbelief.leases import Lease
from distbelief.partition.box import Box, count, field, inside, sizes, tiles, whole
from distbelief.partition.exchange import Exchange, routes, tie, traffic
from distbelief.partition.group import Group, Site
from distbelief.roster import Granted

SHAPE, KERNEL = (3, 8, 10), 5


@pytest.fixture(params=["one host", "several hosts"], autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions of one host talk through its memory, those of several over gloo: the laws are the same."""
    if request.param == "several hosts":
        hosts = itertools.count()
        monkeypatch.setattr(mailbox, "_here", lambda: f"host-{next(hosts)}")


def halo(partitions: int) -> tuple[list[Box | None], list[Box | None]]:
    """A plane in columns, and the receptive fields of a layer of the same size."""
    have = tiles(SHAPE, (1, 1, partitions))
    need: list[Box | None] = [
        None if box is None else (box[0], *(field(side, KERNEL, 1, KERNEL // 2) for side in box[1:])) for box in have
    ]
    return have, need


CASES: dict[str, tuple[list[Box | None], list[Box | None], tuple[int, ...]]] = {
    "halo of two": (*halo(2), SHAPE),
    "halo of four": (*halo(4), SHAPE),
    "gather": (tiles((7,), (3,)), [((0, 7),)] * 3, (7,)),
    "to one": (tiles((7,), (3,)), [None, ((0, 7),), None], (7,)),
    "from one": ([None, None, ((0, 4), (0, 6))], tiles((4, 6), (3, 1)), (4, 6)),
    "rows to columns": (tiles((4, 6), (3, 1)), tiles((4, 6), (1, 3)), (4, 6)),
    "some idle": ([((0, 2),), ((2, 5),), None], [None, ((0, 3),), ((1, 2),)], (5,)),
    "everywhere": ([((0, 4),)] * 3, [((0, 2),), None, ((-1, 5),)], (4,)),
    "at home": (tiles((6,), (3,)), [((0, 1),), ((2, 4),), ((4, 6),)], (6,)),
}


@pytest.mark.parametrize("fill", [0.0, float("-inf")])
@pytest.mark.parametrize("name", CASES)
def test_every_partition_gets_its_box_and_padding_around_it(name: str, fill: float) -> None:
    have, need, shape = CASES[name]
    full = torch.randn(2, *shape)

    def work(group: Group) -> bool:
        own, wanted = have[group.index], need[group.index]
        x = None if own is None else full[(slice(None), *inside(own, whole(shape)))]
        got = Exchange(have, need, group, fill=fill)(x, 2)
        if wanted is None:
            return got is None
        margin = [side for low_high in reversed(wanted) for side in (10, 10)]
        padded = functional.pad(full, margin, value=fill)
        outer = tuple((-10, length + 10) for length in shape)
        assert got is not None
        return torch.equal(got, padded[(slice(None), *inside(wanted, outer))])

    assert together(len(have), work) == [True] * len(have)


@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_is_the_adjoint_of_the_forward_pass(name: str) -> None:
    have, need, shape = CASES[name]
    everywhere = all(box == whole(shape) for box in have)
    full = torch.randn(2, *shape, dtype=torch.float64)

    def work(group: Group) -> tuple[float, float]:
        own = have[group.index]
        x = None if own is None else full[(slice(None), *inside(own, whole(shape)))].clone().requires_grad_()
        got = Exchange(have, need, group, dtype=torch.float64)(x, 2)
        weight = None if got is None else torch.randn(got.shape, dtype=torch.float64)
        loss = torch.zeros(0, dtype=torch.float64, requires_grad=True) if got is None else got * weight
        tie(loss, group).sum().backward()
        gradient = None if x is None else x.grad
        left = 0.0 if got is None else float((got.detach() * weight).sum())
        return left, 0.0 if x is None or gradient is None else float((x.detach() * gradient).sum())

    pairs = together(len(have), work)
    assert sum(left for left, _ in pairs) == pytest.approx(sum(right for _, right in pairs), rel=1e-12)
    assert any(right for _, right in pairs)
    assert everywhere == (name == "everywhere")


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_what_is_planned_and_nobody_is_sent_what_he_has(name: str) -> None:
    have, need, shape = CASES[name]

    def work(group: Group) -> tuple[int, int]:
        own = have[group.index]
        Exchange(have, need, group)(None if own is None else torch.zeros(2, *sizes(own)), 2)
        return group.elements_sent, group.elements_received

    moved = together(len(have), work)
    assert sum(sent for sent, _ in moved) == 2 * traffic(have, need) == sum(received for _, received in moved)
    missing = [
        0 if box is None else len(_units(box) & _units(whole(shape)) - (set() if own is None else _units(own)))
        for own, box in zip(have, need, strict=True)
    ]
    assert [received for _, received in moved] == [2 * number for number in missing]
    assert all(count(box) for box in routes(have, need).values())


def _units(box: Box) -> set[tuple[int, ...]]:
    return {
        tuple(place.tolist())
        for place in torch.cartesian_prod(*(torch.arange(*side) for side in box)).reshape(-1, len(box))
    }


def test_a_value_without_a_batch_and_whole_numbers_travel_too() -> None:
    have = tiles((5,), (2,))
    parameter, names = torch.randn(5), torch.arange(10).reshape(2, 5)

    def work(group: Group) -> tuple[Tensor | None, Tensor | None]:
        low, high = have[group.index][0]  # type: ignore[index]
        both = [((0, 5),)] * 2
        return (
            Exchange(have, both, group, batched=False)(parameter[low:high], 64),
            Exchange(have, both, group, dtype=torch.int64)(names[:, low:high], 2),
        )

    for got, numbers in together(2, work):
        assert got is not None
        assert numbers is not None
        assert torch.equal(got, parameter)
        assert torch.equal(numbers, names)


def test_states_of_another_type_than_planned_are_refused() -> None:
    exchange = Exchange([((0, 4),)], [((0, 4),)], Group(None, 0, 1))
    with pytest.raises(
        ConfigurationError, match=r"states of torch\.float16 are to cross .*; torch\.float32 was planned"
    ):
        exchange(torch.zeros(2, 4, dtype=torch.float16), 2)


def test_partitions_that_own_nothing_upstream_or_downstream_take_part_in_the_backward_pass() -> None:
    # 0 -> 1 -> 2 -> 0: each sends in one exchange only, and the last one owns nothing that the loss depends on.
    boxes: list[list[Box | None]] = [
        [((0, 3),) if owner == index else None for index in range(3)] for owner in range(3)
    ]

    def work(group: Group) -> Tensor | None:
        x = torch.ones(1, 3, requires_grad=True) if group.index == 0 else None
        value = x
        for sender in range(3):
            value = Exchange(boxes[sender], boxes[(sender + 1) % 3], group)(value, 1)
            value = None if value is None else 2 * value
        loss = torch.zeros(0, requires_grad=True) if value is None else value
        tie(loss, group).sum().backward()
        return None if x is None else x.grad

    assert together(3, work)[0].tolist() == [[8.0, 8.0, 8.0]]  # type: ignore[union-attr]


def test_sums_and_shared_tensors_are_the_same_for_everybody() -> None:
    vectors = torch.randn(3, 50, dtype=torch.float64)

    def work(group: Group) -> tuple[Tensor, Tensor, list[Lease | None]]:
        mine = vectors[group.index].clone()
        total = group.sum(mine)
        assert torch.equal(mine, vectors[group.index])
        leases = [Lease(1, 0, 32, 64), None, Lease(2**62, 2**31, 0, 2**62)]
        told = [group.tell(Granted, Granted(lease, False) if group.leads else None).lease for lease in leases]
        return total, group.share(mine), told

    results = together(3, work)
    for total, shared, told in results:
        assert torch.equal(total, results[0][0])
        assert torch.equal(shared, vectors[2])
        assert told == [Lease(1, 0, 32, 64), None, Lease(2**62, 2**31, 0, 2**62)]
    torch.testing.assert_close(results[0][0], vectors.sum(0))


def test_one_partition_alone_says_nothing() -> None:
    group = Group(None, 0, 1)
    x = torch.randn(2, 4)
    assert torch.equal(group.sum(x[0]), x[0])
    assert group.share(x) is x
    assert group.tell(Granted, Granted(None, True)).finished
    assert torch.equal(Exchange([((0, 4),)], [((0, 4),)], group)(x, 2), x)  # type: ignore[arg-type]
    assert group.elements_sent == 0
    group.close()


def gather(group: Group, partitions: int) -> Tensor | None:
    return Exchange(tiles((6,), (partitions,)), [((0, 6),)] * partitions, group)(torch.zeros(2, 6 // partitions), 2)


def test_a_partition_that_leaves_makes_the_others_raise_at_once() -> None:
    seconds: list[float] = []

    def work(group: Group) -> None:
        gather(group, 3)
        if group.index == 1:
            group.close()
            return
        started = time.monotonic()
        try:
            with pytest.raises(PeerLost, match=f"was lost, says partition {group.index} of 3"):
                [gather(group, 3) for _ in range(3)]
        finally:
            seconds.append(time.monotonic() - started)
            group.close()

    together(3, work, deadline_seconds=30)
    assert len(seconds) == 2
    assert max(seconds) < 10
    with pytest.raises(PeerLost, match=r"partition \d of 2 has left its group"):
        together(2, lambda group: (gather(group, 2), group.close(), gather(group, 2)))


def test_a_partition_that_hangs_makes_the_others_raise_within_the_deadline() -> None:
    awake = threading.Event()

    def work(group: Group) -> float:
        gather(group, 2)
        if group.index == 0:
            awake.wait(20)
            return 0.0
        started = time.monotonic()
        try:
            with pytest.raises(DeadlineExceeded, match="did not answer in time"):
                gather(group, 2)
        finally:
            awake.set()
        return time.monotonic() - started

    assert 0.9 < together(2, work, deadline_seconds=1.0)[1] < 6


def test_a_partition_that_never_comes_is_noticed_within_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        Group(dist.HashStore(), 0, 2, deadline_seconds=1.0)
    assert time.monotonic() - started < 6


def gradient(name: str, full: Tensor, group: Group) -> Tensor | None:
    """Of the sum of what an exchange gives, by what this partition has."""
    have, need, shape = CASES[name]
    own, on = have[group.index], group.device
    x = None if own is None else full[(slice(None), *inside(own, whole(shape)))].to(on).requires_grad_()
    got = Exchange(have, need, group)(x, 2)
    tie(torch.zeros(0, device=on, requires_grad=True) if got is None else got, group).sum().backward()
    return None if x is None or x.grad is None else x.grad.cpu()


def gradients_in_pinned_memory(folder: str, index: int, device: str) -> None:
    """In a process of its own, since all backward passes on an accelerator share one thread of theirs."""
    found = {}
    for name, (have, _, shape) in CASES.items():
        if index < len(have):
            store = dist.FileStore(f"{folder}/{name}", len(have))
            group = Group(store, index, len(have), Site(device=torch.device(device)))
            found[name] = gradient(name, torch.ones(2, *shape), group)
            group.close()
    torch.save(found, f"{folder}/{index}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_partitions_of_one_accelerator_meet_in_pinned_memory(tmp_path: Path) -> None:
    here, program = (
        Path(__file__),
        "import sys, test_exchange as e; e.gradients_in_pinned_memory(sys.argv[1], {}, {!r})",
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(index, "cuda:0"), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parent), *sys.path])},
        )
        for index in range(4)
    ]
    assert [process.wait(100) for process in running] == [0] * 4
    found = [torch.load(tmp_path / f"{index}.pt") for index in range(4)]
    for name, (have, _, shape) in CASES.items():
        expected = together(len(have), functools.partial(gradient, name, torch.ones(2, *shape)))
        for index, own in enumerate(expected):
            assert own is found[index][name] is None or torch.equal(own, found[index][name]), (name, index)
