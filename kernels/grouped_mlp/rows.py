"""Products of sorted rows with their experts' matrices: one program for each tile of rows of one
expert and block of columns.

A tile never spans two experts, so its product is an ordinary one; a tile's last rows may be
missing. Which tiles there are only the device knows: the grid has as many as there can be, and
those without rows end at once."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import dot


@triton.jit
def tile_and_block(slots, blocks, GROUP: tl.constexpr):
    """GROUP tiles share each block of columns while L2 has it; tiles of one expert, which read the
    same weights, are neighbours.
    """
    pid = tl.program_id(0)
    return tl.swizzle2d(pid // blocks, pid % blocks, slots, blocks, GROUP)


@triton.jit
def tile_span(tiles_ptr, offsets_ptr, tile, BM: tl.constexpr):
    """(expert, first row, end) of a tile; expert is -1 where there is none."""
    expert = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    return expert, first, tl.minimum(first + BM, end)


@triton.jit
def source_rows(order_ptr, rows, k: tl.constexpr, GATHER: tl.constexpr):
    """Where the sorted rows are to be read: their tokens, or themselves."""
    if GATHER:
        rows = tl.load(order_ptr + rows) // k
    return rows.to(tl.int64)


@triton.jit
def load_inside(ptr, inside_0, inside_1, ALL_0: tl.constexpr, ALL_1: tl.constexpr):
    """A tile of which the given rows and columns exist; ALL_0, ALL_1: every one does, and no mask
    is needed.
    """
    if ALL_0 and ALL_1:
        tile = tl.load(ptr)
    elif ALL_0:
        tile = tl.load(ptr, mask=inside_1[None, :], other=0.0)
    elif ALL_1:
        tile = tl.load(ptr, mask=inside_0[:, None], other=0.0)
    else:
        tile = tl.load(ptr, mask=inside_0[:, None] & inside_1[None, :], other=0.0)
    return tile


@triton.jit
def product(
    acc,
    a_ptr,
    a_rows,
    stride_a,
    b_ptr,
    b2_ptr,
    cols,
    stride_bn,
    stride_bk,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + A[a_rows] B of K steps; where there is a second B, A has K more columns that go with
    it. B (K, N) of any strides.
    """
    STEPS: tl.constexpr = (K + BK - 1) // BK
    ks = tl.arange(0, BK)
    a_ptrs = a_ptr + a_rows[:, None] * stride_a + ks[None, :]
    b_at = ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    for step in range(STEPS if b2_ptr is None else 2 * STEPS):
        start = step * BK
        a_start = start
        b = b_ptr
        if b2_ptr is not None:  # one loop over both, so that its pipeline is filled once
            second = step >= STEPS
            start = tl.where(second, start - STEPS * BK, start)
            a_start = tl.where(second, start + K, start)
            b = tl.where(second, b2_ptr, b_ptr)
        inside = start + ks < K
        a = load_inside(a_ptrs + a_start, inside, inside, True, K % BK == 0)
        b = load_inside(
            b + tl.cast(start, tl.int64) * stride_bk + b_at,
            inside,
            cols < N,
            K % BK == 0,
            N % BN == 0,
        )
        acc = dot(a, b, acc, UPCAST)
    return acc


@triton.jit
def gated_product(
    acc,
    gate,
    a_ptr,
    a_rows,
    stride_a,
    b_ptr,
    gate_ptr,
    cols,
    stride_bn,
    stride_bk,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + A[a_rows] B and gate + A[a_rows] G, each step of A read once; G has the strides of B."""
    ks = tl.arange(0, BK)
    a_ptrs = a_ptr + a_rows[:, None] * stride_a + ks[None, :]
    b_at = ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    for start in range(0, K, BK):
        inside = start + ks < K
        a = load_inside(a_ptrs + start, inside, inside, True, K % BK == 0)
        at = tl.cast(start, tl.int64) * stride_bk + b_at
        g = load_inside(gate_ptr + at, inside, cols < N, K % BK == 0, N % BN == 0)
        gate = dot(a, g, gate, UPCAST)
        b = load_inside(b_ptr + at, inside, cols < N, K % BK == 0, N % BN == 0)
        acc = dot(a, b, acc, UPCAST)
    return acc, gate


@triton.jit
def column_pieces(x, BM: tl.constexpr, BN: tl.constexpr, HALVINGS: tl.constexpr):
    """A tile in 2^HALVINGS pieces of columns: an epilogue that takes all of them at a time runs out
    of registers.
    """
    pieces = (x,)
    for level in tl.static_range(HALVINGS):
        finer = ()
        for i in tl.static_range(2**level):
            low, high = tl.split(
                tl.permute(tl.reshape(pieces[i], [BM, 2, BN // 2 ** (level + 1)]), [0, 2, 1])
            )
            finer += (low, high)
        pieces = finer
    return pieces


@triton.jit
def activate(h, g, ACTIVATION: tl.constexpr):
    """The activation and its slopes by h and, of "swiglu", by the gate g."""
    a = h
    by_h = 1.0
    by_g = 0.0
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        a = h * share
        by_h = share + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    if ACTIVATION == "relu":
        a = tl.where(h < 0.0, 0.0, h)  # NaN stays
        by_h = tl.where(h > 0.0, 1.0, 0.0)
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(g)
        by_h = g * sigmoid
        a = by_h * h
        by_g = h * sigmoid * (1.0 + g * (1.0 - sigmoid))
    return a, by_h, by_g


@triton.jit
def zero_tail(out_ptr, tile, live, R, cols, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Zeros in the rows that belong to nobody, counted from the end: tile i of any expert sees to
    the i-th BM of them.
    """
    last = R - tile * BM
    if last > live:
        rows = last - 1 - tl.arange(0, BM)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        zero = tl.zeros([BM, BN], out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, zero, mask=(rows >= live)[:, None] & (cols < N)[None, :])


@triton.jit
def rows_kernel(
    a_ptr,
    b_ptr,
    b2_ptr,
    bias_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    hidden_ptr,
    out_ptr,
    R,
    E,
    slots,
    stride_a,
    stride_be,
    stride_bn,
    stride_bk,
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
    """grid (slots * N / BN,). out (R, N) = act(A B + bias); pre-activations go to hidden (1 or 2,
    R, N), the gate's first.

    With "swiglu" b2 is the gate's B; with "none" a second part of K (see product), and nothing goes
    to hidden."""
    tile, block = tile_and_block(slots, tl.cdiv(N, BN), GROUP)
    cols = block * BN + tl.arange(0, BN)
    if TAIL:
        zero_tail(out_ptr, tile, tl.load(offsets_ptr + E), R, cols, N, BM, BN)
    expert, first, end = tile_span(tiles_ptr, offsets_ptr, tile, BM)
    if expert < 0:
        return
    rows = first + tl.arange(0, BM)
    a_rows = source_rows(
        order_ptr, tl.minimum(rows, end - 1), k, GATHER
    )  # the last row again, never somebody else's
    weights = expert.to(tl.int64) * stride_be
    acc = tl.zeros([BM, BN], tl.float32)
    gate = acc
    if ACTIVATION == "swiglu":
        acc, gate = gated_product(
            acc,
            gate,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weights,
            b2_ptr + weights,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    elif b2_ptr is not None:
        acc = product(
            acc,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weights,
            b2_ptr + weights,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    else:
        acc = product(
            acc,
            a_ptr,
            a_rows,
            stride_a,
            b_ptr + weights,
            None,
            cols,
            stride_bn,
            stride_bk,
            N,
            K,
            BN,
            BK,
            UPCAST,
        )
    bias_at = expert.to(tl.int64) * N
    accs = column_pieces(acc, BM, BN, HALVINGS)
    gates = column_pieces(gate, BM, BN, HALVINGS)
    WIDTH: tl.constexpr = BN // 2**HALVINGS
    for i in tl.static_range(2**HALVINGS):
        piece = block * BN + i * WIDTH + tl.arange(0, WIDTH)
        _finish(
            accs[i],
            gates[i],
            bias_ptr,
            bias_at,
            rows,
            piece,
            end,
            R,
            hidden_ptr,
            out_ptr,
            N,
            ACTIVATION,
        )


@triton.jit
def _finish(
    acc,
    gate,
    bias_ptr,
    bias_at,
    rows,
    cols,
    end,
    R,
    hidden_ptr,
    out_ptr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Bias, activation and stores of these columns."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + bias_at + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + cols[None, :]
    inside = (rows < end)[:, None] & (cols < N)[None, :]
    if ACTIVATION == "swiglu":
        tl.store(hidden_ptr + at, gate, mask=inside)
        hidden_ptr += tl.cast(R, tl.int64) * N
    if ACTIVATION != "none":
        tl.store(hidden_ptr + at, acc, mask=inside)
        acc, _, _ = activate(acc, gate, ACTIVATION)
    tl.store(out_ptr + at, acc, mask=inside)
