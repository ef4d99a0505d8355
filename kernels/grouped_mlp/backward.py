"""Backward of the experts. For the symbols see mmfused/ops/grouped_mlp/reference.py.

``hidden_kernel`` gathers dO by token. For a tile of rows of one expert and a block of columns of A,
it computes

    dA = dO W_down      dS = rowsum(dA A)      dH = w dA act'(H)      A' = w A

where products are elementwise except for dO W_down, w is a row's routing weight, and dS is the
gradient of w without the bias's term. Each block writes its part of dS. combine_kernel adds up the
parts in order, and adds the bias's term. There are no atomics, and the outputs of the experts are
not needed. With activation "none" and x in place of H, dH is the gradient of x in a linear layer
with combine. weight_gradients.py computes dW_down from dO and A', and dW_up from dH and x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dense, rounded_product, upcasts
from .combine import RoutingGradient, combine_rows
from .forward import multiply_rows, up_and_gate
from .plans import plan
from .rows import (
    Rows,
    activate,
    column_pieces,
    product,
    sorted_rows,
    source_rows,
    tile_and_block,
    tile_options,
    tile_span,
    zero_tail,
)
from .weight_gradients import weight_gradients


def linear_backward(
    d_out: Tensor,  # (R, O), or combined (T, O)
    x: Tensor,  # (T, I), or (R, I) without gather
    weight: Tensor,  # (E, O, I)
    bias: Tensor | None,  # (E, O)
    combine_weights: Tensor | None,  # (T, k) float32
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    k: int,
    gather: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dw, db and, with ``combine_weights``, d_combine (T, k)."""
    rows = sorted_rows(order, position, offsets, tiles, k)
    dx = x.new_empty((rows.number, weight.shape[2]) if need_dx else (0,))
    inputs, gather_inputs, gradient = x, gather, None
    if combine_weights is None:
        d_combine = x.new_empty((0,), dtype=torch.float32)
        if need_dx:
            multiply_rows(rows, d_out, weight.mT, dx, tail=not gather)
    else:
        d_combine = x.new_empty(combine_weights.shape, dtype=torch.float32)
        if need_dw:  # for A', the sorted rows of x times their routing weights
            inputs, gather_inputs = x.new_empty(rows.number, weight.shape[2]), False
        partial = hidden_gradients(
            rows,
            d_out,
            weight,
            x,
            combine_weights,
            dx if need_dx else None,
            inputs if need_dw else None,
            gather=gather,
            tail=not gather,
        )
        gradient = RoutingGradient(partial, d_out, bias, d_combine)
    (dw,), db = weight_gradients(
        rows,
        d_out,
        inputs,
        combine_weights,
        [weight],
        need_dw,
        need_db,
        gather_y=combine_weights is not None,
        gather_x=gather_inputs,
    )
    if need_dx and gather:
        dx = combine_rows(rows, dx, gradient=gradient)
    elif gradient is not None:
        combine_rows(rows, None, gradient=gradient)
    return dx, dw, db, d_combine


def mlp_backward(
    d_out: Tensor,  # (T, Dout)
    x: Tensor,  # (T, D)
    hidden: Tensor,  # (1 or 2, R, I)
    w_up: Tensor,  # (E, I, D); packed (E, 2 I, D)
    w_gate: Tensor | None,  # (E, I, D)
    w_down: Tensor,  # (E, Dout, I)
    b_down: Tensor | None,  # (E, Dout)
    combine_weights: Tensor,  # (T, k) float32
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    packed: bool,
    need_dx: bool,
    need_dw: bool,
    need_db_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dw_up, dw_gate, dw_down, db_up, db_down and d_combine (T, k)."""
    rows = sorted_rows(order, position, offsets, tiles, combine_weights.shape[1])
    up, gate = up_and_gate(w_up, w_gate, packed)
    need_d_hidden = need_dx or need_dw or need_db_up
    inner = len(hidden) * hidden.shape[2]
    d_hidden = x.new_empty(rows.number, inner) if need_d_hidden else None
    scaled = x.new_empty(hidden.shape[1:]) if need_dw else None
    partial = hidden_gradients(
        rows,
        d_out,
        w_down,
        hidden,
        combine_weights,
        d_hidden,
        scaled,
        activation=activation,
    )
    (dw_down,), db_down = weight_gradients(
        rows,
        d_out,
        scaled,
        combine_weights,
        [w_down],
        need_dw,
        need_dw and b_down is not None,
        gather_y=True,
    )
    del scaled
    dw, db_up = weight_gradients(
        rows,
        d_hidden,
        x,
        None,
        [w_up] if gate is None else [gate, up],
        need_dw,
        need_db_up,
        packed=packed,
        gather_x=True,
    )
    d_combine = x.new_empty(combine_weights.shape, dtype=torch.float32)
    gradient = RoutingGradient(partial, d_out, b_down, d_combine)
    dx_rows = None
    if need_dx:
        assert d_hidden is not None
        dx_rows = x.new_empty(rows.number, x.shape[1])
        if gate is None:
            multiply_rows(rows, d_hidden, up.mT, dx_rows)
        else:
            multiply_rows(rows, d_hidden, gate.mT, dx_rows, second=up.mT)
    dx = combine_rows(rows, dx_rows, gradient=gradient)
    dw_gate = x.new_empty(0) if len(dw) == 1 else dw[0]
    return dx, dw[-1], dw_gate, dw_down, db_up, db_down, d_combine


def hidden_gradients(
    rows: Rows,
    d_out: Tensor,
    weight: Tensor,
    h: Tensor,
    combine_weights: Tensor,
    dh: Tensor | None,
    scaled: Tensor | None,
    *,
    activation: str = "none",
    gather: bool = False,
    tail: bool = False,
) -> Tensor:
    """Write dH to ``dh`` and A' to ``scaled``; return partial sums of dS, (blocks, R).

    ``weight`` (E, O, I) is the weight of the forward's last matrix product. ``h`` holds the
    pre-activations or, for a linear layer, x.
    """
    _, width, n = weight.shape
    kind = "gated hidden" if activation == "swiglu" else "hidden"
    tile = plan(kind, rows.number, rows.experts, n, width, h.dtype, arch_of(h))
    slots, blocks = rows.slots(tile.BM), triton.cdiv(n, tile.BN)
    partial = h.new_empty(blocks, rows.number, dtype=torch.float32)
    stride_be, stride_bk, stride_bn = weight.stride()
    hidden_kernel[(slots * blocks,)](
        d_ptr=d_out,
        b_ptr=weight,
        h_ptr=h,
        routing_ptr=dense(combine_weights),
        order_ptr=rows.order,
        offsets_ptr=rows.offsets,
        tiles_ptr=rows.tiles,
        dh_ptr=dh,
        scaled_ptr=scaled,
        partial_ptr=partial,
        R=rows.number,
        E=rows.experts,
        slots=slots,
        stride_d=d_out.stride(0),
        stride_be=stride_be,
        stride_bn=stride_bn,
        stride_bk=stride_bk,
        stride_h=h.stride(-2),
        N=n,
        K=width,
        k=rows.k,
        **tile_options(tile),
        HALVINGS=tile.halvings,
        GROUP=16,
        GATHER=gather,
        ACTIVATION=activation,
        TAIL=tail,
        UPCAST=upcasts(h.dtype),
        **OPTIONS,
    )
    return partial


@triton.jit
def hidden_kernel(
    d_ptr,  # (T, K)
    b_ptr,  # (E, K, N)
    h_ptr,  # (1 or 2, R, N), or with GATHER (T, N)
    routing_ptr,  # (T, k)
    order_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    tiles_ptr,  # (R // 16 + E, 2)
    dh_ptr,  # (R, N), for "swiglu" (R, 2 N), the gate first; or None
    scaled_ptr,  # (R, N) or None
    partial_ptr,  # (N / BN, R) float32
    R,
    E,
    slots,
    stride_d,
    stride_be,
    stride_bn,
    stride_bk,
    stride_h,
    N: tl.constexpr,
    K: tl.constexpr,
    k: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dH, A' and the parts of dS; grid (slots * N / BN,)."""
    tile, block = tile_and_block(slots, tl.cdiv(N, BN), GROUP)
    cols = block * BN + tl.arange(0, BN)
    if TAIL and dh_ptr is not None:
        zero_tail(dh_ptr, tile, tl.load(offsets_ptr + E), R, cols, N, BM, BN)
    expert, first, end = tile_span(tiles_ptr, offsets_ptr, tile, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    # Beyond the end, read the last row again, never a row of another expert.
    there = tl.minimum(rows, end - 1)
    tokens = source_rows(order_ptr, there, k, True)
    b_ptr += expert.to(tl.int64) * stride_be
    acc = tl.zeros([BM, BN], tl.float32)
    acc = product(
        acc, d_ptr, tokens, stride_d, b_ptr, None, cols, stride_bn, stride_bk, N, K, BN, BK, UPCAST
    )
    w = tl.load(routing_ptr + tl.load(order_ptr + there))
    h_rows = source_rows(order_ptr, there, k, GATHER)
    ds = tl.zeros([BM], tl.float32)
    accs = column_pieces(acc, BM, BN, HALVINGS)
    WIDTH: tl.constexpr = BN // 2**HALVINGS
    for i in tl.static_range(2**HALVINGS):
        piece = block * BN + i * WIDTH + tl.arange(0, WIDTH)
        ds += _hidden_columns(
            accs[i],
            piece,
            rows,
            h_rows,
            w,
            end,
            R,
            h_ptr,
            stride_h,
            dh_ptr,
            scaled_ptr,
            N,
            ACTIVATION,
        )
    tl.store(partial_ptr + tl.cast(block, tl.int64) * R + rows, ds, mask=rows < end)


@triton.jit
def _hidden_columns(
    da,
    cols,
    rows,
    h_rows,
    w,
    end,
    R,
    h_ptr,  # as in hidden_kernel
    stride_h,
    dh_ptr,  # (R, N) or (R, 2 N), or None
    scaled_ptr,  # (R, N) or None
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store dH and A' of the columns ``cols``, and return the columns' part of dS."""
    inside = (rows < end)[:, None] & (cols < N)[None, :]
    h_at = h_rows[:, None] * stride_h + cols[None, :]
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    gate = da
    if ACTIVATION == "swiglu":
        gate = tl.load(h_ptr + h_at, mask=inside, other=0.0).to(tl.float32)
        h_ptr += tl.cast(R, tl.int64) * N
    h = tl.load(h_ptr + h_at, mask=inside, other=0.0).to(tl.float32)
    a, by_h, by_g = activate(h, gate, ACTIVATION)
    ds = tl.sum(rounded_product(da, a), 1)
    da *= w[:, None]
    if scaled_ptr is not None:
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(scaled_ptr + at, (a * w[:, None]).to(dtype), mask=inside)
    if dh_ptr is not None:
        width: tl.constexpr = 2 * N if ACTIVATION == "swiglu" else N
        at = rows[:, None].to(tl.int64) * width + cols[None, :]
        if ACTIVATION == "swiglu":
            tl.store(dh_ptr + at, (da * by_g).to(dtype), mask=inside)
            at += N
        tl.store(dh_ptr + at, (da * by_h).to(dtype), mask=inside)
    return ds
