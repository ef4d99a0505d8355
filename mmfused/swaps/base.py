"""How a module is swapped without losing its identity: its class becomes a subclass of its own class with another forward."""

from __future__ import annotations

import inspect

from torch import nn

KINDS: dict[str, type[Swap]] = {}  # full name of a class -> how its instances are swapped
LEFT: dict[str, str] = {}  # full name of a class -> why its instances are left
_classes: dict[type, type] = {}  # a module's own class -> its fused subclass


class Swap:
    """What every kind of swap says of itself.

    ``needs``: the attributes its forward reads.  ``does``: a phrase for the report; ``says``, of one module.  ``whole``: the
    modules inside belong to it and are not swapped themselves.  ``why_not(module)``: the reason against swapping it, or None;
    asked at every call too, for modules are edited afterwards.  ``misplaced``: the reason against its place in a model.
    """

    needs = does = ""
    whole = True

    @classmethod
    def says(cls, module: nn.Module) -> str:
        return cls.does

    @staticmethod
    def misplaced(module: nn.Module, name: str, model: nn.Module) -> str | None:
        return None

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the module's own class, which a fresh process can find, and derive the fused one again."""
        made, own = super().__reduce_ex__(protocol), own_class(self)
        return made if own is type(self) else (revive, (own,), *made[2:])

    def _get_name(self) -> str:
        return f"Fused{super()._get_name()}"  # printed only: other libraries look modules up by __name__, which stays


def fused_class(kind: type, cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(cls.__name__, (kind, cls), {"__doc__": cls.__doc__, "__module__": __name__})
    return _classes[cls]


def revive(cls: type) -> nn.Module:
    return object.__new__(fused_class(KINDS[path_of(cls)], cls))


def own_class(module: nn.Module) -> type:
    cls = type(module)
    return cls.__bases__[-1] if _classes.get(cls.__bases__[-1]) is cls else cls


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def other_version(kind: type, cls: type, module: nn.Module) -> str | None:
    """Another release may have built the class differently."""
    missing = [name for name in kind.needs.split() if not hasattr(module, name)]
    if missing:
        return f"This version of {cls.__qualname__} has no {', '.join(missing)}: its structure is another."
    new = inspect.signature(cls.forward).parameters.keys() - inspect.signature(kind.forward).parameters.keys()
    if new:
        return f"This version of {cls.__qualname__} takes {', '.join(sorted(new))}, which fuse does not know."
    return "The forward of this module was replaced on the instance." if "forward" in module.__dict__ else None
