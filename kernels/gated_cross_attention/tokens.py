"""Device functions that the kernels of gated cross-attention share: packed rows, and products.

The kernels work on *rows*. A row is a token that is computed: a token that no mask ignores, in a
sample that attends. prepare.py numbers the rows of a side by sample and token, without gaps. All
tensors between the kernels hold rows in this order, so only the first and the last kernels know
masks. Without masks, row r is token r = b N + n.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import LOG2E, dot, philox_keep

# Columns of the factors by which sums over rows become a product: 1, the gate's indicator, zeros.
# Matrix instructions take at least 8, which Triton 3.6 multiplies slowly.
FACTORS = tl.constexpr(16)


class Rows(NamedTuple):
    """The rows of one side; without masks, the pointers are None."""

    batch: int
    length: int  # tokens of a sample, N
    start_ptr: Tensor | None  # (B + 1,) int32: the first row of each sample; the number of rows
    token_ptr: Tensor | None  # (B N,) int32: the token b N + n of each row
    keys_ptr: Tensor | None  # (B,) int32: the other side attends to the first rows of a sample
    present_ptr: Tensor | None  # (B,) float32: the gate's indicator, for the other side


@triton.jit
def count_rows(rows):
    """Return the number of rows."""
    if rows.start_ptr is not None:
        count = tl.load(rows.start_ptr + rows.batch)
    else:
        count = rows.batch * rows.length
    return count


@triton.jit
def sample_rows(rows, b):
    """Return the first row of sample b, and the end of its rows."""
    if rows.start_ptr is not None:
        first = tl.load(rows.start_ptr + b)
        end = tl.load(rows.start_ptr + b + 1)
    else:
        first = b * rows.length
        end = first + rows.length
    return first, end


@triton.jit
def key_rows(rows, b):
    """Return the first row of sample b, and the end of the rows that the other side attends to."""
    if rows.start_ptr is not None:
        first = tl.load(rows.start_ptr + b)
        end = first + tl.load(rows.keys_ptr + b)
    else:
        first = b * rows.length
        end = first + rows.length
    return first, end


@triton.jit
def turns(
    rows,
    done,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Return the first tile of this program, the number of tiles, and the step to its next tile.

    Tile t holds BM rows, from the (t // BLOCKS)-th block on, and the (t % BLOCKS)-th block of
    columns. The programs take the tiles of both sides in turn, of which the other side has had
    ``done``, so that all are busy however many rows the masks leave. With KEEP, all tiles of a
    program have the same columns.
    """
    step = tl.num_programs(0)
    if KEEP:
        step = step // BLOCKS * BLOCKS
        done = done // BLOCKS * BLOCKS
    tiles = tl.cdiv(count_rows(rows), BM) * BLOCKS
    program = tl.program_id(0)
    first = tl.where(program < step, (program + step - done % step) % step, tiles)
    return first, tiles, step


@triton.jit
def halves(x):
    """Return the left and the right half of the columns."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def tokens_of(rows, r, ok):
    """Return the tokens b N + n of the rows r; rows that are not ok may get any token."""
    if rows.token_ptr is not None:
        token = tl.load(rows.token_ptr + r, mask=ok, other=0)
    else:
        token = r
    return token


@triton.jit
def tile_at(r, cols, width):
    """Return offsets (rows, columns) into a contiguous matrix of this width."""
    return r[:, None].to(tl.int64) * width + cols[None, :]


@triton.jit
def load_tile(
    ptr,
    r,
    ok,
    cols,
    WIDTH: tl.constexpr,
):
    """Load (rows, columns) of a contiguous matrix with WIDTH columns; 0 where not ok."""
    return tl.load(
        ptr + tile_at(r, cols, WIDTH), mask=ok[:, None] & (cols[None, :] < WIDTH), other=0.0
    )


@triton.jit
def load_vector(
    ptr,
    at,
    ok,
):
    """Load a vector as float32; zeros if it is not given."""
    value = tl.zeros(at.shape, tl.float32)
    if ptr is not None:
        value += tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def gate_of(z):
    """Return g = sigmoid(z) and 1 - g, both with the relative error of float32."""
    e = tl.exp2(-tl.abs(z * LOG2E))
    big = 1.0 / (1.0 + e)
    small = e * big
    return tl.where(z > 0, big, small), tl.where(z > 0, small, big)


@triton.jit
def dropout(
    value,
    seed,
    token,
    start,
    p,
    STREAM: tl.constexpr,
    BN: tl.constexpr,
):
    """Apply the output's dropout, or its gradient, to BN columns from ``start`` on."""
    return tl.where(philox_keep(seed, token, start, p, STREAM, BN), value, 0.0) / (1.0 - p)


@triton.jit
def load_indicator(
    context,
    b,
    ok,
):
    """Return the gate's indicator in the samples b: 1 if the context is present, else 0."""
    return tl.load(context.present_ptr + b, mask=ok, other=0.0)


@triton.jit
def gate_of_tokens(
    side,
    context,
    x,
    a,
    w_x,
    w_a,
    b,
    ok,
    D: tl.constexpr,
    INDICATOR: tl.constexpr,
):
    """Return g and 1 - g of a gate per token; w_x and w_a are the columns for x and A."""
    z = tl.sum(x * w_x + a * w_a, 1)
    if side.bias_ptr is not None:
        z += tl.load(side.bias_ptr).to(tl.float32)
    if INDICATOR:
        w_e = tl.load(side.weight_ptr + 2 * D).to(tl.float32)
        if context.present_ptr is not None:
            w_e = load_indicator(context, b, ok) * w_e
        z += w_e
    return gate_of(z)


@triton.jit
def load_given(
    ptr,
    stride_b,
    stride_n,
    length,
    token,
    ok,
    cols,
    D: tl.constexpr,
):
    """Load tokens of a tensor (B, N, D) that need not be contiguous, except along D."""
    at = (token // length).to(tl.int64) * stride_b + (token % length).to(tl.int64) * stride_n
    return tl.load(
        ptr + at[:, None] + cols[None, :], mask=ok[:, None] & (cols[None, :] < D), other=0.0
    )


@triton.jit
def store_tile(
    ptr,
    value,
    r,
    ok,
    cols,
    WIDTH: tl.constexpr,
):
    """Store (rows, columns) into a contiguous matrix with WIDTH columns, in its dtype."""
    # Converted before the store, so that the exchange between threads takes half the shared memory.
    tl.store(
        ptr + tile_at(r, cols, WIDTH),
        value.to(ptr.dtype.element_ty),
        mask=ok[:, None] & (cols[None, :] < WIDTH),
    )


@triton.jit
def load_weight(
    ptr,
    at,
    first,
    K: tl.constexpr,
    COLS: tl.constexpr,
    SK: tl.constexpr,
    SC: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Load BK terms from ``at`` on and BN columns from ``first`` on of a weight (K, COLS).

    Its element (k, c) is at k SK + c SC.
    """
    k = tl.arange(0, BK)[:, None]
    c = tl.arange(0, BN)[None, :]
    # ``first`` is added to the pointer, not to c. Where Triton flattens loops it forgets that the
    # elements of a tensor follow each other, and then loads each on its own.
    return tl.load(
        ptr + (at * SK + first * SC) + (k * SK + c * SC),
        mask=(k < K - at) & (c < COLS - first),
        other=0.0,
    )


@triton.jit
def add_product(
    acc,
    a_ptr,
    r,
    ok,
    WIDTH: tl.constexpr,
    w_ptr,
    first,
    COLS: tl.constexpr,
    SK: tl.constexpr,
    SC: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return acc + a w for the rows r of ``a``, and the columns from ``first`` on of w (K, COLS).

    The sum takes BK terms at a time. ``a`` has WIDTH columns, of which the first K are read.
    """
    BN: tl.constexpr = acc.shape[1]
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        a = tl.load(a_ptr + tile_at(r, k, WIDTH), mask=ok[:, None] & (k[None, :] < K), other=0.0)
        acc = dot(a, load_weight(w_ptr, at, first, K, COLS, SK, SC, BK, BN), acc, UPCAST)
    return acc
