r"""Record what a call would launch on a GPU, on a machine without one.

with recorded() as launches:
    out = mmfused.query_pooling(x, q)  # x and q on the CPU
    out.sum().backward()
print(*launches, sep="\n")

The launches are those of the fused path, in order: Triton kernels, and torch's own operators around
and between them. Tensors pass for CUDA tensors (pretend.py), so nothing is counted that only a CPU
does, such as checks of values. By default nothing is computed, and no memory is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import KernelInterface

from mmfused.kernels import recording, tiles

from . import torch_work
from .origin import origin
from .pretend import Pretence, is_on_host, keep_on_host, on_cuda

_CUDA_KEY = torch._C.DispatchKey.CUDA  # type: ignore[attr-defined]
_COMPOSED_KEY = torch._C.DispatchKey.CompositeExplicitAutograd  # type: ignore[attr-defined]
_COMPOSITE_KEY = torch._C.DispatchKey.CompositeImplicitAutograd  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Launch:
    """A launch, or a wait of the host for the GPU.

    Attributes:
        name: the jit function's or the operator's: ``sweep_kernel``, ``index_select``.
        kind: "triton", "torch", or "copy" for a copy between host and GPU.
        flops: of an operator's matrix products; 0 for a kernel.
        bytes: of the tensors that an operator reads and writes, each once; 0 for a kernel.
        waits: whether the host waits for the result.
        computed: whether the results are real, and not zeros.
        shapes: of the operator's tensors: inputs, then outputs; empty for a kernel.
        dtype: of the first of these tensors.
        op: the folder in ``mmfused/ops`` whose code launched it, or "" outside of ops. In a
            backward pass: whose forward made the node of the graph.
        source: the line of this library that launched it, or made the node.
        grid: of a kernel.
        kernel: the kernel with its arguments.
    """

    name: str
    kind: Literal["triton", "torch", "copy"]
    flops: int = 0
    bytes: int = 0
    waits: bool = False
    computed: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: torch.dtype | None = None
    op: str = ""
    source: str = ""
    grid: tuple[int, ...] = ()
    kernel: recording.Launch | None = None


@contextmanager
def recorded(
    *,
    arch: int = 90,
    skip_above: int | None = 0,
    run_kernels: bool = False,
) -> Iterator[list[Launch]]:
    """Record launches, in order, while the block runs.

    Args:
        arch: the architecture of the GPU, such as 90.
        skip_above: an operator of torch is computed if its inputs and outputs have at most this
            many elements together; otherwise its outputs are zeros that take no memory. None:
            everything is computed.
        run_kernels: whether kernels run, on the CPU tensors. The driver of ``tools/ptx`` must be
            active for this, or Triton's interpreter.
    """
    launches: list[Launch] = []
    with ExitStack() as stack:
        copied = lambda name, x: launches.append(_copy(name, x))  # noqa: E731
        # Nodes of the graph remember where they were made; values are not checked.
        stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
        pretence = stack.enter_context(on_cuda(arch, copied))
        if run_kernels:
            stack.enter_context(mock.patch.object(tiles, "pretended_arch", arch))
            made = stack.enter_context(recording.launches_made())
        else:
            made = stack.enter_context(recording.launches_for(arch))
        launch = _noting(launches, made, pretence)
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", launch))
        stack.enter_context(_Operators(launches, pretence, skip_above))
        yield launches


def _copy(name: str, x: Tensor) -> Launch:
    return Launch(
        name,
        "copy",
        bytes=x.nbytes,
        waits=True,
        shapes=(tuple(x.shape),),
        dtype=x.dtype,
        **origin(),
    )


def _noting(
    launches: list[Launch],
    made: list[recording.Launch],
    pretence: Pretence,
) -> Callable[..., Callable[..., None]]:
    """Return a replacement of ``kernel[grid]`` that notes launches in ``launches``.

    The ``kernel[grid]`` that it replaces notes them in ``made``.
    """
    original = KernelInterface.__getitem__

    def get_item(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            with pretence.paused():
                original(kernel, grid)(*args, **named)
            call = made.pop()
            launches.append(Launch(call.name, "triton", grid=grid, kernel=call, **origin()))

        return launch

    return get_item


class _Operators(TorchDispatchMode):
    """Notes torch's operators, and runs those of this library as on a GPU."""

    def __init__(
        self,
        launches: list[Launch],
        pretence: Pretence,
        skip_above: int | None,
    ) -> None:
        super().__init__()
        self.launches, self.pretence, self.skip_above = launches, pretence, skip_above

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.pretence.is_paused:
            return function(*args, **kwargs)
        if function.namespace == "mmfused":
            with self:
                return function._op_dk(_CUDA_KEY, *args, **kwargs)
        if function.has_kernel_for_dispatch_key(_COMPOSITE_KEY):
            with self:
                return function.decompose(*args, **kwargs)
        if function.namespace != "aten":  # such as the profiler's marks
            return function(*args, **kwargs)
        if torch_work.name_of(function) == "lift_fresh":  # a number in the code
            return keep_on_host(function(*args, **kwargs))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if inputs and all(map(is_on_host, inputs)):
            return keep_on_host(function(*args, **kwargs))
        if torch_work.is_view(function):
            return function(*args, **kwargs)
        if torch_work.is_composed(function):
            with self:
                return function._op_dk(_COMPOSED_KEY, *args, **kwargs)
        with self.pretence.paused():  # torch's own code for shapes is Python code too
            out, computed = self._outcome(function, args, kwargs)
        self._note(function, args, kwargs, out, computed)
        return out

    def _outcome(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Return an operator's results, and whether they were computed."""
        if torch_work.is_allocation(function):
            return torch_work.zeros_like_meta(torch_work.on_meta(function, args, kwargs)), False
        if self.skip_above is None or torch_work.waits(function, args):
            return function(*args, **kwargs), True
        if function._schema.is_mutable:
            if torch_work.elements((args, kwargs)) > self.skip_above:
                return torch_work.mutated(function, args, kwargs), False
            return function(*args, **kwargs), True
        out = torch_work.on_meta(function, args, kwargs)
        if torch_work.elements((args, kwargs, out)) > self.skip_above:
            return torch_work.zeros_like_meta(out), False
        return function(*args, **kwargs), True

    def _note(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        computed: bool,
    ) -> None:
        """Append the launch of an operator, unless it has nothing to do."""
        moved = torch_work.bytes_of(function, args, kwargs, out)
        waits = torch_work.waits(function, args)
        results = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not waits and (not moved or (results and not any(results))):
            return
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.launches.append(
            Launch(
                torch_work.name_of(function),
                "torch",
                flops=torch_work.flops_of(function, args, kwargs, out),
                bytes=moved,
                waits=waits,
                computed=computed,
                shapes=tuple(tuple(x.shape) for x in tensors),
                dtype=tensors[0].dtype,
                **origin(),
            )
        )
