# SPDX-License-Identifier: Apache-2.0
"""Whether other processes run the code of the user's that this one has: they import its files again, as they are now.

A file may have been edited since it was imported here, as in a notebook, and what stands below `if __name__` is not
done in the others. So each side takes checksums of what its functions are made of; those of one name are compared.
"""

import argparse
import functools
import inspect
import sys
import sysconfig
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_DEFINITION = "def "
"""What the names of functions and classes begin with, beside those of global values."""
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_PLAIN = (bool, int, float, str, bytes, tuple, list, dict, set, argparse.Namespace, types.SimpleNamespace, type(None))
_LONGEST = 10_000
"""Characters of a value that is compared."""

Checksums = tuple[tuple[str, int], ...]


def checksums(functions: Mapping[str, Any]) -> tuple[tuple[str, Checksums], ...]:
    """Of the module of each function, class or callable object: the checksums of its code and of plain globals."""
    modules = {name: _module(function) for name, function in functions.items()}
    return tuple((name, _of(module)) for name, module in modules.items() if module is not None)


def changes(own: Mapping[str, Any], others: tuple[tuple[str, Checksums], ...]) -> list[str]:
    """What is another one in processes that have these checksums, in sentences with what to do."""
    told = []
    there = {name: dict(each) for name, each in others}
    for name, here in checksums(own):
        module = _module(own[name])
        file = getattr(module, "__file__", name)
        for what, checksum in here:
            if there.get(name, {}).get(what, checksum) == checksum:
                continue
            told.append(
                f"{file} is not what this process imported: replicas run the file as it is now. Import it again "
                "(importlib.reload), or start again"
                if what.startswith(_DEFINITION)
                else f"{what} in {file} has another value in the replicas, which import the file: what is set later, "
                'or below `if __name__ == "__main__"`, is not set there. Bind it with functools.partial'
            )
    return list(dict.fromkeys(told))


def _module(function: Any) -> types.ModuleType | None:
    """The module of the user's in which it stands, if it is one of his."""
    while isinstance(function, functools.partial):
        function = function.func
    kind = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    module = sys.modules.get(getattr(kind, "__module__", ""))
    file = getattr(module, "__file__", None)
    return None if file is None or file.startswith(_INSTALLED) else module


def _of(module: types.ModuleType) -> Checksums:
    codes = {name: [*_codes(value, module.__name__)] for name, value in sorted(vars(module).items())}
    used = {name for each in codes.values() for code in each for name in _names(code)}
    found = [(_DEFINITION + name, _checksum(repr([*map(_plain, each)]))) for name, each in codes.items() if each]
    found += [
        (name, _checksum(text))
        for name, value in sorted(vars(module).items())
        if name in used and (text := _written(value)) and len(text) <= _LONGEST and " at 0x" not in text
    ]
    return tuple(found)


def _written(value: Any) -> str:
    """A plain value, or a small tensor, in words; nothing for what has no value to compare."""
    if isinstance(value, torch.Tensor):
        return repr(value.tolist()) if value.numel() <= _LONGEST // 10 and not value.is_meta else ""
    return repr(value) if isinstance(value, _PLAIN) else ""


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode(errors="replace"))


def _codes(value: Any, module: str) -> Iterator[types.CodeType]:
    """Of a function, or of the methods of a class, that this module defines."""
    if getattr(value, "__module__", None) != module:
        return
    if inspect.isfunction(value):
        yield value.__code__
    elif inspect.isclass(value):
        for member in vars(value).values():
            plain = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(plain):
                yield plain.__code__


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _plain(code: types.CodeType) -> Any:
    """What a function does, without where it stands; sets have no order of their own."""
    constants: list[Any] = []
    for each in code.co_consts:
        nested = isinstance(each, types.CodeType)
        constants.append(_plain(each) if nested else sorted(map(repr, each)) if isinstance(each, frozenset) else each)
    return code.co_name, code.co_code, code.co_names, constants
