# SPDX-License-Identifier: Apache-2.0
"""Words of a command line, the script's options among them, as the job that they ask for."""

import ast
import copy
import dataclasses
import functools
import inspect
import shlex
import textwrap
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from rich.console import Console

from distbelief.cluster import Cluster
from distbelief.downpour import Downpour
from distbelief.errors import ConfigurationError
from distbelief.job import Job
from distbelief.launch import Launch
from distbelief.plan import Plan
from distbelief.sandblaster import Sandblaster
from distbelief.update_rule import UpdateRule, adagrad, adam, adamw, adaptive_revision, sgd
from distbelief.update_rule.adaptive_revision import AdaptiveRevision
from distbelief.update_rule.torch_rule import TorchRule

NOT_OPTIONS = {"model", "data", "loss", "step", "test", "metrics", "evaluate", "groups", "collate"}
"""Fields that hold code or data and cannot be written on a command line."""

ALGORITHMS: dict[str, type[Downpour] | type[Sandblaster]] = {"downpour": Downpour, "sandblaster": Sandblaster}

RuleName = Literal["adagrad", "sgd", "adam", "adamw", "adaptive_revision"]
ALGORITHM_OPTION = "--algorithm {downpour,sandblaster}  Trains with the other algorithm, with its default options."
RULES: dict[str, Callable[..., UpdateRule]] = {
    "adagrad": adagrad, "sgd": sgd, "adam": adam, "adamw": adamw, "adaptive_revision": adaptive_revision,
}  # fmt: skip
"""The update rules that a command line can name; each takes its rate first."""


def parse(
    make_job: Callable[..., Job], before: Launch, arguments: Sequence[str], program: str,
    more: Sequence[tuple[str, Any, Any]] = (),
) -> tuple[Job, Launch, dict[str, Any]]:  # fmt: skip
    """The job of the script's options and its own, how to start it again, and the values of `more` options."""
    parse = functools.partial(_parse_command, make_job, program)
    options = {name: parameter.default for name, parameter in inspect.signature(make_job).parameters.items()}
    overrides: dict[str, Any] = {}
    for earlier in before.commands:
        try:
            options, overrides, _ = parse(earlier, options, overrides)
        except (SystemExit, ConfigurationError) as error:
            raise ConfigurationError(
                f"the run was started with {shlex.join(earlier)}, which {before.script} does not take any more",
                hint="let its job take these options again, or start another run",
            ) from error
    options, overrides, extra = parse(arguments, options, overrides, more)
    made: Any = make_job(**options)
    if not isinstance(made, Job):
        raise ConfigurationError(
            f"{make_job.__name__} returned a {type(made).__name__}, not a Job", hint="return distbelief.Job(...)"
        )
    return _override(made, overrides), before.then(arguments), extra


def _parse_command(
    make_job: Callable[..., Job], program: str, arguments: Sequence[str], options: dict[str, Any],
    overrides: dict[str, Any], more: Sequence[tuple[str, Any, Any]] = (),
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The script's options, the overrides of the job's fields, and `more`, after one command; before it as given."""
    try:
        hints = _parameter_hints(make_job)
    except NameError as error:
        raise ConfigurationError(
            f"an annotation of {make_job.__name__} cannot be looked up: {error}",
            hint="import what it names at the top of the file, not below `if TYPE_CHECKING`",
        ) from error
    extra = [name for name, _, _ in more]
    fields = {item.name for item in dataclasses.fields(Job)} - NOT_OPTIONS | {*extra}
    for name, value in options.items():
        positional = inspect.signature(make_job).parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
        if name in fields or name not in hints or value is inspect.Parameter.empty or positional:
            raise ConfigurationError(
                f"parameter {name} of {make_job.__name__} cannot become an option"
                + (": distbelief has an option of that name" if name in fields else ""),
                hint="give every parameter a name of its own, a type and a default, for example `width: int = 512`",
            )
    own = [
        (name, hints[name], dataclasses.field(default_factory=functools.partial(copy.copy, value)))
        for name, value in options.items()
    ]
    summary, _, rest = (inspect.getdoc(make_job) or "").partition("\n\n")
    about = f"{summary}\n\n{ALGORITHM_OPTION}\n\n{rest}"  # what it says of its parameters stands beside them
    fields_of_all = [*own, *more, *_override_fields(Job)]
    kind = dataclasses.make_dataclass("Options", fields_of_all, kw_only=True, namespace={"__doc__": about})
    algorithm, arguments = _algorithm(arguments)
    try:
        parsed: Any = tyro.cli(kind, args=arguments, prog=program)
    except BrokenPipeError:  # of --help, whose reader went away early, such as head
        Console().on_broken_pipe()
        raise
    given = _given(parsed, [*options, *extra], {word.partition("=")[0].replace("_", "-") for word in arguments})
    if algorithm is not None:
        # Another algorithm begins with its defaults, not with what an earlier command said of the one before.
        overrides = {name: value for name, value in overrides.items() if not name.startswith("algorithm")}
        given["algorithm"] = algorithm
    return (
        {name: getattr(parsed, name) for name in options},
        overrides | given,
        {name: getattr(parsed, name) for name in extra},
    )


def _parameter_hints(make_job: Callable[..., Job]) -> dict[str, Any]:
    """The types of the parameters; that of the result is not looked at. Raises NameError."""
    annotations = {name: hint for name, hint in make_job.__annotations__.items() if name != "return"}
    known = getattr(inspect.unwrap(make_job), "__globals__", {})  # of a decorated function its own
    return get_type_hints(types.SimpleNamespace(__annotations__=annotations), known, include_extras=True)


def _algorithm(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """What `--algorithm NAME` says, and the other arguments; it cannot be a field beside `--algorithm.history`."""
    rest = [word for argument in arguments for word in _words(argument)]
    if "--algorithm" not in rest:
        return None, rest
    at = rest.index("--algorithm")
    name = rest[at + 1] if at + 1 < len(rest) else ""
    if name not in ALGORITHMS:
        raise ConfigurationError(
            f"--algorithm {name or 'names nothing'}: there is no such algorithm",
            hint=f"use --algorithm {' or --algorithm '.join(ALGORITHMS)}",
        )
    return name, rest[:at] + rest[at + 2 :]


def _words(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--algorithm=") else [argument]


def _override_fields(value: type) -> list[tuple[str, Any, Any]]:
    """A dataclass's fields as options that are None unless given; nested dataclasses are followed."""
    hints, documentation = get_type_hints(value), _field_documentation(value)
    fields: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(value):
        if item.name in NOT_OPTIONS:
            continue
        hint = Path if item.name == "run" else hints[item.name]
        if hint == Downpour | Sandblaster:
            nested = dataclasses.make_dataclass("Algorithm", _either(), kw_only=True)
            fields.append((item.name, nested, dataclasses.field(default_factory=nested)))
            continue
        if hint is Cluster:
            nested = dataclasses.make_dataclass(hint.__name__, _override_fields(hint), kw_only=True)
            fields.append((item.name, nested, dataclasses.field(default_factory=nested)))
            continue
        about = documentation.get(item.name, "")
        if hint == int | Plan:  # a plan by hand is written in the file
            hint = int
        if hint is UpdateRule:
            hint, about = RuleName, f"{about} Named here, it has its default options."
            fields.append(option("rate", float, "Learning rate of the update rule."))
        fields.append(option(item.name, hint, about))
    return fields


def _either() -> list[tuple[str, Any, Any]]:
    """The fields of both algorithms; those of the one that the job has not are refused when they are given."""
    fields = _override_fields(Downpour)
    known = {name for name, _, _ in fields}
    return [*fields, *(field for field in _override_fields(Sandblaster) if field[0] not in known)]


def option(name: str, hint: Any, about: str, default: str = "as the job has it") -> tuple[str, Any, Any]:
    """A field that is None unless it is given on the command line."""
    annotation = tyro.conf.arg(help=about, help_behavior_hint=f"(default: {default})")
    return name, Annotated[hint | None, annotation], dataclasses.field(default=None)


def _field_documentation(value: type) -> dict[str, str]:
    """The strings below the fields of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _given(options: Any, skip: Sequence[str], words: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every override on the command line, among whose `words` those are that are None."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.name in skip:
            continue
        if dataclasses.is_dataclass(value):
            found |= _given(value, (), words, f"{prefix}{item.name}.")
        elif value is not None or f"--{prefix}{item.name}".replace("_", "-") in words:
            found[f"{prefix}{item.name}"] = value
    return found


def _override(job: Job, overrides: dict[str, Any]) -> Job:
    """The job with the dotted fields replaced."""
    flat = {name: value for name, value in overrides.items() if "." not in name}
    if "algorithm" in flat:
        kind = ALGORITHMS[flat.pop("algorithm")]
        job = job if isinstance(job.algorithm, kind) else dataclasses.replace(job, algorithm=kind())
    for part in {name.partition(".")[0] for name in overrides if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in overrides.items() if name.startswith(f"{part}.")}
        if part == "algorithm":
            inner = _of_algorithm(job.algorithm, inner)
        flat[part] = dataclasses.replace(getattr(job, part), **inner)
    return dataclasses.replace(job, **flat)


def _of_algorithm(algorithm: Downpour | Sandblaster, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the job's algorithm that were given; raises ConfigurationError for those of the other one."""
    if isinstance(algorithm, Downpour) and {"update_rule", "rate"} & given.keys():
        name, rate = given.pop("update_rule", None), given.pop("rate", None)
        given["update_rule"] = _update_rule(algorithm.update_rule, name, rate)
    known = {item.name for item in dataclasses.fields(algorithm)}
    for name in given.keys() - known:
        raise ConfigurationError(
            f"--algorithm.{name.replace('_', '-')} is no option of {type(algorithm).__name__}",
            hint="leave it out, or name the algorithm: --algorithm " + " or ".join(ALGORITHMS),
        )
    return given


def _update_rule(own: UpdateRule, name: str | None, rate: float | None) -> UpdateRule:
    """The rule of that name with default options, else the job's own one; at that rate, where one is given."""
    if name is not None:
        if rate is None and inspect.signature(RULES[name]).parameters["rate"].default is inspect.Parameter.empty:
            raise ConfigurationError(f"the update rule {name} has no default rate", hint="add --algorithm.rate 0.1")
        return RULES[name]() if rate is None else RULES[name](rate)
    match own:
        case TorchRule():
            return dataclasses.replace(own, options=tuple((dict(own.options) | {"lr": rate}).items()))
        case AdaptiveRevision():
            assert rate is not None
            return dataclasses.replace(own, rate=rate)
    raise ConfigurationError(
        f"the rate of {own!r} can be set in the file only",
        hint=f"name another rule: --algorithm.update-rule {', '.join(RULES)}",
    )
