"""Backward of the linear layers that nothing else is computed with: plain products of rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot
from .tokens import add_product, count_rows, load_tile, load_weight, store_tile


class ProductSide(NamedTuple):
    """One side of d_attended_kernel and d_normed_kernel: out = a w."""

    a_ptr: Tensor | None = None  # (capacity, K)
    weight_ptr: Tensor | None = None  # (K, COLS)
    out_ptr: Tensor | None = None  # (capacity, COLS)
    programs: int = 0


@triton.jit
def product(
    side,
    rows,
    program,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute out = a w for the rows of one side; see d_attended_kernel."""
    BLOCKS: tl.constexpr = (COLS + BN - 1) // BN
    cols = program % BLOCKS * BN + tl.arange(0, BN)
    R = count_rows(rows)
    if BK >= K:
        k = tl.arange(0, BK)
        w = load_weight(side.weight_ptr, k, cols, K, COLS, COLS, 1)
    for block in range(program // BLOCKS, tl.cdiv(R, BM), side.programs // BLOCKS):
        r = block * BM + tl.arange(0, BM)
        ok = r < R
        acc = tl.zeros([BM, BN], tl.float32)
        if BK >= K:
            acc = dot(load_tile(side.a_ptr, r, ok, k, K), w, acc, UPCAST)
        else:
            acc = add_product(
                acc, side.a_ptr, r, ok, K, side.weight_ptr, cols, COLS, COLS, 1, K, BK, UPCAST
            )
        store_tile(side.out_ptr, acc, r, ok, cols, COLS)


@triton.jit
def d_attended_kernel(
    first,
    first_rows,
    second,
    second_rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dy W_o, the gradient of ``attended``; W_o (D, D).

    Grid (programs of both directions,). The programs of a direction are a multiple of its D / BN
    blocks of columns. With BK >= D, a program keeps its columns of W_o for all its rows.
    """
    program = tl.program_id(0)
    if program < first.programs:
        product(first, first_rows, program, D, D, BM, BN, BK, UPCAST)
    else:
        if second.a_ptr is not None:
            program -= first.programs
            product(second, second_rows, program, D, D, BM, BN, BK, UPCAST)


@triton.jit
def d_normed_kernel(
    first,
    first_rows,
    second,
    second_rows,
    W0: tl.constexpr,
    W1: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute dn = d_projected W'; grid (programs of both sides,), as in d_attended_kernel.

    Side i has Wi columns of projections and tokens of Di channels.
    """
    program = tl.program_id(0)
    if program < first.programs:
        product(first, first_rows, program, W0, D0, BM, BN, BK, UPCAST)
    else:
        program -= first.programs
        product(second, second_rows, program, W1, D1, BM, BN, BK, UPCAST)
