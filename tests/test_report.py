# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the summary, the files, what TensorBoard reads."""

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbelief import events
from distbelief.errors import ConfigurationError
from distbelief.events import Observation
from distbelief.report import (
    EventFile,
    Summary,
    read_events,
    read_summary,
    summarize,
    tensorboard_files,
    text,
    write_summary,
)
from distbelief.report.summary import RUNNING, moved, one_clock
from distbelief.report.words import better, count, first_line, sentence, values_of


def started(resumed_examples: int = 0, resumed_refused: int = 0, resumed_repeated: int = 0) -> events.JobStarted:
    return events.JobStarted(
        run="runs/digits",
        replicas=2,
        shards=2,
        parameters=1001,
        examples_per_epoch=100,
        epochs=3,
        batch_size=10,
        seed=0,
        algorithm="Downpour",
        shard_balance=1.001,
        resumed_examples=resumed_examples,
        resumed_refused=resumed_refused,
        resumed_repeated=resumed_repeated,
        resume_command="distbelief resume runs/digits",
        export_command="distbelief export runs/digits model.safetensors",
    )


def progress(examples: int, loss: float | None = 0.5, **changes: float) -> events.Progress:
    fields = {
        "epoch": examples // 100,
        "examples": examples,
        "total_examples": 300,
        "loss": loss,
        "examples_per_second": 50.0,
        "pushes_per_second": 5.0,
        "pushes": examples // 10,
        "mini_batches": examples // 5,
        "staleness_median": 1.0,
        "staleness_p95": 4.0,
        "replicas_alive": 2,
    }
    return events.Progress(**{**fields, **changes})  # type: ignore[arg-type]


def finished() -> events.JobFinished:
    return events.JobFinished(
        reason="all 3 epochs finished",
        seen=300,
        repeated=7,
        missing=0,
        refused=10,
        lost_updates=3,
        pushes=30,
        mini_batches=60,
        # 30 pushes: the 15th smallest staleness is 1, the 29th (95 %: 28.5) is 2
        staleness={0: 10, 1: 10, 2: 9, 9: 1},
        export_command="distbelief export runs/digits digits.safetensors",
        resume_command="distbelief resume runs/digits --epochs 4",
        strangers={"sent what is no message": 2, "did not prove that they are of this job": 1},
    )


def evaluated(examples: int, loss: float, accuracy: float) -> events.Evaluated:
    return events.Evaluated(examples=examples, loss=loss, metrics={"accuracy": accuracy}, evaluation_seconds=0.1)


def checkpoint(examples: int) -> events.CheckpointWritten:
    return events.CheckpointWritten(path="runs/digits/checkpoints/1", examples=examples, checkpoint_seconds=0.2)


LOST = events.RoleLost(role="replica/1", incarnation=0, reason="killed by signal 9")
ROSE = events.LossRose(lowest=0.5, loss=0.625, replicas=2, examples=120)
RESTORED = events.ShardRestored(shard=0, version=12)


def scripted_run() -> list[Observation]:
    return [
        Observation(0.0, started()),
        Observation(0.1, events.RoleStarted(role="replica/1", incarnation=0)),
        Observation(0.1, events.ReplicasReleased(replicas=2, examples=0)),
        Observation(1.0, progress(50, loss=0.9)),
        Observation(1.5, LOST),
        Observation(1.6, events.LeasesReturned(replica=1, leases=1, examples=20, repeated=7)),
        Observation(1.7, events.RoleStarted(role="replica/1", incarnation=1)),
        Observation(2.0, progress(100, loss=0.6)),
        Observation(2.1, events.EpochFinished(epoch=0, seen=100, repeated=7)),
        Observation(2.2, checkpoint(100)),
        Observation(2.3, evaluated(100, loss=0.7, accuracy=0.75)),
        Observation(2.4, ROSE),
        Observation(3.0, RESTORED),
        Observation(3.1, events.PushRefused(replica=0, step=12, examples=10, reason="not finite")),
        Observation(3.2, events.CheckpointFailed(path="runs/digits/checkpoints/2", reason="no space left on device")),
        Observation(3.3, events.CheckpointRejected(path="runs/digits/checkpoints/0", reason="checksum differs")),
        Observation(4.0, progress(300, loss=0.25)),
        Observation(4.1, progress(300, loss=None)),
        Observation(4.2, evaluated(300, loss=0.4, accuracy=0.875)),
        Observation(4.3, events.JobStopping(reason="Ctrl-C")),
        Observation(4.5, finished()),
    ]


def killed_run() -> list[Observation]:
    """The scripted run, killed after its first epoch."""
    return scripted_run()[:11]


def resumed_run() -> list[Observation]:
    return [
        Observation(0.0, started(resumed_examples=100)),
        Observation(1.0, progress(200, loss=0.3)),
        Observation(1.1, LOST),
        Observation(1.2, events.PushRefused(replica=0, step=3, examples=10, reason="not finite")),
        Observation(2.0, finished()),
    ]


# the summary


def test_a_summary_says_what_the_events_of_a_finished_run_add_up_to() -> None:
    summary = summarize(scripted_run())
    assert json.loads(msgspec.json.encode(summary)) == {
        "run": "runs/digits",
        "batch": None,
        "reason": "all 3 epochs finished",
        "wall_seconds": 4.5,
        "virtual": False,
        "algorithm": "Downpour",
        "replicas": 2,
        "shards": 2,
        "parameters": 1001,
        "epochs": 3,
        "shard_balance": 1.001,
        "examples": {"seen": 300, "repeated": 7, "missing": 0, "planned": 300},
        "loss": 0.25,
        "test": {"loss": 0.4, "accuracy": 0.875},
        "staleness": {"median": 1.0, "p95": 2.0},
        "pushes": 30,
        "mini_batches": 60,
        "refused": 10,
        "lost_updates": 3,
        "strangers": {"sent what is no message": 2, "did not prove that they are of this job": 1},
        "checkpoints": {"written": 1, "failed": 1, "rejected": 1, "last_failed": True, "examples": 100},
        "faults": [
            {"seconds": 1.5, "type": "RoleLost", "text": "replica 1 was lost: killed by signal 9"},
            {
                "seconds": 2.4,
                "type": "LossRose",
                "text": "training loss rose from 0.5 to 0.625: "
                "lower the rate, use fewer than 2 replicas, or momentum in Downpour only",
            },
            {
                "seconds": 3.0,
                "type": "ShardRestored",
                "text": "shard 0 was restored from its checkpoint at version 12",
            },
            {
                "seconds": 3.2,
                "type": "CheckpointFailed",
                "text": "checkpoint runs/digits/checkpoints/2 could not be written: no space left on device",
            },
            {
                "seconds": 3.3,
                "type": "CheckpointRejected",
                "text": "checkpoint runs/digits/checkpoints/0 was passed over: checksum differs",
            },
        ],
        "export_command": "distbelief export runs/digits digits.safetensors",
        "resume_command": "distbelief resume runs/digits --epochs 4",
    }


def test_the_summary_of_a_killed_run_is_what_had_been_observed_until_then() -> None:
    summary = summarize(killed_run())
    assert summary.reason == "killed: no end was recorded"
    assert (summary.examples.seen, summary.examples.repeated, summary.examples.missing) == (100, 7, 200)
    assert "200 still to come" in text(summary)
    assert (summary.staleness.median, summary.staleness.p95) == (1.0, 4.0)
    assert (summary.pushes, summary.mini_batches) == (10, 20)
    assert (summary.wall_seconds, summary.loss, summary.test["accuracy"]) == (2.3, 0.6, 0.75)
    assert summary.resume_command == "distbelief resume runs/digits"
    assert summary.export_command == "distbelief export runs/digits model.safetensors"


def test_a_run_killed_before_its_first_checkpoint_offers_no_command_that_would_fail() -> None:
    summary = summarize(killed_run()[:4])
    assert (summary.resume_command, summary.export_command) == ("", "")
    assert "no checkpoint is kept" in text(summary)
    assert summarize([]).reason == "killed: no end was recorded"


def test_the_summary_of_a_resumed_run_goes_on_where_the_killed_one_stopped() -> None:
    summary = summarize(killed_run() + resumed_run())
    assert summary.reason == "all 3 epochs finished"
    assert summary.wall_seconds == pytest.approx(2.3 + 2.0)
    assert [fault.seconds for fault in summary.faults] == pytest.approx([1.5, 2.3 + 1.1])
    assert (summary.examples.seen, summary.refused) == (300, 10)
    assert summary.test == {"loss": 0.7, "accuracy": 0.75}
    assert summary.checkpoints.written == 1


def test_what_is_told_before_a_start_is_on_the_clock_of_that_start() -> None:
    """Such as that a checkpoint is damaged, which is found before a run is resumed."""
    rejected = events.CheckpointRejected(path="runs/digits/checkpoints/1", reason="checksum differs")
    again = [Observation(0.0, rejected), Observation(0.5, started(100)), Observation(1.0, progress(150))]
    seconds = [observation.seconds for observation in one_clock([*killed_run(), *again, *again])]
    assert seconds[-6:] == pytest.approx([2.3, 2.8, 3.3, 3.3, 3.8, 4.3])
    assert seconds[:-6] == [observation.seconds for observation in killed_run()]
    summary = summarize([*killed_run(), *again, *again])
    assert [fault.seconds for fault in summary.faults] == pytest.approx([1.5, 2.3, 3.3])
    assert summary.wall_seconds == pytest.approx(4.3)


def test_a_finished_run_that_was_resumed_and_killed_counts_as_killed() -> None:
    summary = summarize(scripted_run() + resumed_run()[:2])
    assert summary.reason == "killed: no end was recorded"
    assert (summary.examples.seen, summary.examples.missing) == (200, 100)


def test_resuming_rolls_the_examples_seen_back_to_the_checkpoint() -> None:
    assert summarize([*scripted_run()[:16], resumed_run()[0]]).examples.seen == 100


def test_what_was_refused_and_repeated_beyond_the_checkpoint_is_not_counted_in_a_run_that_goes_on_from_it() -> None:
    refused = events.PushRefused(replica=0, step=12, examples=10, reason="not finite")
    returned = events.LeasesReturned(replica=1, leases=1, examples=20, repeated=7)
    beyond = [*killed_run(), Observation(2.4, refused), Observation(2.5, refused), Observation(2.6, returned)]
    again = [Observation(0.0, started(100, resumed_refused=5, resumed_repeated=7)), Observation(0.5, refused)]
    assert (summarize(beyond).refused, summarize(beyond).examples.repeated) == (20, 14)
    summary = summarize(beyond + again)
    assert (summary.refused, summary.examples.repeated) == (15, 7)
    assert summarize([*beyond, *again, Observation(1.0, finished())]).refused == finished().refused


def test_of_a_killed_run_it_is_told_what_its_shards_had_lost_and_what_resuming_it_repeats() -> None:
    summary = summarize([*killed_run(), Observation(2.5, progress(150, lost_updates=4))])
    assert summary.lost_updates == 4
    words = " ".join(text(summary).split())
    assert "150 still to come, and 50 since the last checkpoint again" in words
    assert "again" not in text(msgspec.structs.replace(summary, reason=RUNNING))
    failed = msgspec.structs.replace(finished(), reason="failed: TrainingFailed", seen=150, missing=150)
    words = " ".join(text(summarize([*killed_run(), Observation(2.5, failed)])).split())
    assert "150 still to come, and 50 since the last checkpoint again" in words


def test_what_a_killed_run_will_repeat_is_counted_from_the_checkpoint_that_it_went_on_from() -> None:
    """It may be an older one than the newest, which was damaged."""
    further = [Observation(2.5, progress(200)), Observation(2.6, checkpoint(200))]
    resumed = [Observation(0.0, started(100)), Observation(1.0, progress(150))]
    words = " ".join(text(summarize([*killed_run(), *further, *resumed])).split())
    assert "150 still to come, and 50 since the last checkpoint again" in words


def test_a_resumed_run_that_was_killed_before_it_wrote_a_checkpoint_offers_the_one_that_it_went_on_from() -> None:
    summary = summarize(resumed_run()[:2])
    assert (summary.checkpoints.written, summary.resume_command) == (0, "distbelief resume runs/digits")


def test_the_end_of_a_run_has_the_last_word() -> None:
    end = msgspec.structs.replace(finished(), pushes=31, mini_batches=63, staleness={0: 90, 7: 6, 9: 4})
    summary = summarize([*scripted_run()[:-1], Observation(4.5, end)])
    assert (summary.pushes, summary.mini_batches) == (31, 63)
    assert (summary.staleness.median, summary.staleness.p95) == (0, 7)


def test_what_resumes_and_exports_a_run_that_was_moved_names_its_new_folder_whatever_the_names() -> None:
    commands = {
        "resume_command": "distbelief resume 'a run' --epochs 4", "export_command": "distbelief export 'a run' m.st"
    }  # fmt: skip
    elsewhere = moved(Summary(run="a run", **commands), "it's here")  # type: ignore[arg-type]
    assert (elsewhere.run, elsewhere.resume_command, elsewhere.export_command) == (
        "it's here", "distbelief resume 'it'\"'\"'s here' --epochs 4", "distbelief export 'it'\"'\"'s here' m.st",
    )  # fmt: skip
    call = Summary(run="a run", resume_command="distbelief.train(job, resume='a run')")
    assert moved(call, "b").resume_command == "distbelief.train(job, resume='b')"


def test_values_that_are_not_finite_are_none_in_the_summary_and_said_in_its_text() -> None:
    diverged = [
        Observation(0.0, started()),
        Observation(1.0, progress(50, loss=math.nan)),
        Observation(2.0, evaluated(50, loss=math.inf, accuracy=math.nan)),
    ]
    summary = summarize(diverged)
    assert summary.loss is None
    assert summary.test == {"loss": None, "accuracy": None}
    assert "accuracy not finite" in text(summary)
    assert "training loss not finite" in text(summary)
    assert "training loss none" in text(summarize(diverged[:1]))


def test_the_text_of_a_summary_holds_every_number_and_both_commands() -> None:
    page = text(summarize(scripted_run()))
    for part in (
        "runs/digits",
        "all 3 epochs finished (4.5 s)",
        "300 of 300 seen, of which 10 refused; 7 repeated, 0 missing",
        "30 applied, made of 60 mini-batches; 3 lost",
        "median 1, 95 % of pushes at most 2",
        "largest / mean 1.001",
        "loss 0.4, accuracy 0.875",
        "1 written, 1 failed, 1 damaged",
        "2 callers refused that sent what is no message",
        "replica 1 was lost: killed by signal 9",
        "distbelief export runs/digits digits.safetensors",
        "distbelief resume runs/digits --epochs 4",
    ):
        assert part in page
    assert max(len(line) for line in page.splitlines()) <= 80


def test_the_text_of_a_summary_is_at_most_80_columns_wide_whatever_its_numbers_and_words() -> None:
    summary = summarize(killed_run())
    examples = msgspec.structs.replace(summary.examples, seen=98_765_432, missing=987_654_321, planned=10**9)
    wide = msgspec.structs.replace(
        summary, examples=examples, pushes=98_765_432, mini_batches=198_765_432, algorithm="Downpour, " + "a rule " * 9,
        reason="failed: " + "many words " * 9, test={f"metric {each}": 0.123456 for each in range(9)},
    )  # fmt: skip
    page = text(wide).splitlines()
    assert max(map(len, page)) <= 80
    assert "987,654,321 still to come" in " ".join(page)


def test_a_summary_with_many_faults_prints_the_first_and_counts_all() -> None:
    page = text(summarize([Observation(0.0, started())] + [Observation(1.0, LOST)] * 50))
    assert "50 roles lost" in page
    assert page.count("was lost") == 20
    assert "and 30 more in summary.json" in page


def test_a_summary_says_no_more_than_there_is() -> None:
    page = text(summarize([Observation(0.0, started())] + [Observation(1.0, LOST)] * 20))
    assert page.count("was lost") == 20
    assert "more in summary.json" not in page


def test_a_run_that_was_stopped_has_examples_still_to_come_and_may_lack_its_latest_state() -> None:
    failed = events.CheckpointFailed(path="runs/digits/checkpoints/2", reason="no space left on device")
    stopped = msgspec.structs.replace(finished(), reason="stopped by SIGTERM", seen=150, missing=150)
    events_before = [*killed_run(), Observation(2.5, failed)]
    words = " ".join(text(summarize([*events_before, Observation(2.6, stopped)])).split())
    assert "150 still to come, and 50 since the last checkpoint again" in words
    assert "1 written, 1 failed, 0 damaged; the latest state is not kept" in words
    written = [*events_before, Observation(2.6, checkpoint(150)), Observation(2.7, stopped)]
    assert "not kept" not in text(summarize(written))


def test_seconds_of_a_virtual_clock_are_called_so() -> None:
    for virtual, said in ((True, "recorded (2.0 s of virtual time)"), (False, "recorded (2.0 s)")):
        begun = msgspec.structs.replace(started(), virtual=virtual)
        assert said in text(summarize([Observation(0.0, begun), Observation(2.0, progress(150))]))
    begun = msgspec.structs.replace(started(), virtual=True)
    again = [Observation(0.0, begun), Observation(2.0, progress(150)), Observation(0.0, started(150))]
    assert "2.0 s of virtual time" in text(summarize(again))


def test_what_did_not_happen_is_not_said() -> None:
    returned = events.LeasesReturned(replica=1, leases=1, examples=0, repeated=0)
    assert sentence(returned) == "replica 1 gave back 1 lease of 0 examples"
    assert first_line(" \n") == "no reason given"
    assert count(0, "shard") == "0 shards"


def test_a_metric_improves_by_the_sense_of_its_name_however_it_is_written() -> None:
    assert [better("Test Loss", value, 0.5) for value in (0.4, 0.5, 0.6)] == [True, False, False]
    assert [better("accuracy", value, 0.5) for value in (0.4, 0.5, 0.6)] == [False, False, True]
    measured = values_of(events.Evaluated(examples=1, loss=0.5, metrics={"a": None}, evaluation_seconds=0.1))
    assert measured["loss"] == 0.5
    assert math.isnan(measured["a"])


def test_the_summary_tells_a_rise_of_the_loss_with_what_to_do_and_of_long_words_as_much_as_two_lines_hold() -> None:
    folder = "/" + 90 * "x"
    failed = events.CheckpointFailed(path=folder, reason="no space left on device")
    rose = events.LossRose(lowest=0.012345, loss=0.023456, replicas=1024, examples=500)
    page = text(summarize([Observation(0.0, started()), Observation(1.0, rose), Observation(2.0, failed)]))
    told = " ".join(page.split())
    assert "lower the rate, use fewer than 1,024 replicas, or momentum in Downpour only" in told
    assert folder[:50] in told
    assert max(len(line) for line in page.splitlines()) <= 80


# the files


def test_a_summary_is_the_same_after_a_round_trip_through_its_file(tmp_path: Path) -> None:
    summary = summarize(scripted_run())
    write_summary(tmp_path / "summary.json", Summary())
    write_summary(tmp_path / "summary.json", summary)
    assert read_summary(tmp_path / "summary.json") == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, summarize(scripted_run()))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_summary(path, Summary())
    assert read_summary(path) == summarize(scripted_run())
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_events_read_back_are_the_events_written_each_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    file = EventFile(path)
    for position, observation in enumerate(scripted_run(), start=1):
        file(observation)
        assert len(read_events(path)) == position
    file.close()
    file.close()
    assert read_events(path) == scripted_run()


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_half_a_last_line_is_left_out_and_cut_off_on_resuming(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    record(path, killed_run())
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_events(path) == killed_run()[:-1]
    record(path, resumed_run())
    assert read_events(path) == killed_run()[:-1] + resumed_run()


def record(path: Path, observations: list[Observation]) -> None:
    file = EventFile(path)
    for observation in observations:
        file(observation)
    file.close()


def test_a_metric_that_was_not_finite_is_read_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record(path, [Observation(1.0, evaluated(50, loss=0.5, accuracy=math.nan))])
    (observation,) = read_events(path)
    assert isinstance(observation.event, events.Evaluated)
    accuracy = observation.event.metrics["accuracy"]
    assert accuracy is None or math.isnan(accuracy)
    assert summarize([observation]).test == {"loss": 0.5, "accuracy": None}


def test_a_line_that_is_no_event_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record(path, killed_run()[:2])
    path.write_bytes(path.read_bytes() + b'{"seconds": 1, "event": {"type": "Party"}}\n')
    with pytest.raises(ConfigurationError, match=r"line 3 is not an event.*\n?.*hint: "):
        read_events(path)


def test_files_that_are_missing_or_damaged_are_refused_with_their_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no file .*events\.jsonl"):
        read_events(tmp_path / "events.jsonl")
    (tmp_path / "a file").touch()
    for path in (tmp_path, tmp_path / "a file" / "events.jsonl"):
        with pytest.raises(ConfigurationError, match=r"there is no file .*\nhint: give the folder of a run"):
            read_events(path)
    (tmp_path / "summary.json").write_text('{"run": ')
    with pytest.raises(
        ConfigurationError, match=r"summary\.json is not a summary(.|\n)*hint: remove it: .*distbelief show"
    ):
        read_summary(tmp_path / "summary.json")


def test_a_line_for_which_there_is_no_room_is_left_out_as_a_whole_and_later_ones_are_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record(path, killed_run())
    before, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    file = EventFile(path)
    file(Observation(3.0, ROSE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="events are missing from it"):
            file(Observation(3.1, LOST))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file(Observation(3.2, RESTORED))
    file.close()
    file(Observation(3.3, LOST))
    assert path.stat().st_size > before
    assert read_events(path) == [*killed_run(), Observation(3.0, ROSE), Observation(3.2, RESTORED)]


def test_a_summary_is_forced_to_disk_before_its_name_and_its_name_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    replaced = Path.replace

    def forced(descriptor: int) -> None:
        seen.append("the folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "the file")

    def renamed(path: Path, target: Path) -> Path:
        seen.append("the name")
        return replaced(path, target)

    monkeypatch.setattr("os.fsync", forced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_summary(tmp_path / "summary.json", Summary())
    assert seen == ["the file", "the name", "the folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_said_once_and_does_not_stop_the_run() -> None:
    file = EventFile(Path("/dev/full"))
    with pytest.warns(RuntimeWarning, match="events are missing from it") as said:
        list(map(file, scripted_run()))
    file.close()
    assert len(said) == 1


# TensorBoard


def read_board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    return EventAccumulator(str(folder)).Reload()


def write_board(folder: Path, observations: list[Observation]) -> None:
    listener = tensorboard_files(folder)
    assert listener is not None
    for observation in observations:
        listener(observation)
    listener.close()


def test_tensorboard_reads_back_every_number_at_its_examples(tmp_path: Path) -> None:
    write_board(tmp_path, scripted_run())
    board = read_board(tmp_path)
    read = {tag: [(scalar.step, scalar.value) for scalar in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert [step for step, _ in read["loss"]] == [50, 100, 300]
    assert [value for _, value in read["loss"]] == pytest.approx([0.9, 0.6, 0.25])
    assert [step for step, _ in read["test/accuracy"]] == [100, 300]
    assert [value for _, value in read["test/accuracy"]] == [0.75, 0.875]
    assert [value for _, value in read["test/loss"]] == pytest.approx([0.7, 0.4])
    steps = [50, 100, 300, 300]
    for tag, value in (
        ("examples_per_second", 50.0),
        ("pushes_per_second", 5.0),
        ("staleness/median", 1.0),
        ("staleness/p95", 4.0),
        ("replicas_alive", 2.0),
    ):
        assert read[tag] == [(step, value) for step in steps]
    (histogram,) = board.Histograms("staleness")
    assert histogram.step == 300
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (0.0, 9.0)
    assert histogram.histogram_value.num == 30
    assert histogram.histogram_value.sum == 10 * 1 + 9 * 2 + 9


def test_tensorboard_hides_what_resuming_undid(tmp_path: Path) -> None:
    write_board(tmp_path, [*killed_run(), Observation(2.5, progress(150, loss=9.0))])
    written = int(time.time())
    while int(time.time()) == written:  # TensorBoard reads files by their names, and those are seconds
        time.sleep(0.01)
    write_board(tmp_path, resumed_run())
    assert [scalar.step for scalar in read_board(tmp_path).Scalars("loss")] == [50, 100, 200]


def test_tensorboard_hides_what_was_undone_by_going_on_from_the_very_beginning(tmp_path: Path) -> None:
    write_board(tmp_path, killed_run())
    written = int(time.time())
    while int(time.time()) == written:
        time.sleep(0.01)
    write_board(tmp_path, [Observation(0.0, started()), Observation(1.0, progress(70))])
    assert [scalar.step for scalar in read_board(tmp_path).Scalars("loss")] == [70]


def test_a_board_that_cannot_be_written_is_said_once_and_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="Not a directory.*; TensorBoard is told no more") as said:
        write_board(tmp_path / "file" / "board", scripted_run())
    assert len(said) == 1


def test_without_tensorboard_there_is_no_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert tensorboard_files(tmp_path) is None


def test_importing_the_reports_imports_nothing_optional_and_no_terminal_library() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import distbelief.events\n"
        "before = set(sys.modules)\n"
        "import distbelief.report\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'rich', 'matplotlib', 'tensorboard', 'numpy'}))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, *sys.path], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
