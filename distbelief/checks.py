# SPDX-License-Identifier: Apache-2.0
"""Whether what a user wrote into a field is of the kind that belongs there; the rest is said by its class."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from distbelief.errors import ConfigurationError


def check_whole(value: object, names: Iterable[str]) -> None:
    """Raise ConfigurationError unless these fields are whole numbers, or None where that is their default.

    Those of NumPy become Python's, which can be written down.
    """
    _check(value, names, Integral, int, "a whole number", "use for example 4, without quotes or a fraction")


def check_number(value: object, names: Iterable[str]) -> None:
    """Raise ConfigurationError unless these fields are numbers, or None where that is their default; likewise."""
    _check(value, names, Real, float, "a number", "use for example 0.5, without quotes")


def _check(value: object, names: Iterable[str], kind: type, own: Any, said: str, hint: str) -> None:
    owner = type(value)
    for name in names:
        given = getattr(value, name)
        if given is None and getattr(owner, name, 0) is None:  # a dataclass keeps defaults on the class
            continue
        if isinstance(given, bool) or not isinstance(given, kind):
            raise ConfigurationError(f"{owner.__name__}({name}={given!r}) is not {said}", hint=hint)
        if not isinstance(given, int | float):
            object.__setattr__(value, name, own(given))
