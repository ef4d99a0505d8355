"""A choice among names, such as the backend: a default of the process, and a ``with`` for one
thread and context.

Three readers have to agree on it. Eager code and asyncio tasks read a context variable.
``torch.compile`` refuses to set one, and in some releases to read it: what it traces is kept apart
(``Switch.traced``), and what holds around the compiled call it reads as an attribute of this
module, which it guards on without looking at how the value comes about. A recomputation
(``torch.utils.checkpoint``, not reentrant) runs in a backward, outside the user's ``with``: the
forward notes its choice in the checkpoint's frame, which both know by the hooks they have put on
saved tensors.

Functions that may be called outside a traced frame do not refer to the global ``torch``: the
compiler takes up the frames that do, and after a graph break would trace ``__enter__`` by itself.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar

from torch import __version__ as _torch_version
from torch.compiler import is_dynamo_compiling

# Older compilers allow no side effect in a checkpointed function of their own accord.
_STRICT_CHECKPOINTS = _torch_version < "2.14"

_here = sys.modules[__name__]
_switches: dict[str, Switch] = {}

try:
    from torch._C._autograd import _pop_saved_tensors_default_hooks as _pop_hooks
    from torch._C._autograd import _push_saved_tensors_default_hooks as _push_hooks
    from torch._C._autograd import _saved_tensors_hooks_is_enabled as _hooks_are_enabled
    from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks

    _top_hooks(False)
except (ImportError, TypeError):  # another torch: a recomputation then reads the current setting

    def _top_hooks(ignore_tracing: bool) -> None:
        return None


class Switch:
    """One choice of ``names``; ``variable`` is the environment's, ``what`` its name in an error."""

    def __init__(self, what: str, names: tuple[str, ...], variable: str, default: str):
        self.what, self.names, self.variable = what, names, variable
        self.default = self.checked(os.environ.get(variable, default), variable)
        # Pairs of a choice and the hook on saved tensors that was on top when it was entered.
        self.entered: ContextVar[tuple] = ContextVar(variable, default=())
        self.traced: tuple[str, ...] = ()  # of names; empty but while the compiler traces
        _switches[variable] = self

    def checked(self, name: str, source: str | None = None) -> str:
        if name not in self.names:
            takes = ", ".join(self.names)
            raise ValueError(f"{source or self.what}: got {name!r}, expected one of {takes}")
        return name

    def set(self, name: str) -> None:
        self.default = self.checked(name)

    def current(self) -> str:
        if self.traced:
            return self.traced[-1]
        chosen = getattr(_here, self.variable) if is_dynamo_compiling() else self.chosen()
        return chosen or self.default

    def chosen(self) -> str | None:
        """What a ``with`` chose here, or in a recomputation its forward; None for the default."""
        entered = self.entered.get()
        choice, mark = entered[-1] if entered else (None, None)
        name = None if choice is None else choice.name
        if _top_hooks(False) is None:  # no checkpoint is near
            return name
        hooks = _saved_tensor_hooks()
        # Of the checkpoints begun since: a with inside one is entered again when it recomputes.
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


class Choice:
    """``with Choice(name):`` chooses for ``switch`` inside, nowhere else; may be entered again."""

    switch: Switch

    def __init__(self, name: str):
        self.name = self.switch.checked(name)

    def __enter__(self):
        if is_dynamo_compiling():
            _trace(self.switch, (*self.switch.traced, self.name))
        else:
            top = _top_hooks(False)
            self.switch.entered.set((*self.switch.entered.get(), (self, top and top[0])))
        return self

    def __exit__(self, *exc) -> None:
        if is_dynamo_compiling():
            _trace(self.switch, self.switch.traced[:-1])
            return
        entered = self.switch.entered.get()
        for i in reversed(range(len(entered))):  # generators may end out of order, or elsewhere
            if entered[i][0] is self:
                self.switch.entered.set(entered[:i] + entered[i + 1 :])
                return


def _set_traced(switch: Switch, names: tuple[str, ...]) -> None:
    switch.traced = names


def _trace(switch: Switch, names: tuple[str, ...]) -> None:
    if _STRICT_CHECKPOINTS:
        from torch._dynamo.utils import (
            _disable_side_effect_safety_checks_for_current_subtracer as allow,
        )

        allow(_set_traced, switch, names)
    else:
        _set_traced(switch, names)


def _saved_tensor_hooks() -> list:
    """This thread's hooks that pack saved tensors, outermost first; torch shows the last alone."""
    top = _top_hooks(False)
    if not _hooks_are_enabled():  # then none can be put back
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
    """The frame of the checkpoint that packs with this hook, or None, and whether it recomputes."""
    hook = getattr(hook, "_torchdynamo_orig_callable", hook)
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(hook, "__closure__", None) or (), strict=False))
    again = "target_frame_ref" in cells
    cell = cells.get("target_frame_ref" if again else "frame")
    frame = cell and (cell.cell_contents() if again else cell.cell_contents)
    known = type(frame).__name__ == "_CheckpointFrame" and hasattr(frame, "__dict__")
    return (frame, again) if known else (None, False)
