"""Context managers that replace a function in every module that has imported it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType


@contextlib.contextmanager
def replaced(package: str, original: Callable, replacement: Callable) -> Iterator[None]:
    """Replace ``original`` in all loaded modules of ``package``, under any name."""
    holders = [
        (module, name)
        for module in modules_of(package)
        for name, value in list(vars(module).items())
        if value is original
    ]
    for module, name in holders:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name in holders:
            setattr(module, name, original)


@contextlib.contextmanager
def replaced_plan(op: str, change: Callable) -> Iterator[None]:
    """Replace each result of ``plan(*args)`` of ``op`` by ``change(result, *args)``."""
    original = importlib.import_module(f"mmfused.kernels.{op}.plans").plan

    def changed(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        return change(original(*bound.args), *bound.args)

    importlib.import_module(f"mmfused.kernels.{op}")  # load every module that imports plan
    with replaced(f"mmfused.kernels.{op}", original, changed):
        yield


def modules_of(package: str) -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
    ]
