# SPDX-License-Identifier: Apache-2.0
"""One replica's examples: a lease's mini-batches, in the order that the seed gives the epoch (paper, section 4.1).

While the replica computes a mini-batch, the next one is prepared beside it. That takes a data set that is slow to
answer; what is in memory is there sooner than another thread could be asked.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import Subset, TensorDataset, default_collate

from distbelief.channel.base import Future
from distbelief.draws import draws_of
from distbelief.engine.base import Home
from distbelief.errors import ConfigurationError
from distbelief.leases import Lease

UNLIKE = (RuntimeError, TypeError, KeyError)
"""What default_collate raises for examples that do not fit together."""
PREFETCH_SECONDS = 1e-3
"""Mini-batches that take longer to prepare are prepared beside the computing: ten times what the hand-over costs."""


def epoch_order(examples: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch, int64 of shape (examples,); it depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(examples, generator=generator)


@dataclass(frozen=True)
class Collated:
    """A data set whose mini-batches the user makes of a list of its examples, as DataLoader's `collate_fn` does."""

    examples: Any
    collate: Callable[[Any], Any]

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.examples)


def first(dataset: Any, examples: int) -> Any:
    """The data set of the first examples of another one."""
    if isinstance(dataset, Collated):
        return Collated(first(dataset.examples, examples), dataset.collate)
    return Subset(dataset, range(min(examples, len(dataset))))


def collect(dataset: Any, indices: torch.Tensor) -> Any:
    """The mini-batch of these examples.

    A TensorDataset is indexed at once. A dataset with `__getitems__` is asked once for all; a tuple or mapping of
    tensors it returns is the mini-batch, a list of examples is collated. Any other dataset is asked example by example.
    Raises ConfigurationError where examples do not fit together, and what the dataset raises.
    """
    if isinstance(dataset, Collated):
        return dataset.collate(_examples(dataset.examples, indices))
    if type(dataset) is TensorDataset:
        return tuple(tensor.index_select(0, indices) for tensor in dataset.tensors)  # takes sparse ones, too
    found = _examples(dataset, indices)
    if isinstance(found, tuple | Mapping):
        return found
    try:
        return default_collate(found)
    except UNLIKE as error:
        if missing := [index for index, each in zip(indices.tolist(), found, strict=False) if each is None]:
            raise ConfigurationError(
                f"the data set gives None for example {missing[0]:,}",
                hint="leave such examples out of the data set, for example with torch.utils.data.Subset",
            ) from error
        why = _unlike(found, indices.tolist()) or error
        raise ConfigurationError(
            f"{len(found)} examples cannot be put together as a mini-batch: {why}",
            hint="give Job(collate=...), a function of a list of examples, as DataLoader's collate_fn",
        ) from error


def _examples(dataset: Any, indices: torch.Tensor) -> Any:
    numbers = indices.tolist()
    try:
        found = dataset.__getitems__(numbers) if hasattr(dataset, "__getitems__") else [dataset[i] for i in numbers]
    except Exception as error:
        if (number := _failing(dataset, numbers, error)) is not None:
            error.add_note(
                f"raised for example {number:,} of the data set\n"
                "hint: mend the example, or leave it out, for example with torch.utils.data.Subset"
            )
        raise
    if isinstance(found, list) and len(found) != len(numbers):
        raise ConfigurationError(
            f"the data set was asked for {len(numbers)} examples and gave {len(found)}",
            hint="let __getitems__ give one for each index, or leave examples out with torch.utils.data.Subset",
        )
    return found


def _failing(dataset: Any, numbers: list[int], error: Exception) -> int | None:
    """The first of these examples for which the data set raises it again; it was asked for many at once, maybe."""
    for number in numbers:
        try:
            dataset[number]
        except Exception as again:
            return number if (type(again), str(again)) == (type(error), str(error)) else None
    return None


def _unlike(found: Sequence[Any], numbers: list[int]) -> str | None:
    """Why the first of these examples cannot be put together with the first other one with which it cannot."""
    for number, each in zip(numbers, found, strict=False):
        try:
            default_collate([found[0], each])
        except UNLIKE as error:
            why = f"only one of them has {error}" if isinstance(error, KeyError) else error
            return f"examples {numbers[0]:,} and {number:,}: {why}" if each is not found[0] else None
    return None


def kind(batch: Any) -> str:
    """What a mini-batch is made of, in words."""
    if isinstance(batch, tuple | list):
        return f"({', '.join(type(each).__name__ for each in batch)})"
    return f"a {type(batch).__name__}"


def pair(
    batch: Any, asked: str = "loss", instead: str = "step=(model, batch) -> scalar", *, more: bool = False
) -> tuple[Any, Any]:
    """(input, target) of a mini-batch, which may have `more`. Raises ConfigurationError for another kind."""
    if not isinstance(batch, tuple | list) or not (len(batch) == 2 or (more and len(batch) > 2)):
        raise ConfigurationError(
            f"Job({asked}=...) takes mini-batches of (input, target), the data set gives {kind(batch)}",
            hint=f"give {instead}, or a data set of (input, target)",
        )
    return batch[0], batch[1]


def to_device(batch: Any, device: torch.device) -> Any:
    """The mini-batch on `device`; tuples, named tuples, lists and dicts are followed to what has a `to` of its own."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict) and not hasattr(type(batch), "to"):  # its own attributes may be its keys
        return _like(batch, {key: to_device(value, device) for key, value in batch.items()})
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def cloned(batch: Any) -> Any:
    """The mini-batch anew, for a model that may change what it is given."""
    return tree_map(lambda each: each.clone() if isinstance(each, torch.Tensor) else each, batch)


def size_of(batch: Any) -> int:
    """Bytes of the tensors in a mini-batch, or in an output."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()  # nbytes is not known of all that are sparse
    if isinstance(batch, Mapping):
        return sum(map(size_of, batch.values()))
    return sum(map(size_of, batch)) if isinstance(batch, tuple | list) else 0


def _like(before: dict[Any, Any], items: dict[Any, Any]) -> Any:
    """A dict of the same kind with these items under its keys."""
    if type(before) is dict:
        return items
    made = copy.copy(before)
    made.update(items)
    return made


@final
class DataShard:
    """The examples that one replica is given, lease by lease.

    The data set is asked for one mini-batch at a time, by the role's own thread or by its second one; after it has
    failed there, as one that is bound to a thread does, by the role's own. Without a `seed` the examples come in the
    data set's own order.

    With `draws`, a seed, the random numbers that the data set draws for a mini-batch depend on that and on the
    mini-batch alone, as the partitions of a replica need, whose models draw others. A second thread would draw from
    the model's, so it is not asked.
    """

    def __init__(
        self, home: Home, dataset: Any, batch_size: int, seed: int | None, draws: int | None = None
    ) -> None:  # fmt: skip
        self._home, self._dataset, self._batch_size, self._seed = home, dataset, batch_size, seed
        self._draws = draws
        self._examples = len(dataset)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._seconds = 0.0
        """What it took to prepare the latest mini-batch."""
        self._bound = draws is not None
        """Whether only the role's own thread may ask."""
        self._ahead: tuple[Lease, Future[Any]] | None = None
        """The mini-batch that is being prepared beside, as the part of its lease that it is."""

    def mini_batches(
        self, lease: Lease, upcoming: Callable[[], Lease | None] = lambda: None
    ) -> Iterator[tuple[int, int, Any]]:
        """(position after the mini-batch, examples in it, the mini-batch) for each mini-batch of the lease.

        `upcoming` tells which lease will be next, as soon as that is known, so that the first mini-batch of it can be
        prepared while the last one of this lease is computed.
        """
        for start in range(lease.start, lease.stop, self._batch_size):
            part = self._part(lease, start)
            batch = self._take(part)
            if self._seconds > PREFETCH_SECONDS and not self._bound:
                following = lease if part.stop < lease.stop else upcoming()
                if following is not None:
                    self._begin(self._part(following, part.stop if following is lease else following.start))
            yield part.stop, part.examples, batch

    def _part(self, lease: Lease, start: int) -> Lease:
        """The part of the lease that is one mini-batch."""
        return Lease(lease.identifier, lease.epoch, start, min(start + self._batch_size, lease.stop))

    def _begin(self, part: Lease) -> None:
        self._ahead = part, self._home.background(lambda: self._prepare(part))

    def _take(self, part: Lease) -> Any:
        """The mini-batch; raises what the data set raised."""
        if self._ahead is not None:
            (ahead, prepared), self._ahead = self._ahead, None
            try:
                batch = prepared.result()  # awaited in any case: the data set is asked for one at a time
            except Exception as error:
                batch = self._prepare(part)  # raises what goes wrong here, too
                self._bound = True
                warnings.warn(
                    f"preparing a mini-batch in a second thread failed with {error!r}, and not in the first: from now "
                    "on none is prepared ahead",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return batch
            if ahead == part:
                return batch
        return self._prepare(part)

    def _prepare(self, part: Lease) -> Any:
        started, indices = self._home.now(), self._indices(part)
        if self._draws is None:
            batch = collect(self._dataset, indices)
        else:
            with draws_of(hash((self._draws, part.epoch, part.start)) % (1 << 63)):
                batch = collect(self._dataset, indices)
        self._seconds = self._home.now() - started
        return batch

    def _indices(self, part: Lease) -> torch.Tensor:
        if self._seed is None:
            return torch.arange(part.start, part.stop)
        if part.epoch != self._epoch:
            if len(self._dataset) != self._examples:
                raise ConfigurationError(
                    f"the data set had {self._examples:,} examples at the beginning and has {len(self._dataset):,} now",
                    hint="let its length stay as it is while a job runs",
                )
            self._order = epoch_order(len(self._dataset), self._seed, part.epoch)
            self._epoch = part.epoch
        return self._order[part.start : part.stop]
