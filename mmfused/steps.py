"""The training steps of :mod:`.warmup`: their batches and modules, and how to run them once.

Nothing that a step changes stays changed: see :func:`kept`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map


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


def modules_of(step: Any) -> list[nn.Module]:
    """Return the modules that a step reaches, each once, in a fixed order.

    They are the step itself, or for a function those among its closure variables, its globals, its
    defaults, what it is bound to, and the attributes of that object, and those of functions among
    these.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(x: Any, attributes: bool = False) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Module):
            found.update((id(module), module) for module in x.modules())
        elif isinstance(x, functools.partial):
            visit_all((x.func, x.args, x.keywords))
        elif inspect.ismethod(x):
            visit(x.__func__)
            visit(x.__self__, attributes=True)
        elif inspect.isfunction(x):
            visit_all(_reached_by(x))
        elif isinstance(x, (list, tuple, set)):
            visit_all(x)
        elif isinstance(x, dict):
            visit_all(x.values())
        elif attributes and hasattr(x, "__dict__"):
            visit_all(vars(x).values())

    def visit_all(values: Iterable[Any]) -> None:
        for value in values:
            visit(value)

    called = type(step).__call__ if not isinstance(step, nn.Module) else None
    visit(called.__get__(step) if inspect.isfunction(called) else step)
    return list(found.values())


def _reached_by(function: Any) -> Iterator[Any]:
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


@contextlib.contextmanager
def kept(modules: list[nn.Module], with_values: bool) -> Iterator[None]:
    """Restore the modules, the gradients and the random generators.

    Args:
        modules: the modules, with their attributes, and the dicts, lists and sets among these.
        with_values: whether to restore the values of the buffers too, of which this makes copies.
    """
    attributes = [(module, dict(vars(module))) for module in modules]
    containers = [
        (value, value.copy())
        for _, saved in attributes
        for value in saved.values()
        if isinstance(value, (dict, list, set))
    ]
    buffers = {id(x): x for m in modules for x in m.buffers(recurse=False) if with_values}
    values = [(x, x.detach().clone()) for x in buffers.values()]
    grads = [(p, p.grad) for m in modules for p in m.parameters(recurse=False)]
    for parameter, _ in grads:
        parameter.grad = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for container, saved in containers:
            _refill(container, saved)
        for module, saved in attributes:
            vars(module).clear()
            vars(module).update(saved)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad


def _refill(container: Any, saved: Any) -> None:
    if isinstance(container, list):
        container[:] = saved
    else:
        container.clear()
        container.update(saved)


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


# ---- one step ------------------------------------------------------------------------------------


def run(
    step: Callable[..., Any],
    batch: Batch,
    modules: list[nn.Module],
    backward: bool,
) -> bool:
    """Call the step, and return whether there was a backward pass, if it was asked for.

    It starts at the loss, if what the step returned has one, else at all tensors in it, with random
    gradients, and 1 for scalars. No gradients are stored, but those of FSDP: see :func:`kept`.
    """

    def without_ddp(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)  # its forward would wait for a backward with its hooks

    with mock.patch.object(DistributedDataParallel, "forward", without_ddp):
        with torch.set_grad_enabled(backward):
            results = step(*batch.args, **batch.kwargs)
    outputs = [x for x in _tensors_in(_loss_of(results)) if x.requires_grad]
    if backward and outputs:
        upstream = [torch.ones_like(x) if x.dim() == 0 else _dense(x) for x in outputs]
        if any(map(is_sharded, modules)):  # its hooks know leaves of their own
            torch.autograd.backward(outputs, upstream)
        else:
            leaves = _leaves(modules, batch)
            torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    for module in modules:
        reshard = getattr(module, "reshard", None)
        if callable(reshard):  # without a backward pass, FSDP2 leaves the root gathered
            reshard()
    return not backward or bool(outputs)


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
