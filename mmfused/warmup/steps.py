"""The training steps of :mod:`.warmup`: their batches and modules, and how to run them once.

Nothing that a step changes stays changed: see :mod:`.state`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

EXPECTED_MODULES = (
    "expected modules as closure variables, globals or attributes of the step, at most two deep"
)
_MANY = 10_000  # a container with as many members is a data set's


class Batch(NamedTuple):
    """The arguments of one step, in which shapes stand for tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# ---- batches -------------------------------------------------------------------------------------


def batches_of(shapes: Any) -> list[Batch]:
    """Return the batches that ``shapes`` means: one batch, or a list of batches."""
    batches = shapes if isinstance(shapes, list) else [shapes]
    if not batches:
        raise ValueError("shapes: got an empty list, expected a batch or a list of batches")
    return [_batch_of(batch) for batch in batches]


def _batch_of(batch: Any) -> Batch:
    if isinstance(batch, dict):
        if not all(isinstance(name, str) for name in batch):
            raise TypeError(f"shapes: got the keys {list(batch)}, expected names of arguments")
        return Batch((), batch)
    if not isinstance(batch, tuple):
        raise TypeError(
            f"shapes: got a batch of type {type(batch).__name__}, expected a tuple of positional "
            "arguments or a dict of keyword arguments"
        )
    if batch and is_shape(batch):
        raise ValueError(
            f"shapes: got {tuple(batch)}, which is the shape of one tensor, expected a tuple of "
            f"arguments, such as ({tuple(batch)},)"
        )
    return Batch(batch, {})


def is_shape(x: Any) -> bool:
    """Return whether ``x`` is a tuple of ints, which stands for a tensor."""
    return isinstance(x, tuple) and all(type(size) is int for size in x)


def arguments_of(batch: Batch, make: Callable[[Any, torch.dtype | None], Tensor]) -> Batch:
    """Return a batch with tensors in place of shapes.

    Args:
        batch: the batch.
        make: returns a tensor for a shape and a dtype, which is None if it was not given, and for
            a tensor and its dtype.
    """

    def fill(x: Any) -> Any:
        if isinstance(x, Tensor):
            return make(x, x.dtype)
        if is_shape(x):
            _check_sizes(x)
            return make(x, None)
        if isinstance(x, tuple) and len(x) == 2 and is_shape(x[0]):
            if isinstance(x[1], torch.dtype):
                _check_sizes(x[0])
                return make(*x)
        if isinstance(x, dict):
            return {name: fill(value) for name, value in x.items()}
        if isinstance(x, list) or type(x) is tuple:
            return type(x)(map(fill, x))
        return x

    return Batch(tuple(map(fill, batch.args)), fill(batch.kwargs))


def _check_sizes(shape: tuple[int, ...]) -> None:
    if any(size < 0 for size in shape):
        raise ValueError(f"shapes: got {tuple(shape)}, expected sizes of 0 or more")


# ---- modules -------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


class Reached(NamedTuple):
    """The modules and the other objects with attributes that a step reaches, each once."""

    modules: list[nn.Module]
    objects: list[Any]


def reached_by(step: Any) -> Reached:
    """Return what a step reaches, in a fixed order.

    It is the step itself, or for a function its closure variables, its globals, its defaults, what
    it is bound to, and those of functions among these; and the attributes of objects, two deep.
    """
    modules: dict[int, nn.Module] = {}
    objects: list[Any] = []
    seen: set[int] = set()

    def visit(x: Any, depth: int = 2) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Module):
            modules.update((id(module), module) for module in x.modules())
        elif isinstance(x, functools.partial):
            visit_all((x.func, x.args, x.keywords), depth)
        elif inspect.ismethod(x):
            visit_all((x.__func__, x.__self__), depth)
        elif inspect.isfunction(x):
            visit_all(_variables_of(x), depth)
        elif isinstance(x, (list, tuple, set, dict)):
            if len(x) < _MANY:
                visit_all(x.values() if isinstance(x, dict) else x, depth)
        elif hasattr(x, "__dict__") and not isinstance(x, (type, ModuleType, Tensor)):
            objects.append(x)
            visit_all(vars(x).values() if depth else (), depth - 1)

    def visit_all(values: Iterable[Any], depth: int) -> None:
        for value in list(values):
            visit(value, depth)

    called = type(step).__call__ if not isinstance(step, nn.Module) else None
    visit(called.__get__(step) if inspect.isfunction(called) else step)
    return Reached(list(modules.values()), objects)


def _variables_of(function: Any) -> Iterator[Any]:
    """Yield the closure variables, the defaults and the used globals of a function."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable without a value
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    namespace = function.__globals__
    for name in function.__code__.co_names:
        value = namespace.get(name)
        # Functions of other modules are libraries, whose globals are not the step's.
        if inspect.isfunction(value) and value.__globals__ is not namespace:
            continue
        yield value


def dtype_of(modules: list[nn.Module]) -> torch.dtype:
    """Return the dtype of the first floating parameter."""
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    dtypes = (p.dtype for p in parameters if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def device_of(modules: list[nn.Module]) -> torch.device:
    """Return the device of the first parameter, or the current GPU."""
    devices = (p.device for module in modules for p in module.parameters(recurse=False))
    return next(devices, None) or torch.device("cuda", torch.cuda.current_device())


# ---- one step ------------------------------------------------------------------------------------


def run(
    step: Callable[..., Any],
    batch: Batch,
    modules: list[nn.Module],
    backward: bool,
) -> bool:
    """Call the step, and return whether there was a backward pass, if it was asked for.

    It starts at the loss, if what the step returned has one, else at all tensors in it, with random
    gradients, and 1 for scalars. No gradients are stored, but those of FSDP: see :mod:`.state`.
    """

    def without_ddp(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)  # its forward would wait for a backward with its hooks

    with (
        mock.patch.object(DistributedDataParallel, "forward", without_ddp),
        mock.patch.object(checkpoint, "CheckpointFunction", _Checkpoint),
    ):
        with torch.set_grad_enabled(backward):
            results = step(*batch.args, **batch.kwargs)
        outputs = [x for x in _tensors_in(_loss_of(results)) if x.requires_grad]
        if backward and outputs:
            _run_backward(outputs, batch, modules)
    for module in modules:
        reshard = getattr(module, "reshard", None)
        if callable(reshard):  # without a backward pass, FSDP2 leaves the root gathered
            reshard()
    return not backward or bool(outputs)


def _run_backward(outputs: list[Tensor], batch: Batch, modules: list[nn.Module]) -> None:
    leaves = _leaves(modules, batch)
    if not leaves:
        raise ValueError(f"step: got no parameter that requires a gradient, {EXPECTED_MODULES}")
    upstream = [torch.ones_like(x) if x.dim() == 0 else _dense(x) for x in outputs]
    if any(map(is_sharded, modules)):  # its hooks know leaves of their own
        torch.autograd.backward(outputs, upstream)
    else:
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


class _Checkpoint:
    """Stands for reentrant checkpointing, whose backward pass cannot be one without ``.grad``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        with torch.no_grad():  # may launch other kernels than the second time
            function(*args)
        again: Any = checkpoint.checkpoint
        return again(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP, of either version, wraps this module."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return "FSDPModule" in names or "FullyShardedDataParallel" in names


def _leaves(modules: list[nn.Module], batch: Batch) -> list[Tensor]:
    """Return the parameters and the inputs that need a gradient, each once."""
    leaves = [p for module in modules for p in module.parameters(recurse=False)]
    leaves += [x for x in tree_leaves((batch.args, batch.kwargs)) if isinstance(x, Tensor)]
    return list({id(x): x for x in leaves if x.requires_grad}.values())


def _dense(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def _loss_of(results: Any) -> Any:
    """Return the member ``loss`` of what a step returned, or else all of it."""
    loss = results.get("loss") if isinstance(results, dict) else getattr(results, "loss", None)
    return loss if isinstance(loss, Tensor) else results


def _tensors_in(results: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a step returned, also in dataclasses, each once."""
    seen: set[int] = set()

    def visit(x: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(x):
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if isinstance(leaf, Tensor):
                yield leaf
            elif is_dataclass(leaf) and not isinstance(leaf, type):
                for field in fields(leaf):
                    yield from visit(getattr(leaf, field.name))

    return visit(results)
