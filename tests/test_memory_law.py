# SPDX-License-Identifier: Apache-2.0
"""No process ever holds the whole model: it trains where no process has room for one copy of its parameters.

The kernel limits the address space of each process (RLIMIT_AS) to what an interpreter with torch takes before anything
is done, and four fifths of the parameters' bytes. So all memory counts, touched or not: the process's own, what it
shares with others as often as it maps it, mapped files, and the stacks of threads. The user's process is limited like
all others: the one that forks roles, shards, partitions of the replica and of the evaluator. One copy of the
parameters would not fit, while each partition holds three buffers of an eighth of them.
"""

import functools
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from tests import problems

pytestmark = pytest.mark.slow

WIDTH, LAYERS, BATCH_SIZE, RATE = 2048, 16, 32, 0.01
PARAMETER_BYTES = 4 * LAYERS * (WIDTH + 1) * WIDTH
ROOM_BYTES = PARAMETER_BYTES * 4 // 5
ROOT = Path(__file__).parents[1]


def load_compiler() -> None:
    """Torch imports it with the first optimizer; no process is to find room for it that it has not for a model."""
    torch.optim.SGD([torch.zeros(1)])


def large() -> nn.Module:
    """Linear layers of 16 MiB each, 256 MiB together."""
    load_compiler()
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def noise(examples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(examples)
    return TensorDataset(torch.randn(examples, WIDTH, generator=generator), torch.arange(examples) % 7)


def job_of(partitions: int, run: str | None = None) -> db.Job:
    return db.Job(
        model=large, loss=nn.functional.cross_entropy, data=functools.partial(noise, 3 * BATCH_SIZE),
        test=functools.partial(noise, BATCH_SIZE), batch_size=BATCH_SIZE, run=run,
        algorithm=db.Downpour(update_rule=db.sgd(RATE), fetch="awaited"),
        cluster=db.Cluster(replicas=1, partitions=partitions, shards=8, threads_per_replica=1, device="cpu"),
    )  # fmt: skip


def train_within(partitions: int, run: str) -> None:
    """Train in little room and print the loss on the test set; for a fresh interpreter."""
    torch.set_num_threads(1)
    load_compiler()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM_BYTES,) * 2)
    result = db.train(job_of(partitions, run), view=False)
    print(result.summary.examples.seen, len(list((result.run / "checkpoints").iterdir())), result.test["loss"])


def outcome(partitions: int, run: Path) -> subprocess.CompletedProcess[str]:
    program = f"from tests import test_memory_law as law; law.train_within({partitions}, {str(run)!r})"
    # One arena of glibc: each more reserves 64 MiB of addresses and uses hardly any of them.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=110, env=environment
    )


def test_a_model_is_trained_tested_and_checkpointed_where_no_process_has_room_for_its_parameters(
    tmp_path: Path,
) -> None:
    found = outcome(8, tmp_path / "run")
    assert found.returncode == 0, found.stderr
    seen, checkpoints, loss = found.stdout.splitlines()[-1].split()  # torch may have told something before
    assert (int(seen), int(checkpoints)) == (3 * BATCH_SIZE, 2)

    job = job_of(1)
    model = problems.fresh_model(job)
    problems.plain_loop(job, torch.optim.SGD(model.parameters(), lr=RATE), model)
    inputs, targets = job.test()[:]
    with torch.no_grad():
        assert float(loss) == pytest.approx(float(job.loss(model(inputs), targets)), rel=1e-5)


def test_uncut_there_is_no_room_for_it(tmp_path: Path) -> None:
    found = outcome(1, tmp_path / "run")
    assert found.returncode != 0
    assert "can't allocate memory" in found.stderr
