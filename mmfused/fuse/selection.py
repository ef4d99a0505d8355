"""Which modules :func:`mmfused.fuse` may swap: what its arguments ``only`` and ``skip`` name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .base import FAMILIES


class Selection:
    def __init__(
        self,
        model: nn.Module,
        only: str | Iterable[str] | None,
        skip: str | Iterable[str] | None,
    ):
        self.only = None if only is None else _entries("only", only)
        self.skip = () if skip is None else _entries("skip", skip)
        self._names: dict[int, set[str]] = {}  # of a module: its own, and of what is around it
        if self.only is None and not self.skip:
            return
        for name, module in model.named_modules(remove_duplicate=False):  # a shared one has several
            self._names.setdefault(id(module), set()).update(_with_parents(name))
        known = set().union(*self._names.values())
        for argument, entries in (("only", self.only or ()), ("skip", self.skip)):
            for entry in entries:
                if entry not in FAMILIES and not _matches(entry, known):
                    words = ", ".join(map(repr, FAMILIES))
                    raise ValueError(
                        f"fuse: {argument}: got {entry!r}, expected {words}, or the name of a "
                        "module in this model or a pattern of names."
                    )

    def against(self, module: nn.Module, family: str) -> str | None:
        """The reason why a module of a known type is not chosen; None where it is."""
        for entry in self.skip:
            if self._covers(entry, module, family):
                return f"Not chosen: skip has {entry!r}."
        if self.only is None or any(self._covers(entry, module, family) for entry in self.only):
            return None
        return "Not chosen: only names other modules."

    def names(self, module: nn.Module, head: nn.Module) -> bool:
        """Whether ``only`` names this module and not the head around it."""
        entries = (entry for entry in self.only or () if entry not in FAMILIES)
        return any(self._covers(e, module) and not self._covers(e, head) for e in entries)

    def _covers(self, entry: str, module: nn.Module, family: str | None = None) -> bool:
        return entry == family if entry in FAMILIES else _matches(entry, self._names[id(module)])


def _entries(argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    takes = "it takes a str or several."
    if isinstance(value, str):
        return (value,)
    try:
        entries = tuple(value)
    except TypeError:
        raise TypeError(f"fuse: {argument} is a {type(value).__name__}; {takes}") from None
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"fuse: {argument} holds a {type(entry).__name__}; {takes}")
    return entries


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))]


def _matches(entry: str, names: set[str]) -> bool:
    return entry in names or any(fnmatchcase(name, entry) for name in names)
