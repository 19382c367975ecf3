# SPDX-License-Identifier: Apache-2.0
"""What deploy/ says, held against the package: there is no Kubernetes here, and no container runtime."""

import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import distbelief as db
from distbelief import launch
from distbelief.engine.placement import check_room
from distbelief.engines import groups
from distbelief.launch import Launch
from distbelief.options import parse
from tests.hosts import Hosts

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
    made, _, _ = parse(launch.job_of(Path(file)), Launch(file), options, program)
    return made


def test_the_entrypoint_of_the_rayjob_is_a_command_that_asks_for_its_own_cluster(job: db.Job) -> None:
    assert (job.cluster.engine, job.cluster.address) == ("ray", "auto")
    assert job.checkpoints is not None, "its hosts share no folder"
    assert job.checkpoints.startswith("s3://")


def test_the_cluster_of_the_rayjob_has_room_for_its_job(spec: dict[str, Any], job: db.Job) -> None:
    free = [{"CPU": float(each["resources"]["requests"]["cpu"])} for each in containers(spec)]
    check_room(groups(job.cluster, evaluates=job.test is not None), free)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.xdist_group("ray")
def test_the_entrypoint_of_the_rayjob_runs_as_a_job_of_a_ray_cluster_and_keeps_its_checkpoints_in_s3(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    if reason := Hosts.missing():
        pytest.skip(reason)
    programs = Path(sys.executable).parent
    (tmp_path / "work" / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "digits.py", tmp_path / "work" / "examples")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, Hosts(2) as hosts:
        head = hosts.addresses[0]
        environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RAY_ADDRESS": f"http://{head}:8265",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "AWS_ENDPOINT_URL": f"http://{head}:5000",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests",
        }  # fmt: skip
        silence: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        hosts.python(0, "-m", "moto.server", "-H", head, "-p", "5000", env=environment, **silence)
        nodes = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        hosts.start_ray(Path(folder), cpus=5, store_bytes=80 << 20, takes_jobs=True, env=nodes)
        entrypoint = shlex.split(spec["entrypoint"].replace("/tmp/runs/digits", str(tmp_path / "run")))
        submit = [str(programs / "ray"), "job", "submit", "--working-dir", str(tmp_path / "work"), "--", *entrypoint]
        submit += ["--cluster.threads-per-replica", "1"]  # the hosts share this machine's cores
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = hosts.popen(0, submit, env=environment, cwd=tmp_path, **options)
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 0, said
        exported = tmp_path / "model.safetensors"
        export = [str(programs / "distbelief"), "export", str(tmp_path / "run"), str(exported)]
        job = hosts.popen(1, export, env=environment, cwd=tmp_path, **options)
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
        assert exported.exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["reason"], summary["examples"]["missing"]) == ("all epochs finished", 0)
    assert (tmp_path / "run" / "checkpoints").read_text() == "s3://my-bucket/digits"


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
        job, _, _ = parse(launch.job_of(Path("examples/digits.py")), Launch("digits"), options, "distbelief")
        assert (job.cluster.engine, job.cluster.address) == ("ray", "auto")
