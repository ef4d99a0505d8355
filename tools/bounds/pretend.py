"""Let tensors on the CPU pass for tensors on a GPU.

Python code asks a tensor for its ``device`` and then takes other branches on a CUDA device. Inside
:func:`on_cuda`, tensors say ``cuda:0``, and functions that create tensors there create them on the
CPU. Tensors that are created without a device stay on the host, as do those computed from them.

torch's own C++ code is not deceived. Where it does something else on a GPU, ``_AS_ON_CUDA``
replaces the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward as _RUN_BACKWARD
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_TRUE_DEVICE = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_HOST = "_is_on_host"

# Constructors that copy values from the host.
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)
_TO_HOST = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


def is_on_host(x: Tensor) -> bool:
    """Return whether a tensor would be in the host's memory."""
    return _HOST in x.__dict__


def keep_on_host(values: Any) -> Any:
    """Mark the tensors in ``values`` as tensors in the host's memory, and return ``values``."""
    for x in tree_leaves(values):
        if isinstance(x, Tensor):
            setattr(x, _HOST, True)
    return values


class Pretence:
    """Whether tensors pass for CUDA tensors at the moment."""

    def __init__(self) -> None:
        self.is_paused = False

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


@contextmanager
def on_cuda(arch: int, copied: Callable[[str, Tensor], None]) -> Iterator[Pretence]:
    """Let tensors on the CPU pass for tensors on a GPU.

    Args:
        arch: the GPU's architecture, such as 90.
        copied: called with the name of a function that copies between host and GPU, for which the
            host waits, and the tensor that it copied.
    """
    pretence = Pretence()
    functions = _Functions(pretence, copied)
    gpu = SimpleNamespace(major=arch // 10, minor=arch % 10, name=f"a GPU of sm_{arch}")
    with (
        mock.patch.object(Tensor, "device", property(pretence.device_of), create=True),
        mock.patch.object(Tensor, "is_cuda", property(lambda x: x.device == CUDA), create=True),
        mock.patch.object(Tensor, "is_cpu", property(lambda x: x.device == CPU), create=True),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: gpu),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10)),
        mock.patch.object(torch.autograd, "_engine_run_backward", functions.run_backward),
        functions,
    ):
        yield pretence


class _Functions(TorchFunctionMode):
    """Calls torch's functions with the CPU in place of the GPU."""

    def __init__(self, pretence: Pretence, copied: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.pretence, self.copied = pretence, copied

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.pretence.is_paused or function is torch.device:
            return function(*args, **kwargs)
        if function in _device_constructors():
            return self._created(function, args, kwargs)
        if function in _TO_HOST:
            return self._to_host(function, args, kwargs)
        if function in (Tensor.to, Tensor.cuda):
            return self._moved(function, args, kwargs)
        replaced = _AS_ON_CUDA.get(function, function)
        args, kwargs = tree_map(_without_cuda, (args, kwargs))
        out = replaced(*args, **kwargs)
        if function is Tensor.new_tensor and not is_on_host(args[0]):
            self.copied("new_tensor", out)
        return out

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's engine with this mode on; torch.autograd.grad has turned it off."""
        on = any(mode is self for mode in _get_current_function_mode_stack())
        with nullcontext() if on else self:
            return _RUN_BACKWARD(*args, **kwargs)

    def _created(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = any(isinstance(x, Tensor) and not is_on_host(x) for x in args[:1])
        on_gpu = given or _is_cuda(kwargs.get("device"))
        out = function(*args, **tree_map(_without_cuda, kwargs))
        if not on_gpu:
            return keep_on_host(out)
        vars(out).pop(_HOST, None)
        if function in _FROM_VALUES and not given:
            self.copied(function.__name__, out)
        return out

    def _to_host(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_on_host(args[0]):
            return function(*args, **kwargs)
        self.copied(function.__name__, args[0])
        return keep_on_host(args[0].detach().clone()) if function is Tensor.cpu else function(*args)

    def _moved(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, target = args[0], CUDA if function is Tensor.cuda else _target(args[1:], kwargs)
        args, kwargs = tree_map(_without_cuda, (args, kwargs))
        if target is None or (target == CPU) == is_on_host(x):
            return function(*args, **kwargs)
        with self.pretence.paused():
            out = x.clone() if function is Tensor.cuda else function(*args, **kwargs)
            out = out.clone() if out is x else out
        self.copied("to", out)
        return keep_on_host(out) if target == CPU else out


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that ``Tensor.to`` is asked for, if any: CUDA or CPU."""
    for x in (*args[:1], kwargs.get("device"), kwargs.get("other")):
        if isinstance(x, Tensor):
            return x.device
        if isinstance(x, (torch.device, str)):
            return CUDA if _is_cuda(x) else CPU
    return None


def _without_cuda(x: Any) -> Any:
    """Return the CPU in place of a GPU, and everything else as it is."""
    is_device = isinstance(x, torch.device) or (isinstance(x, str) and x[:4] == "cuda")
    return CPU if is_device and _is_cuda(x) else x


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop out; on a GPU this is one operator."""
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _rms_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Normalise; on a GPU this is one operator."""
    return torch.ops.aten._fused_rms_norm(x, normalized_shape, weight, eps)[0]


_AS_ON_CUDA = {F.dropout: _dropout, F.rms_norm: _rms_norm}
