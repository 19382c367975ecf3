# SPDX-License-Identifier: Apache-2.0
"""The process of a host's keeper: it forks the zygote first, so that the package is imported once on each host."""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from distbelief.engine.forks import die_with_parent
from distbelief.engine.host import Host, Invitation
from distbelief.engine.nursery import program
from distbelief.engine.zygote import Forked

PROGRAM = program("distbelief.engine.keeper")

Spawn = Callable[..., "subprocess.Popen[Any]"]


def begin(host: str, address: str, invitation: Invitation, spawn: Spawn = subprocess.Popen) -> "subprocess.Popen[Any]":
    """Start the keeper of this host in a process of its own. `spawn` is called as subprocess.Popen is."""
    arguments: Sequence[str] = [sys.executable, "-P", "-c", PROGRAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = spawn(arguments, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(pickle.dumps((host, address, invitation)))
    return process


def main() -> None:
    """Entry point: what to take part in comes by standard input, from the process that started this one."""
    die_with_parent(signal.SIGKILL)
    host, address, invitation = pickle.loads(sys.stdin.buffer.read())
    try:
        Host(host, address, invitation, Forked()).serve()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # at once: taking down an interpreter takes as long as a host may be silent
