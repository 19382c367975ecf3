# SPDX-License-Identifier: Apache-2.0
"""Has the shards write a checkpoint, and makes it one when all have; one at a time, beside whatever else goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from distbelief import checkpoint, events
from distbelief.channel.base import Future, Remote
from distbelief.checkpoint import Manifest
from distbelief.engine.base import Engine
from distbelief.engine.insistent import All
from distbelief.errors import ChannelError
from distbelief.files import AnyPath
from distbelief.parameter_server import ParameterServerShard
from distbelief.roster import Settings
from distbelief.shard_file import ShardFile

T = TypeVar("T")

ROOM_HINT = (
    "hint: look for room and permission there and, where checkpoints go to a store, in the folder for temporary files "
    "of the host that is named"
)


@dataclass(frozen=True)
class Writing:
    """A checkpoint that the shards are writing."""

    folder: AnyPath
    answers: Future[list[list[ShardFile]]]
    work: dict[str, Any]
    examples: int
    started: float
    durable: bool


class CheckpointWriter:
    """Begins checkpoints and completes them. What goes wrong is reported, and the previous checkpoint stays.

    `wait` answers what a future answers, and goes on with everything else meanwhile.
    """

    def __init__(
        self, engine: Engine, settings: Settings, shards: Sequence[Remote[ParameterServerShard]],
        manifest: Callable[..., Manifest], emit: Callable[[events.AnyEvent], None],
        wait: Callable[[Future[Any]], Any],
    ) -> None:  # fmt: skip
        self._engine, self._run, self._seconds = engine, settings.run, settings.checkpoint_seconds
        self._keep, self._in_store = settings.keep_checkpoints, not isinstance(checkpoint.home(settings.run), Path)
        self._shards, self._manifest, self._emit, self._wait = shards, manifest, emit, wait
        self.due = engine.now() + settings.checkpoint_seconds
        """The engine's time at which the next durable one should begin."""
        self._out_of_reach_until = 0.0
        """What need not be durable is not written to a store that failed, until it is tried again for one that must."""
        self.problem = ""
        """Why the last one that failed did."""
        self.folder: AnyPath | None = None
        """Of the checkpoint under way."""
        self._spare: AnyPath | None = None

    def begin(
        self, note: Callable[[], tuple[dict[str, Any], int]], slots: Sequence[int] = (), *, durable: bool = True,
        version: int = 0,
    ) -> Writing | None:  # fmt: skip
        """Have the shards write; None when there is no place for it. The rest is as in their `snapshot`.

        `note` tells the work done and its examples, right before the shards are asked.
        """
        started = self._engine.now()
        if self._in_store and not durable and started < self._out_of_reach_until:
            return None
        folder = self._beside(lambda: checkpoint.next_folder(checkpoint.home(self._run), self._spare))
        if isinstance(folder, OSError):
            self._failed(self._run / "checkpoints", folder)
            return None
        self.folder, self._spare = folder, None
        work, examples = note()
        what = tuple(slots), durable, version
        answers = [
            shard.call(ParameterServerShard.snapshot, str(folder / f"shard-{index}"), *what)
            for index, shard in enumerate(self._shards)
        ]
        return Writing(folder, All(self._engine, cast(Any, answers)), work, examples, started, durable)

    def complete(
        self, writing: Writing, kept: Sequence[tuple[AnyPath, ShardFile]], incarnation: int,
        buffers: Sequence[torch.Tensor],
    ) -> Manifest | None:  # fmt: skip
        """Make a checkpoint of what the shards have written and of these files of earlier ones; None when that fails.

        Roles that push after a restore have this `incarnation` or a higher one.
        """
        folder = writing.folder

        def commit(written: list[list[ShardFile]]) -> Manifest:
            # Of a vector that several files hold the last one counts.
            files = [
                *sorted((checkpoint.share(*one, folder) for one in kept), key=lambda file: file.name),
                *(file for section in written for file in section),
            ]
            manifest = self._manifest(
                shards=files, examples=writing.examples, incarnation=incarnation, **writing.work
            )  # fmt: skip
            return checkpoint.commit(folder, manifest, buffers, durable=writing.durable)

        try:
            manifest = self._outcome(writing, commit)
            if isinstance(manifest, Exception):
                self._beside(lambda: checkpoint.discard(folder))
                self._failed(folder, manifest)
                return None
        finally:
            self.folder = None
        if writing.durable:
            self.due = self._engine.now() + self._seconds
            self._emit(
                events.CheckpointWritten(
                    path=str(folder), examples=writing.examples,
                    checkpoint_seconds=self._engine.now() - writing.started,
                )
            )  # fmt: skip
        return manifest

    def _outcome(self, writing: Writing, commit: Callable[[list[list[ShardFile]]], Manifest]) -> Manifest | Exception:
        try:
            written = writing.answers.result()
        except ChannelError as error:
            return error
        return self._beside(partial(commit, written))

    def discard(self, folder: AnyPath, manifest: Manifest) -> None:
        """Remove a checkpoint of which nothing is needed any more, or keep its files to be written over."""
        if self._spare is None and checkpoint.make_spare(folder, manifest):
            self._spare = folder
        else:
            self._beside(lambda: checkpoint.discard(folder))

    def keep_newest(self) -> None:
        """Remove older checkpoints than the newest ones."""
        self._beside(lambda: checkpoint.keep_newest(self._run, self._keep))

    def newest(self) -> tuple[AnyPath, Manifest]:
        """The newest checkpoint that is whole. Raises CheckpointError."""
        found = self._beside(lambda: checkpoint.newest(self._run, lambda path, reason: None))
        assert not isinstance(found, OSError), "it raises CheckpointError"
        return found

    def look(self) -> tuple[AnyPath, Manifest, list[events.CheckpointRejected]]:
        """`newest`, and what was damaged, which the one under way is not. Any thread may do it."""
        damaged: list[events.CheckpointRejected] = []

        def reject(folder: AnyPath, reason: str) -> None:
            if folder != self.folder:
                damaged.append(events.CheckpointRejected(path=str(folder), reason=reason))

        return *checkpoint.newest(self._run, reject), damaged

    def _beside(self, work: Callable[[], T]) -> T | OSError:
        """What the work answers, or the OSError that it raised: a store may take its time, so a thread asks it.

        What is raised here went wrong elsewhere while that was waited for. The thread does one work after another. So a
        shard that dies meanwhile has not been given an older checkpoint when the shards are then asked to write, and
        says that it is not ready.
        """

        def attempt() -> T | OSError:
            try:
                return work()
            except OSError as error:
                return error

        if not self._in_store:
            return attempt()
        outcome: T | OSError = self._wait(self._engine.background(attempt))
        return outcome

    def _failed(self, path: AnyPath, error: Exception) -> None:
        self.due = self._out_of_reach_until = self._engine.now() + self._seconds
        self.problem = (str(error).strip() or repr(error)).splitlines()[-1]
        self._emit(events.CheckpointFailed(path=str(path), reason=self.problem))
