"""Trace a module to the graphs of its forward and backward, without computing and without a GPU.

The tensors are fake. They are on the CPU, because torch's autograd needs a driver for CUDA tensors.
What torch would do differently on CUDA is done here: attention is one operator, and autocast runs
norms and softmaxes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ... import children

aten = torch.ops.aten
FLASH_HEAD_DIM = 256  # largest head_dim of flash attention; above, torch uses another kernel
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
# Functions that autocast runs in float32 on CUDA, but not on a CPU.
# Source: docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32"
WIDE = {
    F.layer_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    torch.sum,
    Tensor.sum,
}


class Graphs(NamedTuple):
    """The operators of both passes; each node has its fake result in ``meta["val"]``."""

    forward: fx.Graph
    backward: fx.Graph


def fake() -> FakeTensorMode:
    """Return a mode in which tensors have no data; real tensors become fake in it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(
    module: nn.Module,
    inputs: Iterable[Tensor],
    compiled: bool,
    setting: Callable[[], AbstractContextManager[Any]],
) -> Graphs:
    """Return the graphs of ``module(*inputs)`` and of the gradients of inputs and parameters.

    Call it in the mode :func:`fake`. ``compiled``: the operators and the saved tensors are those
    of torch.compile, else those of eager calls. ``setting`` gives the context of a call.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves = [fake_like(x) for x in named.values()]
    found: list[fx.Graph] = []

    def call(*tensors: Tensor) -> Tensor:
        state = dict(zip(named, tensors, strict=False))
        with ExitStack() as stack:
            for change in patches(compiled):
                stack.enter_context(change)
            stack.enter_context(setting())
            return torch.func.functional_call(module, state, tensors[len(named) :])

    def keep(graph: fx.GraphModule, _: Any) -> Callable:
        found.append(graph.graph)
        return make_boxed_func(graph)

    traced = aot_function(
        call,
        keep,
        keep,
        partition_fn=min_cut_rematerialization_partition if compiled else default_partition,
        decompositions=compiled_decompositions() if compiled else {},
    )
    out = traced(*leaves, *(fake_like(x) for x in inputs))
    if len(found) < 2:  # torch compiles the backward before its first call, or in it
        out.backward(torch.empty_like(out))
    return Graphs(*found)


def fake_like(x: Tensor) -> Tensor:
    found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return found.requires_grad_(x.requires_grad)


def compiled_decompositions() -> dict[Any, Callable]:
    """Return torch.compile's decompositions, without those of products, which are for CPUs."""
    return {
        op: function
        for op, function in select_decomp_table().items()
        if getattr(op, "overloadpacket", op) not in PRODUCTS
    }


def patches(compiled: bool) -> list[AbstractContextManager[Any]]:
    """Return contexts in which a module computes what it would on CUDA, and if ``compiled``."""
    found: list[AbstractContextManager[Any]] = [
        CudaAutocast(),
        patch.object(F, "scaled_dot_product_attention", attention),
        # The tracer is not one of the transforms of torch.func.
        patch.object(torch._C, "_are_functorch_transforms_active", lambda: False),
        # The parameters of our modules are the tracer's, and not of a type that users attach.
        patch.object(children, "dense", lambda parameter: True),
    ]
    if compiled:
        found.append(patch.object(torch.compiler, "is_compiling", lambda: True))
    return found


class CudaAutocast(TorchFunctionMode):
    """Run the functions ``WIDE`` in float32 under autocast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WIDE and torch.is_autocast_enabled("cpu"):
            args = [to_float32(x) for x in args]
            kwargs = {name: to_float32(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)


def to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Call the operator of a fused attention kernel of torch on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is None and query.shape[-1] <= FLASH_HEAD_DIM:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, scale=scale)[
            0
        ]
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # as torch does
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, scale=scale
    )[0]
