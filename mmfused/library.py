"""Backend switch, operator registration and argument checks, shared by all operators.

:func:`operator` registers a function as ``torch.ops.mmfused.<name>``. Public functions call
:func:`choose` to pick the backend ``reference``, ``composed`` or ``fused``. Users control the
choice with :class:`backend`, :func:`set_backend` or the environment variable ``MMFUSED_BACKEND``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import torch

from .flops import add_formula
from .switch import Choice, Switch

Backend = Literal["auto", "reference", "composed", "fused"]
Router = Literal["auto", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ROUTERS: tuple[Router, ...] = get_args(Router)
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# For tests only: kernels run in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# For tests only: kernels run on CPU tensors, in the interpreter or in the machine of tools/ptx.
KERNELS_ON_CPU = INTERPRETED or "MMFUSED_PTX_ARCH" in os.environ
# For debugging: values are asserted on CUDA and in compiled graphs too.
CHECK_ON_DEVICE = os.environ.get("MMFUSED_CHECK", "") == "1"
if os.environ.get("MMFUSED_CHECK", "") not in ("", "0", "1"):
    raise ValueError(f"MMFUSED_CHECK: got {os.environ['MMFUSED_CHECK']!r}, expected 1 or 0")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()
# Whether tensors on device "meta" stand for tensors on a GPU, see recording_launches.
_records: contextvars.ContextVar[bool] = contextvars.ContextVar("_records", default=False)
_Function = TypeVar("_Function", bound=Callable[..., Any])


_backend: Switch[Backend] = Switch("backend name", BACKENDS, "MMFUSED_BACKEND", "auto")
_router: Switch[Router] = Switch("router name", ROUTERS, "MMFUSED_ROUTER", "auto")


class backend(Choice[Backend]):
    """Run operators on one backend: ``with mmfused.backend("composed"):``.

    Args:
        name: "reference", "composed", "fused" or "auto". "auto" picks "fused" if the kernels can
            run (CUDA, sm_80 or newer, float32, float16 or bfloat16), and "composed" otherwise.
            "fused" raises ``RuntimeError`` with the reasons if the kernels cannot run.

    The choice applies inside the ``with`` block, to the current thread and context (asyncio task).
    Elsewhere the default applies, see :func:`set_backend`. Calling ``backend(name)`` without
    ``with`` has no effect. A backward pass runs on the backend of its forward pass, and so does the
    recomputation of ``torch.utils.checkpoint(use_reentrant=False)``. With ``use_reentrant=True``,
    enter the ``with`` inside the checkpointed function.

    ``torch.func`` transforms (``grad``, ``vmap``, ``jvp``, ...) need plain formulas, so "auto" and
    "composed" run "reference" inside such a transform. A graph exported with ``torch.export`` under
    "composed" is differentiable. A graph exported under "fused" contains the kernels without their
    gradients and raises if a gradient is needed. ``torch.onnx.export(dynamo=True)`` produces
    standard ONNX operators only.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> import torch, mmfused
        >>> pool, tokens = mmfused.QueryPooling(16, num_queries=2), torch.randn(3, 10, 16)
        >>> pooled = pool(tokens)
        >>> with mmfused.backend("reference"):
        ...     exact = pool(tokens)
        >>> torch.allclose(pooled, exact, atol=1e-5)
        True
        >>> with mmfused.backend("fused"):  # float64 has no kernel: no silent fallback
        ...     pool.double()(tokens.double())
        Traceback (most recent call last):
            ...
        RuntimeError: query_pooling: backend 'fused' cannot run here: ...
    """

    switch = _backend


def set_backend(name: Backend) -> None:
    """Set the default backend of this process, for all threads.

    ``with mmfused.backend(...)`` overrides the default. The initial default is the value of the
    environment variable ``MMFUSED_BACKEND``, or "auto".

    Args:
        name: "reference", "composed", "fused" or "auto", see :class:`backend`.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> import mmfused
        >>> mmfused.set_backend("composed")  # no kernels, for example to debug
        >>> mmfused.set_backend("auto")
        >>> mmfused.set_backend("triton")
        Traceback (most recent call last):
            ...
        ValueError: backend name: got 'triton', expected one of auto, reference, composed, fused
    """
    _backend.set(name)


def current_backend() -> Backend:
    """Return the backend in effect: that of the innermost ``with``, or the default."""
    return _backend.current()


class router(Choice[Router]):
    """Pick the routing kernels of backend "fused": ``with router("cuda"):``.

    Args:
        name: "triton", "cuda" for the kernels written in CUDA C++, or "auto": those that ``mmfused
            tune`` has found faster on this GPU, or else "triton".

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> import torch, mmfused
        >>> from mmfused.library import router
        >>> with router("cuda"):  # has an effect on a GPU only
        ...     routing = mmfused.topk_routing(torch.randn(10, 4), 2)
        >>> routing.indices.shape
        torch.Size([10, 2])
    """

    switch = _router


def set_router(name: Router) -> None:
    """Set the default router of this process; initially ``MMFUSED_ROUTER``, or "auto".

    Args:
        name: "auto", "triton" or "cuda", see :class:`router`.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> from mmfused.library import set_router
        >>> set_router("cuda")
        >>> set_router("auto")
    """
    _router.set(name)


def current_router() -> Router:
    """Return the router in effect: that of the innermost ``with``, or the default."""
    return _router.current()


def why_not_fused(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Return all reasons why the kernels cannot run on this device and dtype, or an empty list.

    Examples:
        >>> import torch
        >>> from mmfused.library import why_not_fused
        >>> why_not_fused("cpu", torch.float64)[-1]
        'dtype torch.float64 is not float32, float16 or bfloat16'
    """
    device = torch.device(device)
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    if device.type == "cuda" and torch.version.hip is not None:
        # Options of the launches, such as maxnreg, do not exist in Triton's AMD backend.
        reasons.append("this build of torch is for ROCm and the kernels need CUDA")
    elif device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device.index or 0)  # a constant under torch.compile
        if gpu.major < 8:
            reasons.append(f"the GPU is sm_{gpu.major}{gpu.minor}, the kernels need sm_80 or newer")
    elif not (device.type == "cpu" and KERNELS_ON_CPU) and not _stands_for_cuda(device.type):
        reasons.append(f"the tensors are on {device.type} and the kernels need CUDA")
    if dtype not in FUSED_DTYPES:
        reasons.append(f"dtype {dtype} is not float32, float16 or bfloat16")
    return reasons


@contextlib.contextmanager
def recording_launches() -> Iterator[None]:
    """Let tensors on device "meta" stand for tensors on a GPU, in this thread and context.

    Backends and autocast are chosen as on a GPU. The caller must replace the operators, which have
    no kernel for meta tensors: see :mod:`mmfused.warmup.on_meta`.
    """
    token = _records.set(True)
    try:
        yield
    finally:
        _records.reset(token)


def _stands_for_cuda(device_type: str) -> bool:
    return device_type == "meta" and _records.get()


def active_exporter() -> Literal["export", "onnx"] | None:
    """Return the exporter that is tracing this call: "export" (torch.export), "onnx", or None."""
    # Not is_exporting(), which in torch 2.11 is true under torch.compile too.
    if not torch.compiler._is_exporting_flag:
        return None
    return "onnx" if torch.onnx.is_in_onnx_export() else "export"


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    extra: list[str] | None = None,
    opaque: tuple[str, ...] = (),
) -> Literal["reference", "composed", "fused"]:
    """Pick the backend of one call of ``op``.

    The result depends on the requested backend, on the arguments below, and on whether torch.func,
    torch.export or ONNX export is active. It does not depend on tensor values.

    Args:
        op: name of the operator, for messages.
        device, dtype: device and dtype of the operator's tensors.
        extra: reasons why this operator's kernel cannot run, such as an unsupported shape.
        opaque: exporters ("export", "onnx") that cannot represent the composed path, because that
            path contains an autograd function or an operator of this library. Under such an
            exporter "reference" replaces "composed".

    Raises ``RuntimeError`` if "fused" was requested and cannot run.
    """
    asked, graph = current_backend(), active_exporter()
    transformed = torch._C._are_functorch_transforms_active()
    plain = "reference" if transformed or graph in opaque else "composed"
    if asked in ("reference", "composed"):
        return plain if asked == "composed" else asked
    reasons = why_not_fused(device, dtype) + (extra or [])
    if transformed:
        reasons.append("torch.func transforms need plain formulas")
    if graph == "onnx":
        reasons.append("ONNX has no such operator")
    on_cpu = device.type == "cpu"  # slow, so only on request
    if not reasons and (asked == "fused" or not on_cpu):
        return "fused"
    if asked == "fused":
        raise RuntimeError(f"{op}: backend 'fused' cannot run here: {'; '.join(reasons)}")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_once(f"{op} runs {plain!r} instead of 'fused': {'; '.join(reasons)}")
    return plain


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define ``torch.ops.mmfused.<name>`` without an implementation.

    Args:
        name, schema: as for ``torch.library.define``.
        fake: returns empty outputs of the right shapes and dtypes.
        flops: FLOP formula, see :func:`mmfused.flops.add_formula`.
    """
    torch.library.define(f"mmfused::{name}", schema)
    torch.library.register_fake(f"mmfused::{name}", fake)
    add_formula(name, flops)


def operator(
    schema: str,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    *,
    devices: Literal["cuda", "all"] = "cuda",
) -> Callable[[_Function], _Function]:
    """Register a function as ``torch.ops.mmfused.<its name>``, and return that operator.

    Args:
        schema, fake, flops: as for :func:`define`.
        devices: device types that the function supports. "cuda" is for kernels; under
            ``KERNELS_ON_CPU`` such an operator also runs on CPU tensors, so that tests reach
            the kernels through the public functions. "all" is for composed paths with
            data-dependent loops, which torch.compile cannot trace.

    A function that launches kernels must import the kernels in its body, so that importing mmfused
    does not need Triton, and must call its launcher under :func:`launching`.
    """
    keys = {"cuda": ["CUDA", "CPU"] if KERNELS_ON_CPU else ["CUDA"]}
    keys["all"] = ["CompositeExplicitAutograd"]

    def decorate(function: _Function) -> _Function:
        name = function.__name__
        define(name, schema, fake, flops)
        for key in keys[devices]:
            torch.library.impl(f"mmfused::{name}", key, function)
        return getattr(torch.ops.mmfused, name)

    return decorate


def launching(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that makes the device of the first tensor in ``args`` current.

    Triton launches on the current device. Raises ``RuntimeError`` if a gradient is needed in an
    exported graph, which contains the kernel without its autograd function.
    """
    # The autograd functions of this library call operators with gradients disabled.
    if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args)):
        raise RuntimeError(
            "mmfused: an exported graph holds the kernel without its gradient; "
            "run it under torch.no_grad(), or export under mmfused.backend('composed')"
        )
    index = next(_tensors(args)).device.index
    if index is None or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments, and in lists and tuples among the arguments."""
    flat = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return (x for x in flat if isinstance(x, torch.Tensor))


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make second derivatives raise, even where torch's decorator of the same name does not.

    torch's decorator raises only if the upstream gradient requires grad. If backward starts at the
    output itself, the upstream gradient does not require grad, and second derivatives would
    silently be missing.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        # Gradients are enabled under create_graph=True. torch.compile raises by itself there.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            upstream = [None if x is None else x.detach().requires_grad_() for x in upstream]
        return once(ctx, *upstream)

    return wrapper


def distinct(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return the tensors, with a view in place of each repeated tensor.

    torch.compile cannot trace an autograd function that gets the same tensor twice, such as one key
    tensor for both queries and candidates.
    """
    out: list[torch.Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in out):
            tensor = tensor.view_as(tensor)
        out.append(tensor)
    return out


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that the arguments are tensors on one device and not DTensors; None is skipped."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name}: got a {type(tensor).__name__}, expected a torch.Tensor")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{op}: {name}: got a DTensor, expected a local tensor: let FSDP gather the "
                "module's parameters, or call to_local()"
            )
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {name}: got a tensor on {tensor.device}, "
                f"expected {first[1]}, where {first[0]} is"
            )


def check_numbers(op: str, **numbers: float | None) -> None:
    """Check that the arguments are numbers or None. Tensors are rejected."""
    for name, number in numbers.items():
        if number is not None and not isinstance(number, int | float):
            raise TypeError(f"{op}: {name}: got a {type(number).__name__}, expected a number")


def check_fractions(op: str, **fractions: float) -> None:
    """Check that the arguments, such as a dropout probability, are in [0, 1)."""
    check_numbers(op, **fractions)
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{op}: {name}: got {fraction}, expected a number from 0 to below 1")


def check_value(
    values: torch.Tensor,
    condition: Callable[[torch.Tensor], torch.Tensor],
    message: str | Callable[[], str],
) -> None:
    """Raise ``ValueError`` if tensor values are invalid, on a CPU in eager mode only.

    Raising on CUDA would need a synchronisation, so there the condition is not even computed. On
    CUDA and in compiled graphs, callers turn invalid values into NaN. ``MMFUSED_CHECK=1`` also
    asserts on the device, for debugging.

    Args:
        values: the tensor.
        condition: returns a bool scalar for ``values``, True if they are valid.
        message: the error message, or a function that returns it. A message that contains a size
            needs a function; otherwise the size would become a constant of an exported graph.
    """
    if torch._C._are_functorch_transforms_active():  # vmap cannot branch on a value
        return
    if values.device.type != "cpu" and not CHECK_ON_DEVICE:
        return
    holds = condition(values)
    # A tensor subclass means that a compiler is tracing although is_compiling() returns False.
    eager = type(holds) is torch.Tensor and not torch.compiler.is_compiling()
    if holds.device.type == "cpu" and eager:
        if not holds:
            raise ValueError(message if isinstance(message, str) else message())
    elif CHECK_ON_DEVICE:
        text = message if isinstance(message, str) else message()
        torch._assert_async(holds, text)  # pyright: ignore[reportPrivateImportUsage]


def nan_unless(lengths: torch.Tensor, length: int, out: torch.Tensor) -> torch.Tensor:
    """Return ``out`` (B, ...) with NaN for each sample whose length is outside [0, ``length``].

    The gradients of such a sample become NaN too. This is for invalid lengths on devices where
    :func:`check_value` cannot raise.
    """
    broken = (lengths < 0) | (lengths > length)
    ones = torch.ones(lengths.shape[0], dtype=out.dtype, device=out.device)
    factor = ones.masked_fill(broken, math.nan)
    return out * factor.view(-1, *[1] * (out.dim() - 1))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype of autocast on this device type, or None outside of autocast."""
    if _stands_for_cuda(device_type):
        device_type = "cuda"
    autocasts = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocasts else None


def to_autocast(*values: Any) -> list[Any]:
    """Cast floating tensors to the dtype of autocast, differentiably.

    float64 tensors and values of other types are returned as they are.
    """

    def cast(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        dtype = autocast_dtype(x.device.type)
        return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)

    return [cast(x) for x in values]


def wide_unless(dtype: torch.dtype, *values: Any) -> list[Any]:
    """Cast floating tensors to float32 unless they have ``dtype``, float32 or float64.

    Under autocast this is for parameters that are rounded to ``dtype`` later.
    """
    kept_dtypes = (dtype, torch.float32, torch.float64)

    def widened(x):
        is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.float() if is_float and x.dtype not in kept_dtypes else x

    return [widened(x) for x in values]


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager that disables autocast; ``device_type`` may be "meta"."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast("cuda" if device_type == "meta" else device_type, enabled=False)
