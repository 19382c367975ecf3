# SPDX-License-Identifier: Apache-2.0
"""A Ray node on each of three hosts, one of which is cut off: the job goes on long before Ray notices."""

import importlib.util
import json
import os
import secrets
import subprocess
import tempfile
from pathlib import Path

import msgspec
import pytest

from distbelief.events import CheckpointWritten, Observation, RoleLost, RoleStarted
from tests.hosts import Hosts
from tests.hosts_job import EPOCHS, EXAMPLES

HOSTS = 3
VICTIM = 2
LOST_SECONDS = 2.0
"""From a cut until its roles are reported lost; Ray would take a minute."""
KEEPER = b"distbelief.engine.keeper"


def keepers_of(hosts: Hosts, host: int) -> list[int]:
    """The processes of a host that are a keeper or were forked from one."""
    found = []
    for pid in hosts.pids(host):
        try:
            if KEEPER in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.xdist_group("ray")
def test_a_job_on_ray_outlives_a_host_that_is_cut_off_and_never_comes_back(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    if reason := Hosts.missing():
        pytest.skip(reason)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **token}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, Hosts(HOSTS) as hosts:
        hosts.start_ray(Path(folder), cpus=4, store_bytes=80 << 20, env=environment)
        address = f"{hosts.addresses[0]}:{hosts.RAY_PORT}"
        driver = hosts.python(
            0, "-m", "tests.hosts_job", address, str(tmp_path / "run"), env=environment, stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert driver.stdout is not None
        heard, cut_at = [], None
        for line in driver.stdout:
            observation = msgspec.json.decode(line, type=Observation)
            heard.append(observation)
            event = observation.event
            if cut_at is None and isinstance(event, CheckpointWritten) and event.examples > EXAMPLES:
                assert keepers_of(hosts, VICTIM)
                hosts.cut(VICTIM)
                cut_at = observation.seconds
        assert driver.wait(30) == 0
        assert cut_at is not None
        lost = [one for one in heard if isinstance(one.event, RoleLost)]
        roles = {one.event.role for one in lost if isinstance(one.event, RoleLost)}
        assert "shard" in {role.partition("/")[0] for role in roles}
        assert all(one.seconds - cut_at < LOST_SECONDS for one in lost)
        again = {one.event.role for one in heard if isinstance(one.event, RoleStarted) and one.event.incarnation > 0}
        assert again == roles
        assert keepers_of(hosts, VICTIM) == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reason"] == "all epochs finished"
    assert (summary["examples"]["seen"], summary["examples"]["missing"]) == (EXAMPLES * EPOCHS, 0)
    told = [fault["text"] for fault in summary["faults"] if fault["type"] == "RoleLost"]
    assert len(told) == len(lost)
    assert all("was lost: it has been silent" in text for text in told)
