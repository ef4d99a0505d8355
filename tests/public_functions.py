"""The public functions of mmfused that take tensors, found by their signatures.

Tensors in the arguments of a call have paths: ``x``, ``weights.w_q`` (a field of a NamedTuple),
``norm_x.0`` (an item of a tuple). ``run`` calls a function and returns outputs and gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Callable
from unittest import mock

import torch
from strided_views import garbage, lay_out, on_device
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmfused

# Each function that takes **options, and the function that receives the options.
FORWARDS = {"topk_routing_from_input": "topk_routing"}
# Functions with one implementation for all backends.
ONE_BACKEND = ("pack_passes", "pooling_weights", "update_selection_bias")
# Floating-point arguments that get no gradient: constants, and the losses in a routing.
CONSTANTS = (
    "row_weight",
    "selection_bias",
    "routing.balance_loss",
    "routing.z_loss",
    "routing.entropy",
)


def public_functions() -> dict[str, Callable]:
    """Return the public functions that take tensors, by name, except ``*_reference``.

    ``backend("reference")`` calls the references.
    """
    named = {name: getattr(mmfused, name) for name in mmfused.__all__}
    own = {
        k: v
        for k, v in vars(mmfused.losses).items()
        if getattr(v, "__module__", "") == mmfused.losses.__name__
    }
    named |= {name: value for name, value in own.items() if not name.startswith("_")}
    functions = {name: value for name, value in named.items() if inspect.isfunction(value)}
    return {
        name: f
        for name, f in functions.items()
        if not name.endswith("_reference") and tensor_arguments(f)
    }


def has_kernels(function: str) -> bool:
    return function not in ONE_BACKEND and not hasattr(mmfused.losses, function)


def arguments(function: Callable) -> dict[str, object]:
    """Return the type of every argument by name, including arguments in ``**options``."""
    hints = typing.get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            assert function.__name__ in FORWARDS, (
                f"{function.__name__} takes **{name}: add the function that receives **{name} to "
                f"FORWARDS in {__name__}"
            )
            target = getattr(mmfused, FORWARDS[function.__name__])
            forwarded = arguments(target)
            parameters = inspect.signature(target).parameters.values()
            only = {p.name for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY}
            found |= {key: hint for key, hint in forwarded.items() if key in only}
        else:
            assert name in hints, (
                f"{function.__name__}: {name}: got no type annotation, expected one"
            )
            found[name] = hints[name]
    return found


def tensor_arguments(function: Callable) -> list[str]:
    """Return the paths of all arguments that may be tensors."""
    try:
        found = arguments(function)
    except AssertionError:
        return ["?"]  # keep the function, so that its test fails with the message of the assertion
    return [path for name, hint in found.items() for path in _paths(hint, name)]


def _paths(hint: object, path: str) -> list[str]:
    if hint is Tensor:
        return [path]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(hint) for found in _paths(part, path)]
    if typing.get_origin(hint) is tuple:
        return [
            found
            for i, part in enumerate(typing.get_args(hint))
            for found in _paths(part, f"{path}.{i}")
        ]
    if hasattr(hint, "_fields"):
        parts = typing.get_type_hints(hint)
        return [found for name, part in parts.items() for found in _paths(part, f"{path}.{name}")]
    return []


def leaves(value: object, path: str = "") -> dict[str, Tensor]:
    """Return the tensors inside arguments, by path."""
    if isinstance(value, Tensor):
        return {path: value}
    found = {}
    for key, part in _items(value):
        found |= leaves(part, f"{path}.{key}" if path else str(key))
    return found


def replaced(value: object, new: dict[str, object], path: str = "") -> object:
    """Return a copy of the arguments with ``new[path]`` at each path of ``new``."""
    if path in new:
        return new[path]
    items = _items(value)
    if not items:
        return value
    parts = {key: replaced(part, new, f"{path}.{key}" if path else str(key)) for key, part in items}
    if isinstance(value, dict):
        return parts
    return (
        type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    )


def _items(value: object) -> list[tuple[object, object]]:
    if isinstance(value, dict):
        return list(value.items())
    if hasattr(value, "_fields"):
        return list(value._asdict().items())
    return list(enumerate(value)) if isinstance(value, tuple | list) else []


def differentiable(function: str, inputs: dict) -> list[str]:
    if function in ("pooling_weights", "update_selection_bias"):
        return []
    return [
        path
        for path, x in leaves(inputs).items()
        if x.is_floating_point() and path not in CONSTANTS
    ]


def in_float64(inputs: dict) -> dict:
    """Return the arguments with all floating-point tensors in float64."""
    floats = {path: x for path, x in leaves(inputs).items() if x.is_floating_point()}
    return replaced(inputs, {path: x.detach().double() for path, x in floats.items()})


def run(
    function: str,
    inputs: dict,
    backend: str,
    *,
    wanted: list[str],
    upstream: Callable[[str, Tensor], Tensor | None],
    layout: str = "contiguous",
    checkpointed: bool = False,
) -> dict[str, Tensor]:
    """Call a function. Return its outputs, and the gradient "d <path>" of each path in ``wanted``.

    The gradient of an unused input is all zeros. The call runs on the GPU if there is one. Inputs
    and results are on the CPU.

    ``upstream(name, output)`` returns the gradient of an output, or None for no gradient. The
    gradient is cast to the dtype of the output and has the memory layout ``layout``.
    """
    inputs = replaced(
        inputs,
        {
            path: on_device(x.detach()).requires_grad_(path in wanted)
            for path, x in leaves(inputs).items()
        },
    )
    given = leaves(inputs)

    def call() -> dict[str, Tensor]:
        with mmfused.backend(backend):
            return _outputs(function, inputs)

    outputs = checkpoint(call, use_reentrant=False) if checkpointed else call()
    results = {name: out.detach().cpu() for name, out in outputs.items()}
    upstreams = {name: upstream(name, out) for name, out in outputs.items() if out.requires_grad}
    upstreams = {
        name: on_device(lay_out(value.to(outputs[name].dtype), layout))
        for name, value in upstreams.items()
        if value is not None
    }
    gradients = [None] * len(wanted)
    if upstreams and wanted:
        gradients = torch.autograd.grad(
            [outputs[name] for name in upstreams],
            [given[path] for path in wanted],
            list(upstreams.values()),
            allow_unused=True,
        )
    for path, gradient in zip(wanted, gradients, strict=True):
        results[f"d {path}"] = (
            torch.zeros_like(given[path]).detach() if gradient is None else gradient
        ).cpu()
    return results


def _outputs(function: str, inputs: dict) -> dict[str, Tensor]:
    if function == "update_selection_bias":
        # The function updates the bias in place. Restore the bias for the next call.
        before = inputs["bias"].clone()
        mmfused.update_selection_bias(**inputs)
        after = inputs["bias"].clone()
        inputs["bias"].copy_(before)
        return {"bias": after}
    out = public_functions()[function](**inputs)
    if isinstance(out, Tensor):
        return {"out": out}
    if function == "query_pooling":  # -inf, of a sample without tokens, has no relative error
        return {"out": out[0], "lse": out[1].masked_fill(out[1].isneginf(), 0.0)}
    named = (
        out._asdict()
        if hasattr(out, "_fields")
        else {f"out{i}": part for i, part in enumerate(out)}
    )
    # Omit the tile map "tiles", because some backends do not make one.
    return {name: part for name, part in named.items() if name != "tiles"}


@contextlib.contextmanager
def garbage_in_new_memory():
    """Fill uninitialized tensors of mmfused with NaN, or with integers too large for an index."""

    def filled(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if (
                inspect.currentframe().f_back.f_globals.get("__name__", "").startswith("mmfused")
                and not tensor.is_meta
            ):
                tensor.copy_(garbage(tensor.numel(), tensor.dtype).view(tensor.shape))
            return tensor

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield
