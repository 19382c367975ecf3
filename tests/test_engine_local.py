# SPDX-License-Identifier: Apache-2.0
"""Laws of the local engine: processes of this machine that share memory and never outlive their coordinator."""

import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MARK, Settle, marked_processes
from torch.utils.data import TensorDataset

import distbelief as db
from distbelief.channel.base import Out, Remote, exported
from distbelief.engine.base import Death, Faults, Home
from distbelief.engine.local import LocalEngine
from distbelief.engine.pickles import SHARED, Pickler, Unpickler
from distbelief.engines import engine_of
from distbelief.errors import ConfigurationError, DeadlineExceeded, PeerLost, TrainingFailed, UserCodeError
from tests import problems

pytestmark = pytest.mark.xdist_group("local engine")  # one is made for all of them, and not one in each worker

NAMES = [f"role/{index}" for index in range(40)]
MEGABYTES = 24


def prepare(data: Any) -> tuple[Any, str]:
    return data, type(data).__name__


def prepare_and_end(code: int) -> tuple[None, None]:
    os._exit(code)


def spoil(data: Any) -> None:
    """As an attempt: no role sees it."""
    data.tensors[0].zero_()


def prepare_slowly(started: str) -> tuple[None, None]:
    Path(started).touch()
    time.sleep(600.0)
    return None, None


class Clerk:
    """A role that looks at what it was given."""

    def __init__(self, home: Home, data: Any = None) -> None:
        self.home, self.data = home, data

    @exported
    def pid(self) -> int:
        return os.getpid()

    @exported
    def total(self) -> float:
        return float(sum(tensor.double().sum() for tensor in self.data.tensors))

    @exported
    def spoil(self) -> float:
        self.data.tensors[0].zero_()
        return float(self.data.tensors[0].abs().sum())

    @exported
    def fill(self, value: float, out: Out) -> None:
        out.fill_(value)

    @exported
    def looks_first(self) -> bool:
        return self.home._endpoint._spin._own_core  # type: ignore[attr-defined, no-any-return]

    @exported
    def hang(self) -> None:
        while True:
            pass

    @exported
    def descriptors(self) -> list[str]:
        return sorted(re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{name}")) for name in os.listdir("/proc/self/fd")
                      if os.path.islink(f"/proc/self/fd/{name}"))  # fmt: skip


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(MEGABYTES << 18, generator=generator).view(-1, 16), torch.arange(MEGABYTES << 14))


@pytest.fixture(scope="module")
def shared_engine(data: TensorDataset) -> Iterator[tuple[LocalEngine, Iterator[str]]]:
    with closing(LocalEngine(NAMES)) as engine:
        assert engine.load(prepare, data, attempt=spoil) == "TensorDataset"
        yield engine, iter(NAMES)


@pytest.fixture
def engine(shared_engine: tuple[LocalEngine, Iterator[str]], settle: list[Settle]) -> Iterator[LocalEngine]:
    engine, _ = shared_engine
    yield engine
    for name in [role for role in engine.processes if role != "zygote"]:
        engine.stop(name)
    settle.append(lambda: engine.sleep(0.01))


@pytest.fixture
def start(shared_engine: tuple[LocalEngine, Iterator[str]], engine: LocalEngine) -> Callable[..., Remote[Clerk]]:
    """Start a clerk under a fresh name, wait until it answers, and return the reference."""

    def do(*arguments: Any, deadline_seconds: float = 20.0) -> Remote[Clerk]:
        name = next(shared_engine[1])
        engine.start(name, 0, Clerk, *arguments)
        clerk = engine.find(name, Clerk, deadline_seconds)
        clerk.call(Clerk.pid).result()
        return clerk

    return do


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# data


def memory_of(pid: int, mapping: str) -> dict[str, int]:
    """Kilobytes of one mapping of a process, by the names of /proc/PID/smaps."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = mapping in line
        elif inside and line.endswith(" kB"):
            name, amount = line[:-3].split(":")
            sums[name] = sums.get(name, 0) + int(amount)
    return sums


def test_roles_share_the_memory_of_the_data_set(start: Callable[..., Remote[Clerk]], data: TensorDataset) -> None:
    clerks = [start(SHARED) for _ in range(3)]
    expected = float(sum(tensor.double().sum() for tensor in data.tensors))
    assert [clerk.call(Clerk.total).result() for clerk in clerks] == [expected] * 3
    for clerk in clerks:
        used = memory_of(clerk.call(Clerk.pid).result(), "/memfd:distbelief-job")
        assert used["Rss"] >= MEGABYTES << 10, "the role has read all of it"
        assert used["Pss"] < used["Rss"] / 2, "and pays for its share of it only"
        assert used["Private_Dirty"] == 0


def test_a_process_is_named_after_its_role(start: Callable[..., Remote[Clerk]], engine: LocalEngine) -> None:
    start(SHARED)
    names = {role: Path(f"/proc/{pid}/comm").read_text().strip() for role, pid in engine.processes.items()}
    assert len(names) == 2
    assert names == {role: f"db:{role}"[:15] for role in names}


@pytest.mark.parametrize("cores", [3, 4])
def test_replicas_and_shards_have_cores_of_their_own_where_there_are_enough_and_nobody_else_has(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbelief.cluster.available_cores", lambda: cores)
    wanted = problems.job(cluster=db.Cluster(replicas=1, partitions=2, shards=1))
    with closing(engine_of(wanted, None, None)) as engine:
        assert isinstance(engine, LocalEngine)
        assert engine._wiring.own_cores == ({"shard/0", "replica/0/0", "replica/0/1"} if cores == 4 else set())
        assert not engine._endpoint._spin._own_core


def test_a_role_looks_before_it_sleeps_if_it_has_a_core_of_its_own() -> None:
    with closing(LocalEngine(["a", "b"], own_cores=["a"])) as engine:
        engine.load(prepare, None)
        for name in ("a", "b"):
            engine.start(name, 0, Clerk)
        looking = [engine.find(name, Clerk).call(Clerk.looks_first).result() for name in ("a", "b")]
        assert looking == [True, False]


def test_a_role_that_writes_to_its_data_set_changes_its_own_copy(start: Callable[..., Remote[Clerk]]) -> None:
    spoiler, reader = start(SHARED), start(SHARED)
    before = reader.call(Clerk.total).result()
    assert spoiler.call(Clerk.spoil).result() == 0.0
    assert reader.call(Clerk.total).result() == before
    assert start(SHARED).call(Clerk.total).result() == before


def everything() -> dict[str, Any]:
    shared = torch.arange(5)
    return {
        "float": torch.randn(3, 4),
        "bfloat": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 7),
        "transposed": torch.arange(6).view(2, 3).T,
        "strided": torch.arange(10)[::3],
        "expanded": torch.ones(1).expand(4),
        "trained": torch.ones(2, requires_grad=True),
        "one of a column": torch.arange(4.0)[::2][:1],
        "complex": torch.tensor([1 + 2j]),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "twice": [shared, shared],
        "array": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "view": np.arange(10)[::2],
        "text": np.array(["a", "bc"]),
        "object": np.array([1, None], dtype=object),
        "data set": TensorDataset(torch.arange(3), torch.ones(3)),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape, left.requires_grad, left.layout) == (
            right.dtype, right.shape, right.requires_grad, right.layout
        ) and bool((left.to_dense() == right.to_dense()).all())  # fmt: skip
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, TensorDataset):
        return all(same(a, b) for a, b in zip(left.tensors, right.tensors, strict=True))
    return all(same(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", everything())
@pytest.mark.parametrize("out_of_band", [True, False], ids=["buffers apart", "all in one"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11 says so of any
def test_tensors_and_arrays_of_a_pickled_job_arrive_equal(name: str, out_of_band: bool) -> None:
    value = everything()[name]
    buffers: list[Any] | None = [] if out_of_band else None
    text = Pickler.dumps(value, buffers=buffers)
    arrived = Unpickler.loads(text, None if buffers is None else [memoryview(bytearray(b.raw())) for b in buffers])
    assert same(value, arrived)
    if name == "twice":
        assert arrived[0] is arrived[1]
    if name in ("float", "array", "data set"):
        assert bool(buffers) == out_of_band, "the bytes of plain tensors and arrays travel apart from the pickle"


PARTS: dict[str, Callable[[Any], Any]] = {
    "all of it": lambda array: array,
    "a slice": lambda array: array[3:7],
    "another shape": lambda array: array.reshape(5, 12),
    "other numbers": lambda array: array[1:].view(np.int16),
    "transposed": lambda array: array.T,
    "a slice of a slice": lambda array: array[2:][1:3],
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("saved", [True, False], ids=["of np.save", "bare"])
def test_what_is_mapped_from_a_file_is_mapped_again_on_this_machine_and_copied_to_others(
    name: str, saved: bool, tmp_path: Path
) -> None:
    path, numbers = tmp_path / "numbers", np.arange(60.0).reshape(10, 6)
    with path.open("wb") as file:
        np.save(file, numbers) if saved else file.write(bytes(8) + numbers.tobytes())
    mapped = np.load(path, mmap_mode="r") if saved else np.memmap(path, float, "r", 8, (10, 6))
    part = PARTS[name](mapped)
    buffers: list[Any] = []
    arrived = Unpickler.loads(Pickler.dumps(part, buffers=buffers, here=True))
    assert (buffers, type(arrived), arrived.flags.writeable) == ([], np.memmap, False)
    assert same(PARTS[name](numbers), arrived)
    copied = Pickler.dumps(part)
    path.unlink()
    assert same(PARTS[name](numbers), Unpickler.loads(copied))


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_is_mapped_to_be_written_to_is_copied(mode: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "numbers.npy", np.zeros(6))
    mapped = np.load(tmp_path / "numbers.npy", mmap_mode=mode)
    mapped[2] = 7.0
    arrived = Unpickler.loads(Pickler.dumps(mapped, here=True))
    mapped[3] = 8.0
    assert arrived.tolist() == [0.0, 0.0, 7.0, 0.0, 0.0, 0.0]


def test_the_shared_argument_is_named_and_not_copied() -> None:
    job = object()
    text = Pickler.dumps([SHARED, (SHARED, 3)])
    assert len(text) < 200
    first, (second, number) = Unpickler.loads(text, shared=job)
    assert (first is job, second is job, number) == (True, True, 3)


@pytest.mark.parametrize("name", ["a lock", "a file", "a generator"])
def test_a_job_that_cannot_be_pickled_is_refused_before_any_process_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **options: started.append(given))
    with closing(LocalEngine([])) as engine, open(__file__) as file:
        job: Any = {"a lock": threading.Lock(), "a file": file, "a generator": iter(each for each in file)}[name]
        with pytest.raises(ConfigurationError, match=r"cannot be handed to other(.|\n)*leave files, locks and gene"):
            engine.load(prepare, job)
    assert started == []


def test_what_other_processes_cannot_import_travels_as_it_is() -> None:
    """Lambdas, inner functions and classes, with what they name of their surroundings."""
    rows = torch.arange(5.0)

    class Doubled:
        def __init__(self, rows: torch.Tensor) -> None:
            self.rows = 2 * rows

    def build() -> Any:
        return Doubled(rows), Doubled

    buffers: list[Any] = []
    text = Pickler.dumps([build, lambda: same(rows, torch.arange(5.0)), Doubled, prepare, Clerk], buffers=buffers)
    assert [buffer.raw().nbytes for buffer in buffers] == [20], "what is named is shared, once, as data are"
    arrived = Unpickler.loads(text, [memoryview(bytearray(buffer.raw())) for buffer in buffers])
    (built, kind), equal = arrived[0](), arrived[1]()
    assert (kind is arrived[2], equal, isinstance(built, Doubled)) == (True, True, True)
    assert built.rows.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert arrived[1].__code__.co_filename == __file__, "tracebacks name the file"
    assert (arrived[3] is prepare, arrived[4] is Clerk) == (True, True), "of importable files only the names travel"


def test_tracebacks_of_a_notebooks_functions_show_their_lines() -> None:
    name, lines = "/tmp/ipykernel_7/4.py", ["def broken():\n", "    return 1 / 0  # here\n"]
    cell: dict[str, Any] = {"__name__": "__main__"}
    linecache.cache[name] = len("".join(lines)), None, lines, name
    exec(compile("".join(lines), name, "exec"), cell)
    text = Pickler.dumps(cell["broken"])
    del linecache.cache[name]
    arrived = Unpickler.loads(text)
    with pytest.raises(ZeroDivisionError) as raised:
        arrived()
    assert "return 1 / 0  # here" in "".join(traceback.format_exception(raised.value))
    del linecache.cache[name]


def test_roles_run_the_copy_of_the_package_that_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may be installed, where the program runs in a checkout."""
    (tmp_path / "distbelief").mkdir()
    (tmp_path / "distbelief" / "__init__.py").write_text("raise SystemExit('another copy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with closing(LocalEngine([])) as engine:
        assert engine.load(prepare, 7) == "int"


@pytest.mark.slow
def test_the_process_that_starts_roles_may_be_ended_by_the_users_code() -> None:
    with closing(LocalEngine([])) as engine, pytest.raises(TrainingFailed, match="exit code 7"):
        engine.load(prepare_and_end, 7)


UNREACHABLE = """
import torch, distbelief as db
from torch import nn

def model():
    return nn.Linear(3, 2)

if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    job = db.Job(model=model, data=data, loss=lambda *pair: nn.functional.cross_entropy(*pair), batch_size=3)
    result = db.train(job, view=False)
    print(result.summary.examples.seen, "seen, resume with", result.summary.resume_command)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-", "-c", "folder", "folder.zip", "-i"])
def test_a_program_that_other_processes_cannot_import_trains_all_the_same(program: str, tmp_path: Path) -> None:
    """Read from the standard input, given as an argument, in a `__main__.py`, or typed in behind a script."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(UNREACHABLE)
    shutil.make_archive(str(tmp_path / "folder"), "zip", tmp_path / "folder")
    (tmp_path / "script.py").write_text("import torch, distbelief as db\nfrom torch import nn\n")
    typed = UNREACHABLE.replace("    return nn.Linear(3, 2)\n", "    return nn.Linear(3, 2)\n\n") + "\n"
    given = {"-c": ["-c", UNREACHABLE], "-i": ["-i", "script.py"]}.get(program, [program])
    told = subprocess.run(
        [sys.executable, *given], input=typed if program in ("-", "-i") else "", cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.startswith("9 seen, resume with distbelief.train("), told.stdout + told.stderr


LIBRARY = (
    UNREACHABLE.split("if __name__")[0]
    + """
def data():
    return torch.utils.data.TensorDataset(torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
"""
)
UNGUARDED = """
import distbelief as db
from library import data, model, nn

db.train(db.Job(model=model, data=data, loss=nn.functional.cross_entropy, batch_size=3, run="run"), view=False)
"""


@pytest.mark.slow
def test_a_program_that_trains_whenever_it_is_imported_is_refused_and_does_not_train_twice(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY)
    for body in (UNGUARDED, LIBRARY + UNGUARDED.replace("from library import data, model, nn", "")):
        (tmp_path / "program.py").write_text(body)
        told = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert told.returncode == 1
        assert "importing it starts training again\nhint: put what trains below `if __name__" in told.stderr
        assert not (tmp_path / "run").exists()


def killed(prepared: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(prepared: Any) -> None:
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("attempt", "said"), [(killed, "killed by signal 9"), (ended, "ended with exit code 0")])
def test_an_attempt_that_ends_its_process_is_said(attempt: Callable[[Any], None], said: str) -> None:
    message = f"^the process that tried one mini-batch was {said}, before"
    with closing(LocalEngine([])) as engine, pytest.raises(UserCodeError, match=message):
        engine.load(prepare, 7, attempt=attempt)


# processes


class Waiting:
    """A role that waits while it computes, as for a core that others hold, and reports how long all of it took."""

    def __init__(self, home: Home) -> None:
        self.home, self.seconds = home, 0.0

    def run(self) -> None:
        begun = self.home.now()
        with self.home.computing(32):
            time.sleep(0.1)
        self.seconds = self.home.now() - begun
        self.home.sleep(3600.0)

    @exported
    def waited(self) -> float:
        return self.seconds


@pytest.mark.slow
def test_a_role_slowed_by_script_is_so_by_its_processor_time_and_not_while_others_have_its_core() -> None:
    with closing(LocalEngine(NAMES, faults=Faults(slow={NAMES[0]: 50.0}))) as engine:
        engine.load(prepare, 7)
        engine.start(NAMES[0], 0, Waiting)
        waiting = engine.find(NAMES[0], Waiting)
        limit = time.monotonic() + 30.0
        while not (seconds := waiting.call(Waiting.waited).result()) and time.monotonic() < limit:
            engine.sleep(0.05)
        assert 0.1 <= seconds < 2.5, "50 times 0.1 were five seconds"


def test_a_role_holds_nothing_of_the_other_roles(start: Callable[..., Remote[Clerk]]) -> None:
    first = start().call(Clerk.descriptors).result()
    for _ in range(5):
        start()
    last = start().call(Clerk.descriptors).result()
    assert last == first


def test_a_stopped_peer_misses_the_deadline_and_writes_nothing_when_it_goes_on(
    start: Callable[..., Remote[Clerk]], engine: LocalEngine
) -> None:
    clerk = start(deadline_seconds=0.3)
    pid = clerk.call(Clerk.pid).result()
    out = engine.allocate(1000, torch.float32)
    clerk.call(Clerk.fill, 1.0, out).result()
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        clerk.call(Clerk.fill, 2.0, out).result()
    assert 0.28 < time.monotonic() - started < 1.0
    os.kill(pid, signal.SIGCONT)
    assert clerk.call(Clerk.pid).result() == pid
    assert out.eq(1.0).all()


def test_a_peer_killed_in_the_middle_of_a_call_is_lost_at_once(
    start: Callable[..., Remote[Clerk]], engine: LocalEngine
) -> None:
    clerk = start()
    pid = clerk.call(Clerk.pid).result()
    future = clerk.call(Clerk.hang)
    engine.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PeerLost):
        future.result()
    assert time.monotonic() - started < 1.0
    while not engine.deaths():
        assert time.monotonic() - started < 5.0
        engine.sleep(0.01)


def test_a_role_that_is_stopped_before_it_has_begun_is_not_counted_among_the_processes(
    engine: LocalEngine,
) -> None:
    before = dict(engine.processes)
    for incarnation in range(3):
        engine.start(NAMES[-1], incarnation, Clerk, SHARED)
        engine.stop(NAMES[-1])
    engine.sleep(0.5)
    assert engine.processes == before


def test_stopping_ends_a_role_that_is_busy_or_stopped(start: Callable[..., Remote[Clerk]], engine: LocalEngine) -> None:
    busy, stopped = start(), start()
    pids = [clerk.call(Clerk.pid).result() for clerk in (busy, stopped)]
    busy.call(Clerk.hang)
    os.kill(pids[1], signal.SIGSTOP)
    for name in [role for role in engine.processes if role != "zygote"]:
        engine.stop(name)
    until(lambda: not any(is_alive(pid) for pid in pids), 3.0)
    engine.sleep(0.1)
    assert engine.deaths() == []


# the end of everything


@pytest.mark.slow
def test_when_the_process_that_starts_roles_is_killed_all_die_and_can_be_started_again() -> None:
    with closing(LocalEngine(NAMES)) as engine:
        engine.load(prepare, {"some": "data"})
        for name in NAMES[:3]:
            engine.start(name, 0, Clerk)
        pids = [engine.find(name, Clerk).call(Clerk.pid).result() for name in NAMES[:3]]
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(engine.processes["zygote"], signal.SIGKILL)
        deaths: list[Death] = []
        started = time.monotonic()
        while len(deaths) < 3:
            engine.sleep(0.02)
            deaths += engine.deaths()
            assert time.monotonic() - started < 5.0
        assert sorted(death.role for death in deaths) == NAMES[:3]
        assert all(death.failure is None and "was killed" in death.reason for death in deaths)
        until(lambda: not any(is_alive(pid) for pid in pids), 3.0)
        for name in NAMES[:3]:
            engine.start(name, 1, Clerk)
        again = [engine.find(name, Clerk).call(Clerk.pid).result() for name in NAMES[:3]]
        assert not set(again) & set(pids)
        assert engine.deaths() == []


def prepare_from(path: Path) -> tuple[Any, int]:
    return path.read_text(), 0


@pytest.mark.slow
def test_what_the_job_raises_when_it_is_loaded_again_is_why_its_roles_could_not_be_started(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("some")
    with closing(LocalEngine(NAMES)) as engine:
        engine.load(prepare_from, tmp_path / "data")
        (tmp_path / "data").unlink()
        os.kill(engine.processes["zygote"], signal.SIGKILL)
        while "zygote" in engine.processes:
            engine.sleep(0.02)
        engine.start(NAMES[0], 0, Clerk, SHARED)
        while not (deaths := engine.deaths()):
            engine.sleep(0.02)
        (death,) = deaths
        assert (death.role, death.incarnation) == (NAMES[0], 0)
        assert "FileNotFoundError" in str(death.failure)


@pytest.mark.slow
def test_closing_ends_roles_that_are_busy_or_stopped_within_seconds() -> None:
    engine = LocalEngine(NAMES)
    engine.load(prepare, None)
    clerks = []
    for name in NAMES[:3]:
        engine.start(name, 0, Clerk)
        clerks.append(engine.find(name, Clerk))
    pids = [clerk.call(Clerk.pid).result() for clerk in clerks]
    clerks[0].call(Clerk.hang)
    os.kill(pids[1], signal.SIGSTOP)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 3.0
    assert not any(is_alive(pid) for pid in pids)


COORDINATOR_SCRIPT = """
import sys, time
from test_engine_local import Clerk, LocalEngine, NAMES, prepare, prepare_slowly
engine = LocalEngine(NAMES, transport=sys.argv[1])
if sys.argv[2]:
    engine.load(prepare_slowly, sys.argv[2])
engine.load(prepare, None)
for name in NAMES[:4]:
    engine.start(name, 0, Clerk)
pids = [engine.find(name, Clerk).call(Clerk.pid).result() for name in NAMES[:4]]
engine.find(NAMES[0], Clerk).call(Clerk.hang)
engine.sleep(0.1)
print(*pids, engine.processes["zygote"], flush=True)
engine.sleep(600.0)
"""


def coordinator(transport: str, slow: str = "") -> "subprocess.Popen[str]":
    folders = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", COORDINATOR_SCRIPT, transport, slow], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
def test_when_the_coordinators_process_is_killed_no_role_is_left(transport: str) -> None:
    with coordinator(transport) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 5
        os.kill(pids[1], signal.SIGSTOP)
        process.kill()
    until(lambda: not any(is_alive(pid) for pid in pids), 10.0)


@pytest.mark.slow
def test_when_the_coordinators_process_is_killed_while_the_job_is_loaded_nothing_is_left(tmp_path: Path) -> None:
    started = tmp_path / "started"
    before = set(marked_processes())
    with coordinator("tcp", str(started)) as process:
        until(started.exists, 30.0)
        process.kill()
    until(lambda: set(marked_processes()) <= before, 10.0)


def test_this_sessions_processes_can_be_told_from_others(start: Callable[..., Remote[Clerk]]) -> None:
    """What the leak check stands on: a role, forked twice over, still carries the mark."""
    pid = start().call(Clerk.pid).result()
    assert any(line.split()[0] == str(pid) for line in marked_processes())
    assert MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes()
