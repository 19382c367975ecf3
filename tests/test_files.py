# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints in a store: what they are on a disk they are there, and nothing is left on the machine."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import distbelief as db
from distbelief import checkpoint, files
from distbelief.events import CheckpointRejected, CheckpointWritten, Observation, ShardRestored
from distbelief.export import export
from distbelief.files import Draft, StorePath, open_to_read, path_of
from tests import problems
from tests.killer import Killer, nth


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
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


def test_sandblaster_keeps_its_history_in_a_store_too(store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields: dict[str, Any] = {"test": None, "checkpoint_seconds": 60.0}
    options = {"l2": 1e-3, "deterministic": True}
    whole = trained(
        store + "/whole", tmp_path / "whole", algorithm=db.Sandblaster(max_iterations=14, **options), **fields
    )
    trained(store, run, algorithm=db.Sandblaster(max_iterations=6, **options), **fields)
    resumed = trained(store, run, resume=run, algorithm=db.Sandblaster(max_iterations=14, **options), **fields)
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


@pytest.mark.slow
def test_a_killed_shard_comes_back_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Observation] = []
    killer = Killer(monkeypatch, "shard/1", nth(CheckpointWritten, 2))
    cluster = db.Cluster(replicas=2, shards=2, threads_per_replica=1)
    slow = db.Faults(slow={"replica/0": 6.0, "replica/1": 6.0})
    job = problems.job(
        cluster=cluster, data=functools.partial(problems.points, 3200), epochs=4, checkpoint_seconds=0.3,
        run=tmp_path / "run", checkpoints=f"file://{tmp_path}/store",
    )  # fmt: skip
    result = db.train(job, view=False, listeners=[heard.append, killer], faults=slow)
    assert killer.killed
    assert [one.event.shard for one in heard if isinstance(one.event, ShardRestored)] == [1]
    assert (result.summary.examples.seen, result.summary.examples.missing) == (12800, 0)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nosuch://bucket/run", "nosuch"),
        ("memory://bucket", "every process has a memory of its own"),
        ("/proc/nowhere", "cannot be kept at /proc/nowhere"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(
    where: str, said: str, tmp_path: Path
) -> None:
    local = db.Cluster(replicas=1)
    with pytest.raises(db.ConfigurationError, match=f"(?s){said}.*hint: give a place that every host can write"):
        trained(where, tmp_path / "run", cluster=local)
    assert not (tmp_path / "run").exists()


def test_a_store_with_the_checkpoints_of_another_run_is_refused(store: str, tmp_path: Path) -> None:
    trained(store, tmp_path / "run")
    with pytest.raises(db.ConfigurationError, match="it holds those of another run"):
        trained(store, tmp_path / "other")
    assert dataclasses.replace(problems.job(), checkpoints=store).checkpoints == store
