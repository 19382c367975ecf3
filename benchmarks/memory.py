# SPDX-License-Identifier: Apache-2.0
"""What a shard, a replica and a partition of one hold in memory, beside what the formulas say.

The model is the paper's acoustic one, on two shards and two replicas, each of 1, 2 or 4 partitions.

Memory that processes share is counted once: a page that k processes map is a k-th of a page in each (PSS), and the
buffers that shards read where replicas fill them (memfd) are the replicas'. What a process needs in any case (the
interpreter, torch) is measured with a model of the same layers and hardly any parameters, and subtracted.
"""

import os
import re
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distbelief as db
from benchmarks.table import Row, table_text, verdict
from distbelief.cluster import TransportName
from distbelief.events import Observation, Progress, RoleStarted

INPUTS, LAYERS, CLASSES, BATCH_SIZE = 440, 4, 8192, 32
WIDTH, QUICK_WIDTH = 2560, 1024
REPLICAS = SHARDS = 2
PARTITIONS = (1, 2, 4)
STATE_VECTORS = 1
"""Of Adagrad, for each parameter."""
SAMPLES, QUICK_SAMPLES = 12, 5
TOLERANCE = 0.05
NUMBER_BYTES, MB = 4, 1e6


@dataclass(frozen=True)
class Held:
    """Bytes of one process."""

    own: float
    """Anonymous memory; what is shared with the process it was forked from in proportion."""
    shared: float
    """Of memfd, in proportion to the processes that map it."""
    peak: float
    """The most anonymous memory it ever had, supposed that it mapped the same files then."""


def model(width: int, classes: int) -> nn.Module:
    """Four sigmoid layers; with 2560 units and 8192 classes the paper's, of 42 million parameters."""
    layers: list[nn.Module] = []
    for inputs in (INPUTS, *[width] * (LAYERS - 1)):
        layers += [nn.Linear(inputs, width), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def frames(classes: int) -> TensorDataset:
    """Noise, with labels."""
    return TensorDataset(torch.randn(2048, INPUTS), torch.randint(classes, (2048,)))


class Watch:
    """Listens to a job, looks at its processes at each progress event, and ends it after so many looks."""

    def __init__(self, samples: int) -> None:
        """Look so often, once every replica has trained."""
        self._left = samples
        self._roles: list[str] = []
        self.seen: dict[str, list[Held]] = {}

    def __call__(self, observation: Observation) -> None:
        """Note who was started, and look."""
        event = observation.event
        if isinstance(event, RoleStarted):
            self._roles.append(event.role)
        if not isinstance(event, Progress) or event.mini_batches < 4 * REPLICAS or not self._left:
            return
        for role, pid in zip(self._roles, role_processes(), strict=True):
            self.seen.setdefault(role.partition("/")[0], []).append(held(pid))
        self._left -= 1
        if not self._left:
            raise StopIteration("enough was seen")

    def median(self, kind: str) -> Held:
        """The typical process of this kind. The replicas share among themselves what all processes share."""
        own, peak = (statistics.median(getattr(one, name) for one in self.seen[kind]) for name in ("own", "peak"))
        shared = sum(one.shared for held_by in self.seen.values() for one in held_by) / len(self.seen["replica"])
        return Held(own, shared if kind == "replica" else 0.0, peak)


def role_processes() -> list[int]:
    """The job's processes in the order in which they were started: the children of this process's only child."""
    (zygote,) = _children(os.getpid())
    return sorted(_children(zygote), key=lambda pid: (int(_stat(pid)[19]), pid))


def held(pid: int) -> Held:
    """What a process holds now."""
    pages, status = (_kilobytes(Path(f"/proc/{pid}/{name}").read_text()) for name in ("smaps_rollup", "status"))
    peak = status["VmHWM"] - status["RssFile"] - status["RssShmem"]
    return Held(1024.0 * pages["Pss_Anon"], 1024.0 * pages["Pss_Shmem"], 1024.0 * peak)


def _kilobytes(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def watched(width: int, classes: int, transport: TransportName, samples: int, partitions: int = 1) -> Watch:
    """Train for a moment and look."""
    watch = Watch(samples)
    with tempfile.TemporaryDirectory() as folder:
        job = db.Job(
            model=partial(model, width, classes), loss=nn.functional.cross_entropy, data=partial(frames, classes),
            algorithm=db.Downpour(update_rule=db.adagrad(0.01), warmstart=0, cooldown=0),
            cluster=db.Cluster(
                replicas=REPLICAS, partitions=partitions, shards=SHARDS, threads_per_replica=1, transport=transport,
                device="cpu",
            ),
            epochs=1000, batch_size=BATCH_SIZE, checkpoint_seconds=1e6, run=Path(folder) / "run",
        )  # fmt: skip
        db.train(job, listeners=[watch], view=False)
    return watch


def formulas(
    parameters: int, width: int, classes: int, transport: TransportName, partitions: int = 1
) -> dict[str, tuple[float, float]]:
    """Kind of process -> (bytes that it holds by construction, bytes that it may hold).

    A partition has a part of the parameters and of what each layer computes, but all that the layer reads.
    """
    span = NUMBER_BYTES * parameters / SHARDS
    staged = 1 if transport == "tcp" else 0
    gathered = LAYERS * width if partitions > 1 else 0
    states = INPUTS + gathered + (2 * LAYERS * width + 2 * classes) / partitions
    held, asked = (NUMBER_BYTES * (vectors * parameters / partitions + BATCH_SIZE * states) for vectors in (3, 4))
    return {"shard": ((1 + STATE_VECTORS + staged) * span, (2 + STATE_VECTORS) * span), "replica": (held, asked)}


def run(quick: bool) -> list[Row]:
    """Measure, print the table, return a row per kind of process, number of partitions and transport."""
    width, samples = (QUICK_WIDTH, QUICK_SAMPLES) if quick else (WIDTH, SAMPLES)
    cases: list[tuple[TransportName, int]] = [("shared_memory", count) for count in PARTITIONS]
    rows = [row for case in [*cases, ("tcp", 1)] for row in measure(width, samples, *case)]
    print(_table(rows))
    return rows


def measure(width: int, samples: int, transport: TransportName, partitions: int) -> list[Row]:
    """What one job's processes hold: a row per kind."""
    parameters = sum(parameter.numel() for parameter in model(width, CLASSES).parameters())
    large = watched(width, CLASSES, transport, samples, partitions)
    # The smallest model that is cut like the large one.
    least = (4 * partitions, 4 * partitions) if partitions > 1 else (1, 2)
    bare = watched(*least, transport, samples, partitions)
    rows: list[Row] = []
    for kind, (formula, asked) in formulas(parameters, width, CLASSES, transport, partitions).items():
        one, other = large.median(kind), bare.median(kind)
        total = one.own + one.shared - other.own - other.shared
        rows.append(
            {
                "process": kind,
                "partitions": partitions,
                "transport": transport,
                "parameters": parameters,
                "held_bytes": total,
                "shared_bytes": one.shared - other.shared,
                "peak_bytes": one.peak + one.shared - other.peak - other.shared,
                "formula_bytes": formula,
                "ratio": total / formula,
                "asked_bytes": asked,
                "reached": total <= (1 + TOLERANCE) * asked,
                "bare_process_bytes": other.own + other.shared,
            }
        )
    return rows


def _table(rows: list[Row]) -> str:
    header = [
        "process",
        "K",
        "transport",
        "held MB",
        "of it shared",
        "peak",
        "formula",
        "ratio",
        "asked",
        "reached",
        "bare",
    ]
    lines = [
        [
            "partition" if row["process"] == "replica" and row["partitions"] != 1 else str(row["process"]),
            str(row["partitions"]),
            str(row["transport"]),
            *(
                f"{float(row[name] or 0) / MB:,.0f}"
                for name in ("held_bytes", "shared_bytes", "peak_bytes", "formula_bytes")
            ),
            f"{row['ratio']:.2f}",
            f"<= {float(row['asked_bytes'] or 0) / MB:,.0f}",
            verdict(row["reached"]),
            f"{float(row['bare_process_bytes'] or 0) / MB:,.0f}",
        ]
        for row in rows
    ]
    title = f"{rows[0]['parameters']:,} parameters, {REPLICAS} replicas, {SHARDS} shards, Adagrad, batch {BATCH_SIZE}"
    return table_text(title, header, lines)
