# SPDX-License-Identifier: Apache-2.0
"""The process of a host's keeper: it forks the zygote first, so that the package is imported once on each host."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distbelief.engine.host import Host, Invitation
from distbelief.engine.zygote import Forked

PROGRAM = "from distbelief.engine.keeper import main; main()"

Spawn = Callable[..., "subprocess.Popen[Any]"]


def begin(host: str, address: str, invitation: Invitation, spawn: Spawn = subprocess.Popen) -> "subprocess.Popen[Any]":
    """Start the keeper of this host in a process of its own. `spawn` is called as subprocess.Popen is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments: Sequence[str] = [sys.executable, "-c", PROGRAM]
    process = spawn(arguments, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(pickle.dumps((host, address, invitation)))
    return process


def main() -> None:
    """Entry point: what to take part in comes by standard input, from the process that started this one."""
    host, address, invitation = pickle.loads(sys.stdin.buffer.read())
    Host(host, address, invitation, Forked()).serve()
