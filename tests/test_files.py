# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints in a store: what they are on a disk they are there, and nothing is left on the machine."""

import contextlib
import dataclasses
import functools
import gc
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem

import distbelief as db
from distbelief import checkpoint, files, shard_file
from distbelief.errors import CheckpointError, OutOfReach
from distbelief.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointWritten,
    Observation,
    Progress,
    ShardRestored,
)
from distbelief.export import export
from distbelief.files import Draft, StorePath, open_to_read, path_of
from distbelief.report.files import read_summary
from tests import problems
from tests.killer import Killer, nth


@contextlib.contextmanager
def serving(log: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server that speaks the protocol of S3, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    command = [sys.executable, "-m", "moto.server", "-H", address[0], "-p", str(address[1])]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            until = time.monotonic() + 30
            while server.poll() is None and time.monotonic() < until:
                with contextlib.suppress(OSError), socket.create_connection(address):
                    break
                time.sleep(0.05)
            yield server, f"http://127.0.0.1:{address[1]}"
        finally:
            server.kill()


@contextlib.contextmanager
def made(url: str, bucket: str) -> Iterator[str]:
    """The URL of an empty store on the server with this URL, which this process and those that it starts use."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests", "AWS_MAX_ATTEMPTS": "1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
            yield f"s3://{bucket}/a run"
        finally:
            _end_requests()


@pytest.fixture(scope="module")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that nobody stops."""
    with serving(tmp_path_factory.mktemp("server") / "log") as (_, url):
        yield url


@pytest.fixture
def s3(s3_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store there."""
    with made(s3_url, f"bucket-{secrets.token_hex(8)}") as store:
        yield store


@pytest.fixture
def s3_server(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server of the test's own, and the URL of an empty store there."""
    with serving(tmp_path / "server") as (server, url), made(url, "bucket") as store:
        yield server, store


def _end_requests() -> None:
    """End the thread in which fsspec makes its requests, and what it holds open."""
    fsspec.filesystem("s3").clear_instance_cache()
    gc.collect()
    loop, thread = fsspec.asyn.get_loop(), fsspec.asyn.iothread[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    fsspec.asyn.reset_after_fork()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, s3_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store. The server is there before the test begins: it outlives it."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
    elif request.param == "file":
        yield f"file://{tmp_path}/store"
    else:
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()


def test_a_name_with_a_scheme_is_in_a_store_and_any_other_is_a_path() -> None:
    assert path_of("/data/run") == Path("/data/run")
    assert path_of("s3://bucket/run") == StorePath("s3://bucket/run")
    assert str(path_of("s3://bucket/run/") / "a" / "b") == "s3://bucket/run/a/b"
    assert ((path_of("s3://bucket/run") / "a").name, str((path_of("s3://bucket/run") / "a").parent)) == (
        "a",
        "s3://bucket/run",
    )


def test_what_is_put_into_a_store_is_read_from_it_and_can_be_copied_and_removed(store: str) -> None:
    folder = path_of(store)
    assert files.children(folder) == []
    folder.mkdir(parents=True)
    draft = Draft(folder / "one")
    draft.local.write_bytes(b"content")
    assert not (folder / "one").exists(), "before it is finished"
    draft.finish(durable=True)
    files.copy(folder / "one", folder / "two")
    assert {child.name for child in files.children(folder)} == {"one", "two"}
    with open_to_read(folder / "two") as file:
        assert file.read() == b"content"
    files.remove(folder / "one")
    files.remove(folder / "one")
    assert [child.name for child in files.children(folder)] == ["two"]
    with pytest.raises(FileNotFoundError):
        open_to_read(folder / "three")


def test_a_draft_leaves_no_file_on_this_machine(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    draft = Draft(path_of(store) / "one")
    draft.local.write_bytes(b"content")
    assert os.listdir(tmp_path / "scratch") == []


def trained(store: str, run: Path, listeners: Any = (), resume: Path | None = None, **fields: Any) -> db.Result:
    simulated = db.Cluster(replicas=2, shards=2, engine="simulated")
    job = problems.job(
        **({"cluster": simulated, "run": run, "checkpoints": store, "checkpoint_seconds": 0.05} | fields)
    )
    return db.train(job, view=False, listeners=listeners, resume=resume)


def test_a_run_in_a_store_is_resumed_cut_anew_and_exported_from_there(store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = trained(store, run)
    assert (run / "checkpoints").read_text() == store
    kept = checkpoint.complete(run)
    assert 1 <= len(kept) <= 3
    assert all(str(folder).startswith(store) for folder in kept)
    export(run, tmp_path / "model.safetensors")
    same = first.model.state_dict()
    import safetensors.torch

    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(same[name], value) for name, value in exported.items())
    cluster = db.Cluster(replicas=3, shards=3, engine="simulated")
    again = trained(store, run, resume=run, cluster=cluster, epochs=4)
    assert (again.summary.examples.seen, again.summary.examples.missing) == (4 * 640, 0)


@pytest.mark.slow
def test_sandblaster_keeps_its_history_in_a_store_too(store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields: dict[str, Any] = {"test": None, "checkpoint_seconds": 60.0}
    options = {"history": 3, "l2": 1e-3, "deterministic": True}
    whole = trained(
        store + "/whole", tmp_path / "whole", algorithm=db.Sandblaster(max_iterations=9, **options), **fields
    )
    trained(store, run, algorithm=db.Sandblaster(max_iterations=5, **options), **fields)
    resumed = trained(store, run, resume=run, algorithm=db.Sandblaster(max_iterations=9, **options), **fields)
    assert problems.same_parameters(resumed.model, whole.model)


def test_a_truncated_file_of_a_store_is_noticed_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    run, heard = tmp_path / "run", list[Observation]()
    trained(f"file://{tmp_path}/store", run)
    newest = sorted((tmp_path / "store").iterdir())[-1]
    victim = next(newest.glob("shard-0*"))
    os.truncate(victim, victim.stat().st_size - 4)
    trained(f"file://{tmp_path}/store", run, listeners=[heard.append], resume=run, epochs=4)
    (rejected,) = [one.event for one in heard if isinstance(one.event, CheckpointRejected)]
    assert rejected.path.endswith(newest.name)


@pytest.mark.parametrize("asked", ["ls", "cat_file", "exists", "size"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*given: Any, **options: Any) -> Any:
        raise FSTimeoutError  # which says nothing

    trained(f"memory://{tmp_path.name}", tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, asked, gone)
        with pytest.raises(OutOfReach, match=r"memory://.*out of reach: .*FSTimeoutError"):
            checkpoint.newest(tmp_path / "run", lambda path, reason: pytest.fail(reason))
    assert checkpoint.newest(tmp_path / "run", lambda path, reason: pytest.fail(reason))
    fsspec.filesystem("memory").store.clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_killed_shard_comes_back_from_a_store(
    request: pytest.FixtureRequest, s3_url: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = request.getfixturevalue("s3") if kind == "s3" else f"file://{tmp_path}/store"
    heard: list[Observation] = []
    killer = Killer(monkeypatch, "shard/1", nth(CheckpointWritten, 2))

    def listen(observation: Observation) -> None:
        heard.append(observation)
        if isinstance(observation.event, ShardRestored):
            (tmp_path / "go").touch()

    job = problems.job(
        cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1), checkpoint_seconds=0.3, epochs=4,
        data=functools.partial(problems.Unhurried, 3200, tmp_path / "go"), run=tmp_path / "run", checkpoints=store,
    )  # fmt: skip
    result = db.train(job, view=False, listeners=[listen, killer])
    assert killer.killed
    assert [one.event.shard for one in heard if isinstance(one.event, ShardRestored)] == [1]
    assert (result.summary.examples.seen, result.summary.examples.missing) == (12800, 0)


@pytest.mark.slow
def test_training_goes_on_while_a_store_stands_still_and_when_it_is_gone(
    s3_server: tuple["subprocess.Popen[bytes]", str], tmp_path: Path
) -> None:
    server, store = s3_server
    heard: list[Observation] = []
    written: list[float] = []

    def listen(observation: Observation) -> None:
        heard.append(observation)
        if isinstance(observation.event, CheckpointWritten):
            written.append(observation.seconds)
            if len(written) == 2:
                server.send_signal(signal.SIGSTOP)
                threading.Timer(3.0, server.send_signal, [signal.SIGCONT]).start()
            elif len(written) == 3:
                server.kill()
        elif isinstance(observation.event, CheckpointFailed):
            (tmp_path / "go").touch()

    job = problems.job(
        cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1), epochs=4, checkpoint_seconds=0.3,
        data=functools.partial(problems.Unhurried, 3200, tmp_path / "go"), run=tmp_path / "run", checkpoints=store,
    )  # fmt: skip
    result = db.train(job, view=False, listeners=[listen])
    assert (result.summary.examples.seen, result.summary.examples.missing) == (12800, 0)
    _, stood_still, went_on = written
    assert went_on - stood_still > 3.0, "the checkpoint that was under way waited"
    meanwhile = [
        one.event.examples for one in heard
        if isinstance(one.event, Progress) and stood_still < one.seconds < stood_still + 3.0
    ]  # fmt: skip
    assert len(set(meanwhile)) > 2, "nothing else did"
    assert "Could not connect" in [one.event.reason for one in heard if isinstance(one.event, CheckpointFailed)][-1]
    with pytest.raises(CheckpointError, match=r"out of reach.*\n.*try again later"):
        db.train(job, view=False, resume=tmp_path / "run")


class Gone(Exception):
    pass


@pytest.mark.slow
def test_what_was_trained_while_a_store_stood_still_is_not_trained_again_after_a_restart(
    s3_server: tuple["subprocess.Popen[bytes]", str], tmp_path: Path
) -> None:
    server, store = s3_server
    written: list[float] = []

    def listen(observation: Observation) -> None:
        if not isinstance(observation.event, CheckpointWritten):
            return
        written.append(observation.seconds)
        if len(written) == 2:
            # Between the removal of an older checkpoint and the making of the next one's folder.
            threading.Timer(0.4, server.send_signal, [signal.SIGSTOP]).start()
            threading.Timer(2.5, server.send_signal, [signal.SIGCONT]).start()
        elif len(written) == 3:
            raise Gone

    job = problems.job(
        cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1), epochs=4, checkpoint_seconds=1.0,
        data=functools.partial(problems.Unhurried, 3200, tmp_path / "go"), run=tmp_path / "run", checkpoints=store,
    )  # fmt: skip
    with pytest.raises(Gone):
        db.train(job, view=False, listeners=[listen])
    (tmp_path / "go").touch()
    assert written[2] - written[1] > 2.5
    db.train(dataclasses.replace(job, checkpoint_seconds=60.0), view=False, resume=tmp_path / "run")
    folder, manifest = checkpoint.newest(tmp_path / "run", lambda path, reason: pytest.fail(reason))
    applied = [shard_file.read_state(folder / file.name).examples for file in manifest.shards]
    # Pushes that were under way when the shards wrote may be in one and not in the other.
    assert all(0 <= examples - 12800 <= 8 * job.batch_size for examples in applied), applied


@pytest.mark.parametrize(
    ("engine", "where", "said"),
    [
        ("simulated", "nosuch://bucket/run", "nosuch"),
        ("local", "memory://bucket", "every process has a memory of its own"),
        ("simulated", "/proc/nowhere", "cannot be kept at /proc/nowhere"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(
    engine: str, where: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(db.ConfigurationError, match=f"(?s){said}.*hint: give a place that every host can write"):
        trained(where, tmp_path / "run", cluster=db.Cluster(replicas=1, engine=engine))
    assert not (tmp_path / "run").exists()


def test_a_job_that_is_refused_leaves_no_run_folder_unless_it_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise db.ConfigurationError("host b does not see the folder", hint="give another")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["distbelief.train"], "appoint", refuse)
        with pytest.raises(db.ConfigurationError, match="host b"):
            db.train(problems.job(run=tmp_path / "run"), view=False)
    assert not (tmp_path / "run").exists()
    db.train(problems.job(run=tmp_path / "run"), view=False)
    monkeypatch.setattr(sys.modules["distbelief.train"], "appoint", refuse)
    with pytest.raises(db.ConfigurationError, match="host b"):
        db.train(problems.job(epochs=3), view=False, resume=tmp_path / "run")
    assert checkpoint.complete(tmp_path / "run")


def test_why_a_job_failed_is_told_without_the_hint(tmp_path: Path) -> None:
    heard: list[object] = []

    def listen(observation: Observation) -> None:
        heard.append(observation.event)
        if len(heard) == 5:
            raise db.TrainingFailed("no host is left to start roles on\nhint: resume the run")

    with pytest.raises(db.TrainingFailed, match="hint: resume the run"):
        db.train(problems.job(run=tmp_path / "run"), view=False, listeners=[listen])
    assert read_summary(tmp_path / "run" / "summary.json").reason == (
        "failed: TrainingFailed: no host is left to start roles on"
    )


def test_a_store_with_the_checkpoints_of_another_run_is_refused(store: str, tmp_path: Path) -> None:
    trained(store, tmp_path / "run", checkpoint_seconds=60.0)
    with pytest.raises(db.ConfigurationError, match="it holds those of another run"):
        trained(store, tmp_path / "other")
    assert dataclasses.replace(problems.job(), checkpoints=store).checkpoints == store
