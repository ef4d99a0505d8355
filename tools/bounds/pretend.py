"""Let tensors on the CPU pass for tensors on a GPU.

Python code asks a tensor for its ``device`` and then takes other branches on a CUDA device. Inside
:func:`on_cuda`, tensors say ``cuda:0``, and functions that create tensors there create them on the
CPU. Tensors that are created without a device stay on the host, as do those computed from them.

torch's own C++ code is not deceived. Where it does something else on a GPU, ``_AS_ON_CUDA``
replaces the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_TRUE_DEVICE = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_HOST = "_is_on_host"

_FROM_VALUES = ("as_tensor", "asarray", "scalar_tensor", "tensor")  # numbers of the host
_CONSTRUCTORS = (
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tril_indices", "triu_indices", "zeros"),
    *_FROM_VALUES,
)
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")


def is_on_host(x: Tensor) -> bool:
    """Return whether a tensor would be in the host's memory."""
    return _HOST in x.__dict__


def keep_on_host(values: Any) -> Any:
    """Mark the tensors in ``values`` as tensors in the host's memory, and return ``values``."""
    for x in tree_leaves(values):
        if isinstance(x, Tensor):
            setattr(x, _HOST, True)
    return values


def put_on_gpu(x: Tensor) -> Tensor:
    """Remove the mark of :func:`keep_on_host`."""
    vars(x).pop(_HOST, None)
    return x


@contextmanager
def on_cuda(arch: int, copied: Callable[[str, Tensor], None]) -> Iterator[Pretence]:
    """Let tensors on the CPU pass for tensors on a GPU.

    Args:
        arch: the GPU's architecture, such as 90.
        copied: called with the name of a function that copies between host and GPU, for which the
            host waits, and the tensor that it copied.
    """
    pretence = Pretence(copied)
    gpu = SimpleNamespace(major=arch // 10, minor=arch % 10, name=f"a GPU of sm_{arch}")
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        put(Tensor, "device", property(pretence.device_of))
        put(Tensor, "is_cuda", property(lambda x: x.device == CUDA))
        put(Tensor, "is_cpu", property(lambda x: x.device == CPU))
        put(torch.cuda, "current_device", lambda: 0)
        put(torch.cuda, "get_device_properties", lambda device: gpu)
        put(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
        replacements = {(torch, name): pretence.constructor for name in _CONSTRUCTORS}
        replacements |= {(torch, name): pretence.without_cuda for name in _LIKE}
        replacements |= {(Tensor, name): pretence.without_cuda for name in _NEW}
        replacements |= {(Tensor, name): pretence.to_host for name in ("cpu", "numpy", "tolist")}
        replacements |= {(Tensor, name): pretence.moved for name in ("to", "cuda")}
        replacements |= {(Tensor, "new_tensor"): pretence.from_values}
        replacements |= {(torch._C, "_group_tensors_by_device_and_dtype"): pretence.grouped}
        replacements |= {key: pretence.as_on_cuda for key in _AS_ON_CUDA}
        for (owner, name), replacement in replacements.items():
            put(owner, name, replacement(name, getattr(owner, name)))
        yield pretence


class Pretence:
    """Replacements of functions of torch, while tensors pass for CUDA tensors."""

    def __init__(self, copied: Callable[[str, Tensor], None]) -> None:
        self.copied, self.is_paused = copied, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Say the truth for a while."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def device_of(self, x: Tensor) -> torch.device:
        """Return the device that a tensor says it is on."""
        true = _TRUE_DEVICE(x)
        return true if self.is_paused or true != CPU or is_on_host(x) else CUDA

    def unless_paused(self, original: Any, replacement: Any) -> Any:
        """Return a function that does as ``replacement``, and as ``original`` while paused."""

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return (original if self.is_paused else replacement)(*args, **kwargs)

        return function

    def without_cuda(self, name: str, original: Any) -> Any:
        """Replace a function by one that creates its result on the CPU."""
        return self.unless_paused(original, lambda *a, **k: original(*a, **_without_cuda(k)))

    def constructor(self, name: str, original: Any) -> Any:
        """Replace a function whose result is on the host, unless a device is given."""

        def create(*args: Any, **kwargs: Any) -> Tensor:
            given = any(isinstance(x, Tensor) and not is_on_host(x) for x in args[:1])
            device = kwargs.get("device") or _default_device()
            if not given and not _is_cuda(device):
                with self.paused():
                    return keep_on_host(original(*args, **kwargs))
            if device is not None:
                kwargs |= {"device": CPU}
            out = original(*args, **kwargs)
            put_on_gpu(out)
            if name in _FROM_VALUES and not given:
                self.copied(name, out)
            return out

        return self.unless_paused(original, create)

    def from_values(self, name: str, original: Any) -> Any:
        """Replace a method that copies values from the host to the tensor's device."""

        def copy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = original(x, *args, **_without_cuda(kwargs))
            if is_on_host(x):
                return keep_on_host(out)
            put_on_gpu(out)
            self.copied(name, out)
            return out

        return self.unless_paused(original, copy)

    def to_host(self, name: str, original: Any) -> Any:
        """Replace a method that copies a tensor to the host."""

        def copy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not is_on_host(x):
                self.copied(name, x)
            with self.paused():
                return original(x, *args, **kwargs) if name != "cpu" else keep_on_host(x.clone())

        return self.unless_paused(original, copy)

    def moved(self, name: str, original: Any) -> Any:
        """Replace ``Tensor.to`` or ``Tensor.cuda``."""

        def move(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            target = CUDA if name == "cuda" else _target(args, kwargs)
            args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
            kwargs = _without_cuda(kwargs)
            if target is None or (target == CPU) == is_on_host(x):
                return x if name == "cuda" else original(x, *args, **kwargs)
            with self.paused():
                out = x.clone() if name == "cuda" else original(x, *args, **kwargs)
                out = out.clone() if out is x else out
            self.copied(name, out)
            return keep_on_host(out) if target == CPU else out

        return self.unless_paused(original, move)

    def grouped(self, name: str, original: Any) -> Any:
        """Replace a function of the optimizers, which groups tensors by their true device."""

        def group(*args: Any, **kwargs: Any) -> dict[Any, Any]:
            groups = original(*args, **kwargs)
            return {(CUDA, dtype): group for (_, dtype), group in groups.items()}

        return self.unless_paused(original, group)

    def as_on_cuda(self, name: str, original: Any) -> Any:
        """Replace a function of torch.nn.functional that runs other operators on a GPU."""
        return self.unless_paused(original, functools.partial(_AS_ON_CUDA[F, name], original))


def _default_device() -> torch.device | None:
    """Return the device of the innermost ``with torch.device(...)``."""
    modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]
    return modes[-1].device if modes else None


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (torch.device, str)) and str(device).startswith("cuda")


def _without_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the CPU in place of a GPU."""
    return kwargs | {"device": CPU} if _is_cuda(kwargs.get("device")) else kwargs


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that ``Tensor.to`` is asked for, if any: CUDA or CPU."""
    for x in (*args[:1], kwargs.get("device"), kwargs.get("other")):
        if isinstance(x, Tensor):
            return x.device
        if isinstance(x, (torch.device, str)):
            return CUDA if _is_cuda(x) else CPU
    return None


def _dropout(
    original: Any,
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not training or not 0 < p < 1 or inplace:
        return original(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _one_hot(original: Any, x: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes == -1:  # the largest value decides
        return original(x, num_classes)
    return x.new_zeros(*x.shape, num_classes).scatter_(-1, x.unsqueeze(-1), 1)


_AS_ON_CUDA = {
    (F, "dropout"): _dropout,
    (F, "one_hot"): _one_hot,
}
