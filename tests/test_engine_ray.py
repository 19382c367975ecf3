# SPDX-License-Identifier: Apache-2.0
"""Jobs on Ray: on two hosts of one cluster (ray_scenarios.py, run once), and on a Ray begun for the job."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import marked_processes

import distbelief as db
from distbelief.engine import reaper
from distbelief.engine.pickles import Unpickler, pack
from distbelief.engine.placement import Group, check_room, next_host
from distbelief.engines import engine_of, groups
from distbelief.errors import ConfigurationError
from tests import problems

ray = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("ray") is None, reason="pip install 'distbelief[ray]'"
)
ROOT = Path(__file__).parents[1]
FOLDERS = os.pathsep.join([str(ROOT), *filter(None, sys.path)])


def environment() -> dict[str, str]:
    return {"RAY_USAGE_STATS_ENABLED": "0", **os.environ, "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every scenario."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ray_scenarios", str(tmp_path_factory.mktemp("ray"))], cwd=ROOT,
        env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-5000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


FILES = ["checkpoints", "events.jsonl", "initial.safetensors", "launch.json", "state.json", "summary.json"]

in_turn = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("ray"), ray]


def marked(marks: list[Any]) -> Any:
    def apply(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return apply


@marked(in_turn)
def test_downpour_counts_every_example_once_and_leaves_the_files_of_any_run(told: dict[str, Any]) -> None:
    came = told["downpour"]
    assert (came["reason"], came["missing"], came["repeated"], came["lost"]) == ("all epochs finished", 0, 0, [])
    assert came["test"]["accuracy"] > 0.8
    assert set(FILES) <= set(came["files"])


@marked(in_turn)
def test_what_travels_between_hosts_may_be_encrypted_and_rounded_and_the_result_is_not_rounded(
    told: dict[str, Any], tmp_path: Path
) -> None:
    came = told["encrypted_and_rounded"]
    assert (came["reason"], came["missing"], came["lost"]) == ("all epochs finished", 0, [])
    algorithm = db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited")
    cluster = db.Cluster(replicas=1, shards=2, device="cpu")
    job = problems.job(run=tmp_path / "run", algorithm=algorithm, cluster=cluster, test=None, epochs=1)
    exact = torch.cat([value.flatten() for value in db.train(job, view=False).model.state_dict().values()])
    values = torch.tensor(came["values"])
    assert not torch.equal(values, exact), "nothing was rounded on its way"
    torch.testing.assert_close(values, exact, rtol=0.0, atol=0.02)
    assert (values == values.bfloat16()).float().mean() < 0.1
    if told["downpour"]["frames"] is None:
        pytest.skip("only root can look at what travels")
    assert told["downpour"]["frames"] > 0
    assert came["frames"] == 0


@marked(in_turn)
def test_partitions_on_two_hosts_train_what_partitions_of_one_machine_train(
    told: dict[str, Any], tmp_path: Path
) -> None:
    algorithm = db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited")
    cluster = db.Cluster(replicas=1, partitions=2, shards=1, device="cpu")
    job = problems.job(run=tmp_path / "run", algorithm=algorithm, cluster=cluster, test=None, epochs=1)
    model = db.train(job, view=False).model
    expected = [float(value.double().sum()) for value in model.state_dict().values()]
    assert told["partitioned"]["parameters"] == pytest.approx(expected, abs=1e-5)
    assert told["partitioned"]["lost"] == []


@marked(in_turn)
def test_sandblaster_takes_the_steps_that_it_takes_on_one_machine(told: dict[str, Any], tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=2, shards=2, device="cpu")
    job = problems.job(run=tmp_path / "run", algorithm=db.Sandblaster(max_iterations=5), cluster=cluster)
    model = db.train(job, view=False).model
    expected = [float(value.double().sum()) for value in model.state_dict().values()]
    assert told["sandblaster"]["parameters"] == pytest.approx(expected, abs=1e-4)


@marked(in_turn)
def test_shards_are_spread_groups_are_packed_and_resources_decide_where_a_role_lives(told: dict[str, Any]) -> None:
    where = {role: host for role, (host, _) in told["placement"].items()}
    assert where["shard/0"] != where["shard/1"]
    assert where["a/0"] == where["a/1"]
    assert where["fast/0"] != where["gpu/0"] == where["gpu/1"]
    devices = {role: devices for role, (_, devices) in told["placement"].items()}
    assert {devices["gpu/0"], devices["gpu/1"]} == {"0", "1"}
    assert devices["shard/0"] == ""


@marked(in_turn)
def test_a_group_that_no_host_has_room_for_beside_the_rest_of_the_job_is_placed_on_several(
    told: dict[str, Any],
) -> None:
    where = {role: host for role, (host, _) in told["scattered"].items()}
    together = [where[f"{name}/0"] == where[f"{name}/1"] for name in "abc"]
    assert together == [True, True, False]


@marked(in_turn)
def test_what_the_cluster_lacks_is_said_at_once_and_nothing_is_left_of_the_run(told: dict[str, Any]) -> None:
    refused = told["refusals"]
    for name, message in (("room", "53 CPU asked, 6 available"), ("gpus", "16 GPU asked, 2 available"),
                          ("custom", "2 tpu asked, 0 available")):  # fmt: skip
        assert refused[name]["kind"] == "ConfigurationError"
        assert message in refused[name]["message"]
        assert refused[name]["seconds"] < 2.0
    assert refused["left"] == []


@marked(in_turn)
def test_when_a_host_of_the_cluster_is_lost_its_roles_live_on_elsewhere(told: dict[str, Any]) -> None:
    came = told["lost_host"]
    assert came["ended"]
    roles = [role for role, _ in came["lost"]]
    assert any(role.startswith("shard/") for role in roles), "shards were spread over both hosts"
    assert came["hosts"] == 1
    assert all("was lost: it has been silent" in reason for _, reason in came["lost"])
    assert set(roles) <= set(came["again"])
    assert (came["reason"], came["missing"]) == ("all epochs finished", 0)
    assert came["test"]["accuracy"] > 0.8


@marked(in_turn)
def test_the_contract_of_engines_holds_on_ray() -> None:
    program = "import ray, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = ["tests/test_engine_contract.py", "-k", "[ray", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-c", program, *chosen], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= 36


JOB = """
import functools
import distbelief as db
from tests import problems

job = problems.job(data=functools.partial(problems.points, {examples}), cluster=db.Cluster(replicas=2, shards=2))
"""


def train(tmp_path: Path, examples: int, *options: str) -> "subprocess.Popen[str]":
    script = tmp_path / "job.py"
    script.write_text(JOB.format(examples=examples))
    arguments = ["train", str(script), "--run", str(tmp_path / "run"), "--cluster.engine", "ray"]
    arguments += ["--cluster.lost-seconds", "8", *options]
    return subprocess.Popen(
        [sys.executable, "-c", "from distbelief.cli import command; command()", *arguments], cwd=ROOT,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@marked(in_turn)
def test_the_command_line_trains_on_a_ray_begun_for_the_job_and_ends_it(tmp_path: Path) -> None:
    before = set(marked_processes())
    for name in ("queue", "random", "selectors"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('files of the working folder are not Python\\'s own')")
    with train(tmp_path, 320, "--cluster.replicas", "1") as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "all epochs finished" in said
    assert set(marked_processes()) <= before


@marked(in_turn)
def test_the_ray_of_a_job_asks_for_a_token_tells_nobody_and_is_gone_when_the_drivers_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(marked_processes())
    events = tmp_path / "run" / "events.jsonl"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with train(tmp_path, 640_000) as process:
        until = time.monotonic() + 120
        while not (events.exists() and "Progress" in events.read_text()):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        begun = set(marked_processes()) - before
        assert len(begun) > 6
        (server,) = (one for one in begun if one.endswith(" gcs_server"))
        told = Path("/proc", server.split()[0], "environ").read_bytes().split(b"\0")
        assert {b"RAY_USAGE_STATS_ENABLED=0", b"RAY_AUTH_MODE=token"} <= set(told)
        (token,) = (entry.partition(b"=")[2] for entry in told if entry.startswith(b"RAY_AUTH_TOKEN="))
        assert len(token) == 64
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20.0
    while left := set(marked_processes()) - before:
        assert time.monotonic() < until, left
        time.sleep(0.1)


@marked([ray])
def test_a_cluster_that_is_not_there_is_refused_with_its_address_and_the_reason(tmp_path: Path) -> None:
    cluster = db.Cluster(engine="ray", address="127.0.0.1:1")
    with pytest.raises(ConfigurationError, match=r"(?s)127\.0\.0\.1:1.*no host reachable.*Connection refused"):
        db.train(problems.job(run=tmp_path / "run", cluster=cluster), view=False)
    assert not (tmp_path / "run").exists()


@marked([ray])
def test_what_answers_but_is_no_ray_is_refused_soon_and_the_hint_names_the_token() -> None:
    program = "import sys; from distbelief.engine import ray_connection as r; r.ANSWER_SECONDS = 0.5; r.CONNECTION"
    with socket.create_server(("", 0)) as stranger:
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        run = subprocess.run(
            [sys.executable, "-c", f"{program}.held({address!r}, {{}}).__enter__()"], env=environment(),
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert "ConfigurationError" in run.stderr
    assert "has not answered as Ray within 0.5 s" in run.stderr
    assert "RAY_AUTH_MODE=token" in run.stderr


@marked([ray])
@pytest.mark.parametrize("address", ["nonsense", "ray://10.0.0.1:10001"])
def test_an_address_that_leads_to_no_hosts_is_refused_by_what_it_is(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)address='(nonsense'.*Invalid|ray://10.*Ray's client)"):
        db.train(problems.job(run=tmp_path / "run", cluster=db.Cluster(engine="ray", address=address)), view=False)


@marked([ray])
def test_a_machine_that_is_no_host_of_the_cluster_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine import ray_connection

    monkeypatch.setattr(ray_connection, "_cluster_at", lambda address: "its identity")
    monkeypatch.setattr(ray_connection, "find_node_ids", list)
    monkeypatch.setattr(cluster, "init", lambda *options, **more: pytest.fail("it would try for more than a minute"))
    message = (
        r"address='10.0.0.1:6379'\): the cluster is there, but this machine is no host .*\nhint: run `ray start --add"
    )
    with ExitStack() as stack, pytest.raises(ConfigurationError, match=message):
        ray_connection._begin(stack, "10.0.0.1:6379", {})


@marked([ray])
def test_a_ray_that_cannot_be_begun_here_is_a_matter_of_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray as cluster

    def fail(**options: Any) -> None:
        raise RuntimeError("Failed to start GCS.")

    monkeypatch.setattr(cluster, "init", fail)
    with pytest.raises(ConfigurationError, match=r"(?s)no Ray could be begun on this machine: Failed to start GCS"):
        db.train(problems.job(run=tmp_path / "run", cluster=db.Cluster(engine="ray")), view=False)


@marked([ray])
def test_a_connection_that_was_begun_halfway_is_not_left_for_the_next_job(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine import ray_connection

    done: list[str] = []

    def fail(**options: Any) -> None:
        done.append("connected")
        raise RuntimeError("the log monitor did not start")

    monkeypatch.setattr(cluster, "init", fail)
    monkeypatch.setattr(cluster, "shutdown", lambda: done.append("left"))
    connection = ray_connection.Connection()
    with pytest.raises(ConfigurationError, match="the log monitor did not start"), connection.held("auto", {}):
        pass
    assert done == ["connected", "left"]


@marked([ray])
def test_ray_makes_its_sockets_where_temporary_files_are_unless_that_is_too_long_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbelief.engine.ray_connection import folder_of_sockets

    monkeypatch.setattr("tempfile.tempdir", "/var/tmp")
    assert folder_of_sockets() == Path("/var/tmp")
    monkeypatch.setattr("tempfile.tempdir", "/scratch/users/somebody/slurm-1234567")
    assert folder_of_sockets() == Path("/tmp")


@marked([ray])
def test_a_connection_is_left_by_the_last_job_that_shares_it_and_leads_to_one_cluster_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray as cluster

    from distbelief.engine import ray_connection

    there: list[str] = []

    @contextmanager
    def embedded(asked: object) -> Iterator[None]:
        there.append("ray")
        yield
        there.pop()

    places = {"10.0.0.1:6379": "one", "head:6379": "one", "10.0.0.2:6379": "another"}
    monkeypatch.setattr(cluster, "is_initialized", lambda: bool(there))
    monkeypatch.setattr(cluster, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(ray_connection, "_cluster_at", places.__getitem__)
    monkeypatch.setattr(ray_connection, "_embedded", embedded)
    connection = ray_connection.Connection()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(connection.held(None, {}))
        for address in (None, "auto", "head:6379"):
            second.enter_context(connection.held(address, {}))
        with pytest.raises(ConfigurationError, match=r"address='10.0.0.2:6379'.*another cluster, 10.0.0.1:6379"):
            second.enter_context(connection.held("10.0.0.2:6379", {}))
        first.close()
        assert there == ["ray"]
    assert there == []
    there.append("the user's own")
    with connection.held(None, {}):
        assert there == ["the user's own"]
    assert there == ["the user's own"]


@marked([ray])
def test_a_job_whose_ray_the_user_has_shut_down_asks_nothing_of_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine.ray import RayKeepers

    monkeypatch.setattr(cluster, "init", lambda *options, **more: pytest.fail("it connected again"))
    keepers = RayKeepers.__new__(RayKeepers)
    keepers._actors, keepers._stack = {"ray-1": (object(), object())}, ExitStack()
    assert keepers.complaints() == {"ray-1": "Ray was shut down in this process"}
    keepers.end()
    assert keepers._actors == {}


@marked([ray])
def test_a_job_that_is_interrupted_while_its_keepers_end_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine.ray import RayKeepers

    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "wait", interrupted)
    keepers, given_back = RayKeepers.__new__(RayKeepers), list[str]()
    keepers._actors, keepers._stack = {"ray-1": (object(), object())}, ExitStack()
    keepers._stack.callback(given_back.append, "room")
    with pytest.raises(KeyboardInterrupt):
        keepers.end()
    assert (given_back, keepers._actors) == (["room"], {})


@marked([ray])
def test_an_address_of_the_cluster_that_is_none_of_this_hosts_is_refused_and_the_cluster_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distbelief.engine import ray as engine

    left = list[str]()
    keepers = SimpleNamespace(host="10.0.0.1 (node 1)", address="192.0.2.1", end=lambda: left.append("the cluster"))
    monkeypatch.setattr(engine, "RayKeepers", lambda address, groups: keepers)
    with pytest.raises(
        ConfigurationError, match=r"cannot listen at 192\.0\.2\.1, its address .*\nhint: start Ray .*--node-ip"
    ):
        engine_of(problems.job(cluster=db.Cluster(engine="ray")), None, None)
    assert left == ["the cluster"]


@marked([ray])
def test_hosts_are_being_prepared_until_their_actor_is_up_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine.ray import RayKeepers

    up = list[str]()
    monkeypatch.setattr(cluster, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "wait", lambda asked, timeout: ([each for each in asked if each in up], []))
    keepers = RayKeepers.__new__(RayKeepers)
    keepers._preparing, keepers._prepared_by = {"one": "first", "other": "second"}, time.monotonic() + 60.0
    assert set(keepers.preparing()) == {"one", "other"}
    up.append("first")
    assert set(keepers.preparing()) == {"other"}
    keepers._prepared_by = time.monotonic() - 1.0
    assert not keepers.preparing()


@marked([ray])
def test_accelerators_that_cannot_be_had_are_told_with_role_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray as cluster

    from distbelief.engine import ray as engine

    def failed(asked: object, timeout: float) -> None:
        raise cluster.exceptions.RuntimeEnvSetupError("ERROR: No matching distribution found for torch==99")

    seat = SimpleNamespace(devices=SimpleNamespace(remote=lambda: "the devices"))
    monkeypatch.setattr(cluster, "remote", lambda **options: lambda actor: SimpleNamespace(remote=lambda: seat))
    monkeypatch.setattr(cluster, "get", failed)
    keepers = engine.RayKeepers.__new__(engine.RayKeepers)
    keepers._groups, keepers._stack = [Group(("replica/0",), {"GPU": 1.0})], ExitStack()
    keepers._planned, keepers._devices = {"replica/0": "10.0.0.1 (node 1)"}, {}
    message = r"host 10.0.0.1 \(node 1\) does not take part: replica/0 got no accelerator: .*torch==99\nhint: start"
    with pytest.raises(ConfigurationError, match=message):
        keepers._seat([cast("Any", None)])


@marked([ray])
def test_room_that_is_there_and_is_not_reserved_says_that_a_host_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from distbelief.engine import ray as engine

    tried, removed, pair = list[str](), list[Any](), Group(("a", "b"), {"CPU": 2.0})
    never = SimpleNamespace(wait=lambda seconds: False)
    monkeypatch.setattr(engine, "placement_group", lambda each, strategy: tried.append(strategy) or never)
    monkeypatch.setattr(engine, "remove_placement_group", removed.append)
    keepers = engine.RayKeepers.__new__(engine.RayKeepers)
    keepers._stack = ExitStack()
    for free, said in (
        (4.0, r"Ray has reserved no room for a, b .*\nhint: look whether"),
        (3.0, "has no room for a, b"),
    ):
        monkeypatch.setattr(keepers, "_free", lambda free=free: {"10.0.0.1 (node 1)": {"CPU": free}})
        with pytest.raises(ConfigurationError, match=rf"{said}"):
            keepers._reserve(pair, [{"CPU": 4.0}])
    assert tried == ["STRICT_PACK", "PACK"] * 2
    assert removed == [never] * 4, "a room that comes late would be taken beside another"


@marked([ray])
def test_hosts_are_named_by_their_addresses_which_several_may_have() -> None:
    from distbelief.engine.ray import _host_name

    nodes = [{"NodeManagerAddress": "10.0.0.1", "NodeID": letter * 56} for letter in "ab"]
    assert [_host_name(node) for node in nodes] == ["10.0.0.1 (node aaaaaaaa)", "10.0.0.1 (node bbbbbbbb)"]


@marked([ray])
def test_an_environment_that_a_host_cannot_make_is_told_by_what_the_installer_said_last() -> None:
    from ray.exceptions import ActorDiedError, RuntimeEnvSetupError

    from distbelief.engine.ray import telling

    error = RuntimeEnvSetupError("Traceback:\n  File ...\nERROR: No matching distribution found for xyz==1\n")
    assert telling(error).startswith("Failed to set up runtime environment.; ")
    assert telling(error).endswith("ERROR: No matching distribution found for xyz==1")
    assert telling(ActorDiedError()) == "The actor died unexpectedly before finishing this task."


def test_without_ray_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "distbelief.engine.ray", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'distbelief\[ray\]'"):
        db.train(problems.job(run=tmp_path / "run", cluster=db.Cluster(engine="ray")), view=False)
    with suppress(KeyError):
        del sys.modules["distbelief.engine.ray"]


THREADS = """
import sys, threading
from pathlib import Path
import ray
import distbelief as db
from tests import problems

def job(name, **fields):
    cluster = db.Cluster(engine="ray", device="cpu", lost_seconds=8.0)
    return problems.job(run=f"{sys.argv[1]}/{name}", cluster=cluster, test=None, **fields)

def train(name, **fields):
    said[name] = db.train(job(name, **fields), view=False).summary.reason
    left[name] = ray.is_initialized()
    go.touch()

said, left = {}, {}
if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    ray.shutdown()
    go = Path(sys.argv[1]) / "go"
    long = problems.Unhurried(3200, go)
    threads = [threading.Thread(target=train, args=("short",), kwargs={"epochs": 1}),
               threading.Thread(target=train, args=("long",), kwargs={"data": long, "epochs": 4})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(said, left)
"""


@marked(in_turn)
def test_jobs_of_several_threads_share_a_ray_that_the_last_one_ends_whatever_ray_was_there_before(
    tmp_path: Path,
) -> None:
    before = set(marked_processes())
    (tmp_path / "threads.py").write_text(THREADS)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "threads.py"), str(tmp_path)], cwd=ROOT,
        env=environment() | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-5000:]
    ended = "all epochs finished"
    assert run.stdout.splitlines()[-1] == str({"short": ended, "long": ended}) + " " + str(
        {"short": True, "long": False}
    )
    assert set(marked_processes()) <= before


def test_a_file_of_the_user_that_is_imported_in_place_of_ray_is_named(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("")
    program = (
        "import distbelief as db; from tests import problems; db.train(problems.job(cluster=db.Cluster(engine='ray')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert f"the file {tmp_path / 'ray.py'} is imported in its place\nhint: rename it" in run.stderr


# what is left


def test_processes_that_hide_where_they_come_from_are_ended_with_those_that_started_them(tmp_path: Path) -> None:
    word = f"DISTBELIEF_RAY={secrets.token_hex(8)}"
    # Its first child has no environment at all, and starts another one.
    hiding = ["sh", "-c", "env -i sh -c 'sleep 300 & echo $!; wait' & wait; sleep 300"]
    environment = os.environ | {"DISTBELIEF_RAY": word.partition("=")[2]}
    with subprocess.Popen(hiding, env=environment, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        hidden = Path("/proc", shell.stdout.readline().strip())
        while word.encode() in (hidden / "environ").read_bytes():  # it is becoming what it shall be
            time.sleep(0.01)
        reap(word, tmp_path / "ray")
        assert shell.wait(5) == -signal.SIGKILL
        until_gone(hidden)


def test_hidden_processes_are_ended_by_the_logs_that_they_write_once_nobody_is_left_who_started_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "real" / "logs").mkdir(parents=True)
    (tmp_path / "ray").symlink_to("real")
    with (tmp_path / "ray" / "logs" / "agent.out").open("w") as log:  # this process has it open too, and lives
        hiding = ["sh", "-c", "env -i sleep 300 >&2 & echo $!"]
        orphan = subprocess.run(hiding, stdout=subprocess.PIPE, stderr=log, text=True, check=True).stdout.strip()
        reading = ["sh", "-c", 'tail -f "$0" > /dev/null & echo $!', log.name]
        reader = Path("/proc", subprocess.run(reading, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
        with subprocess.Popen(["sleep", "300"], pass_fds=[log.fileno()]) as other:
            reap(f"DISTBELIEF_RAY={secrets.token_hex(8)}", tmp_path / "ray")
            until_gone(Path("/proc", orphan))
            assert other.poll() is None
            other.kill()
        assert reader.exists()
        assert not (tmp_path / "real").exists()
        os.kill(int(reader.name), signal.SIGKILL)
        until_gone(reader)


NAMED = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a ) \\xc3'); print(flush=True); time.sleep(300)"
"""Takes a name that is cut in the middle of a letter, as the kernel does with long ones."""


def test_a_process_whose_name_is_no_text_keeps_nobody_from_being_ended(tmp_path: Path) -> None:
    word = f"DISTBELIEF_RAY={secrets.token_hex(8)}"
    environment = os.environ | {"DISTBELIEF_RAY": word.partition("=")[2]}
    with subprocess.Popen([sys.executable, "-c", NAMED], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            reap(word, tmp_path / "ray")
            assert process.wait(5) == -signal.SIGKILL
        finally:
            process.kill()


def reap(word: str, folder: Path) -> None:
    said = f"{word}\n{folder}\n{os.getpid()}\n"
    folder.mkdir(exist_ok=True)
    own = os.environ | {"DISTBELIEF_RAY": word.partition("=")[2]}  # it was started by one of those
    subprocess.run([sys.executable, reaper.__file__], input=said, text=True, check=True, timeout=20, env=own)
    assert not folder.exists()


def until_gone(process: Path) -> None:
    until = time.monotonic() + 5.0
    while process.exists() and "Z" not in (process / "stat").read_text().rpartition(")")[2].split()[:1]:
        assert time.monotonic() < until
        time.sleep(0.01)


# decisions


def test_a_job_asks_for_one_packed_group_a_replica_spread_shards_and_an_evaluator() -> None:
    cluster = db.Cluster(
        engine="ray", replicas=2, partitions=2, shards=3, cpus_per_replica=4.0, gpus_per_replica=1.0,
        resources={"fast": 1.0},
    )  # fmt: skip
    each = {"CPU": 2.0, "GPU": 0.5, "fast": 1.0}
    assert groups(cluster, evaluates=True) == [
        Group(("replica/0/0", "replica/0/1"), each),
        Group(("replica/1/0", "replica/1/1"), each),
        Group(("shard/0", "shard/1", "shard/2"), {"CPU": 1.0}, spread=True),
        Group(("evaluator/0", "evaluator/1"), {"CPU": 0.5}),
    ]
    assert len(groups(cluster, evaluates=False)) == 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpus_per_replica": 0}, r"cpus_per_replica=0\) asks for nothing"),
        ({"gpus_per_replica": 1.5}, r"gpus_per_replica=1.5\) is 1.5 acc.*for each of 1 .*\nhint: .*=1 or 2"),
        ({"gpus_per_replica": 3, "partitions": 2}, r"=3\) is 1.5 acc.*for each of 2 .*\nhint: .*=2 or 4"),
    ],
)
def test_what_ray_cannot_reserve_is_refused_in_the_words_of_the_job(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        groups(db.Cluster(engine="ray", **fields), evaluates=False)
    assert groups(db.Cluster(engine="ray", cpus_per_replica=0, gpus_per_replica=0.5), evaluates=False)


def test_functions_of_a_script_that_a_worker_of_ray_does_not_run_travel_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model() -> int:
        return 7

    worker = ModuleType("__main__")
    worker.__file__ = __file__
    model.__module__, model.__qualname__ = "__main__", "model"
    monkeypatch.setitem(sys.modules, "__main__", worker)
    arrived, _, _ = Unpickler.loads(pack(model, (), None, here=False).buffers[0])
    assert arrived() == 7


def test_a_group_is_packed_on_one_host_where_one_holds_it_and_else_on_few() -> None:
    pair = Group(("a", "b"), {"CPU": 2.0, "GPU": 0.5})
    assert pair.strategies([{"CPU": 3.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]) == ["STRICT_PACK", "PACK"]
    assert pair.strategies([{"CPU": 3.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 0.5}]) == ["PACK"]
    assert Group(("a",), {"CPU": 2.0}).strategies([{"CPU": 4.0}]) == ["PACK"]
    assert Group(("a", "b"), {"CPU": 1.0}, spread=True).strategies([{"CPU": 4.0}]) == ["SPREAD"]
    assert pair.fitting([{"CPU": 7.9, "GPU": 1.6}, {"CPU": 1.9, "GPU": 8.0}, {"CPU": 8.0}]) == 3
    assert Group(("a",), {"CPU": 0.1}).fitting([{"CPU": 1.0 - 7 * 0.1}]) == 3


def test_a_process_that_no_host_can_hold_is_named_though_all_hosts_together_could() -> None:
    with pytest.raises(ConfigurationError, match="no host of the cluster has what a needs: 4 CPU"):
        check_room([Group(("a",), {"CPU": 4.0})], [{"CPU": 3.0}, {"CPU": 3.0}])


def test_a_role_goes_where_it_was_planned_and_else_where_the_fewest_live() -> None:
    assert next_host("a", ["x", "y"], {"a": "y"}, ["y", "y", "x"]) == "y"
    assert next_host("a", ["x", "z"], {"a": "y"}, ["x", "x", "z"]) == "z"
