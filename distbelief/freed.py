# SPDX-License-Identifier: Apache-2.0
"""Memory that a model took while it was built is given back to the system when it is freed."""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Options of the C library's mallopt."""


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Give the memory of tensors back to the system as soon as it is freed.

    Otherwise glibc soon keeps freed blocks of up to 32 MiB, and carves them up: a model that is built and freed layer
    by layer ends up in memory as a whole. Afterwards its thresholds are where freeing large blocks would have led
    them. Not to be nested.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 26)
