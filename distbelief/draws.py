# SPDX-License-Identifier: Apache-2.0
"""The random numbers of a process, of torch, NumPy and Python: begun by a seed, and those of the user kept."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


def begin_draws(seed: int) -> None:
    """Begin all of them; roles would share them, as forks of one process."""
    torch.manual_seed(seed)
    _begin_on_host(seed)


def _begin_on_host(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed % (1 << 32))
    random.seed(seed)


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """Whatever is drawn meanwhile, they go on as they would have. Other threads draw the same ones twice."""
    of_numpy, of_python = numpy.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            yield
        finally:
            numpy.random.set_state(of_numpy)
            random.setstate(of_python)


@contextlib.contextmanager
def draws_of(seed: int) -> Iterator[None]:
    """Draw those of another seed meanwhile, on the host: to begin those of accelerators takes longer than all else."""
    with draws_kept():
        _begin_on_host(seed)
        yield
