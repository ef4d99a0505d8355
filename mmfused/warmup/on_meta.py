"""Run a training step on meta tensors as it would run on a GPU, to record its launches.

A meta tensor has a shape and a dtype, and no memory. On such tensors Python code takes the same
branches as on a GPU, up to those that ask for the device or for values. What differs is replaced
here, while :func:`as_on_gpu` is active:

* the operators of this library run their launchers, whose launches the caller records;
* autocast, which torch applies to no meta tensor, is applied to torch's operators;
* tensors that the step makes on a GPU are made on "meta", and tensors that it holds elsewhere are
  replaced by meta tensors where they meet one;
* values that the step was given, such as masks and lengths, and what follows from them alone, are
  known on the host, so that code that reads them takes the right branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import distributed
from ..library import autocast_dtype, recording_launches
from .steps import EXPECTED_MODULES

_CUDA_KEY = torch._C.DispatchKey.CUDA  # type: ignore[attr-defined]
_IMPLICIT_KEY = torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]

# The operators that autocast on CUDA runs in its dtype, and in float32. Backward formulas run
# without autocast; where they meet these operators, the engine casts the gradients back.
_IN_LOW = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "linear"),
    *("convolution", "prelu", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable"),
}
_IN_FLOAT32 = {
    *("native_layer_norm", "native_group_norm", "_softmax", "_log_softmax", "softplus", "log"),
    *("log10", "log1p", "log2", "exp", "expm1", "pow", "reciprocal", "rsqrt", "cosh", "sinh"),
    *("tan", "acos", "asin", "erfinv", "sum", "prod", "cumsum", "cumprod", "norm", "renorm"),
    *("linalg_vector_norm", "cdist", "_cdist_forward", "nll_loss_forward", "nll_loss2d_forward"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div"),
    *("binary_cross_entropy_with_logits", "poisson_nll_loss", "multi_margin_loss"),
}
# Those that compare the dtypes of their arguments before any operator runs.
_FUNCTIONS_IN_LOW = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, F.scaled_dot_product_attention, F.bilinear),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, F.linear),
}
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)
_COLLECTIVES = (
    (distributed, "gather_into"),
    (distributed, "_reduce_scatter_into"),
    (distributed.dist, "all_reduce"),
)


@contextlib.contextmanager
def as_on_gpu(arch: int) -> Iterator[None]:
    """Run operators on meta tensors as on a GPU.

    Args:
        arch: the GPU's architecture, such as 90. Without a GPU, code that asks whether there is one
            is told that there is one of this architecture.
    """
    has_gpu = torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements(None if has_gpu else arch):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(recording_launches())
        stack.enter_context(_callers_autocast())
        functions = stack.enter_context(_Functions())
        stack.enter_context(_Operators(functions))
        stack.callback(_VALUES.clear)
        yield


def twin_of(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a meta tensor like ``x`` that is a leaf, and a Parameter if ``x`` is one."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
    if x.storage_offset():  # which may not be divisible by 16
        whole = x.storage_offset() + out.untyped_storage().nbytes() // out.itemsize
        whole = torch.empty(whole, dtype=out.dtype, device="meta")
        out.set_(whole.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    needs = x.requires_grad and (x.is_floating_point() or x.is_complex())
    if isinstance(x, nn.Parameter):
        return nn.Parameter(out, requires_grad=needs)
    return out.requires_grad_(needs)


def known_twin_of(x: Tensor) -> Tensor:
    """Return :func:`twin_of` a tensor, whose values code may read if it holds no floats."""
    is_float = x.is_floating_point() or x.is_complex()
    if is_float or x.is_meta or x.numel() > _KNOWN:
        return twin_of(x)
    return _keep(x.detach().cpu().clone())


class _Operators(TorchDispatchMode):
    """Runs torch's operators on meta tensors, and those of this library with their launchers."""

    def __init__(self, functions: _Functions) -> None:
        super().__init__()
        self.functions = functions
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that it lives on

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function.has_kernel_for_dispatch_key(_IMPLICIT_KEY):  # in inference mode
            with self:
                return function.decompose(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        on_gpu = device is not None and torch.device(device).type in ("cuda", "meta")
        if not on_gpu and not any(x.is_meta for x in inputs):
            return function(*args, **kwargs)  # on the host, such as a number in the code
        if on_gpu:
            kwargs["device"] = torch.device("meta")
        args, kwargs = tree_map(self._on_meta, (args, kwargs))
        if function.namespace == "mmfused" and _is_launcher(function):
            return function._op_dk(_CUDA_KEY, *args, **kwargs)
        if function.namespace == "aten":
            if function._schema.name in _INDEXED:
                args = (args[0], _without_masks(args[1]), *args[2:])
            values = _values_of(function, args, kwargs)
            if values is not None:
                return values
            if self.functions.autocast is not None:
                args, kwargs = _autocast(function, args, kwargs, self.functions.autocast)
            _check_dtypes(function, args)
        return function(*args, **kwargs)

    def _on_meta(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_meta:
            return x
        if x.requires_grad:
            raise ValueError(
                f"step: got a tensor of shape {tuple(x.shape)} that requires a gradient and is not "
                f"in a module that the step reaches, {EXPECTED_MODULES}"
            )
        if id(x) not in self.twins:
            self.twins[id(x)] = (x, known_twin_of(x))
        return self.twins[id(x)][1]


# ---- known values --------------------------------------------------------------------------------

_KNOWN = 1 << 22  # the most elements of a tensor whose values are known
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# By the storage of the meta tensor: the storage, so that it lives on, and the values.
_VALUES: dict[int, tuple[Any, Tensor]] = {}


def _values_of(function: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operator returns if all values in its inputs are known, or None.

    Without inputs, integers such as those of ``arange`` are known, but no random ones.
    """
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    are_known = all(x.untyped_storage()._cdata in _VALUES for x in inputs)
    is_random = torch.Tag.nondeterministic_seeded in function.tags
    if not are_known or is_random or "empty" in function._schema.name:
        _forget_written(function, args, kwargs)
        return None
    if not function._schema.is_mutable:
        too_large = _without_values(function, args, kwargs, may_be_float=bool(inputs))
        if too_large is not None:
            return too_large

    def known(x: Any) -> Any:
        return _VALUES[x.untyped_storage()._cdata][1] if isinstance(x, Tensor) else x

    known_args, known_kwargs = tree_map(known, (args, kwargs))
    device = known_kwargs.get("device")
    if device is not None:
        known_kwargs["device"] = torch.device("cpu")
    out = function(*known_args, **known_kwargs)
    if device is not None and torch.device(device).type == "cpu":
        return out
    if function._schema.is_mutable:  # the meta tensor is the result too
        return function(*args, **kwargs)
    return tree_map(lambda x: _keep(x) if isinstance(x, Tensor) else x, out)


def _without_masks(indices: Any) -> list[Any]:
    """Return indices with integers in place of known masks, which have shapes on "meta" too."""
    found: list[Any] = []
    for x in indices:
        held = _VALUES.get(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None
        if held is not None and held[1].dtype == torch.bool:
            found += map(_keep, held[1].nonzero().unbind(1))
        else:
            found.append(x)
    return found


def _without_values(function: Any, args: Any, kwargs: Any, may_be_float: bool) -> Any:
    """Return meta tensors without values if values would take much memory, else None."""
    try:
        made = function(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # the shape depends on the values
        return None
    tensors = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
    if all(x.numel() <= _KNOWN and (may_be_float or not x.is_floating_point()) for x in tensors):
        return None
    # A view would share the storage, and so the values, of its base.
    return tree_map(lambda x: twin_of(x) if isinstance(x, Tensor) else x, made)


def _forget_written(function: Any, args: Any, kwargs: Any) -> None:
    """Forget the values of the tensors that an operator writes, and of views of these."""
    for place, argument in enumerate(function._schema.arguments):
        x = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            for written in tree_leaves(x):
                if isinstance(written, Tensor):
                    _forget(written)


def _forget(x: Tensor) -> None:
    held = _VALUES.get(x.untyped_storage()._cdata)
    if held is None:
        return
    memory = held[1].untyped_storage()._cdata
    for key, (_, values) in list(_VALUES.items()):
        if values.untyped_storage()._cdata == memory:
            del _VALUES[key]


def _keep(values: Tensor) -> Tensor:
    """Return a meta tensor whose values are known."""
    twin = twin_of(values)
    _VALUES[twin.untyped_storage()._cdata] = (twin.untyped_storage(), values)
    return twin


# ---- replacements --------------------------------------------------------------------------------


def _is_launcher(function: Any) -> bool:
    """Return whether an operator of this library is Python code that launches kernels.

    The operators of the router in CUDA C++ are not, and the composed ones run on any device.
    """
    name = function._schema.name
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    return has_kernel and "_cuda_" not in name


def _autocast(function: Any, args: Any, kwargs: Any, low: torch.dtype) -> tuple[Any, Any]:
    """Return the arguments as autocast on CUDA with the dtype ``low`` casts them."""
    name = function._schema.name.removeprefix("aten::")
    if name in _IN_LOW:
        return _cast(low, args, kwargs)
    return _cast(torch.float32, args, kwargs) if name in _IN_FLOAT32 else (args, kwargs)


def _check_dtypes(function: Any, args: Any) -> None:
    """Raise an error if a product has factors of two dtypes, which torch lets pass on "meta"."""
    name = function._schema.name.removeprefix("aten::")
    tensors = (x for x in tree_leaves(args) if isinstance(x, Tensor))
    found = {x.dtype: None for x in tensors if x.is_floating_point()}
    if name in _IN_LOW and len(found) > 1:
        dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in found)
        raise RuntimeError(f"{name} got {dtypes}, expected one dtype")


def _cast(dtype: torch.dtype, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with floating tensors in ``dtype``, except in float64."""

    def cast(x: Any) -> Any:
        is_cast = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if is_cast else x

    return tree_map(cast, (args, kwargs))


class _Functions(TorchFunctionMode):
    """Replaces devices "cuda" in calls, before torch looks for a GPU, and keeps given values.

    It also notes autocast, which torch hides from the operators below a function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None  # its dtype in the function that runs

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before, self.autocast = self.autocast, autocast_dtype("cuda")
        try:
            args, kwargs = tree_map(_without_cuda, (args, dict(kwargs or {})))
            if self.autocast is not None and function in _FUNCTIONS_IN_LOW:
                args, kwargs = _cast(self.autocast, args, kwargs)
            return _called(function, args, kwargs)
        finally:
            self.autocast = before


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function; "meta" stands for a GPU, but values are kept where torch would drop them."""
    if function is Tensor.cuda:
        return args[0].to("meta")
    if function in _FROM_VALUES:
        device = kwargs.pop("device", None)
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)
    if function is Tensor.new_tensor and args[0].is_meta:
        kwargs = {"dtype": args[0].dtype, "device": "meta", **kwargs}
        device, needs_gradient = kwargs.pop("device"), kwargs.pop("requires_grad", False)
        return torch.tensor(*args[1:], **kwargs).to(device).requires_grad_(needs_gradient)
    return function(*args, **kwargs)


def _without_cuda(x: Any) -> Any:
    is_device = isinstance(x, (str, torch.device)) and str(x).split(":")[0] == "cuda"
    return torch.device("meta") if is_device else x


def _callers_autocast() -> contextlib.AbstractContextManager[Any]:
    """Return autocast on CUDA if the caller's autocast is that of a CPU."""
    if torch.is_autocast_enabled("cuda") or not torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cpu"))


def _replacements(arch: int | None) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced: an object, the name of its attribute, and the new value.

    Args:
        arch: on a machine without a GPU, the architecture of the one to pretend.
    """
    if distributed.in_group():
        world = distributed.dist.get_world_size()
        yield distributed, "_exchange", lambda *_, sizes, **__: [sizes] * world
        for owner, name in _COLLECTIVES:  # of tensors without values; all write in place
            yield owner, name, lambda *_, **__: None
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield torch, name, _for_meta(getattr(torch, name))
    # For gradient checkpointing, which asks for autocast on the device of its tensors.
    yield torch.amp, "is_autocast_available", _for_meta(torch.amp.is_autocast_available)
    autocast = torch.amp.autocast_mode.autocast
    yield autocast, "__init__", _for_meta(autocast.__init__, place=1)
    if arch is None:
        return
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "is_bf16_supported", lambda *_, **__: True
    yield torch.cuda, "get_device_capability", lambda *_, **__: divmod(arch, 10)
    yield torch.cuda, "synchronize", lambda *_, **__: None


def _for_meta(original: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
    """Return a function of a device type, at ``place``, for which "meta" means "cuda"."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if args[place:] and args[place] == "meta":
            args = (*args[:place], "cuda", *args[place + 1 :])
        if kwargs.get("device_type") == "meta":
            kwargs["device_type"] = "cuda"
        return original(*args, **kwargs)

    return function
