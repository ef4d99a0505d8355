"""The choice of modules with the arguments ``only`` and ``skip`` of :func:`mmfused.fuse`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .base import FAMILIES, Family


class Selection:
    """The modules of ``model`` that ``only`` and ``skip`` choose."""

    def __init__(
        self,
        model: nn.Module,
        only: str | Iterable[str] | None,
        skip: str | Iterable[str] | None,
    ) -> None:
        self.only: tuple[str, ...] | None = None if only is None else _entries("only", only)
        self.skip: tuple[str, ...] = () if skip is None else _entries("skip", skip)
        # id of a module -> its names and the names of the modules around it.
        self._names: dict[int, set[str]] = {}
        if self.only is None and not self.skip:
            return
        # A shared module has several names.
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), set()).update(_with_parents(name))
        self._check()

    def _check(self) -> None:
        all_names = set().union(*self._names.values())
        for argument, entries in (("only", self.only or ()), ("skip", self.skip)):
            for entry in entries:
                if entry not in FAMILIES and not _matches(entry, all_names):
                    words = ", ".join(map(repr, FAMILIES))
                    raise ValueError(
                        f"fuse: {argument}: got {entry!r}, expected {words}, or the name of a "
                        "module in this model or a pattern of names"
                    )

    def why_not_chosen(self, module: nn.Module, family: Family) -> str | None:
        """Return why a module of a known type is not chosen, or None if it is chosen."""
        for entry in self.skip:
            if self._covers(entry, module, family):
                return f"Not chosen: `skip` has {entry!r}."
        if self.only is None or any(self._covers(entry, module, family) for entry in self.only):
            return None
        return "Not chosen: `only` does not include it."

    def names(self, module: nn.Module, owner: nn.Module) -> bool:
        """Return whether ``only`` names this module but not the ``owner`` around it."""
        entries = [entry for entry in self.only or () if entry not in FAMILIES]
        return any(self._covers(e, module) and not self._covers(e, owner) for e in entries)

    def _covers(
        self,
        entry: str,
        module: nn.Module,
        family: Family | None = None,
    ) -> bool:
        return entry == family if entry in FAMILIES else _matches(entry, self._names[id(module)])


def _entries(argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    try:
        entries = tuple(value)
    except TypeError:
        raise TypeError(
            f"fuse: {argument}: got a {type(value).__name__}, expected a str or an iterable of strs"
        ) from None
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"fuse: {argument}: got a {type(entry).__name__} in it, expected only strs"
            )
    return entries


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))]


def _matches(entry: str, names: set[str]) -> bool:
    return entry in names or any(fnmatchcase(name, entry) for name in names)
