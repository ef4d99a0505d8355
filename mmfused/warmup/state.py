"""Keep the state of what a training step reaches as it was, for :mod:`.warmup`."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .steps import Reached

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
Place = tuple[int, str]  # the id of a module, and the name of a parameter in it


@contextlib.contextmanager
def kept(reached: Reached, written: set[Place] | None = None) -> Iterator[None]:
    """Restore what a step reaches, the gradients and the random generators.

    Args:
        reached: modules, with the dicts, lists, sets and deques in their attributes, and other
            objects, of which only attributes are restored that then hold meta tensors.
        written: places of parameters; if given, this restores the values of these and of all
            buffers too, of which it makes copies.
    """
    modules = reached.modules
    attributes = [(vars(x), dict(vars(x))) for x in reached.objects]
    containers = [(x, x.copy()) for x in _containers_in([vars(m) for m in modules])]
    values = []
    if written is not None:
        buffers = [x for m in modules for x in m.buffers(recurse=False)]
        named = [(id(m), *x) for m in modules for x in m.named_parameters(recurse=False)]
        changed = [x for of, name, x in named if (of, name) in written]
        tensors = {id(x): x for x in (*buffers, *changed)}
        values = [(x, x.detach().clone()) for x in tensors.values()]
    grads = [(p, p.grad) for m in modules for p in m.parameters(recurse=False)]
    for parameter, _ in grads:
        parameter.grad = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), _random_state_kept():
            yield
    finally:
        for container, saved in containers:
            container.clear()
            (container.extend if isinstance(saved, (list, deque)) else container.update)(saved)
        for now, saved in attributes:
            _drop_meta(now, saved)
        with torch.no_grad():
            for x, value in values:
                x.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad


def _containers_in(values: Iterable[Any]) -> list[Any]:
    """Return the dicts, lists, sets and deques in ``values``, and those in these, each once."""
    found: dict[int, Any] = {}
    left = list(values)
    while left:
        x = left.pop()
        if type(x) in _CONTAINERS and id(x) not in found:  # no subclass that may refuse changes
            found[id(x)] = x
            left += x.values() if isinstance(x, dict) else x
    return list(found.values())


def _drop_meta(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """Replace new attributes with meta tensors in them by the saved ones, if there are any."""
    for name, value in list(now.items()):
        is_new = name not in saved or saved[name] is not value
        if is_new and any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(value)):
            del now[name]
            now.update({name: saved[name]} if name in saved else {})


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the generators of Python and, if it is imported, NumPy."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def written_parameters(modules: list[nn.Module]) -> set[Place]:
    """Return the places of those parameters that something wrote in place."""
    return {
        (id(module), name)
        for module in modules
        for name, x in module.named_parameters(recurse=False)
        if x._version
    }


def replace_tensors(modules: list[nn.Module], replacement: Callable[[Tensor], Tensor]) -> None:
    """Replace the parameters, the buffers and the other tensors that the modules hold.

    Shared tensors stay shared. :func:`kept` restores the modules.
    """
    made: dict[int, Tensor] = {}

    def replaced(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:
            made[id(x)] = replacement(x)
        return made[id(x)]

    for module in modules:
        for name, value in list(vars(module).items()):
            if name in ("_parameters", "_buffers"):
                value.update({key: replaced(x) for key, x in value.items()})
            elif isinstance(value, Tensor):
                vars(module)[name] = replaced(value)
            elif type(value) in (list, tuple, dict) and any(
                isinstance(x, Tensor) for x in tree_leaves(value)
            ):
                vars(module)[name] = tree_map(replaced, value)
