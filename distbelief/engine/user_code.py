# SPDX-License-Identifier: Apache-2.0
"""How functions and classes of the user's reach other processes: by their name in the program, or as they are."""

import inspect
import linecache
import os
import sys
from collections.abc import Callable
from multiprocessing import spawn
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

ZYGOTE = "distbelief zygote"
"""What multiprocessing calls the zygote, from before it imports the user's script; its roles inherit it."""


def importing() -> dict[str, Any]:
    """How other processes import the user's program, as multiprocessing does, if it is in a file that they can."""
    main = spawn.get_preparation_data(ZYGOTE)
    del main["authkey"]  # multiprocessing's own, which it refuses to pickle; our roles do not use it
    if not os.path.isfile(main.get("init_main_from_path", __file__)):
        del main["init_main_from_path"]  # it comes from the standard input
    if main.get("init_main_from_name", "").rpartition(".")[2] == "__main__":
        del main["init_main_from_name"]
    return main


def is_in_main(value: type | FunctionType) -> bool:
    """Whether other processes find it in `__main__` when they import that."""
    if value.__module__ != "__main__" or importing().keys().isdisjoint(("init_main_from_path", "init_main_from_name")):
        return False
    found: Any = sys.modules["__main__"]
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not value:
        return False
    functions = [value] if isinstance(value, FunctionType) else vars(value).values()
    inner = [inspect.unwrap(each) for each in functions if isinstance(each, FunctionType)]
    codes = [each.__code__ for each in inner if isinstance(each, FunctionType)]
    return all(os.path.isfile(code.co_filename) for code in codes)  # else it was typed in behind the file


def reduce_code(code: CodeType) -> Any:
    """As cloudpickle does, whose versions from 3.1.1 on leave out the file, which tracebacks name."""
    rebuild, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    arguments = tuple(code.co_filename if each == "<dynamic-code>" else each for each in arguments)
    lines = [] if os.path.isfile(code.co_filename) else linecache.getlines(code.co_filename)
    return (_rebuild, (code.co_filename, lines, rebuild, arguments)) if lines else (rebuild, arguments)


def _rebuild(file: str, lines: list[str], rebuild: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """Code of a notebook's cell, which is a file to nobody but Python: tracebacks show its lines."""
    linecache.cache[file] = sum(map(len, lines)), None, lines, file
    return rebuild(*arguments)
