# SPDX-License-Identifier: Apache-2.0
"""Rules of the house: what importing does, how large files and constructors get, what the documents claim."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import distbelief

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distbelief").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LINES = 400
LONG_FILES: dict[str, str] = {}
"""Files over the limit, and why. An entry that is not needed any more is an error."""

SURVEYED_ELSEWHERE = ("distbelief", "report")
"""Packages that docs/design.md surveys, or whose modules are known by what they export."""

PARAMETERS = 7
WIDE_CONSTRUCTORS: dict[str, str] = {}
"""Constructors over the limit, as "path:Class", and why."""


def test_files_are_short_or_say_why_not() -> None:
    long = {str(path.relative_to(ROOT)) for path in SOURCES if len(path.read_text().splitlines()) > LINES}
    assert long == LONG_FILES.keys()


def test_constructors_take_few_parameters_or_say_why_not() -> None:
    wide, seen = set(), 0
    for path in SOURCES:
        for item in ast.walk(ast.parse(path.read_text())):
            if not isinstance(item, ast.ClassDef):
                continue
            for method in item.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    seen += 1
                    given = method.args
                    count = len(given.posonlyargs + given.args + given.kwonlyargs) - 1
                    if count > PARAMETERS:
                        wide.add(f"{path.relative_to(ROOT)}:{item.name}")
    assert seen > 20
    assert wide == WIDE_CONSTRUCTORS.keys()


def test_every_picture_of_the_documents_is_shown_by_one() -> None:
    shown = "".join(path.read_text() for path in DOCUMENTS)
    pictures = sorted((ROOT / "docs").rglob("*.png"))
    assert pictures
    assert [path.name for path in pictures if f"]({path.relative_to(ROOT / 'docs')})" not in shown] == []


def test_every_source_begins_with_its_licence_and_introduces_itself() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), path


def test_the_readmes_push_and_fetch_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "push_fetch.json").read_text())["rows"]
    measured = {row["parameters"]: row["ratio"] for row in rows if row["method"] == "distbelief"}
    told = re.findall(r"^\| ([\d.]+e\d) \| [\d.]+ [um]s \| [\d.]+ [um]s \| ([\d.]+) \|", DOCUMENTS[0].read_text(), re.M)
    assert len(told) == 4
    for parameters, ratio in told:
        digits = len(ratio.partition(".")[2])
        assert round(measured[int(float(parameters))], digits) == float(ratio)


def test_every_package_says_what_each_of_its_modules_is_for() -> None:
    for package in [
        path for path in SOURCES if path.name == "__init__.py" and path.parent.name not in SURVEYED_ELSEWHERE
    ]:
        introduced = ast.get_docstring(ast.parse(package.read_text())) or ""
        modules = [path.stem for path in package.parent.glob("*.py") if path.stem != "__init__"]
        assert [name for name in modules if not re.search(rf"(?m)^(.*, |\| )?{name}\b", introduced)] == [], package


def test_the_tree_of_errors_shows_every_one() -> None:
    shown = re.findall(r"\w+", ast.get_docstring(ast.parse((ROOT / "distbelief/errors.py").read_text())) or "")
    module = importlib.import_module("distbelief.errors")
    raised = [name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(raised) > 10
    assert set(raised) <= set(shown)


@pytest.mark.parametrize("name", distbelief.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    documentation = inspect.getdoc(getattr(distbelief, name))
    assert documentation
    assert not documentation.startswith(f"{name}("), "the docstring that dataclass makes up"


def test_type_checkers_are_told_that_the_package_has_types() -> None:
    assert (Path(distbelief.__file__).parent / "py.typed").is_file()


def test_all_lists_what_the_package_offers_and_nothing_else() -> None:
    offered = {
        name for name, value in vars(distbelief).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert offered == set(distbelief.__all__)


def test_importing_starts_no_thread_and_imports_nothing_optional() -> None:
    program = """
import json, sys, threading
before = threading.active_count()
import torch
torch_threads, torch_modules = threading.active_count(), set(sys.modules)
import distbelief
print(json.dumps([before, torch_threads, threading.active_count(), sorted(set(sys.modules) - torch_modules)]))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    before, with_torch, after, modules = json.loads(ran.stdout)
    assert (before, after) == (1, with_torch)
    assert "distbelief.train" in modules
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & {"ray", "tensorboard", "matplotlib", "sklearn", "scipy"}
    assert "torch._dynamo" not in modules, "it takes longer than all of the rest, and most commands never need it"


JOB = """
from pathlib import Path
import distbelief
from tests import problems
if __name__ == "__main__":
    distbelief.train(problems.job(run=Path({run!r}), cluster=distbelief.Cluster(replicas=1, shards=1)), view=False)
"""


@pytest.mark.slow
def test_no_process_of_a_job_imports_the_compiler(tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text(JOB.format(run=str(tmp_path / "run")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    ran = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    imported = [line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()]
    assert imported.count("torch") == 2, "here, and where roles are forked from"
    assert imported.count("torch.optim") >= 2
    assert "torch._dynamo" not in imported
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == distbelief.__version__


def test_every_test_that_the_documents_name_exists() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = {name for path in DOCUMENTS for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(named) > 30
    assert named <= defined


def test_every_link_of_the_documents_leads_somewhere() -> None:
    links = [
        (path, target)
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text())
        if "://" not in target
    ]
    assert links
    broken = [f"{path.relative_to(ROOT)}: {target}" for path, target in links if not (path.parent / target).exists()]
    assert broken == []


def test_every_file_that_the_documents_name_exists() -> None:
    names = {name for path in DOCUMENTS for name in re.findall(r"\b((?:[a-z_]+/)*[a-z_]+\.py)\b", path.read_text())}
    assert "parameter_server.py" in names
    places = (ROOT, ROOT / "distbelief")
    assert [name for name in sorted(names) if not any((place / name).exists() for place in places)] == []
