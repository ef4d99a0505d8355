"""Plans that ``mmfused tune`` has found faster on the user's GPU, in place of the library's own.

Each op's ``plan()`` is :func:`tunable`. Tuned plans come from the file of the current GPU
(:mod:`mmfused.tuned_file`), which is read at the first launch; without a file, all plans are the
library's. The choice does not depend on anything that changes while a process runs, so that a
backward has the plan that belongs to its forward, and two runs agree bit for bit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch

from .. import tuned_file
from . import tiles

Arguments = tuple[tuple[str, Hashable], ...]  # sorted by name; the values are JSON-able
_Plan = TypeVar("_Plan", bound=Callable[..., Any])
_Table = dict[tuple[str, Arguments], list["Entry"]]
# Of the process, because a backward runs in threads of its own.
_forced: list[_Table] = []
_observers: list[list[Reached]] = []


class Entry(NamedTuple):
    """A tuned plan; it replaces ``default`` in calls of ``plan()`` with these arguments.

    If the library's plan is no longer ``default``, the entry has no effect.
    """

    op: str
    arguments: Arguments
    default: Any
    plan: Any


class Reached(NamedTuple):
    """A call of ``plan()``: its arguments, the library's plan, and the plan that was chosen."""

    op: str
    arguments: Arguments
    default: Any
    plan: Any


def bucket(size: int) -> int:
    """Return the power of two that is at least ``size``: sizes of one bucket share a tuned plan."""
    return 1 << max(0, size - 1).bit_length()


def tunable(op: str, **buckets: Callable[[Any], Hashable]) -> Callable[[_Plan], _Plan]:
    """Let the tuned plan for its arguments replace what ``plan()`` returns.

    Args:
        op: the name of the op.
        buckets: for arguments that vary from batch to batch, a function such as :func:`bucket`:
            values with the same result share a tuned plan.
    """

    def decorate(plan: _Plan) -> _Plan:
        signature = inspect.signature(plan)

        @functools.lru_cache(4096)
        def arguments_of(args: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> Arguments:
            bound = signature.bind(*args, **dict(named))
            bound.apply_defaults()
            values = {name: _json(value) for name, value in bound.arguments.items()}
            values |= {name: into(values[name]) for name, into in buckets.items()}
            return tuple(sorted(values.items()))

        @functools.wraps(plan)
        def tuned(*args: Any, **named: Any) -> Any:
            default = plan(*args, **named)
            table = _forced[-1] if _forced else _of_this_gpu()
            if not table and not _observers:
                return default
            return _chosen(op, default, arguments_of(args, tuple(named.items())), table)

        return tuned  # type: ignore[return-value]

    return decorate


def _json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _chosen(op: str, default: Any, arguments: Arguments, table: _Table) -> Any:
    entries = (e for e in table.get((op, arguments), ()) if e.default == default)
    plan = next((entry.plan for entry in entries), default)
    for reached in _observers:
        call = Reached(op, arguments, default, plan)
        if call not in reached:
            reached.append(call)
    return plan


def _of_this_gpu() -> _Table:
    """Return the plans in the current GPU's file; kernels that run on a CPU have none."""
    if tiles.INTERPRETED or tiles.pretended_arch is not None:
        return {}
    found = tuned_file.of_device(torch.cuda.current_device())
    return {} if found is None else _table_of_file(found)


@functools.cache
def _table_of_file(found: tuned_file.Tuned) -> _Table:
    return _table_of(found.entries)


def _table_of(entries: Iterable[Entry]) -> _Table:
    table: _Table = {}
    for entry in entries:
        table.setdefault((entry.op, entry.arguments), []).append(entry)
    return table


@contextmanager
def forced(entries: Iterable[Entry]) -> Iterator[None]:
    """Choose these plans, and none of a file, in all threads while the block runs."""
    _forced.append(_table_of(entries))
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def from_file() -> Iterator[None]:
    """Choose the plans and settings of the user's file while launches are recorded and not run.

    Without a GPU it is the file that MMFUSED_TUNED names, if any; its plans then serve launches for
    the architecture that they were tuned on.
    """
    found = tuned_file.current()
    with (
        forced(found.entries if found else ()),
        mock.patch.object(tuned_file, "current", lambda: found),  # a pretended GPU has no name
    ):
        yield


@contextmanager
def observed() -> Iterator[list[Reached]]:
    """Collect the distinct calls of ``plan()`` of all ops, in all threads, while the block runs."""
    reached: list[Reached] = []
    _observers.append(reached)
    try:
        yield reached
    finally:
        _observers[:] = [other for other in _observers if other is not reached]
