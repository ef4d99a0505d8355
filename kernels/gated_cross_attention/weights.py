"""Gradients of weights and sums for the gradients of biases, over all rows of a side.

The gradient of a weight is G = d^T a, where d are the gradients of a product's outputs and a its
inputs. The rows are split, so that there are enough programs. Each program of weights_kernel sums
the rows of one split for one tile of G. weights_finish.py adds the splits up.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot
from .tokens import FACTORS, count_rows


class Product(NamedTuple):
    """One product d^T [a | b] over the rows of a side; without it, the pointers are None."""

    d_ptr: Tensor | None = None  # (R, C) gradients of outputs
    a_ptr: Tensor | None = None  # (R, K) inputs
    b_ptr: Tensor | None = None  # (R, K) further inputs, of the gate, or None
    partial_ptr: Tensor | None = None  # (splits, C, K or 2 K) float32
    sums_ptr: Tensor | None = None  # (splits, 2, C) float32: sums of d, and of d e
    factors_ptr: Tensor | None = None  # (R, FACTORS) from d_rows_kernel; None: each indicator is 1
    splits: int = 0  # given by shapes, 0 without the product


@triton.jit
def weights_kernel(
    first,
    first_rows,
    second,
    second_rows,
    C0: tl.constexpr,
    K0: tl.constexpr,
    C1: tl.constexpr,
    K1: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDICATOR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute partial sums of the product of each side, BK rows at a time.

    Grid (sum over sides of splits * C / (BM + BX) * K / BN,), where the blocks of K are counted for
    a and for b. A tile has BM + BX columns of d and BN of a or b. BX is a power of two, or 0. If
    ``sums_ptr`` is given, the sums of d over the rows are computed, and with INDICATOR those of d
    times the indicator of the side's context.
    """
    pid = tl.program_id(0)
    tiles: tl.constexpr = ((C0 + BM + BX - 1) // (BM + BX)) * ((K0 + BN - 1) // BN)
    programs = first.splits * (tiles if first.b_ptr is None else 2 * tiles)
    if pid < programs:
        if first.d_ptr is not None:
            _split_of_product(
                first,
                first_rows,
                pid,
                C0,
                K0,
                BM,
                BX,
                BN,
                BK,
                INDICATOR,
                UPCAST,
                0,
            )
    else:
        if second.d_ptr is not None:
            _split_of_product(
                second,
                second_rows,
                pid - programs,
                C1,
                K1,
                BM,
                BX,
                BN,
                BK,
                INDICATOR,
                UPCAST,
                1,
            )


@triton.jit
def _split_of_product(
    product,
    rows,
    pid,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INDICATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Compute one tile of one split, with one copy of the loop for each kind of tile."""
    # Neighbouring programs read the same rows, so that most reads are served by the L2 cache.
    c_blocks: tl.constexpr = (C + BM + BX - 1) // (BM + BX)
    k_blocks: tl.constexpr = (K + BN - 1) // BN
    all_blocks: tl.constexpr = k_blocks if product.b_ptr is None else 2 * k_blocks
    split = pid // (c_blocks * all_blocks)
    block = pid // c_blocks % all_blocks
    c = pid % c_blocks * (BM + BX)
    if product.sums_ptr is not None:
        if block == 0:
            _sum_rows(
                product,
                product.a_ptr,
                rows,
                split,
                c,
                0,
                0,
                C,
                K,
                BM,
                BX,
                BN,
                BK,
                True,
                INDICATOR,
                UPCAST,
                SIDE,
            )
    first_block: tl.constexpr = 0 if product.sums_ptr is None else 1
    if k_blocks > first_block:
        if (block >= first_block) & (block < k_blocks):
            _sum_rows(
                product,
                product.a_ptr,
                rows,
                split,
                c,
                block * BN,
                0,
                C,
                K,
                BM,
                BX,
                BN,
                BK,
                False,
                INDICATOR,
                UPCAST,
                SIDE,
            )
    if product.b_ptr is not None:
        if block >= k_blocks:
            _sum_rows(
                product,
                product.b_ptr,
                rows,
                split,
                c,
                (block - k_blocks) * BN,
                K,
                C,
                K,
                BM,
                BX,
                BN,
                BK,
                False,
                INDICATOR,
                UPCAST,
                2 + SIDE,
            )


@triton.jit
def _sum_rows(
    product,
    a_ptr,
    rows,
    split,
    c,
    k,
    K_BEFORE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SUMS: tl.constexpr,
    INDICATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    COPY: tl.constexpr,
):
    """Store one tile of d^T a for the rows of one split, and with SUMS their sums.

    The tile begins at column c of d and column k of a. K_BEFORE columns of G come before those of
    ``a``.
    """
    # Copies of this function must differ in an attribute of an instruction. Triton merges equal
    # ends of loops, and would then keep the buffers of both loops in shared memory at once.
    CACHE: tl.constexpr = "" if COPY == 0 else ".wb" if COPY == 1 else ".cg" if COPY == 2 else ".cs"
    count = count_rows(rows)
    length = tl.cdiv(tl.cdiv(count, product.splits), BK) * BK
    begin = split * length
    end = tl.minimum(begin + length, count)
    cs = c + tl.arange(0, BM)
    ks = k + tl.arange(0, BN)
    steps = tl.arange(0, BK)
    # Offsets from the first of BK rows fit into 32 bits, and do not change.
    d_at = steps[:, None] * C + cs[None, :]
    a_at = steps[:, None] * K + ks[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    if BX > 0:
        more_cs = c + BM + tl.arange(0, BX)
        more_at = steps[:, None] * C + more_cs[None, :]
        more_acc = tl.zeros([BX, BN], tl.float32)
    if SUMS:
        # The sums are a product too, whose second operand is 1 in column 0.
        columns = tl.arange(0, FACTORS)[None, :]
        ones = tl.where(columns == 0, 1.0, 0.0) + tl.zeros([BK, FACTORS], tl.float32)
        factors = ones.to(a_ptr.dtype.element_ty)
        sums = tl.zeros([BM, FACTORS], tl.float32)
        if BX > 0:
            more_sums = tl.zeros([BX, FACTORS], tl.float32)
    WEIGHTED: tl.constexpr = SUMS and product.factors_ptr is not None
    for start in range(begin, end, BK):
        ok = (start + steps < end)[:, None]
        d_row = product.d_ptr + tl.cast(start, tl.int64) * C
        a_row = a_ptr + tl.cast(start, tl.int64) * K
        d = tl.load(d_row + d_at, mask=ok & (cs[None, :] < C), other=0.0)
        if BX > 0:
            more = tl.load(d_row + more_at, mask=ok & (more_cs[None, :] < C), other=0.0)
        a = tl.load(a_row + a_at, mask=ok & (ks[None, :] < K), other=0.0)
        acc = dot(tl.trans(d), a, acc, UPCAST)
        if BX > 0:
            more_acc = dot(tl.trans(more), a, more_acc, UPCAST)
        if SUMS:
            if WEIGHTED:
                factors_row = product.factors_ptr + tl.cast(start, tl.int64) * FACTORS
                factors = tl.load(factors_row + steps[:, None] * FACTORS + columns, ok, other=0.0)
            sums = dot(tl.trans(d), factors, sums, UPCAST)
            if BX > 0:
                more_sums = dot(tl.trans(more), factors, more_sums, UPCAST)
    width: tl.constexpr = K if product.b_ptr is None else 2 * K
    partial_ptr = product.partial_ptr + tl.cast(split, tl.int64) * (C * width) + K_BEFORE
    _store_partial(partial_ptr, acc, cs, ks, C, K, width, CACHE)
    if BX > 0:
        _store_partial(partial_ptr, more_acc, more_cs, ks, C, K, width, CACHE)
    if SUMS:
        sums_ptr = product.sums_ptr + split * (2 * C)
        _store_sums(sums_ptr, sums, cs, C, INDICATOR, WEIGHTED)
        if BX > 0:
            _store_sums(sums_ptr, more_sums, more_cs, C, INDICATOR, WEIGHTED)


@triton.jit
def _store_partial(
    ptr,
    acc,
    cs,
    ks,
    C: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    CACHE: tl.constexpr,
):
    tl.store(
        ptr + cs[:, None] * WIDTH + ks[None, :],
        acc,
        mask=(cs[:, None] < C) & (ks[None, :] < K),
        cache_modifier=CACHE,
    )


@triton.jit
def _store_sums(
    ptr,
    sums,
    cs,
    C: tl.constexpr,
    INDICATOR: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    columns = tl.arange(0, FACTORS)[None, :]
    tl.store(ptr + columns * C + cs[:, None], sums, mask=(cs[:, None] < C) & (columns == 0))
    if INDICATOR:
        # Without masks the indicator is 1 for all rows.
        given: tl.constexpr = 1 if WEIGHTED else 0
        at = (columns + 1 - given) * C
        tl.store(ptr + at + cs[:, None], sums, mask=(cs[:, None] < C) & (columns == given))
