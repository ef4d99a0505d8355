"""How a module is swapped without losing its identity: its class becomes a subclass of its own
class with another forward.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Callable, Mapping

from torch import nn

KINDS: dict[str, type[Swap]] = {}  # full name of a class -> how its instances are swapped
LEFT: dict[str, str] = {}  # full name of a class -> why its instances are left
FAMILIES = ("pooling", "attention", "experts", "losses")  # what `only` and `skip` of fuse select by
_METHODS = ("forward", "compute_loss_from_embeddings", "calculate_loss")  # what kinds override
_classes: dict[type, type] = {}  # a module's own class -> its fused subclass


class Swap:
    """What every kind of swap says of itself.

    ``family``: one of FAMILIES.  ``needs``: the attributes its forward reads.  ``does``: a phrase
    for the report; ``says``, of one module.  ``gains``: what it is expected to bring, and where
    nothing; ``expects``, of one module.  ``whole``: the modules inside belong to it and are not
    swapped themselves.  ``parts``: those of its children that belong to it where not all do.

    ``why_not(module)``: the reason against swapping it, or None; called in every forward too, for
    modules are edited afterwards, and where it raises that is a reason.  ``misplaced``: the reason
    against its place in a model.  ``rewraps``: methods that another module may have wrapped on the
    instance; ``rewrap``, called after every change of the class, binds what is wrapped anew.
    """

    family = needs = does = gains = ""
    whole = True
    parts: tuple[str, ...] = ()
    rewraps: tuple[str, ...] = ()

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "why_not" in vars(cls):
            cls.why_not = staticmethod(_never_raises(cls.why_not))

    @classmethod
    def says(cls, module: nn.Module) -> str:
        return cls.does

    @classmethod
    def expects(cls, module: nn.Module) -> str:
        return cls.gains

    @staticmethod
    def misplaced(module: nn.Module, name: str, model: nn.Module) -> str | None:
        return None

    @staticmethod
    def rewrap(module: nn.Module) -> None:
        pass

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the module's own class, which a fresh process can find, and
        derive the fused one again.
        """
        made, own = super().__reduce_ex__(protocol), own_class(self)
        return made if own is type(self) else (revive, (own,), *made[2:])

    def _get_name(self) -> str:
        return f"Fused{super()._get_name()}"  # printed only: other libraries look modules up by __name__, which stays


def _never_raises(why_not: Callable[[nn.Module], str | None]) -> Callable[[nn.Module], str | None]:
    @functools.wraps(why_not)
    def judge(module):
        try:
            return why_not(module)
        except Exception as error:
            return unclear(error)

    return judge


def unclear(error: Exception) -> str:
    """The reason against a module that raises when it is looked at."""
    said = traceback.format_exception_only(error)[-1].strip()  # also of one whose text raises
    return f"It cannot be judged: {said}"


def fused_class(kind: type, cls: type) -> type:
    if cls not in _classes:
        with warnings.catch_warnings():  # a deprecated class warns of every subclass
            warnings.simplefilter("ignore")
            names = {"__doc__": cls.__doc__, "__module__": __name__}
            _classes[cls] = type(cls.__name__, (kind, cls), names)
    return _classes[cls]


def change_class(module: nn.Module, kind: type[Swap], cls: type) -> None:
    """Wholly, or not at all."""
    before = type(module)
    module.__class__ = cls
    try:
        kind.rewrap(module)
    except Exception:
        module.__class__ = before
        raise


def revive(cls: type) -> nn.Module:
    return object.__new__(fused_class(KINDS[path_of(cls)], cls))


def own_class(module: nn.Module) -> type:
    cls = type(module)
    return cls.__bases__[-1] if _classes.get(cls.__bases__[-1]) is cls else cls


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def other_version(kind: type, cls: type, module: nn.Module) -> str | None:
    """Another release may have built the class differently."""
    version = f"This version of {cls.__qualname__}"
    missing = [name for name in kind.needs.split() if not hasattr(module, name)]
    if missing:
        return f"{version} has no {', '.join(missing)}: its structure is another."
    for method in (name for name in _METHODS if hasattr(kind, name)):
        own, ours = (inspect.signature(getattr(of, method)).parameters for of in (cls, kind))
        new = own.keys() - ours.keys()
        if new:
            return f"{version} takes {', '.join(sorted(new))}, which fuse does not know."
        if method != "forward" and _called_as(own) != _called_as(ours):
            return f"{version} has another {method}: its structure is another."
    return None


def replaced(kind: type, cls: type, module: nn.Module) -> str | None:
    """Somebody may have changed this instance."""
    for name in module.__dict__:
        method = name not in vars(nn.Module) and inspect.isroutine(getattr(cls, name, None))
        if name == "forward" or (method and name not in kind.rewraps):
            return f"The {name} of this module was replaced on the instance."
    return None


def _called_as(parameters: Mapping[str, inspect.Parameter]) -> list[tuple]:
    return [(name, parameter.kind) for name, parameter in parameters.items()]
