# SPDX-License-Identifier: Apache-2.0
"""Where a role answers: by one socket for callers on its own host, by another for all others."""

from typing import final

import msgspec

Address = str | tuple[str, int]
"""An abstract Unix socket name beginning with a zero byte, or (host, port) for TCP."""


@final
class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where one role lives, as its callers are told."""

    host: str
    name: str
    """The abstract Unix socket, for callers on `host`: they share memory with it."""
    address: tuple[str, int]
    """For callers on other hosts: TCP on the cluster's interface."""

    def nearest(self, own_host: str) -> Address:
        """The address that a caller on `own_host` uses."""
        return self.name if self.host == own_host else self.address
