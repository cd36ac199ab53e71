"""Frozen dataclasses out of JSON values, each field checked against its type."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


def nearest(given: str, known: Iterable[str]) -> str:
    """What to say where `given` is none of `known`."""
    known = list(known)
    found = difflib.get_close_matches(str(given)[:80], known, n=1)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(known)}"


def from_values(kind: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `kind`. Raises ValueError in one line that begins with `where`."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_kind(values)}; a map of {', '.join(_names(kind))} is expected")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {str(key)[:80]!r}; {nearest(key, hints)}")
    for field in dataclasses.fields(cast(Any, kind)):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} has no {field.name}")
    found = {key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the type `hint`: a dataclass, a tuple of one type, a literal, or str, bool, int, float."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_values(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {_kind(value)}; a list is expected")
        return tuple(_value(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} is {str(value)[:80]!r}; {nearest(str(value), inner)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {_kind(value)}; {_expected(hint)} is expected")
    return value


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _kind(value: Any) -> str:
    said = {dict: "a map", list: "a list", str: "a text", bool: "true or false", types.NoneType: "null"}
    return said.get(type(value), repr(value)[:40])


def _expected(hint: type) -> str:
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}[hint]
