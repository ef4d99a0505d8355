"""Rows sorted by expert and their tiles, for the kernels of forward and backward.

A tile never spans two experts, so its product is an ordinary matrix product. The last tile of an
expert may have fewer rows. Only the device knows the number of tiles. A grid has enough programs
for the largest possible number, and programs without a tile compute no product.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot, tile_map
from .plans import Tile


class Rows(NamedTuple):
    """R = T k sorted rows of E experts; see Routing in mmfused/ops/topk_routing/order.py."""

    order: Tensor  # (R,) int32
    position: Tensor  # (R,) int32
    offsets: Tensor  # (E + 1,) int32
    tiles: Tensor  # (R // 16 + E, 2) int32
    k: int

    @property
    def number(self) -> int:
        """The number of rows, R."""
        return len(self.order)

    @property
    def experts(self) -> int:
        """The number of experts, E."""
        return len(self.offsets) - 1

    def slots(self, height: int) -> int:
        """Return an upper bound of the number of tiles; only the device knows the number."""
        return min(self.number, triton.cdiv(self.number, height) + self.experts - 1)


def sorted_rows(
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    k: int,
) -> Rows:
    """Make the tensors of a routing contiguous, and compute ``tiles`` if it is empty."""
    offsets = offsets.contiguous()
    if not len(tiles):
        tiles = tile_map(offsets, len(order), len(offsets) - 1)
    return Rows(
        order=order.contiguous(),
        position=position.contiguous(),
        offsets=offsets,
        tiles=tiles.contiguous(),
        k=k,
    )


def tile_options(tile: Tile) -> dict[str, int]:
    """Return the sizes and options of a tile as keyword arguments of a launch."""
    return {
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def tile_and_block(slots, blocks, GROUP: tl.constexpr):
    """Return the tile of rows and the block of columns of this program.

    GROUP tiles share each block of columns while it is in L2. Tiles of one expert, which read the
    same weights, are neighbours.
    """
    pid = tl.program_id(0)
    return tl.swizzle2d(pid // blocks, pid % blocks, slots, blocks, GROUP)


@triton.jit
def tile_span(
    tiles_ptr,  # (R // 16 + E, 2)
    offsets_ptr,  # (E + 1,)
    tile,
    BM: tl.constexpr,
):
    """Return (expert, first row, end) of a tile; expert is -1 if there is no such tile."""
    expert = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    return expert, first, tl.minimum(first + BM, end)


@triton.jit
def source_rows(
    order_ptr,
    rows,
    k: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Return the rows to read for these sorted rows: with GATHER their tokens, else ``rows``."""
    if GATHER:
        rows = tl.load(order_ptr + rows) // k
    return rows.to(tl.int64)


@triton.jit
def load_inside(
    ptr,
    inside_0,
    inside_1,
    ALL_0: tl.constexpr,
    ALL_1: tl.constexpr,
):
    """Load a tile; elements outside the given rows and columns are 0.

    With ALL_0 all rows are inside and need no mask. With ALL_1 all columns are inside.
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
    a_ptr,  # (rows, K), with b2 (rows, 2 K)
    a_rows,
    stride_a,
    b_ptr,  # (K, N)
    b2_ptr,  # (K, N) or None
    cols,
    stride_bn,
    stride_bk,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return acc + A[a_rows] B, summed over K; B (K, N) may have any strides.

    With ``b2_ptr``, A has 2 K columns, and the second half is multiplied by B2.
    """
    STEPS: tl.constexpr = (K + BK - 1) // BK
    ks = tl.arange(0, BK)
    a_ptrs = a_ptr + a_rows[:, None] * stride_a + ks[None, :]
    b_at = ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
    for step in range(STEPS if b2_ptr is None else 2 * STEPS):
        start = step * BK
        a_start = start
        b = b_ptr
        if b2_ptr is not None:  # one loop over both products, to fill its pipeline only once
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
def column_pieces(
    x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """Split a tile into 2^HALVINGS pieces of columns.

    An epilogue over all columns at once would run out of registers.
    """
    pieces = (x,)
    for level in tl.static_range(HALVINGS):
        finer = ()
        for i in tl.static_range(2**level):
            halves = tl.reshape(pieces[i], [BM, 2, BN // 2 ** (level + 1)])
            low, high = tl.split(tl.permute(halves, [0, 2, 1]))
            finer += (low, high)
        pieces = finer
    return pieces


@triton.jit
def activate(h, g, ACTIVATION: tl.constexpr):
    """Return the activation and its derivatives with respect to h and, for "swiglu", the gate g."""
    a = h
    by_h = 1.0
    by_g = 0.0
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        a = h * share
        by_h = share + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    if ACTIVATION == "relu":
        a = tl.where(h < 0.0, 0.0, h)  # keeps NaN
        by_h = tl.where(h > 0.0, 1.0, 0.0)
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(g)
        by_h = g * sigmoid
        a = by_h * h
        by_g = h * sigmoid * (1.0 + g * (1.0 - sigmoid))
    return a, by_h, by_g


@triton.jit
def zero_tail(
    out_ptr,  # (R, N)
    tile,
    valid,
    R,
    cols,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write zeros to the rows of masked tokens, which are the last R - valid rows.

    The program of tile i writes the i-th group of BM rows, counted from the end.
    """
    last = R - tile * BM
    if last > valid:
        rows = last - 1 - tl.arange(0, BM)
        at = rows[:, None].to(tl.int64) * N + cols[None, :]
        zero = tl.zeros([BM, BN], out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, zero, mask=(rows >= valid)[:, None] & (cols < N)[None, :])
