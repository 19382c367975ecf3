# SPDX-License-Identifier: Apache-2.0
"""Whether what a user wrote into a field is of the kind that belongs there; the rest is said by its class."""

from collections.abc import Iterable

from distbelief.errors import ConfigurationError


def check_whole(value: object, names: Iterable[str]) -> None:
    """Raise ConfigurationError unless these fields are whole numbers, or None where that is their default."""
    _check(value, names, (int,), "a whole number", "use for example 4, without quotes or a fraction")


def check_number(value: object, names: Iterable[str]) -> None:
    """Raise ConfigurationError unless these fields are numbers, or None where that is their default."""
    _check(value, names, (int, float), "a number", "use for example 0.5, without quotes")


def _check(value: object, names: Iterable[str], kinds: tuple[type, ...], said: str, hint: str) -> None:
    kind = type(value)
    for name in names:
        given = getattr(value, name)
        optional = given is None and getattr(kind, name, 0) is None  # a dataclass keeps defaults on the class
        if not optional and (isinstance(given, bool) or not isinstance(given, kinds)):
            raise ConfigurationError(f"{kind.__name__}({name}={given!r}) is not {said}", hint=hint)
