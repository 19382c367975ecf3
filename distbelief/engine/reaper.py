# SPDX-License-Identifier: Apache-2.0
"""What a Ray begun for one job leaves when that job's process is killed: a program that waits for it and cleans up.

Run by its path, so that it imports nothing of the package. Its standard input says what to end: a word that the
environment of all those processes holds, and a folder; and that the job's process is gone, by ending.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

ROUNDS = 20
ROUND_SECONDS = 0.05


def marked(word: bytes) -> set[int]:
    """The processes, other than this one, with the word in their environment, and all that descend from them.

    A process that writes its own title, as Ray's agents do, may write it over the environment that others see.
    """
    found, children = set(), dict[int, list[int]]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
            if word in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    unseen = list(found)
    while unseen:
        born = [child for child in children.get(unseen.pop(), []) if child not in found]
        found.update(born)
        unseen += born
    return found - {os.getpid()}


def main() -> None:
    """Wait for the end of the input, then end and remove."""
    word, folder = (sys.stdin.buffer.readline().strip() for _ in range(2))
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):  # one that is being started is not seen at once
        if not (pids := marked(word)):
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(ROUND_SECONDS)
    shutil.rmtree(folder.decode(), ignore_errors=True)


if __name__ == "__main__":
    main()
