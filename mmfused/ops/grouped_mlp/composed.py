"""The composed path of experts: one matrix product per expert.

The sorted rows of one expert are called a segment here. On CUDA in bfloat16, with widths that are
multiples of 8, torch's grouped_mm computes all segments at once. The code below works around its
limits:

- grouped_mm does not write the rows beyond the last segment.
- In some releases, grouped_mm does not write the weight gradient of an empty segment.
- The addresses and strides of rows must be multiples of 16 bytes.
- There is no bias.

In all other cases a loop runs over the segments. On CUDA the loop synchronises, to read the sizes
of the segments.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import once_differentiable, operator
from ..topk_routing import Routing
from .checks import Activation, Parameters
from .reference import activated

_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


def linear_composed(
    x: Tensor,
    routing: Routing,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gather: bool,
    combine: bool,
) -> Tensor:
    """Compute :func:`grouped_linear` in plain PyTorch."""
    rows = _gathered(x, routing) if gather else x
    out = segment_linear(rows, weight, bias, routing.offsets)
    return _combined(out, routing) if combine else out


def mlp_composed(
    x: Tensor,
    routing: Routing,
    parameters: Parameters,
    activation: Activation,
) -> Tensor:
    """Compute :func:`grouped_mlp` in plain PyTorch."""
    offsets = routing.offsets
    w_up, w_gate, w_down, b_up, b_down = parameters
    rows = _gathered(x, routing)
    packed = parameters.packed(activation)
    if packed and b_up is not None:
        b_up = F.pad(b_up, (b_up.shape[1], 0))  # the gate has no bias
    hidden = segment_linear(rows, w_up, b_up, offsets)
    gate = None if w_gate is None else segment_linear(rows, w_gate, None, offsets)
    if packed:
        gate, hidden = hidden.chunk(2, -1)
    out = segment_linear(activated(hidden, gate, activation), w_down, b_down, offsets)
    return _combined(out, routing)


# ---- products over segments ----------------------------------------------------------------------


def _segment_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _segment_backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dw = weight.new_empty(weight.shape if need_dw else (0,))
    return dx, dw, x.new_empty(weight.shape[:2] if need_db else (0,))


def _segment_flops(
    x: Any,
    weight: Any,
    *rest: Any,
    out_shape: object,
) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def _segment_backward_flops(
    dy: Any,
    x: Any,
    weight: Any,
    offsets: Any,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    *,
    out_shape: object,
) -> int:
    return _segment_flops(x, weight, out_shape=None) * (need_dx + need_dw)


@operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    _segment_shape,
    _segment_flops,
    devices="all",
)
def segment_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """Apply the linear layer of each row's expert to the sorted rows x (R, I); return (R, O).

    Shapes: weight (E, O, I), bias (E, O), offsets (E+1,). Output rows from offsets[E] on are 0.
    """
    if _has_grouped_mm(x, weight):
        assert _grouped_mm is not None
        expert, valid = _experts(x, offsets)
        out = _grouped_mm(_dense(x), _aligned(weight).mT, offs=offsets[1:])
        out = out if bias is None else out + bias[expert]
        return out.masked_fill(~valid, 0.0)
    # In torch 2.14, a bfloat16 product on a CPU reads beyond the end of x if x is not contiguous.
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[1])
    ends = offsets.tolist()
    for e, (first, end) in enumerate(pairwise(ends)):
        if bias is None:
            torch.mm(x[first:end], weight[e].T, out=out[first:end])
        else:
            torch.addmm(bias[e], x[first:end], weight[e].T, out=out[first:end])
    out[ends[-1] :] = 0
    return out


@operator(
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, bool need_dx, bool need_dw, bool need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    _segment_backward_shapes,
    _segment_backward_flops,
    devices="all",
)
def segment_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; a gradient that is not needed has shape (0,).

    The gradients of an expert without rows are 0.
    """
    if _has_grouped_mm(x, weight):
        return _grouped_mm_backward(dy, x, weight, offsets, need_dx, need_dw, need_db)
    dy, x = dy.contiguous(), x.contiguous()
    ends = offsets.tolist()
    dx = x.new_empty(x.shape if need_dx else 0)
    dw = weight.new_empty(weight.shape if need_dw else 0)
    db = x.new_empty(weight.shape[:2] if need_db else 0)
    if need_dx:
        dx[ends[-1] :] = 0
    for e, (first, end) in enumerate(pairwise(ends)):
        rows = dy[first:end]
        if need_dx:
            torch.mm(rows, weight[e], out=dx[first:end])
        if need_dw:
            torch.mm(rows.T, x[first:end], out=dw[e])
        if need_db:
            torch.sum(rows, 0, out=db[e])
    return dx, dw, db


def _grouped_mm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert _grouped_mm is not None
    dx = dw = db = x.new_empty(0)
    expert, valid = _experts(x, offsets)
    dy, x = _dense(dy), _dense(x)
    if need_dx:
        dx = _grouped_mm(dy, _dense(weight), offs=offsets[1:]).masked_fill(~valid, 0.0)
    if need_dw:
        empty = (offsets.diff() == 0)[:, None, None]
        dw = _grouped_mm(dy.T, x, offs=offsets[1:]).masked_fill(empty, 0.0)
    if need_db:
        # A product with zeros and ones sums in a fixed order. Since 0 * NaN is NaN, values that are
        # not finite are left out of the product. The sums that need such values become NaN.
        experts = torch.arange(len(weight), device=x.device)[:, None]
        member = ((expert == experts) & valid.T).to(dy.dtype)
        broken = ~dy.isfinite() & valid
        db = member @ dy.masked_fill(broken | ~valid, 0.0)
        db = db.masked_fill(member @ broken.to(dy.dtype) > 0, float("nan"))
    return dx, dw, db


def _experts(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expert of each row (R,), and a bool (R, 1), True for rows inside a segment.

    Rows beyond the last segment get the last expert.
    """
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets[1:], rows, right=True).clamp(max=offsets.shape[0] - 2)
    return expert, (rows < offsets[-1])[:, None]


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _aligned(weight: Tensor) -> Tensor:
    """Return ``weight``, or a dense copy if grouped_mm does not support the layout."""
    expert_stride, row_stride, column_stride = weight.stride()
    fits = (
        column_stride == 1
        and row_stride >= weight.shape[2]
        and row_stride % 8 == 0
        and expert_stride % 8 == 0
        and weight.data_ptr() % 16 == 0
    )
    return weight if fits else _dense(weight)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0  # 8 numbers are 16 bytes
    return (
        _grouped_mm is not None
        and x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and aligned
        and x.shape[0] > 0
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offsets = inputs
    ctx.save_for_backward(x, weight, offsets)


@once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = segment_linear_bwd(dy, x, weight, offsets, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None


# The backward pass is registered with the operator, since exporters drop autograd functions.
torch.library.register_autograd("mmfused::segment_linear", _backward, setup_context=_save)


# ---- rows of tokens ------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Gather the sorted rows from x (T, D): row r is x[order[r] // k], or 0 for a masked token.

    The backward pass sums the gradients of the k rows of each token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor,
        position: Tensor,
        valid: Tensor,
        k: int,
    ) -> Tensor:
        ctx.save_for_backward(position, valid)
        ctx.k = k
        return x.index_select(0, order // k).masked_fill(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        position, valid = ctx.saved_tensors
        wide = torch.promote_types(d_rows.dtype, torch.float32)
        rows = d_rows.masked_fill(~valid, 0.0).index_select(0, position)
        rows = rows.view(-1, ctx.k, d_rows.shape[1])
        return rows.sum(1, dtype=wide).to(d_rows.dtype), None, None, None, None


def _gathered(x: Tensor, routing: Routing) -> Tensor:
    """Return the rows (T*k, D) of the tokens, sorted by expert."""
    order, k = routing.order, routing.indices.shape[1]
    valid = (torch.arange(order.shape[0], device=x.device) < routing.offsets[-1])[:, None]
    return _Gather.apply(x, order, routing.position, valid, k)


def _combined(y: Tensor, routing: Routing) -> Tensor:
    """Return the weighted sum (T, O) of each token's k rows of y (T*k, O), in the dtype of y.

    The sum is computed in the dtype of ``routing.weights``.
    """
    weights = routing.weights
    # position is a permutation, so the backward of index_select is deterministic.
    rows = y.index_select(0, routing.position).unflatten(0, weights.shape)
    return (rows.to(weights.dtype) * weights[:, :, None]).sum(1).to(y.dtype)
