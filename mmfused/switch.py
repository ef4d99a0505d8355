"""A setting with a default for the process, and a context manager to change it.

The backend and the router are such settings. The current value must be correct in three situations:

* In eager code, including asyncio tasks, the value is in a context variable.
* ``torch.compile`` cannot set a context variable, and some releases cannot read one. Choices made
  inside a compiled function are therefore kept in ``Switch.traced``. A choice made outside is read
  as an attribute of this module. The compiler guards on the value of the attribute, and does not
  trace ``__getattr__``.
* Non-reentrant ``torch.utils.checkpoint`` recomputes in the backward pass, when the user's
  ``with`` block may have ended. The forward pass therefore stores its choice in the frame object
  of the checkpoint. Both passes find this object through the checkpoint's hooks on saved tensors.

After a graph break, Dynamo compiles each called function that uses the global name ``torch``. The
functions of this module must stay uncompiled there, so they do not use that name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

from torch import __version__ as _torch_version
from torch.compiler import is_dynamo_compiling

# torch before 2.14 rejects side effects in a checkpointed function unless they are allowed.
_STRICT_CHECKPOINTS = _torch_version < "2.14"

Name = TypeVar("Name", bound=str)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_here = sys.modules[__name__]
_switches: dict[str, Switch[Any]] = {}

try:  # private functions, of which torch's stubs lack some
    from torch._C._autograd import _pop_saved_tensors_default_hooks as _pop_hooks
    from torch._C._autograd import _push_saved_tensors_default_hooks as _push_hooks
    from torch._C._autograd import (
        _saved_tensors_hooks_is_enabled as _hooks_are_enabled,  # type: ignore
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks

    _top_hooks(False)
except (ImportError, TypeError):  # without these functions, a recomputation uses the current value

    def _top_hooks(ignore_is_tracing: bool) -> Any:
        return None


class Switch(Generic[Name]):
    """A setting that takes one of ``names``.

    Args:
        what: name of the setting in error messages.
        names: the allowed values.
        env_variable: environment variable that sets the default of the process.
        default: the default if the environment variable is not set.
    """

    def __init__(
        self,
        what: str,
        names: tuple[Name, ...],
        env_variable: str,
        default: Name,
    ) -> None:
        self.what: str = what
        self.names: tuple[Name, ...] = names
        self.env_variable: str = env_variable
        self.default: Name = self.checked(os.environ.get(env_variable, default), env_variable)
        # Choices, each with the hook on saved tensors that was topmost when the choice was entered.
        self.entered: ContextVar[tuple[Any, ...]] = ContextVar(env_variable, default=())
        self.traced: tuple[Name, ...] = ()  # choices inside the function that is being compiled
        _switches[env_variable] = self

    def checked(self, name: str, source: str | None = None) -> Name:
        """Return ``name`` if it is an allowed value.

        Args:
            name: the value to check.
            source: name of the setting in the error message, ``what`` by default.

        Raises:
            ValueError: ``name`` is not an allowed value.
        """
        for allowed in self.names:
            if name == allowed:
                return allowed
        expected = ", ".join(self.names)
        raise ValueError(f"{source or self.what}: got {name!r}, expected one of {expected}")

    def set(self, name: str) -> None:
        """Set the default of the process."""
        self.default = self.checked(name)

    def current(self) -> Name:
        """Return the current value."""
        if self.traced:
            return self.traced[-1]
        compiling = is_dynamo_compiling()
        chosen: Name | None = getattr(_here, self.env_variable) if compiling else self.chosen()
        return chosen or self.default

    def chosen(self) -> Name | None:
        """Return the choice of the innermost ``with`` block, or None if there is no such block.

        In a recomputation, return the choice that the forward pass used.
        """
        entered = self.entered.get()
        choice, hook_at_entry = entered[-1] if entered else (None, None)
        name = None if choice is None else choice.name
        if _top_hooks(False) is None:  # no checkpoint is active
            return name
        hooks = _saved_tensor_hooks()
        # Only checkpoints inside the `with` block matter. If the block is inside a checkpoint, the
        # recomputation enters the block again.
        inside = hooks[hooks.index(hook_at_entry) + 1 :] if hook_at_entry in hooks else hooks
        for hook in inside:
            frame, recomputing = _checkpoint(hook)
            if frame is not None:
                stored = vars(frame).setdefault("mmfused", {})
                if recomputing:
                    name = stored.get(self.env_variable, name)
                else:
                    stored.setdefault(self.env_variable, name or self.default)
        return name


def __getattr__(name: str) -> str | None:
    if name in _switches:
        return _switches[name].chosen()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Choice(Generic[Name]):
    """A context manager that sets ``switch`` to ``name``; it can be entered several times."""

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
        for i in reversed(range(len(entered))):  # generators may exit their blocks out of order
            if entered[i][0] is self:
                self.switch.entered.set(entered[:i] + entered[i + 1 :])
                return


def constant_when_traced(function: _Function) -> _Function:
    """Let torch.compile call a function while it traces, and take the result as a constant.

    This is ``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which
    takes longer than all of this library's.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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

    torch gives access to the topmost pair only, so all pairs are popped and pushed again.
    """
    top = _top_hooks(False)
    if not _hooks_are_enabled():  # popped hooks could not be pushed again
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
    """Return the frame of the checkpoint that owns a hook, and whether the checkpoint recomputes.

    The frame is None if the hook does not belong to a checkpoint.
    """
    hook = getattr(hook, "_torchdynamo_orig_callable", hook)
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells: dict[str, Any] = dict(zip(names, getattr(hook, "__closure__", None) or (), strict=False))
    recomputing = "target_frame_ref" in cells
    cell = cells.get("target_frame_ref" if recomputing else "frame")
    frame = cell and (cell.cell_contents() if recomputing else cell.cell_contents)
    is_checkpoint = type(frame).__name__ == "_CheckpointFrame" and hasattr(frame, "__dict__")
    return (frame, recomputing) if is_checkpoint else (None, False)
