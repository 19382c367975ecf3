# SPDX-License-Identifier: Apache-2.0
"""What deploy/ says, held against the package: there is no Kubernetes here, and no container runtime."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import distbelief as db
from distbelief import launch
from distbelief.cli import _parse
from distbelief.engine.placement import check_room
from distbelief.engines import groups
from distbelief.launch import Launch

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    found: dict[str, Any] = manifest["spec"]
    return found


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    made = []
    for group, count in (
        (cluster["headGroupSpec"], 1),
        *((each, each["replicas"]) for each in cluster["workerGroupSpecs"]),
    ):
        made += group["template"]["spec"]["containers"] * count
    return made


@pytest.fixture
def job(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> db.Job:
    """The job that the entrypoint asks for."""
    monkeypatch.chdir(ROOT)
    program, verb, file, *options = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("distbelief", "train")
    made, _, _ = _parse(launch.job_of(Path(file)), Launch(file), options, program)
    return made


def test_the_entrypoint_of_the_rayjob_is_a_command_that_asks_for_its_own_cluster(job: db.Job) -> None:
    assert (job.cluster.engine, job.cluster.address) == ("ray", "auto")
    assert job.checkpoints is not None, "its hosts share no folder"
    assert job.checkpoints.startswith("s3://")


def test_the_cluster_of_the_rayjob_has_room_for_its_job(spec: dict[str, Any], job: db.Job) -> None:
    free = [{"CPU": float(each["resources"]["requests"]["cpu"])} for each in containers(spec)]
    check_room(groups(job.cluster, evaluates=job.test is not None), free)


def test_the_image_of_the_rayjob_is_that_of_the_dockerfile_at_this_version(spec: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    images = {each["image"] for each in containers(spec)}
    assert images == {f"distbelief:{db.__version__}"}
    assert f"-t {images.pop()} " in dockerfile
    version = spec["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311" in dockerfile
    extra = re.search(
        r'^ray = \["ray>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert extra is not None
    least, most = (tuple(map(int, extra.groups()[at : at + 2])) for at in (0, 2))
    assert least <= tuple(map(int, version.split(".")[:2])) < most
    assert "distbelief[ray" in dockerfile


def test_every_option_that_the_recipe_for_machines_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"distbelief train (.*)", (ROOT / "deploy" / "machines.md").read_text())
    assert lines
    for line in lines:
        options = shlex.split(line)[1:]
        job, _, _ = _parse(launch.job_of(Path("examples/digits.py")), Launch("digits"), options, "distbelief")
        assert (job.cluster.engine, job.cluster.address) == ("ray", "auto")
