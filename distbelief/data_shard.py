# SPDX-License-Identifier: Apache-2.0
"""One replica's examples: a lease's mini-batches, in the order that the seed gives the epoch (paper, section 4.1)."""

from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import TensorDataset, default_collate

from distbelief.portions import Lease


def epoch_order(examples: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch, int64 of shape (examples,); it depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(examples, generator=generator)


def collect(dataset: Any, indices: torch.Tensor) -> Any:
    """The mini-batch of these examples.

    A TensorDataset is indexed at once. A dataset with `__getitems__` is asked once for all; a tuple of tensors it
    returns is the mini-batch, a list of examples is collated. Any other dataset is asked example by example.
    """
    if type(dataset) is TensorDataset:
        return tuple(tensor[indices] for tensor in dataset.tensors)
    if hasattr(dataset, "__getitems__"):
        found = dataset.__getitems__(indices.tolist())
        return found if isinstance(found, tuple) else default_collate(found)
    return default_collate([dataset[index] for index in indices.tolist()])


def to_device(batch: Any, device: torch.device) -> Any:
    """The mini-batch on `device`; tuples, named tuples, lists and dicts of tensors are followed."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


@final
class DataShard:
    """The examples that one replica is given, lease by lease."""

    def __init__(self, dataset: Any, batch_size: int, seed: int) -> None:
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def mini_batches(self, lease: Lease) -> Iterator[tuple[int, int, Any]]:
        """(position after the mini-batch, examples in it, the mini-batch) for each mini-batch of the lease."""
        if lease.epoch != self._epoch:
            self._order = epoch_order(len(self._dataset), self._seed, lease.epoch)
            self._epoch = lease.epoch
        for start in range(lease.start, lease.stop, self._batch_size):
            stop = min(start + self._batch_size, lease.stop)
            yield stop, stop - start, collect(self._dataset, self._order[start:stop])
