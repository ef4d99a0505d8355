"""Checks the values of a dataclass against its annotations: what JSON or a command line gave may be of any type."""

from __future__ import annotations

import types
import typing
from dataclasses import fields

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object"}


def check_types(instance) -> None:
    """Raises ValueError naming the first field whose value is not of its annotation's type. A list passes for a tuple."""
    kinds = typing.get_type_hints(type(instance))
    for field in fields(instance):
        value, kind = getattr(instance, field.name), kinds[field.name]
        if not fits(value, kind):
            raise ValueError(f"{field.name}: got {value!r:.100}, takes {in_words(kind)}")


def fits(value, kind) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        inner = (inner[0],) * len(value) if inner[1:] == (...,) else inner
        return len(value) == len(inner) and all(map(fits, value, inner))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def in_words(kind) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(one) for one in inner)
    if origin is tuple:
        return f"a list, each {in_words(inner[0])}" if inner[1:] == (...,) else f"a list of {len(inner)}, each {in_words(inner[0])}"
    return "nothing" if kind is type(None) else WORDS.get(origin or kind, getattr(kind, "__name__", str(kind)))
