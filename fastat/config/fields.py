"""Checks of options and JSON documents against the annotations of what they are for.

One checker serves the configuration (command line, ``--set``, ``config.json``), the metadata of
checkpoints and the options of models. Imports no torch, so that a mistake on the command line is
answered at once.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from fastat.system.errors import Failure, UserError

ANOTHER_VERSION = "another version of fastat"


@dataclass(frozen=True)
class Limit:
    """Restricts the values of an annotated type, as in ``Annotated[int, Limit(...)]``."""

    expected: str
    """What an error message says was expected."""
    allows: Callable[[Any], bool]


Count = Annotated[int, Limit("an integer from 1 on", lambda n: n >= 1)]
NonNegativeInt = Annotated[int, Limit("an integer from 0 on", lambda n: n >= 0)]
Positive = Annotated[float, Limit("a positive number", lambda x: 0 < x < float("inf"))]
NonNegative = Annotated[float, Limit("a number from 0 on", lambda x: 0 <= x < float("inf"))]
Finite = Annotated[float, Limit("a finite number", lambda x: abs(x) < float("inf"))]
Share = Annotated[float, Limit("a number from 0 to 1", lambda x: 0 <= x <= 1)]

_NAMES = {
    NoneType: "null", bool: "true or false", int: "an integer", float: "a number", str: "text",
    list: "a list", tuple: "a list", dict: "an object",
}  # fmt: skip


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the annotated type ``hint``.

    An integer is also a number, a bool is neither. Integers of 2^63 and beyond fit no type.
    """
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        limits = hint.__metadata__
        return fits(value, hint.__origin__) and all(limit.allows(value) for limit in limits)
    if kind is Any:
        return True
    if kind is Literal:
        return type(value) is str and value in arguments
    if kind in (Union, UnionType):
        return any(fits(value, choice) for choice in arguments)
    if kind in (list, tuple):
        return type(value) is kind and all(fits(item, arguments[0]) for item in value)
    if type(value) is int and kind in (int, float):
        return abs(value) < 2**63
    return type(value) is kind


def expected(hint: Any) -> str:
    """The annotated type ``hint`` in words, for an error message."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        return str(hint.__metadata__[0].expected)
    if kind is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if kind in (Union, UnionType):
        return " or ".join(map(expected, arguments))
    if kind is list and arguments[0] is str:
        return "a list of text"
    if kind is tuple and typing.get_origin(arguments[0]) is Annotated:
        return f"a list, each of them {expected(arguments[0])}"
    return _NAMES[kind]


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises UserError unless ``value`` has the annotated type ``hint``."""
    if not fits(value, hint):
        raise UserError(f"{name} must be {expected(hint)}, got {value!r}")


def check_fields(instance: object) -> None:
    """Raises UserError unless every field of a dataclass instance has its annotated type."""
    for name, hint in typing.get_type_hints(type(instance), include_extras=True).items():
        check_value(name, getattr(instance, name), hint)


def check_keys(path: Path, document: Any, kind: Callable[..., object]) -> None:
    """Checks the keys of a JSON object that becomes the keyword arguments of ``kind``.

    Raises:
        Failure: a key is unknown, or one without a default is missing.
    """
    if not isinstance(document, dict):
        return
    parameters = inspect.signature(kind).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty]
    unknown = [repr(key) for key in document if key not in parameters]
    missing = [repr(name) for name in required if name not in document]
    for wrong, keys in (("has unknown", unknown), ("lacks", missing)):
        if keys:
            raise Failure(
                f"{path} {wrong} keys ({', '.join(keys)}): it was written by {ANOTHER_VERSION}"
            )
