# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a store: the same as in a folder, also when it is found by its address only."""

import dataclasses
import functools
import secrets
from pathlib import Path

import pytest
import torch

import distbelief as db
from distbelief import checkpoint, storage
from distbelief.errors import CheckpointError
from distbelief.events import CheckpointWritten
from distbelief.export import state_dict
from distbelief.launch import Launch
from tests import problems
from tests.killer import Killer, nth


@pytest.fixture(params=["folder", "memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder, and two stores, as Path knows them."""
    if request.param == "memory":
        return Path(f"memory://run-{secrets.token_hex(4)}")
    return Path(f"file://{tmp_path}/store") if request.param == "file" else tmp_path / "store"


def test_an_address_is_written_as_users_write_it_whatever_path_makes_of_it() -> None:
    for address in ("s3://bucket/run/1", "memory://run", "file:///tmp/run", "gs://bucket", "/tmp/run", "runs/a:b"):
        assert storage.text(Path(address)) == address
    assert [storage.is_store(Path(name)) for name in ("s3://bucket", "/s3:/bucket", "C", "runs")] == [
        True, False, False, False
    ]  # fmt: skip


def test_what_is_written_is_read_listed_shared_and_removed(place: Path) -> None:
    assert storage.listing(place) == []
    for name in ("1", "2"):
        storage.make(place / name)
        storage.write(place / name / "file", name.encode(), durable=True)
    assert sorted(storage.listing(place)) == [place / "1", place / "2"]
    storage.share(place / "1" / "file", place / "2" / "other")
    assert storage.read(place / "2" / "other") == b"1"
    with storage.fetched(place / "2" / "file") as here:
        assert here.read_bytes() == b"2"
    storage.spool(place / "1" / "large").write_bytes(b"tensors")
    storage.deliver(place / "1" / "large")
    assert storage.read(place / "1" / "large") == b"tensors"
    storage.remove(place / "1" / "file")
    assert not storage.exists(place / "1" / "file")
    assert storage.exists(place / "2" / "file")
    storage.remove(place / "2")
    assert not storage.exists(place / "2" / "file")
    storage.remove(place / "2")
    with pytest.raises(OSError, match="2"):
        storage.read(place / "2" / "file")


def test_a_store_that_nobody_knows_is_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match="nowhere://bucket"):
        storage.read(Path("nowhere://bucket/file"))


def test_a_run_with_checkpoints_in_a_store_resumes_and_exports_like_any_other(place: Path, tmp_path: Path) -> None:
    job = problems.job(run=tmp_path / "run", checkpoints=str(place), checkpoint_seconds=0.01)
    result = db.train(job, view=False, launch=Launch())
    assert result.summary.checkpoints.failed == 0
    newest, _ = checkpoint.newest(tmp_path / "run", lambda path, reason: None)
    assert newest.parent == place
    assert len(checkpoint.complete(tmp_path / "run")) == job.keep_checkpoints
    saved = state_dict(tmp_path / "run")
    assert all(torch.equal(saved[name], value) for name, value in result.model.state_dict().items())
    more = dataclasses.replace(job, epochs=3, cluster=dataclasses.replace(job.cluster, shards=3))
    again = db.train(more, resume=tmp_path / "run", view=False, launch=Launch())
    assert (again.summary.examples.seen, again.summary.examples.missing) == (3 * 640, 0)
    storage.remove(newest.parent)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.newest(tmp_path / "run", lambda path, reason: None)


@pytest.mark.slow
def test_a_shard_comes_back_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = Killer(monkeypatch, "shard/1", nth(CheckpointWritten, 2))
    job = problems.job(
        run=tmp_path / "run", checkpoints=f"file://{tmp_path}/store", checkpoint_seconds=0.2, epochs=40,
        data=functools.partial(problems.points, 6400), cluster=db.Cluster(replicas=2, shards=2, device="cpu"),
    )  # fmt: skip
    result = db.train(job, view=False, listeners=[killer])
    assert killer.killed
    assert result.summary.examples.missing == 0
    assert "ShardRestored" in [fault.type for fault in result.summary.faults]
