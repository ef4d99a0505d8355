"""The composed path of the experts: rows sorted by expert, one product for each expert's segment of
them.

On CUDA in bfloat16 torch's grouped_mm does all segments at once. It leaves what is beyond the last
segment, and in some releases the weight gradient of an empty one, as they come, wants dense rows of
16 bytes that begin at a multiple of those, and knows no bias; here each is made good. Elsewhere a
loop over the segments, which on CUDA waits for their sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...library import once_differentiable, register_composed

_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


def segment_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """x (R, I) sorted, weight (E, O, I), bias (E, O), offsets (E+1,) -> (R, O); rows beyond
    offsets[E] are 0.
    """
    if _has_grouped_mm(x, weight):
        expert, live = _experts(x, offsets)
        out = _grouped_mm(_dense(x), _in_rows(weight).mT, offs=offsets[1:])
        return (out if bias is None else out + bias[expert]).masked_fill(~live, 0.0)
    x = x.contiguous()  # torch 2.14's product in bfloat16 on a CPU reads beyond the end of a row that is followed by a gap
    out, ends = x.new_empty(x.shape[0], weight.shape[1]), offsets.tolist()
    for e, (first, end) in enumerate(pairwise(ends)):
        if bias is None:
            torch.mm(x[first:end], weight[e].T, out=out[first:end])
        else:
            torch.addmm(bias[e], x[first:end], weight[e].T, out=out[first:end])
    out[ends[-1] :] = 0
    return out


def segment_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias, each (0,) where it is not needed; an expert without rows
    gets zeros.
    """
    dx = dw = db = x.new_empty(0)
    if _has_grouped_mm(x, weight):
        expert, live = _experts(x, offsets)
        dy, x = _dense(dy), _dense(x)
        if need_dx:
            dx = _grouped_mm(dy, _dense(weight), offs=offsets[1:]).masked_fill(~live, 0.0)
        if need_dw:
            empty = (offsets.diff() == 0)[:, None, None]
            dw = _grouped_mm(dy.T, x, offs=offsets[1:]).masked_fill(empty, 0.0)
        if (
            need_db
        ):  # a product with ones, in a fixed order; 0 times NaN would be NaN for every expert
            mine = ((expert == torch.arange(len(weight), device=x.device)[:, None]) & live.T).to(
                dy.dtype
            )
            void = ~dy.isfinite() & live
            db = mine @ dy.masked_fill(void | ~live, 0.0)
            db = db.masked_fill(mine @ void.to(dy.dtype) > 0, float("nan"))
        return dx, dw, db
    dy, x = dy.contiguous(), x.contiguous()
    ends = offsets.tolist()
    if need_dx:
        dx = x.new_empty(x.shape)
        dx[ends[-1] :] = 0
    if need_dw:
        dw = weight.new_empty(weight.shape)
    if need_db:
        db = x.new_empty(weight.shape[:2])
    for e, (first, end) in enumerate(pairwise(ends)):
        rows = dy[first:end]
        if need_dx:
            torch.mm(rows, weight[e], out=dx[first:end])
        if need_dw:
            torch.mm(rows.T, x[first:end], out=dw[e])
        if need_db:
            torch.sum(rows, 0, out=db[e])
    return dx, dw, db


def _experts(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The expert of each row (of those beyond the last segment, any), and which rows have one (R,
    1).
    """
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets[1:], rows, right=True).clamp(max=offsets.shape[0] - 2)
    return expert, (rows < offsets[-1])[:, None]


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _in_rows(weight: Tensor) -> Tensor:
    """As grouped_mm takes it: the halves of a packed weight do as they are."""
    experts, rows, columns = weight.stride()
    fits = (
        columns == 1
        and rows >= weight.shape[2]
        and rows % 8 == 0
        and experts % 8 == 0
        and weight.data_ptr() % 16 == 0
    )
    return weight if fits else _dense(weight)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0  # 16 bytes
    return (
        _grouped_mm is not None
        and x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and aligned
        and x.shape[0] > 0
    )


def _fake_linear(x, weight, bias, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_linear_backward(dy, x, weight, offsets, need_dx, need_dw, need_db):
    dx, dw = (
        x.new_empty(x.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,)),
    )
    return dx, dw, x.new_empty(weight.shape[:2] if need_db else (0,))


def _forward_flops(x, weight, *rest, out_shape):
    return 2 * x[0] * weight[1] * weight[2]


def _backward_flops(dy, x, weight, offsets, need_dx, need_dw, need_db, *, out_shape):
    return _forward_flops(x, weight, out_shape=None) * (need_dx + need_dw)


register_composed(
    "segment_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    segment_linear,
    _fake_linear,
    _forward_flops,
)
register_composed(
    "segment_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, bool need_dx, bool need_dw, bool need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    segment_linear_backward,
    _fake_linear_backward,
    _backward_flops,
)


def _keep(ctx, inputs, output) -> None:
    x, weight, _, offsets = inputs
    ctx.save_for_backward(x, weight, offsets)


@once_differentiable
def _backward(ctx, dy):
    x, weight, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.mmfused.segment_linear_bwd(dy, x, weight, offsets, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None


# Of the operator, not of a Function around it: an exported graph keeps the operator alone.
torch.library.register_autograd("mmfused::segment_linear", _backward, setup_context=_keep)


class Gather(torch.autograd.Function):
    """Rows sorted by expert of x (T, D): row r is x[order[r] // k]; masked tokens' are 0. Backward
    sums a token's k rows.
    """

    @staticmethod
    def forward(ctx, x, order, position, live, k):
        ctx.save_for_backward(position, live)
        ctx.k = k
        return x.index_select(0, order // k).masked_fill(~live, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows):
        position, live = ctx.saved_tensors
        wide = torch.promote_types(d_rows.dtype, torch.float32)
        rows = (
            d_rows.masked_fill(~live, 0.0)
            .index_select(0, position)
            .view(-1, ctx.k, d_rows.shape[1])
        )
        return rows.sum(1, dtype=wide).to(d_rows.dtype), None, None, None, None


def combine(y: Tensor, weights: Tensor, position: Tensor) -> Tensor:
    """out_t = sum_j w_tj y[position of (t, j)], summed at least in float32; y (R, O) is 0 where it
    belongs to nobody.
    """
    rows = y.index_select(0, position).unflatten(
        0, weights.shape
    )  # a permutation: the backward meets no row twice
    return (rows.to(weights.dtype) * weights[:, :, None]).sum(1).to(y.dtype)
