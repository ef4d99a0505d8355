"""Backward kernels of the experts. ``hidden_kernel``, a tile of rows of one expert by a block of I,
dO gathered by token:

    dA = dO W_down      dS = <dA, A>      dH = w dA act'(H)      A' = w A

dS of a row comes in one part for each block, added up in order by finish_kernel: no atomics, and no
expert's output is needed. With "none" and x for H these are the gradients of a linear layer under
combine. ``weights_kernel`` sums outer products over the rows of an expert, dW = Y^T X; A' carries
the routing weight, so that nothing has to be scaled on its way into the matrix units."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot
from .rows import (
    activate,
    column_pieces,
    load_inside,
    product,
    source_rows,
    tile_and_block,
    tile_span,
    zero_tail,
)


@triton.jit
def _hidden_columns(
    da,
    cols,
    rows,
    h_rows,
    w,
    end,
    R,
    h_ptr,
    stride_h,
    dh_ptr,
    scaled_ptr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Writes dH and A' of these columns; returns their share of dS."""
    inside = (rows < end)[:, None] & (cols < N)[None, :]
    h_at = h_rows[:, None] * stride_h + cols[None, :]
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    gate = da
    if ACTIVATION == "swiglu":
        gate = tl.load(h_ptr + h_at, mask=inside, other=0.0).to(tl.float32)
        h_ptr += tl.cast(R, tl.int64) * N
    h = tl.load(h_ptr + h_at, mask=inside, other=0.0).to(tl.float32)
    a, by_h, by_g = activate(h, gate, ACTIVATION)
    ds = tl.sum(da * a, 1)
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


@triton.jit
def hidden_kernel(
    d_ptr,
    b_ptr,
    h_ptr,
    routing_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    dh_ptr,
    scaled_ptr,
    partial_ptr,
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
    """grid (slots * N / BN,). dh (R, N), of "swiglu" (R, 2N) with the gate's first; scaled (R, N);
    partial (N / BN, R) float32.

    h: (1 or 2, R, N), or with GATHER the tokens' (T, N).
    """
    tile, block = tile_and_block(slots, tl.cdiv(N, BN), GROUP)
    cols = block * BN + tl.arange(0, BN)
    if TAIL and dh_ptr is not None:
        zero_tail(dh_ptr, tile, tl.load(offsets_ptr + E), R, cols, N, BM, BN)
    expert, first, end = tile_span(tiles_ptr, offsets_ptr, tile, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    there = tl.minimum(rows, end - 1)  # the last row again, never somebody else's
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
def _row_factors(routing_ptr, assignments, inside, BK: tl.constexpr, dtype: tl.constexpr):
    """(rows, 16): what the rows count in the sum of a bias's gradient, in two columns: so 16 bits
    lose no digit of it.
    """
    column = tl.arange(0, 16)[None, :]
    if routing_ptr is None:
        factors = tl.where(column == 0, tl.full([BK, 16], 1.0, dtype), 0.0)
    else:
        w = tl.load(routing_ptr + assignments, mask=inside, other=0.0)
        high = w.to(dtype)
        low = (w - high.to(tl.float32)).to(dtype)
        factors = tl.where(column == 0, high[:, None], tl.where(column == 1, low[:, None], 0.0))
    return factors.to(dtype)


@triton.jit
def _outer_products(
    y_ptr,
    x_ptr,
    routing_ptr,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    db_ptr,
    expert,
    ys,
    xs,
    y_column,
    stride_y,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    k: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER_Y: tl.constexpr,
    GATHER_X: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of an expert's dW and, where db_ptr is given, of db; zeros without rows."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    sums = tl.zeros([BM, 16], tl.float32)
    for start in range(begin, end, BK):
        rows = start + tl.arange(0, BK)
        inside = rows < end
        assignments = rows
        if GATHER_Y or GATHER_X or (db_ptr is not None and routing_ptr is not None):
            assignments = tl.load(order_ptr + rows, mask=inside, other=0)
        y_rows = (assignments // k if GATHER_Y else rows).to(tl.int64)
        x_rows = (assignments // k if GATHER_X else rows).to(tl.int64)
        y_at = (
            y_rows[None, :] * stride_y + (y_column + ys)[:, None]
        )  # transposed here: on Ampere tl.trans would stop the pipeline
        y = load_inside(y_ptr + y_at, ys < N, inside, N % BM == 0, False)
        x = load_inside(
            x_ptr + x_rows[:, None] * stride_x + xs[None, :], inside, xs < K, False, K % BN == 0
        )
        acc = dot(y, x, acc, UPCAST)
        if db_ptr is not None:
            sums = dot(y, _row_factors(routing_ptr, assignments, inside, BK, dtype), sums, UPCAST)
    tl.store(
        dw_ptr + ys[:, None].to(tl.int64) * K + xs[None, :],
        acc,
        mask=(ys < N)[:, None] & (xs < K)[None, :],
    )
    if db_ptr is not None:
        tl.store(db_ptr + expert * N + ys, tl.sum(sums, 1), mask=ys < N)


@triton.jit
def weights_kernel(
    y_ptr,
    x_ptr,
    routing_ptr,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    dw2_ptr,
    db_ptr,
    stride_y,
    stride_x,
    stride_e,
    N: tl.constexpr,
    K: tl.constexpr,
    k: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER_Y: tl.constexpr,
    GATHER_X: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grid (E * N / BM * K / BN,), twice that with dw2. dw (E, N, K) = Y^T X over each expert's
    rows; Y (R, N) and X (R, K), or of tokens (T, .) where gathered; dw2 = Y2^T X, where Y is (R, 2
    N) and Y2 its second half. db (E, N): sums of the (last) Y, times the routing weight where that
    is given."""
    PARTS: tl.constexpr = 1 if dw2_ptr is None else 2
    high: tl.constexpr = (N + BM - 1) // BM
    wide: tl.constexpr = (K + BN - 1) // BN
    pid = tl.program_id(0)
    expert = (pid // (PARTS * high * wide)).to(tl.int64)
    pid = pid % (PARTS * high * wide)
    block_y, block_x = tl.swizzle2d(pid // wide, pid % wide, PARTS * high, wide, GROUP)
    part = block_y // high
    y_column = part * N
    if dw2_ptr is not None:
        dw_ptr = tl.where(part == 1, dw2_ptr, dw_ptr)
    dw_ptr += expert * stride_e
    ys = (block_y % high) * BM + tl.arange(0, BM)
    xs = block_x * BN + tl.arange(0, BN)
    sums_too = False
    if db_ptr is not None:
        sums_too = (block_x == 0) & (part == PARTS - 1)
    if sums_too:  # two loops: most programs have no sums to keep
        _outer_products(
            y_ptr,
            x_ptr,
            routing_ptr,
            order_ptr,
            offsets_ptr,
            dw_ptr,
            db_ptr,
            expert,
            ys,
            xs,
            y_column,
            stride_y,
            stride_x,
            N,
            K,
            k,
            BM,
            BN,
            BK,
            GATHER_Y,
            GATHER_X,
            UPCAST,
        )
    else:
        _outer_products(
            y_ptr,
            x_ptr,
            None,
            order_ptr,
            offsets_ptr,
            dw_ptr,
            None,
            expert,
            ys,
            xs,
            y_column,
            stride_y,
            stride_x,
            N,
            K,
            k,
            BM,
            BN,
            BK,
            GATHER_Y,
            GATHER_X,
            UPCAST,
        )
