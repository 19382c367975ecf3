# SPDX-License-Identifier: Apache-2.0
"""What a Ray begun for one job leaves when that job's process is killed: a program that waits for it and cleans up.

Run by its path, so that it imports nothing of the package. Its standard input says what to end: a word that the
environment of all those processes holds, a folder that they write into, and the number of the job's process; and
that the job is over, by ending.
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


def found(word: bytes, folder: Path, job: int) -> set[int]:
    """Processes with the word in their environment, those that write into the folder, and all that descend from them.

    A process that writes its own title, as Ray's agents do, writes it over the environment that others see, and once
    its parent is gone it descends from nobody. The job's own process and this one are none of them.
    """
    ours, children = set(), dict[int, list[int]]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look at
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])  # a name may be no text
            children.setdefault(parent, []).append(int(process.name))
            if int(process.name) != job and (
                word in (process / "environ").read_bytes()
                or (parent != job and writes(process, folder))  # what the job forks has its files open
            ):
                ours.add(int(process.name))
    unseen = list(ours)
    while unseen:
        born = [child for child in children.get(unseen.pop(), []) if child not in ours]
        ours.update(born)
        unseen += born
    return ours - {os.getpid()}


def writes(process: Path, folder: Path) -> bool:
    """Whether a process has a file of the folder open to write into it; somebody may be reading there."""
    for opened in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if folder in opened.readlink().parents:
                flags = (process / "fdinfo" / opened.name).read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def main() -> None:
    """Wait for the end of the input, then end and remove."""
    word, name, job = (sys.stdin.buffer.readline().strip() for _ in range(3))
    folder = Path(os.fsdecode(name)).resolve()
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):  # one that is being started is not seen at once
        if not (pids := found(word, folder, int(job))):
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(ROUND_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
