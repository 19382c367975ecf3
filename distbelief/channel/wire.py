# SPDX-License-Identifier: Apache-2.0
"""How calls travel between hosts, as far as a job can choose it."""

from dataclasses import dataclass

from distbelief.channel.secure import Certificate
from distbelief.cluster import WireDtype


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What holds for the TCP connections of one process; calls on its own host know none of it."""

    dtype: WireDtype = "float32"
    """How float32 tensors travel in calls made here to methods marked `rounded`; other tensors travel as they are."""
    certificate: Certificate | None = None
    """Encrypt, and let only those in that hold this certificate."""
    connect_seconds: float = 5.0
    """How long connecting may take."""
    silence_seconds: float = 1.5
    """How long the host at the other end may leave something unanswered before it counts as lost."""
