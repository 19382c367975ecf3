# SPDX-License-Identifier: Apache-2.0
"""Checkpoint, resume, re-cut and export, through the public face and the command line."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distbelief as db
from distbelief import checkpoint, cli, run_folder
from distbelief.events import (
    CheckpointRejected,
    CheckpointWritten,
    EpochFinished,
    Evaluated,
    JobFinished,
    JobStarted,
    Observation,
    RoleLost,
    RoleStarted,
)
from distbelief.export import export, state_dict
from distbelief.launch import Launch, read
from distbelief.report import read_events, read_summary, summarize, text
from tests import problems

ROOT = Path(__file__).parents[1]


def trained(job: db.Job, run: Path, **options: Any) -> db.Result:
    return db.train(dataclasses.replace(job, run=run), view=False, **options)


def alone(**fields: Any) -> db.Job:
    """One replica that awaits its fetches: the result is then a function of the job alone."""
    given: dict[str, Any] = {
        "cluster": db.Cluster(replicas=1, shards=2, engine="simulated"),
        "algorithm": db.Downpour(fetch="awaited", update_rule=db.adagrad(0.1)),
    }
    return problems.job(**(given | fields))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "rule", [db.adagrad(0.1), db.adam(0.01), db.sgd(0.1, momentum=0.9, schedule=db.linear_decay(3000, end=0.1))]
)
def test_a_resumed_run_continues_as_if_it_had_never_stopped_on_any_number_of_shards(
    rule: db.UpdateRule, shards: int, tmp_path: Path
) -> None:
    job = alone(algorithm=db.Downpour(fetch="awaited", update_rule=rule), epochs=4)
    whole = trained(job, tmp_path / "whole").model
    trained(dataclasses.replace(job, epochs=2), tmp_path / "halves")
    cluster = dataclasses.replace(job.cluster, shards=shards)
    resumed = db.train(dataclasses.replace(job, cluster=cluster), resume=tmp_path / "halves", view=False)
    assert problems.same_parameters(resumed.model, whole)
    assert resumed.summary.examples.seen == 4 * 640


class BrokenOff(Exception):
    """Ends a job at once, as if it were killed: no last checkpoint is written."""


@pytest.mark.parametrize(("shards", "then"), [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize(
    "rule", [db.adagrad(0.1), db.adam(0.01), db.sgd(0.1, momentum=0.9, schedule=db.linear_decay(3000, end=0.1))]
)
def test_a_run_that_was_broken_off_within_an_epoch_ends_as_if_it_had_not_been(
    rule: db.UpdateRule, shards: int, then: int, tmp_path: Path
) -> None:
    job = alone(
        cluster=db.Cluster(replicas=1, shards=shards, engine="simulated"), epochs=4, checkpoint_seconds=0.5,
        algorithm=db.Downpour(fetch="awaited", update_rule=rule),
    )  # fmt: skip
    costs, written = db.Costs(example_seconds=2e-3), list[int]()
    whole = trained(job, tmp_path / "whole", costs=costs)

    def break_off(observation: Observation) -> None:
        if isinstance(observation.event, CheckpointWritten):
            written.append(observation.event.examples)
            if len(written) == 4:
                raise BrokenOff

    with pytest.raises(BrokenOff):
        trained(job, tmp_path / "broken", costs=costs, listeners=[break_off])
    assert written[-1] % 640, "the test is of the middle of an epoch"
    cluster = dataclasses.replace(job.cluster, shards=then)
    resumed = db.train(dataclasses.replace(job, cluster=cluster), resume=tmp_path / "broken", view=False, costs=costs)
    assert (resumed.summary.examples.seen, resumed.summary.examples.repeated) == (4 * 640, 0)
    assert problems.same_parameters(resumed.model, whole.model)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"epochs": 1}, {"epochs": 2}),
        ({"algorithm": db.Sandblaster(max_iterations=2)}, {"algorithm": db.Sandblaster(max_iterations=4)}),
    ],
    ids=["downpour", "sandblaster"],
)
def test_a_shard_that_dies_while_it_is_given_its_checkpoint_is_given_it_again(
    first: dict[str, Any], then: dict[str, Any], tmp_path: Path
) -> None:
    models, heard = [], list[Observation]()
    for name, hang in (("calm", ()), ("hanging", ((0.0, 100.0, "shard/1"),))):
        trained(alone(**first), tmp_path / name)
        job, faults = alone(**then), db.Faults(hang=hang)
        result = db.train(job, resume=tmp_path / name, view=False, faults=faults, listeners=[heard.append])
        models.append(result.model)
    assert [one.event.role for one in heard if isinstance(one.event, RoleLost)] == ["shard/1"]
    assert problems.same_parameters(*models)


def test_what_a_start_says_of_a_run_is_its_own(tmp_path: Path) -> None:
    heard: list[Observation] = []
    trained(problems.job(epochs=1), tmp_path / "run", listeners=[heard.append])
    db.train(problems.job(), resume=tmp_path / "run", view=False, listeners=[heard.append])
    first, second = (one.event for one in heard if isinstance(one.event, JobStarted))
    assert first.shard_balance == second.shard_balance == 130 / 129.5  # of 259 parameters
    assert (first.resumed_examples, second.resumed_examples) == (0, 640)
    assert (first.virtual, first.algorithm) == (True, "Downpour, adagrad(0.1)")


def test_every_role_of_a_resumed_run_is_a_later_incarnation_than_any_before(tmp_path: Path) -> None:
    heard: list[Observation] = []
    begun = trained(problems.job(epochs=1), tmp_path / "run", listeners=[heard.append])
    before = {one.event.incarnation for one in heard if isinstance(one.event, RoleStarted)}
    heard.clear()
    db.train(problems.job(), resume=begun.run, view=False, listeners=[heard.append])
    assert min(one.event.incarnation for one in heard if isinstance(one.event, RoleStarted)) > max(before)


def test_a_run_resumes_on_another_number_of_replicas_and_counts_every_example_once(tmp_path: Path) -> None:
    job = problems.job(cluster=db.Cluster(replicas=2, shards=2, engine="simulated"), epochs=2)
    trained(job, tmp_path / "run")
    more = dataclasses.replace(job, epochs=5, cluster=db.Cluster(replicas=5, shards=4, engine="simulated"))
    summary = db.train(more, resume=tmp_path / "run", view=False).summary
    assert (summary.examples.seen, summary.examples.repeated, summary.examples.missing) == (5 * 640, 0, 0)
    assert (summary.replicas, summary.shards) == (5, 4)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    job = problems.job(checkpoint_seconds=0.3, keep_checkpoints=2, epochs=6)
    trained(job, tmp_path / "run", costs=db.Costs(example_seconds=2e-3))
    kept = checkpoint.folders(tmp_path / "run")
    assert len(kept) == 2
    assert int(kept[0].name) > 4


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    job = problems.job(checkpoint_seconds=0.3, epochs=6)
    trained(job, tmp_path / "run", costs=db.Costs(example_seconds=2e-3))
    newest = checkpoint.folders(tmp_path / "run")[0]
    damaged = newest / "shard-0.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 0xFF
    damaged.write_bytes(content)
    heard: list[Observation] = []
    result = db.train(dataclasses.replace(job, epochs=7), resume=tmp_path / "run", view=False, listeners=[heard.append])
    (rejected,) = [one.event for one in heard if isinstance(one.event, CheckpointRejected)]
    assert rejected.path == str(newest)
    assert "was changed since it was written" in rejected.reason
    assert result.summary.examples.missing == 0


def test_resuming_with_another_model_names_the_parameters_that_differ(tmp_path: Path) -> None:
    trained(problems.job(), tmp_path / "run")
    other = problems.job(model=wider_classifier, epochs=3)
    with pytest.raises(db.CheckpointError) as caught:
        db.train(other, resume=tmp_path / "run", view=False)
    assert "0.weight has shape [20, 12], the checkpoint [16, 12]" in str(caught.value)
    assert "hint: resume with the model" in str(caught.value)


def test_a_refused_resume_changes_nothing_in_the_run_folder(tmp_path: Path) -> None:
    result = trained(problems.job(), tmp_path / "run")
    with pytest.raises(db.CheckpointError):
        db.train(problems.job(model=wider_classifier, epochs=3), resume=tmp_path / "run", view=False)
    export(tmp_path / "run", tmp_path / "model.safetensors")
    module = problems.classifier()
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert problems.same_parameters(module, result.model)


class Strange:
    """A rule of a user's own that knows no other's state."""

    name = "strange"

    def __repr__(self) -> str:
        return "Strange()"

    def check(self, groups: Any) -> None:
        """Anything goes."""

    def bind(self, parameters: torch.Tensor, segments: Any, span: Any) -> Any:
        return self

    def apply(self, gradient: torch.Tensor, **of_push: int) -> None:
        """Does nothing."""

    def load(self, vectors: Any, scalars: Any) -> None:
        vectors["momentum"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "with seed 3"),
        (
            {"algorithm": db.Downpour(update_rule=db.adam())},
            r"(?s)^(?!.*does not take).*\nhint: resume with the rule of the checkpoint",
        ),
        ({"seed": 3, "cluster": db.Cluster(partitions=2)}, "with seed 3"),
        (
            {"algorithm": db.Downpour(update_rule=Strange())},
            r"Strange\(\) does not take .*KeyError.*\nhint: resume with",
        ),
        ({"epochs": 1}, r"run/checkpoints/\d+ has 2 epochs behind it, the job asks for 1\nhint: .* --epochs 4"),
    ],
    ids=["seed", "rule", "cut", "own rule", "epochs"],
)
def test_what_a_refused_resume_was_given_is_not_kept_and_no_role_starts(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = trained(problems.job(), tmp_path / "run").run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    job, given = problems.job(**({"epochs": 3} | changes)), Launch("other.py", (("--seed", "3"),))
    with pytest.raises(db.DistbeliefError, match=said):
        db.train(job, resume=run, view=False, launch=given)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_another_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "launch.json").write_text('{"script": "mine.py", "options": {}, "overrides": {}}')
    with pytest.raises(db.CheckpointError, match=r"was started by another version of distbelief.*\nhint: go on with"):
        read(tmp_path)


def test_a_folder_that_is_no_run_is_left_as_it_is_by_a_resume(tmp_path: Path) -> None:
    with pytest.raises(db.CheckpointError, match="holds no complete checkpoint"):
        db.train(problems.job(), resume=tmp_path, view=False)
    assert not list(tmp_path.iterdir())


def test_a_run_can_be_resumed_while_a_process_that_a_listener_forked_lives_on(tmp_path: Path) -> None:
    forked: list[int] = []

    def fork(observation: Observation) -> None:
        if isinstance(observation.event, JobStarted):
            forked.append(os.fork())
            if not forked[-1]:
                time.sleep(60)
                os._exit(0)

    trained(problems.job(epochs=1), tmp_path / "run", listeners=[fork])
    try:
        assert db.train(problems.job(), resume=tmp_path / "run", view=False).summary.examples.missing == 0
    finally:
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)


def test_a_run_that_is_being_trained_is_not_trained_by_anybody_else(tmp_path: Path) -> None:
    refused: list[str] = []

    def interfere(observation: Observation) -> None:
        if isinstance(observation.event, EpochFinished):
            with pytest.raises(db.ConfigurationError) as caught:
                db.train(problems.job(epochs=5), resume=tmp_path / "run", view=False)
            refused.append(str(caught.value))

    result = trained(problems.job(), tmp_path / "run", listeners=[interfere])
    assert len(refused) == 2
    assert all("run is being trained by another process" in words for words in refused)
    assert result.summary.examples.seen == 2 * 640
    resumed = db.train(problems.job(epochs=3), resume=tmp_path / "run", view=False)
    assert resumed.summary.examples.seen == 3 * 640


def wider_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    trained(problems.job(), tmp_path / "run")
    other = problems.job(data=functools.partial(problems.points, 600), epochs=3)
    with pytest.raises(db.CheckpointError, match=r"640 examples with seed 0, the job has 600 .*(\n.*)?hint"):
        db.train(other, resume=tmp_path / "run", view=False)


def test_resuming_a_run_that_is_complete_says_to_give_more_epochs(tmp_path: Path) -> None:
    trained(problems.job(), tmp_path / "run")
    with pytest.raises(db.ConfigurationError, match=r"has 2 epochs behind it, the job asks for 2\nhint: give more"):
        db.train(problems.job(), resume=tmp_path / "run", view=False)


def test_resuming_a_killed_run_for_fewer_epochs_than_it_has_begun_is_refused(tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=2, shards=2, engine="simulated")
    job = problems.job(cluster=cluster, epochs=6, checkpoint_seconds=0.2, keep_checkpoints=100)
    trained(job, tmp_path / "run", costs=db.Costs(example_seconds=2e-3))
    for folder in checkpoint.complete(tmp_path / "run"):  # as a kill would have left it
        leases = checkpoint.read_manifest(folder).leases
        assert leases is not None
        if leases.unsettled and leases.issued * leases.lease_examples > 3 * 640:
            break
        checkpoint.discard(folder)
    with pytest.raises(db.ConfigurationError, match=r"is in epoch [4-6], the job asks for 2\nhint: give more epochs"):
        db.train(dataclasses.replace(job, epochs=2), resume=tmp_path / "run", view=False)
    assert db.train(job, resume=tmp_path / "run", view=False).summary.examples.missing == 0


def test_what_a_run_offers_to_resume_and_export_it_does_so(tmp_path: Path) -> None:
    job = problems.job()
    offered = trained(job, tmp_path / "a run").summary
    # This process was not started from a script that defines a job, so what is offered is Python.
    resumed = eval(offered.resume_command, {"distbelief": db, "dataclasses": dataclasses, "job": job})
    assert resumed.summary.examples.seen == 4 * 640
    verb, *paths = shlex.split(offered.export_command)[1:]
    assert (verb, paths) == ("export", [str(tmp_path / "a run"), "model.safetensors"])
    assert export(Path(paths[0]), tmp_path / paths[1]) == 259


def test_what_a_killed_run_offers_to_resume_it_is_what_a_finished_one_would(tmp_path: Path) -> None:
    trained(problems.job(), tmp_path / "run")
    heard = read_events(tmp_path / "run" / "events.jsonl")
    killed = summarize([each for each in heard if not isinstance(each.event, JobFinished)])
    assert killed.reason.startswith("killed")
    # No command starts again what this process began.
    assert killed.resume_command == f"distbelief.train(job, resume={str(tmp_path / 'run')!r})"
    assert killed.export_command == f"distbelief export {tmp_path / 'run'} model.safetensors"
    unsaved = summarize([each for each in heard if isinstance(each.event, JobStarted)])
    assert (unsaved.resume_command, unsaved.export_command) == ("", "")


def test_a_run_without_a_checkpoint_offers_neither_to_resume_nor_to_export_it(tmp_path: Path) -> None:
    heard: list[Observation] = []

    def block(observation: Observation) -> None:
        heard.append(observation)
        if isinstance(observation.event, JobStarted):
            (tmp_path / "run" / "checkpoints").write_text("/proc/nowhere")

    with pytest.raises(db.TrainingFailed, match=r"first checkpoint could not be written: .*\nhint: look for room"):
        trained(problems.job(), tmp_path / "run", listeners=[block])
    last = heard[-1].event
    assert isinstance(last, JobFinished)
    assert (last.resume_command, last.export_command) == ("", "")
    assert text(read_summary(tmp_path / "run" / "summary.json")).count("no checkpoint is kept") == 2


def test_whichever_byte_of_a_run_is_damaged_what_is_said_is_of_ours(tmp_path: Path) -> None:
    run = trained(problems.job(), tmp_path / "run").run
    folder = checkpoint.complete(run)[0]
    readers: dict[Path, Callable[[], object]] = {
        run / "launch.json": lambda: read(run),
        run / "state.json": lambda: state_dict(run),
        run / "summary.json": lambda: read_summary(run / "summary.json"),
        run / "events.jsonl": lambda: read_events(run / "events.jsonl"),
        folder / "manifest.json": lambda: checkpoint.read_manifest(folder),
    }
    for path, reads in readers.items():
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            for damage in (b"\xff", b"[" * 5000):
                path.write_bytes(whole[:at] + damage + whole[at + 1 :])
                with contextlib.suppress(db.DistbeliefError):
                    reads()
        path.write_bytes(whole)
        reads()


@pytest.mark.parametrize("name", ["launch.json", "state.json"])
def test_a_run_folder_that_refuses_a_file_is_said_with_the_systems_reason(name: str, tmp_path: Path) -> None:
    run = trained(problems.job(), tmp_path / "run").run
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(db.ConfigurationError, match=r"run cannot be written: .*Is a directory.*\nhint: give run="):
        db.train(problems.job(epochs=3), resume=run, view=False)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (problems.classifier, "classifier"),
        (functools.partial(problems.classifier), "classifier"),
        (lambda: problems.classifier(), "model"),
    ],
)
def test_a_run_folder_is_named_after_the_model_made_empty_and_the_same_from_wherever_it_is_resumed(
    model: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = problems.job(model=model)
    run, shown = run_folder.choose(job, None)
    assert (run, shown.parent) == (tmp_path / shown, Path("runs"))
    assert shown.name.startswith(f"{name}-2")
    run_folder.make(job, run, shown)
    assert not list(run.iterdir())
    assert run_folder.choose(job, shown) == (run, shown)
    with pytest.raises(db.ConfigurationError, match=rf"the run folder {shown} exists\nhint: "):
        run_folder.choose(dataclasses.replace(job, run=str(shown)), None)


def test_a_folder_of_checkpoints_beside_the_run_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = problems.job(run="run", checkpoints="kept")
    run, shown = run_folder.choose(job, None)
    run_folder.make(job, run, shown)
    assert Path(str(checkpoint.home(run))).is_relative_to(tmp_path / "kept")


def test_a_run_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(db.ConfigurationError, match=r"exists\nhint: choose another run folder"):
        trained(problems.job(), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["mine"]


def test_a_run_folder_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(db.ConfigurationError, match=r"cannot be written(.|\n)*hint: give run="):
        trained(problems.job(), tmp_path / "file" / "run")


@pytest.mark.parametrize("engine", ["simulated", "local"])
def test_what_cannot_work_is_said_before_any_role_starts(engine: str, tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=2, shards=2, engine=engine)
    bad = {
        r"cannot cut 259 parameters into 300 shards\nhint: use Cluster\(shards=259\)": problems.job(
            cluster=dataclasses.replace(cluster, shards=300)
        ),
        r"mini-batch of 1000 examples is larger than the data, which has 640\nhint: use batch_size=640": problems.job(
            cluster=cluster, batch_size=1000
        ),
        r"has no trainable parameters\nhint": problems.job(cluster=cluster, model=frozen_classifier),
        r"the loss is \[16\], not a scalar\nhint": problems.job(cluster=cluster, loss=loss_per_example),
        r"parameters 0.weight and 1.weight are different views of the same memory\nhint": problems.job(
            cluster=cluster, model=aliased_classifier
        ),
    }
    if engine == "local":  # one that this process finds, and one each that its helper finds, building and trying
        bad = {message: job for message, job in bad.items() if re.match("cannot cut|has no|the loss", message)}
        assert len(bad) == 3
    for message, job in bad.items():
        heard: list[Observation] = []
        with pytest.raises(db.ConfigurationError, match=message):
            trained(job, tmp_path / "run", listeners=[heard.append])
        assert heard == []
        assert not (tmp_path / "run").exists()


def frozen_classifier() -> nn.Module:
    return problems.classifier().requires_grad_(False)


def aliased_classifier() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data.view(-1)[:36].view(3, 12))
    return model


def loss_per_example(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


def test_a_job_that_cannot_be_pickled_says_so_before_any_process_starts(tmp_path: Path) -> None:
    held = threading.Lock()
    job = problems.job(loss=lambda output, target: held, cluster=db.Cluster(replicas=1, engine="local"))
    with pytest.raises(
        db.ConfigurationError, match=r"Job\(loss=...\) cannot be handed to other processes(.|\n)*hint: give data as"
    ):
        trained(job, tmp_path / "run")


@pytest.mark.parametrize("model", [problems.classifier, problems.normalised_classifier])
def test_the_export_is_a_state_dict_that_an_ordinary_module_takes(model: Any, tmp_path: Path) -> None:
    result = trained(problems.job(model=model), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model.safetensors")
    module = model()
    module.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert problems.same_parameters(module, result.model)
    assert state_dict(tmp_path / "run").keys() == module.state_dict().keys()


SCRIPT = """
import functools
import distbelief as db
from tests import problems

def job(examples: int = 640) -> db.Job:
    return problems.job(data=functools.partial(problems.points, examples),
                        cluster=db.Cluster(replicas=2, shards=2, threads_per_replica=1))

if __name__ == "__main__":
    db.main(job)
"""


def command(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    program = [sys.executable, "-c", "from distbelief.cli import command; command()"]
    return subprocess.run(
        [*program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_command_line_trains_resumes_shows_and_exports(tmp_path: Path) -> None:
    (tmp_path / "points.py").write_text(SCRIPT)
    first = command(
        "train", "points.py", "--examples", "320", "--epochs", "2", "--run", "a", "--cluster.replicas", "3",
        "--algorithm.n-push", "2", folder=tmp_path,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["examples"]["seen"] == 640
    assert summary["replicas"] == 3
    resume, export = summary["resume_command"], summary["export_command"]
    assert resume == "distbelief resume a --epochs 4"
    assert resume in first.stdout
    assert export in first.stdout

    again = command(*shlex.split(resume)[1:], "--cluster.shards", "3", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["examples"] | {"planned": 0} == {"seen": 1280, "repeated": 0, "missing": 0, "planned": 0}
    assert (summary["replicas"], summary["shards"]) == (3, 3)
    for key in ("test", "staleness", "shard_balance", "faults", "wall_seconds", "reason"):
        assert key in summary
    assert {"median", "p95"} <= summary["staleness"].keys()

    exported = command(*shlex.split(export)[1:], folder=tmp_path)
    assert exported.returncode == 0, exported.stderr
    problems.classifier().load_state_dict(load_file(tmp_path / "model.safetensors"))

    shown = command("show", "a", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "all epochs finished" in shown.stdout
    assert len(list((tmp_path / "a" / "plots").glob("*.png"))) == 3
    assert list((tmp_path / "a" / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_script_of_ones_own_trains_and_its_run_resumes_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "points.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "points.py", "--run", "mine"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["distbelief", "resume", "mine", "--epochs", "3"])
    cli.command()
    assert read_summary(tmp_path / "mine" / "summary.json").examples.seen == 3 * 640
    monkeypatch.setattr(sys, "argv", ["distbelief", "train", "points.py", "--run", "mine"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.command()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "exists" in said
    assert "hint:" in said
    del sys.modules["points"]


def test_evaluation_goes_on_during_training(tmp_path: Path) -> None:
    heard: list[Observation] = []
    job = problems.job(evaluate_every=320, epochs=3)
    trained(job, tmp_path / "run", listeners=[heard.append], costs=db.Costs(example_seconds=2e-3))
    moments = [one.event.examples for one in heard if isinstance(one.event, Evaluated)]
    assert len(moments) >= 4
    assert moments[-1] == 3 * 640
    assert moments == sorted(moments)


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    trained(problems.job(), tmp_path / "run")
    folder = checkpoint.folders(tmp_path / "run")[0]
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())["manifest"]
    assert manifest["format"] == checkpoint.FORMAT
    assert manifest["examples"] == 2 * 640
    assert {tuple(shape) for shape in manifest["pieces"].values()} == {(16, 12), (16,), (3, 16), (3,)}
