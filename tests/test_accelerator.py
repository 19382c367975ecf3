# SPDX-License-Identifier: Apache-2.0
"""Laws of replicas on an accelerator: what they compute is what the CPU does, and what dies comes back.

On CUDA where there is some, and on a device whose memory is apart wherever there is a C++ compiler (see apart.py).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apart
import pytest
import torch
from torch import Tensor, nn

import distbelief as db
from distbelief.events import Evaluated, Observation, RoleLost, RoleStarted
from distbelief.plan import Plan
from tests import problems
from tests.killer import Killer, settled
from tests.test_partitioned_downpour import distance, double_classifier, in_double

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Accelerator:
    device: str
    library: Path | None = None

    def model(self, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """A function that builds it in processes which know the device."""
        return build if self.library is None else functools.partial(apart.on_apart, self.library, build)


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = [pytest.param("cuda", marks=no_gpu), pytest.param("apart", marks=pytest.mark.xdist_group("apart"))]


@pytest.fixture(scope="module", params=KINDS)
def accelerator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Accelerator:
    if request.param == "cuda":
        return Accelerator("cuda")
    library = apart.compile_apart(tmp_path_factory.mktemp("apart"))
    if library is None:
        pytest.skip("needs a C++ compiler")
    apart.open_apart(library)
    return Accelerator("apart", library)


CPU = Accelerator("cpu")


def trained(tmp_path: Path, on: Accelerator, listeners: Sequence[Any] = (), **fields: Any) -> db.Result:
    given: dict[str, Any] = {"replicas": 1, "shards": 2, "threads_per_replica": 1, "device": on.device}
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


@pytest.mark.parametrize("partitions", [1, 2, Plan.stages(2, microbatches=1)])
def test_a_replica_on_the_accelerator_takes_the_steps_of_one_on_the_cpu(
    partitions: int | Plan, accelerator: Accelerator, tmp_path: Path
) -> None:
    on_cpu = trained(tmp_path, CPU)
    on_accelerator = trained(tmp_path, accelerator, cluster={"partitions": partitions})
    assert distance(on_accelerator.model, on_cpu.model) < 1e-9
    assert on_accelerator.summary.examples.seen == 640


@pytest.mark.parametrize(
    "algorithm",
    [
        db.Downpour(n_push=3, n_fetch=2, fetch="awaited", clip_norm=0.1),
        db.Downpour(n_push=2, n_fetch=2, fetch="awaited", momentum=0.9),
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


@pytest.mark.parametrize(
    "algorithm",
    [db.Downpour(n_push=3, n_fetch=2, clip_norm=1.0, momentum=0.5), db.Downpour(n_push=2, n_fetch=2, local_rate=0.01)],
)
def test_two_replicas_of_one_accelerator_learn(
    algorithm: db.Downpour, accelerator: Accelerator, tmp_path: Path
) -> None:
    result = trained(tmp_path, accelerator, algorithm=algorithm, cluster={"replicas": 2}, epochs=6)
    assert (result.summary.examples.seen, result.summary.examples.missing) == (1920, 0)
    assert (result.test["accuracy"] or 0) > 0.85


@pytest.mark.parametrize("rule", [db.adam(0.01), db.optimizer(torch.optim.RMSprop, lr=0.01)])
def test_rules_that_ask_whether_cuda_records_a_graph_run_beside_an_accelerator(
    rule: Any, accelerator: Accelerator, tmp_path: Path
) -> None:
    algorithm = db.Downpour(update_rule=rule, fetch="awaited")
    on_both = [trained(tmp_path, on, algorithm=algorithm) for on in (CPU, accelerator)]
    assert distance(*(result.model for result in on_both)) < 1e-6  # small gradients make steps of full size


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
        tmp_path, accelerator, listeners=[heard.append, killer], cluster={"replicas": 2}, epochs=60,
    )  # fmt: skip
    assert killer.killed
    assert result.summary.examples.missing == 0
    lost = next(one.seconds for one in heard if isinstance(one.event, RoleLost))
    back = next(
        one.seconds for one in heard
        if isinstance(one.event, RoleStarted) and (one.event.role, one.event.incarnation) == ("replica/1", 1)
    )  # fmt: skip
    assert back - lost < 10


def test_evaluation_stays_on_the_cpu_beside_replicas_on_the_accelerator(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    heard: list[Observation] = []
    trained(tmp_path, accelerator, listeners=[heard.append], evaluate_every=640, epochs=60)
    assert len([one for one in heard if isinstance(one.event, Evaluated)]) >= 2
