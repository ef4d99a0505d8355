"""A setting with a default for the process and a ``with`` for one thread and context.

Used for the backend and the router. The current value has to be right in three situations:

* Eager code and asyncio tasks read a context variable.
* ``torch.compile`` cannot set a context variable, and some releases cannot read one. Choices made
  inside a compiled function are kept in ``Switch.traced``. The choice around a compiled call is
  read as an attribute of this module: the compiler guards on its value without tracing how it is
  computed.
* The recomputation of a checkpoint (``torch.utils.checkpoint``, not reentrant) runs in the backward
  pass, outside of the user's ``with``. The forward pass stores its choice in the checkpoint's
  frame, which both passes find through the checkpoint's hooks on saved tensors.

Functions that may run outside of a traced frame do not use the global ``torch``: the compiler
would trace such frames on their own after a graph break.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

from torch import __version__ as _torch_version
from torch.compiler import is_dynamo_compiling

# Older compilers refuse side effects in a checkpointed function unless told to allow them.
_STRICT_CHECKPOINTS = _torch_version < "2.14"

Name = TypeVar("Name", bound=str)
_here = sys.modules[__name__]
_switches: dict[str, Switch[Any]] = {}

try:  # torch's stubs lack some of these
    from torch._C._autograd import _pop_saved_tensors_default_hooks as _pop_hooks
    from torch._C._autograd import _push_saved_tensors_default_hooks as _push_hooks
    from torch._C._autograd import (
        _saved_tensors_hooks_is_enabled as _hooks_are_enabled,  # type: ignore
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks

    _top_hooks(False)
except (ImportError, TypeError):  # in another torch, a recomputation reads the current value

    def _top_hooks(ignore_is_tracing: bool) -> Any:
        return None


class Switch(Generic[Name]):
    """A setting that takes one of ``names``.

    Args:
        what: its name in an error.
        names: the allowed values.
        variable: the environment variable with the default of the process.
        default: the value where that variable is not set.
    """

    def __init__(
        self,
        what: str,
        names: tuple[Name, ...],
        variable: str,
        default: Name,
    ) -> None:
        self.what: str = what
        self.names: tuple[Name, ...] = names
        self.variable: str = variable
        self.default: Name = self.checked(os.environ.get(variable, default), variable)
        # Pairs of a choice and the hook on saved tensors that was topmost when it was entered.
        self.entered: ContextVar[tuple[Any, ...]] = ContextVar(variable, default=())
        self.traced: tuple[Name, ...] = ()  # choices inside of the function being compiled
        _switches[variable] = self

    def checked(self, name: str, source: str | None = None) -> Name:
        """Return ``name`` if it is allowed; ``source`` replaces ``what`` in the error."""
        for known in self.names:
            if name == known:
                return known
        expected = ", ".join(self.names)
        raise ValueError(f"{source or self.what}: got {name!r}, expected one of {expected}")

    def set(self, name: str) -> None:
        """Set the default of the process."""
        self.default = self.checked(name)

    def current(self) -> Name:
        """Return the value in effect here."""
        if self.traced:
            return self.traced[-1]
        compiling = is_dynamo_compiling()
        chosen: Name | None = getattr(_here, self.variable) if compiling else self.chosen()
        return chosen or self.default

    def chosen(self) -> Name | None:
        """Return the choice of the innermost ``with``, or of the forward pass being recomputed.

        None stands for the default.
        """
        entered = self.entered.get()
        choice, mark = entered[-1] if entered else (None, None)
        name = None if choice is None else choice.name
        if _top_hooks(False) is None:  # no checkpoint is active
            return name
        hooks = _saved_tensor_hooks()
        # Only checkpoints begun after that `with`: one inside a checkpoint is entered again when
        # the checkpoint recomputes.
        inside = hooks[hooks.index(mark) + 1 :] if mark in hooks else hooks
        for hook in inside:
            frame, again = _checkpoint(hook)
            if frame is not None:
                noted = vars(frame).setdefault("mmfused", {})
                if again:
                    name = noted.get(self.variable, name)
                else:
                    noted.setdefault(self.variable, name or self.default)
        return name


def __getattr__(variable: str) -> str | None:
    if variable in _switches:
        return _switches[variable].chosen()
    raise AttributeError(f"module {__name__!r} has no attribute {variable!r}")


class Choice(Generic[Name]):
    """Choose a value of ``switch``: ``with Choice(name):``; it may be entered more than once."""

    switch: ClassVar[Switch[Any]]

    def __init__(self, name: Name) -> None:
        self.name: Name = self.switch.checked(name)

    def __enter__(self) -> Choice[Name]:
        if is_dynamo_compiling():
            _trace(self.switch, (*self.switch.traced, self.name))
        else:
            top = _top_hooks(False)
            self.switch.entered.set((*self.switch.entered.get(), (self, top and top[0])))
        return self

    def __exit__(self, *exception: object) -> None:
        if is_dynamo_compiling():
            _trace(self.switch, self.switch.traced[:-1])
            return
        entered = self.switch.entered.get()
        for i in reversed(range(len(entered))):  # generators may exit out of order
            if entered[i][0] is self:
                self.switch.entered.set(entered[:i] + entered[i + 1 :])
                return


def _set_traced(switch: Switch[Any], names: tuple[Any, ...]) -> None:
    switch.traced = names


def _trace(switch: Switch[Any], names: tuple[Any, ...]) -> None:
    if _STRICT_CHECKPOINTS:
        from torch._dynamo.utils import (
            _disable_side_effect_safety_checks_for_current_subtracer as allow,
        )

        allow(_set_traced, switch, names)
    else:
        _set_traced(switch, names)


def _saved_tensor_hooks() -> list:
    """Return this thread's pack hooks on saved tensors, outermost first.

    torch shows only the topmost pair, so all are popped and pushed again.
    """
    top = _top_hooks(False)
    if not _hooks_are_enabled():  # they could not be pushed again
        return [top[0]]
    hooks = []
    try:
        while top is not None:
            hooks.append(top)
            _pop_hooks()
            top = _top_hooks(False)
    finally:
        for pair in reversed(hooks):
            _push_hooks(*pair)
    return [pack for pack, _ in reversed(hooks)]


def _checkpoint(hook) -> tuple[object | None, bool]:
    """Return the frame of the checkpoint that owns this hook, and whether it is recomputing.

    The frame is None for a hook of anything else.
    """
    hook = getattr(hook, "_torchdynamo_orig_callable", hook)
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells: dict[str, Any] = dict(zip(names, getattr(hook, "__closure__", None) or (), strict=False))
    again = "target_frame_ref" in cells
    cell = cells.get("target_frame_ref" if again else "frame")
    frame = cell and (cell.cell_contents() if again else cell.cell_contents)
    known = type(frame).__name__ == "_CheckpointFrame" and hasattr(frame, "__dict__")
    return (frame, again) if known else (None, False)
