# SPDX-License-Identifier: Apache-2.0
"""Laws of CUDA alone, of nccl and page-locked memory; those of any accelerator are in test_accelerator.py."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.events import Observation, RoleLost, RoleStarted
from distbelief.model_replica import ModelReplica, whole
from distbelief.parameters import lay_out
from distbelief.partition import group
from distbelief.partition.group import Group, Site
from distbelief.plan import Plan
from tests import problems
from tests.killer import Killer, settled
from tests.test_accelerator import CPU, Accelerator, needs_gpu
from tests.test_accelerator import trained as trained_on_either_engine
from tests.test_partitioned_downpour import distance, double_classifier, in_double

pytestmark = [pytest.mark.slow, needs_gpu]

CUDA = Accelerator("cuda")


def trained(tmp_path: Path, on: Accelerator, **fields: Any) -> db.Result:
    """In processes."""
    cluster = {"engine": "local", "threads_per_replica": 1} | fields.pop("cluster", {})
    return trained_on_either_engine(tmp_path, on, cluster=cluster, **fields)


@pytest.mark.parametrize("rule", [db.adam(0.01), db.adamw(0.01), db.optimizer(torch.optim.RMSprop, lr=0.01)])
def test_rules_that_ask_whether_cuda_records_a_graph_run_beside_an_accelerator(rule: Any, tmp_path: Path) -> None:
    algorithm = db.Downpour(update_rule=rule, fetch="awaited")
    on_both = [trained(tmp_path, on, algorithm=algorithm) for on in (CPU, CUDA)]
    assert distance(*(result.model for result in on_both)) < 1e-6  # small gradients make steps of full size


def double_stages() -> nn.Module:
    first = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
    return nn.Sequential(*first, nn.Linear(24, 3)).double()


def no_gloo(*given: Any, **named: Any) -> None:
    raise AssertionError("partitions with an accelerator each talk over nccl")


def in_double_by_nccl(examples: int, seed: int = 0) -> TensorDataset:
    """Data, loaded where the roles are forked: from there on each of them takes its accelerator for its own.

    nccl refuses processes of one host that share an accelerator; of several hosts it cannot know, so one is enough.
    """
    db.Cluster.own_devices = lambda *_: True  # type: ignore[method-assign]
    group._gloo = no_gloo
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.register_at_fork(after_in_child=lambda: os.environ.update(NCCL_HOSTID=f"host-{os.getpid()}"))
    return in_double(examples, seed)


@pytest.mark.parametrize("plan", [Plan(2), Plan(3), *(Plan.stages(2, microbatches=count) for count in (1, 2))])
def test_partitions_with_an_accelerator_each_take_the_steps_of_the_cpu(plan: Plan, tmp_path: Path) -> None:
    model = double_stages if plan.microbatches == 2 else double_classifier
    on_cpu = trained(tmp_path, CPU, model=model)
    data = functools.partial(in_double_by_nccl, 320)
    by_nccl = trained(tmp_path, CUDA, model=model, cluster={"partitions": plan}, data=data, test=None)
    assert distance(by_nccl.model, on_cpu.model) < 1e-9
    assert by_nccl.summary.examples.seen == 640
    assert not by_nccl.summary.faults


def test_a_replica_with_an_accelerator_per_partition_forms_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Observation] = []
    killer = Killer(monkeypatch, "replica/1/1", settled(2_000))
    cluster = {"replicas": 2, "partitions": 2}
    result = trained(
        tmp_path, CUDA, data=functools.partial(in_double_by_nccl, 320), cluster=cluster, test=None, epochs=60,
        listeners=[heard.append, killer],
    )  # fmt: skip
    assert killer.killed
    assert result.summary.examples.missing == 0
    lost = next(one.seconds for one in heard if isinstance(one.event, RoleLost))
    again = {"replica/1/0", "replica/1/1"}
    back = [
        one for one in heard
        if isinstance(one.event, RoleStarted) and one.event.incarnation == 1 and one.event.role in again
    ]  # fmt: skip
    assert {one.event.role for one in back if isinstance(one.event, RoleStarted)} == again
    assert max(one.seconds for one in back) - lost < 10
    assert not [one for one in heard if isinstance(one.event, RoleLost) and one.event.role.startswith("replica/0")]


def asking(examples: int) -> TensorDataset:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() >= 1
    return problems.points(examples)


def test_a_script_may_ask_whether_there_is_an_accelerator(tmp_path: Path) -> None:
    model = functools.partial(problems.classifier)
    result = trained(tmp_path, CUDA, model=model, data=functools.partial(asking, 320), test=None)
    assert (result.summary.examples.seen, result.summary.faults) == (640, ())


def on_the_accelerator(examples: int) -> TensorDataset:
    return TensorDataset(*(tensor.cuda() for tensor in problems.points(examples).tensors))


def test_data_that_is_built_on_the_accelerator_is_refused_before_any_role_starts(tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match=r"(?s)has used CUDA before the job began.*build them on the CPU"):
        trained(tmp_path, CUDA, data=functools.partial(on_the_accelerator, 320))


def differentiate(module: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = module(batch).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def test_what_replicas_push_lies_in_page_locked_memory() -> None:
    module = nn.Linear(300, 200)
    device = torch.device("cuda", 0)
    replica = ModelReplica(
        whole(module), lay_out(module), differentiate, device,
        lambda length, dtype: torch.zeros(length, dtype=dtype), Group(None, 0, 1, Site(device=device)),
    )  # fmt: skip
    assert replica.spare.is_pinned()
    replica.compute(torch.ones(2, 300)).item()
    gradient = replica.take_gradient(mean=True, clip_norm=None)
    assert gradient is not None
    assert gradient.is_pinned()
    assert gradient.device.type == "cpu"


def test_random_numbers_of_the_accelerator_go_on_after_a_job_as_they_would_have(tmp_path: Path) -> None:
    torch.rand((), device="cuda")
    before = torch.cuda.get_rng_state()
    trained(tmp_path, CUDA)
    assert torch.equal(torch.cuda.get_rng_state(), before)
