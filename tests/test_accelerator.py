# SPDX-License-Identifier: Apache-2.0
"""Laws of replicas on an accelerator: what they compute is what the CPU does, and what dies comes back.

On CUDA where there is some, and on a device whose memory is apart where there is a C++ compiler (see apart.py).
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distbelief as db
from distbelief.events import Evaluated, Observation, RoleLost, RoleStarted
from distbelief.plan import Plan
from tests import apart, problems
from tests.killer import Killer, settled
from tests.test_partitioned_downpour import distance, double_classifier, in_double

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Accelerator:
    device: str

    def model(self, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """A function that builds it in processes which know the device."""
        return functools.partial(apart.on_apart, apart.library(), build) if self.device == "apart" else build


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = ["apart"] if hasattr(torch, "apart") else [pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=KINDS)
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    return Accelerator(request.param)


@pytest.mark.skipif(hasattr(torch, "apart") or not apart.COMPILER, reason="needs a C++ compiler")
def test_these_laws_hold_on_a_device_apart(tmp_path: Path) -> None:
    """In a process of their own, which torch takes this device for the accelerator of from then on."""
    program = "import sys, pathlib, pytest; from tests import apart; apart.open_apart(pathlib.Path(sys.argv[1])); "
    chosen = ["tests/test_accelerator.py", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-c", program + "sys.exit(pytest.main(sys.argv[2:]))", apart.compile_apart(tmp_path), *chosen],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= 8


CPU = Accelerator("cpu")


def trained(tmp_path: Path, on: Accelerator, listeners: Sequence[Any] = (), **fields: Any) -> db.Result:
    given: dict[str, Any] = {"engine": "simulated", "replicas": 1, "shards": 2, "device": on.device}
    cluster = db.Cluster(**(given | fields.pop("cluster", {})))
    model = on.model(fields.pop("model", double_classifier))
    job = problems.job(**(
        {
            "model": model, "data": functools.partial(in_double, 320), "epochs": 2, "cluster": cluster,
            "algorithm": db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited"),
            "test": functools.partial(in_double, 100, 1), "run": tmp_path / f"run{len(list(tmp_path.iterdir()))}",
        }
        | fields
    ))  # fmt: skip
    return db.train(job, view=False, listeners=listeners)


class Telling(nn.Module):
    """Counts the mini-batches that it was trained with away from the CPU; evaluating it anywhere else fails."""

    away: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = double_classifier()
        self.register_buffer("away", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.training or inputs.device.type == "cpu"
        if self.training and inputs.device.type != "cpu":
            self.away.add_(1.0)
        outputs: Tensor = self.layers(inputs)
        return outputs


def test_replicas_compute_on_the_accelerator_and_evaluation_beside_them_on_the_cpu(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    heard: list[Observation] = []
    result = trained(tmp_path, accelerator, listeners=[heard.append], model=Telling, evaluate_every=320, epochs=10)
    assert [one for one in heard if isinstance(one.event, Evaluated)]
    assert isinstance(result.model, Telling)
    assert int(result.model.away) == 10 * 320 / 16


def test_a_replica_on_the_accelerator_takes_the_steps_of_one_on_the_cpu(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    on_cpu = trained(tmp_path, CPU)
    for partitions in (1, 2, Plan.stages(2, microbatches=1)):
        on_accelerator = trained(tmp_path, accelerator, cluster={"engine": "local", "partitions": partitions})
        assert distance(on_accelerator.model, on_cpu.model) < 1e-9, partitions
        assert on_accelerator.summary.examples.seen == 640


@pytest.mark.parametrize(
    "algorithm",
    [
        db.Downpour(n_push=3, n_fetch=2, fetch="awaited", clip_norm=0.1, momentum=0.9),
        db.Downpour(n_push=2, n_fetch=2, fetch="awaited", local_rate=0.01),
    ],
)
def test_what_a_replica_does_to_its_gradients_is_done_alike_on_the_accelerator(
    algorithm: db.Downpour, accelerator: Accelerator, tmp_path: Path
) -> None:
    one, other = (trained(tmp_path, on, algorithm=algorithm) for on in (CPU, accelerator))
    assert distance(one.model, other.model) < 1e-9


class Flattening(nn.Module):
    """A recurrent network that asks for its weights in one piece, as many do for the sake of DataParallel.

    On CUDA that puts them into new memory; elsewhere it does nothing, so apart it is done here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.last = nn.RNN(1, 8, batch_first=True).double(), nn.Linear(8, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        self.recurrent.flatten_parameters()
        if inputs.device.type == "apart":
            for parameter in self.recurrent.parameters():
                parameter.data = parameter.data.clone()
        last: Tensor = self.last(self.recurrent(inputs.unsqueeze(-1))[0][:, -1])
        return last


def test_a_recurrent_network_that_flattens_its_weights_takes_the_steps_of_one_on_the_cpu(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    one, other = (trained(tmp_path, on, model=Flattening) for on in (CPU, accelerator))
    assert distance(one.model, other.model) < 1e-7


def test_two_replicas_of_one_accelerator_learn(accelerator: Accelerator, tmp_path: Path) -> None:
    algorithm = db.Downpour(n_push=3, n_fetch=2, clip_norm=1.0, momentum=0.5)
    result = trained(tmp_path, accelerator, algorithm=algorithm, cluster={"replicas": 2}, epochs=6)
    assert (result.summary.examples.seen, result.summary.examples.missing) == (1920, 0)
    assert (result.test["accuracy"] or 0) > 0.85


def test_sandblaster_takes_the_steps_of_the_cpu_on_the_accelerator(accelerator: Accelerator, tmp_path: Path) -> None:
    algorithm = db.Sandblaster(max_iterations=15, l2=1e-3, deterministic=True)
    fields: dict[str, Any] = {"model": functools.partial(problems.classifier), "algorithm": algorithm, "test": None}
    fields["data"] = functools.partial(problems.points, 320)
    fields["cluster"] = {"replicas": 2}
    one, other = (trained(tmp_path, on, **fields) for on in (CPU, accelerator))
    assert distance(one.model, other.model) < 1e-3  # float32
    assert one.summary.loss == pytest.approx(other.summary.loss, rel=1e-4)


def test_a_killed_replica_of_the_accelerator_is_replaced(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Observation] = []
    killer = Killer(monkeypatch, "replica/1", settled(2_000))
    result = trained(
        tmp_path, accelerator, listeners=[heard.append, killer], cluster={"engine": "local", "replicas": 2}, epochs=60,
    )  # fmt: skip
    assert killer.killed
    assert result.summary.examples.missing == 0
    lost = next(one.seconds for one in heard if isinstance(one.event, RoleLost))
    back = next(
        one.seconds for one in heard
        if isinstance(one.event, RoleStarted) and (one.event.role, one.event.incarnation) == ("replica/1", 1)
    )  # fmt: skip
    assert back - lost < 10
