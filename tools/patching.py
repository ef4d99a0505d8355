"""Replace a function in every kernel module that imported it by name."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType


@contextlib.contextmanager
def replaced(package: str, original: Callable, replacement: Callable) -> Iterator[None]:
    """Set ``replacement`` wherever a loaded module of ``package`` holds ``original``."""
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
    """Run the kernels of ``op`` with ``change(plan, *arguments of plan())`` as their plan."""
    original = importlib.import_module(f"mmfused.kernels.{op}.plans").plan

    def changed(*args, **kwargs):
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        return change(original(*given.args), *given.args)

    importlib.import_module(f"mmfused.kernels.{op}")
    with replaced(f"mmfused.kernels.{op}", original, changed):
        yield


def modules_of(package: str) -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
    ]
