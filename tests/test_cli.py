# SPDX-License-Identifier: Apache-2.0
"""Laws of the command line: what is given there replaces what the file says, and is kept for resuming."""

import dataclasses
import fcntl
import functools
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import distbelief as db
from distbelief import checkpoint, cli, launch
from distbelief.launch import Launch
from distbelief.options import parse
from distbelief.report import read_summary
from tests import problems

SCRIPT = """
import distbelief as db
from tests import problems

class Own:
    name = "own"
    def __repr__(self):
        return "Own()"
    def check(self, groups):
        pass
    def bind(self, parameters, segments, span):
        return db.sgd(0.1).bind(parameters, segments, span)

def job(rule: str = "db.adagrad(0.1, eps=1e-7)") -> db.Job:
    return problems.job(algorithm=db.Downpour(update_rule=eval(rule), n_push=2))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs `distbelief` with these arguments beside the script rules_script.py."""
    (tmp_path / "rules_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["distbelief", *arguments])
        cli.command()

    yield command
    sys.modules.pop("rules_script", None)


def algorithm() -> str:
    return read_summary(Path("a/summary.json")).algorithm


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ("", "adagrad(0.1, eps=1e-07)"),
        ("--algorithm.rate 0.02", "adagrad(0.02, eps=1e-07)"),
        ("--algorithm.update-rule adagrad", "adagrad(0.05)"),
        ("--algorithm.update-rule sgd --algorithm.rate 0.3", "sgd(0.3)"),
        ("--algorithm.rate 0.004 --algorithm.update-rule adamw", "adamw(0.004)"),
        ("--algorithm.update-rule adaptive_revision --algorithm.rate 0.2", "adaptive_revision(0.2, c=1e-10)"),
        ("--rule db.sgd(0.1,momentum=0.9) --algorithm.rate 0.05", "sgd(0.05, momentum=0.9)"),
        ("--rule db.adaptive_revision(0.1,c=1.0) --algorithm.rate 0.05", "adaptive_revision(0.05, c=1.0)"),
        ("--algorithm.update-rule sgd --algorithm.rate 0.1 --algorithm.momentum 0.9", "sgd(0.1), momentum 0.9"),
        ("--rule Own()", "Own()"),
        ("--rule Own() --algorithm.update-rule adam", "adam(0.001)"),
    ],
)
def test_the_update_rule_and_its_rate_are_those_of_the_command_line_else_of_the_file(
    given: str, trained: str, run: Callable[..., None]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1", *given.split())
    assert algorithm() == f"Downpour, {trained}"


def test_a_resumed_run_keeps_the_rule_that_the_command_line_gave_it_until_it_is_given_another_rate(
    run: Callable[..., None],
) -> None:
    run("train", "rules_script.py", "--run", "a", "--algorithm.update-rule", "adam", "--algorithm.rate", "0.02")
    run("resume", "a", "--epochs", "3")
    assert algorithm() == "Downpour, adam(0.02)"
    run("resume", "a", "--epochs", "4", "--algorithm.rate", "0.01")
    assert algorithm() == "Downpour, adam(0.01)"
    assert read_summary(Path("a/summary.json")).examples.seen == 4 * 640


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--algorithm.update-rule sgd", "the update rule sgd has no default rate\nhint: add --algorithm.rate 0.1"),
        ("--rule Own() --algorithm.rate 0.1", "the rate of Own() can be set in the file only\nhint: name another rule"),
        ("--algorithm.rate -1", "Invalid learning rate: -1.0\nhint: correct the option"),
        ("--algorithm.update-rule muon --algorithm.rate 1", "muon"),
        ("--algorithm newton", "--algorithm newton: there is no such algorithm"),
        ("--algorithm", "--algorithm names nothing: there is no such algorithm"),
        ("--algorithm sandblaster --algorithm.n-push 2", "--algorithm.n-push is no option of Sandblaster"),
        ("--algorithm.history 5", "--algorithm.history is no option of Downpour"),
        ("--algorithm sandblaster --algorithm.history 0", "history=0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_starts(
    given: str, said: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("train", "rules_script.py", "--run", "a", *given.split())
    assert ended.value.code != 0
    assert said in capsys.readouterr().err
    assert not Path("a").exists()


TYPED = """
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
import distbelief as db
from tests import problems

class Kind(enum.Enum):
    ONE = len
    TWO = print

@dataclass(frozen=True)
class Plain:
    width: int = 3

@dataclass(frozen=True)
class Deep:
    where: Path = Path("/")

def job(
    folder: Path = Path("x"), kind: Kind = Kind.ONE, sizes: tuple[int, ...] = (8,), names: list[str] = ["a"],
    mode: Literal["a", "b"] = "a", wait: float = 1.0, net: Plain | Deep = Plain(), flag: bool = True,
) -> db.Job:
    print("options:", repr(folder), kind, sizes, names, mode, wait, net, flag)
    return problems.job(epochs=1)
"""


def test_options_of_every_type_are_those_of_the_commands_before_when_a_run_is_resumed(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules_script.py").write_text(TYPED)
    given = "--folder y --kind TWO --sizes 16 8 --names u v --mode b --wait inf --no-flag net:deep --net.where /tmp"
    expected = "options: PosixPath('y') Kind.TWO (16, 8) ['u', 'v'] b inf Deep(where=PosixPath('/tmp')) False"
    run("train", "rules_script.py", "--run", "a", "--cluster.silence-seconds", "inf", *given.split())
    assert expected in capsys.readouterr().out
    run("resume", "a", "--epochs", "2")
    assert expected in capsys.readouterr().out
    run("resume", "a", "--epochs", "3", "--names", "w", "--flag")
    assert expected.replace("['u', 'v']", "['w']").replace("False", "True") in capsys.readouterr().out
    run("resume", "a", "--epochs", "4")
    assert "['w']" in capsys.readouterr().out
    assert read_summary(Path("a/summary.json")).examples.seen == 4 * 640


def test_a_resume_says_which_of_the_options_before_the_file_does_not_take_any_more(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--rule", "db.sgd(0.1)", "--epochs", "1")
    Path("rules_script.py").write_text(SCRIPT.replace("rule", "other"))
    with pytest.raises(SystemExit) as ended:
        run("resume", "a", "--epochs", "2")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "the run was started with --run a --rule 'db.sgd(0.1)' --epochs 1, which" in said
    assert "rules_script.py does not take any more\nhint: let its job take these options again" in said


NAMED = """
import functools
import distbelief as db
from tests import problems

def job({name}: int = 640) -> db.Job:
    return problems.job(data=functools.partial(problems.points, {name}))
"""


def test_a_scripts_option_may_be_named_like_a_field_of_the_job_that_is_no_option(run: Callable[..., None]) -> None:
    Path("rules_script.py").write_text(NAMED.format(name="data"))
    run("train", "rules_script.py", "--run", "a", "--epochs", "1", "--data", "320")
    assert read_summary(Path("a/summary.json")).examples.seen == 320


@pytest.mark.parametrize("name", ["epochs", "cluster"])
def test_a_scripts_option_may_not_be_named_like_an_option_of_the_job(
    name: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules_script.py").write_text(NAMED.format(name=name))
    with pytest.raises(SystemExit):
        run("train", "rules_script.py")
    said = capsys.readouterr().err
    assert f"parameter {name} of job cannot become an option: distbelief has an option of that name" in said
    assert "hint: give every parameter a name of its own" in said


def test_the_help_names_the_rules_and_the_rate(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("train", "rules_script.py", "--help")
    assert ended.value.code == 0
    told: Any = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--algorithm.update-rule {None,adagrad,sgd,adam,adamw,adaptive_revision}" in told
    assert "--algorithm.rate" in told
    assert "Learning rate of the update rule. (default: as the job has it)" in told
    assert "Named here, it has its default options. (default: as the job has it)" in told


DESCRIBED = """
import distbelief as db
from tests import problems

def job(*, width: int = 8, deep: bool = False) -> db.Job:
    {doc}
    return problems.job()
"""
GOOGLE = """'''Trains a net.

    Args:
        width: How wide
            it is.
        deep: How deep.
    '''"""
REST = "'''Trains a net.\n\n    :param width: How wide\n        it is.\n    :param deep: How deep.\n    '''"


@pytest.mark.parametrize("doc", [GOOGLE, REST])
def test_what_a_job_says_of_its_parameters_stands_beside_the_options(
    doc: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules_script.py").write_text(DESCRIBED.format(doc=doc))
    with pytest.raises(SystemExit):
        run("train", "rules_script.py", "--help")
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Trains a net. --algorithm {downpour,sandblaster} Trains with the other" in told
    assert "--width INT How wide it is. (default: 8)" in told
    assert "How deep. (default: False)" in told
    assert told.count("How wide") == 1


def test_an_option_of_the_file_may_have_the_name_of_a_nested_one() -> None:
    def job(shards: int = 7) -> db.Job:
        return dataclasses.replace(problems.job(), seed=shards)

    made, _, _ = parse(job, Launch(), ["--shards", "3", "--cluster.shards", "5"], "distbelief train")
    assert (made.seed, made.cluster.shards) == (3, 5)


def test_what_a_job_does_to_the_value_of_an_option_is_not_there_the_next_time() -> None:
    def job(sizes: list[int] = [1]) -> db.Job:  # noqa: B006
        sizes.append(1)
        return dataclasses.replace(problems.job(), seed=len(sizes))

    assert [parse(job, Launch(), [], "distbelief train")[0].seed for _ in range(2)] == [2, 2]


def test_another_algorithm_is_named_on_the_command_line_and_goes_on_where_the_first_one_was(
    run: Callable[..., None],
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1", "--algorithm.rate", "0.02")
    run("resume", "a", "--algorithm", "sandblaster", "--algorithm.max-iterations", "5")
    assert algorithm() == "Sandblaster L-BFGS, 10 pairs"
    summary = read_summary(Path("a/summary.json"))
    assert summary.batch is not None
    assert summary.batch.iterations == 5
    run("resume", "a", "--algorithm.max-iterations", "9", "--algorithm.gtol=0", "--algorithm.l2", "0")
    again = read_summary(Path("a/summary.json")).batch
    assert again is not None
    assert again.iterations == 9
    run("resume", "a", "--algorithm=downpour", "--epochs", "1")
    assert algorithm() == "Downpour, adagrad(0.1, eps=1e-07)"


def test_a_file_trains_with_sandblaster_by_option_alone(run: Callable[..., None]) -> None:
    run("train", "rules_script.py", "--run", "a", "--algorithm", "sandblaster", "--algorithm.max-iterations", "4")
    assert algorithm() == "Sandblaster L-BFGS, 10 pairs"


@pytest.mark.parametrize("words", ["export RUN --help", "export --help", "show RUN -h", "train --help"])
def test_a_question_for_help_is_answered_and_nothing_is_written(
    words: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().iterdir())
    run(*words.split())
    assert "distbelief export RUN model.safetensors" in capsys.readouterr().out
    assert set(Path().iterdir()) == before


def test_a_command_that_is_not_there_is_named_and_help_and_version_are_there(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("trian", "rules_script.py")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("there is no command trian\n\ndistbelief train FILE.py")
    for verb in ("train", "plan", "resume", "export", "show"):
        run(verb, "--help")
        assert f"distbelief {verb} " in capsys.readouterr().out
    run("--version")
    assert capsys.readouterr().out == f"{metadata.version('distbelief')}\n"


def test_what_is_shown_of_a_resumed_run_that_was_killed_is_all_of_it_and_not_its_first_end(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    run("resume", "a", "--epochs", "2")
    events = Path("a/events.jsonl")
    lines = events.read_text().splitlines(keepends=True)
    assert '"JobFinished"' in lines[-1]
    first = next(number for number, line in enumerate(lines) if '"JobFinished"' in line)
    events.write_text("".join(lines[:-1]))
    capsys.readouterr()
    run("show", "a")
    assert "killed: no end was recorded" in capsys.readouterr().out
    events.write_text("".join(lines[: first + 1]))
    run("show", "a")
    assert "all epochs finished" in capsys.readouterr().out


def test_what_is_shown_of_a_run_that_is_being_trained_says_so_and_offers_no_resume(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    events = Path("a/events.jsonl")
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:-1]))
    with events.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        capsys.readouterr()
        run("show", "a")
        said = capsys.readouterr().out
        assert "so far        still running" in said
        assert "resume" not in said
        assert "killed" not in said
    run("show", "a")
    assert "resume with   distbelief resume a\n" in capsys.readouterr().out


def test_what_is_shown_of_a_run_that_was_moved_names_the_folder_where_it_is(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    Path("a").rename("now here")
    capsys.readouterr()
    run("show", "now here")
    said = capsys.readouterr().out
    assert "run           now here\n" in said
    assert "distbelief resume 'now here' --epochs 2\n" in said
    assert "distbelief export 'now here' model.safetensors\n" in said


@pytest.mark.parametrize(("output", "code", "said"), [("| true", 0, ""), (">/dev/full", 1, "No space left on device")])
def test_what_is_shown_to_nobody_leaves_no_traceback(
    output: str, code: int, said: str, run: Callable[..., None]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    shown = f"{sys.executable} -m distbelief show a"
    told = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shown} {output}"], stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert told.returncode == code
    assert "Traceback" not in told.stderr
    assert said in told.stderr


@pytest.mark.parametrize(
    "words", ["plan small.py --cluster.partitions 2", "train small.py --help", "--help", "show --help", "--version"]
)
def test_a_reader_who_goes_away_early_is_no_error(words: str, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(PLANNED)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from distbelief.cli import command; command()", *words.split()]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    told = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert "Traceback" not in told.stderr
    assert "BrokenPipe" not in told.stderr


PLANNED = """
import torch, distbelief as db
from torch import nn

def net():
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))

data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.zeros(40, dtype=torch.long))
job = db.Job(model=net, data=data, loss=nn.functional.cross_entropy)
"""


# what a file may be, and what it may not


PLAIN = """
import os
from pathlib import Path
from tests import problems

def job(width: int = 3):
    return problems.job(epochs=1)
"""


def refused(run: Callable[..., None], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "\nhint: " in said
    return said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("queue.py", "queue.py has the name of another module"),
        ("turtle.py", "turtle.py has the name of another module"),
        ("pytest.py", "pytest.py has the name of another module"),
        ("script.txt", "script.txt is no Python file"),
        ("my.script.py", "my.script.py cannot be imported"),
    ],
)
def test_a_file_that_other_processes_could_not_import_is_refused_by_its_name(
    name: str, said: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text(PLAIN)
    assert said in refused(run, capsys, "train", name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN.replace("return ", "return print or "), "job returned a builtin_function_or_method, not a Job"),
        (PLAIN.replace("int = 3", "'Missing' = 3"), "an annotation of job cannot be looked up: name 'Missing'"),
        (PLAIN.replace("= 3", "= 3, /"), "parameter width of job cannot become an option"),
    ],
)
def test_a_function_that_makes_no_job_is_refused_by_what_it_is(
    text: str, said: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules_script.py").write_text(text)
    assert said in refused(run, capsys, "train", "rules_script.py")


DECORATED = """
import functools, inspect
from tests import problems

def deeper(make):
    @functools.wraps(make)
    def job(width: int = 3, depth: int = 1):
        assert (width, depth) == (3, 2)
        return make(width)
    job.__signature__ = inspect.Signature([
        *inspect.signature(make).parameters.values(),
        inspect.Parameter("depth", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=int),
    ])
    job.__annotations__ = {"width": int, "depth": int}
    return job

@deeper
def job(width: int = 3):
    return problems.job(epochs=1)
"""


def test_a_decorator_may_add_an_option(run: Callable[..., None]) -> None:
    Path("rules_script.py").write_text(DECORATED)
    run("train", "rules_script.py", "--run", "a", "--depth", "2")
    assert Path("a/summary.json").exists()


def test_the_type_of_the_result_need_not_be_there(run: Callable[..., None]) -> None:
    Path("rules_script.py").write_text(PLAIN.replace("):", ") -> 'Missing':", 1))
    run("train", "rules_script.py", "--run", "a")
    assert "Missing" in Path("rules_script.py").read_text()
    assert Path("a/summary.json").exists()


MAIN = """
import distbelief as db
from tests import problems
from tests.test_cli import wrapped

job = problems.job(epochs=7)

{decorator}
def {name}(width: int = 3):
    return problems.job(epochs=1)

if __name__ == "__main__":
    db.main({name})
"""


def wrapped(make: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of another file."""

    @functools.wraps(make)
    def made(**options: Any) -> Any:
        return make(**options)

    return made


@pytest.mark.parametrize(
    ("name", "decorator", "kept"),
    [("make", "", None), ("job", "@wrapped", "small.py")],
)
def test_a_script_is_resumed_by_a_command_if_its_job_is_the_very_function_that_made_the_job(
    name: str, decorator: str, kept: str | None, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(MAIN.format(name=name, decorator=decorator))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "small.py", "--run", "a"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)
    script = launch.read(tmp_path / "a").script
    assert script == (kept and str(tmp_path / kept))
    resumed = read_summary(tmp_path / "a/summary.json").resume_command
    assert resumed == (
        "distbelief resume a --epochs 2" if kept else "distbelief.train(dataclasses.replace(job, epochs=2), resume='a')"
    )


@pytest.mark.parametrize("words", ["--run ../a", "--run b"])
def test_a_path_that_is_no_text_is_refused_by_name(
    words: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path(os.fsdecode(b"h\xf6he"))
    odd.mkdir()
    (odd / "rules_script.py").write_text(SCRIPT)
    monkeypatch.chdir(odd)
    said = refused(run, capsys, "train", "rules_script.py", *words.split())
    assert re.search(r"the path '.*h\\udcf6he.*' is no text in utf-8, .*\nhint: rename", said)
    assert {path.name for path in Path().iterdir()} <= {"rules_script.py", "__pycache__"}
    assert not Path("../a").exists()


def test_what_a_file_imports_is_first_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("beside", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "help_of_mine.py").write_text(f"place = {folder!r}")
    script = tmp_path / "beside" / "helped.py"
    script.write_text("from help_of_mine import place\n\ndef job():\n    return place\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path])
    found: Any = launch.job_of(script)()
    for name in ("helped", "help_of_mine"):
        del sys.modules[name]
    assert found == "beside"


def test_a_file_behind_a_link_is_trained_as_the_file_that_it_is(run: Callable[..., None]) -> None:
    Path("there").mkdir()
    Path("there/rules_script.py").write_text(SCRIPT.replace("db.adagrad(0.1, eps=1e-7)", "db.sgd(0.25)"))
    Path("there/linked.py").write_text(SCRIPT)
    Path("linked.py").symlink_to("there/rules_script.py")
    run("train", "linked.py", "--run", "a", "--epochs", "1")
    assert algorithm() == "Downpour, sgd(0.25)"


def test_an_option_of_the_file_can_be_set_to_none(run: Callable[..., None]) -> None:
    clipped = SCRIPT.replace("n_push=2", "n_push=2, clip_norm=1e-9")
    Path("rules_script.py").write_text(clipped)
    given = ["--epochs", "1", "--rule", "db.sgd(0.1)"]
    run("train", "rules_script.py", "--run", "a", *given)
    run("train", "rules_script.py", "--run", "b", *given, "--algorithm.clip-norm", "None")
    a, b = (read_summary(Path(f"{name}/summary.json")).test["loss"] for name in "ab")
    assert a is not None
    assert b is not None
    assert b < a - 0.05


@pytest.mark.parametrize("option", ["--run", "--checkpoints"])
def test_where_a_run_is_cannot_be_changed_by_a_resume(
    option: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    said = refused(run, capsys, "resume", "a", "--epochs", "2", f"{option}=b")
    assert f"{option} cannot be changed when a run is resumed" in said


def test_a_resume_without_the_file_says_how_to_go_on_without_it(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    Path("rules_script.py").unlink()
    said = refused(run, capsys, "resume", "a", "--epochs", "2")
    assert "a was started with the file" in said
    assert "rules_script.py, which is not there any more\nhint: put it back, or call" in said
    assert "distbelief.train(job, resume='a')" in said


def test_an_export_says_which_damaged_checkpoint_it_passed_over(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    newest = sorted(Path("a/checkpoints").iterdir())[-1]
    shard = next(newest.glob("shard-0*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    run("export", "a", "model.safetensors")
    assert f"{newest} is damaged and was passed over, an older checkpoint is taken" in capsys.readouterr().err


def test_an_export_writes_what_a_link_names_and_no_device(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "rules_script.py", "--run", "a", "--epochs", "1")
    Path("link").symlink_to("model.safetensors")
    run("export", "a", "link")
    assert Path("link").is_symlink()
    assert Path("model.safetensors").is_file()
    os.mkfifo("pipe")
    assert "pipe is a device or pipe" in refused(run, capsys, "export", "a", "pipe")


LONG = "x" * 300 + ".py"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train LONG", r"there is no file x+\.py that can be read"),
        ("plan LONG", r"there is no file x+\.py that can be read"),
        ("show LONG", r"x+\.py/events\.jsonl cannot be read: File name too long"),
        ("show loop", r"loop/events\.jsonl cannot be read: Too many levels of symbolic links"),
        ("resume LONG", r"x+\.py does not say how it was started: .*File name too long"),
        ("export a LONG", r"x+\.py cannot be written: .*File name too long"),
    ],
)
def test_a_path_that_the_system_refuses_is_said_with_its_reason(
    command: str, said: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    if command.startswith("export"):
        run("train", "rules_script.py", "--run", "a", "--epochs", "1", "--cluster.engine", "simulated")
    Path("loop").symlink_to("loop")
    assert re.search(said, refused(run, capsys, *command.replace("LONG", LONG).split()))


def test_a_job_whose_last_checkpoint_failed_ends_with_an_error(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoint.commit
    full = OSError(28, "No space left on device")

    def fails(folder: Any, manifest: Any, buffers: Any, *, durable: bool) -> Any:
        if manifest.examples:
            raise full
        return commit(folder, manifest, buffers, durable=durable)

    monkeypatch.setattr(checkpoint, "commit", fails)
    said = refused(run, capsys, "train", "rules_script.py", "--run", "a", "--epochs", "1")
    assert "the last checkpoint of a could not be written: what was trained since the one before is lost" in said
    assert read_summary(Path("a/summary.json")).checkpoints.last_failed


@pytest.mark.parametrize(
    ("name", "spec", "named"),
    [
        ("mine.py", None, True),
        ("mine.py", "mine", True),
        ("mine.py", "package.mine", False),
        ("__main__.py", "__main__", False),
        ("my.script.py", None, False),
        ("queue.py", None, False),
        ("mine", None, False),
    ],
)
def test_a_script_is_named_for_resuming_only_where_a_command_can_import_it(
    name: str, spec: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    main, job = types.ModuleType("__main__"), problems.job()
    main.__file__, main.__dict__["job"] = name, job
    main.__spec__ = None if spec is None else ModuleSpec(spec, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert launch.of_main(job).script == (str(tmp_path / name) if named else None)
    assert launch.of_main(problems.job()).script is None


SWEEP = """
import dataclasses
import distbelief as db
from tests import problems

job = problems.job(epochs=1)

if __name__ == "__main__":
    print("own:", db.train(job, view=False).summary.resume_command)
    other = dataclasses.replace(job, epochs=2)
    print("other:", db.train(other, view=False).summary.resume_command)
"""


@pytest.mark.slow
def test_a_script_is_named_for_resuming_only_where_it_defines_the_very_job(tmp_path: Path) -> None:
    (tmp_path / "sweep.py").write_text(SWEEP)
    run = subprocess.run(
        [sys.executable, "sweep.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    own, other = (line for line in run.stdout.splitlines() if ":" in line)
    assert own.startswith("own: distbelief resume runs/")
    assert other.startswith("other: distbelief.train(")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "> /dev/full"])
def test_training_goes_on_beside_files_named_like_modules_and_without_anybody_to_read(
    closed: str, tmp_path: Path
) -> None:
    for name in ("queue.py", "random.py", "torch.py"):
        (tmp_path / name).write_text("raise RuntimeError('not Python's')")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "mine.py").write_text(PLAIN.replace("epochs=1", "epochs=1, cluster=local"))
    text = (tmp_path / "scripts" / "mine.py").read_text()
    (tmp_path / "scripts" / "mine.py").write_text(
        text.replace("def job", "import distbelief\nlocal = distbelief.Cluster(replicas=1)\n\ndef job")
    )
    command = f"{sys.executable} -P -m distbelief train scripts/mine.py --run run {closed}"
    run = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert read_summary(tmp_path / "run" / "summary.json").examples.missing == 0
