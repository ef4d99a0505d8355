"""The swap of a module in place: its class is replaced by a subclass with another ``forward``.

The module keeps its identity and all its state.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import nn

Family = Literal["pooling", "attention", "experts", "losses"]  # the words that `fuse` accepts
FAMILIES: tuple[Family, ...] = get_args(Family)

KINDS: dict[str, type[Swap]] = {}  # full name of a class -> the Swap class for its instances
LEFT: dict[str, str] = {}  # full name of a class -> why its instances are left unchanged

# The methods that a Swap class may override.
_METHODS = ("forward", "compute_loss_from_embeddings", "calculate_loss")
_classes: dict[type, type] = {}  # a module's own class -> its fused subclass

# A fused class inherits from its kind (a subclass of Swap) and from the module's own class.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class Swap(_Mixin):
    """Base of all kinds: a fused forward, and what :func:`mmfused.fuse` reports about it."""

    family: ClassVar[Family]
    required: ClassVar[tuple[str, ...]] = ()  # the attributes that the fused forward reads
    description: ClassVar[str] = ""  # what a swapped module does
    benefit: ClassVar[str] = ""  # the expected benefit, and when to expect no benefit
    owns_children: ClassVar[bool] = True  # whether all modules inside are left unchanged
    # Names of children that are left unchanged even if `owns_children` is False.
    owned_children: ClassVar[tuple[str, ...]] = ()
    wrappable_methods: ClassVar[tuple[str, ...]] = ()  # methods that an instance may wrap

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "why_not" in vars(cls):
            setattr(cls, "why_not", staticmethod(_never_raises(cls.why_not)))  # noqa: B010

    @staticmethod
    def why_not(module: Any) -> str | None:
        """Return the reason not to swap ``module``, or None.

        Every fused forward checks the reasons again, because a module may change after the swap.
        An exception counts as a reason.
        """
        raise NotImplementedError

    @staticmethod
    def why_not_here(module: Any, name: str, model: nn.Module) -> str | None:
        """Return the reason not to swap ``module`` at its place in ``model``, or None."""
        return None

    @classmethod
    def describe(cls, module: Any) -> str:
        """Return what this swapped module does."""
        return cls.description

    @classmethod
    def estimate_benefit(cls, module: Any) -> str:
        """Return the benefit expected of swapping this module."""
        return cls.benefit

    @staticmethod
    def rebind(module: Any) -> None:
        """Bind the wrapped methods of an instance to its class after each change of the class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Store the module's own class, which any process can import, in copies and pickles.

        :func:`revive` derives the fused class again.
        """
        reduced, own = super().__reduce_ex__(protocol), own_class(self)
        return reduced if own is type(self) else (revive, (own,), *reduced[2:])

    def _get_name(self) -> str:
        # For repr only. __name__ does not change, because other libraries look modules up by it.
        return f"Fused{super()._get_name()}"


def _never_raises(why_not: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    @functools.wraps(why_not)
    def checked(module: Any) -> str | None:
        try:
            return why_not(module)
        except Exception as error:
            return not_inspectable(error)

    return checked


def not_inspectable(error: Exception) -> str:
    """Return the reason not to swap a module that raises when it is inspected."""
    text = traceback.format_exception_only(error)[-1].strip()  # also works if str(error) raises
    return f"It cannot be inspected: {text}"


def fused_class(kind: type[Swap], cls: type) -> type[Swap]:
    """Return the fused subclass of ``cls``, which is created only once."""
    if cls not in _classes:
        with warnings.catch_warnings():  # a deprecated class warns about every subclass
            warnings.simplefilter("ignore")
            names = {"__doc__": cls.__doc__, "__module__": __name__}
            _classes[cls] = type(cls.__name__, (kind, cls), names)
    return _classes[cls]


def change_class(module: nn.Module, kind: type[Swap], cls: type) -> None:
    """Set the class of ``module`` to ``cls``; restore it if ``kind.rebind`` fails."""
    before = type(module)
    module.__class__ = cls
    try:
        kind.rebind(module)
    except Exception:
        module.__class__ = before
        raise


def revive(cls: type) -> nn.Module:
    """Return an empty instance of the fused subclass of ``cls``, for copies and pickles."""
    return object.__new__(fused_class(KINDS[path_of(cls)], cls))


def own_class(module: nn.Module) -> type:
    """Return the class of ``module`` before it was swapped."""
    cls = type(module)
    return cls.__bases__[-1] if _classes.get(cls.__bases__[-1]) is cls else cls


def path_of(cls: Any) -> str:
    """Return the full name of a class or function."""
    return f"{cls.__module__}.{cls.__qualname__}"


def version_mismatch(kind: type[Swap], cls: type, module: nn.Module) -> str | None:
    """Return how ``module`` differs from the structure that ``kind`` expects, or None."""
    version = f"This version of {cls.__qualname__}"
    missing = [name for name in kind.required if not hasattr(module, name)]
    if missing:
        return f"{version} has no {', '.join(missing)}: its structure is different."
    for method in (name for name in _METHODS if hasattr(kind, name)):
        own, ours = (inspect.signature(getattr(of, method)).parameters for of in (cls, kind))
        new = own.keys() - ours.keys()
        if new:
            return f"{version} takes {', '.join(sorted(new))}, which fuse does not know."
        if method != "forward" and _call_form(own) != _call_form(ours):
            return f"{version} has a different {method}: its structure is different."
    return None


def replaced_method(kind: type[Swap], cls: type, module: nn.Module) -> str | None:
    """Return which method was replaced on the instance ``module``, as a sentence, or None."""
    for name in module.__dict__:
        method = name not in vars(nn.Module) and inspect.isroutine(getattr(cls, name, None))
        if name == "forward" or (method and name not in kind.wrappable_methods):
            return f"The {name} of this module was replaced on the instance."
    return None


def _call_form(parameters: Mapping[str, inspect.Parameter]) -> list[tuple[str, Any]]:
    return [(name, parameter.kind) for name, parameter in parameters.items()]
