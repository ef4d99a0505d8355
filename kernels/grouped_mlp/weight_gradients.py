"""Gradients of the experts' weights and biases: outer products summed over the rows of an expert.

dW = Y^T X, where Y are the gradients of a layer's outputs, and X its inputs. For a layer whose
outputs are combined with routing weights, X is A' of backward.py. A' is already multiplied by the
routing weights, so only db needs them here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, arch_of, dense, dot, upcasts
from .plans import plan
from .rows import Rows, load_inside, tile_options


def weight_gradients(
    rows: Rows,
    y: Tensor | None,
    x: Tensor | None,
    combine_weights: Tensor | None,
    weights: list[Tensor],
    need_dw: bool,
    need_db: bool,
    *,
    packed: bool = False,
    gather_y: bool = False,
    gather_x: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return a list of dW, one for each of the weights (E, O, I), and db (E, O) of the last weight.

    ``y`` holds O columns for each of the weights, side by side, and ``x`` holds I columns. Both
    have R sorted rows. With ``gather_y`` or ``gather_x``, y or x has T rows instead, one for each
    token. ``combine_weights`` are the routing weights, which multiply the rows of y in db.
    ``packed``: the weights are the halves of one tensor, and the list holds one gradient of this
    tensor. A result that is not needed is (0,). Without need_dw and need_db, y and x may be None.
    """
    experts, n, width = weights[0].shape
    db = weights[0].new_empty((experts, n) if need_db else (0,))
    if not (need_dw or need_db):
        return [db.new_empty(0) for _ in weights[packed:]], db
    assert y is not None and x is not None
    if not need_dw:  # the kernel computes db only along with dw, so compute the narrowest dw
        x, width = x[:, :16], min(width, 16)
    joint = None
    if packed:
        joint = y.new_empty(experts, len(weights) * n, width)
        dw = list(joint.chunk(2, 1))
    else:
        dw = [y.new_empty(experts, n, width) for _ in weights]
    kind = "gathered weights" if gather_y or gather_x else "weights"
    tile = plan(kind, rows.number, rows.experts, n, width, y.dtype, arch_of(y))
    blocks = len(weights) * triton.cdiv(n, tile.BM) * triton.cdiv(width, tile.BN)
    weights_kernel[(experts * blocks,)](
        y_ptr=y,
        x_ptr=x,
        routing_ptr=dense(combine_weights),
        order_ptr=rows.order,
        offsets_ptr=rows.offsets,
        dw_ptr=dw[0],
        dw2_ptr=dw[1] if len(dw) == 2 else None,
        db_ptr=db if need_db else None,
        stride_y=y.stride(0),
        stride_x=x.stride(0),
        stride_e=dw[0].stride(0),
        N=n,
        K=width,
        k=rows.k,
        **tile_options(tile),
        GROUP=8,
        GATHER_Y=gather_y,
        GATHER_X=gather_x,
        UPCAST=upcasts(y.dtype),
        **OPTIONS,
    )
    wanted = dw if joint is None else [joint]
    return wanted if need_dw else [y.new_empty(0) for _ in wanted], db


@triton.jit
def weights_kernel(
    y_ptr,  # (R, N), with GATHER_Y (T, N); with dw2 2 N columns
    x_ptr,  # (R, K), with GATHER_X (T, K)
    routing_ptr,  # (T, k) or None
    order_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    dw_ptr,  # (E, N, K)
    dw2_ptr,  # (E, N, K) or None
    db_ptr,  # (E, N) or None
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
    """Compute dw = Y^T X over the rows of each expert, and db, the sums of the columns of Y.

    grid (E * N / BM * K / BN,), and twice as many programs with dw2. With dw2, Y is the first half
    of the columns of y and Y2 the second half, dw2 = Y2^T X, and db holds the sums of the columns
    of Y2. With ``routing_ptr``, the rows summed in db are multiplied by their routing weights.
    """
    PARTS: tl.constexpr = 1 if dw2_ptr is None else 2
    y_blocks: tl.constexpr = (N + BM - 1) // BM
    x_blocks: tl.constexpr = (K + BN - 1) // BN
    pid = tl.program_id(0)
    expert = (pid // (PARTS * y_blocks * x_blocks)).to(tl.int64)
    pid = pid % (PARTS * y_blocks * x_blocks)
    block_y, block_x = tl.swizzle2d(
        pid // x_blocks, pid % x_blocks, PARTS * y_blocks, x_blocks, GROUP
    )
    part = block_y // y_blocks
    y_column = part * N
    if dw2_ptr is not None:
        dw_ptr = tl.where(part == 1, dw2_ptr, dw_ptr)
    dw_ptr += expert * stride_e
    ys = (block_y % y_blocks) * BM + tl.arange(0, BM)
    xs = block_x * BN + tl.arange(0, BN)
    has_db = False
    if db_ptr is not None:
        has_db = (block_x == 0) & (part == PARTS - 1)
    if has_db:  # a separate loop, because most programs do not compute db
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


@triton.jit
def _outer_products(
    y_ptr,  # as in weights_kernel
    x_ptr,
    routing_ptr,  # (T, k) or None
    order_ptr,  # (R,)
    offsets_ptr,  # (E + 1,)
    dw_ptr,  # (N, K) of this expert
    db_ptr,  # (E, N) or None
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
    """Compute one block of an expert's dW and, with ``db_ptr``, of db; 0 for an empty expert."""
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
        # Loaded transposed, because on Ampere tl.trans would prevent pipelining.
        y_at = y_rows[None, :] * stride_y + (y_column + ys)[:, None]
        y = load_inside(y_ptr + y_at, ys < N, inside, N % BM == 0, False)
        x_at = x_rows[:, None] * stride_x + xs[None, :]
        x = load_inside(x_ptr + x_at, inside, xs < K, False, K % BN == 0)
        acc = dot(y, x, acc, UPCAST)
        if db_ptr is not None:
            sums = dot(y, _row_factors(routing_ptr, assignments, inside, BK, dtype), sums, UPCAST)
    at = ys[:, None].to(tl.int64) * K + xs[None, :]
    tl.store(dw_ptr + at, acc, mask=(ys < N)[:, None] & (xs < K)[None, :])
    if db_ptr is not None:
        tl.store(db_ptr + expert * N + ys, tl.sum(sums, 1), mask=ys < N)


@triton.jit
def _row_factors(
    routing_ptr,
    assignments,
    inside,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return a (BK, 16) matrix whose row sums are the routing weights (1 without ``routing_ptr``).

    The first column holds the routing weights in ``dtype``, the second column their rounding
    errors, and the other columns 0.
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
