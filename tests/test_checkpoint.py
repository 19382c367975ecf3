# SPDX-License-Identifier: Apache-2.0
"""Laws of checkpoints: complete or not at all, damage is noticed and the one before is taken, disks may be full."""

import errno
import itertools
import os
import shutil
import subprocess
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from distbelief import checkpoint, shard_file
from distbelief.checkpoint import BUFFERS, MANIFEST, LayoutRecord, Manifest
from distbelief.errors import CheckpointError, ConfigurationError, OtherFormat, OutOfReach
from distbelief.export import export, write_template
from distbelief.files import copy
from distbelief.leases import Lease, LeaseState
from distbelief.parameters import Layout, Piece, Span, cut, lay_out, trainable
from distbelief.partition.units import OwnedPiece
from distbelief.recut import recut
from distbelief.shard_file import PushRecord, ShardState
from tests.cuts import by_rows, write_checkpoint

BUFFER_VALUES = torch.arange(6, dtype=torch.float64) + 2.0**52 + 1


class Counted(nn.Linear):
    """A layer with six numbers in its buffers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("phase", torch.zeros((), dtype=torch.complex64))


def model(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), Counted(width, 2))


LENGTH = lay_out(model()).length


def write_shards(folder: Path, value: float, shards: int = 2, length: int | None = None) -> list[shard_file.ShardFile]:
    files = []
    for index, span in enumerate(cut(length or LENGTH, shards)):
        records = {0: PushRecord(0, 3, {4: 10 + index, 5: 20}), 2: PushRecord(1, 1, {4: 3, 5: 24 - index})}
        state = ShardState(start=span.start, stop=span.stop, replicas=records)
        path = folder / f"shard-{index}.safetensors"
        draft = shard_file.write(path, {"parameters": torch.full((len(span),), value)}, state)
        files.append(shard_file.seal(draft, state))
    return files


def manifest_of(files: list[shard_file.ShardFile], examples: int) -> Manifest:
    module = model()
    manifests = checkpoint.manifests(
        module, lay_out(module), checkpoint.lay_out_buffers(module), rule="adagrad(0.05)", seed=3
    )
    leases = LeaseState(100, 32, 4, (Lease(3, 0, 96, 100),), 8)
    return manifests(incarnation=2, examples=examples, leases=leases, shards=files)


def take(run: Path, value: float) -> Path:
    """A checkpoint whose parameters all have this value."""
    folder = checkpoint.next_folder(checkpoint.home(run))
    checkpoint.commit(folder, manifest_of(write_shards(folder, value), int(value)), [BUFFER_VALUES])
    return folder


def newest(run: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and those passed over with the reasons."""
    rejected: list[tuple[Path, str]] = []
    return checkpoint.newest(run, lambda folder, reason: rejected.append((folder, reason)))[0], rejected


def test_a_checkpoint_is_read_back_as_it_was_taken(tmp_path: Path) -> None:
    folder = take(tmp_path, 7.0)
    found, manifest = checkpoint.newest(tmp_path, lambda path, reason: pytest.fail(reason))
    given = manifest_of(manifest.shards, 7)
    assert found == folder
    assert msgspec.structs.replace(manifest, buffers=None) == given
    assert manifest.layout.layout == lay_out(model())
    vectors = shard_file.read_span(folder, manifest.shards, Span(0, LENGTH))
    assert torch.equal(vectors["parameters"], torch.full((LENGTH,), 7.0))
    (buffers,) = checkpoint.read_buffers(folder, manifest)
    assert torch.equal(buffers, BUFFER_VALUES)
    assert list(checkpoint.read_replica_positions(folder, manifest)) == [{4: 10, 5: 24}, {4: 11, 5: 23}]


@pytest.mark.parametrize(
    ("alive", "positions"),
    [
        ({0: 0, 2: 1}, [{4: 10, 5: 24}, {4: 11, 5: 23}]),
        ({0: 0, 2: 2}, [{4: 10, 5: 20}, {4: 11, 5: 20}]),
        ({0: 0}, [{4: 10, 5: 20}, {4: 11, 5: 20}]),
        ({0: 5, 1: 5}, [{}, {}]),
    ],
)
def test_of_pushes_only_those_of_replicas_that_were_alive_are_still_to_be_settled(
    alive: dict[int, int], positions: list[dict[int, int]], tmp_path: Path
) -> None:
    """What others had pushed is settled or counted as repeated already, also where fewer replicas go on."""
    folder = take(tmp_path, 7.0)
    manifest = checkpoint.read_manifest(folder)
    assert manifest.leases is not None
    manifest = msgspec.structs.replace(manifest, leases=msgspec.structs.replace(manifest.leases, alive=alive))
    assert list(checkpoint.read_replica_positions(folder, manifest)) == positions


def test_a_file_keeps_its_name_however_many_checkpoints_share_it(tmp_path: Path) -> None:
    (file, _), folders = write_shards(tmp_path, 1.0), [tmp_path / f"{number:08d}" for number in range(4)]
    for folder in folders:
        folder.mkdir()
    copy(tmp_path / file.name, folders[0] / file.name)
    for folder, following in itertools.pairwise(folders):
        file = checkpoint.share(folder, file, following)
        assert file.name == "00000000-shard-0.safetensors"
        shard_file.check(following, file)


def test_a_model_without_buffers_has_checkpoints_too(tmp_path: Path) -> None:
    folder = checkpoint.next_folder(checkpoint.home(tmp_path))
    module = nn.Linear(3, 5)
    layout, buffers = lay_out(module), checkpoint.lay_out_buffers(module, [[], [], []])
    files = write_shards(folder, 1.0, length=layout.length)
    manifest = msgspec.structs.replace(
        manifest_of(files, 1), layout=LayoutRecord.of(layout), buffer_layout=LayoutRecord.of(buffers)
    )
    assert checkpoint.commit(folder, manifest, []) == checkpoint.read_manifest(folder)
    assert newest(tmp_path) == (folder, [])
    assert [len(each) for each in checkpoint.read_buffers(folder, checkpoint.read_manifest(folder))] == [0, 0, 0]


def cut_off(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def flip(path: Path, place: int) -> None:
    text = bytearray(path.read_bytes())
    text[place] ^= 4
    path.write_bytes(text)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a shard's file is gone": ("shard-1.safetensors", Path.unlink, "is missing"),
    "a shard's file is empty": ("shard-0.safetensors", lambda path: cut_off(path, 0), "has 0 bytes"),
    "a shard's file ends in its header": ("shard-0.safetensors", lambda path: cut_off(path, 30), "has 30 bytes"),
    "a shard's file lacks its last byte": ("shard-1.safetensors", lambda path: cut_off(path, -1), "were written"),
    "a shard's header has a flipped bit": ("shard-0.safetensors", lambda path: flip(path, 20), "was changed"),
    "a shard's data has a flipped bit": ("shard-0.safetensors", lambda path: flip(path, -3), "was changed"),
    "the buffers are gone": (BUFFERS, Path.unlink, "is missing"),
    "the buffers are cut off": (BUFFERS, lambda path: cut_off(path, -8), "were written"),
    "the buffers have a flipped bit": (BUFFERS, lambda path: flip(path, -1), "was changed"),
    "the manifest is gone": (MANIFEST, Path.unlink, "was not completed"),
    "the manifest is empty": (MANIFEST, lambda path: cut_off(path, 0), "cannot be read"),
    "the manifest is cut off": (MANIFEST, lambda path: cut_off(path, -2), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken_and_said(damage: str, tmp_path: Path) -> None:
    name, harm, message = DAMAGES[damage]
    before, after = take(tmp_path, 1.0), take(tmp_path, 2.0)
    harm(after / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_manifest(after)
    found, rejected = newest(tmp_path)
    assert found == before
    ((folder, reason),) = rejected
    assert folder == after
    assert str(after) in reason
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match=f"the newest of its 1 is damaged: .*{message}"):
        newest(tmp_path)


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    folder = take(tmp_path, 1.0)
    whole = (folder / MANIFEST).read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (folder / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=MANIFEST):
            checkpoint.read_manifest(folder)


@pytest.mark.parametrize("text", [b'{"format": 99}', b'{"format": 1, "pieces": [], "layout": 3}'])
def test_the_checkpoint_of_another_version_is_not_damaged_and_no_older_one_is_taken_for_it(
    text: bytes, tmp_path: Path
) -> None:
    take(tmp_path, 1.0)
    after = take(tmp_path, 2.0)
    written = checkpoint.Proved(zlib.crc32(text), msgspec.Raw(text))
    (after / MANIFEST).write_bytes(msgspec.json.encode(written))
    with pytest.raises(OtherFormat, match=r"has format (99|1), this version reads 2\nhint: go on with"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("reader", "refused"),
    [(Path, "read_bytes"), (shard_file, "measure"), (Path, "iterdir")],
    ids=["manifest", "shard", "folder"],
)
def test_what_this_process_may_not_read_is_not_damaged_and_no_older_one_is_taken_for_it(
    reader: object, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (1.0, 2.0):
        take(tmp_path, value)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(reader, refused, refuse)
        with pytest.raises(OutOfReach, match=r"out of reach: .*Permission denied.*\nhint: .*who may read it"):
            newest(tmp_path)
    assert newest(tmp_path)[1] == []


@pytest.mark.parametrize("done", ["nothing", "one shard", "all shards", "the buffers", "the manifest's bytes"])
def test_a_crash_before_the_manifest_is_in_place_leaves_no_checkpoint(
    done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = take(tmp_path, 1.0)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    folder = checkpoint.next_folder(checkpoint.home(tmp_path))
    if done == "one shard":
        write_shards(folder, 2.0)
        (folder / "shard-1.safetensors").unlink()
    elif done == "all shards":
        write_shards(folder, 2.0)
    elif done != "nothing":
        files = write_shards(folder, 2.0)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync" if done == "the buffers" else "pathlib.Path.rename", crash)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.commit(folder, manifest_of(files, 2), [BUFFER_VALUES])
        assert (folder / BUFFERS).exists()
    found, rejected = newest(tmp_path)
    assert found == before
    assert [path for path, _ in rejected] == [folder]
    assert take(tmp_path, 3.0) > folder
    checkpoint.keep_newest(tmp_path, 5)
    assert not folder.exists()


def test_the_manifest_appears_after_everything_it_speaks_of_is_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def forced(descriptor: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        seen.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = take(tmp_path, 1.0)
    assert seen == [
        "shard-0.safetensors", "shard-1.safetensors", BUFFERS, MANIFEST + ".part", f"rename to {MANIFEST}",
        folder.name, "checkpoints",
    ]  # fmt: skip


def test_the_newest_are_kept_and_what_is_under_way_is_left_alone(tmp_path: Path) -> None:
    taken = [take(tmp_path, value) for value in range(3)]
    broken_off = checkpoint.next_folder(checkpoint.home(tmp_path))
    taken += [take(tmp_path, value) for value in range(3, 5)]
    under_way = checkpoint.next_folder(checkpoint.home(tmp_path))
    (tmp_path / "checkpoints" / "notes").mkdir()
    checkpoint.keep_newest(tmp_path, 2)
    assert checkpoint.folders(tmp_path) == [under_way, *reversed(taken[-2:])]
    assert not broken_off.exists()
    checkpoint.keep_newest(tmp_path, 1)
    assert checkpoint.folders(tmp_path) == [under_way, taken[-1]]


def test_the_next_checkpoint_writes_over_a_spare_one_and_nothing_of_that_is_left(tmp_path: Path) -> None:
    before, passed = take(tmp_path, 1.0), take(tmp_path, 2.0)
    manifest = checkpoint.read_manifest(passed)
    (passed / "00000000-shard-0-pairs.safetensors").write_bytes(b"inherited")
    os.link(passed / "shard-1.safetensors", tmp_path / "copy of somebody")
    inodes = {path.name: path.stat().st_ino for path in passed.iterdir()}
    copied = (tmp_path / "copy of somebody").read_bytes()
    assert checkpoint.make_spare(passed, manifest)
    assert newest(tmp_path)[0] == before, "it is no checkpoint any more"
    assert sorted(path.name for path in passed.iterdir()) == [BUFFERS, MANIFEST + ".part", "shard-0.safetensors"]
    folder = checkpoint.next_folder(checkpoint.home(tmp_path), passed)
    checkpoint.commit(folder, manifest_of(write_shards(folder, 3.0), 3), [BUFFER_VALUES])
    assert not passed.exists()
    found, manifest = checkpoint.newest(tmp_path, lambda path, reason: pytest.fail(reason))
    assert (found, manifest.examples) == (folder, 3)
    vectors = shard_file.read_span(folder, manifest.shards, Span(0, LENGTH))
    assert torch.equal(vectors["parameters"], torch.full((LENGTH,), 3.0))
    kept = {path.name for path in folder.iterdir() if inodes.get(path.name) == path.stat().st_ino}
    assert kept == {BUFFERS, MANIFEST, "shard-0.safetensors"}
    assert (tmp_path / "copy of somebody").read_bytes() == copied


def test_what_is_written_over_a_longer_file_ends_where_it_ends(tmp_path: Path) -> None:
    passed = take(tmp_path, 1.0)
    manifest = checkpoint.read_manifest(passed)
    for path in passed.iterdir():
        path.write_bytes(path.read_bytes() + bytes(100))
    assert checkpoint.make_spare(passed, manifest)
    folder = checkpoint.next_folder(checkpoint.home(tmp_path), passed)
    checkpoint.commit(folder, manifest_of(write_shards(folder, 2.0), 2), [BUFFER_VALUES])
    assert newest(tmp_path) == (folder, [])


def test_a_large_checkpoint_or_one_that_somebody_removed_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = take(tmp_path, 1.0)
    manifest = checkpoint.read_manifest(passed)
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", sum(file.size_bytes for file in manifest.shards) - 1)
    assert not checkpoint.make_spare(passed, manifest)
    assert newest(tmp_path) == (passed, [])
    monkeypatch.undo()
    checkpoint.discard(passed)
    assert not checkpoint.make_spare(passed, manifest)
    assert checkpoint.next_folder(checkpoint.home(tmp_path), passed).is_dir()


def test_a_checkpoint_that_is_half_removed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = take(tmp_path, 1.0), take(tmp_path, 2.0)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    checkpoint.discard(after)
    assert sorted(path.name for path in after.iterdir()) == [BUFFERS, "shard-0.safetensors", "shard-1.safetensors"]
    assert newest(tmp_path)[0] == before


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"holds no complete checkpoint\nhint: nothing can be"):
            newest(run)


def test_another_model_is_refused_with_the_parameters_that_differ(tmp_path: Path) -> None:
    folder = take(tmp_path, 1.0)
    manifest = checkpoint.read_manifest(folder)
    checkpoint.check_same_model(manifest, model().to("meta"), folder)
    with pytest.raises(CheckpointError, match="is of another model") as caught:
        checkpoint.check_same_model(manifest, model(width=6), folder)
    assert "0.weight has shape [6, 3], the checkpoint [5, 3]" in str(caught.value)
    assert str(caught.value).splitlines()[-1] == "hint: resume with the model that the run was started with"
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    with pytest.raises(CheckpointError, match=r"; and \d+ more"):
        checkpoint.check_same_model(manifest, deep, folder)
    with pytest.raises(CheckpointError, match=r"its parameters are torch\.float64, the checkpoint's torch\.float32"):
        checkpoint.check_same_model(manifest, model().double(), folder)


def test_the_same_model_in_another_order_on_the_line_is_the_same_model(tmp_path: Path) -> None:
    module = model()
    biases_last = lay_out(module, lambda name, parameter: {"weight_decay": 0.0} if name.endswith("bias") else {})
    assert biases_last.fingerprint() != lay_out(module).fingerprint()
    manifests = checkpoint.manifests(module, biases_last, checkpoint.lay_out_buffers(module), rule="", seed=0)
    manifest = manifests(incarnation=0, examples=0, leases=LeaseState(100, 32, 4, (), 0), shards=[])
    checkpoint.check_same_model(manifest, module, tmp_path)


def test_a_layout_is_rebuilt_from_its_record_exactly() -> None:
    pieces = (
        Piece("a", (2, 3), Span(0, 6), whole=(4, 3), corner=(2, 0)),
        Piece("scale", (), Span(6, 7)),
        Piece("a", (2, 3), Span(7, 13), whole=(4, 3), corner=(0, 0)),
        Piece("b", (3, 1, 2), Span(13, 19), whole=(3, 2, 2), corner=(0, 1, 0)),
        Piece("count", (), Span(19, 20), whole=(), corner=()),
    )
    for layout in (Layout(pieces, torch.bfloat16, (7,)), Layout((), torch.float64, (0, 0)), lay_out(model())):
        record = LayoutRecord.of(layout)
        assert msgspec.json.decode(msgspec.json.encode(record), type=LayoutRecord) == record
        assert msgspec.json.decode(msgspec.json.encode(record), type=LayoutRecord).layout == layout


def test_the_buffers_of_partitions_follow_each_other_on_a_line_of_their_own() -> None:
    with torch.device("meta"):
        module = model()
    assert [(piece.name, piece.shape, piece.span) for piece in checkpoint.lay_out_buffers(module).pieces] == [
        ("1.seen", (4,), Span(0, 4)), ("1.phase", (2,), Span(4, 6)),
    ]  # fmt: skip
    phase = OwnedPiece("1.phase", (), ())
    halves = [OwnedPiece("1.seen", ((0, 2), (low, low + 1)), (2, 2)) for low in (0, 1)]
    layout = checkpoint.lay_out_buffers(module, [[halves[0], phase], [], [phase, halves[1]]])
    assert layout.pieces == (
        Piece("1.seen", (2, 1), Span(0, 2), whole=(2, 2), corner=(0, 0)),
        Piece("1.phase", (2,), Span(2, 4), whole=(2,), corner=(0,)),
        Piece("1.phase", (2,), Span(4, 6), whole=(2,), corner=(0,)),
        Piece("1.seen", (2, 1), Span(6, 8), whole=(2, 2), corner=(0, 1)),
    )
    assert layout.partitions == [Span(0, 4), Span(4, 4), Span(4, 8)]
    assert layout.dtype == torch.float64


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "distbelief-test", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_anywhere_is_an_os_error_and_the_checkpoint_before_stays_whole(small_disk: Path) -> None:
    """One page more is free each time, until the checkpoint fits."""
    before, filled_up_in, reasons = take(small_disk, 1.0), set(), []
    files: list[shard_file.ShardFile] = []
    page, other = os.sysconf("SC_PAGESIZE"), small_disk / "other people's data"
    for pages in range(64):
        folder = checkpoint.next_folder(checkpoint.home(small_disk))
        status = os.statvfs(small_disk)
        other.write_bytes(b"0" * (status.f_bavail * status.f_frsize - pages * page))
        try:
            files = write_shards(folder, 2.0)
            checkpoint.commit(folder, manifest_of(files, 2), [torch.zeros(2000, dtype=torch.float64)])
            break
        except OSError as error:
            reasons.append(str(error))
            at_manifest = "_write_at_once" in "".join(traceback.format_tb(error.__traceback__))
            filled_up_in.add("manifest" if at_manifest else "buffers" if files else "shards")
        assert newest(small_disk)[0] == before
        checkpoint.discard(folder)
        assert newest(small_disk) == (before, [])
        other.unlink()
        files = []
    assert filled_up_in == {"shards", "buffers", "manifest"}
    assert all("No space left on device" in reason for reason in reasons)
    assert newest(small_disk) == (folder, [])


def test_a_recut_or_an_export_for_which_the_disk_is_too_small_leaves_nothing_behind(small_disk: Path) -> None:
    module = nn.Linear(150, 250)
    folder, manifest = write_checkpoint(small_disk, module, by_rows(module), {"parameters": dict(trainable(module))})
    write_template(small_disk, module)
    before = sorted(small_disk.rglob("*"))
    with pytest.raises(OSError, match="No space left on device"):
        recut(folder, manifest, lay_out(module), checkpoint.lay_out_buffers(module), [])
    with pytest.raises(ConfigurationError, match="No space left on device"):
        export(small_disk, small_disk / "model.safetensors")
    assert sorted(small_disk.rglob("*")) == before
