"""The plumbing of every op, once: registration, device guard, the backend switch, and the checks
all public functions share.

A kernel launcher becomes ``torch.ops.mmfused.<name>`` through :func:`register`; a public function
asks :func:`choose` which of ``reference``, ``composed`` and ``fused`` serves the call; users steer
that with :class:`backend`, :func:`set_backend` or ``MMFUSED_BACKEND``."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator

import torch

from .flops import add_formula
from .switch import Choice, Switch

BACKENDS = ("auto", "reference", "composed", "fused")
ROUTERS = ("triton", "cuda")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # kernels run on CPU tensors: for tests only
# Values are asserted on CUDA and in compiled graphs too: for debugging.
CHECK_ON_DEVICE = {"": False, "0": False, "1": True}.get(os.environ.get("MMFUSED_CHECK", ""))
if CHECK_ON_DEVICE is None:
    raise ValueError(f"MMFUSED_CHECK: got {os.environ['MMFUSED_CHECK']!r}, expected 1, or 0")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


_backend = Switch("backend name", BACKENDS, "MMFUSED_BACKEND", "auto")
_router = Switch("router name", ROUTERS, "MMFUSED_ROUTER", "triton")


class backend(Choice):
    """``with mmfused.backend(name):`` runs ops inside as ``"reference"``, ``"composed"``,
    ``"fused"`` or ``"auto"``.

    ``auto`` takes ``fused`` where the kernels can run (CUDA, sm_80 or newer,
    float32/float16/bfloat16) and ``composed`` elsewhere. Asking for ``fused`` where it cannot run
    makes the op raise ``RuntimeError`` with the reasons.

    ``torch.func`` (``grad``, ``vmap``, ``jvp``, ...) transforms the plain formulas: there ``auto``
    and ``composed`` take ``reference``. What ``torch.export`` makes of ``composed`` has all
    gradients; of ``fused`` it keeps kernels without theirs, which raise where one is wanted. ONNX
    (``dynamo=True``) gets operators of its own alone.

    It holds for this thread and context (asyncio task) alone; elsewhere :func:`set_backend`
    decides. Without ``with`` the call does nothing. A backward uses its forward's backend wherever
    it runs, and so does a recomputation under ``torch.utils.checkpoint(use_reentrant=False)``; with
    ``use_reentrant=True`` enter the ``with`` inside the function."""

    switch = _backend


def set_backend(name: str) -> None:
    """Set the backend of this process, in all threads, where no ``with mmfused.backend(...)`` says
    otherwise.

    At first it is ``MMFUSED_BACKEND``, or ``"auto"``. Raises ``ValueError`` for another name than
    :class:`backend` takes."""
    _backend.set(name)


def current_backend() -> str:
    """The backend asked for here: by :class:`backend`, else by :func:`set_backend` or
    ``MMFUSED_BACKEND``, else ``"auto"``.
    """
    return _backend.current()


class router(Choice):
    """``with router(name):`` routes tokens under backend "fused" by the kernels in ``"triton"`` or
    in ``"cuda"`` (C++).
    """

    switch = _router


def set_router(name: str) -> None:
    """Set the router of this process, as :func:`set_backend` does the backend; at first
    ``MMFUSED_ROUTER``, or ``"triton"``.
    """
    _router.set(name)


def current_router() -> str:
    """The router asked for here: by :class:`router`, else by :func:`set_router` or
    ``MMFUSED_ROUTER``, else ``"triton"``.
    """
    return _router.current()


def why_not_fused(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Every reason why kernels cannot serve tensors of this device and dtype; empty where they can."""
    device = torch.device(device)
    reasons = []
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device.index or 0)  # a constant under torch.compile
        if torch.version.hip is None and gpu.major < 8:
            reasons.append(f"the GPU is sm_{gpu.major}{gpu.minor}, the kernels need sm_80 or newer")
    elif not (device.type == "cpu" and INTERPRETED):
        reasons.append(f"the tensors are on {device.type} and the kernels need CUDA")
    if dtype not in FUSED_DTYPES:
        reasons.append(f"dtype {dtype} is none of float32, float16, bfloat16")
    return reasons


def graph_made() -> str | None:
    """The graph that this call is taken apart for, if any: "export" (torch.export) or "onnx"."""
    # Not is_exporting(): in torch 2.11 the compiler takes it for true, and so a compiled call for
    # an exported one.
    if not torch.compiler._is_exporting_flag:
        return None
    return "onnx" if torch.onnx.is_in_onnx_export() else "export"


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    extra: list[str] | None = None,
    opaque: tuple[str, ...] = (),
) -> str:
    """Which of ``reference``, ``composed``, ``fused`` serves a call: a pure function of device,
    dtype and ``extra``, and of what takes the call apart: torch.func gets the reference.

    ``extra`` holds the op's own reasons against its kernel (an unsupported shape or form).
    ``opaque``: graphs ("export", "onnx") to which the composed path is, which then get the
    reference: of a Function they keep its forward alone, and ONNX has no operator of ours."""
    asked, graph = current_backend(), graph_made()
    transformed = torch._C._are_functorch_transforms_active()
    plain = "reference" if transformed or graph in opaque else "composed"
    if asked in ("reference", "composed"):
        return plain if asked == "composed" else asked
    reasons = why_not_fused(device, dtype) + (extra or [])
    if transformed:
        reasons.append("torch.func transforms the call, and takes plain formulas alone")
    if graph == "onnx":
        reasons.append("ONNX has no such operator")
    interpreted = device.type == "cpu"  # slow, for tests: only when asked for
    if not reasons and (asked == "fused" or not interpreted):
        return "fused"
    if asked == "fused":
        raise RuntimeError(f"{op}: backend 'fused' cannot run here: {'; '.join(reasons)}.")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_once(f"{op} runs {plain!r} instead of 'fused': {'; '.join(reasons)}.")
    return plain


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def define(name: str, schema: str, fake: Callable, flops: Callable[..., int]) -> None:
    """Define ``torch.ops.mmfused.<name>``, not yet what implements it. ``flops``: its formula, as
    :func:`.flops.add_formula` takes it."""
    torch.library.define(f"mmfused::{name}", schema)
    torch.library.register_fake(f"mmfused::{name}", fake)
    add_formula(name, flops)


def register(
    name: str,
    schema: str,
    launcher: Callable,
    fake: Callable,
    flops: Callable[..., int],
) -> None:
    """:func:`define` an operator, and on CUDA call ``launcher``.

    The launcher imports its module of ``mmfused.kernels`` when it is called, so that importing
    mmfused needs no triton. Under ``TRITON_INTERPRET=1`` it serves CPU tensors too, so that tests
    reach the kernels through the public function.
    """

    def call(*args):
        # Within its Function gradients are off.
        if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args)):
            raise RuntimeError(
                f"mmfused::{name}: an exported graph holds the kernel without its gradient; call it "
                "under torch.no_grad(), or export under mmfused.backend('composed')."
            )
        index = next(_tensors(args)).device.index
        if index is None or index == torch.cuda.current_device():
            return launcher(*args)
        with torch.cuda.device(index):  # Triton launches on the current device
            return launcher(*args)

    define(name, schema, fake, flops)
    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        torch.library.impl(f"mmfused::{name}", key, call)


def _tensors(args) -> Iterator[torch.Tensor]:
    """Some ops begin with lists, or with a gradient that may be None."""
    flat = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return (x for x in flat if isinstance(x, torch.Tensor))


def register_composed(
    name: str,
    schema: str,
    function: Callable,
    fake: Callable,
    flops: Callable[..., int],
) -> None:
    """:func:`define`, and call ``function`` on every device: for composed paths whose loops depend
    on data."""
    define(name, schema, fake, flops)
    torch.library.impl(f"mmfused::{name}", "CompositeExplicitAutograd", function)


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator, which raises only where the upstream gradient has a graph; of a bare loss
    it has none, and the gradients would silently be constants. This one raises there too."""
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph=True; the compiler raises by itself
            upstream = [None if x is None else x.detach().requires_grad_() for x in upstream]
        return once(ctx, *upstream)

    return wrapper


def distinct(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The same tensors as different objects: the compiler does not trace a Function that gets one
    twice (keys for both sides).
    """
    out: list[torch.Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in out)
        out.append(tensor.view_as(tensor) if repeated else tensor)
    return out


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse what no backend of ``op`` takes: non-tensors, DTensors, and tensors on more than one
    device.
    """
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name}: got a {type(tensor).__name__}, expected a torch.Tensor")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{op}: {name}: got a DTensor, expected a local tensor: let FSDP gather the module's parameters, or call to_local()"
            )
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first[0]} is on {first[1]}; they must share one device."
            )


def check_numbers(op: str, **numbers: float | None) -> None:
    """Refuse a tensor, whose gradient would be lost, and all else that is no number."""
    for name, number in numbers.items():
        if number is not None and not isinstance(number, int | float):
            raise TypeError(f"{op}: {name}: got a {type(number).__name__}, expected a number")


def check_fractions(op: str, **fractions: float) -> None:
    """Refuse what is no number from 0 to below 1, such as a share of what is dropped."""
    check_numbers(op, **fractions)
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{op}: {name}: got {fraction}, expected a number from 0 to below 1")


def check_value(condition: Callable[[], torch.Tensor], message: str | Callable[[], str]) -> None:
    """Check tensor values: a ``ValueError`` on CPU in eager mode. Elsewhere nothing syncs and no
    assertion ends a CUDA context: the caller sees to it that a value it does not take gives NaN,
    and only ``MMFUSED_CHECK=1`` asserts on the device, for debugging.

    ``message``: a function where a size is in it, for which an exported graph would then hold
    alone."""
    if torch._C._are_functorch_transforms_active():  # under vmap nothing can branch on a value
        return
    holds = condition()
    eager = (
        type(holds) is torch.Tensor and not torch.compiler.is_compiling()
    )  # another type: a compiler traces without saying so
    if holds.device.type == "cpu" and eager:
        if not holds:
            raise ValueError(message if isinstance(message, str) else message())
    elif CHECK_ON_DEVICE:
        torch._assert_async(holds, message if isinstance(message, str) else message())


def nan_unless(lengths: torch.Tensor, length: int, out: torch.Tensor) -> torch.Tensor:
    """``out`` (B, ...), NaN in each sample whose length lies outside [0, N], and so the gradient
    from there: what ``check_value`` let pass."""
    broken = (lengths < 0) | (lengths > length)
    factor = torch.ones(lengths.shape[0], dtype=out.dtype, device=out.device).masked_fill(
        broken, math.nan
    )
    return out * factor.view(-1, *[1] * (out.dim() - 1))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device type, or None outside autocast."""
    autocasts = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocasts else None


def to_autocast(*values: object) -> list:
    """Floating tensors in the dtype that autocast chooses, differentiably; float64, and what is no
    such tensor, as it is.
    """

    def cast(x):
        dtype = (
            autocast_dtype(x.device.type)
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else None
        )
        return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)

    return [cast(x) for x in values]


def wide_unless(dtype: torch.dtype, *values: object) -> list:
    """Floating tensors of another 16-bit type than ``dtype`` in float32: parameters under autocast
    that are rounded later.
    """
    keep = (dtype, torch.float32, torch.float64)
    floats = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in values]
    return [
        x.float() if float_ and x.dtype not in keep else x
        for x, float_ in zip(values, floats, strict=True)
    ]


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context without autocast; unlike torch's own it knows the meta device."""
    return (
        contextlib.nullcontext()
        if autocast_dtype(device_type) is None
        else torch.autocast(device_type, enabled=False)
    )
