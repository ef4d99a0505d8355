"""The dot products of masked InfoNCE's queries with their targets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, dot, upcasts
from .pairs import load_block
from .plans import Tile


def target_products(
    q: Tensor,
    c: Tensor,
    target: Tensor,
    tile: Tile,
) -> Tensor:
    """Return q . c of each row's target, (B,) float32, with the same bits as in a sweep.

    ``tile`` is the tile of the sweep. Equal candidates must get equal probabilities, but with
    logits of 10^4, another order of summation would change a logit by 10^-3.
    """
    out = q.new_empty(len(q), dtype=torch.float32)
    target_kernel[(triton.cdiv(len(q), min(tile.BM, tile.BN)),)](
        q_ptr=q,
        c_ptr=c,
        target_ptr=target,
        out_ptr=out,
        B=len(q),
        C=len(c),
        D=q.shape[1],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        UPCAST=upcasts(q.dtype),
        **tile.launch,
        **OPTIONS,
    )
    return out


@triton.jit
def target_kernel(
    q_ptr,  # (B, D)
    c_ptr,  # (C, D)
    target_ptr,  # (B,)
    out_ptr,  # (B,)
    B,
    C,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write q_i . c_target(i), the diagonal of a tile that is computed like the sweep's tiles.

    grid (B / min(BM, BN),).
    """
    R: tl.constexpr = BM if BM < BN else BN
    start = tl.program_id(0) * R
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    target = tl.load(target_ptr + start + columns, mask=start + columns < B, other=0)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, (D + BK - 1) // BK):
        cols = k * BK + tl.arange(0, BK)
        x = load_block(q_ptr, start, rows, cols, B, D, D % BK == 0)
        y = load_block(c_ptr, 0, target, cols, C, D, D % BK == 0)
        acc = dot(x, tl.trans(y), acc, UPCAST)
    diagonal = tl.sum(tl.where(rows[:, None] == columns[None, :], acc, 0.0), 1)
    tl.store(out_ptr + start + rows, diagonal, mask=(rows < R) & (start + rows < B))
