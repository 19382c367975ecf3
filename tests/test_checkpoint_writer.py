# SPDX-License-Identifier: Apache-2.0
"""Laws of who writes checkpoints when: what is due, what is told, and what becomes of those that nobody needs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from distbelief import checkpoint
from distbelief.checkpoint import BUFFERS, HOME, MANIFEST, Manifest
from distbelief.checkpoint_writer import CheckpointWriter
from distbelief.errors import NotReady, PeerLost
from distbelief.events import AnyEvent, CheckpointFailed, CheckpointWritten
from distbelief.files import AnyPath, path_of
from distbelief.parameters import Span, cut
from distbelief.roster import Settings
from distbelief.shard_file import ShardFile, ShardState, read_span, seal, write
from tests.test_checkpoint import BUFFER_VALUES, LENGTH, manifest_of

SECONDS = 10.0


class Answer:
    """An answer that has come, or an error."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def done(self) -> bool:
        return True

    def wait(self, seconds: float) -> bool:
        return True

    def result(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class World:
    """A writer with two shards that hold one value each, or fail; the clock is set by hand."""

    def __init__(self, run: Path, *, keep: int = 2) -> None:
        self.clock, self.value, self.beside = 100.0, 0.0, 0
        self.error: Exception | None = None
        self.asked: list[tuple[Any, ...]] = []
        self.heard: list[AnyEvent] = []
        settings = Settings(
            run=run, replicas=(), shards=(), evaluator=(), checkpoint_seconds=SECONDS, keep_checkpoints=keep,
            evaluate_examples=1, offers=True, silence_seconds=60.0, shard_silence_seconds=60.0, refusals=0,
            incarnation=0,
        )  # fmt: skip
        engine: Any = self
        shards: Any = [self.Shard(self, span) for span in cut(LENGTH, 2)]
        self.writer = CheckpointWriter(
            engine, settings, shards, self.manifest, self.heard.append, lambda answer: answer.result()
        )

    class Shard:
        def __init__(self, world: "World", span: Span) -> None:
            self.world, self.span = world, span

        def call(self, method: Any, path: str, slots: tuple[int, ...], durable: bool, version: int) -> Answer:
            self.world.asked.append((slots, durable, version))
            if self.world.error is not None:
                return Answer(self.world.error)
            state = ShardState(start=self.span.start, stop=self.span.stop)
            values = torch.full((len(self.span),), self.world.value)
            draft = write(path_of(f"{path}.safetensors"), {"parameters": values}, state)
            return Answer([seal(draft, state, partial=bool(slots), durable=durable)])

    def now(self) -> float:
        return self.clock

    def background(self, work: Callable[[], Any]) -> Answer:
        self.beside += 1
        return Answer(work())

    def manifest(self, *, shards: list[ShardFile], examples: int, incarnation: int) -> Manifest:
        return manifest_of(shards, examples)

    def take(
        self, value: float, *, durable: bool = True, kept: Any = (), slots: tuple[int, ...] = (), seconds: float = 0.0
    ) -> tuple[AnyPath, Manifest] | None:
        """Write a checkpoint of this value, which takes so long; None when that failed, or there was no place."""
        self.value = value

        def note() -> tuple[dict[str, Any], int]:
            self.asked.append(("noted",))
            return {}, int(value)

        writing = self.writer.begin(note, slots, durable=durable, version=7)
        self.clock += seconds
        manifest = None if writing is None else self.writer.complete(writing, kept, 3, [BUFFER_VALUES])
        return None if writing is None or manifest is None else (writing.folder, manifest)

    def values(self, folder: AnyPath, manifest: Manifest) -> set[float]:
        line = read_span(folder, manifest.shards, Span(0, LENGTH), {"parameters": torch.float32})
        return set(line["parameters"].tolist())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A run whose checkpoints go to a store."""
    (tmp_path / HOME).write_text(f"memory://{tmp_path.name}")
    yield tmp_path
    fsspec.filesystem("memory").store.clear()


def test_the_next_checkpoint_is_due_so_long_after_the_last_durable_one_was_written_or_failed(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.writer.due == 110.0
    world.take(1.0, seconds=5.0)
    assert world.writer.due == 115.0
    world.take(2.0, durable=False, seconds=1.0)
    assert world.writer.due == 115.0, "one that the machine may lose is none"
    world.error = PeerLost("the shard died")
    world.clock = 120.0
    assert world.take(3.0, seconds=4.0) is None
    assert world.writer.due == 134.0


def test_what_is_written_is_told_with_its_examples_and_seconds_unless_the_machine_may_lose_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.take(1.0, durable=False, seconds=1.0)
    assert not world.heard
    taken = world.take(2.0, seconds=2.5)
    assert taken is not None
    assert world.heard == [CheckpointWritten(path=str(taken[0]), examples=2, checkpoint_seconds=2.5)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PeerLost("Traceback\n  somewhere\nOSError: no room"), "OSError: no room"), (NotReady("not yet"), "not yet"),
        (PeerLost(""), "PeerLost('')"),
    ],
)  # fmt: skip
def test_what_fails_is_told_with_the_reason_and_removed_and_the_one_before_stands(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    world = World(tmp_path)
    taken = world.take(1.0)
    assert taken is not None
    world.error = error
    assert world.take(2.0) is None
    (failed,) = [event for event in world.heard if isinstance(event, CheckpointFailed)]
    assert failed.reason == world.writer.problem == reason
    assert not Path(failed.path).exists()
    assert world.writer.newest() == taken
    world.error = None
    again = world.take(3.0)
    assert again is not None
    assert world.writer.newest() == again


def test_the_work_is_noted_before_any_shard_is_asked_and_each_is_told_what_to_write(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.take(1.0, durable=False, slots=(2, 5))
    world.take(2.0)
    assert world.asked == [("noted",), *[((2, 5), False, 7)] * 2, ("noted",), *[((), True, 7)] * 2]


@pytest.mark.parametrize("durable", [False, True])
def test_only_what_is_durable_is_forced_to_disk(durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: forced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    assert World(tmp_path).take(1.0, durable=durable) is not None
    files = ["shard-0.safetensors", "shard-1.safetensors", BUFFERS, f"{MANIFEST}.part", "00000000", "checkpoints"]
    assert forced == (files if durable else [])


def test_of_a_vector_that_earlier_files_hold_too_what_is_written_now_counts(tmp_path: Path) -> None:
    world = World(tmp_path)
    earlier = [world.take(value, slots=(0,)) for value in (1.0, 2.0)]
    kept = [(folder, file) for folder, manifest in filter(None, reversed(earlier)) for file in manifest.shards]
    taken = world.take(3.0, kept=kept)
    assert taken is not None
    assert world.values(*taken) == {3.0}
    assert [file.name for file in taken[1].shards] == [
        *(f"0000000{number}-shard-{shard}.safetensors" for number in (0, 1) for shard in (0, 1)),
        "shard-0.safetensors", "shard-1.safetensors",
    ]  # fmt: skip


def test_a_store_that_failed_is_left_alone_until_a_durable_checkpoint_is_due(store: Path) -> None:
    world = World(store)
    assert world.take(1.0, durable=False) is not None
    world.error = PeerLost("out of reach")
    assert world.take(2.0, durable=False) is None
    world.error, asked = None, len(world.asked)
    world.clock += SECONDS - 1
    assert world.take(3.0, durable=False) is None
    assert len(world.asked) == asked
    assert world.take(4.0) is not None, "what must be durable is tried"
    world.clock += 1
    assert world.take(5.0, durable=False) is not None


def test_a_store_is_asked_beside_whatever_else_goes_on(store: Path) -> None:
    world = World(store)
    for number, ask in enumerate((lambda: world.take(1.0), world.writer.keep_newest, world.writer.newest)):
        before = world.beside
        ask()
        assert world.beside > before, number


def test_where_no_folder_can_be_made_that_is_told_and_nobody_is_asked(tmp_path: Path) -> None:
    world = World(tmp_path / "gone")
    assert world.take(1.0) is None
    (failed,) = world.heard
    assert isinstance(failed, CheckpointFailed)
    assert "is gone" in failed.reason
    assert not world.asked
    assert world.writer.due == 110.0


def test_the_checkpoint_under_way_is_not_called_damaged_and_one_that_was_abandoned_is(tmp_path: Path) -> None:
    world = World(tmp_path)
    taken = world.take(1.0)
    writing = world.writer.begin(lambda: ({}, 2))
    assert writing is not None
    assert taken is not None
    assert world.writer.look() == (*taken, [])
    manifest = world.writer.complete(writing, (), 3, [BUFFER_VALUES])
    assert manifest is not None
    Path(str(writing.folder), "shard-0.safetensors").write_bytes(b"")
    found, _, (damaged,) = world.writer.look()
    assert (found, damaged.path) == (taken[0], str(writing.folder))


def test_of_checkpoints_that_nobody_needs_one_is_written_over_and_the_others_are_removed(tmp_path: Path) -> None:
    world = World(tmp_path)
    passing = [world.take(value, durable=False) for value in (1.0, 2.0, 3.0)]
    inode = Path(str(passing[0][0]), "shard-0.safetensors").stat().st_ino  # type: ignore[index]
    for passed in filter(None, passing[:2]):
        world.writer.discard(*passed)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["00000002", "00000000"]
    again = world.take(4.0)
    assert again is not None
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["00000003", "00000002"]
    assert Path(str(again[0]), "shard-0.safetensors").stat().st_ino == inode
    assert world.values(*again) == {4.0}
    world.writer.discard(*again)
    assert world.take(5.0) is not None, "another one can be written over, too"
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["00000004", "00000002"]


def test_as_many_of_the_newest_are_kept_as_the_job_says(tmp_path: Path) -> None:
    world = World(tmp_path, keep=2)
    for value in (1.0, 2.0, 3.0):
        world.take(value)
    world.writer.keep_newest()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["00000002", "00000001"]
